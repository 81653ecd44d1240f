"""Input checks, row norms and block-wise products shared by the hyperspherical energy and the projection."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def blocks(count: int, size: int) -> Iterator[slice]:
    """Consecutive slices of at most ``size`` that cover ``range(count)``."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def row_norms(matrix: Tensor, block_rows: int, dtype: torch.dtype = torch.float64, rescaled: bool = False) -> Tensor:
    """Euclidean norm of each row, ``(rows,)``, computed in ``dtype``.

    Args:
        matrix: ``(rows, columns)``.
        block_rows: rows copied to ``dtype`` at a time.
        rescaled: divide the rows of a float64 matrix by their largest entry first, since their squares may over- or
            underflow. Those of narrower types cannot in float64.
    """
    norms = torch.zeros(matrix.shape[0], dtype=dtype, device=matrix.device)
    if matrix.numel() == 0:
        return norms
    for block in blocks(matrix.shape[0], block_rows):
        part = matrix[block].to(dtype)
        if rescaled and matrix.dtype == torch.float64:
            peak = torch.linalg.vector_norm(part, ord=math.inf, dim=1)
            scale = torch.where(peak > 0, peak, 1.0)
            norms[block] = torch.linalg.vector_norm(part / scale[:, None], dim=1) * peak
        else:
            norms[block] = torch.linalg.vector_norm(part, dim=1)
    return norms


def unit_rows(weight: Tensor, norms: Tensor, index: slice | Tensor, dtype: torch.dtype) -> Tensor:
    """Chosen rows scaled to unit norm in ``dtype``, a new tensor; zero rows stay zero."""
    divisor = torch.where(norms[index] > 0, norms[index], 1.0)
    return weight[index].to(dtype) / divisor.to(dtype)[:, None]


def cosine_blocks(
    weight: Tensor, norms: Tensor, dtype: torch.dtype, block_rows: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Cosines between rows, block by block on and above the diagonal, as ``(rows i, rows j, cosines)``."""
    parts = list(blocks(weight.shape[0], block_rows))
    for position, i in enumerate(parts):
        left = unit_rows(weight, norms, i, dtype)
        for j in parts[position:]:
            # Scaling a block again for every partner costs memory traffic, a few percent of the product;
            # keeping all of them would be a second copy of the weight.
            right = left if i == j else unit_rows(weight, norms, j, dtype)
            yield i, j, left @ right.T


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own dtype if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def as_number(value: object) -> float:
    """``value`` as a float; NaN if it is not one number, or a bool."""
    if isinstance(value, bool):
        return math.nan
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def check_floating(name: str, tensor: Tensor) -> None:
    """Refuse what is not a floating point tensor (ValueError)."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}; wrap it in torch.as_tensor")
    if not tensor.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {tensor.dtype}; dequantise it or call .float()")


def check_matrix(name: str, matrix: Tensor) -> None:
    """Refuse what is not a floating point matrix (ValueError)."""
    check_floating(name, matrix)
    if matrix.dim() != 2:
        raise ValueError(
            f"{name} must be 2-D (d_out, d_in), got shape {tuple(matrix.shape)}; flatten or select one matrix"
        )


def check_norms(name: str, norms: Tensor) -> None:
    """Refuse a matrix whose row norms are not finite (ValueError)."""
    bad = int((~norms.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name} must be finite, but {bad} of its {len(norms)} rows hold NaN or infinity (or overflow); "
            "look for a diverged edit or a broken checkpoint, and pass a finite tensor"
        )


def check_gram_dtype(gram: Tensor) -> None:
    """Refuse a Gram matrix narrower than float32 (ValueError)."""
    if gram.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"gram must be float32 or float64, got {gram.dtype}; accumulate W W^T in float32 or better")
