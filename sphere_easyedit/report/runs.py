"""The runs of a report, with the labels that its figures use."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..analysis.labels import LabelledRun, dataset_title, labelled_runs
from ..runs.records import PAPER, RunRecords
from ..runs.schema import CaseId, Estimate, When


@dataclass(frozen=True)
class ReportRun(LabelledRun):
    """A run with a label that is unique in the report, for legends and tables."""

    _scores: dict[tuple[When, int], Mapping[CaseId, Mapping[str, float]]] = field(
        default_factory=dict, init=False, repr=False, compare=False)  # as read so far

    def scores(self, when: When, num_edits: int) -> Mapping[CaseId, Mapping[str, float]]:
        """Scores of an evaluation by case, read once; empty if the run has none."""
        if (when, num_edits) not in self._scores:
            try:
                self._scores[when, num_edits] = self.run.scores(when, num_edits, self.protocol)
            except ValueError:
                self._scores[when, num_edits] = {}
        return self._scores[when, num_edits]

    @property
    def protocol(self) -> str:
        """The protocol of its main metrics: the first in its configuration."""
        protocols = self.run.config["run"].get("measure", {}).get("protocols") or [self.run.config["run"].get(
            "protocol", PAPER)]
        return str(protocols[0])

    @cached_property
    def edited_at(self) -> dict[CaseId, int]:
        """Number of edits in the model after a case's batch, by case."""
        return {case: batch.num_edits for batch in self.run.batches for case in batch.case_ids}


def named_runs(runs: Sequence[RunRecords]) -> list[ReportRun]:
    """Label the runs, in the study's order: by method, by data set and model if these differ, by seed if needed.

    Raises:
        ValueError: there are none, or one is given twice.
    """
    if not runs:
        raise ValueError("there are no runs to report on: give run directories")
    folders = Counter(run.directory.resolve() for run in runs)
    if twice := [str(folder) for folder, count in folders.items() if count > 1]:
        raise ValueError(f"{', '.join(twice)} is named more than once: name each run once")
    arms = labelled_runs(runs)
    labels = [arm.label for arm in arms]
    subjects: tuple[Callable[[LabelledRun], str], ...] = (
        lambda arm: dataset_title(arm.run.dataset), lambda arm: arm.run.model)
    for subject in subjects:  # even if methods differ: numbers of two models or data sets are not comparable
        if len({subject(arm) for arm in arms}) > 1:
            labels = [f"{label}, {subject(arm)}" for label, arm in zip(labels, arms, strict=True)]
    shared = Counter(labels)
    labels = [label if shared[label] == 1 else f"{label}, seed {arm.run.draw}"
              for label, arm in zip(labels, arms, strict=True)]
    if len(set(labels)) < len(labels):
        labels = [str(arm.run.directory) for arm in arms]
    return [ReportRun(label, arm.run) for label, arm in zip(labels, arms, strict=True)]


def interval_of(estimate: Estimate) -> tuple[float, float]:
    """The 95% interval of an estimate, or its mean twice if it has no finite one."""
    if estimate.ci95 is None or not all(map(math.isfinite, estimate.ci95)):
        return estimate.mean, estimate.mean
    low, high = estimate.ci95
    return low, high
