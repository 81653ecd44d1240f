"""Models edited while offloaded are exported like models edited in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import REQUESTS
from helpers.offloaded import hparams_for, load, saved, split, stored
from sphere_easyedit.export.checksums import base_fingerprint
from sphere_easyedit.export.deltas import apply_deltas, compute_deltas, read_deltas, write_deltas
from sphere_easyedit.export.edited import EditedWeights, Provenance, WeightChange
from sphere_easyedit.models.offload import distinct_names

pytest.importorskip("accelerate")
__all__ = ["saved"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("rest", ["cpu", "disk"])
def test_the_fingerprint_of_a_model_does_not_tell_where_it_is(family: str, rest: str, saved: Callable[[str], Path]
                                                              ) -> None:
    whole, parts = load(saved(family)), split(saved(family), rest=rest)
    assert distinct_names(parts) == distinct_names(whole) == [name for name, _ in whole.named_parameters()]
    assert base_fingerprint(parts) == base_fingerprint(whole)


def test_deltas_between_models_whole_and_split(tok: PreTrainedTokenizerBase, saved: Callable[[str], Path],
                                               tmp_path: Path) -> None:
    folder = saved("llama")
    hparams = hparams_for(folder)
    parts = split(folder)
    editable = hparams.editable(parts)
    fingerprint = base_fingerprint(parts)
    before = {layer: editable.parameter(layer).clone() for layer in editable.layers}
    sphere.apply_sphere_to_model(parts, tok, REQUESTS, hparams)
    assert base_fingerprint(parts) != fingerprint
    changes = tuple(WeightChange(editable.parameter_name(layer), False, before[layer],
                                 editable.parameter(layer).clone()) for layer in editable.layers)
    edited = EditedWeights(changes, Provenance("tiny", fingerprint, "float32", "AlphaEdit", 3, None, None, None, None,
                                               None, {}, {}, {}, None))
    write_deltas(tmp_path, compute_deltas(edited, exact=True))
    for fresh in (load(folder), split(folder, disk=(2,))):
        apply_deltas(fresh, read_deltas(tmp_path))
        assert all(torch.equal(weight, change.after) for weight, change in
                   zip(stored(fresh, hparams).values(), changes, strict=True))
    other = split(folder)
    edited.copy_into(other)
    assert torch.equal(stored(other, hparams)[2], changes[1].after)


def test_executors_are_refused(tok: PreTrainedTokenizerBase, saved: Callable[[str], Path]) -> None:
    def never(model: nn.Module, *_: Any, **__: Any) -> Any:
        raise AssertionError("called")

    with pytest.raises(ValueError, match=r"layers \[1, 2\] are offloaded, where an executor's changes would be lost"):
        sphere.apply_sphere_to_model(split(saved("llama")), tok, REQUESTS,
                                     hparams_for(saved("llama"), projection_stage="update"), executor=never)
