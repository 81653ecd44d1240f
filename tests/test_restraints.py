"""RECT and PRUNE against their formulas written out."""

from __future__ import annotations

import math

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
    assert torch.equal(kept != 0, mask)
    assert torch.equal(kept[mask], update[mask])  # as they were, and in place
    assert int((kept != 0).sum()) == update.numel() - max(rank - 1, 0)


def test_rect_by_hand() -> None:
    update = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, 6.0]])
    weight = torch.tensor([[10.0, 1.0, 300.0], [-400.0, 5.0, -2.0]])
    # |dW / W|: 0.1, 2, 0.01, 0.01, 1, 3; the third smallest is 0.1 and kept.
    expected = torch.tensor([[1.0, -2.0, 0.0], [0.0, 5.0, 6.0]])
    assert torch.equal(rect(update, weight, keep=0.5), expected)
    assert torch.equal(rect(update, weight), torch.tensor([[1.0, -2.0, 0.0], [0.0, 5.0, 6.0]]))  # rank 3 of 6


def test_rect_is_by_relative_and_not_by_plain_size() -> None:
    update = torch.tensor([[100.0, 0.1]])
    weight = torch.tensor([[1e6, 1e-3]])
    assert torch.equal(rect(torch.cat([update, update]), torch.cat([weight, weight]), keep=0.25),
                       torch.tensor([[0.0, 0.1], [0.0, 0.1]]))


def test_rect_keeps_changes_of_zero_weights() -> None:
    update = torch.tensor([[1e-3, 5.0, -1e-3, 5.0, 5.0]])
    weight = torch.tensor([[0.0, 1.0, 0.0, 1.0, 1.0]])
    kept = rect(update, weight, keep=0.2)  # rank 4: the zero weights' changes are far ahead
    assert torch.equal(kept, torch.tensor([[1e-3, 0.0, -1e-3, 0.0, 0.0]]))
    assert bool(torch.isfinite(kept).all())


def test_rect_adds_its_epsilon_to_the_weight() -> None:
    update = torch.ones(1, 5, dtype=torch.float64)
    weight = torch.tensor([[1e-8, 4e-9, 2e-9, 1.0, 1.0]], dtype=torch.float64)
    assert rect(update, weight, keep=0.2).tolist() == [[0.0, 1.0, 1.0, 0.0, 0.0]]


def test_rect_keep_one_keeps_all() -> None:
    update, weight = gaussian(0, 4, 5), gaussian(1, 4, 5)
    kept = rect(update, weight, keep=1.0)
    assert torch.equal(kept, update)
    assert kept.data_ptr() != update.data_ptr()


def test_rect_leaves_its_arguments_alone() -> None:
    update, weight = gaussian(0, 4, 5), gaussian(1, 4, 5)
    before = update.clone(), weight.clone()
    rect(update, weight, 0.3)
    assert torch.equal(update, before[0])
    assert torch.equal(weight, before[1])


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


def test_rect_bad_shape() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        rect(torch.ones(2, 3), torch.ones(3, 2))


# --- PRUNE --------------------------------------------------------------------------------------------------


@PROPERTY
@given(SEEDS, st.lists(st.floats(0.1, 50.0), min_size=1, max_size=5, unique=True), st.integers(5, 9),
       st.integers(5, 9), st.one_of(st.none(), st.floats(1.5, 20.0)))
def test_prune_shapes_singular_values_by_the_logarithm(
    seed: int, values: list[float], rows: int, width: int, log_base: float | None
) -> None:
    change = with_singular_values(seed, values, rows, width)
    original = gaussian(seed + 7, rows, width)
    limit = float(torch.linalg.svdvals(original)[0])
    base = math.e if log_base is None else log_base
    restrained = prune(change, original, log_base)
    expected = [math.log(s, base) - math.log(limit, base) + limit if s > limit else s for s in values]
    # Same singular vectors, so the matrix is known, not only its singular values.
    torch.testing.assert_close(restrained, with_singular_values(seed, expected, rows, width), rtol=0, atol=1e-9)
    found = torch.linalg.svdvals(restrained)[: len(values)]
    torch.testing.assert_close(found, torch.tensor(sorted(map(abs, expected), reverse=True), dtype=torch.float64),
                               rtol=0, atol=1e-9)


def test_prune_leaves_small_changes_bit_for_bit() -> None:
    original = gaussian(0, 6, 9, torch.float32)
    limit = torch.linalg.matrix_norm(original, ord=2)
    change = gaussian(1, 6, 9, torch.float32)
    change *= 0.99 * limit / torch.linalg.matrix_norm(change, ord=2)
    restrained = prune(change, original)
    assert torch.equal(restrained, change)
    assert restrained.data_ptr() != change.data_ptr()


def test_prune_brings_large_changes_down() -> None:
    original = gaussian(0, 6, 9)
    limit = float(torch.linalg.matrix_norm(original, ord=2))
    change = with_singular_values(1, [100 * limit, 2 * limit, 0.5 * limit], 6, 9)
    found = torch.linalg.svdvals(prune(change, original))[:3]
    expected = [limit + math.log(100), limit + math.log(2), 0.5 * limit]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    tighter = torch.linalg.svdvals(prune(change, original, log_base=10.0))[:3]
    torch.testing.assert_close(tighter, torch.tensor([limit + 2.0, limit + math.log10(2), 0.5 * limit],
                                                     dtype=torch.float64))


def test_prune_natural_logarithm_is_base_e() -> None:
    original, change = gaussian(0, 6, 6), 40.0 * gaussian(1, 6, 6)
    torch.testing.assert_close(prune(change, original), prune(change, original, math.e))
    assert not torch.allclose(prune(change, original), prune(change, original, 2.0), rtol=1e-3)


def test_prune_leaves_its_arguments_alone() -> None:
    original, change = gaussian(0, 6, 6), 40.0 * gaussian(1, 6, 6)
    before = original.clone(), change.clone()
    prune(change, original)
    assert torch.equal(original, before[0])
    assert torch.equal(change, before[1])


def test_prune_of_no_change_is_no_change() -> None:
    assert torch.equal(prune(torch.zeros(4, 5), torch.ones(4, 5)), torch.zeros(4, 5))


@pytest.mark.parametrize("base", [1.0, 0.5, 0.0, -2.0, math.nan])
def test_prune_bad_base(base: float) -> None:
    with pytest.raises(ValueError, match=r"prune_log_base is .*above 1, or null"):
        prune(torch.ones(2, 2), torch.ones(2, 2), base)


def test_prune_bad_shape() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
        prune(torch.ones(2, 3), torch.ones(3, 2))


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
