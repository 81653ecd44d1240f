"""Hyperspherical energy of a weight matrix.

Notation follows SPHERE (arXiv 2510.01172). A weight ``W`` is ``(d_out, d_in)``, the orientation of
``nn.Linear``; its rows ``w_i`` are neurons and ``what_i = w_i / ||w_i||`` are points on the unit hypersphere.
The energy is dimensionless: it depends on directions alone, so it is the same after a rotation, a positive
scaling of rows or a change of their order.

Conventions of all functions:

* **Zero rows** have no direction. They are left out of the sum and out of the count of pairs.
* **Duplicate rows** would have infinite energy. Distances are floored at :data:`DISTANCE_FLOOR`, so that an
  ordered pair of equal directions contributes ``DISTANCE_FLOOR ** -s``: finite, and far above anything
  distinct neurons produce.
* **Fewer than two directions** have energy 0.
* **Precision**: products are float32 for half, bfloat16 and float32 weights and float64 for float64 weights;
  distances, powers and sums are always float64. Pairs too close for ``2 - 2 cos`` are measured again from the
  rows in float64.
* **Memory**: rows are worked through in blocks; neither a scaled copy of the weight nor the whole Gram matrix
  is formed.
* Nothing is differentiated: results carry no graph.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from .tensors import (
    as_number,
    blocks,
    check_gram_dtype,
    check_matrix,
    check_norms,
    cosine_blocks,
    row_norms,
    unit_rows,
)

__all__ = ["DISTANCE_FLOOR", "energy_from_gram", "hyperspherical_energy"]

logger = logging.getLogger(__name__)

#: Smallest distance between two directions that the energy tells apart (dimensionless; the sphere has
#: diameter 2). Float64 differences of unit vectors are exact to about 1e-16, so a distance of 1e-8 is still
#: known to eight digits.
DISTANCE_FLOOR: Final = 1e-8

Reduction = Literal["sum", "mean"]

# 2 - 2 cos loses digits as 1/squared distance. Below these squared distances a pair is measured again: a
# float32 product errs by some 1e-7, which is 4e-7 of 0.25; a float64 one by some 4e-16, which is 4e-12 of
# 1e-4.
_NEAR_FLOAT32: Final = 0.25
_NEAR_FLOAT64: Final = 1e-4
# Without the rows close pairs cannot be measured again: the Gram matrix's rounding bounds their distances.
_GRAM_FLOOR_IN_EPS: Final = 8.0
# A float32 quotient by a norm outside this range would lose digits to overflow or to denormals.
_SAFE_NORM: Final = (1e-30, 1e30)
_PANEL_BYTES: Final = 64 * 2**20  # one block of unit rows; two are alive at a time
_MAX_BLOCK_ROWS: Final = 2048  # a float64 block of distances then takes 32 MiB
_COPY_ELEMENTS: Final = 4 * 2**20  # elements in a float64 copy of some rows: 32 MiB
_REFINE_ROWS: Final = 256


def hyperspherical_energy(weight: Tensor, s: float = 1.0, reduction: Reduction = "sum") -> Tensor:
    """Hyperspherical energy of a weight's rows (Eq. 5, 6): ``sum over i != j of 1 / ||what_i - what_j||^s``.

    Args:
        weight: ``(d_out, d_in)``, rows are neurons; any floating dtype, any device.
        s: exponent of the Riesz kernel, above 0; the paper uses 1. From about 38 on, duplicate rows give
            ``inf``.
        reduction: ``"sum"`` over ordered pairs, or ``"mean"`` per ordered pair, which compares across widths.

    Returns:
        Float64 scalar on the weight's device, dimensionless. Zero rows, duplicates: see the module's text.

    Raises:
        ValueError: the weight is not a finite floating 2-D tensor, or s or reduction is out of range.

    Shape legend: d_out neurons (rows), d_in inputs of each.
    """
    _check_energy_options(s, reduction)
    with torch.no_grad():
        rows = _Rows.of(weight)
        pairs = _Pairs(rows.alive, rows, _near(rows.work), DISTANCE_FLOOR**2)
        sums = _pair_sums(_weight_cosines(rows), pairs, 0.5 * s)
        return _reduce(sums, rows.alive, reduction)


def energy_from_gram(
    gram: Tensor, s: float = 1.0, reduction: Reduction = "sum", weight: Tensor | None = None
) -> Tensor:
    """Hyperspherical energy (Eq. 5, 6) from a raw Gram matrix ``G = W W^T``, at no cost in ``d_in``.

    Args:
        gram: ``(d_out, d_out)`` symmetric, not normalised; float32 or float64. Only its diagonal and upper
            half are read. A row whose diagonal entry is 0 (or negative by rounding) counts as a zero row.
        s: exponent of the Riesz kernel, above 0.
        reduction: ``"sum"`` or ``"mean"`` per ordered pair.
        weight: ``(d_out, d_in)``, the W that gram was computed from. With it, pairs too close for the Gram matrix's
            precision are measured again from the rows, and the result is as exact as
            :func:`hyperspherical_energy`. Without it, distances are floored at ``sqrt(8 eps)`` of gram's
            dtype: 1e-3 for float32, 4e-8 for float64.

    Returns:
        Float64 scalar on gram's device, dimensionless.

    Raises:
        ValueError: gram is not a finite square float32 or float64 matrix with a non-negative diagonal, weight
            does not belong to it by shape or device, or an option is out of range.
    """
    _check_energy_options(s, reduction)
    with torch.no_grad():
        gram = _checked_gram(gram)
        norms = gram.diagonal().to(torch.float64).clamp(min=0.0).sqrt()
        rows = None if weight is None else _rows_of_gram(weight, gram)
        pairs = _Pairs(
            alive=norms > 0,
            rows=rows,
            near=_near(gram.dtype),
            floor=DISTANCE_FLOOR**2 if rows is not None else _gram_floor(gram.dtype),
        )
        sums = _pair_sums(_gram_cosines(gram, norms), pairs, 0.5 * s)
        return _reduce(sums, pairs.alive, reduction)


# --- rows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rows:
    """A weight's rows and their norms."""

    weight: Tensor  # (d_out, d_in), as given
    norms: Tensor  # (d_out,) float64
    alive: Tensor  # (d_out,) bool: has a direction
    work: torch.dtype  # of the products

    @classmethod
    def of(cls, weight: Tensor) -> _Rows:
        check_matrix("weight", weight)
        weight = weight.detach()
        norms = row_norms(weight, max(1, _COPY_ELEMENTS // max(1, weight.shape[1])), rescaled=True)
        check_norms("weight", norms)
        alive = norms > 0
        low, high = _SAFE_NORM
        extreme = bool(((norms > high) | ((norms < low) & alive)).any())
        exact = weight.dtype == torch.float64 or extreme
        return cls(weight, norms, alive, torch.float64 if exact else torch.float32)

    def unit(self, index: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Chosen rows scaled to unit norm, a new tensor; zero rows stay zero."""
        return unit_rows(self.weight, self.norms, index, dtype)


def _rows_of_gram(weight: Tensor, gram: Tensor) -> _Rows:
    rows = _Rows.of(weight)
    if weight.shape[0] != gram.shape[0] or weight.device != gram.device:
        raise ValueError(
            f"weight must be the W of gram = W W^T, but weight is {tuple(weight.shape)} on {weight.device} "
            f"and gram {tuple(gram.shape)} on {gram.device}; pass the weight that gram was computed from"
        )
    return rows


# --- pairs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pairs:
    """What the distance of a pair is computed with, besides its cosine."""

    alive: Tensor  # (d_out,) bool
    rows: _Rows | None  # to measure close pairs again; None where there is only a Gram matrix
    near: float  # squared distance under which a pair is close
    floor: float  # least squared distance


def _pair_sums(cosines: Iterator[tuple[slice, slice, Tensor]], pairs: _Pairs, power: float) -> Tensor:
    """``sum_{j != i} (||what_i - what_j||^2)^-power`` for every i, ``(d_out,)`` float64; 0 for zero rows.

    ``cosines`` are the blocks on and above the diagonal: one above stands for its mirror image too.
    """
    sums = torch.zeros(pairs.alive.shape[0], dtype=torch.float64, device=pairs.alive.device)
    for i, j, cosine in cosines:
        squared = cosine.to(torch.float64).mul_(-2.0).add_(2.0)  # (rows i, rows j)
        _exclude(squared, i, j, pairs.alive)
        if pairs.rows is not None:
            _measure_close_pairs(squared, i, j, pairs.rows, pairs.near)
        terms = _inverse_power(squared.clamp_(min=pairs.floor), power)
        sums[i] += terms.sum(dim=1)
        if i != j:
            sums[j] += terms.sum(dim=0)
    return sums


def _inverse_power(squared: Tensor, power: float) -> Tensor:
    """``squared ** -power`` in place; the two powers in common use have fast kernels."""
    if power == 0.5:
        return squared.rsqrt_()
    if power == 1.0:
        return squared.reciprocal_()
    return squared.pow_(-power)


def _exclude(squared: Tensor, i: slice, j: slice, alive: Tensor) -> None:
    """Set the distances of self-pairs and zero rows to infinity, so that they contribute nothing."""
    if i == j:
        squared.fill_diagonal_(math.inf)
    for dead, mirrored in ((~alive[i], squared), (~alive[j], squared.T)):
        if bool(dead.any()):
            mirrored[dead] = math.inf


def _weight_cosines(rows: _Rows) -> Iterator[tuple[slice, slice, Tensor]]:
    """Cosines between rows, block by block on and above the diagonal."""
    count, width = rows.weight.shape
    return cosine_blocks(rows.weight, rows.norms, rows.work, _block_rows(count, width, rows.work))


def _gram_cosines(gram: Tensor, norms: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Cosines as ``cosine_blocks`` gives them, from a raw Gram matrix and the square roots of its diagonal."""
    divisor = torch.where(norms > 0, norms, 1.0)
    parts = list(blocks(gram.shape[0], _MAX_BLOCK_ROWS // 2))
    for position, i in enumerate(parts):
        for j in parts[position:]:
            yield i, j, gram[i, j].to(torch.float64).div(divisor[i][:, None]).div_(divisor[j][None, :])


def _measure_close_pairs(squared: Tensor, i: slice, j: slice, rows: _Rows, near: float) -> None:
    """Recompute squared distances below ``near``, where cancellation costs digits, in place."""
    if float(squared.amin()) >= near:
        return
    # Small tiles bound the float64 copies of rows, whatever the block size.
    for a in blocks(squared.shape[0], _REFINE_ROWS):
        for b in blocks(squared.shape[1], _REFINE_ROWS):
            _measure_tile(squared[a, b], _shift(a, i.start), _shift(b, j.start), rows, near)


def _measure_tile(tile: Tensor, i: slice, j: slice, rows: _Rows, near: float) -> None:
    """Recompute one tile (a view): by a float64 product if many pairs are close, by differences if still too close."""
    close = tile < near
    if near > _NEAR_FLOAT64 and int(close.sum()) * 128 > tile.numel():
        product = rows.unit(i, torch.float64) @ rows.unit(j, torch.float64).T
        tile.copy_(torch.where(close, product.mul_(-2.0).add_(2.0), tile))
        close = tile < _NEAR_FLOAT64
    count = int(close.sum())
    if count * 16 > tile.numel():
        # Nearly all of the tile: differences of whole panels, by the kernel that does not go through
        # products.
        direct = torch.cdist(
            rows.unit(i, torch.float64),
            rows.unit(j, torch.float64),
            compute_mode="donot_use_mm_for_euclid_dist",
        ).square_()
        tile.copy_(torch.where(close, direct, tile))
    elif count:
        first, second = close.nonzero(as_tuple=True)
        tile[first, second] = _direct_squared(rows, first + i.start, second + j.start)


def _direct_squared(rows: _Rows, first: Tensor, second: Tensor) -> Tensor:
    """``||what_a - what_b||^2`` of listed pairs from the rows, ``(pairs,)`` float64: nothing cancels."""
    squared = torch.empty(first.shape[0], dtype=torch.float64, device=first.device)
    for part in blocks(first.shape[0], max(1, _COPY_ELEMENTS // rows.weight.shape[1] // 2)):
        difference = rows.unit(first[part], torch.float64).sub_(rows.unit(second[part], torch.float64))
        squared[part] = difference.square_().sum(dim=1)
    return squared


# --- helpers ------------------------------------------------------------------------------------------------


def _reduce(sums: Tensor, alive: Tensor, reduction: Reduction) -> Tensor:
    total = sums.sum()
    if reduction == "sum":
        return total
    count = int(alive.sum())
    logger.debug("energy per pair over %d directions of %d rows", count, alive.shape[0])
    return total / max(1, count * (count - 1))


def _shift(block: slice, offset: int) -> slice:
    return slice(block.start + offset, block.stop + offset)


def _block_rows(count: int, width: int, dtype: torch.dtype) -> int:
    """Rows per block: a panel fits its budget; four blocks or more let symmetry save work."""
    fit = _PANEL_BYTES // (max(1, width) * dtype.itemsize)
    return max(1, min(fit, _MAX_BLOCK_ROWS, max(256, -(-count // 4))))


def _near(dtype: torch.dtype) -> float:
    return _NEAR_FLOAT64 if dtype == torch.float64 else _NEAR_FLOAT32


def _gram_floor(dtype: torch.dtype) -> float:
    return max(DISTANCE_FLOOR**2, _GRAM_FLOOR_IN_EPS * torch.finfo(dtype).eps)


# --- checks -------------------------------------------------------------------------------------------------


def _checked_gram(gram: Tensor) -> Tensor:
    check_matrix("gram", gram)
    if gram.shape[0] != gram.shape[1]:
        raise ValueError(
            f"gram must be square, W W^T, got shape {tuple(gram.shape)}; of a weight: hyperspherical_energy"
        )
    check_gram_dtype(gram)
    gram = gram.detach()
    if not bool(gram.isfinite().all()):
        raise ValueError(
            f"gram must be finite, but {int((~gram.isfinite()).sum())} entries are not; recompute W W^T"
        )
    diagonal = gram.diagonal()
    # A carried Gram matrix may leave a zero row's entry a rounding error below 0; more than that is no Gram
    # matrix.
    if gram.shape[0] and float(diagonal.min()) < -1e-4 * max(0.0, float(diagonal.max())):
        raise ValueError(
            f"gram must hold squared norms on its diagonal, got {float(diagonal.min())}; recompute W W^T"
        )
    return gram


def _check_energy_options(s: float, reduction: str) -> None:
    number = as_number(s)
    if not math.isfinite(number):
        raise ValueError(f"s must be one finite number, got {s!r}; pass a float")
    if number <= 0.0:
        raise ValueError(f"s must be above 0, got {s!r}; use s=1.0 for the paper's energy")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}; 'sum' is the paper's energy")
