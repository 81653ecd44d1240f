"""Keeps Gram matrices ``G = W W^T`` of the edited weights up to date from batch to batch by low-rank products.

The principal space and hyperspherical energy are functions of G, and a low-rank update ``dW = R K^T`` changes it by
``(W K) R^T + R (W K)^T + R (K^T K) R^T``. G is float64 if d_out <= 1024 or the weight is float64, else float32:
relative to HE, either error is below 1e-9, while editing changes HE by 1e-5.

Shape legend: d_out, d_in of the weight; n edits in the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.projection import FLOAT64_SIDE
from ..core.tensors import blocks
from ..core.updates import LowRankUpdate
from ..hparams import SPHEREHyperParams
from ..models.architecture import EditableModel

# Rounding errors of weight and Gram matrix add up with each update, so G is recomputed after this many.
_MAX_ADVANCES = 50
# If an update shrinks a row's squared norm below this share, too few digits of G are left.
_MAX_SHRINKAGE = 0.01
# Squared norms outside this range are computed in float64.
_SAFE_SQUARES = (1e-30, 1e30)
_BLOCKS = 8  # of rows; with symmetry, 56% of the products are computed


@dataclass(frozen=True)
class GramMatrix:
    """G of one current weight.

    Attributes:
        matrix: ``(d_out, d_out)``, float32 or float64, on the weight's device; never changed in place.
        advances: updates applied to it since it was computed from the weight.
    """

    matrix: Tensor
    advances: int = 0

    @classmethod
    def of(cls, weight: Tensor) -> GramMatrix:
        """G of a weight ``(d_out, d_in)`` of any floating dtype."""
        if weight.dtype == torch.float64 or weight.shape[0] <= FLOAT64_SIDE:
            return cls(_product(weight, torch.float64))
        matrix = _product(weight, torch.float32)
        squares = matrix.diagonal()
        low, high = _SAFE_SQUARES
        doubtful = (squares < low) | (squares > high)
        if bool(doubtful.any()) and bool(weight[doubtful].any()):  # zero rows are exact
            matrix = _product(weight, torch.float64)
        return cls(matrix)

    def after(self, weight: Tensor, update: LowRankUpdate) -> GramMatrix | None:
        """G of ``weight + update``, by products of width n.

        Args:
            weight: ``(d_out, d_in)``, before the update.
            update: the update that will be added.

        Returns:
            None where G must be computed from the new weight: after 50 updates; if the update cancels nearly all of a
            row; and for half-precision weights, where rounding is as large as the update.
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
    """Whether keeping Gram matrices saves time: each batch's space is computed from them, or updates are low-rank.

    Args:
        native: updates come from the native solver.
    """
    return (hparams.projects and hparams.principal_space == "current") or (native and hparams.method.is_low_rank)


class GramMatrices(Mapping[int, Tensor]):
    """Gram matrices by layer during one batch, computed on first access and then kept up to date.

    Only weights with d_out <= d_in have an entry; for others G would be larger than ``W^T W``.

    Args:
        editable: the model with the current weights.
        carried: Gram matrices from the last batch.
        layers: layers to offer.

    Attributes:
        carried: Gram matrices for the next batch; layers that were never accessed have none.
    """

    def __init__(self, editable: EditableModel, carried: Mapping[int, GramMatrix], layers: list[int]) -> None:
        self._editable = editable
        self._layers = [layer for layer in layers if editable.weight(layer).shape[0] <= editable.d_in(layer)]
        self.carried = {layer: carried[layer] for layer in self._layers
                        if layer in carried and carried[layer].matrix.device == editable.device(layer)}

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self._layers:
            raise KeyError(layer)
        if layer not in self.carried:
            self.carried[layer] = GramMatrix.of(self._editable.weight(layer))
        return self.carried[layer].matrix

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def advance(self, layer: int, update: LowRankUpdate | Tensor) -> None:
        """Apply an update to a layer's G; call it before the update is added to the weight.

        After a dense update, G is recomputed from the new weight, which is cheaper.
        """
        carried = self.carried.pop(layer, None)
        if carried is None or not isinstance(update, LowRankUpdate):
            return
        advanced = carried.after(self._editable.weight(layer), update)
        if advanced is not None:
            self.carried[layer] = advanced

    def forget(self, layer: int) -> None:
        """Drop a layer's G, since its weight was changed by other means than an update."""
        self.carried.pop(layer, None)


def _product(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``W W^T`` in this dtype, from the blocks on and above the diagonal."""
    side = weight.shape[0]
    gram = torch.empty((side, side), dtype=dtype, device=weight.device)
    rows = max(256, -(-side // _BLOCKS))
    parts = list(blocks(side, rows))
    for position, i in enumerate(parts):
        left = weight[i].to(dtype)
        for j in parts[position:]:
            product = left @ (left if i == j else weight[j].to(dtype)).T
            gram[i, j] = product
            if i != j:
                gram[j, i] = product.T
    return gram
