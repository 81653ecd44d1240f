"""Hyperspherical energy against a float64 brute force, its invariances, and Theorems 1 to 3."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.models import gaussian
from helpers.paths import REPOSITORY
from sphere_easyedit.core import hyperspherical, tensors
from sphere_easyedit.core.hyperspherical import DISTANCE_FLOOR, energy_from_gram, hyperspherical_energy

ROOT = REPOSITORY
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.integers(2, 14)


def brute_distances(weight: Tensor) -> Tensor:
    """Distances between the directions of the non-zero rows, by float64 differences; inf on the diagonal."""
    rows = weight.to(torch.float64)
    rows = rows[rows.norm(dim=1) > 0]
    unit = rows / rows.norm(dim=1, keepdim=True)
    distances: Tensor = (unit[:, None, :] - unit[None, :, :]).norm(dim=2).clamp(min=DISTANCE_FLOOR)
    distances.fill_diagonal_(math.inf)
    return distances


def brute_energy(weight: Tensor, s: float = 1.0) -> float:
    return float(brute_distances(weight).pow(-s).sum())


# --- value --------------------------------------------------------------------------------------------------


def test_energy_of_a_square_of_directions_is_known() -> None:
    weight = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, -5.0]])
    # Each direction sees two at sqrt(2) and one at 2.
    assert hyperspherical_energy(weight).item() == pytest.approx(4 * (2 / math.sqrt(2) + 0.5), rel=1e-12)
    assert hyperspherical_energy(weight, s=2.0).item() == pytest.approx(4 * (2 / 2 + 1 / 4), rel=1e-12)
    assert hyperspherical_energy(weight, s=3.0).item() == pytest.approx(4 * (2 / 2**1.5 + 1 / 8), rel=1e-12)
    assert hyperspherical_energy(weight, s=4.0).item() == pytest.approx(4 * (2 / 4 + 1 / 16), rel=1e-12)
    assert hyperspherical_energy(weight, reduction="mean").item() == pytest.approx(
        (2 / math.sqrt(2) + 0.5) / 3, rel=1e-12
    )


def test_result_is_a_float64_scalar_without_a_graph() -> None:
    weight = torch.nn.Parameter(gaussian(0, 5, 4, torch.float32))
    result = hyperspherical_energy(weight)
    assert result.shape == ()
    assert result.dtype == torch.float64
    assert not result.requires_grad


@PROPERTY
@given(SEEDS, SIZES, SIZES, st.sampled_from([0.5, 1.0, 2.0, 3.0]))
def test_energy_equals_brute_force(seed: int, rows: int, width: int, s: float) -> None:
    weight = gaussian(seed, rows, width)
    assert hyperspherical_energy(weight, s=s).item() == pytest.approx(brute_energy(weight, s), rel=1e-9)
    mean = hyperspherical_energy(weight, s=s, reduction="mean").item()
    assert mean == pytest.approx(brute_energy(weight, s) / (rows * (rows - 1)), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_as_exact_as_its_entries(dtype: torch.dtype) -> None:
    weight = gaussian(3, 60, 96, dtype)
    rel = 1e-12 if dtype == torch.float64 else 1e-6
    assert hyperspherical_energy(weight).item() == pytest.approx(brute_energy(weight), rel=rel)


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("most_rows", [2, 7, 40, 41, 82])
def test_blocked_equals_unblocked(
    dtype: torch.dtype, rel: float, most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = gaussian(4, 41, 23, dtype)
    weight[5] = 0
    weight[17] = weight[2]
    weight[30] = weight[2] * (1 + 1e-3) + 1e-4
    whole = hyperspherical_energy(weight)
    monkeypatch.setattr(hyperspherical, "_MAX_BLOCK_ROWS", most_rows)
    assert hyperspherical_energy(weight).item() == pytest.approx(whole.item(), rel=rel)
    by_gram = energy_from_gram(weight @ weight.T, weight=weight)
    assert by_gram.item() == pytest.approx(whole.item(), rel=max(rel, 1e-9))  # rounded otherwise than W W^T


@pytest.mark.parametrize(
    ("dtype", "scale", "work"),
    [
        (torch.float16, 1.0, torch.float32),
        (torch.bfloat16, 1.0, torch.float32),
        (torch.float32, 1.0, torch.float32),
        (torch.float32, 1e-35, torch.float64),  # norms that a float32 quotient would lose digits by
        (torch.float64, 1.0, torch.float64),
    ],
)
def test_products_are_as_wide_as_they_need_be(dtype: torch.dtype, scale: float, work: torch.dtype) -> None:
    rows = hyperspherical._Rows.of((scale * gaussian(46, 5, 4)).to(dtype))
    assert {cosine.dtype for _, _, cosine in hyperspherical._weight_cosines(rows)} == {work}


def test_more_rows_than_a_default_block() -> None:
    weight = gaussian(5, 700, 5)
    assert hyperspherical_energy(weight).item() == pytest.approx(brute_energy(weight), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [None, 3e-1, 1e-3, 1e-6])
def test_sizes_of_blocks_change_nothing(
    dtype: torch.dtype, gap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, pairs and copies a few at a time: all rows apart, some close, and all as close as ``gap``."""
    weight = gaussian(40, 29, 9, dtype) if gap is None else (gaussian(40, 1, 9) + gap * gaussian(41, 29, 9)).to(dtype)
    weight[3] = 0
    weight[8], weight[20], weight[28] = weight[2], weight[2] * 1.0001, weight[11]
    weight[28, 4] *= 1 + 1e-4
    expected = {s: brute_energy(weight, s) for s in (1.0, 2.0)}
    for name, size in {"_COPY_ELEMENTS": 40, "_PANEL_BYTES": 400, "_MAX_BLOCK_ROWS": 6, "_REFINE_ROWS": 4}.items():
        monkeypatch.setattr(hyperspherical, name, size)
    for s, energy in expected.items():
        assert hyperspherical_energy(weight, s).item() == pytest.approx(energy, rel=1e-6)
        assert energy_from_gram(weight @ weight.T, s, weight=weight).item() == pytest.approx(energy, rel=1e-6)


@pytest.mark.parametrize(
    ("count", "width", "dtype", "rows"),
    [
        (4096, 14336, torch.float32, 1024),  # a quarter
        (4096, 28672, torch.float32, 585),  # what a panel of 64 MiB holds
        (4096, 28672, torch.float64, 292),
        (8193, 16, torch.float32, 2048),  # the most
        (4097, 16, torch.float32, 1025),  # a quarter, rounded up
        (10, 16, torch.float32, 256),
        (10, 0, torch.float32, 256),
        (10, 10**9, torch.float32, 1),
    ],
)
def test_default_block(count: int, width: int, dtype: torch.dtype, rows: int) -> None:
    assert hyperspherical._block_rows(count, width, dtype) == rows


# --- invariances --------------------------------------------------------------------------------------------


@PROPERTY
@given(SEEDS, SIZES, SIZES)
def test_energy_is_invariant_to_rotation(seed: int, rows: int, width: int) -> None:
    weight = gaussian(seed, rows, width)
    rotation = torch.linalg.qr(gaussian(seed + 1, width, width)).Q
    expected = hyperspherical_energy(weight).item()
    assert hyperspherical_energy(weight @ rotation).item() == pytest.approx(expected, rel=1e-9)


@PROPERTY
@given(SEEDS, SIZES, SIZES, st.floats(-12, 12))
def test_energy_is_invariant_to_positive_row_scaling(seed: int, rows: int, width: int, log: float) -> None:
    weight = gaussian(seed, rows, width)
    scale = 10.0 ** (log * gaussian(seed + 1, rows, 1).tanh())
    expected = hyperspherical_energy(weight).item()
    assert hyperspherical_energy(weight * scale).item() == pytest.approx(expected, rel=1e-9)


@PROPERTY
@given(SEEDS, SIZES, SIZES)
def test_energy_is_invariant_to_row_order(seed: int, rows: int, width: int) -> None:
    weight = gaussian(seed, rows, width)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    expected = hyperspherical_energy(weight).item()
    assert hyperspherical_energy(weight[order]).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("exponent", [-145, -70, 70, 124])
def test_extreme_float32_scales_do_not_matter(exponent: int) -> None:
    weight = (
        (4 * gaussian(6, 12, 30)).round().clamp(-15, 15).float()
    )  # exact as denormals; norms that overflow
    scaled = torch.ldexp(weight.double(), torch.tensor(exponent)).float()
    assert torch.equal(scaled.double() * 2.0**-exponent, weight.double())
    expected = hyperspherical_energy(weight).item()
    assert hyperspherical_energy(scaled).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e170, 1e300])
def test_extreme_float64_scales_do_not_matter(scale: float) -> None:
    weight = gaussian(7, 12, 6)
    expected = hyperspherical_energy(weight).item()
    assert hyperspherical_energy(weight * scale).item() == pytest.approx(expected, rel=1e-9)


# --- zero, duplicate and nearly duplicate rows --------------------------------------------------------------


def test_zero_rows_take_no_part() -> None:
    weight = gaussian(8, 9, 7)
    padded = torch.zeros(12, 7, dtype=torch.float64)
    kept = [0, 1, 3, 4, 5, 7, 8, 9, 11]
    padded[kept] = weight
    for reduction in ("sum", "mean"):
        expected = hyperspherical_energy(weight, reduction=reduction).item()
        found = hyperspherical_energy(padded, reduction=reduction).item()
        assert found == pytest.approx(expected, rel=1e-12)
        by_gram = energy_from_gram(padded @ padded.T, reduction=reduction)
        assert by_gram.item() == pytest.approx(expected, rel=1e-9)


def test_mean_says_how_many_directions_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    weight = gaussian(43, 5, 4)
    weight[2] = 0
    with caplog.at_level(logging.DEBUG, logger=hyperspherical.__name__):
        hyperspherical_energy(weight, reduction="mean")
    assert caplog.messages == ["energy per pair over 4 directions of 5 rows"]


@pytest.mark.parametrize("weight", [torch.zeros(0, 4), torch.zeros(3, 0), torch.zeros(3, 4), torch.eye(1, 4)])
def test_fewer_than_two_directions_have_no_energy(weight: Tensor) -> None:
    assert hyperspherical_energy(weight).item() == 0.0
    assert hyperspherical_energy(weight, reduction="mean").item() == 0.0
    assert energy_from_gram(weight @ weight.T).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("s", [1.0, 2.0])
def test_duplicate_rows_are_floored(dtype: torch.dtype, s: float) -> None:
    row = gaussian(9, 1, 50, dtype)
    pair = torch.cat([row, row * 4])  # a power of two keeps the direction exactly
    assert hyperspherical_energy(pair, s=s).item() == pytest.approx(2 * DISTANCE_FLOOR**-s, rel=1e-12)
    distinct = gaussian(10, 30, 50, dtype)
    both = torch.cat([distinct, distinct[:1]])
    assert hyperspherical_energy(both, s=s).item() == pytest.approx(brute_energy(both, s), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7])
def test_nearly_duplicate_rows_lose_no_digits(dtype: torch.dtype, gap: float) -> None:
    weight = gaussian(11, 20, 64, dtype)
    near = (weight[:2].double() + gap * gaussian(12, 2, 64)).to(dtype)
    weight = torch.cat([weight, near])
    for s in (1.0, 2.0):
        expected = brute_energy(weight, s)
        assert hyperspherical_energy(weight, s).item() == pytest.approx(expected, rel=2e-6)
        by_gram = energy_from_gram(weight @ weight.T, s, weight=weight)
        assert by_gram.item() == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("gap", [3e-1, 1e-3, 1e-6])
def test_a_weight_whose_rows_are_all_nearly_equal(gap: float) -> None:
    # Takes the ways for many close pairs: a float64 product, then differences of whole panels.
    weight = (gaussian(13, 1, 40) + gap * gaussian(14, 300, 40)).float()
    assert hyperspherical_energy(weight).item() == pytest.approx(brute_energy(weight), rel=1e-6)


def test_a_constant_weight_is_finite() -> None:
    weight = torch.full((300, 16), 0.1)
    assert hyperspherical_energy(weight, reduction="mean").item() == pytest.approx(
        1 / DISTANCE_FLOOR, rel=1e-9
    )


# --- Gram matrix --------------------------------------------------------------------------------------------


@PROPERTY
@given(SEEDS, SIZES, SIZES, st.sampled_from([1.0, 2.0, 1.5]))
def test_gram_route_equals_direct_route(seed: int, rows: int, width: int, s: float) -> None:
    weight = gaussian(seed, rows, width)
    gram = weight @ weight.T
    for reduction in ("sum", "mean"):
        expected = hyperspherical_energy(weight, s, reduction).item()
        found = energy_from_gram(gram, s, reduction).item()
        assert found == pytest.approx(expected, rel=1e-6)
        found = energy_from_gram(gram, s, reduction, weight=weight).item()
        assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_gram_of_rows_of_any_norm(scale: float) -> None:
    weight = scale * gaussian(45, 6, 4)
    weight[2] = 0
    assert energy_from_gram(weight @ weight.T).item() == pytest.approx(brute_energy(weight), rel=1e-9)


def test_float32_gram_is_worked_on_in_float64() -> None:
    weight = gaussian(47, 6, 5, torch.float32)
    gram = weight @ weight.T
    assert torch.equal(energy_from_gram(gram), energy_from_gram(gram.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_alone_floors_at_its_own_precision(dtype: torch.dtype) -> None:
    pair = torch.tensor([[3.0, 4.0], [3.0, 4.0]], dtype=dtype)  # exact squares: the cosine is 1
    floor = math.sqrt(8 * torch.finfo(dtype).eps)
    assert energy_from_gram(pair @ pair.T).item() == pytest.approx(2 / floor, rel=1e-9)
    assert energy_from_gram(pair @ pair.T, weight=pair).item() == pytest.approx(2 / DISTANCE_FLOOR, rel=1e-9)


def test_gram_diagonal_below_zero() -> None:
    """By rounding it stands for a row of zeros; below that it is no Gram matrix."""
    weight = gaussian(19, 5, 4)
    weight[2] = 0
    gram = weight @ weight.T
    gram[2, 2] = -0.9e-4 * gram.diagonal().max()
    assert energy_from_gram(gram).item() == pytest.approx(brute_energy(weight), rel=1e-9)
    gram[2, 2] = -1.2e-4 * gram.diagonal().max()
    with pytest.raises(ValueError, match="squared norms on its diagonal, got -"):
        energy_from_gram(gram)
    with pytest.raises(ValueError, match="squared norms on its diagonal, got -1e-30"):
        energy_from_gram(torch.tensor([[-1e-30]], dtype=torch.float64))


# --- Theorems 1 to 3 ----------------------------------------------------------------------------------------


def constants(weight: Tensor) -> Tensor:
    """``K_i = (2 / ||w_i||) sum_{j != i} ||what_i - what_j||^-2``, ``(d_out,)``."""
    found: Tensor = 2 * brute_distances(weight).pow(-2).sum(dim=1) / weight.norm(dim=1)
    return found


def change_of_energy(weight: Tensor, step: Tensor) -> float:
    return abs(hyperspherical_energy(weight + step) - hyperspherical_energy(weight)).item()


def small_step(weight: Tensor, seed: int) -> Tensor:
    """A random update far smaller than the distances between directions."""
    reach = brute_distances(weight).amin(dim=1, keepdim=True) * weight.norm(dim=1, keepdim=True)
    step = gaussian(seed, *weight.shape)
    small: Tensor = 1e-5 * reach * step / step.norm(dim=1, keepdim=True)
    return small


@PROPERTY
@given(SEEDS, SIZES, st.integers(2, 14))
def test_theorem_3_bounds_the_change(seed: int, rows: int, width: int) -> None:
    weight = gaussian(seed, rows, width)
    step = small_step(weight, seed + 1)
    assert change_of_energy(weight, step) <= (constants(weight) * step.norm(dim=1)).sum().item() * (1 + 1e-3)


@PROPERTY
@given(SEEDS, SIZES, st.integers(2, 14))
def test_theorem_2_bounds_the_change_from_one_neuron(seed: int, rows: int, width: int) -> None:
    weight = gaussian(seed, rows, width)
    moved = seed % rows
    step = torch.zeros_like(weight)
    step[moved] = small_step(weight, seed + 1)[moved]
    assert change_of_energy(weight, step) <= (constants(weight)[moved] * step[moved].norm()).item() * (1 + 1e-3)


@PROPERTY
@given(SEEDS, SIZES, st.integers(2, 14))
def test_theorem_1_bounds_the_update_from_below(seed: int, rows: int, width: int) -> None:
    weight = gaussian(seed, rows, width)
    step = small_step(weight, seed + 1)
    least = change_of_energy(weight, step) ** 2 / constants(weight).square().sum().item()
    assert least <= step.square().sum().item() * (1 + 1e-3)


def test_the_constants_are_sharp_for_two_close_neurons() -> None:
    weight = torch.tensor([[1.0, 0.0], [math.cos(0.1), math.sin(0.1)]], dtype=torch.float64)
    step = torch.tensor([[0.0, -1e-7], [0.0, 0.0]], dtype=torch.float64)
    change = change_of_energy(weight, step)
    assert change <= (constants(weight) * step.norm(dim=1)).sum().item() <= change * 1.01
    even = torch.tensor([[0.0, -1e-7], [-math.sin(0.1) * 1e-7, math.cos(0.1) * 1e-7]], dtype=torch.float64)
    least = change_of_energy(weight, even) ** 2 / constants(weight).square().sum().item()
    assert least <= even.square().sum().item() <= least * 1.02


# --- devices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", [False, True])
def test_all_is_computed_where_the_weight_is(answer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: fake tensors have no numbers, but refuse as a GPU does what mixes devices."""
    for name, known in {"int": 0, "float": 1.0, "bool": answer}.items():  # of what has no numbers
        for module in (hyperspherical, tensors):
            monkeypatch.setattr(module, name, type(name, (), {"__new__": lambda _, __, known=known: known}),
                                raising=False)
    monkeypatch.setattr(hyperspherical, "_exclude", lambda *_: None)  # by masks, whose count has no number either
    monkeypatch.setattr(hyperspherical, "_MAX_BLOCK_ROWS", 4)
    device = torch.device("lazy:0")  # the one that torch always knows
    with FakeTensorMode():
        weight = torch.ones(5, 3, device=device)
        results = [hyperspherical_energy(weight)]
        if answer:  # that all is finite
            results += [energy_from_gram(weight @ weight.T, weight=given_) for given_ in (None, weight)]
        rows, pairs = hyperspherical._Rows.of(weight), torch.zeros(4, dtype=torch.int64, device=device)
        results += [hyperspherical._direct_squared(rows, pairs, pairs)]
        assert all(result.device == device for result in results)


# --- refusals -----------------------------------------------------------------------------------------------

GOOD = gaussian(17, 4, 3, torch.float32)
NAN = GOOD.clone()
NAN[1, 2] = math.nan


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (hyperspherical_energy, (torch.ones(3),), r"weight must be 2-D .*\(3,\)"),
        (hyperspherical_energy, (torch.ones(3, 4, dtype=torch.int64),), "floating point, got torch.int64"),
        (hyperspherical_energy, ([[1.0]],), "torch.Tensor, got list"),
        (hyperspherical_energy, (NAN,), r"^weight must be finite, but 1 of its 4 rows .*; look for .* tensor$"),
        (hyperspherical_energy, (GOOD / 0,), "weight must be finite, but 4 of its 4 rows"),
        (hyperspherical_energy, (GOOD, 0.0), "s must be above 0, got 0.0"),
        (hyperspherical_energy, (GOOD, -1.0), "s must be above 0, got -1.0"),
        (hyperspherical_energy, (GOOD, math.nan), "s must be one finite number, got nan"),
        (hyperspherical_energy, (GOOD, 1.0, "max"), "'sum' or 'mean', got 'max'"),
        (energy_from_gram, (GOOD @ GOOD.T, 0.0), "s must be above 0, got 0.0"),
        (energy_from_gram, (GOOD @ GOOD.T, 1.0, "max"), "'sum' or 'mean', got 'max'"),
        (energy_from_gram, (GOOD @ GOOD.T, 1.0, "sum", GOOD.long()), "weight must be floating point"),
        (energy_from_gram, (GOOD.tolist(),), "gram must be a torch.Tensor, got list"),
        (energy_from_gram, (GOOD,), r"gram must be square, .* \(4, 3\)"),
        (energy_from_gram, (NAN @ NAN.T,), "gram must be finite, but 7 entries are not"),
        (energy_from_gram, (-(GOOD @ GOOD.T),), "squared norms"),
        (energy_from_gram, ((GOOD @ GOOD.T).half(),), "float32 or float64, got torch.float16"),
        (energy_from_gram, (GOOD @ GOOD.T, 1.0, "sum", GOOD[:3]), "weight must be the W of gram"),
    ],
)
def test_bad_input_is_refused(function: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu() -> None:
    weight = gaussian(18, 300, 200, torch.float32)
    weight[7] = weight[8] * (1 + 1e-5)
    found = hyperspherical_energy(weight.cuda())
    assert found.is_cuda
    assert found.item() == pytest.approx(hyperspherical_energy(weight).item(), rel=1e-5)
