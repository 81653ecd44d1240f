"""What a run directory says, number by number, as a tidy table has it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from ..runs.directory import RunDirectory
from ..runs.records import RunRecords
from ..runs.schema import CONFIG, METRICS, SUMMARY, CaseId, Estimate, When
from ..runs.sweep.record import Run

PERPLEXITY: Final = "perplexity"
UPDATE_NORM: Final = "update_norm"
HE_CHANGE: Final = "he_change"
WATCHED: Final = ""  # in place of a protocol

Key = tuple[int, When, str, str]  # num_edits, when, protocol, metric


@dataclass(frozen=True)
class Measurement:
    """One number of a run.

    Attributes:
        num_edits: in the model when it was measured.
        when: ``before``, ``during``, ``last_batch`` or ``after``.
        protocol: by which it was computed; ``""`` for what is watched.
        metric: ``efficacy`` and so on, as in ``metrics.jsonl`` (percent); a general ability; or watched:
            ``perplexity``, ``update_norm`` (root of the sum of squares over layers), ``he_change`` (hyperspherical
            energy's relative change since the start, mean over layers).
        ci95: 95% interval; None where there is none.
        n: cases; None where none are counted.
    """

    num_edits: int
    when: When
    protocol: str
    metric: str
    mean: float
    ci95: tuple[float, float] | None = None
    n: int | None = None


@dataclass(frozen=True)
class MeasuredRun:
    """A run of a sweep with what its directory says, however far it got."""

    run: Run
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether it came to its end."""
        return RunDirectory(self.folder).has(SUMMARY)

    @cached_property
    def measurements(self) -> dict[Key, Measurement]:
        """By what they measure, in the files' order; raises ValueError where a file is damaged."""
        files = RunDirectory(self.folder)
        if not (files.has(CONFIG) and files.has(METRICS)):
            return {}
        found = (*_of_points(self._records), *_of_energy(self._records))
        return {(one.num_edits, one.when, one.protocol, one.metric): one for one in found}

    @cached_property
    def _records(self) -> RunRecords:
        return RunRecords.read(self.folder)

    def scores(self, key: Key) -> dict[CaseId, float]:
        """Scores by case behind a measurement; empty where none were kept."""
        num_edits, when, protocol, metric = key
        point = num_edits, when, protocol
        if point not in self._scores:
            kept = RunDirectory(self.folder).has(f"scores/{when}-{num_edits}.jsonl")
            self._scores[point] = self._records.scores(when, num_edits, protocol) if kept and protocol else {}
        return {case: scores[metric] for case, scores in self._scores[point].items() if metric in scores}

    @cached_property
    def _scores(self) -> dict[tuple[int, When, str], dict[CaseId, dict[str, float]]]:
        """Files that were read."""
        return {}


def _of_points(records: RunRecords) -> Iterator[Measurement]:
    for point in records.points:
        where = point.num_edits, point.when
        for metric, estimate in point.metrics.items():
            yield _measurement(*where, point.protocol, metric, estimate)
        if point.perplexity is not None:
            yield Measurement(*where, WATCHED, PERPLEXITY, point.perplexity)
        if point.update_norms:
            yield Measurement(*where, WATCHED, UPDATE_NORM, math.hypot(*point.update_norms.values()))
    for abilities in records.abilities:
        for task, estimate in abilities.abilities.items():
            yield _measurement(abilities.num_edits, abilities.when, abilities.protocol, task, estimate)


def _measurement(num_edits: int, when: When, protocol: str, metric: str, estimate: Estimate) -> Measurement:
    return Measurement(num_edits, when, protocol, metric, estimate.mean, estimate.ci95, estimate.n)


def _of_energy(records: RunRecords) -> Iterator[Measurement]:
    for record in records.energy:
        ended = records.summary is not None and record is records.energy[-1]
        when: When = "before" if record.num_edits == 0 else "after" if ended else "during"
        changes = record.relative_change.values()
        yield Measurement(record.num_edits, when, WATCHED, HE_CHANGE, math.fsum(changes) / len(changes))
