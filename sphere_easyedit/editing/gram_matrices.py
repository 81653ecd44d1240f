"""Gram matrices ``G = W W^T`` of the edited weights, carried from batch to batch by thin products. Tensors, mostly.

The principal space and hyperspherical energy are functions of G, and a low-rank update ``dW = R K^T`` changes it by
``(W K) R^T + R (W K)^T + R (K^T K) R^T``. G is float64 where its side is at most 1024 or the weight is float64, else
float32: relative to HE, either errs by less than 1e-9, where editing moves HE by 1e-5.

Shape legend: d_out, d_in of the weight; n edits in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.projection import FLOAT64_SIDE
from ..core.updates import LowRankUpdate
from ..hparams import SPHEREHyperParams
from ..models.architecture import EditableModel

# The stored weight is rounded at every update, its Gram matrix at every advance: both random, both in the last digit.
_MAX_ADVANCES = 50
# A row that one update shrinks (in squared norm) to less than this has lost digits that G can't have.
_MAX_SHRINKAGE = 0.01
# Squared norms outside this range are no business of float32's.
_SAFE_SQUARES = (1e-30, 1e30)
_BLOCKS = 8  # by rows; products on and above the diagonal are 56% of all


@dataclass(frozen=True)
class GramMatrix:
    """G of one weight as it stands.

    Attributes:
        matrix: ``(d_out, d_out)``, float32 or float64, on the weight's device; never changed in place.
        advances: updates it was carried through since it was computed from the weight.
    """

    matrix: Tensor
    advances: int = 0

    @classmethod
    def of(cls, weight: Tensor) -> GramMatrix:
        """From a weight ``(d_out, d_in)`` of any floating dtype."""
        if weight.dtype == torch.float64 or weight.shape[0] <= FLOAT64_SIDE:
            return cls(_product(weight, torch.float64))
        matrix = _product(weight, torch.float32)
        squares = matrix.diagonal()
        low, high = _SAFE_SQUARES
        doubtful = (squares < low) | (squares > high)
        if bool(doubtful.any()) and bool(weight[doubtful].any()):  # rows of zeros are in order
            matrix = _product(weight, torch.float64)
        return cls(matrix)

    def after(self, weight: Tensor, update: LowRankUpdate) -> GramMatrix | None:
        """G of ``weight + update``, by products of width n.

        Args:
            weight: ``(d_out, d_in)``, before the update.
            update: as it will be added.

        Returns:
            None where G must be computed from the new weight: after 50 advances; if the update takes nearly all of a
            row away; and for a half-precision weight, in which rounding changes as much as the update does.
        """
        if weight.element_size() < 4 or self.advances >= _MAX_ADVANCES:
            return None
        values, keys = update.values.to(self.matrix), update.keys.to(self.matrix)
        inner = weight.to(self.matrix.dtype) @ keys + 0.5 * (values @ (keys.T @ keys))  # (d_out, n)
        left, right = torch.cat([inner, values], dim=1), torch.cat([values, inner], dim=1)
        matrix = torch.addmm(self.matrix, left, right.T)
        squares = matrix.diagonal()
        sound = squares.isfinite() & (squares >= _MAX_SHRINKAGE * self.matrix.diagonal())
        return GramMatrix(matrix, self.advances + 1) if bool(sound.all()) else None


def carries_grams(hparams: SPHEREHyperParams, native: bool) -> bool:
    """Whether a Gram matrix saves anything: every batch takes a space from it, or its updates are of low rank.

    Args:
        native: the solve is ours, not an executor's.
    """
    if hparams.projects and hparams.principal_space == "current":
        return True
    return native and hparams.method.is_low_rank


class GramMatrices(Mapping[int, Tensor]):
    """G by layer during one batch: computed when first asked for, and carried from then on.

    Only of wide weights (d_out <= d_in): of a tall one G is the larger side.

    Args:
        editable: the model, whose weights it refers to as they stand.
        carried: what earlier batches left.
        layers: whose G to offer; the wide ones among them are.

    Attributes:
        carried: what to hand to the next batch; layers never asked for have no entry.
    """

    def __init__(self, editable: EditableModel, carried: Mapping[int, GramMatrix], layers: list[int]) -> None:
        self._editable = editable
        self._layers = [layer for layer in layers if editable.weight(layer).shape[0] <= editable.d_in(layer)]
        self.carried = {layer: carried[layer] for layer in self._layers
                        if layer in carried and carried[layer].matrix.device == editable.device(layer)}

    def __getitem__(self, layer: int) -> Tensor:
        found = self.carry(layer)
        if found is None:
            raise KeyError(layer)
        return found.matrix

    def carry(self, layer: int) -> GramMatrix | None:
        """G and what it was carried through, computed now if need be; None of a layer that none is offered of."""
        if layer not in self._layers:
            return None
        if layer not in self.carried:
            self.carried[layer] = GramMatrix.of(self._editable.weight(layer))
        return self.carried[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def advance(self, layer: int, update: LowRankUpdate | Tensor) -> None:
        """Take note of what will be added to a layer's weight, which must still be the one before.

        After a dense one G is computed from the new weight, which is cheaper than advancing it.
        """
        carried = self.carried.pop(layer, None)
        if carried is None or not isinstance(update, LowRankUpdate):
            return
        advanced = carried.after(self._editable.weight(layer), update)
        if advanced is not None:
            self.carried[layer] = advanced

    def forget(self, layer: int) -> None:
        """Drop a layer's G, whose weight was changed by other means than an update."""
        self.carried.pop(layer, None)


def _product(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``W W^T`` in this dtype: the blocks on and above the diagonal, mirrored."""
    side = weight.shape[0]
    gram = torch.empty((side, side), dtype=dtype, device=weight.device)
    rows = max(256, -(-side // _BLOCKS))
    blocks = [slice(start, min(start + rows, side)) for start in range(0, side, rows)]
    for position, i in enumerate(blocks):
        left = weight[i].to(dtype)
        for j in blocks[position:]:
            product = left @ (left if i == j else weight[j].to(dtype)).T
            gram[i, j] = product
            if i != j:
                gram[j, i] = product.T
    return gram
