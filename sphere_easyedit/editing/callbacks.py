"""Callbacks of an edit run: what they are told, and the class to override."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..core.hyperspherical import energy_from_gram, hyperspherical_energy
from ..core.updates import LowRankUpdate
from .requests import EditRequest

if TYPE_CHECKING:
    from ..callbacks.energy_metrics import EnergyRecord
    from ..runs.schema import BatchRecord, Measurement, SpaceRecord, Summary


@dataclass(frozen=True)
class EditEvent:
    """What a callback is told about a batch.

    Attributes:
        model: the model; not to be changed.
        weights: edited weights as they stand, by layer, ``(d_out, d_in)`` with neurons as rows; not to be changed.
        num_edits: edits in the model, this batch included once it has ended.
        num_batches: batches, likewise.
        case_ids: of the batch's edits.
        losses: last loss of each target value (nats); empty before the batch and where the executor tells none.
        update_norms: Frobenius norm of each layer's change by this batch; empty before it.
        seconds: wall time of the batch by part; empty before it.
        grams: ``W W^T`` ``(d_out, d_out)`` of edited weights as they stand, by layer, float32 or float64; not to be
            changed. Only of layers where one is carried from batch to batch, and computed when looked up: to be read
            within the hook.
        strength: share of the batch's change that callbacks let stand (see ``EditCallback.review``).
        requests: the batch's edits; none where an executor of EasyEdit's gets others than ours.
        updates: the batch's changes as they stand in the weights, by layer, a column an edit, with the keys that they
            were solved for. Of MEMIT and AlphaEdit solved natively, whose changes are of low rank; else empty.
    """

    model: nn.Module
    weights: Mapping[int, Tensor]
    num_edits: int
    num_batches: int
    case_ids: Sequence[int | str]
    losses: Sequence[float] = ()
    update_norms: Mapping[int, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    grams: Mapping[int, Tensor] = field(default_factory=dict)
    strength: float = 1.0
    requests: Sequence[EditRequest] = ()
    updates: Mapping[int, LowRankUpdate] = field(default_factory=dict)

    def energy(self, layer: int) -> float:
        """Hyperspherical energy (Eq. 5) of a layer's weight as it stands; to be asked within the hook."""
        weight, gram = self.weights[layer], self.grams.get(layer)
        return float(hyperspherical_energy(weight) if gram is None else energy_from_gram(gram, weight=weight))


@dataclass(frozen=True)
class RunState:
    """A sequential run as far as it came, the part of earlier processes included.

    Attributes:
        directory: of the run.
        config: content of ``config.yaml``.
        batches: so far.
        measurements: so far.
        energy: hyperspherical energy before the first batch and after each.
        spaces: share of each batch's change in the principal space, by layer.
        summary: what the run came to; None until it has ended.
    """

    directory: Path
    config: Mapping[str, Any]
    batches: Sequence[BatchRecord] = ()
    measurements: Sequence[Measurement] = ()
    energy: Sequence[EnergyRecord] = ()
    spaces: Sequence[SpaceRecord] = ()
    summary: Summary | None = None


@dataclass(frozen=True)
class MeasureEvent:
    """What a sequential run has just measured and written down.

    Attributes:
        run: as far as it came, this record included.
        batch: a batch that has ended, with its losses, times and norms; None for a measurement.
        measurement: an evaluation by one protocol, or of general abilities; None for a batch.
    """

    run: RunState
    batch: BatchRecord | None = None
    measurement: Measurement | None = None


class StopEditing(Exception):
    """Raised by a callback: this batch is undone like after any exception, and a sequential run ends in good order."""


class EditCallback:
    """Watches batches, and what a sequential run measures; override what is wanted.

    An exception from a hook of a batch undoes the batch. One from ``on_measured`` or ``on_run_end`` ends the run; what
    was written stands, and the run can be resumed.
    """

    def on_batch_start(self, event: EditEvent) -> None:
        """Called before a batch changes anything."""

    def review(self, event: EditEvent) -> float:
        """Called with the batch's weights in place, before any ``on_batch_end``: how much of the change may stand.

        Returns:
            1 lets it stand. A share above 0 and below 1 scales the change of all layers by it, and the hook is called
            again with what is left. To undo the batch, raise (``StopEditing`` to end the run in good order).
        """
        return 1.0

    def on_batch_end(self, event: EditEvent) -> None:
        """Called with the batch's weights in place."""

    def on_measured(self, event: MeasureEvent) -> None:
        """Called by a sequential run once a batch, or a measurement, is written to the run directory."""

    def on_run_end(self, run: RunState) -> None:
        """Called by a sequential run once its summary is written, and by one that finds it written already."""

    def deciding(self) -> Mapping[str, Any] | None:
        """Settings that decide about weights or where a run ends: a run is resumed with the same ones. None for one
        that only watches.
        """
        return None
