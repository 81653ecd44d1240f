"""EasyEdit's own executors, from a real checkout, wrapped by us and beside our native ones.

Set EASYEDIT_HOME to a checkout of EasyEdit's main branch with what it imports installed.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import Golden, edited_weights, relative_error
from torch import Tensor, nn

import sphere_easyedit as sphere

pytestmark = pytest.mark.easyedit

EXECUTORS = {
    "MEMIT": ("easyeditor.models.memit.memit_main", "apply_memit_to_model"),
    "AlphaEdit": ("easyeditor.models.alphaedit.AlphaEdit_main", "apply_AlphaEdit_to_model"),
}


@pytest.fixture(params=sorted(EXECUTORS))
def executor(request: pytest.FixtureRequest, golden_llama: Golden, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A base method's name and EasyEdit's function for it, with EasyEdit's module globals as at first import."""
    if home := os.environ.get("EASYEDIT_HOME"):
        monkeypatch.syspath_prepend(home)
    module_name, function = EXECUTORS[request.param]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        pytest.skip(f"no EasyEdit to be imported ({error}); set EASYEDIT_HOME to a checkout of its main branch")
    _reset(module, golden_llama, monkeypatch)
    return request.param, getattr(module, function)


def _reset(module: ModuleType, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONTEXT_TEMPLATES_CACHE", golden.meta["context_templates"])
    monkeypatch.setattr(module, "COV_CACHE", {})
    for name in ("P_loaded", "cache_c_new"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, False)


def _edited(golden: Golden, run: Any, hparams: sphere.SPHEREHyperParams) -> dict[int, Tensor]:
    """Edited weights after both golden batches."""
    model, tok = golden.load()
    for number in range(2):
        run(model, tok, golden.batch(number), hparams)
    return edited_weights(model, hparams)


def _change(golden: Golden, weights: dict[int, Tensor], hparams: sphere.SPHEREHyperParams) -> dict[int, Tensor]:
    model: nn.Module = golden.load()[0]
    return {layer: weights[layer] - before for layer, before in edited_weights(model, hparams).items()}


def test_wrapped_equals_native(executor: Any, golden_llama: Golden) -> None:
    base_alg, function = executor
    hparams = golden_llama.hparams(base_alg=base_alg, alpha=0.5, projection_stage="update")
    native = _change(golden_llama, _edited(golden_llama, sphere.apply_sphere_to_model, hparams), hparams)
    wrapped = _change(golden_llama, _edited(
        golden_llama, lambda *args: sphere.apply_sphere_to_model(*args, executor=function), hparams), hparams)
    for layer in hparams.layers:
        assert relative_error(wrapped[layer], native[layer]) < 2e-3


def test_alpha_zero_leaves_easyedits_bits(
    executor: Any, golden_llama: Golden, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_alg, function = executor
    hparams = golden_llama.hparams(base_alg=base_alg, alpha=0.0, projection_stage="update")
    alone = _edited(golden_llama, function, hparams)
    _reset(importlib.import_module(EXECUTORS[base_alg][0]), golden_llama, monkeypatch)
    wrapped = _edited(
        golden_llama, lambda *args: sphere.apply_sphere_to_model(*args, executor=function), hparams)
    for layer in hparams.layers:
        assert torch.equal(wrapped[layer], alone[layer])
