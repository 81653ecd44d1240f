"""Renders the report as one self-contained HTML file with data, style and drawing library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources
from typing import Any, Final

import yaml

from ..analysis.labels import dataset_title
from ..runs.schema import METRIC_NAMES, Estimate, Measurement
from .cases import COLUMNS, STATES, CaseTable
from .curves import PERCENT
from .figure import SERIES, Figure, TableRow, dashes, on_page
from .notices import Notice
from .runs import ReportRun

_ASSETS: Final = "assets"
_RESULTS: Final = ("run", "edits", *(f"{name}, %" if name in PERCENT else name for name in METRIC_NAMES), "perplexity",
                   "s an edit")


def filled(columns: Sequence[str], rows: Sequence[TableRow]) -> list[int]:
    """Indices of the columns in which a row has a value; all columns if there are no rows."""
    return [index for index in range(len(columns))
            if not rows or any(row[index] is not None and row[index] != "" for row in rows)]


@dataclass(frozen=True)
class HtmlTable:
    """Columns and rows of a table on the page."""

    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]

    @classmethod
    def of(cls, columns: Sequence[str], rows: Sequence[TableRow]) -> HtmlTable:
        """A table without the columns that no row has a value in."""
        kept = filled(columns, rows)
        return cls(tuple(columns[index] for index in kept),
                   tuple(tuple(row[index] for index in kept) for row in rows))


@dataclass(frozen=True)
class Page:
    """The report's page.

    Attributes:
        title: the document's title.
        runs, notices, figures, cases: its parts.
        notes: why figures are missing, and which option adds them.
        refresh: seconds between reloads while a run is in progress; None for a finished one.
    """

    title: str
    runs: Sequence[ReportRun]
    notices: Sequence[Notice]
    figures: Sequence[Figure]
    cases: Sequence[CaseTable]
    notes: Sequence[str] = ()
    refresh: int | None = None

    def html(self) -> str:
        """The file's content."""
        environment = _environment()
        columns = filled(COLUMNS, [row for table in self.cases for row in table.rows])
        data = {"figures": {figure.name: {
                    "panels": [{"spec": on_page(panel), "log": dict(panel.log), "canvas": panel.canvas}
                               for panel in figure.panels]} for figure in self.figures},
                "cases": [asdict(table) for table in self.cases], "columns": columns}
        unedited = _unedited(self.runs)
        return str(environment.get_template("report.html.j2").render(
            page=self, data=_json(data), colours=SERIES, dashes=dashes(len(self.runs)), states=STATES,
            subjects=_subjects(self.runs), unedited=bool(unedited),
            case_columns=[COLUMNS[index] for index in columns],
            results=HtmlTable.of(_RESULTS, [*unedited, *(_summary(run) for run in self.runs)]),
            tables={figure.name: HtmlTable.of(figure.columns, figure.rows) for figure in self.figures},
            details=[_details(run) for run in self.runs], css=_asset("report.css"), js=_asset("report.js"),
            library=_library()))


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed in one script; cached, since bundling them takes seconds."""
    import vl_convert

    # A closing tag inside the script would end it; in JavaScript strings the slash may be escaped.
    bundle = str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # its stub knows no default
    return bundle.replace("</script", "<\\/script")


def _environment() -> Any:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    return Environment(loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                       lstrip_blocks=True)


def _asset(name: str) -> str:
    return (resources.files(__package__) / _ASSETS / name).read_text(encoding="utf-8")


def _json(data: Mapping[str, Any]) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _summary(run: ReportRun) -> TableRow:
    """A run's row in the table of results: its last measurement."""
    before, points = run.run.before(run.protocol), run.run.trajectory(run.protocol)
    last = points[-1] if points else before
    batches = run.run.batches
    edits = batches[-1].num_edits if batches else 0
    measured_at = "" if last is None or last.num_edits == edits else f" (measured at {last.num_edits})"
    seconds = None if run.run.summary is None else run.run.summary.editing_seconds
    if seconds is None and batches:
        seconds = sum(sum(batch.seconds.values()) for batch in batches)
    return (run.label, f"{edits}{measured_at}", *_measured(last),
            f"{seconds / edits:.2f}" if seconds and edits else "")


def _subjects(runs: Sequence[ReportRun]) -> str:
    """The models and data sets of the runs."""
    return "; ".join(dict.fromkeys(_subject(run) for run in runs))


def _subject(run: ReportRun) -> str:
    return f"{run.run.model}, {dataset_title(run.run.dataset)}"


def _unedited(runs: Sequence[ReportRun]) -> list[TableRow]:
    """Rows of the unedited models: one per model, data set and protocol, on the facts of the first run that has it."""
    found: dict[tuple[str, str], ReportRun] = {}
    for run in runs:
        if run.run.before(run.protocol) is not None:
            found.setdefault((_subject(run), run.protocol), run)
    rows: list[TableRow] = []
    for (subject, _), run in found.items():
        point = run.run.before(run.protocol)
        if point is not None and (point.metrics or point.perplexity is not None):
            label = "unedited" if len(found) == 1 else f"unedited: {subject}, as for {run.label}"
            rows.append((label, "0", *_measured(point), ""))
    return rows


def _measured(point: Measurement | None) -> list[str]:
    """Cells of an evaluation: metrics and perplexity."""
    if point is None:
        return [""] * (len(METRIC_NAMES) + 1)
    perplexity = "" if point.perplexity is None else f"{point.perplexity:.4g}"
    return [*(_estimate(point.metrics.get(name)) for name in METRIC_NAMES), perplexity]


def _estimate(found: Estimate | None) -> str:
    if found is None:
        return ""
    interval = "" if found.ci95 is None else f" ({found.ci95[0]:.1f} to {found.ci95[1]:.1f})"
    return f"{found.mean:.1f}{interval}"


def _details(run: ReportRun) -> dict[str, Any]:
    """A run's configuration, times and memory."""
    summary, config = run.run.summary, run.run.config
    parts: dict[str, float] = {}
    for batch in run.run.batches:
        for part, seconds in batch.seconds.items():
            parts[part] = parts.get(part, 0.0) + seconds
    costs = [(f"{part.replace('_', ' ')} of batches", f"{seconds:,.1f} s") for part, seconds in parts.items()]
    if summary is not None:
        costs += [(name, f"{seconds:,.1f} s") for name, seconds in (
            ("preparation", summary.preparation_seconds), ("editing", summary.editing_seconds),
            ("evaluation", summary.evaluation_seconds)) if seconds is not None]
        if summary.peak_memory_bytes is not None:
            costs.append(("memory at the peak", f"{summary.peak_memory_bytes / 1e9:.2f} GB"))
    return {"costs": costs, "directory": str(run.run.directory),
            "config": yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)}
