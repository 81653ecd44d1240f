"""PRUNE (arXiv 2405.16821): limits the singular values of the whole change since the pretrained weight."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .memit import MEMIT

if TYPE_CHECKING:
    from ..hparams import SPHEREHyperParams


class PRUNE(MEMIT):
    """MEMIT, with the singular values of the whole change limited in the weights that are evaluated and saved."""

    name = "PRUNE"
    is_low_rank = False
    restrains_whole_change = True
    offered_to_easyedit = True
    starting_values: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {**MEMIT.starting_values, "principal_space": "pretrained", "prune_log_base": None})

    def restrain_whole_change(self, change: Tensor, original: Tensor, hparams: SPHEREHyperParams) -> Tensor:
        return prune(change, original, hparams.prune_log_base)


def prune(change: Tensor, original: Tensor, log_base: float | None = None) -> Tensor:
    """Limit the singular values of a change to little more than the largest one of the original weight.

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
    limited = (values.log() - limit.log()) / scale + limit
    # Only the surplus is subtracted, so that the part below the limit stays exact.
    surplus = torch.where(above, values - limited, torch.zeros_like(values))
    restrained: Tensor = change - (left * surplus) @ right
    return restrained
