"""The closed forms against dense float64 algebra, and the plain solve that takes over where they fail."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import REQUESTS, edited_weights, relative_error, tiny_hparams, tiny_model
from sphere_easyedit.core.updates import LowRankUpdate
from sphere_easyedit.editing import solve
from sphere_easyedit.methods import alphaedit, solvers
from sphere_easyedit.methods.covariance import load_moment, moment_path, save_moment
from sphere_easyedit.methods.solvers import (
    CholeskyFactor,
    CovarianceMetric,
    KeyHistory,
    KeyMetric,
    NullSpace,
    NullSpaceMetric,
    adjusted_keys,
    plain_alphaedit_keys,
    plain_memit_keys,
)
from sphere_easyedit.methods.tensor_store import TensorStore
from sphere_easyedit.models.architecture import EditableModel

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31 - 1)
WIDTH = 12  # d_in
COUNTS = st.integers(1, 30)  # keys of a batch: fewer and more than d_in
EARLIER = st.integers(0, 30)
DUPLICATES = st.booleans()
RIDGES = st.floats(0.05, 20.0)


def gaussian(seed: int, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def some_keys(seed: int, count: int, duplicates: bool) -> Tensor:
    """Keys ``(WIDTH, count)`` float32; with duplicates, the second half repeats the first."""
    keys = gaussian(seed, WIDTH, count)
    if duplicates and count > 1:
        keys[:, count // 2:] = keys[:, : count - count // 2]
    return keys.float()


def orthonormal(seed: int, columns: int) -> Tensor:
    return torch.linalg.qr(gaussian(seed, WIDTH, columns)).Q


def some_moment(seed: int) -> Tensor:
    samples = gaussian(seed, WIDTH, 3 * WIDTH)
    return (samples @ samples.T / samples.shape[1]).float()


def two_forms(seed: int, columns: int) -> tuple[NullSpace, NullSpace]:
    """One null space by its own basis and by that of its complement."""
    whole = orthonormal(seed, WIDTH)
    return NullSpace(whole[:, :columns]), NullSpace(whole[:, columns:], complement=True)


def null_space_metric(seed: int, columns: int, ridge: float) -> NullSpaceMetric:
    return NullSpaceMetric(two_forms(seed, columns)[0], ridge)


def covariance_metric(moment: Tensor, weight: float) -> CovarianceMetric:
    return CovarianceMetric(CholeskyFactor.of(moment), weight)


def without_earlier(metric: KeyMetric) -> KeyHistory:
    return KeyHistory.empty(WIDTH, metric, torch.device("cpu"))


def dense_keys(metric: Tensor, ridge: float, every: Tensor, keys: Tensor) -> Tensor:
    """``(M A A^T + c I)^-1 M K`` by an explicit inverse."""
    every, keys = every.double(), keys.double()
    system = metric @ every @ every.T + ridge * torch.eye(len(metric), dtype=torch.float64)
    return torch.linalg.inv(system) @ metric @ keys


def assert_close(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.double(), rtol=1e-6, atol=1e-8)


# --- the closed forms ---------------------------------------------------------------------------------------


@PROPERTY
@given(SEEDS, COUNTS, EARLIER, DUPLICATES, st.integers(1, WIDTH), RIDGES)
def test_alphaedit_equals_dense_formula(
    seed: int, count: int, earlier: int, duplicates: bool, columns: int, ridge: float
) -> None:
    basis = orthonormal(seed, WIDTH)[:, :columns]
    keys, old = some_keys(seed + 1, count, duplicates), some_keys(seed + 2, earlier, duplicates)
    expected = dense_keys(basis @ basis.T, ridge, torch.cat([old, keys], dim=1), keys)
    for space in two_forms(seed, columns):
        assert space.dimensions == columns
        history = KeyHistory(old, NullSpaceMetric(space, ridge))
        assert_close(adjusted_keys(history, keys), expected)
        assert_close(plain_alphaedit_keys(space, ridge, keys, history), expected)
        if earlier == 0:
            assert_close(plain_alphaedit_keys(space, ridge, keys), expected)


@PROPERTY
@given(SEEDS, COUNTS, EARLIER, DUPLICATES, st.floats(0.5, 1000.0))
def test_memit_equals_dense_formula(seed: int, count: int, earlier: int, duplicates: bool, weight: float) -> None:
    moment = some_moment(seed)
    keys, old = some_keys(seed + 1, count, duplicates), some_keys(seed + 2, earlier, duplicates)
    history = KeyHistory(old, covariance_metric(moment, weight))
    every = torch.cat([old, keys], dim=1).double()
    found = adjusted_keys(history, keys)
    direct = torch.linalg.inv(weight * moment.double() + every @ every.T) @ keys.double()
    assert_close(found, direct)
    assert_close(found, dense_keys(torch.linalg.inv(weight * moment.double()), 1.0, every, keys))
    assert_close(found, plain_memit_keys(moment, weight, keys, history))
    if earlier == 0:
        assert_close(found, plain_memit_keys(moment, weight, keys))


@PROPERTY
@given(SEEDS, COUNTS, EARLIER, st.integers(1, WIDTH - 1))
def test_alphaedit_stays_in_the_null_space(seed: int, count: int, earlier: int, columns: int) -> None:
    outside = orthonormal(seed, WIDTH)[:, columns:]
    keys, old = some_keys(seed + 1, count, False), some_keys(seed + 2, earlier, False)
    for space in two_forms(seed, columns):
        found = adjusted_keys(KeyHistory(old, NullSpaceMetric(space, 0.3)), keys)
        assert found is not None
        update = LowRankUpdate(gaussian(seed + 3, 5, count), found).dense()
        assert float(update.norm()) > 0
        assert float((update @ outside).norm()) < 1e-10 * float(update.norm())


def test_earlier_keys_matter() -> None:
    """Without this, every comparison above would hold for a solver that forgot them."""
    keys, old = some_keys(1, 3, False), some_keys(2, 4, False)
    for metric in (null_space_metric(3, 8, 0.5), covariance_metric(some_moment(4), 2.0)):
        alone, after = adjusted_keys(without_earlier(metric), keys), adjusted_keys(KeyHistory(old, metric), keys)
        assert alone is not None
        assert after is not None
        assert relative_error(after, alone) > 0.05


@pytest.mark.parametrize("share", [0.3, 0.9])
@pytest.mark.parametrize("earlier", [150, 700])  # fewer and more than any basis has columns
def test_float32_storage_is_accurate_enough(share: float, earlier: int) -> None:
    """Keys as they are met: a large common part outside the null space, hardly anything in it, and repetitions."""
    width, count = 400, 20
    vectors = torch.linalg.qr(gaussian(0, width, width)).Q
    strength = torch.logspace(1, -2, width, dtype=torch.float64)[:, None]
    keys = vectors @ (strength * gaussian(1, width, earlier + count))
    keys = (keys + 30 * vectors[:, :1]).float()
    keys[:, -5:] = keys[:, :5]
    old, new = keys[:, :earlier], keys[:, earlier:]
    kept = int(share * width)
    inside, outside = vectors[:, width - kept:], vectors[:, : width - kept]
    expected = dense_keys(inside @ inside.T, 0.5, keys, new)
    thinner = NullSpace(outside.float(), True) if share > 0.5 else NullSpace(inside.float())
    assert relative_error_of(adjusted_keys(KeyHistory(old, NullSpaceMetric(thinner, 0.5)), new), expected) < 1e-4
    moment = (vectors * strength.T**2) @ vectors.T
    direct = torch.linalg.solve(20 * moment.float().double() + keys.double() @ keys.double().T, new.double())
    metric = covariance_metric(moment.float(), 20.0)
    assert relative_error_of(adjusted_keys(KeyHistory(old, metric), new), direct) < 1e-4


def relative_error_of(found: Tensor | None, expected: Tensor) -> float:
    assert found is not None
    return relative_error(found, expected)


def test_memit_with_a_huge_weight_changes_nothing() -> None:
    moment, keys = some_moment(0), some_keys(1, 4, False)
    norms = []
    for weight in (1.0, 1e4, 1e8, 1e12):
        found = adjusted_keys(without_earlier(covariance_metric(moment, weight)), keys)
        assert found is not None
        norms.append(float(found.norm()))
    assert norms == sorted(norms, reverse=True)
    # In the limit the bracket is lambda C alone.
    limit = torch.linalg.inv(moment.double()) @ keys.double() / 1e12
    assert norms[-1] == pytest.approx(float(limit.norm()), rel=1e-6)


def test_zero_keys_have_zero_adjusted_keys() -> None:
    found = adjusted_keys(without_earlier(null_space_metric(0, 7, 0.5)), torch.zeros(WIDTH, 3))
    assert found is not None
    assert torch.equal(found, torch.zeros(WIDTH, 3, dtype=torch.float64))


def test_nearly_parallel_keys() -> None:
    """A system of condition 1e10 is still solved, or handed on, but never answered wrongly."""
    keys = some_keys(0, 1, False).repeat(1, 6).double()
    keys += 1e-5 * gaussian(1, WIDTH, 6)
    expected = dense_keys(torch.eye(WIDTH, dtype=torch.float64), 1e-8, keys, keys)
    for space in two_forms(2, WIDTH):
        found = adjusted_keys(without_earlier(NullSpaceMetric(space, 1e-8)), keys)
        assert found is None or relative_error(found, expected) < 1e-4


# --- factors ------------------------------------------------------------------------------------------------


@PROPERTY
@given(SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 8))
def test_extended_factor_equals_one_from_scratch(seed: int, counts: list[int], block: int) -> None:
    size = sum(counts)
    samples = gaussian(seed, size, size + 5)
    matrix = samples @ samples.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "BLOCK", block)
        factor, start = CholeskyFactor(), 0
        for count in counts:
            shorter, rows = factor, [row.clone() for row in factor.rows]
            factor = factor.extended(matrix[start: start + count, : start + count])
            start += count
            assert all(torch.equal(*pair) for pair in zip(shorter.rows, rows, strict=True))  # left as it was
        at_once = CholeskyFactor.of(matrix)
    expected = torch.linalg.cholesky(matrix)
    right = gaussian(seed + 1, size, 3)
    for found in (factor, at_once):
        dense = torch.cat([torch.nn.functional.pad(row, (0, size - row.shape[1])) for row in found.rows])
        torch.testing.assert_close(dense, expected, rtol=1e-8, atol=1e-8)
        products = torch.cat([torch.nn.functional.pad(row, (0, size - row.shape[1]))
                              for row in found.products(torch.device("cpu"), 2.0)])
        torch.testing.assert_close(products.tril(), 2 * matrix.tril(), rtol=1e-8, atol=1e-8)
        assert found.size == size
        assert relative_error(matrix @ found.solve(right), right) < 1e-6
        assert relative_error(expected @ found.solve_lower(right), right) < 1e-8
        assert relative_error(expected.T @ found.solve_upper(right), right) < 1e-8
        assert found.nbytes <= (size * (size + 2 * max(block, *counts))) * 8 / 2


def test_thin_rows_and_keys_join_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many thin ones would be slow; up to the size of a block, and none is lost."""
    monkeypatch.setattr(solvers, "BLOCK", 5)
    monkeypatch.setattr(solvers, "_UNIT", 1)
    keys = some_keys(0, WIDTH, False)
    factor, history = CholeskyFactor(), without_earlier(covariance_metric(some_moment(1), 2.0))
    matrix = keys.double().T @ keys.double() + torch.eye(WIDTH, dtype=torch.float64)
    start = 0
    for end, sizes, units in ((4, [4], [4]), (6, [4, 2], [5, 1]), (7, [4, 3], [5, 2]), (9, [4, 5], [5, 4]),
                              (11, [4, 5, 2], [5, 5, 1])):
        factor = factor.extended(matrix[start:end, :end])
        history = history.extended(keys[:, start:end])
        start = end
        assert history.factor is not None
        assert [len(row) for row in factor.rows] == sizes
        assert [len(row) for row in history.factor.rows] == [part.shape[1] for part in history._pending] == units
        right = gaussian(2, end, 2)
        torch.testing.assert_close(matrix[:end, :end] @ factor.solve(right), right)
    assert torch.equal(history.keys, keys[:, :11])


def test_factor_of_what_is_not_positive_definite() -> None:
    for matrix in (torch.zeros(WIDTH, WIDTH), -some_moment(0), torch.full((WIDTH, WIDTH), float("nan"))):
        with pytest.raises(torch.linalg.LinAlgError, match="^row 1 leaves it not positive definite"):
            CholeskyFactor.of(matrix)
    diagonal = torch.ones(WIDTH)
    diagonal[7] = -1.0
    factor = CholeskyFactor.of(torch.eye(5))
    with pytest.raises(torch.linalg.LinAlgError, match="^row 8 leaves"):
        factor.extended(torch.diag(diagonal)[5:].double())


# --- updates in factors, earlier keys -----------------------------------------------------------------------


def test_low_rank_update_dense() -> None:
    values, keys = gaussian(0, 5, 3), gaussian(1, WIDTH, 3)
    dense = LowRankUpdate(values, keys).dense()
    expected = sum(torch.outer(values[:, i], keys[:, i]) for i in range(3))
    torch.testing.assert_close(dense, expected, rtol=1e-12, atol=1e-12)
    assert dense.shape == (5, WIDTH)


METRICS = {
    "thin": lambda seed: NullSpaceMetric(two_forms(seed, 5)[0], 0.4),
    "complement": lambda seed: NullSpaceMetric(two_forms(seed, 8)[1], 0.4),
    "everything": lambda seed: NullSpaceMetric(two_forms(seed, WIDTH)[1], 0.4),
    "MEMIT": lambda seed: covariance_metric(some_moment(seed), 3.0),
}


@pytest.mark.parametrize("kind", METRICS)
@PROPERTY
@given(SEEDS, st.lists(st.integers(1, 9), min_size=1, max_size=12), st.integers(1, 5), st.sampled_from([1, 3, 64]))
def test_extended_history_equals_one_built_at_once(kind: str, seed: int, counts: list[int], block: int, unit: int
                                                   ) -> None:
    """Through the change of form too: 12 batches bring up to nine times as many keys as there are inputs."""
    metric = METRICS[kind](seed)
    parts = [some_keys(seed + i, count, False) for i, count in enumerate(counts)]
    new = some_keys(seed + 99, 2, False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(solvers, "BLOCK", block)
        patch.setattr(solvers, "_UNIT", unit)
        grown = without_earlier(metric)
        for part in parts:
            shorter, keys = grown, grown.keys
            grown = grown.extended(part)
            assert torch.equal(shorter.keys, keys)  # the shorter one is left as it was
        whole = KeyHistory(torch.cat(parts, dim=1), metric)
        assert torch.equal(grown.keys, whole.keys)
        found = adjusted_keys(grown, new)
        assert found is not None
        assert torch.equal(found, adjusted_keys(whole, new))  # a resumed run has only the keys, and goes on to the bit
        unit = torch.eye(WIDTH)
        expected = dense_keys(metric.weigh(unit), metric.ridge, torch.cat([*parts, new], dim=1), new)
        assert_close(found, expected)
        for history in (grown, whole):
            assert history.factor is not None
            assert history.factor.size <= max(metric.capacity, *counts)


@pytest.mark.parametrize("kind", METRICS)
def test_change_of_form_is_continuous(kind: str) -> None:
    """With keys of no weight added until they are absorbed, the solution stays the same to rounding."""
    metric = METRICS[kind](0)
    new = some_keys(2, 2, False)
    history = KeyHistory(some_keys(1, 3, False), metric)
    before = adjusted_keys(history, new)
    changed = []
    for _ in range(2 * WIDTH):
        history = history.extended(torch.zeros(WIDTH, 1))
        changed.append(history.metric is not metric)
        torch.testing.assert_close(adjusted_keys(history, new), before, rtol=1e-10, atol=1e-12)
    assert changed == sorted(changed)
    assert (changed[0], changed[-1]) == (False, True)
    assert history.keys.shape[1] == 3 + 2 * WIDTH


def test_memory_of_a_history() -> None:
    """Keys and null space once in float32, half of the square of the system: nothing else."""
    width, left_out, earlier = 600, 60, 300
    columns = torch.linalg.qr(gaussian(0, width, left_out).float()).Q
    metric = NullSpaceMetric(NullSpace(columns, True), 1.0)
    history = KeyHistory.empty(width, metric, torch.device("cpu"))
    for start in range(0, earlier, 50):
        history = history.extended(gaussian(start, width, 50).float())
    assert history.nbytes < 4 * width * (left_out + earlier) + 8 * earlier * (earlier + 256) / 2


def test_history_without_a_metric_keeps_its_keys() -> None:
    first, second = some_keys(0, 2, False), some_keys(1, 3, False)
    history = KeyHistory.empty(WIDTH, None, torch.device("cpu")).extended(first).extended(second)
    assert history.factor is None
    assert adjusted_keys(history, first) is None
    assert KeyHistory.empty(WIDTH, None, torch.device("cpu")).inner(gaussian(2, WIDTH, 3)).shape == (0, 3)
    assert torch.equal(history.keys, torch.cat([first, second], dim=1))


# --- where the factored way fails ---------------------------------------------------------------------------


class _Metric:
    """A multiple of the identity with a given ridge, to bring about failures."""

    def __init__(self, ridge: float, scale: float = 1.0, capacity: int = 100) -> None:
        self.ridge, self.capacity, self._scale, self.nbytes = ridge, capacity, scale, 0

    def weigh(self, keys: Tensor) -> Tensor:
        return self._scale * keys.double()

    def absorbing(self, parts: object, device: object) -> KeyMetric:
        raise torch.linalg.LinAlgError("planted")


def test_failed_factorisation_gives_none(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert adjusted_keys(without_earlier(_Metric(ridge=-1e6)), some_keys(0, 3, False)) is None
    assert caplog.messages == ["Cholesky factorisation of the 3 key system failed"]
    metric = _Metric(ridge=1.0)
    history = KeyHistory(some_keys(1, 2, False), metric)
    metric.ridge = -1e6
    assert adjusted_keys(history, some_keys(0, 3, False)) is None
    assert caplog.messages[1:] == ["Cholesky factorisation of the 5 key system failed"]


@pytest.mark.parametrize(("metric", "count", "message"), [
    (_Metric(ridge=-1e6), 3, "the factor of 3 earlier keys is lost (row 1 leaves it not positive definite)"),
    (_Metric(ridge=1.0, capacity=5), 4, "the factor of 5 earlier keys is lost (planted)"),
], ids=["extending", "absorbing"])
def test_lost_factor_gives_none_from_then_on(metric: _Metric, count: int, message: str,
                                             caplog: pytest.LogCaptureFixture) -> None:
    history = KeyHistory(some_keys(0, count, False), metric)
    with caplog.at_level(logging.WARNING):
        history = history.extended(some_keys(1, 2, False))
    assert caplog.messages[0] == message
    assert adjusted_keys(history, some_keys(2, 1, False)) is None
    longer = history.extended(some_keys(3, 2, False))
    assert adjusted_keys(longer, some_keys(2, 1, False)) is None
    assert longer.keys.shape[1] == count + 4


def test_large_residual_gives_none(caplog: pytest.LogCaptureFixture) -> None:
    """Duplicate keys with a ridge far below rounding: Cholesky may pass, its solution is worthless."""
    keys = some_keys(0, 1, False).repeat(1, 8).double()
    keys += 3e-8 * gaussian(1, WIDTH, 8)  # the squares of these differences are at rounding
    with caplog.at_level(logging.WARNING):
        assert adjusted_keys(without_earlier(_Metric(ridge=1e-15, scale=100.0)), keys) is None
    assert caplog.records


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_wrong_factor_gives_none(scale: float, caplog: pytest.LogCaptureFixture) -> None:
    """The residual is taken from the keys themselves, so it shows a factor that is not theirs, at any scale."""
    history = KeyHistory(scale * some_keys(0, 4, False), null_space_metric(0, 7, 0.5 * scale**2))
    assert history.factor is not None
    assert adjusted_keys(history, scale * some_keys(1, 3, False)) is not None
    history.factor = CholeskyFactor([1.0001 * row for row in history.factor.rows])
    with caplog.at_level(logging.WARNING):
        assert adjusted_keys(history, scale * some_keys(1, 3, False)) is None
    assert caplog.messages == ["the key system's solution leaves a relative residual of 3.7e-04"]


def test_non_finite_keys_give_none(caplog: pytest.LogCaptureFixture) -> None:
    keys = some_keys(0, 3, False)
    keys[0, 0] = float("nan")
    with caplog.at_level(logging.WARNING):
        assert adjusted_keys(without_earlier(_Metric(ridge=1.0)), keys) is None
    assert caplog.records


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_plain_memit_refuses_by_the_ratio_of_eigenvalues(scale: float) -> None:
    """Below the rounding of float32, in which C comes, an eigenvalue counts as none, at any scale of C."""
    vectors = orthonormal(0, WIDTH)
    keys = torch.zeros(WIDTH, 1, dtype=torch.float64)
    for least, solvable in ((1e-6, True), (1e-8, False)):
        values = torch.ones(WIDTH, dtype=torch.float64)
        values[0] = least
        moment = scale * (vectors * values) @ vectors.T
        if solvable:
            assert torch.equal(plain_memit_keys(moment, 2.0, keys), keys)
            continue
        with pytest.raises(torch.linalg.LinAlgError, match="^eigenvalues between") as raised:
            plain_memit_keys(moment, 2.0, keys)
        assert f"between {2 * scale * least:.1e} and {2 * scale:.1e}" in str(raised.value)
    with pytest.raises(torch.linalg.LinAlgError, match="^eigenvalues between 0.0e"):
        plain_memit_keys(torch.zeros(WIDTH, WIDTH), scale, keys)


def test_probes_show_the_norm_of_what_they_multiply() -> None:
    for count in (1, 16):
        assert torch.equal(solvers._probes(count, torch.device("cpu")), torch.eye(count, dtype=torch.float64))
    probes = solvers._probes(200, torch.device("cpu"))
    assert probes.shape == (200, 16)
    assert torch.equal(probes.abs(), torch.full_like(probes, 0.25))  # 16 columns of unit entries over sqrt(16)
    assert abs(float(probes.mean())) < 0.02  # as many of either sign, within four deviations
    assert torch.equal(probes, solvers._probes(200, torch.device("cpu")))
    residual = gaussian(0, WIDTH, 200)
    assert float((residual @ probes).norm() / residual.norm()) == pytest.approx(1.0, abs=0.3)


def test_wrong_factor_of_many_keys_gives_none(caplog: pytest.LogCaptureFixture) -> None:
    """Past 16 keys of a batch the residual is taken of random sums of them."""
    history = KeyHistory(some_keys(0, 4, False), null_space_metric(0, 7, 0.5))
    keys = some_keys(1, 40, False)
    assert adjusted_keys(history, keys) is not None
    assert history.factor is not None
    history.factor = CholeskyFactor([1.0001 * row for row in history.factor.rows])
    with caplog.at_level(logging.WARNING):
        assert adjusted_keys(history, keys) is None
    assert "relative residual" in caplog.text


class _Elsewhere:
    """A tensor as one on another device: computing takes a copy of it, and has to bring that back."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.shape = tensor, tensor.shape

    def __len__(self) -> int:
        return len(self.tensor)

    def to(self, _: object) -> Tensor:
        return self.tensor.clone()

    def copy_(self, other: Tensor) -> None:
        self.tensor.copy_(other)


def test_sums_on_the_host_are_brought_back() -> None:
    square, parts = 20 * some_moment(0).double(), [gaussian(i, WIDTH, 3) for i in (1, 2)]
    rows: Any = [_Elsewhere(square[:8, :8].clone()), _Elsewhere(square[8:].clone())]
    factor = CholeskyFactor.of_sum(rows, parts, torch.device("cpu"))
    right = gaussian(3, WIDTH, 2)
    torch.testing.assert_close((square + sum(part @ part.T for part in parts)) @ factor.solve(right), right)


def test_what_is_made_lies_where_it_is_asked_for() -> None:
    """Without a GPU: the meta device tells as well whether a tensor was put on the device that was named."""
    meta = torch.device("meta")
    assert NullSpace(torch.eye(WIDTH)[:, :3], True).on(meta).columns.is_meta
    assert NullSpace(torch.eye(WIDTH)[:, :3], True).on(meta).complement
    assert all(row.is_meta for row in CholeskyFactor.of(torch.eye(WIDTH)).on(meta).rows)
    assert KeyHistory.empty(WIDTH, None, meta).device == meta
    assert KeyHistory(torch.zeros(WIDTH, 2), None, meta).keys.is_meta
    assert KeyHistory(torch.zeros(WIDTH, 2, device=meta), None).keys.is_meta
    assert all(row.is_meta for row in solvers._scaled_identity(2.0, 300, meta, TensorStore()))
    assert solvers._probes(3, meta).is_meta
    assert solvers._probes(30, meta).is_meta


class _Noted(TensorStore):
    """Remembers what was put on it."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def put(self, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        kept = super().put(tensor, device).clone()
        self.kept.append(kept)
        return kept

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        return all(any(tensor is kept for kept in self.kept) for tensor in tensors)


def test_what_is_derived_is_kept_on_the_shelf(monkeypatch: pytest.MonkeyPatch) -> None:
    """However it comes about: a bound on the device's memory would not hold for what is not."""
    monkeypatch.setattr(solvers, "BLOCK", 5)
    cpu, store, moment = torch.device("cpu"), _Noted(), some_moment(0).double()
    factor = CholeskyFactor.of(moment, cpu, store)
    merged = CholeskyFactor(store=store).extended(moment[:2, :2]).extended(moment[2:4, :4])
    summed = CholeskyFactor.of_sum([moment.clone()], [moment], cpu, store)
    moved = CholeskyFactor.of(moment).on(cpu, store)
    for made in (factor, merged, summed, moved, factor.extended(torch.eye(WIDTH + 1, dtype=torch.float64)[-1:])):
        assert made.store is store
        assert store.holds(made.rows)
    assert store.holds(factor.products(cpu))
    assert store.holds(solvers._scaled_identity(2.0, WIDTH, cpu, store))
    space = two_forms(0, 7)[0].on(cpu, store)
    assert store.holds([space.columns])
    for metric in (NullSpaceMetric(space, 0.5, store), CovarianceMetric(factor, 2.0)):
        history = KeyHistory.empty(WIDTH, metric, cpu, store)
        for i in range(9):
            history = history.extended(some_keys(i, 3, False))
            assert history.factor is not None
            assert store.holds([*history.factor.rows, *history._pending])
        assert history.metric is not metric
        absorbed = history.metric._absorbed if isinstance(metric, NullSpaceMetric) else history.metric._factor
        assert store.holds([*absorbed.rows, *history._absorbed])


def test_history_lets_go_of_the_tensor_that_it_was_made_of() -> None:
    """Where that is cut into blocks: an empty view of it would keep it whole."""
    history = KeyHistory(torch.zeros(WIDTH, solvers.BLOCK + 1), None)
    assert sum(part.untyped_storage().nbytes() for part in (history._empty, *history._pending)) == history.nbytes


def test_keys_only_drops_what_was_derived() -> None:
    history = KeyHistory(some_keys(0, 4, False), null_space_metric(1, 7, 0.5))
    keys_only = history.keys_only()
    assert (keys_only.metric, keys_only.factor) == (None, None)
    assert torch.equal(keys_only.keys, history.keys)
    assert keys_only.nbytes == history.keys.nbytes < history.nbytes
    longer = keys_only.extended(some_keys(2, 3, False))
    assert longer.keys.shape[1] == 7
    assert adjusted_keys(longer, some_keys(3, 2, False)) is None
    assert adjusted_keys(history, some_keys(3, 2, False)) is not None


@pytest.mark.parametrize(("kind", "limit"), [("thin", 0), ("complement", 0), ("MEMIT", 0), ("MEMIT", None)])
def test_state_on_the_host_comes_to_where_it_is_computed(kind: str, limit: int | None,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: fake tensors have no numbers, but refuse as a GPU does what mixes devices."""
    for name, answer in {"int": 0, "float": 0.0, "bool": True}.items():  # of what has no numbers
        monkeypatch.setattr(solvers, name, lambda _, answer=answer: answer, raising=False)
    factorised, factorise = set(), torch.linalg.cholesky_ex

    def noted(matrix: Tensor) -> tuple[Tensor, Tensor]:
        factorised.add(matrix.device)
        return factorise(matrix)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", noted)
    monkeypatch.setattr(solvers, "BLOCK", 8)
    device, store = torch.device("lazy:0"), TensorStore(limit)  # the one that torch always knows
    home = device if limit is None else torch.device("cpu")
    with FakeTensorMode():
        metric: KeyMetric
        if kind == "MEMIT":
            factor = CholeskyFactor.of(torch.zeros(WIDTH, WIDTH), device, store)
            assert all(row.device == home for row in factor.rows)
            metric = CovarianceMetric(factor, 3.0)
        else:
            space = NullSpace(torch.zeros(WIDTH, 9), kind == "complement").on(device, store)
            metric = NullSpaceMetric(space, 0.4, store)
        history = KeyHistory.empty(WIDTH, metric, device, store)
        for count in (4, 4, 8, 8):
            history = history.extended(torch.zeros(WIDTH, count))
        found = adjusted_keys(history, torch.zeros(WIDTH, 17, device=device))
        assert found is not None
        assert found.device == device
        assert history.metric is not metric
        assert history.device == device
        assert history.keys.device == home
        assert history.factor is not None
        for part in (*history.factor.rows, *history._absorbed, *history._pending):
            assert part.device == home
        assert factorised == {device}
        keys = torch.zeros(WIDTH, 2, device=device)
        dense = (plain_memit_keys(torch.zeros(WIDTH, WIDTH, device=device), 3.0, keys, history) if kind == "MEMIT"
                 else plain_alphaedit_keys(space, 0.4, keys, history))
        assert dense.device == device


# --- through the executors ----------------------------------------------------------------------------------


def _updates(tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams, batches: int = 2) -> dict[int, Tensor]:
    """Whole change of a tiny Llama by some batches."""
    model = tiny_model("llama")
    before = edited_weights(model, hparams)
    for _ in range(batches):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    return {layer: weight - before[layer] for layer, weight in edited_weights(model, hparams).items()}


def _moment_paths(hparams: sphere.SPHEREHyperParams) -> tuple[EditableModel, dict[int, Path]]:
    model = tiny_model("llama")
    editable = EditableModel(model, hparams.module_names(model.config), hparams.layers)
    return editable, {layer: moment_path(editable, hparams, layer) for layer in hparams.layers}


@pytest.mark.parametrize("settings_", [
    {"base_alg": "AlphaEdit"}, {"base_alg": "MEMIT"}, {"base_alg": "MEMIT", "keep_previous_keys": True},
], ids=["AlphaEdit", "MEMIT", "MEMIT_seq"])
def test_dense_solve_takes_over(settings_: dict[str, object], tok: PreTrainedTokenizerBase, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A batch whose factored solve fails is edited as if it had not."""
    hparams = tiny_hparams(tmp_path, alpha=0.0, v_num_grad_steps=4, **settings_)
    expected = _updates(tok, hparams)
    monkeypatch.setattr(solve, "adjusted_keys", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        found = _updates(tok, hparams)
    assert "layer 1: solving densely in the space of 80 inputs" in caplog.text
    for layer, update in expected.items():
        assert relative_error(found[layer], update) < 1e-4
        assert float(update.norm()) > 0


def test_singular_moment_is_solved_densely(tok: PreTrainedTokenizerBase, tmp_path: Path,
                                           caplog: pytest.LogCaptureFixture) -> None:
    """C of low rank has no Cholesky factor; with enough keys, lambda C + K K^T still has an inverse."""
    hparams = tiny_hparams(tmp_path, base_alg="MEMIT", alpha=0.0, v_num_grad_steps=4, keep_previous_keys=True)
    _updates(tok, hparams, batches=1)  # collects the statistics
    editable, paths = _moment_paths(hparams)
    for layer, path in paths.items():
        moment = load_moment(path, 80).double()
        values, vectors = torch.linalg.eigh(moment)
        values[0] = -1e-3 * values[-1]  # indefinite: invertible, but without a factor
        save_moment(path, ((vectors * values) @ vectors.T * 100).float(), 100, hparams.mom2_n_samples)
        assert editable.d_in(layer) == 80
    with caplog.at_level(logging.WARNING):
        found = _updates(tok, hparams, batches=1)
    assert "layer 1: the second moment of keys is not positive definite" in caplog.text
    assert "mom2_n_samples" in caplog.text
    assert "solving densely" in caplog.text
    assert all(bool(torch.isfinite(update).all()) and float(update.norm()) > 0 for update in found.values())


def test_singular_system_is_refused(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A zero second moment and fewer keys than inputs leave a system of rank 3: an answer to it is made of rounding."""
    hparams = tiny_hparams(tmp_path, base_alg="MEMIT", alpha=0.0, v_num_grad_steps=2)
    _, paths = _moment_paths(hparams)
    for path in paths.values():
        save_moment(path, torch.zeros(80, 80), 100, hparams.mom2_n_samples)
    model = tiny_model("llama")
    before = edited_weights(model, hparams)
    with pytest.raises(ValueError, match=r"layer 1.*singular.*mom2_n_samples.*mom2_update_weight"):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    assert all(torch.equal(before[layer], weight) for layer, weight in edited_weights(model, hparams).items())
    assert sphere.EditSession.of(model).num_edits == 0


def test_dense_solve_that_fails_names_the_remedy(tok: PreTrainedTokenizerBase, tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise torch.linalg.LinAlgError("exactly singular")

    hparams = tiny_hparams(tmp_path, base_alg="AlphaEdit", alpha=0.0, v_num_grad_steps=2)
    monkeypatch.setattr(solve, "adjusted_keys", lambda *_: None)
    monkeypatch.setattr(alphaedit, "plain_alphaedit_keys", fail)
    model = tiny_model("llama")
    before = edited_weights(model, hparams)
    with pytest.raises(ValueError, match=r"layer 1: .*singular \(exactly singular\).*mom2_n_samples.*raise L2"):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    assert all(torch.equal(before[layer], weight) for layer, weight in edited_weights(model, hparams).items())


def test_alphaedit_through_a_model_stays_in_the_null_space(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    hparams = tiny_hparams(tmp_path, base_alg="AlphaEdit", alpha=0.0, v_num_grad_steps=4)
    updates = _updates(tok, hparams)
    _, paths = _moment_paths(hparams)
    for layer, update in updates.items():
        vectors = torch.linalg.eigh(load_moment(paths[layer], 80).double()).eigenvectors
        outside = vectors[:, int(0.6 * 80):]
        assert float(update.norm()) > 0.1
        assert float((update.double() @ outside).norm()) < 1e-5 * float(update.norm())


def test_memit_through_a_model_with_a_huge_weight(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    small = _updates(tok, tiny_hparams(tmp_path, base_alg="MEMIT", alpha=0.0, v_num_grad_steps=4), batches=1)
    huge = _updates(tok, tiny_hparams(tmp_path, base_alg="MEMIT", alpha=0.0, v_num_grad_steps=4,
                                      mom2_update_weight=1e9), batches=1)
    for layer, update in small.items():
        assert float(huge[layer].norm()) < 1e-4 * float(update.norm())
