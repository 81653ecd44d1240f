"""Mathematics of analyses: paired bootstrap, collapse, correlations, regression, shares in the principal space."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats
from torch import Tensor

from sphere_easyedit import PrincipalSpace
from sphere_easyedit.analysis.collapse import Collapse, collapse_point
from sphere_easyedit.analysis.correlations import (
    EnergyPoint,
    change_pairs,
    energy_correlations,
    regress,
)
from sphere_easyedit.callbacks import spaces
from sphere_easyedit.callbacks.spaces import principal_share
from sphere_easyedit.evaluation.paired import paired_bootstrap
from study.gains import paired_gain

SCORES = arrays(np.float64, st.integers(2, 40), elements=st.floats(0, 1))
SEEDS = st.integers(0, 2**31 - 1)


def rows(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


# --- paired bootstrap -----------------------------------------------------------------------------------------


@given(SCORES, SEEDS)
@settings(max_examples=30, deadline=None)
def test_a_run_does_not_differ_from_itself(scores: np.ndarray, seed: int) -> None:
    found = paired_bootstrap(scores, scores, seed, 50)
    assert found.mean == 0 and found.ci95 == (0, 0) and found.n == len(scores)
    if scores.mean() > 0.1:
        assert paired_gain(scores, scores, seed, 50).mean == 0


@given(SCORES, st.data(), SEEDS)
@settings(max_examples=30, deadline=None)
def test_swapping_the_runs_turns_the_sign(a: np.ndarray, data: st.DataObject, seed: int) -> None:
    b = data.draw(arrays(np.float64, len(a), elements=st.floats(0, 1)))
    there, back = paired_bootstrap(a, b, seed, 100), paired_bootstrap(b, a, seed, 100)
    assert there.ci95 is not None and back.ci95 is not None
    assert there.mean == pytest.approx(-back.mean)
    assert there.ci95 == pytest.approx((-back.ci95[1], -back.ci95[0]), abs=1e-12)
    assert there.ci95[0] - 1e-12 <= there.ci95[1] and abs(there.mean) <= 1


def test_what_pairs_share_cancels() -> None:
    hardness = np.random.default_rng(0).random(400)
    found = paired_bootstrap(hardness + 0.01, hardness)
    assert found.mean == pytest.approx(0.01) and found.ci95 == pytest.approx((0.01, 0.01))


def test_the_interval_is_that_of_the_mean() -> None:
    a, b = np.random.default_rng(1).normal(size=(2, 1000))
    found = paired_bootstrap(a, b, seed=3)
    half = 1.96 * (a - b).std() / math.sqrt(1000)
    assert found.ci95 == pytest.approx((found.mean - half, found.mean + half), abs=0.01)
    assert found == paired_bootstrap(a, b, seed=3) != paired_bootstrap(a, b, seed=4)


def test_gain_is_relative_and_covers_the_truth() -> None:
    assert paired_gain([0.6, 0.3], [0.4, 0.2]).mean == pytest.approx(50)
    rng = np.random.default_rng(2)
    b = rng.random(2000)
    found = paired_gain(1.2 * b + rng.normal(0, 0.1, 2000), b)
    assert found.ci95 is not None and found.ci95[0] < 20 < found.ci95[1] and found.ci95[1] - found.ci95[0] < 4
    assert math.isnan(paired_gain([0.5, 1], [0, 0]).mean)
    assert paired_gain([1, 1, 0, 0], [1, 0, 0, 0]).ci95 is None  # a third of the resamples have nothing to gain from


def test_pairs_that_miss_a_value_are_left_out() -> None:
    found = paired_bootstrap([1, None, 2, math.nan], [0, 1, 0.5, 0])
    assert found.mean == 1.25 and found.n == 2
    assert paired_bootstrap([1, None], [0, 1]).ci95 is None


@pytest.mark.parametrize(("a", "b", "complaint"), [
    ([1, 2], [1], "two series of the same cases"), ([None], [1], "none of 1 pairs"), ([], [], "none of 0 pairs"),
    ([math.inf], [1], "infinite")])
@pytest.mark.parametrize("compare", [paired_bootstrap, paired_gain])
def test_pairs_are_checked(compare: object, a: list[float], b: list[float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        compare(a, b)  # type: ignore[operator]
    with pytest.raises(ValueError, match="resamples is 0"):
        compare([1, 2], [1, 1], resamples=0)  # type: ignore[operator]


# --- collapse -------------------------------------------------------------------------------------------------


def test_collapse_is_the_first_sign() -> None:
    edits, fine = [100, 200, 300, 400], [20.0, 21.0, 22.0, 23.0]
    assert collapse_point(edits, [80, 90, 85, 70], fine, 20) is None
    assert collapse_point(edits, [80, 90, 44, 10], fine, 20) == Collapse(300, ("efficacy",))
    assert collapse_point(edits, [80, 90, 45, 10], fine, 20) == Collapse(400, ("efficacy",))  # half is not below half
    assert collapse_point(edits, [80, 90, 44, 10], [20, 201, 9, 9], 20) == Collapse(200, ("perplexity",))
    assert collapse_point(edits, [80, 90, 44, 10], [20, 200, 201, 9], 20) == Collapse(300, ("efficacy", "perplexity"))
    assert collapse_point(edits, [80, 90, 60, 50], fine, 20, share=0.7) == Collapse(300, ("efficacy",))
    assert collapse_point(edits, [80] * 4, fine, 20, perplexity_factor=1.1) == Collapse(400, ("perplexity",))


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_models_perplexity_is_a_collapse(broken: float) -> None:
    assert collapse_point([1, 2], [None, None], [5.0, broken], 5.0) == Collapse(2, ("perplexity",))
    assert collapse_point([1, 2], [None, None], [5.0, broken], None) is None


def test_what_was_not_measured_shows_nothing() -> None:
    assert collapse_point([1, 2, 3], [90, None, 40], [None] * 3, 5.0) == Collapse(3, ("efficacy",))
    assert collapse_point([], [], [], None) is None


@given(st.lists(st.floats(0, 100), min_size=1, max_size=20), st.floats(0.05, 1))
def test_efficacy_collapses_where_a_loop_says(efficacy: list[float], share: float) -> None:
    wanted = next((index for index in range(len(efficacy))
                   if efficacy[index] < share * max(efficacy[:index + 1])), None)
    found = collapse_point(range(len(efficacy)), efficacy, [None] * len(efficacy), None, share)
    assert (None if found is None else found.num_edits) == wanted


def test_collapse_is_checked() -> None:
    with pytest.raises(ValueError, match="do not rise"):
        collapse_point([2, 1], [1, 1], [1, 1], 1)
    with pytest.raises(ValueError, match="one of each"):
        collapse_point([2], [1, 1], [1, 1], 1)
    with pytest.raises(ValueError, match="share is 0"):
        collapse_point([1], [1], [1], 1, share=0)
    with pytest.raises(ValueError, match="perplexity_factor is 0.5"):
        collapse_point([1], [1], [1], 1, perplexity_factor=0.5)


# --- energy and metrics ---------------------------------------------------------------------------------------


def energy_series(energy: list[dict[int, float]], **metrics: list[float | None]) -> list[EnergyPoint]:
    return [EnergyPoint(100 * index, change, {name: value for name, values in metrics.items()
                                              if (value := values[index]) is not None})
            for index, change in enumerate(energy)]


def test_rho_is_scipys_over_the_points_that_have_the_metric() -> None:
    rng = np.random.default_rng(0)
    layers = rng.normal(size=(12, 3))
    efficacy, gappy = rng.normal(size=12), [None if index == 4 else float(index) for index in range(12)]
    points = energy_series([dict(enumerate(row)) for row in layers], efficacy=list(efficacy), gappy=gappy)
    found = energy_correlations(points)
    for given_energy, got in ((layers.mean(1), found["efficacy"].signed),
                              (np.abs(layers).mean(1), found["efficacy"].magnitude)):
        assert (got.energy.rho, got.energy.p) == pytest.approx(tuple(stats.spearmanr(given_energy, efficacy)))
        steps = stats.spearmanr(np.diff(given_energy), np.diff(efficacy))
        assert (got.change.rho, got.change.n) == (pytest.approx(steps.statistic), 11)
    kept = [index for index in range(12) if index != 4]
    assert found["gappy"].signed.energy.n == 11
    assert found["gappy"].signed.energy.rho == pytest.approx(stats.spearmanr(layers.mean(1)[kept], kept).statistic)


def test_magnitude_sees_what_cancels_over_layers() -> None:
    points = energy_series([{4: 0.1 * i, 5: -0.1 * i} for i in range(5)], efficacy=[90.0, 80, 70, 60, 50])
    found = energy_correlations(points)["efficacy"]
    assert math.isnan(found.signed.energy.rho) and found.magnitude.energy.rho == pytest.approx(-1)


def test_few_points_have_no_rho() -> None:
    assert energy_correlations([]) == {}
    assert math.isnan(energy_correlations(energy_series([{0: 1.0}] * 2, efficacy=[1.0, 2.0]))["efficacy"]
                      .signed.energy.rho)


def test_changes_are_taken_between_neighbours_of_one_run() -> None:
    one = energy_series([{4: 0.0, 5: 0.0}, {4: 0.3, 5: -0.1}, {4: 0.4, 5: -0.4}], efficacy=[90, 80, 75],
                        fluency=[5, None, 3])
    assert change_pairs(one, "efficacy") == [(pytest.approx(0.1), -10), (pytest.approx(-0.1), -5)]
    assert change_pairs(one, "efficacy", magnitude=True) == [(pytest.approx(0.2), -10), (pytest.approx(0.2), -5)]
    assert change_pairs(one, "fluency") == [(pytest.approx(0.0), -2)]


@given(SEEDS, st.floats(-5, 5), st.floats(-5, 5))
@settings(max_examples=20, deadline=None)
def test_an_exact_line_is_found(seed: int, slope: float, intercept: float) -> None:
    x = np.random.default_rng(seed).normal(size=8)
    found = regress(list(x), list(slope * x + intercept))
    assert (found.slope, found.intercept, found.n) == (pytest.approx(slope, abs=1e-9),
                                                       pytest.approx(intercept, abs=1e-9), 8)
    assert found.slope_ci95 == pytest.approx((slope, slope), abs=1e-5)


def test_intervals_are_those_of_the_normal_equations() -> None:
    rng = np.random.default_rng(5)
    x, noise = rng.normal(size=(2, 30))
    y = 2 * x - 1 + noise
    found = regress(list(x), list(y))
    design = np.stack([x, np.ones(30)], 1)
    best, squares, *_ = np.linalg.lstsq(design, y, rcond=None)
    errors = np.sqrt(np.diag(np.linalg.inv(design.T @ design)) * squares[0] / 28) * stats.t.ppf(0.975, 28)
    assert found.slope_ci95 == pytest.approx((best[0] - errors[0], best[0] + errors[0]))
    assert found.intercept_ci95 == pytest.approx((best[1] - errors[1], best[1] + errors[1]))
    assert (found.r, found.p) == pytest.approx(tuple(stats.pearsonr(x, y)))


def test_what_has_no_slope() -> None:
    assert math.isnan(regress([1, 2], [1, 2]).slope) and regress([1, 2], [1, 2]).n == 2
    assert math.isnan(regress([1, 1, 1], [1, 2, 3]).p)
    flat = regress([1, 2, 3], [4, 4, 4])
    assert flat.slope == 0 and math.isnan(flat.r) and math.isnan(flat.p)
    with pytest.raises(ValueError, match="give pairs"):
        regress([1], [1, 2])
    with pytest.raises(ValueError, match="not finite"):
        regress([1, 2, math.nan], [1, 2, 3])


# --- shares --------------------------------------------------------------------------------------------------


@given(SEEDS, st.sampled_from([(6, 10), (10, 6)]), st.floats(0.2, 0.9))
@settings(max_examples=25, deadline=None)
def test_shares_are_those_of_the_projection(seed: int, shape: tuple[int, int], gamma: float) -> None:
    space = PrincipalSpace.from_weight(rows(seed, *shape), gamma)
    update, keys = rows(seed + 1, 4, shape[1]), rows(seed + 2, shape[1], 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spaces, "_BLOCK_ELEMENTS", 20)  # several blocks
        of_update, of_keys = principal_share(update, space), principal_share(keys.T, space)
    left = float(space.suppress(update, 1.0).square().sum() / update.square().sum())
    assert of_update.share == pytest.approx(1 - left, abs=1e-9)
    assert of_update.chance == space.rank / shape[1]
    assert of_keys.share == pytest.approx(1 - float(space.suppress(keys.T, 1.0).square().sum() / keys.square().sum()))


def test_random_updates_lie_there_by_chance() -> None:
    space = PrincipalSpace.from_weight(rows(0, 40, 120), 0.5)
    found = principal_share(rows(1, 400, 120), space)
    assert found.share / found.chance == pytest.approx(1, abs=0.05)
    assert principal_share(space.directions.T, space).share == pytest.approx(1)
    assert principal_share(space.suppress(rows(2, 5, 120), 1.0), space).share == pytest.approx(0, abs=1e-20)
    assert math.isnan(principal_share(torch.zeros(2, 120), space).share)


def test_rows_are_checked() -> None:
    space = PrincipalSpace.from_weight(rows(0, 4, 6))
    with pytest.raises(ValueError, match=r"\(n, 6\)"):
        principal_share(rows(0, 6, 5), space)
    with pytest.raises(ValueError, match="nan or infinity"):
        principal_share(torch.full((2, 6), math.nan), space)
