"""Batches that tiny models are edited with, the methods that do it, and what is left of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import REQUESTS, edited_weights, tiny_hparams

BATCHES = [[REQUESTS[0]], REQUESTS[1:], [
    {"prompt": "The mother tongue of Marie Curie is", "subject": "Marie Curie", "target_new": "English"},
    {"prompt": "{} was born in the city of", "subject": "Albert Einstein", "target_new": "London"}]]
METHODS: dict[str, dict[str, Any]] = {
    "AlphaEdit": {"base_alg": "AlphaEdit"},
    "AlphaEdit pretrained": {"base_alg": "AlphaEdit", "principal_space": "pretrained"},
    "MEMIT": {"base_alg": "MEMIT"},
    "MEMIT_seq": {"base_alg": "MEMIT", "keep_previous_keys": True},
    "MEMIT plain": {"base_alg": "MEMIT", "alpha": 0.0},
    "MEMIT compensated": {"base_alg": "MEMIT", "compensate": True},
    "RECT": {"base_alg": "RECT"},
    "PRUNE": {"base_alg": "PRUNE"},
    "ReplayFT": {"base_alg": "ReplayFT", "ft_lr": 0.01, "ft_epochs": 3, "kl_factor": 1.0, "alpha": 0.5},
}
Make = Callable[..., sphere.SPHEREHyperParams]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Statistics are generated once for all tests of a module."""
    return tmp_path_factory.mktemp("statistics")


@pytest.fixture
def hparams_of(folder: Path) -> Make:
    def make(method: str = "AlphaEdit", family: str = "llama", **changes: Any) -> sphere.SPHEREHyperParams:
        chosen = METHODS.get(method, {"base_alg": method})
        return tiny_hparams(folder / family, **{"v_num_grad_steps": 4, **chosen, **changes})

    return make


def edit(model: nn.Module, tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams,
         batches: Sequence[Sequence[dict[str, Any]]], **kwargs: Any) -> dict[int, Tensor]:
    """The edited weights after some batches."""
    for batch in batches:
        sphere.apply_sphere_to_model(model, tok, batch, hparams, **kwargs)
    return edited_weights(model, hparams)


def equal(first: dict[int, Tensor], second: dict[int, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[layer], second[layer]) for layer in first)


def state_of(session: sphere.EditSession) -> dict[str, Any]:
    """What a session holds, by identity: any exchange shows."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(session).items()}
