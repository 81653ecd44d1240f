"""Closed forms of MEMIT and AlphaEdit, solved in the space of the keys. Tensors only.

Both methods weigh keys by a matrix ``M = B B^T`` and solve with a ridge c: with A all keys that count (earlier ones
and the batch's own, K) and ``Y = B^T A``,

    adjusted keys = (M A A^T + c I)^-1 M K = B Y (Y^T Y + c I)^-1 E,    dW = R (adjusted keys)^T,

where E picks the batch's columns. MEMIT has ``M = (lambda C)^-1`` and c = 1, which is ``(lambda C + A A^T)^-1 K``;
AlphaEdit has ``M = P0`` and c = L2. The system is as small as the number of keys; where there are more keys than B has
columns, the equal form ``B (Y Y^T + c I)^-1 Y E`` is smaller still.

Shape legend: d_out, d_in of the weight; n edits in the batch; m earlier keys; q columns of B.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Largest relative residual a solution may leave before the plain solve takes over.
_MAX_RESIDUAL = 1e-5


@dataclass(frozen=True)
class LowRankUpdate:
    """A weight change ``dW = values @ keys.T``, one column an edit: values ``(d_out, n)``, keys ``(d_in, n)``."""

    values: Tensor
    keys: Tensor

    def dense(self) -> Tensor:
        """The change ``(d_out, d_in)``."""
        return self.values @ self.keys.T


class KeyMetric(Protocol):
    """How a method weighs keys: ``M = B B^T`` with the ridge c."""

    ridge: float

    def coordinates(self, keys: Tensor) -> Tensor:
        """``B^T K`` ``(q, n)`` float64 of keys ``(d_in, n)``."""

    def lift(self, coordinates: Tensor) -> Tensor:
        """``B Y`` ``(d_in, n)`` float64 of coordinates ``(q, n)``."""


class NullSpaceMetric:
    """AlphaEdit's: ``M = P0 = V V^T``, the projection on the null space of old knowledge; c = L2.

    Args:
        basis: V ``(d_in, q)``, orthonormal columns.
        l2: the ridge, above 0.
    """

    def __init__(self, basis: Tensor, l2: float) -> None:
        self.basis, self.ridge = basis, l2

    def coordinates(self, keys: Tensor) -> Tensor:
        return (self.basis.T @ keys.to(self.basis.dtype)).double()

    def lift(self, coordinates: Tensor) -> Tensor:
        return (self.basis @ coordinates.to(self.basis.dtype)).double()


class CovarianceMetric:
    """MEMIT's: ``M = (lambda C)^-1`` by the Cholesky factor of ``lambda C = L L^T``, made once; c = 1.

    Args:
        moment: C ``(d_in, d_in)``, positive definite.
        weight: lambda (mom2_update_weight).

    Raises:
        torch.linalg.LinAlgError: the matrix is not positive definite.
    """

    def __init__(self, moment: Tensor, weight: float) -> None:
        self.ridge = 1.0
        self._factor = torch.linalg.cholesky(weight * moment.double())  # (d_in, d_in)

    def coordinates(self, keys: Tensor) -> Tensor:
        out: Tensor = torch.linalg.solve_triangular(self._factor, keys.double(), upper=False)
        return out

    def lift(self, coordinates: Tensor) -> Tensor:
        out: Tensor = torch.linalg.solve_triangular(self._factor.T, coordinates, upper=True)
        return out


class KeyHistory:
    """Earlier keys ``(d_in, m)`` of one layer, and the products with themselves that every solve needs again."""

    def __init__(self, keys: Tensor, metric: KeyMetric | None) -> None:
        self.keys = keys
        self.coordinates = None if metric is None else metric.coordinates(keys)  # (q, m)
        self._gram = None if self.coordinates is None else self.coordinates.T @ self.coordinates  # (m, m)

    @classmethod
    def empty(cls, d_in: int, metric: KeyMetric | None, device: torch.device) -> KeyHistory:
        """A history without keys."""
        return cls(torch.zeros(d_in, 0, device=device), metric)

    def extended(self, keys: Tensor, metric: KeyMetric | None) -> KeyHistory:
        """This history with more keys ``(d_in, n)`` behind it; only the new products are computed."""
        longer = KeyHistory.__new__(KeyHistory)
        longer.keys = torch.cat([self.keys, keys.to(self.keys)], dim=1)
        longer.coordinates = longer._gram = None
        if metric is not None and self.coordinates is not None and self._gram is not None:
            fresh = metric.coordinates(keys)
            longer.coordinates = torch.cat([self.coordinates, fresh], dim=1)
            longer._gram = _bordered(self._gram, self.coordinates.T @ fresh, fresh.T @ fresh)
        return longer

    def gram_with(self, coordinates: Tensor) -> Tensor:
        """``Y^T Y`` ``(m + n, m + n)`` of the earlier keys and ``n`` new ones, given by coordinates."""
        assert self._gram is not None  # made with the coordinates, which the caller has found to be there
        assert self.coordinates is not None
        return _bordered(self._gram, self.coordinates.T @ coordinates, coordinates.T @ coordinates)


def _bordered(corner: Tensor, side: Tensor, end: Tensor) -> Tensor:
    return torch.cat([torch.cat([corner, side], dim=1), torch.cat([side.T, end], dim=1)], dim=0)


def adjusted_keys(metric: KeyMetric, keys: Tensor, history: KeyHistory | None = None) -> Tensor | None:
    """``(M A A^T + c I)^-1 M K`` for the batch's keys K and all keys A.

    Args:
        metric: the method's M and c.
        keys: K ``(d_in, n)``.
        history: earlier keys; None or empty where only the batch's own count.

    Returns:
        ``(d_in, n)`` float64, or None where the factorisation failed or left a residual above 1e-5.
    """
    new = metric.coordinates(keys)  # (q, n)
    earlier = history.coordinates if history is not None and history.keys.shape[1] else None
    every = new if earlier is None else torch.cat([earlier, new], dim=1)  # Y (q, m + n)
    wide = every.shape[1] > every.shape[0]
    if wide:
        system = every @ every.T
    elif earlier is None or history is None:
        system = new.T @ new
    else:
        system = history.gram_with(new)
    system.diagonal().add_(metric.ridge)
    factor, failed = torch.linalg.cholesky_ex(system)
    if int(failed):
        logger.warning("Cholesky factorisation of the %d key system failed", len(system))
        return None
    if wide:
        solution = torch.cholesky_solve(new, factor)  # (q, n)
    else:
        pick = torch.zeros(len(system), new.shape[1], dtype=system.dtype, device=system.device)
        pick[-new.shape[1]:] = torch.eye(new.shape[1], dtype=system.dtype, device=system.device)
        solution = every @ torch.cholesky_solve(pick, factor)
    residual = every @ (every.T @ solution) + metric.ridge * solution - new
    relative = float(residual.norm() / new.norm().clamp(min=torch.finfo(new.dtype).tiny))
    if not relative < _MAX_RESIDUAL:
        logger.warning("the key system's solution leaves a relative residual of %.1e", relative)
        return None
    return metric.lift(solution)


def plain_memit_keys(moment: Tensor, weight: float, keys: Tensor, history: KeyHistory | None = None) -> Tensor:
    """``(lambda C + A A^T)^-1 K`` by one dense solve in the space of d_in, where the factored way fails.

    Raises:
        torch.linalg.LinAlgError: the matrix is singular to the precision that C is known to.
    """
    system = weight * moment.double()
    for part in (keys, None if history is None else history.keys):
        if part is not None:
            system = system + part.double() @ part.double().T
    sizes = torch.linalg.eigvalsh(system).abs()
    # C comes in float32: below its rounding an eigenvalue is noise, and dividing by it no solution.
    if not bool(sizes.min() > torch.finfo(torch.float32).eps * sizes.max()):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"eigenvalues between {float(sizes.min()):.1e} and {float(sizes.max()):.1e}")
    solved: Tensor = torch.linalg.solve(system, keys.double())
    return solved


def plain_alphaedit_keys(basis: Tensor, l2: float, keys: Tensor, history: KeyHistory | None = None) -> Tensor:
    """``(P0 A A^T + L2 I)^-1 P0 K`` by one dense solve in the space of d_in, where the factored way fails."""
    projection = basis.double() @ basis.double().T
    outer = keys.double() @ keys.double().T
    if history is not None:
        outer = outer + history.keys.double() @ history.keys.double().T
    system = projection @ outer
    system.diagonal().add_(l2)
    solved: Tensor = torch.linalg.solve(system, projection @ keys.double())
    return solved
