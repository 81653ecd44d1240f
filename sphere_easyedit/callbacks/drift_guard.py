"""A callback that watches for signs of model collapse, and warns, scales the batch back or ends the run."""

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
from ..defaults import GUARD_EARLY, GUARD_ENERGY, GUARD_FACTS, GUARD_NORM, GUARD_WARMUP
from ..editing.callbacks import EditCallback, EditEvent, StopEditing
from ..utils.files import atomic_write

logger = logging.getLogger(__name__)

Action = Literal["warn", "lower", "stop"]
_MIN_STRENGTH = 0.125  # three halvings
# (model, facts with prompt (``{}`` for the subject), subject, target_new) -> percent of facts that the model predicts
EfficacyOf = Callable[[nn.Module, Sequence[Mapping[str, str]]], float]


@dataclass(frozen=True)
class GuardRecord:
    """Signs measured after one batch.

    Attributes:
        num_edits: edits in the model after it.
        energy_step: relative change of hyperspherical energy (Eq. 5) by the batch, in magnitude, mean over layers.
        update_norm: Frobenius norm of the batch's change, mean over layers.
        early_efficacy: percent of the early facts that the model predicts; None before the last batch of the warm-up,
            and if they are not watched.
        strength: share of the batch's change that was kept.
        signs: signs beyond their thresholds at that strength: ``energy``, ``norm``, ``early``.
    """

    num_edits: int
    energy_step: float
    update_norm: float
    early_efficacy: float | None
    strength: float = 1.0
    signs: tuple[str, ...] = ()


@dataclass
class _State:
    """The content of ``guard.json``."""

    facts: list[dict[str, str]] = field(default_factory=list)
    records: list[GuardRecord] = field(default_factory=list)


class DriftGuard(EditCallback):
    """Watches three signs of drift, and acts if one exceeds its threshold.

    The first ``warmup`` batches give the baseline: the median energy step, the median update norm, and the efficacy of
    a fixed sample of their facts right after them. Later batches are compared with it. The default thresholds predicted
    collapse best on the runs of docs/RELIABILITY.md.

    Args:
        action: ``warn`` logs; ``lower`` halves the batch's change until no sign exceeds its threshold, and stops the
            run if an eighth is still too much; ``stop`` undoes the batch and ends the run (``StopEditing``).
        tok: tokenizer of the model, for the early facts' efficacy; without it, ``early`` is off.
        energy: threshold of the energy step, as a multiple of its median; None: not watched.
        norm: threshold of the update norm, as a multiple of its median; None: not watched.
        early: threshold of the early facts' efficacy, as a share of its baseline; None: not watched.
        warmup: number of baseline batches.
        facts: number of early facts in the sample.
        seed: of the sample.
        path: JSON file of the guard's state; a resumed run continues from it.
        efficacy_of: measures the early facts; default: efficacy of protocol ``paper`` on the edit prompts.

    Attributes:
        records: one ``GuardRecord`` per completed batch, and one of a batch that was stopped.

    Raises:
        ValueError: a setting is out of its range, or no sign is watched.
    """

    def __init__(self, action: Action = "warn", tok: PreTrainedTokenizerBase | None = None, *,
                 energy: float | None = GUARD_ENERGY, norm: float | None = GUARD_NORM,
                 early: float | None = GUARD_EARLY, warmup: int = GUARD_WARMUP, facts: int = GUARD_FACTS,
                 seed: int = 0, path: str | Path | None = None, efficacy_of: EfficacyOf | None = None) -> None:
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
        self._current: GuardRecord | None = None  # of the batch under review

    def resume_settings(self) -> Mapping[str, Any] | None:
        if self.action == "warn":
            return None
        return {"guard": self.action, "energy": self.energy, "norm": self.norm, "early": self.early,
                "warmup": self.warmup, "facts": self.facts, "seed": self.seed}

    @property
    def records(self) -> list[GuardRecord]:
        """Records of the batches so far."""
        return self._state.records

    def on_batch_start(self, event: EditEvent) -> None:
        if not self.records and event.num_edits and self.path is not None and self.path.exists():
            self._state = _read(self.path)
        # Later records are of undone batches or another run; at 0 edits a new run starts.
        kept = [record for record in self.records if record.num_edits <= event.num_edits]
        self._state = _State(self._state.facts, kept) if kept else _State()
        self._before = {layer: event.energy(layer) for layer in event.weights}

    def review(self, event: EditEvent) -> float:
        self._current = record = self._measure(event)
        if not record.signs or self.action == "warn":
            return 1.0
        if self.action == "lower" and event.strength > _MIN_STRENGTH:
            logger.warning("%s: its change is halved", self._describe(record))
            return 0.5
        self._add(record)
        raise StopEditing(self._describe(record))

    def on_batch_end(self, event: EditEvent) -> None:
        record = self._measure(event) if self._current is None else self._current  # the former without a review
        self._current = None
        if record.signs:
            logger.warning("%s", self._describe(record))
        self._sample_facts(event)
        if len(self.records) + 1 == self.warmup and self._state.facts:
            record = replace(record, early_efficacy=self._efficacy(event.model))
        self._add(record)

    def _measure(self, event: EditEvent) -> GuardRecord:
        steps = [abs(event.energy(layer) / was - 1.0) if was else 0.0 for layer, was in self._before.items()]
        norms = list(event.update_norms.values())
        ready = len(self.records) >= self.warmup
        energy_base, norm_base, early_base = self._baseline() if ready else (0.0, 0.0, None)
        early = None if early_base is None else self._efficacy(event.model)
        record = GuardRecord(event.num_edits, sum(steps) / len(steps), sum(norms) / len(norms), early, event.strength)
        signs = {"energy": self.energy is not None and record.energy_step > self.energy * energy_base,
                 "norm": self.norm is not None and record.update_norm > self.norm * norm_base,
                 "early": (early is not None and early_base is not None and self.early is not None
                           and early < self.early * early_base)}
        return replace(record, signs=tuple(sign for sign, is_set in signs.items() if ready and is_set))

    def _baseline(self) -> tuple[float, float, float | None]:
        """Median energy step and update norm of the warm-up, and the early facts' efficacy after it."""
        first = self.records[: self.warmup]
        return (median(record.energy_step for record in first), median(record.update_norm for record in first),
                first[-1].early_efficacy)

    def _efficacy(self, model: nn.Module) -> float:
        assert self._efficacy_of is not None  # else `early` is None
        return self._efficacy_of(model, self._state.facts)

    def _sample_facts(self, event: EditEvent) -> None:
        """Add facts of a warm-up batch to the sample, about equally many of each batch."""
        if self.early is None or len(self.records) >= self.warmup:
            return
        count = -(-self.facts * (len(self.records) + 1) // self.warmup) - len(self._state.facts)
        requests = [one for one in event.requests if SLOT not in one.before + one.after]
        drawn = random.Random(f"{self.seed} {event.num_edits}").sample(range(len(requests)), min(count, len(requests)))
        self._state.facts += [{"prompt": one.before + SLOT + one.after, "subject": one.subject,
                               "target_new": one.target.strip()} for one in map(requests.__getitem__, sorted(drawn))]

    def _add(self, record: GuardRecord) -> None:
        self._state.records = [*self.records, record]
        if self.path is not None:
            with atomic_write(self.path) as temporary:
                temporary.write_text(json.dumps(asdict(self._state), indent=1), encoding="utf-8")

    def _describe(self, record: GuardRecord) -> str:
        energy, norm, early = self._baseline()
        texts = {
            "energy": f"hyperspherical energy moved {record.energy_step:.1e} in one batch, {energy:.1e} is usual",
            "norm": f"the norm of the change is {record.update_norm:.3g}, {norm:.3g} is usual",
            "early": f"of {len(self._state.facts)} early facts {record.early_efficacy or 0.0:.0f}% are left of "
                     f"{early or 0.0:.0f}%",
        }
        return f"batch up to {record.num_edits} edits: {'; '.join(texts[sign] for sign in record.signs)}"


def _paper_efficacy(tok: PreTrainedTokenizerBase) -> EfficacyOf:
    from ..evaluation.metrics import edit_efficacy

    def efficacy(model: nn.Module, facts: Sequence[Mapping[str, str]]) -> float:
        records = [EditRecord(index, fact["prompt"], fact["subject"], fact["target_new"], None, (), (), (), "facts")
                   for index, fact in enumerate(facts)]
        return edit_efficacy(model, tok, records, "paper") or 0.0

    return efficacy


def _read(path: Path) -> _State:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        records = [GuardRecord(**{**record, "signs": tuple(record["signs"])}) for record in content["records"]]
        return _State(list(content["facts"]), records)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of a DriftGuard ({error}): remove it, or give another path") from error
