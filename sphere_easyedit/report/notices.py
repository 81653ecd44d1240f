"""Warnings at the top of a report: collapse, drift, values that are not finite, unfinished runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Final

from ..analysis.collapse import collapse_of
from ..analysis.correlations import mean_magnitude
from .runs import ReportRun

_EARLY: Final = 3  # number of first batches that define a run's usual rate of drift
_FASTER: Final = 5.0  # multiple of that rate

Level = str  # "bad", "warning" or "note"


@dataclass(frozen=True)
class Notice:
    """One warning: its level (``bad``, ``warning`` or ``note``), the run's label, and the text."""

    level: Level
    label: str
    text: str


def notices_of(runs: Sequence[ReportRun]) -> list[Notice]:
    """Warnings about all runs, the most severe first."""
    checks = (_collapse, _not_finite, _drift, _left_out, _unfinished)
    found = [notice for run in runs for check in checks for notice in check(run)]
    found += _other_protocol(runs)
    return sorted(found, key=lambda notice: ("bad", "warning", "note").index(notice.level))


def _collapse(run: ReportRun) -> list[Notice]:
    found = collapse_of(run.run, run.protocol)
    if found is None:
        return []
    why = {"efficacy": "efficacy on the facts so far fell below half of its best",
           "perplexity": "perplexity passed ten times the unedited model's"}
    return [Notice("bad", run.label, f"collapsed by {found.num_edits:,} edits: "
                                     f"{' and '.join(why[reason] for reason in found.reasons)}.")]


def _not_finite(run: ReportRun) -> list[Notice]:
    notices = []
    losses = sum(not math.isfinite(loss) for batch in run.run.batches for loss in batch.losses)
    if losses:
        notices.append(Notice("bad", run.label, f"{losses} target values ended in a loss that is not finite."))
    broken = [point.num_edits for point in run.run.points
              if point.perplexity is not None and not math.isfinite(point.perplexity)]
    if broken:
        notices.append(Notice("bad", run.label, f"perplexity is not finite {_at(broken)}; figures leave such values "
                                                "out."))
    energies = [record.num_edits for record in run.run.energy
                if not all(map(math.isfinite, record.relative_change.values()))]
    if energies:
        notices.append(Notice("bad", run.label, f"hyperspherical energy is not finite {_at(energies)}; figures leave "
                                                "such values out."))
    return notices


def _at(points: Sequence[int]) -> str:
    """The points at which something was seen, which need not hold later."""
    count = len(set(points))
    return f"at {min(points):,} edits" if count == 1 else f"at {count} points, the first at {min(points):,} edits"


def _other_protocol(runs: Sequence[ReportRun]) -> list[Notice]:
    """Runs whose protocol differs from the first run's."""
    return [Notice("warning", run.label, f"its metrics are by protocol {run.protocol}, those of {runs[0].label} by "
                                         f"{runs[0].protocol}: they are not comparable.")
            for run in runs if run.protocol != runs[0].protocol]


def _drift(run: ReportRun) -> list[Notice]:
    """Energy that changes several times faster per edit than in the run's first batches."""
    records = [record for record in run.run.energy if all(map(math.isfinite, record.relative_change.values()))]
    rates = []
    for earlier, later in pairwise(records):
        step = {layer: later.relative_change[layer] - change for layer, change in earlier.relative_change.items()
                if layer in later.relative_change}  # a record may be incomplete while the run writes it
        edits = later.num_edits - earlier.num_edits
        if step and edits > 0:
            rates.append((later.num_edits, mean_magnitude(step) / edits))
    if len(rates) <= _EARLY:
        return []
    usual = median(rate for _, rate in rates[:_EARLY])
    later_ones = rates[_EARLY:]
    faster = [edits for edits, rate in later_ones if rate > _FASTER * usual]
    if not faster or usual == 0:
        return []
    return [Notice("warning", run.label, f"hyperspherical energy changed more than {_FASTER:g} times as fast as in the "
                                         f"first {_EARLY} batches in {len(faster)} of the {len(later_ones)} later "
                                         f"ones, first in the one that ended at {faster[0]:,} edits.")]


def _left_out(run: ReportRun) -> list[Notice]:
    summary = run.run.summary
    if summary is None:
        return []
    skipped, stopped = summary.skipped, summary.stopped
    notices = []
    if skipped:
        notices.append(Notice("note", run.label, f"left out {len(skipped)} facts that can't be edited, the first "
                                                 f"case_id {skipped[0].case_id} ({skipped[0].error})."))
    if summary.repaired is not None:
        lost = len(summary.unrepaired)
        notices.append(Notice("note", run.label, f"edited {summary.repaired:,} facts again that later edits had "
                                                 f"overwritten; {lost:,} are still not predicted"
                                                 + (f", the first case_id {summary.unrepaired[0]}." if lost else ".")))
    if stopped:
        notices.append(Notice("warning", run.label, f"was stopped after {summary.num_edits:,} of "
                                                    f"{summary.num_facts:,} facts: {stopped}"))
    return notices


def _unfinished(run: ReportRun) -> list[Notice]:
    if run.run.summary is not None:
        return []
    done = run.run.batches[-1].num_edits if run.run.batches else 0
    total = run.run.config["run"].get("num_edits")
    return [Notice("note", run.label, f"has not ended: {done:,} of {total:,} edits so far." if isinstance(total, int)
                   else f"has not ended: {done:,} edits so far.")]
