"""RECT and PRUNE: how they restrain a weight change. Tensors only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_RECT_EPSILON = 1e-8  # EasyEdit's and the authors': keeps a zero weight from dividing


def rect(update: Tensor, weight: Tensor, keep: float = 0.4) -> Tensor:
    """RECT: keep the entries that change most relative to their weight, zero the others.

    Kept are those with ``|dW / (W + 1e-8)|`` at or above the value of rank ``int((1 - keep) * numel)``.

    Args:
        update: dW ``(d_out, d_in)``.
        weight: W ``(d_out, d_in)`` before the update.
        keep: share of entries kept, in (0, 1].

    Raises:
        ValueError: keep is out of range, or the shapes differ.
    """
    if not 0.0 < keep <= 1.0:
        raise ValueError(f"rect_keep is {keep}; give a share in (0, 1]")
    if update.shape != weight.shape:
        raise ValueError(f"update {tuple(update.shape)} and weight {tuple(weight.shape)} differ in shape")
    rank = int((1 - keep) * update.numel())
    if rank < 1:
        return update.clone()
    change = (update / (weight.to(update.dtype) + _RECT_EPSILON)).abs()
    threshold = change.flatten().kthvalue(rank).values
    return torch.where(change >= threshold, update, torch.zeros_like(update))


def prune(change: Tensor, original: Tensor, log_base: float | None = None) -> Tensor:
    """PRUNE: bring the singular values of a change down to little more than the original weight's largest.

    Singular values s above ``s_max(W0)`` become ``log_b(s) - log_b(s_max) + s_max``; the others stay.

    Args:
        change: whole change ``W - W0`` since the pretrained weight, ``(d_out, d_in)``.
        original: W0 ``(d_out, d_in)``.
        log_base: b, above 1; None for the natural logarithm.

    Raises:
        ValueError: the base is not above 1, the shapes differ, or the original weight is zero.
    """
    if log_base is not None and not log_base > 1.0:
        raise ValueError(f"prune_log_base is {log_base}; give a base above 1, or null for the natural logarithm")
    if change.shape != original.shape:
        raise ValueError(f"change {tuple(change.shape)} and original {tuple(original.shape)} differ in shape")
    limit = torch.linalg.matrix_norm(original.to(change.dtype), ord=2)
    if not bool(limit > 0):
        raise ValueError("the original weight is all zero: PRUNE has no singular value to bound the change by")
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    above = values > limit
    if not bool(above.any()):
        return change.clone()
    scale = 1.0 if log_base is None else math.log(log_base)
    shaped = (values.log() - limit.log()) / scale + limit
    # Only what changes is subtracted: the part below the limit stays exact.
    surplus = torch.where(above, values - shaped, torch.zeros_like(values))
    restrained: Tensor = change - (left * surplus) @ right
    return restrained
