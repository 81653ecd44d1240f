"""What taking facts out of a sum of outer products does, and leaves. Tensors only, in float64.

Fact i put ``v_i k~_i^T`` into the weight. Taking it out,

    W <- W - sum over withdrawn i of v_i k~_i^T,

changes the output at any key k by ``-v_i (k~_i . k)``. So at the withdrawn fact's own key there remains what others put
there, and at another fact's key k_j something is missing that was not its own; both follow from the stored factors.

Shape legend: d_out, d_in of the weight; m edits.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from ..editing.solvers import LowRankUpdate

# Roundings of a batch are below eps/2 of the weight, those of a batch that was scaled back below eps: twice that.
_SAFETY = 2.0


@dataclass(frozen=True)
class Sum:
    """All edits of a layer, a column each.

    Attributes:
        update: values ``(d_out, m)``, adjusted keys and keys solved for ``(d_in, m)``.
        batch: ``(m,)`` number of each edit's batch, ascending.
        standing: ``(m,)`` whether it stands in the weight.
        withdrawn: ``(m,)`` whether it is being withdrawn, for which it must stand.
        steps: how often the weight was written and rounded.
    """

    update: LowRankUpdate
    batch: Tensor
    standing: Tensor
    withdrawn: Tensor
    steps: int


@dataclass(frozen=True)
class LayerStatement:
    """What withdrawing facts did to one layer, and what it left.

    "At a key" is at the key that a fact was solved for, by the stored factors, to first order: keys are taken as they
    were, whatever became of the layers below since.

    Attributes:
        layer: number of the layer.
        residuals: of each withdrawn fact: ``||sum_j v_j (k~_j . k_i)|| / ||v_i (k~_i . k_i)||``, j over the facts that
            stay, of its batch and of later ones: what they put at its key, relative to what it had put there itself.
        largest, median: over the facts j that stay: ``||sum_i v_i (k~_i . k_j)|| / ||v_j (k~_j . k_j)||``, i over the
            withdrawn: how much the output at their keys changes, relative to what they put there. 0 if none stays.
        largest_at: place of the fact with the largest, among those that stay; None if none stays.
        taken: share of the withdrawn change that left the weight once that was rounded to its dtype: 1 in float32,
            less where the dtype's steps are coarser than the change.
        rounding: ``||W - W_0 - sum||_F`` after withdrawing, sum over the facts that stay, relative to the sum before.
    """

    layer: int
    residuals: tuple[float, ...]
    largest: float
    median: float
    largest_at: int | None
    taken: float
    rounding: float


def withdraw_from(layer: int, original: Tensor, weight: Tensor, edits: Sum) -> tuple[Tensor, LayerStatement]:
    """Take the withdrawn facts out of one weight.

    Args:
        layer: its number.
        original: W_0 ``(d_out, d_in)``.
        weight: W ``(d_out, d_in)`` as it stands; not changed.
        edits: all edits since W_0.

    Returns:
        The new weight, in the old one's dtype, rounded once; and what is to be said of it.

    Raises:
        ValueError: the weight is not W_0 plus the edits that stand, as far as rounding lets that be told, or the new
            one is not finite.
    """
    first, now = original.to(weight.device).double(), weight.double()
    values, keys = edits.update.values.double(), edits.update.keys.double()
    stood = _product(values, keys, edits.standing)
    off = float((now - first - stood).norm())
    allowed = _allowance(first, weight.dtype, values, keys, edits)
    if not off <= allowed:
        raise ValueError(f"layer {layer}: the weight is not the original one plus the edits on file. It is off by "
                         f"{off:.2e} (Frobenius norm), rounding explains {allowed:.2e} at most: the factors are of "
                         "another run, or something else changed the weights. Give the folder that was kept while this "
                         "model was edited")
    part = _product(values, keys, edits.withdrawn)
    left = (now - part).to(weight.dtype)
    if not bool(left.isfinite().all()):
        raise ValueError(f"layer {layer}: without these facts the weight is not finite in {weight.dtype}: nothing was "
                         "changed")
    residuals, others = disturbances(edits)
    size, whole = float((part * part).sum()), float(stood.norm())
    error = float((left.double() - first - (stood - part)).norm())
    return left, LayerStatement(
        layer, tuple(residuals.tolist()), max(others.tolist(), default=0.0), median(others.tolist() or [0.0]),
        int(others.argmax()) if len(others) else None,
        float(((now - left.double()) * part).sum()) / size if size else 1.0, error / whole if whole else 0.0)


def disturbances(edits: Sum) -> tuple[Tensor, Tensor]:
    """Residuals at the withdrawn facts' keys, and changes at the keys of those that stay.

    Returns:
        Relative to what each fact put at its own key, in the order of columns: of the withdrawn, of those that stay.
    """
    assert edits.update.solved_for is not None
    values, keys = edits.update.values.double(), edits.update.keys.double()
    at = edits.update.solved_for.double()
    gone, stays = edits.withdrawn, edits.standing & ~edits.withdrawn
    own = values.norm(dim=0) * (keys * at).sum(dim=0).abs()  # ||v_i (k~_i . k_i)||
    counts = stays[:, None] & (edits.batch[:, None] >= edits.batch[gone])  # (m, withdrawn)
    put = values @ ((keys.T @ at[:, gone]) * counts)
    missing = values[:, gone] @ (keys[:, gone].T @ at[:, stays])
    return _ratio(put.norm(dim=0), own[gone]), _ratio(missing.norm(dim=0), own[stays])


def _product(values: Tensor, keys: Tensor, chosen: Tensor) -> Tensor:
    product: Tensor = values[:, chosen] @ keys[:, chosen].T
    return product


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(part == 0, torch.zeros_like(part), part / whole)


def _allowance(first: Tensor, dtype: torch.dtype, values: Tensor, keys: Tensor, edits: Sum) -> float:
    """Largest Frobenius norm that roundings of the weights, and of products in float32, can add up to."""
    reach = float((values.norm(dim=0) * keys.norm(dim=0)).sum())  # no weight on the way was further from W_0
    _, sizes = torch.unique_consecutive(edits.batch, return_counts=True)
    weights = edits.steps * torch.finfo(dtype).eps * (float(first.norm()) + reach)
    return _SAFETY * (weights + torch.finfo(torch.float32).eps * float(sizes.max()) * reach)
