"""Figure of general abilities by number of edits (the paper's Figures 6 and 10 to 12)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from .figure import Figure, Panel, TableRow, by_run, line_layers, params, quantitative, shown, tooltip
from .runs import ReportRun, interval_of


def abilities_figure(runs: Sequence[ReportRun]) -> Figure | None:
    """One panel per task; None if no run measured abilities."""
    labels = [run.label for run in runs]
    by_task: dict[tuple[str, str], list[dict[str, Any]]] = {}  # by task and protocol, which are not comparable
    protocols: dict[str, None] = {}
    for run in runs:
        for point in sorted(run.run.abilities, key=lambda point: point.num_edits):
            protocols[point.protocol] = None
            for task, found in point.abilities.items():
                if math.isfinite(found.mean):
                    low, high = interval_of(found)
                    by_task.setdefault((task, point.protocol), []).append(
                        {"run": run.label, "edits": point.num_edits, "mean": found.mean, "low": low, "high": high,
                         "n": found.n})
    if not by_task:
        return None
    titles = {(task, protocol): task if len(protocols) == 1 else f"{task} ({protocol})" for task, protocol in by_task}
    panels = []
    for key, data in sorted(by_task.items()):
        x, y = quantitative("edits", "edits"), quantitative("mean", "%")
        # Offset, since intervals at the same number of edits would overlap.
        offset = {"xOffset": {"field": "run", "type": "nominal", "scale": {"domain": labels, "range": [-6, 6]}}}
        tips = tooltip(("run", "run", None), ("edits", "edits", ",d"), ("mean", "%", ".1f"), ("low", "95% from", ".1f"),
                       ("high", "to", ".1f"), ("n", "questions", ",d"))
        layers = line_layers(labels, {"x": x, "y": y, **offset}, tips)
        layers.insert(1, {"mark": {"type": "rule", "opacity": 0.6}, "encoding": {
            "x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, **by_run(labels), **offset}})
        panels.append(Panel(titles[key], {"data": {"values": data}, "params": params(labels), "transform": [shown()],
                                   "layer": layers}))
    rows: list[TableRow] = [(row["run"], titles[key], row["edits"], f"{row['mean']:.1f}",
                        f"{row['low']:.1f} to {row['high']:.1f}", row["n"])
                       for key, data in sorted(by_task.items()) for row in data]
    return Figure(
        "abilities", "General abilities",
        f"By lm-evaluation-harness ({'; '.join(protocols)}), percent with its 95% interval.",
        " ".join(f"{run}, {task} after {edits} edits: {mean}%." for run, task, edits, mean, _, _ in rows),
        tuple(panels), columns=("run", "task", "edits", "%", "95% interval", "questions"), rows=tuple(rows))
