"""The result of a sequential run, as a table and a plot."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..callbacks.energy_plot import mean_change, plot_energy
from ..callbacks.he_tracker import HETracker
from ..utils.notebook import data_frame, html_table, legend_below, panels
from .records import RunRecords
from .schema import FACT_METRICS, METRIC_NAMES, Estimate, Measurement

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NOT_MEASURED: Final = "-"
# First and last columns of the frame.
_FIRST: Final = ("num_edits", "when", "protocol", "cases")
_LAST: Final = ("perplexity", "energy_change", "seconds")


@dataclass(frozen=True)
class RunResult:
    """Result of a run. A notebook shows it as tables.

    Attributes:
        summary: content of ``summary.json``.
        tracker: hyperspherical energy before the first batch and after each.
        generations: continuations of the first facts' prompts: prompt, before editing, after editing.
        run: all records of the run directory.
    """

    summary: dict[str, Any]
    tracker: HETracker
    generations: list[tuple[str, str, str]]
    run: RunRecords = field(repr=False)

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self.run.directory

    def frame(self) -> pandas.DataFrame:
        """The run's measurements as a pandas frame, one row per evaluation and protocol.

        Columns: ``num_edits``, ``when`` (see ``runs.schedule``), ``protocol``, ``cases``; each measured metric in
        percent as ``efficacy``, with its 95% interval as ``efficacy_low`` and ``efficacy_high``; ``perplexity`` if
        measured; general abilities by task; ``energy_change``, the relative change of hyperspherical energy since the
        unedited model, mean over layers; ``seconds``, wall time.

        Raises:
            ImportError: pandas is not installed.
        """
        rows = [dict(self._cells(one)) for one in self.run.measurements]
        found = dict.fromkeys([*_FIRST, *(name for row in rows for name in row)])
        names = [*(name for name in found if name not in _LAST), *(name for name in _LAST if name in found)]
        return data_frame(names, [[row.get(name) for name in names] for row in rows])

    def plot(self) -> Figure:
        """Plot metrics, hyperspherical energy, and perplexity if measured, over the number of edits.

        Metrics are those of the first protocol, before, during and after editing, with 95% intervals. The dotted line
        is the efficacy of each batch right after its edit. A notebook shows the figure.

        Raises:
            ImportError: matplotlib is not installed.
        """
        points = self._points()
        perplexity = {point.num_edits: point.perplexity for point in points if point.perplexity is not None}
        figure, axes = panels(3 if perplexity else 2)
        self._plot_metrics(axes[0], points)
        plot_energy(axes[1], self.tracker.records)
        if perplexity:
            axes[2].plot(list(perplexity), list(perplexity.values()), marker="o", color="black")
            axes[2].set_title("Perplexity of held-out text")
        figure.suptitle(f"{self.run.model}, {self.run.method}")
        return figure

    def _points(self) -> list[Measurement]:
        protocol = str(self.summary["protocol"])
        before = self.run.before(protocol)
        return [*([] if before is None else [before]), *self.run.trajectory(protocol)]

    def _plot_metrics(self, axes: Axes, points: list[Measurement]) -> None:
        for index, name in enumerate(FACT_METRICS):
            found = [(point.num_edits, point.metrics[name]) for point in points if name in point.metrics]
            if not found:
                continue
            edits = [num_edits for num_edits, _ in found]
            axes.plot(edits, [one.mean for _, one in found], marker="o", color=f"C{index}", label=name)
            low, high = zip(*(_interval(one) for _, one in found), strict=True)
            axes.fill_between(edits, low, high, color=f"C{index}", alpha=0.15, linewidth=0)
        batches = [(batch.num_edits, batch.efficacy) for batch in self.run.batches if batch.efficacy is not None]
        if batches:
            axes.plot(*zip(*batches, strict=True), linestyle=":", marker=".", color="C0",
                      label="efficacy, batch just edited")
        axes.set(title=f"Metrics, protocol {self.summary['protocol']}", ylabel="%", ylim=(-3, 103))
        legend_below(axes)

    def _cells(self, one: Measurement) -> Iterator[tuple[str, object]]:
        """One row of ``frame`` by column."""
        yield from (("num_edits", one.num_edits), ("when", one.when), ("protocol", one.protocol), ("cases", one.cases))
        for name, estimate in one.metrics.items():
            low, high = _interval(estimate)
            yield from ((name, estimate.mean), (f"{name}_low", low), (f"{name}_high", high))
        for task, ability in one.abilities.items():
            yield task, ability.mean
        if one.perplexity is not None:
            yield "perplexity", one.perplexity
        energy = {record.num_edits: record for record in self.run.energy}.get(one.num_edits)
        yield "energy_change", None if energy is None else mean_change(energy)
        yield "seconds", one.seconds

    def _repr_html_(self) -> str:
        """Metrics before and after, and the examples' continuations, as notebooks show them."""
        summary = self.summary
        seconds = summary["editing_seconds"] / summary["num_edits"]
        skipped = f", {len(summary['skipped'])} facts left out" if summary.get("skipped") else ""
        stopped = f", stopped: {summary['stopped']}" if summary.get("stopped") else ""
        tables = [html_table(
            f"{summary['num_edits']} edits with {self.run.method}{skipped}{stopped}, {seconds:.2f} s an edit, protocol "
            f"{summary['protocol']}", ("metric", "before", "after", "95% interval", "cases"), self._metric_rows())]
        if self.generations:
            tables.append(html_table("Greedy continuations of prompts", ("prompt", "before", "after"),
                                     self.generations, text_columns=3))
        return "".join(tables)

    def _metric_rows(self) -> Iterator[tuple[str, ...]]:
        before, after = (self.summary[name] or {} for name in ("pre", "post"))
        for name in METRIC_NAMES:
            was, now = before.get(name) or {}, after.get(name) or {}
            if was.get("n") or now.get("n"):
                yield (name, _number(was.get("mean")), _number(now.get("mean")),
                       " to ".join(map(_number, now.get("ci95") or ())) or _NOT_MEASURED, str(now.get("n") or was["n"]))
        watched = [(self.summary["watched"].get(name) or {}).get("perplexity") for name in ("pre", "post")]
        if watched != [None, None]:
            yield "perplexity", *map(_number, watched), _NOT_MEASURED, _NOT_MEASURED
        if self.tracker.records:
            change = mean_change(self.tracker.records[-1])
            yield ("hyperspherical energy", _NOT_MEASURED, _NOT_MEASURED if change is None else f"{change:+.2e}",
                   _NOT_MEASURED, _NOT_MEASURED)


def _interval(estimate: Estimate) -> tuple[float, float]:
    return (math.nan, math.nan) if estimate.ci95 is None else estimate.ci95


def _number(value: float | None) -> str:
    return _NOT_MEASURED if value is None else f"{value:.1f}"
