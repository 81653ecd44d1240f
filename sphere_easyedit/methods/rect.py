"""RECT (arXiv 2401.04700): keeps the entries of an update that are largest relative to their weight."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.updates import Update, dense
from .memit import MEMIT

if TYPE_CHECKING:
    from ..hparams import SPHEREHyperParams

_RECT_EPSILON = 1e-8  # EasyEdit's and the authors'; avoids division by zero


class RECT(MEMIT):
    """MEMIT, of whose updates only the relatively largest entries are kept."""

    name = "RECT"
    is_low_rank = False
    offered_to_easyedit = True
    starting_values: ClassVar[Mapping[str, Any]] = MappingProxyType({**MEMIT.starting_values, "rect_keep": 0.4})

    def restrain(self, update: Update, weight: Tensor, hparams: SPHEREHyperParams) -> Update:
        return rect(dense(update), weight, hparams.rect_keep)


def rect(update: Tensor, weight: Tensor, keep: float = 0.4) -> Tensor:
    """Keep the entries that are largest relative to their weight, and set the others to zero.

    Entries are kept if ``|dW / (W + 1e-8)|`` is at least the value of rank ``int((1 - keep) * numel)``.

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
