"""A callback that watches the signs of a coming collapse, and warns, lowers the batch or ends the run."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..datasets.records import SLOT, EditRecord
from ..editing.callbacks import EditCallback, EditEvent, StopEditing
from ..utils.files import atomic_write

logger = logging.getLogger(__name__)

Action = Literal["warn", "lower", "stop"]
_LEAST = 0.125  # of a batch's change: three halvings
# Percent of facts that a model says, each with its prompt (``{}`` for the subject), subject and target_new.
EfficacyOf = Callable[[nn.Module, Sequence[Mapping[str, str]]], float]


@dataclass(frozen=True)
class GuardRecord:
    """What the guard saw of one batch.

    Attributes:
        num_edits: edits in the model after it.
        energy_step: relative change of hyperspherical energy (Eq. 5) by the batch, in magnitude, mean over layers.
        update_norm: Frobenius norm of the batch's change, mean over layers.
        early_efficacy: percent of the early facts that the model says; None before the last batch of the warm-up, and
            where they are not watched.
        strength: share of the batch's change that stands.
        signs: what was past its threshold with that: ``energy``, ``norm``, ``early``.
    """

    num_edits: int
    energy_step: float
    update_norm: float
    early_efficacy: float | None
    strength: float = 1.0
    signs: tuple[str, ...] = ()


@dataclass
class _State:
    """All that outlives a batch, as it is filed."""

    facts: list[dict[str, str]] = field(default_factory=list)
    records: list[GuardRecord] = field(default_factory=list)


class DriftGuard(EditCallback):
    """Watches three signs that a model drifts out of shape, and acts where one passes its threshold.

    The first ``warmup`` batches set the measure: medians of the energy's step and of the update's norm, and the
    efficacy, right after them, of a fixed sample of their facts. Later batches are compared with that. The default
    thresholds are those that told best on the runs of docs/RELIABILITY.md.

    Args:
        action: ``warn`` logs; ``lower`` halves the batch's change until no sign is past its threshold, and stops where
            an eighth of it is still too much; ``stop`` undoes the batch and ends the run (``StopEditing``).
        tok: tokenizer of the model, for the early facts' efficacy; without one that sign is not watched.
        energy: times the usual step of hyperspherical energy that are too many; None does not watch it.
        norm: times the usual norm of a batch's change that are too many; None does not watch it.
        early: share of the early facts' first efficacy that is too little; None does not watch it.
        warmup: batches that set the measure.
        facts: size of the sample of early facts.
        seed: of that sample.
        path: JSON file of what was seen; a run that is resumed goes on from it.
        efficacy_of: measures the early facts, in place of protocol ``paper``'s efficacy on the edit prompts.

    Attributes:
        records: one ``GuardRecord`` a batch that ended, and one of a batch that was stopped.

    Raises:
        ValueError: a setting is out of its range, or nothing is left to watch.
    """

    def __init__(self, action: Action = "warn", tok: PreTrainedTokenizerBase | None = None, *,
                 energy: float | None = 2.0, norm: float | None = 1.25, early: float | None = 0.5, warmup: int = 5,
                 facts: int = 20, seed: int = 0, path: str | Path | None = None,
                 efficacy_of: EfficacyOf | None = None) -> None:
        if action not in get_args(Action):
            raise ValueError(f"action is {action!r}: give warn, lower or stop")
        for name, value, most in (("energy", energy, math.inf), ("norm", norm, math.inf), ("early", early, 1.0)):
            if value is not None and not 0.0 < value <= most:
                raise ValueError(f"{name} is {value}: give a number above 0" + (" and at most 1" if most == 1 else ""))
        for name, count in (("warmup", warmup), ("facts", facts)):
            if count < 1:
                raise ValueError(f"{name} is {count}: give at least 1")
        if tok is None and efficacy_of is None:
            early = None
        if energy is None and norm is None and early is None:
            raise ValueError("the guard has nothing to watch: give a threshold for energy or norm, or a tokenizer and "
                             "one for early facts")
        self.action, self.energy, self.norm, self.early = action, energy, norm, early
        self.warmup, self.facts, self.seed = warmup, facts, seed
        self.path = None if path is None else Path(path)
        self._efficacy_of = efficacy_of or (None if tok is None else _paper_efficacy(tok))
        self._state = _State()
        self._before: dict[int, float] = {}
        self._seen: GuardRecord | None = None

    def resume_settings(self) -> Mapping[str, Any] | None:
        if self.action == "warn":
            return None
        return {"guard": self.action, "energy": self.energy, "norm": self.norm, "early": self.early,
                "warmup": self.warmup, "facts": self.facts, "seed": self.seed}

    @property
    def records(self) -> list[GuardRecord]:
        """What was seen of each batch so far."""
        return self._state.records

    def on_batch_start(self, event: EditEvent) -> None:
        if not self.records and event.num_edits and self.path is not None and self.path.exists():
            self._state = _read(self.path)
        # Later records are of batches that were undone, or of another run; without edits every run begins anew.
        kept = [record for record in self.records if record.num_edits <= event.num_edits]
        self._state = _State(self._state.facts, kept) if kept else _State()
        self._before = {layer: event.energy(layer) for layer in event.weights}

    def review(self, event: EditEvent) -> float:
        self._seen = seen = self._look(event)
        if not seen.signs or self.action == "warn":
            return 1.0
        if self.action == "lower" and event.strength > _LEAST:
            logger.warning("%s: its change is halved", self._told(seen))
            return 0.5
        self._note(seen)
        raise StopEditing(self._told(seen))

    def on_batch_end(self, event: EditEvent) -> None:
        if self._seen is None:  # told by something that asks for no review
            self._seen = self._look(event)
        if self._seen.signs:
            logger.warning("%s", self._told(self._seen))
        self._gather(event)
        if len(self.records) + 1 == self.warmup and self._state.facts:
            self._seen = replace(self._seen, early_efficacy=self._efficacy(event.model))
        self._note(self._seen)
        self._seen = None

    def _look(self, event: EditEvent) -> GuardRecord:
        steps = [abs(event.energy(layer) / was - 1.0) if was else 0.0 for layer, was in self._before.items()]
        norms = list(event.update_norms.values())
        base = self._early_base
        early = self._efficacy(event.model) if base is not None else None
        seen = GuardRecord(event.num_edits, sum(steps) / len(steps), sum(norms) / len(norms), early, event.strength)
        signs = []
        if len(self.records) >= self.warmup:
            first = self.records[: self.warmup]
            usual = {"energy": median(record.energy_step for record in first),
                     "norm": median(record.update_norm for record in first)}
            if self.energy is not None and seen.energy_step > self.energy * usual["energy"]:
                signs.append("energy")
            if self.norm is not None and seen.update_norm > self.norm * usual["norm"]:
                signs.append("norm")
            if early is not None and base is not None and self.early is not None and early < self.early * base:
                signs.append("early")
        return replace(seen, signs=tuple(signs))

    @property
    def _early_base(self) -> float | None:
        return self.records[self.warmup - 1].early_efficacy if len(self.records) >= self.warmup else None

    def _efficacy(self, model: nn.Module) -> float:
        assert self._efficacy_of is not None  # or `early` is None
        return self._efficacy_of(model, self._state.facts)

    def _gather(self, event: EditEvent) -> None:
        """Keep a fair sample of the warm-up's facts: each batch gives as many as it can until the sample is full."""
        if self.early is None or len(self.records) >= self.warmup:
            return
        wanted = -(-self.facts * (len(self.records) + 1) // self.warmup) - len(self._state.facts)
        asked = [one for one in event.requests if SLOT not in one.before + one.after]
        drawn = random.Random(f"{self.seed} {event.num_edits}").sample(range(len(asked)), min(wanted, len(asked)))
        self._state.facts += [{"prompt": asked[place].before + SLOT + asked[place].after,
                               "subject": asked[place].subject, "target_new": asked[place].target.strip()}
                              for place in sorted(drawn)]

    def _note(self, seen: GuardRecord) -> None:
        self._state.records = [*self.records, seen]
        self._save()

    def _save(self) -> None:
        if self.path is not None:
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(asdict(self._state), indent=1), encoding="utf-8")

    def _told(self, seen: GuardRecord) -> str:
        first = self.records[: self.warmup]
        words = {
            "energy": lambda: f"hyperspherical energy moved {seen.energy_step:.1e} in one batch, "
                              f"{median(r.energy_step for r in first):.1e} is usual",
            "norm": lambda: f"the norm of the change is {seen.update_norm:.3g}, "
                            f"{median(r.update_norm for r in first):.3g} is usual",
            "early": lambda: f"of {len(self._state.facts)} early facts {seen.early_efficacy:.0f}% are left of "
                             f"{self._early_base:.0f}%",
        }
        return f"batch up to {seen.num_edits} edits: {'; '.join(words[sign]() for sign in seen.signs)}"


def _paper_efficacy(tok: PreTrainedTokenizerBase) -> EfficacyOf:
    from ..evaluation.metrics import edit_efficacy

    def efficacy(model: nn.Module, facts: Sequence[Mapping[str, str]]) -> float:
        records = [EditRecord(place, fact["prompt"], fact["subject"], fact["target_new"], None, (), (), (), "facts")
                   for place, fact in enumerate(facts)]
        return edit_efficacy(model, tok, records, "paper") or 0.0

    return efficacy


def _read(path: Path) -> _State:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        records = [GuardRecord(**{**record, "signs": tuple(record["signs"])}) for record in content["records"]]
        return _State(list(content["facts"]), records)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of a DriftGuard ({error}): remove it, or give another path") from error
