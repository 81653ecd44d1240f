"""Base methods as objects: the registry, and a method of the user's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import REQUESTS, edited_weights, tiny_hparams, tiny_model
from sphere_easyedit.core.updates import Update, dense
from sphere_easyedit.methods.base import Method
from sphere_easyedit.methods.memit import MEMIT
from sphere_easyedit.methods.registry import METHODS


class TopRows(MEMIT):
    """MEMIT that changes the half of the neurons whose update is largest."""

    name = "TopRows"
    default_alpha = 0.25
    is_low_rank = False

    def restrain(self, update: Update, weight: Tensor, hparams: sphere.SPHEREHyperParams) -> Update:
        change = dense(update)
        norms = change.norm(dim=1, keepdim=True)
        return torch.where(norms > norms.median(), change, 0.0)


@pytest.fixture
def registered() -> Iterator[None]:
    sphere.register_method(TopRows)
    yield
    sphere.unregister_method("TopRows")


@pytest.mark.usefixtures("registered")
def test_a_users_method_edits_with_sphere_on_top(llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="TopRows")
    assert (hparams.alpha, hparams.projection_stage, hparams.principal_space) == (0.25, "update", "current")
    model = tiny_model("llama")
    before = edited_weights(model, hparams)
    sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    for layer, weight in edited_weights(model, hparams).items():
        changed = (weight != before[layer]).any(dim=1)
        assert int(changed.sum()) == len(changed) // 2


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("method", "error", "message"), [
    (TopRows, ValueError, "'TopRows' is registered already"),
    (type("MEMIT", (MEMIT,), {}), ValueError, "'MEMIT' is registered already"),
    (type("Nameless", (MEMIT,), {"name": ""}), ValueError, "Nameless.name is ''"),
    (type("Itself", (MEMIT,), {"name": "SPHERE"}), ValueError, "other than SPHERE"),
    (type("Half", (Method,), {"name": "Half"}), TypeError, "Half lacks key_metrics, solve_densely"),
    (TopRows(), TypeError, "give a subclass"), (dict, TypeError, "give a subclass"),
], ids=["taken", "built in", "no name", "reserved", "abstract", "instance", "another class"])
def test_what_can_not_be_registered(method: type[Method], error: type[Exception], message: str) -> None:
    names = METHODS.names
    with pytest.raises(error, match=message):
        sphere.register_method(method)
    assert METHODS.names == names


def test_a_removed_method_is_unknown_and_those_built_in_stay(tmp_path: Path) -> None:
    sphere.register_method(TopRows)
    sphere.unregister_method("TopRows")
    with pytest.raises(ValueError, match="base_alg is 'TopRows', but built in are AlphaEdit, MEMIT, RECT, PRUNE"):
        tiny_hparams(tmp_path, base_alg="TopRows")
    with pytest.raises(ValueError, match="'TopRows' is not a base method"):
        sphere.unregister_method("TopRows")
    with pytest.raises(ValueError, match="MEMIT is built in"):
        sphere.unregister_method("MEMIT")


def test_an_unknown_name_is_answered_with_the_nearest_and_the_list() -> None:
    with pytest.raises(ValueError, match="'memitt' is not a base method; there are AlphaEdit, .*"
                                         ": did you mean 'MEMIT'"):
        METHODS.get("memitt")
