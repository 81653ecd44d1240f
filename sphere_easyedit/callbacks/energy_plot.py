"""Plots and tables of recorded hyperspherical energy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..utils.notebook import layer_colours, legend_below
from .energy_metrics import EnergyRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def mean_change(record: EnergyRecord) -> float | None:
    """Relative change of energy, mean over layers; None without layers."""
    changes = record.relative_change.values()
    return sum(changes) / len(changes) if changes else None


def plot_energy(axes: Axes, records: Sequence[EnergyRecord]) -> None:
    """Draw the relative change of energy over the number of edits: a line per layer, and their mean in black."""
    edits = [record.num_edits for record in records]
    layers = list(records[0].energy)
    for layer, colour in zip(layers, layer_colours(len(layers)), strict=True):
        axes.plot(edits, [record.relative_change[layer] for record in records], marker=".", linewidth=1, color=colour,
                  label=f"layer {layer}")
    if len(layers) > 1:
        means = [(record.num_edits, mean) for record in records if (mean := mean_change(record)) is not None]
        axes.plot(*zip(*means, strict=True), color="black", linewidth=2, label="mean")
    axes.set(title="Hyperspherical energy", ylabel="relative change")
    axes.ticklabel_format(axis="y", scilimits=(-2, 3))
    if len(layers) <= 10:
        legend_below(axes)


def energy_rows(records: Sequence[EnergyRecord]) -> Iterator[tuple[int, int, float, float]]:
    """Rows of an energy table: num_edits, layer, energy and relative change, one per record and layer."""
    for record in records:
        for layer, energy in record.energy.items():
            yield record.num_edits, layer, energy, record.relative_change[layer]
