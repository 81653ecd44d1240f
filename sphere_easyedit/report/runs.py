"""The runs of a report, with the names that its figures give them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from ..analysis.labels import LabelledRun, dataset_title, labelled_runs
from ..runs.records import PAPER, RunRecords
from ..runs.schema import CaseId, When


@dataclass(frozen=True)
class ReportRun:
    """A run under a label that no other of the report has.

    Attributes:
        label: in legends and tables.
        run: its records.
    """

    label: str
    run: RunRecords
    _scores: dict[tuple[When, int], Mapping[CaseId, Mapping[str, float]]] = field(
        default_factory=dict, init=False, repr=False, compare=False)  # what was read

    def scores(self, when: When, num_edits: int) -> Mapping[CaseId, Mapping[str, float]]:
        """Scores of an evaluation by case, read once; none where the run's scores are not there."""
        if (when, num_edits) not in self._scores:
            try:
                self._scores[when, num_edits] = self.run.scores(when, num_edits, self.protocol)
            except ValueError:
                self._scores[when, num_edits] = {}
        return self._scores[when, num_edits]

    @property
    def protocol(self) -> str:
        """By which its main metrics were computed: the first that it names."""
        protocols = self.run.config["run"].get("measure", {}).get("protocols") or [self.run.config["run"].get(
            "protocol", PAPER)]
        return str(protocols[0])

    @cached_property
    def edited_at(self) -> dict[CaseId, int]:
        """Edits in the model once a case's batch had ended, by case."""
        return {case: batch.num_edits for batch in self.run.batches for case in batch.case_ids}


def named_runs(runs: Sequence[RunRecords]) -> list[ReportRun]:
    """Runs in the study's order, each with a name: its method, the data set and model where these differ, and the seed
    where it takes that to tell it from another.

    Raises:
        ValueError: there are none, or one comes twice.
    """
    if not runs:
        raise ValueError("there are no runs to report on: give run directories")
    places = Counter(run.directory.resolve() for run in runs)
    if twice := [str(place) for place, count in places.items() if count > 1]:
        raise ValueError(f"{', '.join(twice)} is named more than once: name each run once")
    arms = labelled_runs(runs)
    labels = [arm.label for arm in arms]
    subjects: tuple[Callable[[LabelledRun], str], ...] = (
        lambda arm: dataset_title(arm.run.dataset), lambda arm: arm.run.model)
    for subject in subjects:  # also where methods alone would do: numbers of two models or data sets don't compare
        if len({subject(arm) for arm in arms}) > 1:
            labels = [f"{label}, {subject(arm)}" for label, arm in zip(labels, arms, strict=True)]
    shared = Counter(labels)
    labels = [label if shared[label] == 1 else f"{label}, seed {arm.run.draw}"
              for label, arm in zip(labels, arms, strict=True)]
    if len(set(labels)) < len(labels):
        labels = [str(arm.run.directory) for arm in arms]
    return [ReportRun(label, arm.run) for label, arm in zip(labels, arms, strict=True)]
