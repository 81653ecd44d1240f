"""What SPHERE's suppression can be varied in, beyond the paper, and its controls. Tensors in, tensors out.

All default to the paper's: directions of the weight's neurons, as many as pass the share gamma, damped by a fixed
alpha.

Shape legend: d_out neurons (rows), d_in inputs of each, r rank of a space, n edits in the batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .projection import PrincipalSpace
from .updates import LowRankUpdate, Update

_LARGEST_REPAIR = 10.0  # times the values' norm: beyond it there is too little of the keys left to write through


def frobenius_norm(update: Update) -> float:
    """``||dW||_F``; of factors by ``||R K^T||_F^2 = tr (R^T R)(K^T K)``, without the product of both."""
    if not isinstance(update, LowRankUpdate):
        return float(update.double().norm())
    values, keys = update.values.double(), update.keys.double()
    return math.sqrt(max(0.0, float(((values.T @ values) * (keys.T @ keys)).sum())))


def scaled(update: Update, factor: float) -> Update:
    """``factor * dW``."""
    if isinstance(update, LowRankUpdate):
        return LowRankUpdate(factor * update.values, update.keys, update.solved_for)
    return factor * update


def suppressed(update: Update, space: PrincipalSpace, alpha: float) -> Update:
    """``dW (I - alpha U U^T)`` (Eq. 12, 13); projecting ``R K^T`` is projecting its keys."""
    if isinstance(update, LowRankUpdate):
        return LowRankUpdate(update.values, space.suppress_keys(update.keys, alpha), update.solved_for)
    return space.suppress(update, alpha)


def random_directions(like: PrincipalSpace, seed: int, layer: int) -> Tensor:
    """Orthonormal columns ``(d_in, r)`` that have nothing to do with the weight: as many as ``like`` has.

    The same seed and layer give the same directions from batch to batch; a space of higher rank has those of a lower
    one and some more.
    """
    drawn = np.random.default_rng([seed, layer]).standard_normal((like.rank, like.d_in))
    basis: Tensor
    basis, _ = torch.linalg.qr(torch.from_numpy(drawn).T)
    return basis.to(like.device, torch.float32)


def compensated(projected: LowRankUpdate, solved: LowRankUpdate) -> LowRankUpdate:
    """A projected update that moves its own batch's keys as far as it did before projection.

    With K the keys that the update was solved for, ``dW' = R' K'^T`` with ``R' K'^T K = R (adjusted K)^T K``: the same
    row space, other values. Where the projection left so little of the keys that R' would be larger than 10 times R, as
    much of the repair is made as keeps it there.

    Raises:
        ValueError: the update does not say what it was solved for.
    """
    if solved.solved_for is None:
        raise ValueError("the update does not hold the keys that it was solved for: it can't be compensated")
    keys = solved.solved_for.double()
    before = solved.keys.double().T @ keys  # (n, n)
    after = projected.keys.double().T @ keys
    values = solved.values.double()
    repaired = torch.linalg.lstsq(after.T, (values @ before).T, driver="gelsd" if not after.is_cuda else None)
    repair = repaired.solution.T - values
    size, limit = float(repair.norm()), _LARGEST_REPAIR * float(values.norm())
    share = 1.0 if size <= limit or size == 0.0 else limit / size
    return LowRankUpdate((values + share * repair).to(projected.values), projected.keys, solved.solved_for)
