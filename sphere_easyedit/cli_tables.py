"""What the command line shows: tables and lines of results."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.filesize import decimal
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from .doctor import Report
    from .evaluation.case_study import CaseStudy
    from .planning import Plan

_METRICS = ("efficacy", "generalization", "specificity")
_STATUS_STYLES = {"ok": "green", "missing": "yellow", "broken": "red"}


def summary_table(summary: dict[str, Any], base_alg: str, alpha: float) -> Table:
    name = base_alg if alpha == 0 else f"{base_alg} + SPHERE (alpha {alpha:g})"
    table = Table(title=f"{summary['num_edits']} edits with {name}, protocol {summary['protocol']}")
    for column in ("metric (%)", "before", "after", "95% interval", "cases"):
        table.add_column(column, justify="left" if column == "metric (%)" else "right")
    for metric in _METRICS:
        now = summary["post"][metric]
        was = None if summary["pre"] is None else summary["pre"][metric]["mean"]
        if now["mean"] is not None:
            low, high = now["ci95"]
            table.add_row(metric, "" if was is None else f"{was:.1f}", f"{now['mean']:.1f}",
                          f"{low:.1f} - {high:.1f}", str(now["n"]))
    seconds = summary["editing_seconds"] / summary["num_edits"]
    table.caption = f"{seconds:.2f} s an edit, {summary['peak_memory_bytes'] / 1e9:.2f} GB at the peak"
    return table


def case_lines(study: CaseStudy) -> list[str]:
    """What is to be known before one reads what the models say."""
    true = "" if study.target_true is None else f", true answer: {study.target_true}"
    lines = [f"Case {study.case_id}, {study.subject}. Wanted answer: {study.target_new}{true}",
             f"Edit {study.number} of {study.total}; the edited model holds the first {study.num_edits}"
             + ("" if study.is_edited else ": the fact is not in these weights yet")]
    for when, title in (("pre", "before"), ("post", "after")):
        scores = None if study.scores is None else study.scores[when]
        if scores is not None:
            shown = ", ".join(f"{name} {100 * score:.1f}" for name, score in scores.items() if score is not None)
            lines.append(f"Scores {title} the run (%): {shown}")
    return lines


def case_table(study: CaseStudy) -> Table:
    table = Table(*(Column(title, overflow="fold", ratio=1)
                    for title in ("prompt", "unedited", "edited", "rolled back")), show_lines=True, expand=True)
    for one in study.continuations:
        said = (one.unedited, one.edited, one.rolled_back)
        table.add_row(Text.assemble((f"{one.kind}\n", "bold"), _visible(one.prompt)),
                      *(Text(_visible(text)) for text in said))
    return table


def doctor_table(report: Report) -> Table:
    table = Table("", "item", "status", Column("found", overflow="fold"))  # a long path is to be read whole
    section = ""
    for item in report.items:
        if item.section != section:
            table.add_section()
        status = Text(item.status, style=_STATUS_STYLES[item.status])
        table.add_row("" if item.section == section else item.section, Text(item.name), status, Text(item.detail))
        section = item.section
    return table


def plan_table(plan: Plan) -> Table:
    table = Table("", Column("item", overflow="fold"), Column("need", justify="right"), Column("", justify="right"),
                  Column("", overflow="fold"), title=f"{plan.num_edits} edits in batches of {plan.batch_size}, "
                                                     f"{plan.model} on {plan.device}")
    first = True

    def add(section: str, item: str, *cells: str) -> None:
        nonlocal first
        table.add_row(section if first else "", *(Text(cell) for cell in (item, *cells)))
        first = False

    for part in plan.time:
        add("Time", part.name, _duration(part.seconds), "" if part.share is None else f"{part.share:.0%}", "")
    add("Time", "all", _duration(plan.seconds), "", "")
    table.add_section()
    first = True
    for memory in plan.memory:
        add("Memory", memory.name, decimal(memory.bytes), memory.place,
            "; ".join(word for word in ("" if memory.lasting else "for a while", memory.note) if word))
    for place, size in plan.peak_bytes.items():
        add("Memory", "at the peak", decimal(size), place, "")
    table.add_section()
    first = True
    for files in plan.disk:
        add("Disk", files.name, decimal(files.bytes), "there" if files.present else "new", files.path)
    table.add_section()
    first = True
    for download in plan.downloads:
        add("Downloads", download.name, "?" if download.bytes is None else decimal(download.bytes), "", download.note)
    if not plan.downloads:
        add("Downloads", "nothing", "", "", "")
    return table


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _visible(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)[1:-1]  # on one line, whatever the model says


def escaped(text: str) -> str:
    return escape(_visible(text))
