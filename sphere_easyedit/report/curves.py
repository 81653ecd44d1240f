"""Figure of hyperspherical energy and each metric by number of edits, one line per run (the paper's Figure 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from ..analysis.correlations import LOG_PERPLEXITY, energy_correlations, energy_points, mean_change
from ..runs.schema import FACT_METRICS, METRIC_NAMES, Measurement
from .figure import (
    HEIGHT,
    SMALL,
    Choice,
    Figure,
    Panel,
    Spec,
    TableRow,
    by_run,
    chosen,
    line_layers,
    params,
    quantitative,
    shown,
    spread,
    tooltip,
)
from .runs import ReportRun

MEAN: Final = "mean"  # over layers
RHO: Final = "\N{GREEK SMALL LETTER RHO}"
PERPLEXITY: Final = "perplexity"
PERCENT: Final = FACT_METRICS
Rhos = Mapping[str, Mapping[str, float]]  # by run and metric
_BANDS: Final = 3  # maximum number of runs with intervals drawn, since those of more would overlap


def curves_figure(runs: Sequence[ReportRun]) -> Figure | None:
    """HE, the metrics, perplexity and the norm of the change by number of edits; None if nothing was recorded."""
    labels = [run.label for run in runs]
    rhos = {run.label: _rhos(run) for run in runs}
    panels = [panel for panel in (_energy_panel(runs), *(_metric_panel(runs, name, rhos) for name in METRIC_NAMES),
                                  _metric_panel(runs, PERPLEXITY, rhos), _norm_panel(runs)) if panel is not None]
    if not panels:
        return None
    layers = sorted({layer for run in runs for changes in run.run.energy_changes.values() for layer in changes})
    choice = Choice("layer", "Layer of HE and norms", (
        (MEAN, "mean over layers"), *((str(layer), f"layer {layer}") for layer in layers)))
    protocols = ", ".join(dict.fromkeys(run.protocol for run in runs))
    return Figure(
        "curves", "Hyperspherical energy and metrics by number of edits",
        f"Metrics by protocol {protocols}, on facts edited so far (or a seeded sample of them), before the first edit "
        "on all facts. HE: change relative to the unedited model. "
        f"{RHO}, at the right in the colour of a curve: Spearman's rank correlation of the metric with HE's mean "
        "change over the points of the run."
        f"{' Bands: 95% intervals by bootstrap over cases.' if len(runs) <= _BANDS else ''}",
        " ".join(_description(run) for run in runs), tuple(_with_params(panel, labels, choice) for panel in panels),
        (choice,), columns=("run", "edits", "metric", "value", "95% interval", "HE change"),
        rows=tuple(row for run in runs for row in _rows(run)))


def _with_params(panel: Panel, labels: Sequence[str], choice: Choice) -> Panel:
    panel.spec["params"] = params(labels, (choice,))
    return panel


def _points(run: ReportRun) -> list[Measurement]:
    before = run.run.before(run.protocol)
    return [*([] if before is None else [before]), *run.run.trajectory(run.protocol)]


def _value(point: Measurement, name: str) -> float | None:
    if name == PERPLEXITY:
        found = point.perplexity
    else:
        found = point.metrics[name].mean if name in point.metrics else None
    return found if found is not None and math.isfinite(found) else None


def _metric_panel(runs: Sequence[ReportRun], name: str, rhos: Rhos) -> Panel | None:
    data: list[dict[str, Any]] = []
    for run in runs:
        for point in _points(run):
            value = _value(point, name)
            if value is None:
                continue
            row: dict[str, Any] = {"run": run.label, "edits": point.num_edits, "value": value}
            estimate = point.metrics.get(name)
            if estimate is not None and estimate.ci95 is not None and all(map(math.isfinite, estimate.ci95)):
                row |= {"low": estimate.ci95[0], "high": estimate.ci95[1], "n": estimate.n}
            data.append(row)
    if not data:
        return None
    ends = _ends(rhos, data, name)
    positive = all(row["value"] > 0 for row in data)
    unit = "%" if name in PERCENT else ""
    low, high = (0.0, 100.0) if name == "efficacy" else _domain([row["value"] for row in data] + [
        end for row in data if len(runs) <= _BANDS for end in (row.get("low"), row.get("high")) if end is not None])
    logged = _domain([row["value"] for row in data], log=True) if positive else (1.0, 10.0)
    _place_labels(ends, (low, high), logged)
    encoding: Spec = {
        "x": quantitative("edits", "edits", scale=_edits_scale(data)),
        "y": quantitative("value", unit or name, scale={"domain": [low, high], "nice": False})}
    tips = tooltip(("run", "run", None), ("edits", "edits", ",d"), ("value", name, ".4~g"), ("low", "95% from", ".4~g"),
                   ("high", "to", ".4~g"), ("n", "cases", ",d"))
    run_labels = [run.label for run in runs]
    layers = line_layers(run_labels, encoding, tips)
    if len(runs) <= _BANDS and any("low" in row for row in data):
        layers.insert(0, {"mark": {"type": "area", "opacity": 0.15}, "encoding": {
            "x": encoding["x"], "y": {**encoding["y"], "field": "low"}, "y2": {"field": "high"},
            **by_run(run_labels)}})
    if ends:
        layers.append({
            "transform": [shown()], "data": {"values": ends},
            "mark": {"type": "text", "align": "left", "dx": 7, "baseline": "middle"},
            "encoding": {"x": quantitative("edits"), "text": {"field": "text"},
                         "y": {"field": "linear", "type": "quantitative", "scale": None}, **by_run(run_labels)}})
    spec: Spec = {"data": {"values": data}, "transform": [shown()], "layer": layers}
    log: dict[str, object] = {}
    if positive and name == PERPLEXITY:
        lines = len(layers) - (1 if ends else 0)
        for index in range(lines):
            log |= {f"/layer/{index}/encoding/y/scale/type": "log",
                    f"/layer/{index}/encoding/y/scale/domain": [*logged]}
        if ends:
            log[f"/layer/{lines}/encoding/y/field"] = "log"
    return Panel(name[0].upper() + name[1:] + (f" ({unit})" if unit else ""), spec, log,
                 start_log=bool(log) and logged[1] / logged[0] > 10)


def _edits_scale(data: Sequence[dict[str, Any]]) -> Spec:
    """The scale of edits, with space at the right for the labels at the ends of curves."""
    return {"domain": [0, max(row["edits"] for row in data) * 1.22 or 1], "nice": False}


def _domain(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.1, high * 1.1
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return (0.0 if low >= 0 and low < 0.5 * high else low - margin), high + margin


def _rhos(run: ReportRun) -> dict[str, float]:
    """Spearman's rho of each metric with HE's mean change, if defined."""
    found = energy_correlations(energy_points(run.run, run.protocol))
    return {metric: one.signed.energy.rho for metric, one in found.items() if math.isfinite(one.signed.energy.rho)}


def _ends(rhos: Rhos, data: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Labels with the rho of each run, and the run's last value."""
    metric = LOG_PERPLEXITY if name == PERPLEXITY else name
    ends = []
    for label, by_metric in rhos.items():
        last = max((row for row in data if row["run"] == label), key=lambda row: int(row["edits"]), default=None)
        if last is not None and metric in by_metric:
            ends.append({**last, "text": f"{RHO} {by_metric[metric]:+.2f}"})
    # In one column to the right of all curves, since other curves continue beside the end of a shorter one.
    furthest = max((row["edits"] for row in data), default=0)
    return [{**end, "edits": furthest} for end in ends]


def _place_labels(ends: list[dict[str, Any]], linear: tuple[float, float], log: tuple[float, float]) -> None:
    """Set the vertical positions of labels, in pixels from the top, on either scale."""
    positions = {"linear": [HEIGHT * (1 - (row["value"] - linear[0]) / (linear[1] - linear[0])) for row in ends],
                 "log": [HEIGHT * (1 - math.log(max(row["value"], log[0]) / log[0]) / math.log(log[1] / log[0]))
                         for row in ends]}
    for name, values in positions.items():
        for row, position in zip(ends, spread(values), strict=True):
            row[name] = position


def _energy_panel(runs: Sequence[ReportRun]) -> Panel | None:
    data = [{"run": run.label, "edits": num_edits, "layer": layer, "value": value}
            for run in runs for num_edits, changes in run.run.energy_changes.items() if changes
            for layer, value in [(MEAN, mean_change(changes)), *((str(layer), change)
                                                                for layer, change in changes.items())]
            if math.isfinite(value)]
    return _by_layer_panel(runs, data, "Hyperspherical energy, relative change", "HE change", ".2e", dict(SMALL))


def _norm_panel(runs: Sequence[ReportRun]) -> Panel | None:
    data = [{"run": run.label, "edits": point.num_edits, "layer": layer, "value": value}
            for run in runs for point in _points(run) if point.update_norms
            for layer, value in [(MEAN, sum(point.update_norms.values()) / len(point.update_norms)),
                                 *((str(layer), norm) for layer, norm in point.update_norms.items())]
            if math.isfinite(value)]
    return _by_layer_panel(runs, data, "Distance from the unedited weight (Frobenius norm)", "norm", ".4~g", {})


def _by_layer_panel(runs: Sequence[ReportRun], data: Sequence[dict[str, Any]], title: str, name: str, form: str,
                    axis: Spec) -> Panel | None:
    if not data:
        return None
    encoding = {"x": quantitative("edits", "edits", scale=_edits_scale(data)),
                "y": quantitative("value", name, axis=axis)}
    tips = tooltip(("run", "run", None), ("edits", "edits", ",d"), ("layer", "layer", None), ("value", name, form))
    return Panel(title, {"data": {"values": data}, "transform": [shown(), chosen("layer")],
                         "layer": line_layers([run.label for run in runs], encoding, tips, small_points=True)})


def _rows(run: ReportRun) -> list[TableRow]:
    rows: list[TableRow] = []
    for point in _points(run):
        change = run.run.energy_changes.get(point.num_edits)
        energy = f"{mean_change(change):+.2e}" if change else ""
        for name, estimate in point.metrics.items():
            interval = "" if estimate.ci95 is None else f"{estimate.ci95[0]:.1f} to {estimate.ci95[1]:.1f}"
            rows.append((run.label, point.num_edits, name, f"{estimate.mean:.1f}", interval, energy))
        if point.perplexity is not None:
            rows.append((run.label, point.num_edits, PERPLEXITY, f"{point.perplexity:.4g}", "", energy))
    return rows


def _description(run: ReportRun) -> str:
    """A run's first and last measurements in words."""
    points = _points(run)
    if not points:
        return f"{run.label}: nothing measured yet."
    first, last = points[0], points[-1]
    parts = []
    for name in (*METRIC_NAMES, PERPLEXITY):
        was, is_now = _value(first, name), _value(last, name)
        if is_now is not None:
            parts.append(f"{name} {is_now:.4g}" + ("" if was is None or first is last else f" (at first {was:.4g})"))
    changes = run.run.energy_changes
    drift = f", HE changed by {mean_change(changes[max(changes)]):+.2e}" if changes and changes[max(changes)] else ""
    return f"{run.label}, after {last.num_edits} edits: {', '.join(parts)}{drift}."
