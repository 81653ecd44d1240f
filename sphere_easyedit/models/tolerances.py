"""Numerical tolerances of the checks that compare a model's own computation with ours."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def is_full_precision(*values: Tensor) -> bool:
    """Whether all tensors are float32 or wider, rather than half precision."""
    return min(value.element_size() for value in values) >= 4


def tolerance(*values: Tensor) -> float:
    """Largest relative error at which two computations in these tensors' precision count as the same."""
    return 1e-3 if is_full_precision(*values) else 5e-2


def relative_difference(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in float64; infinite if the reference is 0."""
    reference = reference.double()
    size = float(reference.norm())
    return float((value.to(reference.device, torch.float64) - reference).norm()) / size if size else math.inf
