"""Callbacks that let only a share of a batch's change stand, and those that end a run."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import REQUESTS, edited_weights, relative_error, tiny_hparams, tiny_model
from sphere_easyedit.editing.session import EditSession
from sphere_easyedit.editing.update_writer import interpolated


class Shares(sphere.EditCallback):
    """Asks for given shares, one after the other, and keeps the events of batches that end."""

    def __init__(self, *shares: float) -> None:
        self.shares = list(shares)
        self.ended: list[sphere.EditEvent] = []

    def review(self, event: sphere.EditEvent) -> float:
        return self.shares.pop(0) if self.shares else 1.0

    def on_batch_end(self, event: sphere.EditEvent) -> None:
        self.ended.append(event)


def edit(model: nn.Module, tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams,
         *callbacks: sphere.EditCallback, batch: int = 0) -> dict[int, Tensor]:
    sphere.apply_sphere_to_model(model, tok, [REQUESTS[batch]], hparams, callbacks=callbacks)
    return edited_weights(model, hparams)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("base_alg", ["MEMIT", "AlphaEdit", "RECT", "PRUNE"])
def test_a_share_of_the_change_stands(family: str, base_alg: str, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    hparams = tiny_hparams(tmp_path, base_alg=base_alg, v_num_grad_steps=3)
    model = tiny_model(family)
    before = edited_weights(model, hparams)
    full = edit(copy.deepcopy(model), tok, hparams)
    watched = Shares(0.5, 0.5)
    quarter = edit(model, tok, hparams, watched)
    (event,) = watched.ended
    assert event.strength == 0.25
    for layer in hparams.layers:
        assert relative_error(quarter[layer] - before[layer], 0.25 * (full[layer] - before[layer])) < 1e-4
        change = float((quarter[layer].double() - before[layer].double()).norm())
        assert event.update_norms[layer] == pytest.approx(change, rel=1e-9)


def test_energy_and_spaces_after_a_lowered_batch_are_those_of_the_weight(tok: PreTrainedTokenizerBase, llama_stats: Path
                                                                          ) -> None:
    """No Gram matrix of the full change is carried on."""
    hparams = tiny_hparams(llama_stats, base_alg="MEMIT", v_num_grad_steps=3)
    model, tracker = tiny_model("llama"), sphere.HETracker()
    for batch in (0, 1):
        edit(model, tok, hparams, Shares(0.3), tracker, batch=batch)
        for layer, weight in edited_weights(model, hparams).items():
            assert tracker.records[-1].energy[layer] == pytest.approx(float(sphere.hyperspherical_energy(weight)),
                                                                      rel=1e-6)


def test_prune_goes_on_from_unrestrained_weights_as_far_as_they_were_let(tok: PreTrainedTokenizerBase, llama_stats: Path
                                                                         ) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="PRUNE", v_num_grad_steps=3)
    model = tiny_model("llama")
    original = edited_weights(model, hparams)
    other = copy.deepcopy(model)
    edit(model, tok, hparams)
    edit(other, tok, hparams, Shares(0.5))
    whole, half = EditSession.of(model).unrestrained, EditSession.of(other).unrestrained
    for layer in hparams.layers:
        assert relative_error(half[layer] - original[layer], 0.5 * (whole[layer] - original[layer])) < 1e-4


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_what_is_no_share_is_refused_and_the_batch_undone(share: float, tok: PreTrainedTokenizerBase, llama_stats: Path
                                                          ) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="MEMIT", v_num_grad_steps=3)
    model = tiny_model("llama")
    before = edited_weights(model, hparams)
    with pytest.raises(ValueError, match="Shares.review returned"):
        edit(model, tok, hparams, Shares(share))
    assert all(torch.equal(before[layer], now) for layer, now in edited_weights(model, hparams).items())


def test_a_callback_that_is_never_content_ends_the_batch(tok: PreTrainedTokenizerBase, llama_stats: Path) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="PRUNE", v_num_grad_steps=3)
    model = tiny_model("llama")
    edit(model, tok, hparams)
    before, unrestrained = edited_weights(model, hparams), dict(EditSession.of(model).unrestrained)
    with pytest.raises(ValueError, match="scaled a batch back 20 times"):
        edit(model, tok, hparams, Shares(*[0.9] * 30), batch=1)
    assert all(torch.equal(before[layer], now) for layer, now in edited_weights(model, hparams).items())
    assert EditSession.of(model).num_edits == 1
    assert all(torch.equal(unrestrained[layer], now) for layer, now in EditSession.of(model).unrestrained.items())


@given(share=st.floats(0.0, 1.0), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_interpolation_stays_between_its_ends(share: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start, end = (torch.randn(3, 4, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    found = interpolated(start, end, share)
    assert found.dtype == dtype
    exact = start.double() + share * (end.double() - start.double())
    assert torch.allclose(found.double(), exact, atol=4 * torch.finfo(torch.promote_types(dtype, torch.bfloat16)).eps
                          if dtype == torch.bfloat16 else 1e-6)
    assert torch.equal(interpolated(start, end, 0.0), start) and torch.equal(interpolated(start, end, 1.0), end)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("base_alg", "share"), [("MEMIT", 1.0), ("AlphaEdit", 1.0), ("AlphaEdit", 0.5)])
def test_updates_are_what_stands_in_the_weights(family: str, base_alg: str, share: float, tok: PreTrainedTokenizerBase,
                                                llama_stats: Path) -> None:
    hparams = tiny_hparams(llama_stats, base_alg=base_alg, v_num_grad_steps=3)
    model, watched = tiny_model(family), Shares(share)
    before = hparams.editable(model).weights()
    before = {layer: weight.clone() for layer, weight in before.items()}
    sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams, callbacks=[watched])
    (event,) = watched.ended
    for layer, weight in hparams.editable(model).weights().items():
        update = event.updates[layer]
        assert update.values.shape[1] == update.keys.shape[1] == len(event.requests) == len(REQUESTS)
        assert relative_error(weight - before[layer], update.dense()) < 1e-4


@pytest.mark.parametrize("base_alg", ["RECT", "PRUNE"])
def test_changes_of_full_rank_are_no_updates(base_alg: str, tok: PreTrainedTokenizerBase, llama_stats: Path) -> None:
    watched = Shares()
    edit(tiny_model("llama"), tok, tiny_hparams(llama_stats, base_alg=base_alg, v_num_grad_steps=3), watched)
    assert not watched.ended[0].updates
