"""Solves the closed forms of MEMIT and AlphaEdit in the space of the keys; works on tensors only.

Both methods weigh keys by a symmetric matrix M and solve with a ridge c. With A all keys (m earlier ones and the
batch's own, K),

    adjusted keys = (M A A^T + c I)^-1 M K = M A S^-1 E,    S = A^T M A + c I,    dW = R (adjusted keys)^T,

where E picks the batch's columns. MEMIT has ``M = (lambda C)^-1`` and c = 1, which is ``(lambda C + A A^T)^-1 K``;
AlphaEdit has ``M = P0`` and c = L2. S has one row a key. Its Cholesky factor for the earlier keys is kept, and each
batch extends it: O(m^2 n). Once it holds more keys than M has rows, they are absorbed into M:

    (M A A^T + c I)^-1 M  is M of the same equation for later keys, with c = 1,

by one factorisation in d_in dimensions, or in those of the null space if these are fewer. So no system grows beyond
that size, and over many batches an edit costs O(d_in^2).

Precision: null spaces and keys are stored in float32 and multiplied in float64 block by block, since S is nearly
singular if keys repeat; factors are float64.

Memory: null spaces, factors and earlier keys may be stored on another device than the batch's keys (see
``tensor_store``); they are moved block by block.

Shape legend: d_out, d_in of the weight; n edits in the batch; m earlier keys; q dimensions of the null space.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .tensor_store import TensorStore

logger = logging.getLogger(__name__)

# Largest relative residual of a solution; above it the plain solve is used.
_MAX_RESIDUAL = 1e-5
# Rows of a factor, or columns of keys, processed at once: large enough for fast products, small to copy or convert.
BLOCK = 256
# Keys that a history takes in at a time. Fewer than that are taken in again with the next batch's.
_UNIT = 64
# Random combinations of the batch's columns that estimate the residual's norm, to about a third.
_PROBES = 16


@dataclass(frozen=True)
class NullSpace:
    """The projection P0 on a subspace, by orthonormal columns that span it or its complement, whichever is smaller.

    Attributes:
        columns: ``V (d_in, q)`` with ``P0 = V V^T``, or ``N (d_in, d_in - q)`` with ``P0 = I - N N^T``.
        complement: the columns are N.
    """

    columns: Tensor
    complement: bool = False

    @property
    def dimensions(self) -> int:
        """q, the rank of P0."""
        width, count = self.columns.shape
        return width - count if self.complement else count

    @property
    def num_coordinates(self) -> int:
        """Rows of coordinates: d_in for a complement, else q."""
        return self.columns.shape[0 if self.complement else 1]

    def on(self, device: torch.device, store: TensorStore | None = None) -> NullSpace:
        """This on a device, within the store's limit."""
        return replace(self, columns=(store or TensorStore()).put(self.columns, device))

    def project(self, keys: Tensor) -> Tensor:
        """``P0 K`` ``(d_in, n)`` float64."""
        keys = keys.double()
        inside = torch.zeros_like(keys)
        for block in _blocks(self.columns):
            wide = _wide(block, keys)
            inside += wide @ (wide.T @ keys)
        return keys - inside if self.complement else inside

    def coordinates(self, keys: Tensor) -> Tensor:
        """``V^T K`` ``(q, n)``, or ``P0 K`` ``(d_in, n)`` where the columns span the complement; float64."""
        return self.project(keys) if self.complement else _inner(_blocks(self.columns), keys.double())

    def lift(self, coordinates: Tensor) -> Tensor:
        """Vectors ``(d_in, n)`` float64 with these coordinates: ``V Y``, or ``P0 Y`` for a complement."""
        return self.project(coordinates) if self.complement else _combined(_blocks(self.columns), coordinates)


def _blocks(columns: Tensor) -> tuple[Tensor, ...]:
    return torch.split(columns, BLOCK, dim=1)


def _wide(block: Tensor, other: Tensor) -> Tensor:
    """A block in float64 on the other operand's device."""
    return block.to(other.device).double()


def _inner(parts: Sequence[Tensor], right: Tensor) -> Tensor:
    """``A^T right`` float64, with A given by parts ``(d_in, m_i)`` that are converted one at a time."""
    return torch.cat([right.new_zeros(0, right.shape[1]), *(_wide(part, right).T @ right for part in parts)])


def _combined(parts: Sequence[Tensor], coefficients: Tensor) -> Tensor:
    """``A coefficients`` ``(d_in, n)`` float64, with A given by at least one part."""
    shares = torch.split(coefficients, [part.shape[1] for part in parts])
    total: Tensor = _wide(parts[0], coefficients) @ shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        total += _wide(part, share) @ share
    return total


class CholeskyFactor:
    """Lower Cholesky factor L of a positive definite matrix ``L L^T``, which can be extended. Immutable.

    It is stored as block rows that end at the diagonal: half the memory of a square matrix, and an extended factor
    shares the block rows of the original.

    Args:
        rows: the i-th is ``(b_i, b_1 + ... + b_i)`` float64.
        store: where new rows are stored.
    """

    def __init__(self, rows: Sequence[Tensor] = (), store: TensorStore | None = None) -> None:
        self.rows, self.store = tuple(rows), store or TensorStore()

    @classmethod
    def of(cls, matrix: Tensor, device: torch.device | None = None, store: TensorStore | None = None) -> CholeskyFactor:
        """Factorise a symmetric matrix in float64, on a device (by default its own).

        Raises:
            torch.linalg.LinAlgError: it is not positive definite.
        """
        device = matrix.device if device is None else device
        return cls._from_rows((matrix[start: start + BLOCK, : start + BLOCK].to(device).double()
                               for start in range(0, len(matrix), BLOCK)), store)

    @classmethod
    def _from_rows(cls, rows: Iterable[Tensor], store: TensorStore | None) -> CholeskyFactor:
        factor = cls(store=store)
        for row in rows:
            factor = factor.extended(row)
        return factor

    @classmethod
    def of_sum(cls, matrix: list[Tensor], parts: Iterable[Tensor], device: torch.device,
               store: TensorStore | None = None) -> CholeskyFactor:
        """Factorise ``matrix + sum of Y Y^T`` for parts Y ``(size, k)`` float64; the matrix is overwritten.

        Args:
            matrix: block rows that end at the diagonal.
            parts: the Y; may be a generator.
            device: where it is computed.
            store: where the factor is stored.

        Raises:
            torch.linalg.LinAlgError: it is not positive definite, because of rounding or non-finite entries.
        """
        for part in parts:
            for row in matrix:
                here = row.to(device)
                here += part[row.shape[1] - len(row): row.shape[1]] @ part[: row.shape[1]].T
                if here is not row:
                    row.copy_(here)
        return cls._from_rows((matrix.pop(0).to(device) for _ in range(len(matrix))), store)

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.rows[-1].shape[1] if self.rows else 0

    @property
    def nbytes(self) -> int:
        """Size in memory."""
        return sum(row.nbytes for row in self.rows)

    def on(self, device: torch.device, store: TensorStore | None = None) -> CholeskyFactor:
        """This on a device, within the store's limit."""
        store = store or TensorStore()
        return CholeskyFactor([store.put(row, device) for row in self.rows], store)

    def extended(self, row: Tensor) -> CholeskyFactor:
        """Factor of the matrix with more rows ``(b, size + b)`` and, by symmetry, columns: O(size^2 b).

        Raises:
            torch.linalg.LinAlgError: that matrix is not positive definite.
        """
        side, corner = row[:, : self.size], row[:, self.size:]
        solved = self.solve_lower(side.T).T
        end, failed = torch.linalg.cholesky_ex(corner - solved @ solved.T)
        if int(failed):
            raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
                f"row {self.size + int(failed)} leaves it not positive definite")
        fresh = torch.cat([solved, end], dim=1)
        if not self.rows or len(self.rows[-1]) + len(fresh) > BLOCK:
            return CholeskyFactor([*self.rows, self.store.put(fresh)], self.store)
        last = self.rows[-1].to(fresh.device)  # merged, since many thin rows are slow to solve with
        last = torch.nn.functional.pad(last, (0, len(fresh)))
        return CholeskyFactor([*self.rows[:-1], self.store.put(torch.cat([last, fresh]))], self.store)

    def products(self, device: torch.device, scale: float = 1.0) -> list[Tensor]:
        """Block rows of ``scale L L^T`` that end at the diagonal, computed on ``device`` and stored like L."""
        products = []
        for i, row in enumerate(self.rows):
            here = row.to(device)
            product = torch.cat([here[:, : other.shape[1]] @ other.to(device).T for other in self.rows[: i + 1]], dim=1)
            products.append(self.store.put(scale * product))
        return products

    def solve_lower(self, right: Tensor) -> Tensor:
        """``L^-1 right`` ``(size, n)``."""
        out = right.clone()
        for kept in self.rows:
            row = kept.to(out.device)
            begin, end = row.shape[1] - len(row), row.shape[1]
            rest = out[begin:end] - row[:, :begin] @ out[:begin]
            out[begin:end] = torch.linalg.solve_triangular(row[:, begin:], rest, upper=False)
        return out

    def solve_upper(self, right: Tensor) -> Tensor:
        """``L^-T right`` ``(size, n)``."""
        out = right.clone()
        for kept in reversed(self.rows):
            row = kept.to(out.device)
            begin, end = row.shape[1] - len(row), row.shape[1]
            out[begin:end] = torch.linalg.solve_triangular(row[:, begin:].T, out[begin:end], upper=True)
            out[:begin] -= row[:, :begin].T @ out[begin:end]
        return out

    def solve(self, right: Tensor) -> Tensor:
        """``(L L^T)^-1 right`` ``(size, n)``."""
        return self.solve_upper(self.solve_lower(right))


class KeyMetric(Protocol):
    """How a method weighs keys: the symmetric M and the ridge c. Immutable.

    Attributes:
        ridge: c.
        capacity: size of the system that ``absorbing`` factorises; more keys than that are cheaper absorbed.
        nbytes: size in memory.
    """

    ridge: float
    capacity: int

    @property
    def nbytes(self) -> int: ...

    def weigh(self, keys: Tensor) -> Tensor:
        """``M K`` ``(d_in, n)`` float64 of keys ``(d_in, n)``."""

    def absorbing(self, parts: Sequence[Tensor], device: torch.device) -> KeyMetric:
        """The metric ``(M A A^T + c I)^-1 M`` with ridge 1, which accounts for keys A, given by parts.

        Computed on ``device``.

        Raises:
            torch.linalg.LinAlgError: its factorisation failed.
        """


class NullSpaceMetric:
    """AlphaEdit's metric: ``M = P0``, the projection on the null space of preserved knowledge; c = L2.

    With keys absorbed ``M = P0 (P0 A A^T P0 + L2 I)^-1 P0``, factorised in P0's coordinates.

    Args:
        space: P0.
        l2: the ridge, above 0.
        store: where factors are stored.
    """

    def __init__(self, space: NullSpace, l2: float, store: TensorStore | None = None) -> None:
        self.space, self.ridge, self.capacity = space, l2, space.num_coordinates
        self._store = store or TensorStore()
        self._absorbed: CholeskyFactor | None = None  # of the bracket

    @property
    def nbytes(self) -> int:
        return self.space.columns.nbytes + (0 if self._absorbed is None else self._absorbed.nbytes)

    def weigh(self, keys: Tensor) -> Tensor:
        if self._absorbed is None:
            return self.space.project(keys)
        return self.space.lift(self._absorbed.solve(self.space.coordinates(keys)))

    def absorbing(self, parts: Sequence[Tensor], device: torch.device) -> NullSpaceMetric:
        grown = NullSpaceMetric(self.space, 1.0, self._store)
        if self._absorbed is None:
            matrix = _scaled_identity(self.ridge, self.capacity, device, self._store)
        else:
            matrix = self._absorbed.products(device)
        coordinates = (self.space.coordinates(part.to(device)) for part in parts)
        grown._absorbed = CholeskyFactor.of_sum(matrix, coordinates, device, self._store)
        return grown


def _scaled_identity(scale: float, size: int, device: torch.device, store: TensorStore) -> list[Tensor]:
    """Block rows of ``scale I`` that end at the diagonal."""
    rows = []
    for start in range(0, size, BLOCK):
        end = min(start + BLOCK, size)
        row = torch.zeros(end - start, end, dtype=torch.float64, device=device)
        row[:, start:].fill_diagonal_(scale)
        rows.append(store.put(row))
    return rows


class CovarianceMetric:
    """MEMIT's metric: ``M = (lambda C)^-1``, by the Cholesky factor of C; c = 1.

    With keys absorbed ``M = (lambda C + A A^T)^-1``.

    Args:
        factor: of C ``(d_in, d_in)``.
        weight: lambda (mom2_update_weight).
    """

    def __init__(self, factor: CholeskyFactor, weight: float) -> None:
        self.ridge, self.capacity = 1.0, factor.size
        self._factor, self._weight = factor, weight

    @property
    def nbytes(self) -> int:
        return self._factor.nbytes

    def weigh(self, keys: Tensor) -> Tensor:
        return self._factor.solve(keys.double()) / self._weight

    def absorbing(self, parts: Sequence[Tensor], device: torch.device) -> CovarianceMetric:
        matrix = self._factor.products(device, self._weight)
        wide = (part.to(device).double() for part in parts)
        return CovarianceMetric(CholeskyFactor.of_sum(matrix, wide, device, self._factor.store), 1.0)


class KeyHistory:
    """Earlier keys ``(d_in, m)`` of one layer, with the Cholesky factor of their system S. Immutable.

    An extended history shares all it can with the original. Its bits depend on the keys alone, not on the batches that
    they came in, so a run resumed from its keys goes on with the bits of one that was never interrupted: keys are taken
    in 64 at a time, and those left over are taken in again together with the next batch's.

    Attributes:
        metric: how keys are weighed, absorbed ones included; None if unknown.
        factor: of S for the keys not yet absorbed; None without a metric, or if factorising failed.
    """

    def __init__(self, keys: Tensor, metric: KeyMetric | None, device: torch.device | None = None,
                 store: TensorStore | None = None) -> None:
        self.metric, self._store = metric, store or TensorStore()
        self.factor = None if metric is None else CholeskyFactor(store=self._store)
        self._absorbed: tuple[Tensor, ...] = ()
        self._pending: tuple[Tensor, ...] = ()
        self._empty = keys[:, :0].to(keys.device if device is None else device, copy=True)
        self._left_over = self._empty  # keys after the last unit, which are in ``_pending`` too
        self._without_left_over: KeyHistory | None = None  # None if there are none
        for part in _blocks(keys):
            self._append(part)

    @classmethod
    def empty(cls, d_in: int, metric: KeyMetric | None, device: torch.device, store: TensorStore | None = None
              ) -> KeyHistory:
        """A history without keys."""
        return cls(torch.zeros(d_in, 0, dtype=torch.float32, device=device), metric, device, store)

    @property
    def keys(self) -> Tensor:
        """All earlier keys ``(d_in, m)``, concatenated; on the CPU if any of them is there."""
        return self.columns(0, self.num_keys)

    @property
    def num_keys(self) -> int:
        """m."""
        return sum(part.shape[1] for part in (*self._absorbed, *self._pending))

    def columns(self, start: int, end: int) -> Tensor:
        """The earlier keys from ``start`` to before ``end``, in a new tensor; on the CPU if any key is there."""
        parts = (self._empty, *self._absorbed, *self._pending)
        device = next((part.device for part in parts if part.device.type == "cpu"), self.device)
        chosen, position = [], 0
        for part in parts:
            chosen.append(part[:, max(0, start - position): max(0, end - position)].to(device))
            position += part.shape[1]
        return torch.cat(chosen, dim=1)

    @property
    def device(self) -> torch.device:
        """Device that it computes on."""
        return self._empty.device

    @property
    def nbytes(self) -> int:
        """Size of keys, factor and metric in memory."""
        state = 0 if self.metric is None else self.metric.nbytes
        state += 0 if self.factor is None else self.factor.nbytes
        return state + sum(part.nbytes for part in (*self._absorbed, *self._pending))

    def keys_only(self) -> KeyHistory:
        """The same keys, without factor and metric."""
        return KeyHistory(self.keys, None, self.device, self._store)

    def extended(self, keys: Tensor) -> KeyHistory:
        """This history with more keys ``(d_in, n)`` appended."""
        longer = copy.copy(self)
        longer._append(keys)
        return longer

    def _append(self, keys: Tensor) -> None:
        # Attributes are replaced, never changed in place, since the original history shares them.
        grown = copy.copy(self._without_left_over or self)
        keys = torch.cat([self._left_over, keys.to(self._empty)], dim=1)
        unit = _UNIT if self.metric is None else max(1, min(_UNIT, self.metric.capacity))
        whole = keys.shape[1] - keys.shape[1] % unit
        for start in range(0, whole, unit):
            grown._take_in(keys[:, start: start + unit].contiguous())
            grown._absorb_if_full(unit)
        grown._left_over, grown._without_left_over = self._empty, None
        vars(self).update(vars(grown))
        if whole < keys.shape[1]:
            self._left_over, self._without_left_over = keys[:, whole:].contiguous(), grown
            self._take_in(self._left_over)

    def _take_in(self, keys: Tensor) -> None:
        if self.metric is not None and self.factor is not None:
            try:
                wide = keys.double()
                weighed = self.metric.weigh(wide)
                corner = _corner(wide, weighed, self.metric.ridge)
                self.factor = self.factor.extended(torch.cat([self.inner(weighed).T, corner], dim=1))
            except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                self._lose_factor(self.factor.size + keys.shape[1], error)
        if self._pending and self._pending[-1].shape[1] + keys.shape[1] <= BLOCK:
            # Merged, since many thin parts are slow to multiply with.
            keys = torch.cat([self._pending[-1].to(keys.device), keys], dim=1)
            self._pending = self._pending[:-1]
        self._pending = (*self._pending, self._store.put(keys))

    def _absorb_if_full(self, unit: int) -> None:
        """Absorb the keys if the next unit's would not fit."""
        if self.metric is None or self.factor is None or self.factor.size + unit <= self.metric.capacity:
            return
        try:
            self.metric = self.metric.absorbing(self._pending, self.device)
            self.factor = CholeskyFactor(store=self._store)
            self._absorbed, self._pending = (*self._absorbed, *self._pending), ()
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            self._lose_factor(self.factor.size, error)

    def _lose_factor(self, count: int, error: Exception) -> None:
        logger.warning("the factor of %d earlier keys is lost (%s)", count, error)
        self.factor = None

    def inner(self, vectors: Tensor) -> Tensor:
        """``A^T X`` ``(m, n)`` float64 for X ``(d_in, n)``, with A the keys not yet absorbed."""
        return _inner(self._pending, vectors)

    def combined(self, coefficients: Tensor) -> Tensor | float:
        """``A X`` ``(d_in, n)`` float64 for X ``(m, n)``, with A the keys not yet absorbed; 0 if there are none."""
        return _combined(self._pending, coefficients) if self._pending else 0.0


def _corner(keys: Tensor, weighed: Tensor, ridge: float) -> Tensor:
    """``K^T M K + c I`` ``(n, n)``."""
    corner = keys.T @ weighed
    corner.diagonal().add_(ridge)
    return corner


def adjusted_keys(history: KeyHistory, keys: Tensor) -> Tensor | None:
    """``(M A A^T + c I)^-1 M K`` for the batch's keys K and all keys A.

    Args:
        history: earlier keys, with the method's M and c.
        keys: K ``(d_in, n)``.

    Returns:
        ``(d_in, n)`` float64; None if a factorisation failed or the relative residual is above 1e-5.
    """
    metric, factor = history.metric, history.factor
    if metric is None or factor is None:
        return None
    keys = keys.double()
    weighed = metric.weigh(keys)  # M K (d_in, n)
    solved = factor.solve_lower(history.inner(weighed))  # (m, n)
    corner, failed = torch.linalg.cholesky_ex(_corner(keys, weighed, metric.ridge) - solved.T @ solved)
    if int(failed):
        logger.warning("Cholesky factorisation of the %d key system failed", factor.size + keys.shape[1])
        return None
    alone = keys - history.combined(factor.solve_upper(solved))  # without the part that earlier keys account for
    mixed = torch.cholesky_solve(alone.T, corner).T  # A S^-1 E (d_in, n)
    solution = metric.weigh(mixed)
    probes = _probes(keys.shape[1], keys.device)
    seen = solution @ probes
    left = history.combined(history.inner(seen)) + keys @ (keys.T @ seen) + (metric.ridge * mixed - keys) @ probes
    relative = float(metric.weigh(left).norm() / weighed.norm().clamp(min=torch.finfo(weighed.dtype).tiny))
    if not relative < _MAX_RESIDUAL:
        logger.warning("the key system's solution leaves a relative residual of %.1e", relative)
        return None
    return solution


def _probes(count: int, device: torch.device) -> Tensor:
    """``(count, few)`` that preserves a matrix's Frobenius norm, in expectation or exactly."""
    if count <= _PROBES:
        return torch.eye(count, dtype=torch.float64, device=device)
    coins = torch.randint(0, 2, (count, _PROBES), generator=torch.Generator().manual_seed(0))
    signs: Tensor = (2 * coins.to(device).double() - 1) / _PROBES**0.5
    return signs


def plain_memit_keys(moment: Tensor, weight: float, keys: Tensor, history: KeyHistory | None = None) -> Tensor:
    """``(lambda C + A A^T)^-1 K`` by one dense solve in d_in dimensions; the fallback of ``adjusted_keys``.

    Raises:
        torch.linalg.LinAlgError: the matrix is singular to the precision that C is known to.
    """
    system = weight * moment.double()
    for part in (keys, None if history is None else history.keys):
        if part is not None:
            wide = _wide(part, system)
            system = system + wide @ wide.T
    sizes = torch.linalg.eigvalsh(system).abs()
    # C is known to float32: an eigenvalue below its rounding error is noise.
    if not bool(sizes.min() > torch.finfo(torch.float32).eps * sizes.max()):
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"eigenvalues between {float(sizes.min()):.1e} and {float(sizes.max()):.1e}")
    solved: Tensor = torch.linalg.solve(system, keys.double())
    return solved


def plain_alphaedit_keys(space: NullSpace, l2: float, keys: Tensor, history: KeyHistory | None = None) -> Tensor:
    """``(P0 A A^T + L2 I)^-1 P0 K`` by one dense solve in d_in dimensions; the fallback of ``adjusted_keys``."""
    outer = keys.double() @ keys.double().T
    if history is not None:
        earlier = _wide(history.keys, outer)
        outer = outer + earlier @ earlier.T
    system = space.project(outer)
    system.diagonal().add_(l2)
    solved: Tensor = torch.linalg.solve(system, space.project(keys))
    return solved
