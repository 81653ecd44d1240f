"""Share of the keys' second moment in the principal space, flatness of the spectrum, alignment of updates.

Shape legend: d_out neurons (rows) of d_in inputs each, r rank of the principal space, U ``(d_in, r)`` its directions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from sphere_easyedit.callbacks.spaces import SpaceShare, check_rows, double_blocks, share_in
from sphere_easyedit.core.projection import PrincipalSpace

GAMMAS: Final = (0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class RowSpectrum:
    """How a weight's row directions spread, by the eigenvalues p of ``What^T What`` scaled to sum 1.

    Attributes:
        effective_rank: ``exp(-sum p ln p)``.
        participation: ``1 / sum p^2``.
        rank: numerical rank.
        ranks_at: rank of the principal space by gamma (Eq. 10, 11).
        d_in: width, the most that any of them can be.
    """

    effective_rank: float
    participation: float
    rank: int
    ranks_at: Mapping[float, int]
    d_in: int


@dataclass(frozen=True)
class UpdateAlignment:
    """How an update repeats the one before it.

    Attributes:
        cosine: ``<dW_1, dW_2>_F / (||dW_1||_F ||dW_2||_F)``; nan where one is zero.
        shared: share of the later one in the leading row space of the earlier one, against chance.
        directions: of that space.
    """

    cosine: float
    shared: SpaceShare
    directions: int


def moment_share(moment: Tensor, space: PrincipalSpace) -> SpaceShare:
    """``tr(U^T C U) / tr C`` of a second moment C of keys, against ``r / d_in``: ``principal_share`` of all the keys
    that it sums up.

    Args:
        moment: C ``(d_in, d_in)``, symmetric; of any scale.
        space: of d_in inputs.

    Raises:
        ValueError: C is no finite floating ``(d_in, d_in)`` tensor.
    """
    check_rows(moment, "moment", space.d_in)
    if moment.shape[0] != moment.shape[1]:
        raise ValueError(f"moment must be square, got shape {tuple(moment.shape)}: give C = K K^T")
    basis = space.directions.double()
    inside = sum(float((basis[block] * (part @ basis)).sum()) for block, part in double_blocks(moment))
    total = float(moment.diagonal().double().sum())
    return SpaceShare(inside / total if total else math.nan, space.rank / space.d_in)


def row_spectrum(weight: Tensor, gammas: Sequence[float] = GAMMAS) -> RowSpectrum:
    """Effective rank of ``What^T What`` and ranks at gamma; a whole eigenproblem of the smaller side for each.

    Args:
        weight: ``(d_out, d_in)``, rows are neurons.
        gammas: each in [0, 1].

    Raises:
        ValueError: as ``PrincipalSpace.from_weight``; or all rows are zero.
    """
    whole = PrincipalSpace.from_weight(weight, 1.0)
    values = whole.spectrum.clamp(min=0.0)
    if not len(values):
        raise ValueError("weight has no row that is not zero: it has no direction")
    shares = values / values.sum()
    return RowSpectrum(effective_rank=float(torch.special.entr(shares).sum().exp()),
                       participation=float(1.0 / shares.square().sum()), rank=whole.rank,
                       ranks_at={gamma: PrincipalSpace.from_weight(weight, gamma).rank for gamma in gammas},
                       d_in=whole.d_in)


def update_alignment(earlier: Tensor, later: Tensor, energy: float = 0.9) -> UpdateAlignment:
    """Whether an update goes where the one before it went: in the space of matrices, and in that of inputs.

    The leading row space of the earlier update is spanned by its first right singular vectors, as many as hold the
    share ``energy`` of its squared norm; chance is their number over d_in.

    Args:
        earlier, later: ``(d_out, d_in)``, on one device.
        energy: in (0, 1].

    Raises:
        ValueError: the updates are no finite floating matrices of one shape, or energy is out of range.
    """
    if not 0 < energy <= 1:
        raise ValueError(f"energy is {energy}: give a share above 0, at most 1")
    check_rows(earlier, "earlier", earlier.shape[-1] if earlier.dim() else 0)
    check_rows(later, "later", earlier.shape[1])
    if earlier.shape != later.shape:
        raise ValueError(f"the updates have the shapes {tuple(earlier.shape)} and {tuple(later.shape)}: give two of "
                         "one weight")
    first, second = earlier.double(), later.double()
    norms = float(first.norm()) * float(second.norm())
    basis = _leading_rows(first, energy)
    return UpdateAlignment(float((first * second).sum()) / norms if norms else math.nan, share_in(later, basis),
                           basis.shape[1])


def _leading_rows(matrix: Tensor, energy: float) -> Tensor:
    """Right singular vectors ``(d_in, k)`` that hold the share; by the Gram matrix of the smaller side."""
    wide = matrix.shape[0] <= matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    values, vectors = values.flip(0).clamp(min=0.0), vectors.flip(1)
    # Below it a Gram matrix's eigenvalues are rounding.
    rank = int((values > values[0] * len(values) * torch.finfo(torch.float64).eps).sum())
    shares = values.cumsum(0) / values.sum()
    count = min(rank, int((shares < energy).sum()) + 1)
    leading: Tensor = vectors[:, :count]
    return matrix.T @ (leading * values[:count].rsqrt()) if wide else leading
