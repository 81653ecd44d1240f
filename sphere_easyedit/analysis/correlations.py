"""Rank correlation and regression of hyperspherical energy with the metrics along a run.

A point is an evaluation of the edited model on all facts so far, or a sample of them, with a record of energy. Energy
means its relative change since the unedited model, averaged over the edited layers: signed, or in magnitude, so that
increases and decreases do not cancel.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from ..callbacks.energy_metrics import EnergyRecord, MetricCorrelation, correlate
from ..runs.records import PAPER, RunRecords
from ..runs.schema import Measurement

LOG_PERPLEXITY: Final = "log_perplexity"
MIN_POINTS: Final = 3  # for a correlation, or a slope with its standard error


@dataclass(frozen=True)
class EnergyPoint:
    """Energy and metrics at one point.

    Attributes:
        num_edits: edits in the model.
        energy_change: relative change of energy since the unedited model, by layer.
        values: finite metrics by name in the run's units, and ``log_perplexity`` in nats.
    """

    num_edits: int
    energy_change: Mapping[int, float]
    values: Mapping[str, float]


def mean_change(by_layer: Mapping[int, float]) -> float:
    """Mean change of energy over layers."""
    return float(np.mean(list(by_layer.values())))


def mean_magnitude(by_layer: Mapping[int, float]) -> float:
    """Mean magnitude of the change of energy over layers."""
    return float(np.mean(np.abs(list(by_layer.values()))))


@dataclass(frozen=True)
class EnergyCorrelation:
    """Spearman's rho of one metric with the signed change of energy and with its magnitude.

    Each is over the points (``.energy``, the paper's Figure 2) and over consecutive differences (``.change``).
    """

    signed: MetricCorrelation
    magnitude: MetricCorrelation


@dataclass(frozen=True)
class Regression:
    """Least squares ``y = slope x + intercept`` over ``n`` pairs, with 95% intervals by Student's t.

    ``r`` is Pearson's correlation, ``p`` the two-sided p-value of a slope of 0. All are nan for fewer than 3 pairs or
    equal x; r and p also for equal y.
    """

    slope: float
    slope_ci95: tuple[float, float]
    intercept: float
    intercept_ci95: tuple[float, float]
    r: float
    p: float
    n: int


def energy_points(run: RunRecords, protocol: str = PAPER, before: int | None = None) -> list[EnergyPoint]:
    """Points of a run with finite energy, by number of edits; with ``before``, only those of fewer edits."""
    points = []
    for point in run.trajectory(protocol):
        change = run.energy_changes.get(point.num_edits)
        if change and all(map(math.isfinite, change.values())) and (before is None or point.num_edits < before):
            points.append(EnergyPoint(point.num_edits, change, _values(point)))
    return points


def _values(point: Measurement) -> dict[str, float]:
    values = {name: estimate.mean for name, estimate in point.metrics.items()}
    if point.perplexity is not None and point.perplexity > 0:
        values[LOG_PERPLEXITY] = math.log(point.perplexity)
    return {name: value for name, value in values.items() if math.isfinite(value)}


def energy_correlations(points: Sequence[EnergyPoint]) -> dict[str, EnergyCorrelation]:
    """Spearman's rho of energy with each metric over the points of one run that have it, and over their differences.

    Numbers that differ only by rounding are ties. rho is nan for fewer than 3 points or a constant side.
    """
    if not points:
        return {}
    signed = _correlated(points, [mean_change(point.energy_change) for point in points])
    magnitude = _correlated(points, [mean_magnitude(point.energy_change) for point in points])
    return {name: EnergyCorrelation(signed[name], magnitude[name]) for name in signed}


def _correlated(points: Sequence[EnergyPoint], energies: Sequence[float]) -> dict[str, MetricCorrelation]:
    # `correlate` takes EasyEdit's metrics, one entry per edit: here one per point, after a record without edits.
    records = [EnergyRecord(index, {}, {0: energy}) for index, energy in enumerate([0.0, *energies])]
    return correlate(records, 1, [{"post": dict(point.values)} for point in points])


def change_pairs(points: Sequence[EnergyPoint], metric: str, magnitude: bool = False) -> list[tuple[float, float]]:
    """(change of energy, change of the metric) between consecutive points that have the metric.

    Args:
        points: of one run, by number of edits.
        metric: its name.
        magnitude: average the magnitudes of the layers' changes of energy.
    """
    pairs = []
    for earlier, later in pairwise([point for point in points if metric in point.values]):
        step = {layer: later.energy_change[layer] - change for layer, change in earlier.energy_change.items()}
        pairs.append(((mean_magnitude if magnitude else mean_change)(step),
                      later.values[metric] - earlier.values[metric]))
    return pairs


def regress(x: Sequence[float], y: Sequence[float]) -> Regression:
    """Least squares of y on x.

    Raises:
        ValueError: the two differ in length, or a value is not finite.
    """
    if len(x) != len(y):
        raise ValueError(f"x has {len(x)} values and y {len(y)}: give pairs")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("x or y holds a value that is not finite: leave its pair out")
    n = len(x)
    if n < MIN_POINTS or len(set(x)) == 1:
        nothing = (math.nan, math.nan)
        return Regression(math.nan, nothing, math.nan, nothing, math.nan, math.nan, n)
    from scipy import stats  # takes a second to import

    if len(set(y)) == 1:  # exactly flat: versions of scipy differ
        return Regression(0.0, (0.0, 0.0), y[0], (y[0], y[0]), math.nan, math.nan, n)
    fit = stats.linregress(x, y)
    spread = float(stats.t.ppf(0.975, n - 2))

    def interval(value: float, error: float) -> tuple[float, float]:
        return value - spread * error, value + spread * error

    slope, intercept = float(fit.slope), float(fit.intercept)
    return Regression(slope, interval(slope, float(fit.stderr)), intercept,
                      interval(intercept, float(fit.intercept_stderr)), float(fit.rvalue), float(fit.pvalue), n)
