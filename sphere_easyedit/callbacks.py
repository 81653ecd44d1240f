"""What watches an edit run: the interface, and the tracker of hyperspherical energy."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .editing.requests import EditRequest
from .editing.solvers import LowRankUpdate
from .energy_metrics import MetricCorrelation, correlate, join_energy
from .files import atomic_write
from .hyperspherical import energy_from_gram, hyperspherical_energy

if TYPE_CHECKING:
    from .runs.schema import BatchRecord, Measurement, SpaceRecord, Summary

logger = logging.getLogger(__name__)

_COLUMNS = ("num_edits", "layer", "energy", "relative_change")


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


@dataclass(frozen=True)
class EnergyRecord:
    """Hyperspherical energy (Eq. 5) of tracked layers after ``num_edits`` edits, and its change since the first."""

    num_edits: int
    energy: dict[int, float]
    relative_change: dict[int, float]


class HETracker(EditCallback):
    """Records hyperspherical energy before the first batch and after each.

    After a run of EasyEdit's, ``join`` puts the energies beside its metrics and ``correlation`` compares the two.

    Args:
        path: CSV file (num_edits, layer, energy, relative_change), rewritten whole after every record, so that an
            interrupted run leaves what it measured. A run that goes on from earlier edits continues the file's records.
        layers: layers to track, None for all that are edited.
        every: record after every so many batches.

    Attributes:
        records: one ``EnergyRecord`` before the first batch and one for each recorded batch.

    Raises:
        TypeError: ``layers`` is no sequence of numbers, or ``every`` no number.
        ValueError: ``every`` is below 1.
    """

    def __init__(self, path: str | Path | None = None, layers: Sequence[int] | None = None, every: int = 1) -> None:
        if layers is not None and not (isinstance(layers, Iterable) and all(isinstance(one, int) for one in layers)):
            raise TypeError(f"layers is {layers!r}: give a list of layer numbers, or None for all that are edited")
        if not isinstance(every, int):
            raise TypeError(f"every is {every!r}: give a whole number, 1 or more")
        if every < 1:
            raise ValueError(f"every is {every}; give 1 to record after each batch, or more")
        self.path = None if path is None else Path(path)
        self.layers = None if layers is None else list(layers)
        self.every = every
        self.records: list[EnergyRecord] = []

    def on_batch_start(self, event: EditEvent) -> None:
        if not self.records and event.num_edits > 0 and self.path is not None and self.path.exists():
            self.records = read_energy_csv(self.path)
            if self.records and set(self.records[0].energy) != set(self._tracked(event)):
                raise ValueError(f"{self.path} tracks layers {sorted(self.records[0].energy)}, this run "
                                 f"{self._tracked(event)}: give the tracker another path, or the same layers")
        # Later records are of batches that were undone, or of another run; without edits every run begins anew.
        self.records = [record for record in self.records if record.num_edits <= event.num_edits]
        if event.num_edits == 0 or not self.records:
            self.records = []
            self._record(event)

    def on_batch_end(self, event: EditEvent) -> None:
        if event.num_batches % self.every == 0:
            self._record(event)

    def _tracked(self, event: EditEvent) -> list[int]:
        layers = list(event.weights) if self.layers is None else self.layers
        missing = [layer for layer in layers if layer not in event.weights]
        if missing:
            raise ValueError(f"HETracker is to track layers {missing}, edited are {list(event.weights)}: track those")
        return layers

    def _record(self, event: EditEvent) -> None:
        layers = self._tracked(event)
        energy = {layer: event.energy(layer) for layer in layers}
        first = self.records[0].energy if self.records else energy
        change = {layer: energy[layer] / first[layer] - 1.0 if first[layer] else 0.0 for layer in layers}
        self.records.append(EnergyRecord(event.num_edits, energy, change))
        if self.path is not None:
            self.to_csv(self.path)

    def to_csv(self, path: str | Path) -> None:
        """Write all records, one line a record and layer."""
        with atomic_write(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(_COLUMNS)
            for record in self.records:
                for layer, energy in record.energy.items():
                    writer.writerow([record.num_edits, layer, repr(energy), repr(record.relative_change[layer])])

    def join(self, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Put energy into EasyEdit's metrics, in place.

        Each entry gets ``"hyperspherical_energy"``: ``{"num_edits": int, "energy": {layer: float}, "relative_change":
        {layer: float}}`` of the first record made with its edit in the model. With ``every`` above 1 that may be some
        batches later, and edits after the last record get None.

        Args:
            metrics: the first of the three that EasyEdit's ``edit`` and ``batch_edit`` return: one dict a case, in the
                order of editing, of the whole run that was watched. ``case_id`` is not looked at.

        Returns:
            ``metrics`` itself.

        Raises:
            ValueError: nothing was recorded after a batch, ``metrics`` is no list of dicts, or it has more or fewer
                entries than edits were recorded (more is right with ``every`` above 1). Nothing was changed.
        """
        return join_energy(self.records, self.every, metrics)

    def correlation(self, metrics: list[dict[str, Any]]) -> dict[str, MetricCorrelation]:
        """Spearman's rank correlation of hyperspherical energy with every metric of a run (Figures 2 and 3).

        A point is a record after the first: its metric is the mean over the cases edited since the record before
        it, as far as they have the metric; its energy is the mean over tracked layers of the relative change, since
        energies of layers differ in size. ``change`` correlates the differences between consecutive points. Numbers
        that differ by rounding alone are ties.

        Args:
            metrics: as for ``join``, joined or not; not changed. Metrics are the numbers under ``"post"`` and the means
                of lists of numbers, save ``metric_meta`` and token ids (``*_output``). nan counts as missing.

        Returns:
            Correlations by dotted name, such as ``rewrite_acc``, ``locality.neighborhood_acc`` or
            ``fluency.ngram_entropy``; nan where there are fewer than 3 points or one side is constant.

        Raises:
            ValueError: as ``join``, or no layer was tracked.
        """
        return correlate(self.records, self.every, metrics)


def read_energy_csv(path: Path) -> list[EnergyRecord]:
    """Read what ``HETracker`` wrote.

    Raises:
        ValueError: the file has other columns or a line that is no record.
    """
    records: list[EnergyRecord] = []
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            raise ValueError(f"{path} has columns {reader.fieldnames}, an energy file has {list(_COLUMNS)}")
        for row in reader:
            try:
                num_edits, layer = int(row["num_edits"]), int(row["layer"])
                energy, change = float(row["energy"]), float(row["relative_change"])
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
            if not records or records[-1].num_edits != num_edits:
                records.append(EnergyRecord(num_edits, {}, {}))
            records[-1].energy[layer] = energy
            records[-1].relative_change[layer] = change
    return records
