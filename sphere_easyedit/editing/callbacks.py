"""Callbacks of editing: the base class to override, and the events that its hooks receive."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..core.hyperspherical import energy_from_gram, hyperspherical_energy
from ..core.updates import LowRankUpdate
from .requests import EditRequest

if TYPE_CHECKING:
    from ..callbacks.energy_metrics import EnergyRecord
    from ..runs.schema import BatchRecord, Measurement, SpaceRecord, Summary

_MAX_REVIEWS = 20  # times that one callback may scale back one batch


@dataclass(frozen=True)
class EditEvent:
    """State of a batch, passed to the hooks of ``EditCallback``.

    Attributes:
        model: the model; do not change it.
        weights: current edited weights by layer, ``(d_out, d_in)`` with neurons as rows; do not change them.
        num_edits: edits in the model; in ``on_batch_start`` without this batch, later with it.
        num_batches: batches, counted likewise.
        case_ids: case ids of the batch.
        losses: final loss of each target value (nats); empty before the batch and where the engine reports none.
        update_norms: Frobenius norm of each layer's change in this batch; empty before it.
        seconds: wall time of the batch by phase; empty before it.
        grams: ``W W^T`` ``(d_out, d_out)`` of the current weights by layer, float32 or float64; do not change them.
            Holds only layers whose Gram matrix is carried from batch to batch. Computed on access, so read it within
            the hook.
        strength: share of the batch's change that callbacks kept (see ``EditCallback.review``).
        requests: the batch's edits; empty under ``track`` where EasyEdit edits something other than facts.
        updates: the batch's changes as they were written, by layer, one column an edit, with the keys they were solved
            for. Only for low-rank changes (native MEMIT and AlphaEdit); else empty.
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
        """Hyperspherical energy (Eq. 5) of a layer's current weight. Call it within the hook."""
        weight, gram = self.weights[layer], self.grams.get(layer)
        return float(hyperspherical_energy(weight) if gram is None else energy_from_gram(gram, weight=weight))


@dataclass(frozen=True)
class RunState:
    """Records of a sequential run so far, including those from before it was resumed; they grow as the run goes on.

    Attributes:
        directory: the run directory.
        config: content of ``config.yaml``.
        batches: finished batches.
        measurements: finished measurements.
        energy: hyperspherical energy before the first batch and after each.
        spaces: share of each batch's change in the principal space, by layer.
        summary: content of ``summary.json``; None until the run has ended.
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
    """The record that a sequential run has just written.

    Attributes:
        run: the run's records so far, this one included.
        batch: a finished batch with its losses, times and norms; None for a measurement.
        measurement: an evaluation by one protocol, or of general abilities; None for a batch.
    """

    run: RunState
    batch: BatchRecord | None = None
    measurement: Measurement | None = None


class StopEditing(Exception):
    """Raised by a callback to end a sequential run: the current batch is undone and the run is summed up."""


class EditCallback:
    """Base class of callbacks: every hook does nothing by default.

    An exception in a hook of a batch (``on_batch_start``, ``review``, ``on_batch_end``) undoes the batch. One in
    ``on_measured`` or ``on_run_end`` ends the run; its files are kept, and the run can be resumed.

    Attributes:
        allows_repair: works in a run that is repaired (see ``runs.repair``), of which it sees the other batches only.
    """

    allows_repair: ClassVar[bool] = True

    def on_batch_start(self, event: EditEvent) -> None:
        """Called before a batch changes anything."""

    def review(self, event: EditEvent) -> float:
        """Decide how much of a batch's change to keep. Called with the changed weights, before any ``on_batch_end``.

        Returns:
            1 to keep all of it. A share in (0, 1) scales the change of all layers by it, and the hook is called again
            with the result. To undo the batch, raise (``StopEditing`` to end the run as well).
        """
        return 1.0

    def on_batch_end(self, event: EditEvent) -> None:
        """Called with the changed weights in place."""

    def on_measured(self, event: MeasureEvent) -> None:
        """Called by a sequential run once a batch or a measurement is written to the run directory."""

    def on_run_end(self, run: RunState) -> None:
        """Called by a sequential run once its summary is written, also where it was written before."""

    def resume_settings(self) -> Mapping[str, Any] | None:
        """Settings that a resumed run must share, since they affect the weights or where the run ends.

        None for a callback that only observes. The hook's former name, ``deciding``, still works.
        """
        former: Callable[[], Mapping[str, Any] | None] | None = getattr(self, "deciding", None)
        if former is None:
            return None
        warnings.warn(f"{type(self).__name__}.deciding is deprecated: rename it to resume_settings",
                      DeprecationWarning, stacklevel=2)
        return former()


def review_batch(event: EditEvent, callbacks: Sequence[EditCallback], before: Mapping[int, Tensor],
                 weights: Callable[[], Mapping[int, Tensor]], scale_back: Callable[[float], None]) -> EditEvent:
    """Call each callback's ``review`` and scale the batch's change back until all callbacks return 1.

    Args:
        event: state after the batch was written.
        callbacks: reviewed in order.
        before: weights ``(d_out, d_in)`` before the batch, by layer.
        weights: returns the current weights.
        scale_back: keeps only a share of the change.

    Returns:
        The event with the weights, norms and strength that result.

    Raises:
        ValueError: a callback returned a share outside (0, 1], or scaled one batch back 20 times.
    """
    for callback in callbacks:
        for _ in range(_MAX_REVIEWS):
            share = callback.review(event)
            if not 0.0 < share <= 1.0:  # false for NaN, too
                raise ValueError(f"{type(callback).__name__}.review returned {share}: return a share in (0, 1], or "
                                 "raise to undo the batch")
            if share == 1.0:
                break
            scale_back(share)
            now = weights()
            event = replace(event, weights=now, update_norms=change_norms(now, before),
                            strength=event.strength * share)
        else:
            raise ValueError(f"{type(callback).__name__}.review scaled a batch back {_MAX_REVIEWS} times, to "
                             f"{event.strength:g} of its change: raise to undo the batch")
    return event


def change_norms(weights: Mapping[int, Tensor], before: Mapping[int, Tensor]) -> dict[int, float]:
    """Frobenius norm of each layer's change, summed in float64 on the weight's device."""
    return {layer: float((weights[layer].double() - old.to(weights[layer].device).double()).norm())
            for layer, old in before.items()}
