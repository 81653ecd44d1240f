"""Controls and variants of the suppression: what they promise, on tensors and within an edit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import REQUESTS, edited_weights, relative_error, tiny_hparams, tiny_model
from sphere_easyedit.core.suppression import compensated, frobenius_norm, random_directions, scaled, suppressed
from sphere_easyedit.core.updates import LowRankUpdate

SEEDS = st.integers(0, 2**31 - 1)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update_of(seed: int, d_out: int = 10, d_in: int = 16, edits: int = 3) -> LowRankUpdate:
    return LowRankUpdate(drawn(seed, d_out, edits), drawn(seed + 1, d_in, edits), drawn(seed + 2, d_in, edits))


@given(SEEDS)
@settings(max_examples=25, deadline=None)
def test_norm_of_factors_is_that_of_their_product(seed: int) -> None:
    update = update_of(seed)
    assert frobenius_norm(update) == pytest.approx(float(update.dense().norm()), rel=1e-9)
    assert frobenius_norm(update.dense()) == pytest.approx(frobenius_norm(update), rel=1e-9)
    assert relative_error(scaled(update, 0.3).dense(), 0.3 * update.dense()) < 1e-12


def test_random_directions_are_orthonormal_nested_and_of_the_seed() -> None:
    weight = drawn(0, 12, 20).float()
    wide, thin = (sphere.PrincipalSpace.from_weight(weight, gamma) for gamma in (0.8, 0.3))
    directions = random_directions(wide, 5, 2)
    assert directions.shape == (20, wide.rank)
    assert relative_error(directions.T @ directions, torch.eye(wide.rank)) < 1e-5
    assert torch.allclose(random_directions(thin, 5, 2), directions[:, : thin.rank], atol=1e-6)
    assert not torch.allclose(random_directions(wide, 6, 2), directions)
    assert not torch.allclose(random_directions(wide, 5, 3), directions)


@given(SEEDS, st.floats(0.0, 1.0))
@settings(max_examples=25, deadline=None)
def test_compensation_restores_what_the_batch_was_solved_for(seed: int, alpha: float) -> None:
    update = update_of(seed)
    space = sphere.PrincipalSpace.from_weight(drawn(seed + 3, 10, 16), 0.3)
    projected = suppressed(update, space, alpha)
    assert isinstance(projected, LowRankUpdate)
    repaired = compensated(projected, update)
    assert update.solved_for is not None
    wanted = update.dense() @ update.solved_for
    if float((repaired.values - update.values).norm()) < 9.9 * float(update.values.norm()):  # not held back
        assert relative_error(repaired.dense() @ update.solved_for, wanted) < 1e-6
    # What was taken out stays out: the row space is the projected one.
    assert torch.equal(repaired.keys, projected.keys)
    assert float((repaired.values - update.values).norm()) <= 10.01 * float(update.values.norm())


def test_compensation_needs_the_keys() -> None:
    update = LowRankUpdate(torch.ones(2, 1), torch.ones(3, 1))
    with pytest.raises(ValueError, match="solved for"):
        compensated(update, update)


def edit(tmp_path: Path, tok: PreTrainedTokenizerBase, **changes: Any) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Weight changes of one batch, and the weights before it."""
    model = tiny_model("llama")
    hparams = tiny_hparams(tmp_path, v_num_grad_steps=4, projection_stage="update", **changes)
    before = edited_weights(model, hparams)
    sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    return {layer: weight - before[layer] for layer, weight in edited_weights(model, hparams).items()}, before


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT", "RECT"])
def test_controls_within_an_edit(tmp_path: Path, tok: PreTrainedTokenizerBase, base_alg: str) -> None:
    plain, before = edit(tmp_path, tok, base_alg=base_alg, alpha=0.0)
    projected, _ = edit(tmp_path, tok, base_alg=base_alg, alpha=0.8)
    shrunk, _ = edit(tmp_path, tok, base_alg=base_alg, alpha=0.8, suppression="shrink")
    random, _ = edit(tmp_path, tok, base_alg=base_alg, alpha=0.8, suppression="random")
    for layer, change in plain.items():
        assert float(shrunk[layer].norm()) == pytest.approx(float(projected[layer].norm()), rel=1e-3)
        cosine = (shrunk[layer] * change).sum() / (shrunk[layer].norm() * change.norm())
        assert float(cosine) == pytest.approx(1.0, abs=1e-4)
        directions = random_directions(sphere.PrincipalSpace.from_weight(before[layer], 0.5), 0, layer)
        assert relative_error(random[layer], change - 0.8 * change @ directions @ directions.T) < 1e-3
        assert relative_error(random[layer], projected[layer]) > 0.05


def test_compensation_within_an_edit(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    paper, _ = edit(tmp_path, tok, base_alg="MEMIT")
    compensated_edit, _ = edit(tmp_path, tok, base_alg="MEMIT", compensate=True)
    for layer, change in compensated_edit.items():
        assert bool(torch.isfinite(change).all())
        assert relative_error(change, paper[layer]) > 1e-3


@pytest.mark.parametrize(("changes", "message"), [
    ({"base_alg": "RECT", "compensate": True}, "compensate"),
    ({"base_alg": "MEMIT", "suppression": "shrink", "compensate": True}, "shrink"),
    ({"base_alg": "MEMIT", "suppression": "none"}, "suppression"),
])
def test_variants_that_do_not_go_together_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_hparams(tmp_path, **changes)


def test_spanned_by_refuses_what_is_not_orthonormal() -> None:
    with pytest.raises(ValueError, match="orthonormal"):
        sphere.PrincipalSpace.spanned_by(torch.ones(4, 2), 0.5)
