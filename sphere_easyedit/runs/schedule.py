"""What a sequential run measures, after which batches and on which facts, and when it saves checkpoints.

=============  =======================================================  ============================================
when           facts                                                    shows
=============  =======================================================  ============================================
``before``     all facts (or a seeded sample), in the unedited model    the baseline
``during``     all facts edited so far, or a seeded sample of them      forgetting
``last_batch`` the facts of the batch just edited                       what EasyEdit reports
``after``      the same facts as before, after the last edit            the final result
=============  =======================================================  ============================================

The schedule depends on the settings and the number of facts alone, so a resumed run keeps it. It counts facts that were
tried, whether they were edited or skipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.loaders import Protocol
from ..evaluation.protocols import needing_unedited
from ..evaluation.text_quality import Decoding
from .schema import When


@dataclass(frozen=True)
class AbilitySettings:
    """General abilities: which lm-eval tasks, and how (see ``abilities.general_abilities``).

    Attributes:
        tasks: names; empty: no abilities are measured.
        every: also measure at this interval, in edits; None: only before and after.
        data: folder with the files of the four built-in tasks.
        num_fewshot, limit, batch_size: see ``general_abilities``.
    """

    tasks: tuple[str, ...] = ()
    every: int | None = None
    data: Path | None = None
    num_fewshot: int = 0
    limit: int | None = None
    batch_size: int = 32

    def options(self) -> dict[str, Any]:
        """Keyword arguments of ``general_abilities``."""
        return {"data": self.data, "num_fewshot": self.num_fewshot, "limit": self.limit,
                "batch_size": self.batch_size}


@dataclass(frozen=True)
class MeasureSettings:
    """What is measured, and when.

    Attributes:
        protocols: protocols of the metrics; the first is the summary's.
        before, after: measure all facts in the unedited model, and after the last edit.
        cases: maximum number of facts measured then, drawn with ``seed``; None: all.
        every: measure the facts edited so far at this interval, in edits; None: never.
        sample: maximum number of facts measured then, drawn with ``seed``; None: all.
        last_batch: measure each batch's facts right after it.
        text: held-out text for perplexity, .txt or .jsonl; None: no perplexity.
        text_tokens: number of tokens from the beginning of the text; None: all.
        decoding: how text is generated for fluency and consistency; None: neither is measured.
        references: reference texts for consistency (see ``references.load_references``); None: no consistency.
        abilities: general abilities.
        seed: of the samples and of the bootstrap.
        shared_before: folder in which runs of the same unedited model and facts share their ``before`` scores.
    """

    protocols: tuple[Protocol, ...] = ("paper",)
    before: bool = True
    after: bool = True
    cases: int | None = None
    every: int | None = None
    sample: int | None = None
    last_batch: bool = False
    text: Path | None = None
    text_tokens: int | None = None
    decoding: Decoding | None = None
    references: Path | None = None
    abilities: AbilitySettings = field(default_factory=AbilitySettings)
    seed: int = 0
    shared_before: Path | None = None

    def __post_init__(self) -> None:
        for name, value in (("cases", self.cases), ("every", self.every), ("sample", self.sample),
                            ("text_tokens", self.text_tokens), ("abilities.every", self.abilities.every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more, or leave it out")
        if not self.protocols or len(set(self.protocols)) < len(self.protocols):
            raise ValueError(f"protocols are {list(self.protocols)}: name at least one, and none twice")
        if self.references is not None and self.decoding is None:
            raise ValueError(f"references {self.references} are given, but no text is to be generated: give decoding")
        comparing = needing_unedited(self.protocols)
        if comparing and not self.before:
            raise ValueError(f"protocol {comparing[0]!r} compares with the unedited model's predictions: measure "
                             "before editing")
        if comparing and self.cases is not None and (self.every or self.last_batch):
            raise ValueError(f"cases is {self.cases}, but protocol {comparing[0]!r} compares every fact measured "
                             "during editing with the unedited model's prediction: leave it out")

    def to_dict(self) -> dict[str, Any]:
        """Settings that affect the numbers, as plain values for ``config.yaml``."""
        return {
            "protocols": list(self.protocols), "before": self.before, "after": self.after, "cases": self.cases,
            "every": self.every, "sample": self.sample, "last_batch": self.last_batch, "seed": self.seed,
            "text": None if self.text is None else str(self.text), "text_tokens": self.text_tokens,
            "decoding": None if self.decoding is None else self.decoding.described(),
            "references": None if self.references is None else str(self.references),
            "abilities": {"tasks": list(self.abilities.tasks), "every": self.abilities.every,
                          "num_fewshot": self.abilities.num_fewshot, "limit": self.abilities.limit},
        }


@dataclass(frozen=True)
class DueMeasurement:
    """A measurement to make.

    Attributes:
        when: before, during or after editing, or of the last batch.
        num_edits: edits in the model then.
        cases: indices of the measured facts among the run's records.
    """

    when: When
    num_edits: int
    cases: tuple[int, ...]


def due_measurements(num_edits: int, batch: int, total: int, settings: MeasureSettings) -> list[DueMeasurement]:
    """Measurements due after a batch of ``batch`` facts that brought the model to ``num_edits`` of ``total``."""
    if num_edits == 0:
        return [measurement_at(0, total, settings)] if settings.before else []
    due = []
    if settings.last_batch:
        due.append(DueMeasurement("last_batch", num_edits, tuple(range(num_edits - batch, num_edits))))
    if settings.after if num_edits == total else interval_ended(num_edits, batch, settings.every):
        due.append(measurement_at(num_edits, total, settings))
    return due


def measurement_at(num_edits: int, total: int, settings: MeasureSettings) -> DueMeasurement:
    """The measurement after ``num_edits``: of all facts before and after editing, else of those edited so far."""
    when = phase_at(num_edits, total)
    population, size = (num_edits, settings.sample) if when == "during" else (total, settings.cases)
    if size is None or size >= population:
        return DueMeasurement(when, num_edits, tuple(range(population)))
    drawn = np.random.default_rng([settings.seed, population]).choice(population, size, replace=False)
    return DueMeasurement(when, num_edits, tuple(np.sort(drawn).tolist()))


def abilities_due(num_edits: int, batch: int, total: int, settings: AbilitySettings) -> bool:
    """Whether general abilities are measured after a batch that brought the model to ``num_edits`` of ``total``."""
    return bool(settings.tasks) and (num_edits in (0, total) or interval_ended(num_edits, batch, settings.every))


def interval_ended(num_edits: int, batch: int, every: int | None) -> bool:
    """Whether a batch that ends at ``num_edits`` reached or passed a multiple of ``every``; False for None."""
    return every is not None and num_edits // every > (num_edits - batch) // every


def phase_at(num_edits: int, total: int) -> When:
    """``before``, ``during`` or ``after``, for a model with ``num_edits`` of ``total`` edits."""
    return "before" if num_edits == 0 else "after" if num_edits == total else "during"


def checkpoint_ends(batch_ends: Sequence[int], every: int) -> set[int]:
    """Batch ends after which a checkpoint is saved: at least ``every`` facts apart, and after the last batch.

    Saving one affects the bits of later edits (``EditSession.drop_derived``), so it must not depend on how often a
    run was resumed.
    """
    saved = [0]
    for end in batch_ends:
        if end - saved[-1] >= every:
            saved.append(end)
    return {*saved[1:], batch_ends[-1]}
