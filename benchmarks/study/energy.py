"""The study's tables along a run: curves, collapse, correlation of hyperspherical energy with metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from sphere_easyedit.analysis.collapse import collapse_of
from sphere_easyedit.analysis.correlations import (
    MIN_POINTS,
    EnergyPoint,
    Regression,
    change_pairs,
    energy_correlations,
    energy_points,
    mean_change,
    mean_magnitude,
    regress,
)
from sphere_easyedit.analysis.labels import LabelledRun, dataset_title
from sphere_easyedit.analysis.tables import Cell, Column, Table
from sphere_easyedit.callbacks.energy_metrics import Spearman
from sphere_easyedit.runs.records import PAPER, RunRecords
from sphere_easyedit.runs.schema import METRIC_NAMES, Estimate, Measurement

from .comparisons import WHO, who

_CHANGE = ".2e"


def curves_table(arms: Sequence[LabelledRun], protocol: str = PAPER) -> Table:
    """Every evaluation of every run, of the unedited model too: metrics, energy, perplexity, how far weights moved."""
    columns = (*WHO, Column("run"), Column("edits"), Column("when"), *(Column(name) for name in METRIC_NAMES),
               Column("HE change", _CHANGE), Column("|HE change|", _CHANGE), Column("perplexity", ".2f"),
               Column("perplexity ratio", ".2f"), Column("update norm", ".3g"))
    rows: list[tuple[Cell, ...]] = []
    for arm in arms:
        for point in arm.run.points:
            if point.protocol == protocol:
                norms = list(point.update_norms.values())
                rows.append((*who(arm), arm.run.name, point.num_edits, point.when,
                             *(point.metrics.get(name) for name in METRIC_NAMES), *_energy_at(arm.run, point.num_edits),
                             point.perplexity, _perplexity_ratio(arm.run, point, protocol),
                             float(np.mean(norms)) if norms else None))
    return Table("curves", "Along the runs", columns, tuple(rows),
                 f"Protocol `{protocol}`. HE change: relative, since the unedited model, mean over edited layers; |HE "
                 "change|: mean of its magnitude. Update norm: mean over edited layers. Perplexity ratio: to the "
                 "unedited model's.").without_empty_columns()


def collapse_table(arms: Sequence[LabelledRun], protocol: str = PAPER, share: float = 0.5,
                   perplexity_factor: float = 10.0) -> Table:
    """Where each run collapses, and how far energy had moved by then."""
    columns = (*WHO, Column("edits"), Column("collapses at"), Column("sign"), Column("HE change before", _CHANGE),
               Column("HE change there", _CHANGE), Column("HE change at the end", _CHANGE),
               Column("|HE change| before", _CHANGE), Column("|HE change| there", _CHANGE),
               Column("|HE change| at the end", _CHANGE), Column("efficacy at the end"),
               Column("perplexity ratio at the end", ".2f"))
    rows: list[tuple[Cell, ...]] = []
    for arm in arms:
        points = arm.run.trajectory(protocol)
        if not points:
            continue
        found, last = collapse_of(arm.run, protocol, share, perplexity_factor), points[-1]
        before = [point.num_edits for point in points if found is not None and point.num_edits < found.num_edits]
        changes = [_energy_at(arm.run, edits) for edits in (before[-1] if before else None,
                                                            None if found is None else found.num_edits, last.num_edits)]
        rows.append((*who(arm), last.num_edits, None if found is None else found.num_edits,
                     None if found is None else " and ".join(found.reasons), *(signed for signed, _ in changes),
                     *(magnitude for _, magnitude in changes), last.metrics.get("efficacy"),
                     _perplexity_ratio(arm.run, last, protocol)))
    return Table("collapse", "Where runs collapse", columns, tuple(rows),
                 f"Collapse is the first point where efficacy on the facts so far is below {share:g} of its running "
                 f"maximum, or perplexity above {perplexity_factor:g} times the unedited model's; before: at the point "
                 "in front of it.")


def correlation_table(arms: Sequence[LabelledRun], protocol: str = PAPER, share: float = 0.5,
                      perplexity_factor: float = 10.0) -> Table:
    """Spearman's rho of energy with each metric, over each whole run and before its collapse (the paper's Figure 2)."""
    columns = [*WHO, Column("metric")]
    for energy in ("HE", "|HE|", "steps of HE"):
        for part in ("", " before collapse"):
            columns += [Column(f"rho {energy}{part}", ".2f"), Column(f"p {energy}{part}", ".2g"),
                        Column(f"n {energy}{part}")]
    rows: list[tuple[Cell, ...]] = []
    for arm in arms:
        whole = energy_correlations(energy_points(arm.run, protocol))
        found = collapse_of(arm.run, protocol, share, perplexity_factor)
        early = {} if found is None else energy_correlations(energy_points(arm.run, protocol, found.num_edits))
        for metric, over in whole.items():
            if over.signed.energy.n < MIN_POINTS:
                continue
            before = early.get(metric)
            rows.append((*who(arm), metric, *_spearman(over.signed.energy),
                         *_spearman(None if before is None else before.signed.energy),
                         *_spearman(over.magnitude.energy),
                         *_spearman(None if before is None else before.magnitude.energy),
                         *_spearman(over.signed.change), *_spearman(None if before is None else before.signed.change)))
    return Table("correlations", "Rank correlation of energy with what is measured", tuple(columns), tuple(rows),
                 f"Protocol `{protocol}`. Spearman's rho over the points of a run; HE: mean over edited layers of its "
                 "relative change since the unedited model, |HE|: of that change's magnitude, steps: differences from "
                 "point to point of both. Before collapse: nothing where a run never collapsed. p is an "
                 "approximation that few points don't bear: below ten go by rho alone."
                 ).without_empty_columns()


def regression_table(arms: Sequence[LabelledRun], protocol: str = PAPER) -> Table:
    """Regression of each metric's change on the change of energy from point to point (the paper's Figure 3): all runs
    of a model and data set pooled, and each by itself."""
    columns = (*WHO, Column("metric"), Column("energy"), Column("slope", ".3g"), Column("intercept", ".3g"),
               Column("r", ".2f"), Column("p", ".2g"), Column("pairs"))
    rows: list[tuple[Cell, ...]] = []
    for model, dataset in dict.fromkeys((arm.run.model, arm.run.dataset) for arm in arms):
        members = [(arm, energy_points(arm.run, protocol)) for arm in arms
                   if (arm.run.model, arm.run.dataset) == (model, dataset)]
        groups: list[tuple[tuple[Cell, ...], list[list[EnergyPoint]]]] = [
            ((model, dataset_title(dataset), None, "all runs"), [points for _, points in members]),
            *((who(arm), [points]) for arm, points in members)]
        metrics = dict.fromkeys(name for _, points in members for point in points for name in point.values)
        for metric in metrics:
            for magnitude in (False, True):
                for described, series in groups:
                    fit = regress_changes(series, metric, magnitude)
                    if fit.n >= MIN_POINTS:
                        rows.append((*described, metric, "|HE step|" if magnitude else "HE step", *_fitted(fit)))
    return Table("regressions", "Change of each metric on change of energy, from point to point", columns, tuple(rows),
                 f"Protocol `{protocol}`. Least squares with 95% intervals; HE in relative change, log_perplexity in "
                 "nats, all else in points. Pairs of a run are no independent draws.")


def regress_changes(runs: Iterable[Sequence[EnergyPoint]], metric: str, magnitude: bool = False) -> Regression:
    """Regression of a metric's change on the change of energy between consecutive points (the paper's Figure 3).

    Pairs of several runs are pooled. Those of one run are no independent draws, and runs of different methods differ
    in scale: a pooled p is that of the plain regression, as the paper's is.

    Args:
        runs: points of each run.
        metric: whose change is y; x is as in ``change_pairs``.
    """
    pairs = [pair for points in runs for pair in change_pairs(points, metric, magnitude)]
    return regress([x for x, _ in pairs], [y for _, y in pairs])


def _energy_at(run: RunRecords, num_edits: int | None) -> tuple[float | None, float | None]:
    """Mean over layers of the relative change, and of its magnitude."""
    change = run.energy_changes.get(-1 if num_edits is None else num_edits)
    if not change:
        return None, None
    return mean_change(change), mean_magnitude(change)


def _perplexity_ratio(run: RunRecords, point: Measurement, protocol: str) -> float | None:
    before = run.before(protocol)
    if before is None or not before.perplexity or point.perplexity is None:
        return None
    return point.perplexity / before.perplexity


def _spearman(found: Spearman | None) -> tuple[Cell, ...]:
    return (None, None, None) if found is None else (found.rho, found.p, found.n)


def _fitted(fit: Regression) -> tuple[Cell, ...]:
    if math.isnan(fit.slope):
        return None, None, None, None, fit.n
    slope, intercept = Estimate(fit.slope, fit.slope_ci95, fit.n), Estimate(fit.intercept, fit.intercept_ci95, fit.n)
    return slope, intercept, fit.r, fit.p, fit.n
