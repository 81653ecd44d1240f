"""Norms and unit vectors of a weight's rows, computed in blocks of rows so that no copy of the weight is made.

Shape legend: d_out neurons (rows) of d_in inputs each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

COPY_ELEMENTS: Final = 4 * 2**20  # elements in a float64 copy of some rows: 32 MiB


def row_blocks(count: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` rows that cover ``count`` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def row_norms(matrix: Tensor, name: str = "weight", rescaled: bool = False) -> Tensor:
    """Euclidean norm of each row, ``(d_out,)`` float64.

    Args:
        matrix: ``(d_out, d_in)``, any floating dtype.
        name: what an error calls the matrix.
        rescaled: divide rows of a float64 matrix by their largest entry first, so that squares neither overflow nor
            underflow; the last digit may differ. Narrower dtypes cannot overflow in float64.

    Raises:
        ValueError: a row holds nan or infinity, or its norm overflows.
    """
    count, width = matrix.shape
    norms = torch.zeros(count, dtype=torch.float64, device=matrix.device)
    for block in row_blocks(count, max(1, COPY_ELEMENTS // max(1, width))) if matrix.numel() else ():
        part = matrix[block].to(torch.float64)
        if rescaled and matrix.dtype == torch.float64:
            peak = torch.linalg.vector_norm(part, ord=math.inf, dim=1)
            scale = torch.where(peak > 0, peak, 1.0)
            norms[block] = torch.linalg.vector_norm(part / scale[:, None], dim=1) * peak
        else:
            norms[block] = torch.linalg.vector_norm(part, dim=1)
    bad = int((~norms.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name} must be finite, but {bad} of its {count} rows hold NaN or infinity (or overflow); "
            "look for a diverged edit or a broken checkpoint, and pass a finite tensor"
        )
    return norms


def unit_rows(weight: Tensor, norms: Tensor, index: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """Chosen rows scaled to unit norm, a new tensor ``(n, d_in)``; zero rows stay zero.

    Args:
        weight: ``(d_out, d_in)``.
        norms: ``(d_out,)``, from :func:`row_norms`.
        index: of the rows.
        dtype: of the result.
    """
    divisor = torch.where(norms[index] > 0, norms[index], 1.0)
    return weight[index].to(dtype) / divisor.to(dtype)[:, None]
