"""Statistics of the cosines between all pairs of a weight's neurons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sphere_easyedit.callbacks.neurons import cosine_blocks, directed_rows

QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class NeuronGeometry:
    """Cosines between the neurons (rows) of a weight, over all unordered pairs of different rows.

    Attributes:
        mean, std: of the cosines (standard deviation over all pairs, not of a sample).
        mean_magnitude: mean of ``|cos|``.
        share_above: share of pairs whose cosine is above ``above``.
        above: that threshold.
        quantiles: cosine by share, linearly interpolated.
        neurons: rows that have a direction; zero rows have none and are left out.
        pairs: ``neurons (neurons - 1) / 2``.
    """

    mean: float
    std: float
    mean_magnitude: float
    share_above: float
    above: float
    quantiles: Mapping[float, float]
    neurons: int
    pairs: int


def neuron_geometry(weight: Tensor, above: float = 0.5, quantiles: Sequence[float] = QUANTILES) -> NeuronGeometry:
    """Exact statistics of ``cos(w_i, w_j)``, i < j.

    Products are made by blocks of rows, in float64 up to 1,024 neurons and float32 beyond; the cosines of all pairs are
    held once, for the quantiles (4 bytes a pair: 34 MB at 4,096 neurons).

    Args:
        weight: ``(d_out, d_in)``, rows are neurons; any floating dtype, any device.
        above: threshold of ``share_above``.
        quantiles: shares in [0, 1].

    Raises:
        ValueError: the weight is no finite floating 2-D tensor, or fewer than two of its rows are not zero.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(f"weight must be a floating 2-D tensor (d_out, d_in), got {_described(weight)}")
    cosines, neurons = _upper_cosines(weight.detach())
    return NeuronGeometry(
        mean=float(cosines.mean(dtype=np.float64)), std=float(cosines.std(dtype=np.float64)),
        mean_magnitude=float(np.abs(cosines).mean(dtype=np.float64)), share_above=float((cosines > above).mean()),
        above=above,
        quantiles={share: float(value) for share, value in zip(quantiles, np.quantile(cosines, list(quantiles)),
                                                               strict=True)},
        neurons=neurons, pairs=len(cosines))


def _upper_cosines(weight: Tensor) -> tuple[NDArray[np.floating], int]:
    """Cosines of pairs i < j ``(pairs,)``, and how many rows have a direction."""
    unit, _ = directed_rows(weight)
    count = unit.shape[0]
    if count < 2:
        raise ValueError(f"weight has {count} rows that are not zero: a pair needs two")
    cosines = np.empty(count * (count - 1) // 2, dtype=np.float64 if unit.dtype == torch.float64 else np.float32)
    filled = 0
    for _, _, upper in cosine_blocks(unit):
        cosines[filled: filled + len(upper)] = upper.cpu().numpy()
        filled += len(upper)
    return cosines, count


def _described(value: object) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
