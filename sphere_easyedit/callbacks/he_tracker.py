"""A callback that records hyperspherical energy while a model is edited."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..editing.callbacks import EditCallback, EditEvent
from ..utils.csv_files import read_csv
from ..utils.files import atomic_write
from ..utils.notebook import data_frame, html_table, panels
from .energy_metrics import EnergyRecord, MetricCorrelation, correlate, owners
from .energy_plot import energy_rows, plot_energy

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_COLUMNS = ("num_edits", "layer", "energy", "relative_change")


class HETracker(EditCallback):
    """Records hyperspherical energy before the first batch and after each.

    After a run of EasyEdit, ``join`` adds the energies to its metrics, and ``correlation`` correlates the two.

    Args:
        path: CSV file (num_edits, layer, energy, relative_change), rewritten after every record. A resumed run
            continues the file's records.
        layers: layers to track; None: all edited layers.
        every: recording interval, in batches.

    Attributes:
        records: one ``EnergyRecord`` before the first batch and one per recorded batch.

    Raises:
        TypeError: ``layers`` is not a sequence of integers, or ``every`` not an integer.
        ValueError: ``every`` is below 1.
    """

    def __init__(self, path: str | Path | None = None, layers: Sequence[int] | None = None, every: int = 1) -> None:
        if layers is not None and not (isinstance(layers, Iterable) and all(isinstance(one, int) for one in layers)):
            raise TypeError(f"layers is {layers!r}: give a list of layer numbers, or None for all edited layers")
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
        # Later records are of undone batches or another run; at 0 edits a new run starts.
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
            raise ValueError(f"HETracker can't track layers {missing}: edited layers are {list(event.weights)}")
        return layers

    def _record(self, event: EditEvent) -> None:
        layers = self._tracked(event)
        energy = {layer: event.energy(layer) for layer in layers}
        first = self.records[0].energy if self.records else energy
        change = {layer: energy[layer] / first[layer] - 1.0 if first[layer] else 0.0 for layer in layers}
        # After a repair, which adds no edits, the record replaces the one before it.
        self.records = [record for record in self.records if record.num_edits != event.num_edits]
        self.records.append(EnergyRecord(event.num_edits, energy, change))
        if self.path is not None:
            self.to_csv(self.path)

    def to_csv(self, path: str | Path) -> None:
        """Write all records, one line per record and layer."""
        with atomic_write(Path(path)) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow(_COLUMNS)
            for num_edits, layer, energy, change in energy_rows(self.records):
                writer.writerow([num_edits, layer, repr(energy), repr(change)])

    def frame(self) -> pandas.DataFrame:
        """All records as a pandas frame, one row per record and layer, with the columns of ``to_csv``.

        Raises:
            ImportError: pandas is not installed.
        """
        return data_frame(_COLUMNS, energy_rows(self.records))

    def plot(self) -> Figure:
        """Plot the relative change of energy over the number of edits, by layer. A notebook shows the figure.

        Raises:
            ValueError: nothing was recorded.
            ImportError: matplotlib is not installed.
        """
        if not self.records or not self.records[0].energy:
            raise ValueError("the tracker has no records to plot: pass it as a callback to an edit first")
        figure, (axes,) = panels(1)
        plot_energy(axes, self.records)
        return figure

    def _repr_html_(self) -> str:
        """The first and the last record by layer, as notebooks show them."""
        if not self.records:
            return html_table("HETracker: no records yet", (), ())
        first, last = self.records[0], self.records[-1]
        return html_table(
            f"Hyperspherical energy, {len(self.records)} records",
            ("layer", f"after {first.num_edits} edits", f"after {last.num_edits} edits", "relative change"),
            [(layer, f"{first.energy[layer]:.6g}", f"{energy:.6g}", f"{last.relative_change[layer]:+.2e}")
             for layer, energy in last.energy.items()])

    def join(self, metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Add energies to EasyEdit's metrics, in place.

        Each entry gets ``"hyperspherical_energy"``: ``{"num_edits": int, "energy": {layer: float}, "relative_change":
        {layer: float}}`` of the first record after its edit. With ``every`` above 1 that may be batches later, and
        edits after the last record get None.

        Args:
            metrics: the first of the three values that EasyEdit's ``edit`` and ``batch_edit`` return: one dict per
                case, in the order of editing, of the whole tracked run. ``case_id`` is ignored.

        Returns:
            ``metrics`` itself.

        Raises:
            ValueError: nothing was recorded after a batch, ``metrics`` is not a list of dicts, or the number of entries
                does not match the recorded edits. Nothing was changed.
        """
        for entry, owner in zip(metrics, owners(self.records, self.every, metrics), strict=True):
            entry["hyperspherical_energy"] = None if owner is None else asdict(self.records[owner])
        return metrics

    def correlation(self, metrics: list[dict[str, Any]]) -> dict[str, MetricCorrelation]:
        """Spearman's rank correlation of hyperspherical energy with every metric of a run (Figures 2 and 3).

        Each record after the first is a point: its metric is the mean over the cases edited since the previous record
        that have the metric; its energy is the relative change, mean over tracked layers. ``change`` correlates the
        differences between consecutive points. Numbers that differ only by rounding are ties.

        Args:
            metrics: as for ``join``; not changed. Metrics are the numbers under ``"post"``, and means of lists of
                numbers, except ``metric_meta`` and token ids (``*_output``). nan counts as missing.

        Returns:
            Correlations by dotted name, such as ``rewrite_acc``, ``locality.neighborhood_acc`` or
            ``fluency.ngram_entropy``; nan with fewer than 3 points or a constant side.

        Raises:
            ValueError: as ``join``, or no layer was tracked.
        """
        return correlate(self.records, self.every, metrics)


def read_energy_csv(path: Path) -> list[EnergyRecord]:
    """Read what ``HETracker`` wrote.

    Raises:
        ValueError: the file has other columns or an invalid line.
    """
    records: list[EnergyRecord] = []
    for num_edits, layer, energy, change in read_csv(path, _COLUMNS, lambda row: (
            int(row["num_edits"]), int(row["layer"]), float(row["energy"]), float(row["relative_change"]))):
        if not records or records[-1].num_edits != num_edits:
            records.append(EnergyRecord(num_edits, {}, {}))
        records[-1].energy[layer] = energy
        records[-1].relative_change[layer] = change
    return records
