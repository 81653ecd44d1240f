"""The principal hyperspherical space of a weight, and the projection that suppresses an update's part in it.

Notation follows SPHERE (arXiv 2510.01172). A weight ``W`` is ``(d_out, d_in)``, rows are neurons; ``What`` is
W with its rows scaled to unit norm (zero rows stay zero). With ``U`` ``(d_in, r)`` the eigenvectors of
``What^T What / d_out`` for its largest eigenvalues (Eq. 10, 11), an update dW becomes ``dW (I - alpha U
U^T)`` (Eq. 12, 13). No ``d_in x d_in`` matrix is formed where ``d_in > d_out``: the ``d_out x d_out`` Gram
matrix ``What What^T = V S V^T`` has the same spectrum, and ``U = What^T V S^-1/2``.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import scipy.linalg
import torch
from torch import Tensor

from .tensors import (
    as_number,
    blocks,
    check_floating,
    check_gram_dtype,
    check_matrix,
    check_norms,
    cosine_blocks,
    row_norms,
    unit_rows,
)

__all__ = ["PrincipalSpace"]

logger = logging.getLogger(__name__)

# Up to this size of the smaller side float64 costs under a second, and float32 rounding could move the rank
# by one. Above it a float64 eigenproblem takes many times longer than all the rest of a batch, and float32 is
# good for about 1e-6 of the total: much less than one eigenvalue's share of it.
FLOAT64_SIDE: Final = 1024
# Below this side a partial eigenproblem saves no time.
_WHOLE_SIDE: Final = 512
# Tolerance on cumulated shares compared with gamma: equal eigenvalues give round shares, which rounding may not decide.
_SHARE_ROUNDING: Final = 1e-12
# Largest relative difference between squared row norms and the given Gram matrix's diagonal: far above rounding, far
# below the difference to another weight.
_GRAM_MISMATCH: Final = 1e-2
_BLOCK_ELEMENTS: Final = 8 * 2**20
_SAFE_NORMS: Final = (1e-10, 1e10)


class PrincipalSpace:
    """The leading eigenvectors of ``What^T What / d_out``: as many as first pass a share gamma (Eq. 10, 11).

    Build one with :meth:`from_weight` or :meth:`from_gram` (controls: :meth:`spanned_by`). The space describes
    the weight as it was then. It refers to that weight, without copying it, until :attr:`directions` has been
    read; if the weight was changed before that, whatever needs it raises ``RuntimeError`` instead of mixing two
    weights. To keep a space beyond an edit (``principal_space: pretrained``), read :attr:`directions` first: the
    space then no longer needs the weight.

    Precision: eigenproblems are float64 where the smaller side is at most 1024 or the weight is float64;
    float32 elsewhere.

    Shape legend: d_out neurons (rows), d_in inputs of each, r rank of the space.
    """

    def __init__(self, basis: Tensor | _GramBasis, spectrum: Tensor, gamma: float) -> None:
        """Internal: use :meth:`from_weight` or :meth:`from_gram`. ``basis`` is U, or its factors."""
        self._basis = basis
        self._spectrum = spectrum
        self._gamma = gamma
        self._d_in = basis.shape[0]
        self._rank = basis.shape[1]
        self._device = basis.device
        self._float = torch.float64 if basis.dtype == torch.float64 else torch.float32

    @classmethod
    def from_weight(cls, weight: Tensor, gamma: float = 0.5) -> PrincipalSpace:
        """The principal space of a weight (Eq. 10, 11).

        ``r = count(cumsum(eigenvalues) / total <= gamma) + 1``, at most the numerical rank of W.

        Args:
            weight: ``(d_out, d_in)``, rows are neurons; any floating dtype, any device.
            gamma: share of the total to pass, in [0, 1]. 0 gives the empty space (no projection) and solves
                nothing; 1 gives the whole row space.

        Raises:
            ValueError: the weight is not a finite, non-empty floating 2-D tensor, or gamma is out of [0, 1].
        """
        gamma = _checked_share("gamma", gamma)
        _check_weight(weight)
        with torch.no_grad():
            weight = weight.detach()
            norms = _row_norms(weight)
            tall = weight.shape[0] > weight.shape[1]
            if gamma == 0.0 or not bool(norms.any()):
                return cls._empty(weight, gamma)
            gram = _unit_gram(weight, norms, _work_dtype(weight, min(weight.shape)), tall)
            return cls._solve(weight, norms, gram, gamma, tall, torch.finfo(gram.dtype).eps)

    @classmethod
    def from_gram(cls, weight: Tensor, gram: Tensor, gamma: float = 0.5, likely_rank: int | None = None
                  ) -> PrincipalSpace:
        """The principal space from a raw Gram matrix ``W W^T`` that the caller has, which saves the product.

        Meant for ``d_out <= d_in``. For a tall weight it solves an eigenproblem of the larger side.

        Args:
            weight: ``(d_out, d_in)``, rows are neurons.
            gram: ``(d_out, d_out)``, ``W W^T`` of exactly this weight, not normalised; float32 or float64.
            gamma: share of the total to pass, in [0, 1].
            likely_rank: expected rank, such as that of the batch before: about as many eigenpairs are solved for
                first. It has no influence on the result.

        Raises:
            ValueError: as in :meth:`from_weight`; or gram has another shape or device, is narrower than
                float32, is not finite, or its diagonal is not the squared row norms of the weight to 1%.
        """
        gamma = _checked_share("gamma", gamma)
        _check_weight(weight)
        with torch.no_grad():
            weight, gram = weight.detach(), gram.detach() if isinstance(gram, Tensor) else gram
            fingerprint = _fingerprint(weight)
            norms = fingerprint.double() if _are_safe(fingerprint) else _row_norms(weight)
            _check_gram(gram, weight, norms)
            if gamma == 0.0 or not bool(norms.any()):
                return cls._empty(weight, gamma)
            unit = _normalised(gram, norms > 0, _work_dtype(weight, gram.shape[0]))
            rounding = max(torch.finfo(gram.dtype).eps, torch.finfo(unit.dtype).eps)
            return cls._solve(weight, norms, unit, gamma, False, rounding, likely_rank)

    @classmethod
    def spanned_by(cls, directions: Tensor, gamma: float) -> PrincipalSpace:
        """A space of given directions, for control experiments; its spectrum is empty.

        Args:
            directions: ``(d_in, r)``, orthonormal columns.
            gamma: returned by :attr:`gamma`; not used otherwise.

        Raises:
            ValueError: the columns are not orthonormal to 1e-4, or gamma is out of [0, 1].
        """
        check_floating("directions", directions)
        basis = directions.detach().to(_public_dtype(directions))
        error = (basis.T @ basis - torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)).abs()
        if basis.shape[1] and not float(error.max()) <= 1e-4:
            raise ValueError(f"directions are {float(error.max()):.1e} from orthonormal: give columns of a QR factor")
        return cls(basis, torch.zeros(0, dtype=torch.float64, device=basis.device), _checked_share("gamma", gamma))

    @classmethod
    def _empty(cls, weight: Tensor, gamma: float) -> PrincipalSpace:
        basis = torch.zeros((weight.shape[1], 0), dtype=_public_dtype(weight), device=weight.device)
        return cls(basis, torch.zeros(0, dtype=torch.float64, device=weight.device), gamma)

    @classmethod
    def _solve(
        cls, weight: Tensor, norms: Tensor, gram: Tensor, gamma: float, tall: bool, rounding: float,
        likely_rank: int | None = None,
    ) -> PrincipalSpace:
        # The trace of What What^T and of What^T What is the count of unit rows: no rounding of a sum.
        total = float((norms > 0).sum())
        values, vectors = _principal_eigenpairs(gram, total, gamma, _rank_tolerance(weight, rounding), likely_rank)
        basis: Tensor | _GramBasis
        if tall:
            basis = _orthonormal(vectors).to(_public_dtype(weight))
        else:
            basis = _GramBasis(weight, norms, _fingerprint(weight), vectors, values[: vectors.shape[1]])
        return cls(basis, values / weight.shape[0], gamma)

    @property
    def rank(self) -> int:
        """r, the number of directions."""
        return self._rank

    @property
    def gamma(self) -> float:
        """Share of the spectrum's total that the directions pass."""
        return self._gamma

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self._device

    @property
    def d_in(self) -> int:
        """Width of the weight, the length of a direction."""
        return self._d_in

    @property
    def spectrum(self) -> Tensor:
        """Eigenvalues found of ``What^T What / d_out``, ``(found,)`` float64, descending, ``found >= rank``.

        On large weights the smallest are not computed. All together sum to the share of rows that are not zero,
        usually 1. Empty at gamma 0.
        """
        return self._spectrum

    @property
    def directions(self) -> Tensor:
        """U, ``(d_in, r)``: orthonormal columns (to about 1e-6), by descending eigenvalue.

        On the weight's device; float64 for a float64 weight, else float32. Formed when first read; from then
        on the weight is no longer needed.

        Raises:
            RuntimeError: the weight was changed after this space was built and before this was read.
        """
        if isinstance(self._basis, _GramBasis):
            with torch.no_grad():
                self._basis = _orthonormal(self._basis.lift()).to(self._float)
        return self._basis

    def suppress(self, update: Tensor, alpha: float = 0.5) -> Tensor:
        """An update with its principal part damped: ``dW (I - alpha U U^T)`` (Eq. 12, 13).

        Computed as ``dW - alpha (dW U) U^T``: no ``d_in x d_in`` matrix is formed.

        Args:
            update: ``(rows, d_in)``, any number of rows; any floating dtype, on the weight's device.
            alpha: strength in [0, 1]. 1 removes the principal part, 0 returns the update bit for bit.

        Returns:
            A new tensor of the same shape and dtype (products in float32 or better).

        Raises:
            ValueError: alpha is out of [0, 1], or the update is not a finite floating ``(rows, d_in)`` tensor
                on the weight's device.
            RuntimeError: see :attr:`directions`.
        """
        alpha = _checked_share("alpha", alpha)
        self._check_operand("update", update, axis=1)
        with torch.no_grad():
            update = update.detach()
            if alpha == 0.0 or self._rank == 0:
                return update.clone()
            dtype = _product_dtype(update, self._float)
            basis = self.directions.to(dtype)
            result = torch.empty_like(update)
            for block in blocks(update.shape[0], _block_rows(self._d_in)):
                part = update[block].to(dtype)
                result[block] = torch.addmm(part, part @ basis, basis.T, alpha=-alpha).to(update.dtype)
            return result

    def suppress_keys(self, keys: Tensor, alpha: float = 0.5) -> Tensor:
        """Keys with their principal part damped: ``K - alpha U U^T K``, so that ``R K^T P = R (P K)^T``.

        Projecting a low-rank update ``R K^T`` is projecting its keys. Works without :attr:`directions`, by
        ``K - alpha What^T (V S^-1 V^T)(What K)``, unless they are formed already or ``S^-1`` would magnify
        rounding.

        Args:
            keys: ``(d_in, n)``, one key a column; any floating dtype, on the weight's device.
            alpha: strength in [0, 1].

        Returns:
            A new ``(d_in, n)`` tensor of the same dtype.

        Raises:
            ValueError: alpha is out of [0, 1], or keys is not a finite floating ``(d_in, n)`` tensor on the
                weight's device.
            RuntimeError: the weight was changed after this space was built and is still needed.
        """
        alpha = _checked_share("alpha", alpha)
        self._check_operand("keys", keys, axis=0)
        with torch.no_grad():
            keys = keys.detach()
            if alpha == 0.0 or self._rank == 0:
                return keys.clone()
            dtype = _product_dtype(keys, self._float)
            if isinstance(self._basis, _GramBasis) and self._basis.is_well_conditioned():
                principal = self._basis.principal_part(keys)
            else:
                basis = self.directions.to(dtype)
                principal = basis @ (basis.T @ keys.to(dtype))
            return keys.to(dtype).sub(principal.to(dtype), alpha=alpha).to(keys.dtype)

    def __repr__(self) -> str:
        return f"PrincipalSpace(d_in={self._d_in}, rank={self._rank}, gamma={self._gamma})"

    def _check_operand(self, name: str, operand: Tensor, axis: int) -> None:
        wanted = f"(rows, {self._d_in})" if axis == 1 else f"({self._d_in}, n)"
        check_floating(name, operand)
        if operand.dim() != 2 or operand.shape[axis] != self._d_in:
            raise ValueError(
                f"{name} must be {wanted}, got shape {tuple(operand.shape)}; transpose it, or build the "
                "space from the weight that it belongs to"
            )
        if operand.device != self._device:
            raise ValueError(
                f"{name} must be on {self._device}, where the space is, got {operand.device}; move it there"
            )
        _check_finite(name, operand)


@dataclass(frozen=True)
class _GramBasis:
    """U as its factors ``What^T V S^-1/2``, before it is formed."""

    weight: Tensor  # (d_out, d_in), not a copy
    norms: Tensor  # (d_out,) float64, of its rows
    fingerprint: Tensor  # (d_out,)
    vectors: Tensor  # V (d_out, r), eigenvectors of What What^T
    values: Tensor  # S (r,) float64, descending

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of U."""
        return self.weight.shape[1], self.vectors.shape[1]

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return _public_dtype(self.weight)

    def is_well_conditioned(self) -> bool:
        """Whether ``S^-1`` magnifies rounding only a little, by the ratio of the smallest eigenvalue to the largest."""
        least = 1e-7 if self.vectors.dtype == torch.float64 else 1e-4
        return float(self.values[-1] / self.values[0]) > least

    def lift(self) -> Tensor:
        """``What^T V S^-1/2``, ``(d_in, r)``."""
        self._check_unchanged()
        scaled = self.vectors * self.values.rsqrt().to(self.vectors.dtype)
        basis = scaled.new_zeros(self.shape)
        for block, panel in _unit_panels(self.weight, self.norms, scaled.dtype):
            basis.addmm_(panel.T, scaled[block])
        return basis

    def principal_part(self, keys: Tensor) -> Tensor:
        """``U U^T K`` of ``(d_in, n)`` keys as ``What^T (V S^-1 V^T)(What K)``, by blocks of rows."""
        self._check_unchanged()
        dtype = self.vectors.dtype
        keys = keys.to(dtype)
        answers = keys.new_zeros((self.vectors.shape[1], keys.shape[1]))  # V^T What K
        for block, rows, scale in self._scaled_rows():
            answers.addmm_(self.vectors[block].T, (rows @ keys).mul_(scale))
        answers.div_(self.values.to(dtype)[:, None])
        principal = torch.zeros_like(keys)
        for block, rows, scale in self._scaled_rows():
            principal.addmm_(rows.T, (self.vectors[block] @ answers).mul_(scale))
        return principal

    def _scaled_rows(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Blocks of rows, and the factors ``(rows, 1)`` that scale them to unit norm, without copying the weight."""
        dtype = self.vectors.dtype
        safe = _are_safe(self.norms)
        for block in blocks(self.weight.shape[0], _block_rows(self.weight.shape[1])):
            if safe:
                yield block, self.weight[block].to(dtype), self.norms[block].reciprocal().to(dtype)[:, None]
            else:
                rows = unit_rows(self.weight, self.norms, block, dtype)
                yield block, rows, torch.ones_like(rows[:, :1])

    def _check_unchanged(self) -> None:
        # Unlike tensors' version counters, row norms notice edits through ``.data``.
        if not torch.equal(_fingerprint(self.weight), self.fingerprint):
            raise RuntimeError(
                "the weight was changed after its PrincipalSpace was built, and the space still needs it; "
                "build a new space from the weight as it is, or read .directions before the weight is changed"
            )


# --- eigenproblem -------------------------------------------------------------------------------------------


def _principal_eigenpairs(
    gram: Tensor, total: float, gamma: float, tolerance: float, likely_rank: int | None
) -> tuple[Tensor, Tensor]:
    """Eigenvalues found (descending, float64), and the eigenvectors ``(side, r)`` that first pass gamma."""
    side = gram.shape[0]
    for count in _attempts(side, gamma, gram.is_cuda, likely_rank):
        values, vectors = _largest_eigenpairs(gram, count)
        values = values.to(torch.float64).clamp(min=0.0)
        rank = passing_count(values, total, gamma)
        if rank <= len(values) or len(values) == side:
            break
    rank = min(rank, int((values > tolerance * values[0]).sum()))
    logger.debug(
        "principal space: rank %d of %d, gamma %g, %d eigenvalues found", rank, side, gamma, len(values)
    )
    return values, vectors[:, :rank].contiguous()


def passing_count(values: Tensor, total: float, gamma: float) -> int:
    """``count(cumsum / total <= gamma) + 1``; one more than there are values if their sum does not pass gamma."""
    if gamma == 1.0:
        return len(values) + 1  # no share passes 1, whatever rounding says
    shares = values.cumsum(dim=0) / total
    return int((shares <= gamma + _SHARE_ROUNDING).sum()) + 1


def _attempts(side: int, gamma: float, on_gpu: bool, likely_rank: int | None) -> list[int]:
    """Numbers of eigenpairs to solve for, one attempt after the other; the last is all of them.

    Real weights pass one half of the total within a quarter of their directions, and even a flat spectrum
    passes gamma within a share gamma of them. A GPU has no partial solver.
    """
    if side < _WHOLE_SIDE or on_gpu or gamma > 0.9:
        return [side]
    third, most = side // 3 + 1, (2 * side) // 3 + 1
    attempts = [third, most, side] if gamma <= 0.6 else [most, side]
    if likely_rank is None:
        return attempts
    few = likely_rank + likely_rank // 50 + 8
    return [few, *(count for count in attempts if count > few)] if few < side else [side]


def _largest_eigenpairs(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues, descending, and eigenvectors ``(side, found)``: ``count`` of them, or all."""
    if gram.device.type == "cpu" and count < gram.shape[0]:
        partial = _partial_eigenpairs(gram, count)
        if partial is not None:
            return partial
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0), vectors.flip(1)


def _partial_eigenpairs(gram: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """The ``count`` largest by LAPACK's evr driver; None, with a warning, if it fails."""
    side = gram.shape[0]
    try:
        values, vectors = scipy.linalg.eigh(
            gram.numpy().T,  # Fortran order, as LAPACK wants it; gram is symmetric
            driver="evr",
            subset_by_index=[side - count, side - 1],
            check_finite=False,
        )
    except scipy.linalg.LinAlgError as error:
        logger.warning("partial eigenproblem of side %d failed (%s); solving all of it", side, error)
        return None
    if len(values) != count:
        # Bisection cannot tell equal eigenvalues apart by index; it then returns fewer, without an error.
        logger.warning("partial eigenproblem gave %d of %d eigenpairs; solving all of it", len(values), count)
        return None
    return torch.from_numpy(values).flip(0), torch.from_numpy(vectors).flip(1)


def _orthonormal(basis: Tensor) -> Tensor:
    """Orthonormalise columns, keeping span and order; cheap if they already are."""
    overlap = basis.T @ basis  # (r, r)
    identity = torch.eye(overlap.shape[0], dtype=overlap.dtype, device=overlap.device)
    error = float((overlap - identity).abs().amax())
    if error <= 16 * torch.finfo(basis.dtype).eps:
        return basis
    if error < 0.1 / overlap.shape[0]:
        # Near the identity its Cholesky factor is as good as a QR factorisation, and many times faster.
        factor, failed = torch.linalg.cholesky_ex(overlap)
        if not int(failed):
            solved: Tensor = torch.linalg.solve_triangular(factor.T, basis, upper=True, left=False)
            return solved
    logger.debug("principal directions were %.1e from orthonormal: QR", error)
    orthonormal: Tensor = torch.linalg.qr(basis).Q
    return orthonormal


def _rank_tolerance(weight: Tensor, rounding: float) -> float:
    """Eigenvalues below this share of the largest count as zero.

    The larger of two: the common tolerance of a matrix rank, ``max(d_out, d_in) eps`` on singular values of a
    float32 (or float64) matrix, squared; and the noise that rounding leaves on a Gram matrix's eigenvalues.
    """
    size = max(weight.shape)
    eps = torch.finfo(torch.float64 if weight.dtype == torch.float64 else torch.float32).eps
    return max((size * eps) ** 2, 8.0 * math.sqrt(size) * rounding)


# --- rows ---------------------------------------------------------------------------------------------------


def _unit_gram(weight: Tensor, norms: Tensor, dtype: torch.dtype, tall: bool) -> Tensor:
    """``What^T What`` where tall, else ``What What^T``, without forming What."""
    count, width = weight.shape
    if tall:
        gram = torch.zeros((width, width), dtype=dtype, device=weight.device)
        for _, panel in _unit_panels(weight, norms, dtype):
            gram.addmm_(panel.T, panel)
        return gram
    gram = torch.zeros((count, count), dtype=dtype, device=weight.device)
    for i, j, cosines in cosine_blocks(weight, norms, dtype, _block_rows(width)):
        gram[i, j] = cosines
        gram[j, i] = cosines.T
    return gram


def _normalised(gram: Tensor, alive: Tensor, dtype: torch.dtype) -> Tensor:
    """``What What^T`` from ``W W^T``; the weight's zero rows are zeroed, whatever rounding left of them."""
    diagonal = gram.diagonal().to(torch.float64)
    scale = torch.where(alive, diagonal, math.inf).rsqrt()  # 0 for zero rows
    unit = gram.to(dtype) * scale.to(dtype)[:, None]
    unit.mul_(scale.to(dtype)[None, :])
    return unit


def _unit_panels(weight: Tensor, norms: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for block in blocks(weight.shape[0], _block_rows(weight.shape[1])):
        yield block, unit_rows(weight, norms, block, dtype)


def _row_norms(weight: Tensor) -> Tensor:
    """Norm of each row, ``(d_out,)`` float64; refuses what is not finite."""
    norms = row_norms(weight, _block_rows(weight.shape[1]))
    check_norms("weight", norms)
    return norms


def _are_safe(norms: Tensor) -> bool:
    """Whether products with rows of these norms stay within float32: none is zero, extreme or not finite."""
    return bool(((norms > _SAFE_NORMS[0]) & (norms < _SAFE_NORMS[1])).all())


def _fingerprint(weight: Tensor) -> Tensor:
    """Row norms ``(d_out,)`` in the products' precision, to notice a changed weight: one quick pass over it."""
    return row_norms(weight, _block_rows(weight.shape[1]), _public_dtype(weight))


def _public_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of directions: float64 for a float64 weight, else float32."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _work_dtype(weight: Tensor, side: int) -> torch.dtype:
    """Dtype of an eigenproblem of this side; see FLOAT64_SIDE for why."""
    return torch.float64 if weight.dtype == torch.float64 or side <= FLOAT64_SIDE else torch.float32


def _product_dtype(operand: Tensor, basis: torch.dtype) -> torch.dtype:
    """Float64 where either side is, else float32: halves carry too few digits for a projection."""
    return torch.float64 if torch.float64 in (operand.dtype, basis) else torch.float32


def _block_rows(width: int) -> int:
    return max(1, _BLOCK_ELEMENTS // width)


# --- checks -------------------------------------------------------------------------------------------------


def _checked_share(name: str, value: float) -> float:
    number = as_number(value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(
            f"{name} must be a number in [0, 1], got {value!r}; the paper uses gamma 0.5 and alpha 0.5 or 0.8"
        )
    return number


def _check_weight(weight: Tensor) -> None:
    check_matrix("weight", weight)
    if weight.numel() == 0:
        raise ValueError(
            f"weight must be 2-D (d_out, d_in), not empty, got shape {tuple(weight.shape)}; select one matrix"
        )


def _check_finite(name: str, tensor: Tensor) -> None:
    rows = tensor.shape[0]
    for block in blocks(rows, max(1, _BLOCK_ELEMENTS * rows // max(1, tensor.numel()))):
        if not bool(tensor[block].isfinite().all()):
            raise ValueError(
                f"{name} must be finite, but it holds NaN or infinity; check the solve that produced it"
            )


def _check_gram(gram: Tensor, weight: Tensor, norms: Tensor) -> None:
    check_floating("gram", gram)
    side = weight.shape[0]
    if tuple(gram.shape) != (side, side) or gram.device != weight.device:
        raise ValueError(
            f"gram must be W W^T, {(side, side)} on {weight.device}, got {tuple(gram.shape)} on "
            f"{gram.device}; compute it from the same weight"
        )
    check_gram_dtype(gram)
    _check_finite("gram", gram)
    squared = norms.square()
    off = (gram.diagonal().to(torch.float64) - squared).abs() > _GRAM_MISMATCH * squared
    wrong = int((off & (norms > 0)).sum())
    if wrong:
        raise ValueError(
            f"gram must be W W^T of this weight, but {wrong} of its diagonal's {side} entries are "
            "not the weight's squared row norms; recompute it from the weight as it is now"
        )
