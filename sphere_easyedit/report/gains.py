"""Figure that compares each base method with and without SPHERE after the last edit (the paper's Figure 7)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from ..runs.records import SPHERE
from .figure import HEIGHT, Figure, Panel, Spec, TableRow, by_run, params, quantitative, shown, tooltip
from .runs import ReportRun, interval_of

_METRICS: Final = ("efficacy", "generalization", "specificity")


def gains_figure(runs: Sequence[ReportRun]) -> Figure | None:
    """Bars by base method; None unless one has finished runs with and without SPHERE on the same facts."""
    experiments: list[tuple[tuple[object, ...], list[ReportRun]]] = []
    for run in runs:
        if (after := run.run.after(run.protocol)) is not None:
            records = run.run
            key = (records.model, records.dataset, records.draw, run.protocol, after.num_edits, records.base)
            members = next((members for known, members in experiments
                            if known == key and members[0].run.shares_settings(records)), None)
            if members is None:
                experiments.append((key, [run]))
            else:
                members.append(run)
    kept = [members for _, members in experiments
            if {None, SPHERE} <= {member.run.variant for member in members}]
    compared = [(member, group) for group, members in enumerate(kept) for member in members]
    if not compared:
        return None
    panels, rows = [], list[TableRow]()
    for metric in _METRICS:
        data: list[dict[str, Any]] = []
        for position, (member, group) in enumerate(compared):
            point = member.run.after(member.protocol)
            found = None if point is None else point.metrics.get(metric)
            if point is not None and found is not None and math.isfinite(found.mean):
                low, high = interval_of(found)
                left = position + group  # groups are apart by the width of a bar
                data.append({"run": member.label, "base": member.run.base, "group": group, "mean": found.mean,
                             "low": low, "high": high, "edits": point.num_edits, "left": left, "right": left + 0.9,
                             "middle": left + 0.45})
                rows.append((member.run.base, member.label, metric, point.num_edits, f"{found.mean:.1f}",
                             f"{low:.1f} to {high:.1f}"))
        if not data:
            continue
        panels.append(_panel(metric, data, [run.label for run in runs]))
    return Figure(
        "gains", "Each base method, and the same with SPHERE",
        "After the last edit, on all facts of a run or a seeded sample of them, with 95% intervals by bootstrap over "
        "cases. Side by side: runs of one base method, model, data set, seed and number of edits that share all "
        "other settings, in the order of the list of runs.",
        " ".join(f"{label}: {metric} {mean} ({interval})." for _, label, metric, _, mean, interval in rows),
        tuple(panels), columns=("base", "run", "metric", "edits", "%", "95% interval"), rows=tuple(rows))


def _panel(metric: str, data: list[dict[str, Any]], labels: Sequence[str]) -> Panel:
    plain: Spec = {"axis": None, "scale": {"zero": False, "nice": False, "domain": [
        min(row["left"] for row in data) - 0.3, max(row["right"] for row in data) + 0.3]}}
    y = quantitative("mean", "%")
    # Labels under the plot, since bars have no axis.
    bases: Spec = {
        "transform": [{"aggregate": [{"op": "mean", "field": "middle", "as": "middle"}], "groupby": ["group", "base"]}],
        "mark": {"type": "text", "baseline": "top", "dy": 6, "clip": False, "lineBreak": ", "},
        "encoding": {"x": quantitative("middle", **plain), "y": {"value": HEIGHT}, "text": {"field": "base"}}}
    return Panel(f"{metric[0].upper()}{metric[1:]} (%)", {"data": {"values": data}, "params": params(labels), "layer": [
        {"transform": [shown()], "mark": "bar", "encoding": {
            "x": quantitative("left", **plain), "x2": {"field": "right"}, "y": y, "y2": {"datum": 0}, **by_run(labels),
            "tooltip": tooltip(("run", "run", None), ("mean", metric, ".1f"), ("low", "95% from", ".1f"),
                               ("high", "to", ".1f"), ("edits", "edits", ",d"))}},
        {"transform": [shown()], "mark": {"type": "rule", "color": "var(--ink)"}, "encoding": {
            "x": quantitative("middle", **plain), "y": {**y, "field": "low"}, "y2": {"field": "high"}}},
        bases]})
