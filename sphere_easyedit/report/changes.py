"""Figure of each metric's change by change of hyperspherical energy (the paper's Figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ..analysis.correlations import LOG_PERPLEXITY, MIN_POINTS, change_pairs, energy_points, regress
from ..runs.schema import METRIC_NAMES
from .figure import SMALL, Choice, Figure, Panel, Spec, TableRow, by_run, chosen, params, quantitative, shown, tooltip
from .runs import ReportRun

_METRICS: Final = (*METRIC_NAMES, LOG_PERPLEXITY)
_KINDS: Final = (("signed", "signed, mean over layers"), ("magnitude", "magnitude, mean over layers"))
_STEPS: Final = 25  # of a regression's line and band


def changes_figure(runs: Sequence[ReportRun]) -> Figure | None:
    """Pairs of consecutive points of every run, with the regression over all of them; None with fewer than three."""
    choice = Choice("kind", "Change of HE", _KINDS)
    points = {run.label: energy_points(run.run, run.protocol) for run in runs}
    panels: list[Panel] = []
    rows: list[TableRow] = []
    descriptions: list[str] = []
    for metric in _METRICS:
        pairs: list[dict[str, Any]] = []
        lines: list[dict[str, Any]] = []
        for kind, _ in _KINDS:
            named = [(label, pair) for label, series in points.items()
                     for pair in change_pairs(series, metric, magnitude=kind == "magnitude")]
            x, y = [pair[0] for _, pair in named], [pair[1] for _, pair in named]
            if len(named) < MIN_POINTS or len(set(x)) == 1 or len(set(y)) == 1:
                continue  # no change, or too few pairs
            line, row, text = _regression(x, y, metric, kind)
            pairs += [{"run": label, "kind": kind, "x": pair[0], "y": pair[1]} for label, pair in named]
            lines += line
            rows.append(row)
            descriptions.append(text)
        if pairs:
            panels.append(_panel(metric, pairs, lines, [run.label for run in runs], choice))
    if not panels:
        return None
    return Figure(
        "changes", "Change of metrics by change of hyperspherical energy",
        "Each point is the change of a metric between two consecutive evaluations of a run, by the change of HE "
        "(relative to the unedited model) between them. Line: least squares over all runs of the report, shown or "
        "not, with the 95% interval of its mean. Points of one run are not independent, so p is too small.",
        " ".join(descriptions), tuple(panels), (choice,),
        columns=("metric", "change of HE", "slope", "95% interval", "r", "p", "pairs"), rows=tuple(rows))


def _regression(x: Sequence[float], y: Sequence[float], metric: str, kind: str
                ) -> tuple[list[dict[str, Any]], TableRow, str]:
    """A regression: its line with the band, its row of the table, and its description."""
    fit = regress(x, y)
    slope = f"{fit.slope:.3g}"
    row = (metric, kind, slope, f"{fit.slope_ci95[0]:.3g} to {fit.slope_ci95[1]:.3g}", f"{fit.r:+.2f}", f"{fit.p:.2g}",
           fit.n)
    text = f"{metric} on {kind} change of HE: slope {slope}, r {fit.r:+.2f}, p {fit.p:.2g}, {fit.n} pairs."
    from scipy import stats  # takes a second to import

    xs = np.linspace(min(x), max(x), _STEPS)
    values = fit.slope * xs + fit.intercept
    residuals = np.asarray(y) - (fit.slope * np.asarray(x) + fit.intercept)
    centred = np.asarray(x) - np.mean(x)
    # The interval of the mean at x: t s sqrt(1/n + (x - mean)^2 / sum of squares).
    error = np.sqrt((residuals**2).sum() / (fit.n - 2)) * np.sqrt(
        1 / fit.n + (xs - np.mean(x)) ** 2 / (centred**2).sum())
    half = float(stats.t.ppf(0.975, fit.n - 2)) * error
    line = [{"kind": kind, "x": float(at), "y": float(value), "low": float(value - width),
             "high": float(value + width), "text": f"r {fit.r:+.2f}, p {fit.p:.1g}, n {fit.n}"}
            for at, value, width in zip(xs, values, half, strict=True)]
    return line, row, text


def _panel(metric: str, pairs: list[dict[str, Any]], lines: list[dict[str, Any]], labels: Sequence[str], choice: Choice
           ) -> Panel:
    x = quantitative("x", "change of HE", axis=dict(SMALL))
    y = quantitative("y", f"change of {metric.replace('_', ' ')}")
    layers: list[Spec] = [{"transform": [shown()], "mark": {"type": "point", "opacity": 0.85}, "encoding": {
        "x": x, "y": y, **by_run(labels, ("color", "shape")),
        "tooltip": tooltip(("run", "run", None), ("x", "change of HE", ".2e"), ("y", f"change of {metric}", ".3~g"))}}]
    if lines:
        values = {"values": lines}
        layers = [
            {"data": values, "mark": {"type": "area", "color": "var(--muted)", "opacity": 0.2},
             "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}}},
            {"data": values, "mark": {"type": "line", "color": "var(--ink)", "strokeWidth": 1.5},
             "encoding": {"x": x, "y": y}},
            *layers,
            {"data": values,
             "transform": [{"window": [{"op": "row_number", "as": "row"}]}, {"filter": "datum.row == 1"}],
             "mark": {"type": "text", "align": "right", "baseline": "top"},
             "encoding": {"text": {"field": "text"}, "x": {"value": "width"}, "y": {"value": 0}}}]
    title = metric.replace("_", " ")
    return Panel(f"{title[0].upper()}{title[1:]}", {
        "data": {"values": pairs}, "params": params(labels, (choice,)), "transform": [chosen("kind")],
        "layer": [_of_kind(layer) for layer in layers]})


def _of_kind(layer: Spec) -> Spec:
    """Filter a layer that has its own data by the chosen kind."""
    return layer if "data" not in layer else {**layer, "transform": [chosen("kind"), *layer.get("transform", [])]}
