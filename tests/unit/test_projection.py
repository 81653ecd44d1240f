"""The principal space against a dense reference, Theorem 4, and EasyEdit's own projections."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import scipy.linalg  # type: ignore[import-untyped]
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from helpers.models import gaussian
from helpers.models import relative_error as relative
from helpers.paths import TESTS
from sphere_easyedit.core import projection, tensors
from sphere_easyedit.core.projection import PrincipalSpace

GOLDEN = TESTS / "golden" / "llama"
PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31 - 1)
SIZES = st.integers(1, 14)
GAMMAS = st.floats(0.02, 0.98)
ALPHAS = st.floats(0.0, 1.0)
SHAPES = [(20, 50), (50, 20), (30, 30)]  # wide, tall, square


def decaying(seed: int, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A weight whose spectrum falls as 1 / k, so that the rank at a gamma is unmistakable."""
    side = min(rows, width)
    left, right = (torch.linalg.qr(gaussian(seed + i, n, side)).Q for i, n in enumerate((rows, width)))
    product: Tensor = (left / torch.arange(1, side + 1).double().sqrt()) @ right.T
    return product.to(dtype)


def reference(weight: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues (descending) and U, from the ``d_in x d_in`` matrix, as in the authors' code."""
    rows = weight.to(torch.float64)
    norms = rows.norm(dim=1, keepdim=True)
    unit = torch.where(norms > 0, rows / norms, 0.0)
    values, vectors = torch.linalg.eigh(unit.T @ unit / len(unit))
    values, vectors = values.flip(0), vectors.flip(1)
    rank = int((values.cumsum(0) / values.sum() <= gamma).sum()) + 1
    return values, vectors[:, :rank]


def projector(weight: Tensor, gamma: float, alpha: float) -> Tensor:
    basis = reference(weight, gamma)[1]
    return torch.eye(weight.shape[1], dtype=torch.float64) - alpha * basis @ basis.T


# --- parity -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="module")
def golden_weight() -> Tensor:
    return load_file(GOLDEN / "tiny-llama" / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]


@pytest.mark.parametrize("gamma", ["0.3", "0.5", "0.9"])
def test_golden_projection(gamma: str, golden: dict[str, Tensor], golden_weight: Tensor) -> None:
    space = PrincipalSpace.from_weight(golden_weight, gamma=float(gamma))
    assert space.rank == int(golden[f"projection.rank.eta{gamma}"])
    update = golden["memit.update.0.1"]
    for alpha in ("0.5", "0.8", "1.0"):
        expected = golden[f"projection.eta{gamma}.alpha{alpha}"]
        assert relative(space.suppress(update, alpha=float(alpha)), expected) < 1e-4
        fresh = PrincipalSpace.from_gram(golden_weight, golden_weight @ golden_weight.T, gamma=float(gamma))
        assert fresh.rank == space.rank
        assert relative(fresh.suppress_keys(update.T.contiguous(), alpha=float(alpha)).T, expected) < 1e-4


# --- the space ----------------------------------------------------------------------------------------------


@PROPERTY
@given(SEEDS, SIZES, SIZES, GAMMAS)
def test_space_equals_dense_reference(seed: int, rows: int, width: int, gamma: float) -> None:
    weight = gaussian(seed, rows, width)
    values, basis = reference(weight, gamma)
    gram = weight @ weight.T
    for space in (PrincipalSpace.from_weight(weight, gamma), PrincipalSpace.from_gram(weight, gram, gamma)):
        assert space.rank == basis.shape[1]
        found = space.spectrum[: min(rows, width)]
        torch.testing.assert_close(found, values[: len(found)], rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(space.directions @ space.directions.T, basis @ basis.T, rtol=0, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.2, 0.5, 0.9])
def test_every_dtype_and_shape(shape: tuple[int, int], dtype: torch.dtype, gamma: float) -> None:
    weight = gaussian(1, *shape, dtype)
    basis = reference(weight, gamma)[1]
    space = PrincipalSpace.from_weight(weight, gamma)
    assert (space.rank, space.gamma, space.d_in) == (basis.shape[1], gamma, shape[1])
    assert space.directions.shape == (shape[1], space.rank)
    assert space.directions.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    overlap = space.directions.T @ space.directions
    assert float((overlap - torch.eye(space.rank)).abs().max()) < 1e-5
    assert relative(space.directions @ space.directions.T, basis @ basis.T) < 1e-5
    assert space.spectrum.dtype == torch.float64
    assert bool((space.spectrum.diff() <= 0).all())
    assert len(space.spectrum) == min(shape)  # of the smaller Gram matrix
    assert space.spectrum.sum().item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("shape", [(600, 700), (700, 600)])
@pytest.mark.parametrize("gamma", [0.5, 0.75, 0.95])
def test_partial_eigenproblem_finds_the_same_space(shape: tuple[int, int], gamma: float) -> None:
    weight = decaying(2, *shape)
    basis = reference(weight, gamma)[1]
    space = PrincipalSpace.from_weight(weight, gamma)
    assert space.rank == basis.shape[1]
    assert relative(space.directions @ space.directions.T, basis @ basis.T) < 1e-5
    assert len(space.spectrum) < 600 or gamma > 0.9


@pytest.mark.parametrize(("gamma", "rank"), [(0.5, 301), (0.8, 481), (0.31, 187)])
def test_flat_spectrum_asks_for_more_eigenpairs(gamma: float, rank: int) -> None:
    # 600 equal eigenvalues: round shares must not be decided by rounding, and a third of them is not enough.
    weight = torch.linalg.qr(gaussian(3, 640, 600)).Q.T
    space = PrincipalSpace.from_weight(weight, gamma)
    assert space.rank == rank
    overlap = space.directions.T @ space.directions
    assert float((overlap - torch.eye(rank)).abs().max()) < 1e-8


def test_large_float32_eigenproblem() -> None:
    weight = decaying(4, 1100, 1200)
    basis = reference(weight, 0.5)[1]
    keys = gaussian(5, 1200, 3, torch.float32)
    for space in (
        PrincipalSpace.from_weight(weight, 0.5),
        PrincipalSpace.from_gram(weight, weight @ weight.T, 0.5),
    ):
        assert space.rank == basis.shape[1]
        expected = keys.double() - basis @ (basis.T @ keys.double())
        assert relative(space.suppress_keys(keys, 1.0), expected) < 1e-4  # thin products
        assert relative(space.directions @ space.directions.T, basis @ basis.T) < 1e-4
        assert float((space.directions.T @ space.directions - torch.eye(space.rank)).abs().max()) < 1e-5


@pytest.mark.parametrize(("solver", "warning"), [
    ("fails", "partial eigenproblem of side 520 failed (did not converge); solving all of it"),
    ("finds too few", "partial eigenproblem gave 3 of 347 eigenpairs; solving all of it"),
])
def test_a_partial_solver_that_fails_falls_back_with_a_warning(
    solver: str, warning: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight = decaying(30, 520, 530)
    expected = PrincipalSpace.from_weight(weight, 0.8)
    solve = scipy.linalg.eigh

    def partial(*arguments: Any, **options: Any) -> tuple[Any, Any]:
        if solver == "fails":
            raise scipy.linalg.LinAlgError("did not converge")
        values, vectors = solve(*arguments, **options)
        return values[-3:], vectors[:, -3:]  # as LAPACK does where the cut falls among equal eigenvalues

    monkeypatch.setattr(scipy.linalg, "eigh", partial)
    with caplog.at_level(logging.WARNING):
        assert PrincipalSpace.from_weight(weight, 0.8).rank == expected.rank
    assert caplog.messages == [warning]


@PROPERTY
@given(SEEDS, SIZES, SIZES, GAMMAS)
def test_row_scaling_and_order_do_not_change_the_space(
    seed: int, rows: int, width: int, gamma: float
) -> None:
    weight = gaussian(seed, rows, width)
    scale = gaussian(seed + 1, rows, 1).exp()
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    first, second = (PrincipalSpace.from_weight(w, gamma) for w in (weight, (weight * scale)[order]))
    assert first.rank == second.rank
    torch.testing.assert_close(
        first.directions @ first.directions.T, second.directions @ second.directions.T, rtol=0, atol=1e-7
    )


# --- gamma at its ends; zero and duplicate rows -------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_gamma_zero_projects_nothing(shape: tuple[int, int]) -> None:
    weight = gaussian(7, *shape, torch.float32)
    update = gaussian(8, *shape, torch.float32)
    for space in (
        PrincipalSpace.from_weight(weight, 0.0),
        PrincipalSpace.from_gram(weight, weight @ weight.T, 0.0),
    ):
        assert space.rank == 0
        assert space.directions.shape == (shape[1], 0)
        assert len(space.spectrum) == 0
        assert space.spectrum.dtype == torch.float64
        assert space.gamma == 0.0
        assert torch.equal(space.suppress(update, 1.0), update)
        assert torch.equal(space.suppress_keys(update.T, 1.0), update.T)
        assert space.directions.dtype == torch.float32
    assert PrincipalSpace.from_weight(weight.double(), 0.0).directions.dtype == torch.float64


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gamma_one_is_the_row_space(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = gaussian(9, *shape, dtype)
    for space in (
        PrincipalSpace.from_weight(weight, 1.0),
        PrincipalSpace.from_gram(weight, weight.double() @ weight.double().T, 1.0),
    ):
        assert space.rank == int(torch.linalg.matrix_rank(weight.double())) == min(shape)
        left = space.suppress(weight, 1.0)
        assert float(left.double().norm()) < 1e-5 * float(weight.double().norm())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_is_capped_at_the_rank_of_the_weight(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = (gaussian(10, shape[0], 5) @ gaussian(11, 5, shape[1])).to(dtype)
    for gamma in (0.999999, 1.0):
        for space in (
            PrincipalSpace.from_weight(weight, gamma),
            PrincipalSpace.from_gram(weight, weight @ weight.T, gamma),
        ):
            assert space.rank == 5
            assert float((space.directions.T @ space.directions - torch.eye(5)).abs().max()) < 1e-5
            assert float(space.suppress(weight, 1.0).norm()) < 1e-5 * float(weight.norm())


def test_tiny_gamma_keeps_one_direction() -> None:
    weight = gaussian(12, 12, 9)
    space = PrincipalSpace.from_weight(weight, 1e-9)
    assert space.rank == 1
    leading = reference(weight, 1e-9)[1][:, 0]
    assert abs(float(space.directions[:, 0] @ leading)) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_ill_conditioned_rows_still_give_orthonormal_directions(shape: tuple[int, int]) -> None:
    # Rows that nearly coincide: the least eigenvalues are some 1e-9 of the largest, where S^-1/2 magnifies.
    weight = (gaussian(13, 1, shape[1]) + 1e-4 * gaussian(14, *shape)).double()
    space = PrincipalSpace.from_weight(weight, 1.0)
    assert space.rank == min(shape)
    overlap = space.directions.T @ space.directions
    assert float((overlap - torch.eye(space.rank)).abs().max()) < 1e-5


@pytest.mark.parametrize("shape", SHAPES)
def test_zero_rows_change_nothing_but_the_scale_of_the_spectrum(shape: tuple[int, int]) -> None:
    weight = gaussian(15, *shape)
    padded = torch.zeros(shape[0] + 4, shape[1], dtype=torch.float64)
    padded[2:-2] = weight
    plain = PrincipalSpace.from_weight(weight, 0.6)
    for space in (
        PrincipalSpace.from_weight(padded, 0.6),
        PrincipalSpace.from_gram(padded, padded @ padded.T, 0.6),
    ):
        assert space.rank == plain.rank
        torch.testing.assert_close(
            space.directions @ space.directions.T, plain.directions @ plain.directions.T, rtol=0, atol=1e-8
        )
        share = shape[0] / (shape[0] + 4)
        torch.testing.assert_close(space.spectrum[: plain.rank], plain.spectrum[: plain.rank] * share)


def test_a_zero_weight_has_no_principal_space() -> None:
    space = PrincipalSpace.from_weight(torch.zeros(3, 4), 0.5)
    assert space.rank == 0
    assert space.directions.shape == (4, 0)
    assert PrincipalSpace.from_gram(torch.zeros(3, 4), torch.zeros(3, 3), 0.5).rank == 0
    assert space.gamma == 0.5


def test_duplicate_rows_weigh_twice() -> None:
    weight = torch.eye(4, dtype=torch.float64)[[0, 0, 0, 1, 2, 3]]
    space = PrincipalSpace.from_weight(weight, 0.4)
    assert space.rank == 1
    assert abs(float(space.directions[0, 0])) == pytest.approx(1.0)
    assert PrincipalSpace.from_weight(weight, 1.0).rank == 4


# --- suppression --------------------------------------------------------------------------------------------


@PROPERTY
@given(SEEDS, SIZES, SIZES, st.integers(0, 6), GAMMAS, ALPHAS)
def test_suppress_equals_dense_projection(
    seed: int, rows: int, width: int, count: int, gamma: float, alpha: float
) -> None:
    weight, update = gaussian(seed, rows, width), gaussian(seed + 1, count, width)
    expected = update @ projector(weight, gamma, alpha)
    space = PrincipalSpace.from_weight(weight, gamma)
    torch.testing.assert_close(space.suppress_keys(update.T, alpha).T, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(space.suppress(update, alpha), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(space.suppress_keys(update.T, alpha).T, expected, rtol=1e-7, atol=1e-7)


@PROPERTY
@given(
    SEEDS,
    SIZES,
    SIZES,
    GAMMAS,
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64]),
)
def test_alpha_zero_is_the_identity(
    seed: int, rows: int, width: int, gamma: float, dtype: torch.dtype
) -> None:
    weight, update = gaussian(seed, rows, width), gaussian(seed + 1, rows, width, dtype)
    space = PrincipalSpace.from_weight(weight, gamma)
    for result, given_ in (
        (space.suppress(update, 0.0), update),
        (space.suppress_keys(update.T, 0.0), update.T),
    ):
        assert torch.equal(result, given_)
        assert result.dtype == dtype
        assert result.data_ptr() != given_.data_ptr()


@PROPERTY
@given(SEEDS, SIZES, SIZES, GAMMAS)
def test_alpha_one_leaves_nothing_and_is_idempotent(seed: int, rows: int, width: int, gamma: float) -> None:
    weight, update = gaussian(seed, rows, width), gaussian(seed + 1, rows, width)
    space = PrincipalSpace.from_weight(weight, gamma)
    once = space.suppress(update, 1.0)
    assert float((once @ space.directions).norm()) < 1e-7 * float(update.norm())
    torch.testing.assert_close(space.suppress(once, 1.0), once, rtol=1e-7, atol=1e-7)


@PROPERTY
@given(SEEDS, SIZES, SIZES, GAMMAS, ALPHAS)
def test_theorem_4_norm_never_grows(seed: int, rows: int, width: int, gamma: float, alpha: float) -> None:
    weight, update = gaussian(seed, rows, width), gaussian(seed + 1, rows, width)
    space = PrincipalSpace.from_weight(weight, gamma)
    before, after = update.square().sum().item(), space.suppress(update, alpha).square().sum().item()
    assert after <= before * (1 + 1e-12)
    # What exactly is lost; so nothing is, for alpha above 0, only where dW U = 0.
    principal = (update @ space.directions).square().sum().item()
    assert before - after == pytest.approx((2 * alpha - alpha**2) * principal, rel=1e-6, abs=1e-7 * before)


@PROPERTY
@given(SEEDS, st.integers(2, 14), st.integers(2, 14), GAMMAS, st.floats(0.1, 1.0))
def test_theorem_4_equality_iff_nothing_is_principal(
    seed: int, rows: int, width: int, gamma: float, alpha: float
) -> None:
    weight = gaussian(seed, rows, width)
    basis = reference(weight, gamma)[1]
    inside = gaussian(seed + 1, 3, basis.shape[1]) @ basis.T
    space = PrincipalSpace.from_weight(weight, gamma)
    assert float(space.suppress(inside, alpha).norm()) == pytest.approx(
        (1 - alpha) * float(inside.norm()), abs=1e-7 * float(inside.norm())
    )
    update = gaussian(seed + 2, 3, width)
    outside = update - update @ basis @ basis.T
    torch.testing.assert_close(space.suppress(outside, alpha), outside, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float16, 1e-3), (torch.bfloat16, 6e-3), (torch.float32, 1e-6)]
)
def test_narrow_updates_keep_shape_and_dtype(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    weight, update = gaussian(16, *shape, dtype), gaussian(17, *shape, dtype)
    expected = update.double() @ projector(weight, 0.5, 0.8)
    space = PrincipalSpace.from_weight(weight, 0.5)
    keys = space.suppress_keys(update.T, 0.8)
    result = space.suppress(update, 0.8)
    assert result.shape == update.shape
    assert result.dtype == dtype
    assert keys.shape == update.T.shape
    assert keys.dtype == dtype
    assert relative(result, expected) < tolerance
    assert relative(keys.T, expected) < tolerance


def test_projecting_keys_projects_a_low_rank_update() -> None:
    weight, keys, residuals = gaussian(18, 20, 50), gaussian(19, 50, 4), gaussian(20, 20, 4)
    space = PrincipalSpace.from_weight(weight, 0.5)
    by_keys = residuals @ space.suppress_keys(keys, 0.8).T
    torch.testing.assert_close(by_keys, space.suppress(residuals @ keys.T, 0.8), rtol=1e-9, atol=1e-9)


def test_arguments_are_left_alone_and_no_graph_is_kept() -> None:
    weight = torch.nn.Parameter(gaussian(21, 6, 9, torch.float32))
    update = gaussian(22, 6, 9, torch.float32).requires_grad_()
    copies = weight.detach().clone(), update.detach().clone()
    space = PrincipalSpace.from_weight(weight, 0.5)
    result = space.suppress(update, 0.5)
    assert not result.requires_grad
    assert not space.directions.requires_grad
    assert torch.equal(weight, copies[0])
    assert torch.equal(update, copies[1])


# --- a space and its weight ---------------------------------------------------------------------------------


@pytest.mark.parametrize("through_data", [False, True])
def test_a_weight_changed_behind_a_space_is_noticed(through_data: bool) -> None:
    weight = torch.nn.Parameter(gaussian(23, 20, 50, torch.float32))
    update = gaussian(24, 20, 50, torch.float32)
    early, late = PrincipalSpace.from_weight(weight, 0.5), PrincipalSpace.from_weight(weight, 0.5)
    expected = early.suppress(update, 0.5)
    with torch.no_grad():
        (weight.data if through_data else weight)[3] += 0.01
    assert torch.equal(early.suppress(update, 0.5), expected)  # its directions were formed in time
    message = "^the weight was changed after its PrincipalSpace .* needs it; build a new space .* is changed$"
    with pytest.raises(RuntimeError, match=message):
        late.suppress(update, 0.5)
    with pytest.raises(RuntimeError, match="weight was changed"):
        late.suppress_keys(update.T, 0.5)


def test_alpha_zero_needs_no_weight() -> None:
    weight, update = gaussian(56, 20, 50), gaussian(57, 3, 50)
    space = PrincipalSpace.from_weight(weight, 0.5)
    weight.zero_()
    assert torch.equal(space.suppress(update, 0.0), update)
    assert torch.equal(space.suppress_keys(update.T, 0.0), update.T)


def test_a_float64_weight_changed_in_its_last_digits_is_noticed() -> None:
    weight = gaussian(51, 20, 50)
    space = PrincipalSpace.from_weight(weight, 0.5)
    weight[3] *= 1 + 1e-14
    with pytest.raises(RuntimeError, match="weight was changed"):
        _ = space.directions


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
def test_directions_outlive_the_weight(shape: tuple[int, int]) -> None:
    weight = gaussian(25, *shape)
    update = gaussian(26, *shape)
    expected = update @ projector(weight, 0.5, 1.0)
    space = PrincipalSpace.from_weight(weight, 0.5)
    assert space.directions is space.directions
    weight.zero_()
    torch.testing.assert_close(space.suppress(update, 1.0), expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(space.suppress_keys(update.T, 1.0), expected.T, rtol=1e-7, atol=1e-7)


# --- blocks of rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
@pytest.mark.parametrize("rows_at_once", [1, 3, 7])
@pytest.mark.parametrize("scaled", [False, True])
def test_blocks_of_rows_change_nothing(
    shape: tuple[int, int], rows_at_once: int, scaled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows a few at a time, also with norms whose squares float32 does not hold, and one that is zero."""
    weight, update = gaussian(40, *shape, torch.float32), gaussian(41, 11, shape[1], torch.float32)
    if scaled:
        weight *= torch.logspace(-24, 24, shape[0])[:, None]
    weight[5] = 0
    kept = reference(torch.nn.functional.normalize(weight.double(), dim=1), 0.5)[1]
    expected = update.double() - 0.8 * update.double() @ kept @ kept.T
    monkeypatch.setattr(projection, "_BLOCK_ELEMENTS", rows_at_once * shape[1] + 1)
    gram = weight.double() @ weight.double().T
    for space in (PrincipalSpace.from_weight(weight), PrincipalSpace.from_gram(weight, gram)):
        assert space.rank == kept.shape[1]
        assert relative(space.suppress_keys(update.T, 0.8).T, expected) < 1e-5  # by the factors
        assert relative(space.suppress(update, 0.8), expected) < 1e-5
        assert relative(space.suppress_keys(update.T, 0.8).T, expected) < 1e-5  # by the directions


def test_what_is_not_finite_is_found_in_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "_BLOCK_ELEMENTS", 12)
    weight = gaussian(42, 7, 6, torch.float32)
    space = PrincipalSpace.from_weight(weight)
    for row in range(7):
        bad = weight.clone()
        bad[row, 5] = math.inf
        with pytest.raises(ValueError, match="but 1 of its 7 rows"):
            PrincipalSpace.from_weight(bad)
        with pytest.raises(ValueError, match="update must be finite"):
            space.suppress(bad)
    bad[0, 0] = math.nan
    with pytest.raises(ValueError, match="but 2 of its 7 rows"):
        PrincipalSpace.from_weight(bad)


# --- precisions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 50), (50, 20)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_zero_row", [False, True])
def test_eigenproblems_above_the_limit_are_float32(
    shape: tuple[int, int], dtype: torch.dtype, gram_dtype: torch.dtype, with_zero_row: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(projection, "FLOAT64_SIDE", 19)
    monkeypatch.setattr(projection, "_BLOCK_ELEMENTS", 7 * shape[1])
    solved = []
    solve = projection._largest_eigenpairs

    def noted(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
        solved.append(gram.dtype)
        return solve(gram, count)

    monkeypatch.setattr(projection, "_largest_eigenpairs", noted)
    weight, keys = gaussian(52, *shape, dtype), gaussian(53, shape[1], 3, torch.float32)
    weight[5] *= not with_zero_row
    expected = projector(weight, 0.5, 0.8) @ keys.double()
    gram = weight.to(gram_dtype) @ weight.to(gram_dtype).T
    for space in (PrincipalSpace.from_weight(weight), PrincipalSpace.from_gram(weight, gram)):
        assert relative(space.suppress_keys(keys, 0.8), expected) < 1e-5
        assert relative(space.suppress(keys.T, 0.8).T, expected) < 1e-5
        assert space.directions.dtype == torch.float32
        assert space.spectrum.dtype == torch.float64
    assert solved == [torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("other", [torch.float32, torch.float64])
def test_a_float64_operand_keeps_its_digits(dtype: torch.dtype, other: torch.dtype) -> None:
    """Of an update or of the weight, whichever is float64."""
    weight, update = gaussian(54, 20, 50, dtype), gaussian(55, 4, 50, other)
    space = PrincipalSpace.from_weight(weight, 0.5)
    early = space.suppress_keys(update.T, 0.8).T  # by the factors
    basis = space.directions.double()
    expected = update.double() - 0.8 * update.double() @ basis @ basis.T
    for found in (space.suppress_keys(update.T, 0.8).T, space.suppress(update, 0.8)):
        assert found.dtype == other
        assert relative(found, expected) < (1e-14 if other == torch.float64 else 1e-6)
        if (dtype, other) == (torch.float64, torch.float32):  # rounded once
            assert float((found / expected - 1).abs().max()) < 2.0**-24 * (1 + 1e-6)
    assert early.dtype == other
    assert relative(early, expected) < (1e-12 if dtype == other == torch.float64 else 1e-6)


# --- what decides the size of an eigenproblem, and what counts as rounding -----------------------------------


@pytest.mark.parametrize(
    ("side", "gamma", "on_gpu", "likely_rank", "expected"),
    [
        (511, 0.5, False, None, [511]),  # too small for a part to pay
        (512, 0.5, False, None, [171, 342, 512]),
        (600, 0.61, False, None, [401, 600]),
        (600, 0.91, False, None, [600]),
        (600, 0.5, True, 10, [600]),
        (600, 0.5, False, 100, [110, 201, 401, 600]),
        (600, 0.5, False, 190, [201, 401, 600]),
        (600, 0.5, False, 599, [600]),
    ],
)
def test_attempts(side: int, gamma: float, on_gpu: bool, likely_rank: int | None, expected: list[int]) -> None:
    assert projection._attempts(side, gamma, on_gpu, likely_rank) == expected


def test_a_likely_rank_is_what_is_solved_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    solve = projection._partial_eigenpairs

    def noted(gram: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
        asked.append(count)
        return solve(gram, count)

    monkeypatch.setattr(projection, "_partial_eigenpairs", noted)
    weight = decaying(43, 520, 530)
    for likely_rank in (None, 60):
        space = PrincipalSpace.from_gram(weight, weight @ weight.T, 0.5, likely_rank)
        assert space.rank < 60
        assert len(space.spectrum) == asked[-1]
    assert asked == [174, 69]


def test_no_share_passes_gamma_one_whatever_rounding_says() -> None:
    values = torch.tensor([1.0, 1.0 + 1e-7, 0.5], dtype=torch.float64)
    assert projection.passing_count(values, 2.0, 1.0) == 4
    assert projection.passing_count(values, 2.0, 0.5) == 2
    assert projection.passing_count(values, 4.0, 0.9) == 4  # their sum does not pass


@pytest.mark.parametrize(
    ("dtype", "side", "expected"),
    [(torch.float32, 1024, torch.float64), (torch.bfloat16, 1025, torch.float32), (torch.float64, 1025, torch.float64)],
)
def test_precision_of_eigenproblems(dtype: torch.dtype, side: int, expected: torch.dtype) -> None:
    assert projection._work_dtype(torch.zeros(1, 1, dtype=dtype), side) == expected


@pytest.mark.parametrize("error", [1e-16, 1e-9, 1e-3, 0.9])
def test_orthonormal_columns_keep_span_and_order(error: float, caplog: pytest.LogCaptureFixture) -> None:
    clean = torch.linalg.qr(gaussian(44, 30, 6)).Q
    basis = clean @ (torch.eye(6, dtype=torch.float64) + error * gaussian(45, 6, 6).triu(1))
    with caplog.at_level(logging.DEBUG, logger=projection.__name__):
        found = projection._orthonormal(basis)
    off = float((basis.T @ basis - torch.eye(6, dtype=torch.float64)).abs().max())
    assert caplog.messages == ([f"principal directions were {off:.1e} from orthonormal: QR"] if error == 0.9 else [])
    torch.testing.assert_close(found.T @ found, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-12)
    for count in range(1, 7):
        kept = found[:, :count]
        torch.testing.assert_close(kept @ (kept.T @ basis[:, :count]), basis[:, :count], rtol=0, atol=1e-12)
    if error < 0.1:
        torch.testing.assert_close(found, clean, rtol=0, atol=1e-12)  # of the same signs
    assert (found is basis) == (error < 1e-15)


def test_many_columns_two_of_them_almost_equal_are_made_orthonormal() -> None:
    basis = torch.linalg.qr(gaussian(58, 30, 12)).Q
    basis[:, 1] = basis[:, 0] + 1e-7 * basis[:, 1]  # a Cholesky factor would have half the digits only
    found = projection._orthonormal(basis)
    torch.testing.assert_close(found.T @ found, torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 1e-4), (torch.float64, 1e-7)])
def test_what_is_well_conditioned(dtype: torch.dtype, least: float) -> None:
    weight = torch.eye(3, dtype=dtype)
    norms = torch.ones(3, dtype=torch.float64)
    for factor in (0.9, 1.1):
        values = torch.tensor([4.0, 2.0, 4.0 * factor * least], dtype=torch.float64)
        basis = projection._GramBasis(weight, norms, projection._fingerprint(weight), weight, values)
        assert basis.is_well_conditioned() == (factor > 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_in_a_zero_rows_part_of_a_gram_does_not_matter(dtype: torch.dtype) -> None:
    weight = gaussian(46, 12, 30, dtype)
    weight[4] = 0
    gram = weight @ weight.T
    clean = PrincipalSpace.from_gram(weight, gram)
    gram[4] = gram[:, 4] = 1e-3
    space = PrincipalSpace.from_gram(weight, gram)
    assert torch.equal(space.spectrum, clean.spectrum)
    assert torch.equal(space.directions, clean.directions)


@pytest.mark.parametrize("scale", [0.1, 1.0])  # norms on either side of 1
def test_gram_may_differ_by_a_percent(scale: float) -> None:
    weight = scale * gaussian(47, 4, 6)
    gram = weight @ weight.T
    for factor in (0.991, 1.009):
        assert PrincipalSpace.from_gram(weight, gram * factor).rank > 0
    for factor in (0.989, 1.011):
        with pytest.raises(ValueError, match="4 of its diagonal's 4 entries"):
            PrincipalSpace.from_gram(weight, gram * factor)


def test_space_spanned_by_directions() -> None:
    directions = torch.linalg.qr(gaussian(48, 9, 3)).Q
    space = PrincipalSpace.spanned_by(directions, 0.4)
    assert (space.rank, space.gamma, space.d_in, space.device.type) == (3, 0.4, 9, "cpu")
    assert torch.equal(space.directions, directions)
    assert (space.spectrum.shape, space.spectrum.dtype) == ((0,), torch.float64)
    keys = gaussian(49, 9, 2)
    torch.testing.assert_close(space.suppress_keys(keys, 1.0), keys - directions @ directions.T @ keys)
    assert PrincipalSpace.spanned_by(directions[:, :0], 0.4).rank == 0
    assert PrincipalSpace.spanned_by(directions * (1 + 4e-5), 0.4).rank == 3
    assert PrincipalSpace.spanned_by(torch.eye(9, 2).half(), 0.4).directions.dtype == torch.float32
    for bad, gamma, message in (
        (directions * (1 + 6e-5), 0.4, "directions are 1.2e-04 from orthonormal"),
        (directions * math.nan, 0.4, "directions are nan from orthonormal"),
        (directions.long(), 0.4, "directions must be floating point"),
        (directions, 1.4, "gamma must be a number"),
    ):
        with pytest.raises(ValueError, match=message):
            PrincipalSpace.spanned_by(bad, gamma)


def test_what_is_made_lies_where_the_weight_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the meta device tells as well whether a tensor was put on the weight's."""
    wide, tall = torch.zeros(3, 5, device="meta"), torch.zeros(5, 3, device="meta")
    norms = torch.ones(5, dtype=torch.float64, device="meta")
    assert PrincipalSpace._empty(wide, 0.0).device.type == "meta"
    assert PrincipalSpace._empty(wide, 0.0).spectrum.is_meta
    assert projection._fingerprint(wide).is_meta
    assert projection._unit_gram(wide, norms[:3], torch.float32, False).is_meta
    assert projection._unit_gram(tall, norms, torch.float32, True).is_meta
    for name, known in {"int": 0, "float": 0.0}.items():  # no number can be read there
        for module in (projection, tensors):
            monkeypatch.setattr(module, name, lambda _, known=known: known, raising=False)
    assert projection._row_norms(tall).is_meta
    assert projection._orthonormal(tall).is_meta
    space = PrincipalSpace.spanned_by(tall, 0.4)
    assert space.directions.is_meta
    assert space.spectrum.is_meta


# --- refusals -----------------------------------------------------------------------------------------------

GOOD = gaussian(27, 4, 6, torch.float32)
GRAM = GOOD @ GOOD.T
NAN = GOOD.clone()
NAN[1, 2] = math.nan


@pytest.mark.parametrize(
    ("weight", "gamma", "message"),
    [
        (GOOD[0], 0.5, r"^weight must be 2-D .*\(6,\)"),
        (GOOD[:0], 0.5, r"^weight must be 2-D .*not empty, got shape \(0, 6\)"),
        (GOOD.to(torch.int8), 0.5, "^weight must be floating point, got torch.int8"),
        ([[1.0]], 0.5, "^weight must be a torch.Tensor, got list"),
        (NAN, 0.5, "^weight must be finite, but 1 of its 4 rows .*; look for .* tensor$"),
        (GOOD, -0.1, r"^gamma must be a number in \[0, 1\], got -0.1"),
        (GOOD, 1.5, r"gamma must be a number in \[0, 1\], got 1.5"),
        (GOOD, math.nan, "gamma must be .* got nan"),
        (GOOD, "half", "gamma must be .* got 'half'"),
        (GOOD, True, "gamma must be .* got True"),
    ],
)
def test_bad_weight_or_gamma_is_refused(weight: Any, gamma: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrincipalSpace.from_weight(weight, gamma)
    with pytest.raises(ValueError, match=message):
        PrincipalSpace.from_gram(weight, GRAM, gamma)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (GOOD.T @ GOOD, r"gram must be W W\^T, \(4, 4\) .* got \(6, 6\)"),
        (GRAM.half(), "float32 or float64, got torch.float16"),
        (NAN @ NAN.T, "gram must be finite"),
        (GRAM * 1.1, "4 of its diagonal's 4 entries are not the weight's squared row norms; recompute .* is now$"),
        (None, "gram must be a torch.Tensor"),
    ],
)
def test_a_gram_of_another_weight_is_refused(gram: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrincipalSpace.from_gram(GOOD, gram, 0.5)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("suppress", (GOOD.T,), r"^update must be \(rows, 6\), got shape \(6, 4\); .* build the space from .* to$"),
        ("suppress", (GOOD[0],), r"update must be \(rows, 6\), got shape \(6,\)"),
        ("suppress", (NAN,), "update must be finite"),
        ("suppress", (GOOD.to("meta"),), "update must be on cpu, where the space is, got meta; move it there"),
        ("suppress", (GOOD.long(),), "update must be floating point"),
        ("suppress", (GOOD, 1.01), r"alpha must be a number in \[0, 1\], got 1.01"),
        ("suppress", (GOOD, -1.0), r"alpha must be a number in \[0, 1\], got -1.0"),
        ("suppress_keys", (GOOD,), r"keys must be \(6, n\), got shape \(4, 6\)"),
        ("suppress_keys", (NAN.T,), "keys must be finite"),
        ("suppress_keys", (GOOD.T, math.inf), "alpha must be .* got inf"),
    ],
)
def test_bad_operands_are_refused(method: str, arguments: tuple[Any, ...], message: str) -> None:
    space = PrincipalSpace.from_weight(GOOD, 0.5)
    with pytest.raises(ValueError, match=message):
        getattr(space, method)(*arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu() -> None:
    weight, update = decaying(28, 600, 700), gaussian(29, 5, 700, torch.float32)
    here, there = PrincipalSpace.from_weight(weight, 0.5), PrincipalSpace.from_weight(weight.cuda(), 0.5)
    assert there.rank == here.rank
    assert there.directions.is_cuda
    assert relative(there.suppress(update.cuda(), 0.8).cpu(), here.suppress(update, 0.8)) < 1e-5


@pytest.mark.parametrize("likely_rank", [0, 1, 50, 120, 400, 599, 700])
def test_likely_rank_is_only_a_hint(likely_rank: int) -> None:
    """Too low, right, too high or impossible: the same space, to rounding."""
    weight = torch.randn(600, 700, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3.0, 700)
    gram = weight @ weight.T
    expected = PrincipalSpace.from_gram(weight, gram)
    assert 50 < expected.rank < 120
    space = PrincipalSpace.from_gram(weight, gram, 0.5, likely_rank)
    assert space.rank == expected.rank
    update = torch.randn(600, 700, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(space.suppress(update), expected.suppress(update), rtol=1e-4, atol=1e-4)
