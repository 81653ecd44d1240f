"""General abilities against the number of edits (the paper's Figures 6 and 10 to 12)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .figure import Figure, Panel, Row, Spec, by_run, params, quantitative, shown, tooltip
from .runs import ReportRun


def abilities_figure(runs: Sequence[ReportRun]) -> Figure | None:
    """A panel a task; None where no run measured abilities."""
    labels = [run.label for run in runs]
    by_task: dict[tuple[str, str], list[dict[str, Any]]] = {}  # task, protocol: numbers of two don't compare
    protocols: dict[str, None] = {}
    for run in runs:
        for point in sorted(run.run.abilities, key=lambda point: point.num_edits):
            protocols[point.protocol] = None
            for task, found in point.abilities.items():
                low, high = found.ci95 if found.ci95 and all(map(math.isfinite, found.ci95)) else (found.mean,) * 2
                if math.isfinite(found.mean):
                    by_task.setdefault((task, point.protocol), []).append(
                        {"run": run.label, "edits": point.num_edits, "mean": found.mean, "low": low, "high": high,
                         "n": found.n})
    if not by_task:
        return None
    titles = {(task, protocol): task if len(protocols) == 1 else f"{task} ({protocol})" for task, protocol in by_task}
    panels = []
    for key, data in sorted(by_task.items()):
        x, y = quantitative("edits", "edits"), quantitative("mean", "%")
        # Runs measured after as many edits would cover one another's intervals.
        aside = {"xOffset": {"field": "run", "type": "nominal", "scale": {"domain": labels, "range": [-6, 6]}}}
        told = tooltip(("run", "run", None), ("edits", "edits", ",d"), ("mean", "%", ".1f"), ("low", "95% from", ".1f"),
                       ("high", "to", ".1f"), ("n", "questions", ",d"))
        layers: list[Spec] = [
            {"mark": "line", "encoding": {"x": x, "y": y, **by_run(labels, ("color", "strokeDash")), **aside}},
            {"mark": {"type": "rule", "opacity": 0.6}, "encoding": {
                "x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, **by_run(labels), **aside}},
            {"mark": "point", "encoding": {"x": x, "y": y, **by_run(labels, ("color", "shape")), **aside,
                                           "tooltip": told}}]
        panels.append(Panel(titles[key], {"data": {"values": data}, "params": params(labels), "transform": [shown()],
                                   "layer": layers}))
    rows: list[Row] = [(row["run"], titles[key], row["edits"], f"{row['mean']:.1f}",
                        f"{row['low']:.1f} to {row['high']:.1f}", row["n"])
                       for key, data in sorted(by_task.items()) for row in data]
    return Figure(
        "abilities", "General abilities",
        f"By lm-evaluation-harness ({'; '.join(protocols)}), percent with its 95% interval.",
        " ".join(f"{run}, {task} after {edits} edits: {mean}%." for run, task, edits, mean, _, _ in rows),
        tuple(panels), columns=("run", "task", "edits", "%", "95% interval", "questions"), rows=tuple(rows))
