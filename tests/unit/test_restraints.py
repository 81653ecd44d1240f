"""RECT and PRUNE against their formulas written out."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sphere_easyedit.methods.prune import prune
from sphere_easyedit.methods.rect import rect

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.integers(1, 12)


def gaussian(seed: int, rows: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)


def with_singular_values(seed: int, values: list[float], rows: int, width: int) -> Tensor:
    left, right = (torch.linalg.qr(gaussian(seed + i, n, len(values))).Q for i, n in enumerate((rows, width)))
    return (left * torch.tensor(values, dtype=torch.float64)) @ right.T


# --- RECT ---------------------------------------------------------------------------------------------------


@PROPERTY
@given(SEEDS, SIZES, SIZES, st.floats(0.01, 1.0))
def test_rect_keeps_the_largest_relative_changes(seed: int, rows: int, width: int, keep: float) -> None:
    update, weight = gaussian(seed, rows, width), gaussian(seed + 1, rows, width)
    kept = rect(update, weight, keep)
    rank = int((1 - keep) * update.numel())
    change = (update / (weight + 1e-8)).abs().flatten()
    mask = torch.zeros(update.numel(), dtype=torch.bool)
    # The value of that rank is kept as well, hence one more than the share.
    mask[change.argsort(descending=True)[: update.numel() - max(rank - 1, 0)]] = True
    mask = mask.reshape(rows, width)
    assert torch.equal(kept, torch.where(mask, update, 0.0))
    assert torch.equal(update, gaussian(seed, rows, width)) and torch.equal(weight, gaussian(seed + 1, rows, width))
    assert torch.equal(rect(update, weight, 1.0), update) and rect(update, weight, 1.0) is not update


@pytest.mark.parametrize(("update", "weight", "keep", "kept"), [
    # |dW / W|: 0.1, 2, 0.01, 0.01, 1, 3; the third smallest is 0.1 and kept.
    ([[1.0, -2.0, 3.0], [-4.0, 5.0, 6.0]], [[10.0, 1.0, 300.0], [-400.0, 5.0, -2.0]], 0.5,
     [[1.0, -2.0, 0.0], [0.0, 5.0, 6.0]]),
    ([[100.0, 0.125], [100.0, 0.125]], [[1e6, 1e-3], [1e6, 1e-3]], 0.25, [[0.0, 0.125], [0.0, 0.125]]),
    ([[1e-3, 5.0, -1e-3, 5.0, 5.0]], [[0.0, 1.0, 0.0, 1.0, 1.0]], 0.2, [[1e-3, 0.0, -1e-3, 0.0, 0.0]]),
    ([[1.0] * 5], [[1e-8, 4e-9, 2e-9, 1.0, 1.0]], 0.2, [[0.0, 1.0, 1.0, 0.0, 0.0]]),
], ids=["by hand", "relative size", "zero weights", "epsilon"])
def test_rect_on_small_matrices(update: list[list[float]], weight: list[list[float]], keep: float,
                                kept: list[list[float]]) -> None:
    assert rect(torch.tensor(update, dtype=torch.float64), torch.tensor(weight, dtype=torch.float64), keep
                ).tolist() == kept


@pytest.mark.parametrize("scale", [1.0, 1e-8])
def test_rect_reads_a_narrow_weight_in_the_updates_precision(scale: float) -> None:
    update = gaussian(0, 60, 70, torch.float32)
    weight = (scale * gaussian(1, 60, 70)).to(torch.bfloat16)
    kept = rect(update, weight, 0.4)
    assert kept.dtype == torch.float32
    assert torch.equal(kept, rect(update, weight.float(), 0.4))


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, math.nan])
def test_rect_bad_share(keep: float) -> None:
    with pytest.raises(ValueError, match=r"rect_keep is .*give a share in \(0, 1\]"):
        rect(torch.ones(2, 2), torch.ones(2, 2), keep)


# --- PRUNE --------------------------------------------------------------------------------------------------


@PROPERTY
@given(SEEDS, st.lists(st.floats(0.1, 50.0), min_size=1, max_size=5, unique=True), st.integers(5, 9),
       st.integers(5, 9), st.one_of(st.none(), st.floats(1.5, 20.0)))
def test_prune_shapes_singular_values_by_the_logarithm(
    seed: int, values: list[float], rows: int, width: int, log_base: float | None
) -> None:
    change, original = with_singular_values(seed, values, rows, width), gaussian(seed + 7, rows, width)
    limit = float(torch.linalg.svdvals(original)[0])
    base = math.e if log_base is None else log_base
    restrained = prune(change, original, log_base)
    expected = [math.log(s, base) - math.log(limit, base) + limit if s > limit else s for s in values]
    # Same singular vectors, so the matrix is known, not only its singular values.
    torch.testing.assert_close(restrained, with_singular_values(seed, expected, rows, width), rtol=0, atol=1e-9)
    found = torch.linalg.svdvals(restrained)[: len(values)]
    torch.testing.assert_close(found, torch.tensor(sorted(map(abs, expected), reverse=True), dtype=torch.float64),
                               rtol=0, atol=1e-9)
    assert torch.equal(change, with_singular_values(seed, values, rows, width))
    assert torch.equal(original, gaussian(seed + 7, rows, width))


def test_prune_leaves_small_changes_bit_for_bit() -> None:
    original = gaussian(0, 6, 9, torch.float32)
    limit = torch.linalg.matrix_norm(original, ord=2)
    change = gaussian(1, 6, 9, torch.float32)
    change *= 0.99 * limit / torch.linalg.matrix_norm(change, ord=2)
    restrained = prune(change, original)
    assert torch.equal(restrained, change)
    assert restrained.data_ptr() != change.data_ptr()
    assert torch.equal(prune(0 * change, original), 0 * change)


@pytest.mark.parametrize("base", [1.0, 0.5, 0.0, -2.0, math.nan])
def test_prune_bad_base(base: float) -> None:
    with pytest.raises(ValueError, match=r"prune_log_base is .*above 1, or null"):
        prune(torch.ones(2, 2), torch.ones(2, 2), base)


@pytest.mark.parametrize("restraint", [rect, prune])
def test_bad_shape(restraint: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        restraint(torch.ones(2, 3), torch.ones(3, 2))


def test_prune_of_a_zero_weight() -> None:
    with pytest.raises(ValueError, match="^the original weight is all zero: PRUNE has no singular value"):
        prune(torch.ones(2, 2), torch.zeros(2, 2))


def test_prune_by_a_small_and_narrow_weight() -> None:
    """Below 1 a singular value bounds as any other; the weight is read in the change's precision."""
    original = (0.01 * gaussian(0, 6, 9)).to(torch.bfloat16)
    change = gaussian(1, 6, 9, torch.float32)
    restrained = prune(change, original)
    assert restrained.dtype == torch.float32
    torch.testing.assert_close(restrained.double(), prune(change.double(), original.double()), rtol=1e-4, atol=1e-5)
