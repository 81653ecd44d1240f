"""Repairs a run: facts that the model no longer predicts are found and edited again.

Later edits overwrite part of what earlier ones wrote, so some facts are lost. A repair takes place at a fixed interval
of edits, and after the last one. It runs the model on all facts so far and edits those that fail again, in batches and
for a few rounds. Their earlier keys no longer count in the solve, since new ones take their place. A repair ends before
it would make the change of the weights too large.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..datasets.loaders import EditRecord, Protocol
from ..defaults import REPAIR_NORM, REPAIR_ROUNDS
from ..editing.callbacks import EditCallback, EditEvent, change_norms
from ..editing.pipeline import apply_sphere_to_model
from ..editing.session import EditSession
from ..evaluation.metrics import efficacies
from ..hparams import SPHEREHyperParams
from ..models.architecture import EditableModel
from ..utils.messages import kind_and_text
from . import schema
from .directory import RunDirectory
from .schema import Repair

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RepairSettings:
    """When a run is repaired, and how far.

    Attributes:
        every: interval in edits; the end of the run is always repaired.
        rounds: times that failing facts are looked for and edited again, at most, in one repair.
        norm_limit: largest factor by which one repair may raise the norm of the weights' whole change.
    """

    every: int
    rounds: int = REPAIR_ROUNDS
    norm_limit: float = REPAIR_NORM

    def __post_init__(self) -> None:
        for name, value in (("every", self.every), ("rounds", self.rounds)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"repair: {name} is {value!r}; give a whole number, at least 1")
        if not self.norm_limit > 1.0:
            raise ValueError(f"repair: norm_limit is {self.norm_limit!r}; give a factor above 1")


class Repairer:
    """Repairs a model in the middle or at the end of a run.

    Args:
        records: all facts of the run.
        protocol: a fact fails if its efficacy by this protocol is below 1; not where that is undefined.
        callbacks: notified of every repaired batch; its ``num_edits`` is the same before and after.
        progress: called with the facts edited again and those that failed.
    """

    def __init__(self, editable: EditableModel, tok: PreTrainedTokenizerBase, records: Sequence[EditRecord],
                 hparams: SPHEREHyperParams, settings: RepairSettings, batch_size: int, protocol: Protocol,
                 run: RunDirectory, callbacks: Sequence[EditCallback], progress: Callable[[int, int], None]) -> None:
        self._editable, self._tok, self._records, self._hparams = editable, tok, records, hparams
        self._settings, self._batch_size, self._protocol = settings, batch_size, protocol
        self._run, self._callbacks, self._progress = run, callbacks, progress
        self.repairs: list[Repair] = []

    def resume(self) -> None:
        """Read what the run repaired before it was interrupted."""
        self.repairs = self._run.records(schema.REPAIRS, Repair)

    def failing(self, facts: Sequence[int]) -> list[int]:
        """Those of some facts (indices) that the model does not predict."""
        scores = efficacies(self._editable.model, self._tok, [self._records[fact] for fact in facts], self._protocol)
        return [fact for fact, score in zip(facts, scores, strict=True) if score is not None and score < 1.0]

    def repair(self, facts: Sequence[int]) -> None:
        """Edit those again that fail.

        Args:
            facts: indices of all facts in the model, in the order of the run.
        """
        limit = self._settings.norm_limit * self._norm()
        for number in range(1, self._settings.rounds + 1):
            failing = self.failing(facts)
            logger.info("repair after %d edits, round %d: %d facts fail", len(facts), number, len(failing))
            for start in range(0, len(failing), self._batch_size):
                self._progress(start, len(failing))
                if not self._edit(failing[start: start + self._batch_size], facts, number, limit):
                    return
            if not failing:
                return

    def _edit(self, chosen: Sequence[int], facts: Sequence[int], number: int, limit: float) -> bool:
        """Edit a batch again and record it; returns False if that failed or exceeded the limit, and was undone."""
        order = key_order(facts, self.repairs)
        started = time.perf_counter()
        try:
            apply_sphere_to_model(
                self._editable.model, self._tok, [self._records[fact].request() for fact in chosen], self._hparams,
                callbacks=[_NormLimit(limit), *self._callbacks], replaces=[order.index(fact) for fact in chosen])
        except (_TooLarge, ValueError) as error:
            logger.warning("the repair after %d edits ends: %s", len(facts),
                           str(error) if isinstance(error, _TooLarge) else kind_and_text(error))
            return False
        repair = Repair(len(facts), number, tuple(chosen), tuple(self._records[fact].case_id for fact in chosen),
                        time.perf_counter() - started)
        self._run.append(schema.REPAIRS, repair.to_dict())
        self.repairs.append(repair)
        return True

    def _norm(self) -> float:
        return _change_norm(self._editable.model, self._editable.weights())


def key_order(facts: Sequence[int], repairs: Iterable[Repair]) -> list[int]:
    """The facts in the order of their keys in the session: facts that were edited again are after those before them.

    Args:
        facts: indices of the facts in the model, in the order of the run.
        repairs: of the run so far.
    """
    order: list[int] = []
    for repair in repairs:
        order += facts[len(order): repair.num_edits]
        repaired = set(repair.places)
        order = [fact for fact in order if fact not in repaired] + list(repair.places)
    return order + list(facts[len(order):])


def _change_norm(model: nn.Module, weights: Mapping[int, Tensor]) -> float:
    """Frobenius norm of the change of all edited weights since the unedited ones."""
    return math.hypot(*change_norms(weights, EditSession.of(model).original).values())


class _TooLarge(Exception):
    """Raised to undo a batch that makes the change of the weights too large."""


class _NormLimit(EditCallback):
    """Undoes a batch after which the change since the unedited weights is larger than a limit."""

    def __init__(self, limit: float) -> None:
        self._limit = limit

    def on_batch_end(self, event: EditEvent) -> None:
        norm = _change_norm(event.model, event.weights)
        if norm > self._limit:
            raise _TooLarge(f"{len(event.case_ids)} more facts edited again would bring the norm of the change to "
                            f"{norm:.4g}, above {self._limit:.4g}")
