"""Figure of efficacy by the age of an edit, which is the number of edits made after it."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from .figure import Figure, Panel, TableRow, line_layers, params, quantitative, shown, tooltip
from .runs import ReportRun

_BINS: Final = 12
_METRIC: Final = "efficacy"


def forgetting_figure(runs: Sequence[ReportRun]) -> Figure | None:
    """Efficacy by age over all evaluations, and at the last one by time of edit; None without scores."""
    by_age: list[dict[str, Any]] = []
    at_end: list[dict[str, Any]] = []
    right_after: list[dict[str, Any]] = []
    for run in runs:
        ages: list[tuple[int, float]] = []
        last: list[tuple[int, float]] = []
        for point in run.run.trajectory(run.protocol):
            last = _by_time_of_edit(run, point.when, point.num_edits)
            ages += [(point.num_edits - at, score) for at, score in last]
        by_age += _binned(run.label, "age", ages)
        at_end += _binned(run.label, "edited", last)
        right_after += [{"run": run.label, "edited": batch.num_edits, "mean": batch.efficacy, "n": len(batch.case_ids)}
                        for batch in run.run.batches if batch.efficacy is not None]
    labels = [run.label for run in runs]
    panels = [_panel(title, data, field, axis, labels) for title, data, field, axis in (
        ("By age, over all evaluations", by_age, "age", "edits since the fact's batch"),
        ("At the last evaluation, by when it was edited", at_end, "edited", "edits in the model after its batch"),
        ("Right after its batch", right_after, "edited", "edits")) if data]
    if not panels:
        return None
    rows: list[TableRow] = [(row["run"], f"{row['from']:,} to {row['to']:,}", f"{row['mean']:.1f}", row["n"])
                       for row in by_age]
    return Figure(
        "forgetting", "Forgetting",
        "Efficacy of facts (percent) by the number of edits after their batch. Evaluations during the "
        "run may use a seeded sample of the facts so far (--eval-sample); each point is a bin of facts, whose size is "
        "shown on hovering. Right after its batch: all facts of the batch.",
        " ".join(f"{label}, {span} edits later: {mean}% of {n}." for label, span, mean, n in rows), tuple(panels),
        columns=("run", "edits since", "efficacy, %", "facts seen"), rows=tuple(rows))


def _by_time_of_edit(run: ReportRun, when: Any, num_edits: int) -> list[tuple[int, float]]:
    """(edits in the model after its batch, efficacy in percent) of each case in an evaluation."""
    return [(run.edited_at[case], 100 * scores[_METRIC]) for case, scores in run.scores(when, num_edits).items()
            if _METRIC in scores and run.edited_at.get(case, num_edits + 1) <= num_edits]


def _binned(label: str, field: str, pairs: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
    """Mean scores of bins of similar size, in ascending order of x; ``pairs`` are (x, score)."""
    if not pairs:
        return []
    distinct = sorted({x for x, _ in pairs})
    edges = sorted({int(edge) for edge in np.quantile(distinct, np.linspace(0, 1, min(_BINS, len(distinct)) + 1)[1:-1]
                                                      )})
    bins: defaultdict[int, list[tuple[int, float]]] = defaultdict(list)
    for x, score in pairs:
        bins[bisect_right(edges, x)].append((x, score))
    rows = []
    for _, members in sorted(bins.items()):
        xs, scores = zip(*members, strict=True)
        rows.append({"run": label, field: float(np.mean(xs)), "from": min(xs), "to": max(xs),
                     "mean": float(np.mean(scores)), "n": len(members)})
    return rows


def _panel(title: str, data: list[dict[str, Any]], field: str, axis: str, labels: Sequence[str]) -> Panel:
    encoding = {"x": quantitative(field, axis), "y": quantitative("mean", "%", scale={"domain": [0, 100]})}
    tips = tooltip(("run", "run", None), (field, axis, ",.0f"), ("mean", "efficacy, %", ".1f"), ("n", "facts", ",d"))
    return Panel(title, {"data": {"values": data}, "params": params(labels), "transform": [shown()],
                         "layer": line_layers(labels, encoding, tips)})
