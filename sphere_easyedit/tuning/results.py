"""Results of trials as text and tables."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..utils.files import atomic_write
from .trial import Limits, Scores

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

METRICS = ("efficacy", "generalization", "specificity", "perplexity")


@dataclass(frozen=True)
class Comparison:
    """The start (None if it failed) and the best trial on the same facts."""

    facts: str
    limits: Limits
    start: Scores | None
    best: Scores

    def lines(self) -> list[str]:
        """A table as text, a line each for the unedited model, the start and the best trial."""
        rows = (("unedited", self.limits.unedited), ("edited, start", self.start), ("edited, found", self.best))
        return [f"{self.facts + ':':<24}" + "".join(f"{name:>16}" for name in METRICS),
                *(f"{name:<24}" + ("failed" if scores is None else self._cells(scores)) for name, scores in rows)]

    def _cells(self, scores: Scores) -> str:
        shares = (scores.efficacy, scores.generalization, scores.specificity)
        cells = ["-" if share is None else f"{share:.1f}" for share in shares]
        return "".join(f"{cell:>16}" for cell in (
            *cells, f"{scores.perplexity:.2f} ({self.limits.rise(scores):+.1f}%)"))


def name_of(trial: FrozenTrial) -> str:
    """Short name of a trial."""
    return f"trial {trial.number}" + (" (start)" if trial.user_attrs.get("is_start") else "")


def scores_of(trial: FrozenTrial | None) -> Scores | None:
    """The scores stored with a trial, if it has any."""
    stored = None if trial is None else trial.user_attrs.get("scores")
    return None if stored is None else Scores(**stored)


def described(trial: FrozenTrial, limits: Limits) -> str:
    """A trial's outcome on one line."""
    scores = scores_of(trial)
    if scores is None:
        return f"failed: {trial.user_attrs.get('error')}"
    shares = ", ".join(f"{name} {share:.1f}" for name in METRICS[:-1]
                       if (share := getattr(scores, name)) is not None)
    return (f"{shares}, perplexity {limits.rise(scores):+.1f}%"
            + (", stopped at half" if trial.value is None else f", value {trial.value:.1f}"))


def write_trials(path: Path, trials: Sequence[FrozenTrial], limits: Limits) -> None:
    """Write a row for every trial: its scores (after half of its facts if it was stopped there) and parameters."""
    names = sorted({name for trial in trials for name in trial.params})
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["trial", "state", "value", *METRICS, "perplexity_rise", "seconds", *names, "error"])
        for trial in trials:
            scores = scores_of(trial)
            cells = [None] * 5 if scores is None else [*(getattr(scores, name) for name in METRICS),
                                                       limits.rise(scores)]
            writer.writerow([trial.number, trial.state.name.lower(), trial.value, *cells, trial.user_attrs["seconds"],
                             *(trial.params.get(name) for name in names), trial.user_attrs.get("error")])
