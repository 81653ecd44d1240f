"""A weight change in two thin factors, with the error that they leave. Tensors only.

Shape legend: m, n of the change; r the rank.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factors:
    """``left @ right``, which stands for a change of shape ``(m, n)``.

    Attributes:
        left: ``(m, r)``.
        right: ``(r, n)``.
        relative_error: ``||change - left right||_F / ||change||_F`` of these very factors, rounded as they are; 0 where
            there is no change.
    """

    left: Tensor
    right: Tensor
    relative_error: float

    @property
    def rank(self) -> int:
        """r."""
        return self.right.shape[0]


class Spectrum:
    """The singular directions of one change, from which factors of any rank are made.

    They are eigenvectors U of the smaller Gram matrix, in float64; ``U_r U_r^T change`` is the best approximation of
    rank r by Eckart and Young, to the 1e-8 of the largest singular value that squaring costs. Errors are measured, not
    summed up from the spectrum.

    Args:
        change: ``(m, n)``, of any floating dtype.
    """

    def __init__(self, change: Tensor) -> None:
        change = change.detach().double()
        self._tall = change.shape[0] > change.shape[1]
        self._change = change.T if self._tall else change  # wide from here on
        self.norm = float(change.norm())
        logger.debug("finding the directions of a change of %d x %d", *change.shape)
        eigenvalues, vectors = torch.linalg.eigh(self._change @ self._change.T)
        self._squares = eigenvalues.flip(0).clamp(min=0.0)  # of the singular values, falling
        self._vectors = vectors.flip(1)

    @property
    def full_rank(self) -> int:
        """The smaller side: as much as any rank can be."""
        return len(self._squares)

    def rank_within(self, tolerance: float) -> int:
        """The smallest rank whose relative error is at most this, by the spectrum."""
        left = self._squares.flip(0).cumsum(0).flip(0)  # squared error with ranks 0, 1, ...
        return int((left > (tolerance * self.norm) ** 2).sum())

    def factors(self, rank: int, dtype: torch.dtype) -> Factors:
        """The best factors of a rank, stored in a dtype, with the error that they leave then.

        Both carry the root of each singular value, so that neither leaves a narrow dtype's range before it must.

        Args:
            rank: 0 to ``full_rank``.

        Raises:
            ValueError: the rank is out of range, or the dtype can't hold the factors.
        """
        if not 0 <= rank <= self.full_rank:
            raise ValueError(f"rank {rank} does not fit a change of {self.full_rank} directions: give 0 to "
                             f"{self.full_rank}")
        vectors = self._vectors[:, :rank]
        right = vectors.T @ self._change
        roots = right.norm(dim=1).sqrt()
        left = (vectors * roots).to(dtype)
        right = (right / torch.where(roots > 0, roots, 1.0).unsqueeze(1)).to(dtype)
        if not bool(left.isfinite().all() and right.isfinite().all()):
            raise ValueError(f"the factors of the change leave the range of {dtype}: store them in float32")
        rest = float((self._change - left.double() @ right.double()).norm())
        error = rest / self.norm if self.norm else 0.0
        return Factors(right.T.contiguous(), left.T.contiguous(), error) if self._tall else Factors(
            left.contiguous(), right.contiguous(), error)
