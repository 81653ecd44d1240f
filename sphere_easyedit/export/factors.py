"""Low-rank factors of a weight change, with their approximation error.

Shape legend: (m, n) of the change; r the rank.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Factors:
    """``left @ right``, an approximation of a change of shape ``(m, n)``.

    Attributes:
        left: ``(m, r)``.
        right: ``(r, n)``.
        relative_error: ``||change - left right||_F / ||change||_F`` of the factors as rounded; 0 if the change is 0.
    """

    left: Tensor
    right: Tensor
    relative_error: float

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.right.shape[0]


class Spectrum:
    """The singular vectors of a change, from which factors of any rank are computed.

    They are the eigenvectors U of the smaller Gram matrix, in float64; ``U_r U_r^T change`` is the best approximation
    of rank r (Eckart and Young), up to the accuracy of 1e-8 of the largest singular value that squaring costs. Errors
    of factors are measured, not summed from the spectrum.

    Args:
        change: ``(m, n)``, of any floating dtype.
    """

    def __init__(self, change: Tensor) -> None:
        change = change.detach().double()
        self._tall = change.shape[0] > change.shape[1]
        self._change = change.T if self._tall else change  # wide from here on
        self.norm = float(change.norm())
        logger.debug("computing the singular vectors of a change of %d x %d", *change.shape)
        eigenvalues, vectors = torch.linalg.eigh(self._change @ self._change.T)
        self._squares = eigenvalues.flip(0).clamp(min=0.0)  # of the singular values, descending
        self._vectors = vectors.flip(1)

    @property
    def full_rank(self) -> int:
        """The largest possible rank, min(m, n)."""
        return len(self._squares)

    def rank_within(self, tolerance: float) -> int:
        """The smallest rank with a relative error of at most ``tolerance``, by the spectrum."""
        left = self._squares.flip(0).cumsum(0).flip(0)  # squared error with ranks 0, 1, ...
        return int((left > (tolerance * self.norm) ** 2).sum())

    def factors(self, rank: int, dtype: torch.dtype) -> Factors:
        """The best factors of a rank, rounded to a dtype.

        Each contains the square roots of the singular values, which keeps both within a narrow dtype's range.

        Args:
            rank: 0 to ``full_rank``.

        Raises:
            ValueError: the rank is out of range, or the dtype can't hold the factors.
        """
        if not 0 <= rank <= self.full_rank:
            raise ValueError(f"rank {rank} is out of range for a change of full rank {self.full_rank}: give 0 to "
                             f"{self.full_rank}")
        vectors = self._vectors[:, :rank]
        right = vectors.T @ self._change
        roots = right.norm(dim=1).sqrt()
        left = (vectors * roots).to(dtype)
        right = (right / torch.where(roots > 0, roots, 1.0).unsqueeze(1)).to(dtype)
        if not bool(left.isfinite().all() and right.isfinite().all()):
            raise ValueError(f"the factors of the change exceed the range of {dtype}: store them in float32")
        missing = float((self._change - left.double() @ right.double()).norm())
        error = missing / self.norm if self.norm else 0.0
        return Factors(right.T.contiguous(), left.T.contiguous(), error) if self._tall else Factors(
            left.contiguous(), right.contiguous(), error)
