"""Searchable tables of the runs' facts: prompt, state before and after editing, generated texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final

from ..runs.directory import RunDirectory
from ..runs.schema import CASES, CaseId, CaseRecord
from .runs import ReportRun

LOST, MISSED, HELD, KNOWN, UNSEEN = "lost since", "not learned", "held", "known before", "not measured"
STATES: Final = (LOST, MISSED, HELD, KNOWN, UNSEEN)
COLUMNS: Final = ("case", "prompt", "new target", "true target", "state", "before", "at the end",
                  "last correct at", "text before", "text at the end")  # of a case table
_METRIC: Final = "efficacy"
MAX_CHARACTERS: Final = 1_200_000  # of the facts of all runs on a page


@dataclass(frozen=True)
class CaseTable:
    """A run's facts, those lost since their edit first.

    Attributes:
        label: of the run.
        rows: (case, prompt, new target, true target, state, before, after, last evaluation with a correct answer or
            None, generation before, generation after); before and after: whether the model gave the new target; texts
            are None if none were generated.
        left_out: number of facts left out to limit the size.
    """

    label: str
    rows: tuple[tuple[Any, ...], ...]
    left_out: int


def case_table(run: ReportRun, max_characters: int = MAX_CHARACTERS) -> CaseTable | None:
    """A finished run's facts, from ``cases.jsonl`` and the scores of evaluations during the run; None before its end.

    Args:
        max_characters: maximum size of the rows as JSON; further rows are left out.
    """
    files = RunDirectory(run.run.directory)
    if not files.has(CASES):
        return None
    last_correct = _last_correct(run)
    rows = []
    for one in files.records(CASES, CaseRecord):
        before, after = _correct(one.pre), _correct(one.post)
        last = last_correct.get(one.case_id) if one.case_id is not None else None
        generations = one.generations or {}
        rows.append((one.case_id, one.prompt, one.target_new, one.target_true, _state(before, after, last), before,
                     after, last, generations.get("before"), generations.get("after")))
    rows.sort(key=lambda row: STATES.index(row[4]))
    sizes = accumulate(len(json.dumps(row, ensure_ascii=False)) for row in rows)
    kept = sum(size <= max_characters for size in sizes)
    return CaseTable(run.label, tuple(rows[:kept]), len(rows) - kept)


def _last_correct(run: ReportRun) -> dict[CaseId, int]:
    """The last evaluation during the run (number of edits) in which a case was correct, by case."""
    found: dict[CaseId, int] = {}
    for point in run.run.points:
        if point.when in ("during", "last_batch") and point.protocol == run.protocol:
            for case, scores in run.scores(point.when, point.num_edits).items():
                if scores.get(_METRIC, 0.0) >= 1.0:
                    found[case] = max(found.get(case, 0), point.num_edits)
    return found


def _correct(scores: Mapping[str, float | None] | None) -> bool | None:
    value = None if scores is None else scores.get(_METRIC)
    return None if value is None else value >= 1.0


def _state(before: bool | None, after: bool | None, last: int | None) -> str:
    if after:
        return KNOWN if before else HELD
    if after is None:
        return UNSEEN
    return LOST if last is not None else MISSED


def tables_of(runs: Sequence[ReportRun]) -> list[CaseTable]:
    """Tables of the runs that have one, with equal shares of ``MAX_CHARACTERS``."""
    tables = (case_table(run, MAX_CHARACTERS // len(runs)) for run in runs)
    return [table for table in tables if table is not None]
