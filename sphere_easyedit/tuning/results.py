"""The files of a search: the hyperparameters found, as YAML with how well they do, and a table of all trials."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..hparams_files import render_hparams
from ..utils.files import atomic_write
from .trial import Limits, Scores

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

METRICS = ("efficacy", "generalization", "specificity", "perplexity")


@dataclass(frozen=True)
class Comparison:
    """The start and the best trial on the same facts; a missing side was not measured."""

    facts: str
    limits: Limits
    start: Scores | None
    best: Scores | None

    def lines(self) -> list[str]:
        """A table as text, a line for the unedited model, the start and the best trial each."""
        head = f"{self.facts + ':':<26}" + "".join(f"{name:>16}" for name in METRICS)
        rows = (("unedited", self.limits.unedited), ("edited, start", self.start), ("edited, found", self.best))
        return [head, *(f"{name:<26}" + ("not measured" if scores is None else _cells(scores, self.limits))
                        for name, scores in rows)]


def _cells(scores: Scores, limits: Limits) -> str:
    percent = "".join(f"{'-' if value is None else f'{value:.1f}':>16}"
                      for value in (scores.efficacy, scores.generalization, scores.specificity))
    return percent + f"{f'{scores.perplexity:.2f} ({limits.rise(scores):+.1f}%)':>16}"


def write_yaml(path: Path, mapping: Mapping[str, Any], header: Sequence[str]) -> None:
    """Write hyperparameters that ``edit --hparams`` reads, with comment lines on top."""
    with atomic_write(path) as temporary:
        temporary.write_text(render_hparams(mapping, "\n".join(header)), encoding="utf-8")


def write_trials(path: Path, trials: Sequence[FrozenTrial], limits: Limits) -> None:
    """Write a row for every trial: its scores (of half its facts if it was stopped there) and its parameters."""
    names = sorted({name for trial in trials for name in trial.params})
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["trial", "state", "value", *METRICS, "perplexity_rise", "seconds", *names, "error"])
        for trial in trials:
            scores = scores_of(trial)
            value = trial.value if trial.value is not None else next(iter(trial.intermediate_values.values()), None)
            cells = [None] * len(METRICS) if scores is None else [getattr(scores, name) for name in METRICS]
            writer.writerow([
                trial.number, trial.state.name.lower(), value, *cells, None if scores is None else limits.rise(scores),
                trial.user_attrs.get("seconds"), *(trial.params.get(name) for name in names),
                trial.user_attrs.get("error")])


def scores_of(trial: FrozenTrial) -> Scores | None:
    """The scores stored with a trial, if it has any."""
    stored = trial.user_attrs.get("scores")
    return None if stored is None else Scores(**stored)
