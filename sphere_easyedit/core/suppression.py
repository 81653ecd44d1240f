"""Applies SPHERE's projection to updates, with the variants and controls of the study.

Shape legend: d_out neurons (rows), d_in inputs of each, r rank of a space, n edits in the batch.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .projection import PrincipalSpace
from .updates import LowRankUpdate, Update

_MAX_CORRECTION = 10.0  # times the values' norm; more would mean that projection left too little of the keys


def frobenius_norm(update: Update) -> float:
    """``||dW||_F``; for factors, ``||R K^T||_F^2 = tr (R^T R)(K^T K)`` avoids the dense product."""
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
    """Random orthonormal columns ``(d_in, r)``, as many as ``like`` has.

    The same seed and layer give the same directions in every batch; a larger r only adds columns.
    """
    drawn = np.random.default_rng([seed, layer]).standard_normal((like.rank, like.d_in))
    basis: Tensor
    basis, _ = torch.linalg.qr(torch.from_numpy(drawn).T)
    return basis.to(like.device, torch.float32)


def compensated(projected: LowRankUpdate, solved: LowRankUpdate) -> LowRankUpdate:
    """A projected update with values corrected so that its effect on its own batch's keys is as before projection.

    With K the keys that the update was solved for, ``dW' = R' K'^T`` with ``R' K'^T K = R (adjusted K)^T K``: the row
    space stays that of the projected update. The correction ``R' - R`` is limited to 10 times the norm of R.

    Raises:
        ValueError: the update lacks the keys that it was solved for.
    """
    if solved.solved_for is None:
        raise ValueError("the update lacks the keys that it was solved for (solved_for), so it can't be compensated: "
                         "set compensate to false")
    keys = solved.solved_for.double()
    before = solved.keys.double().T @ keys  # (n, n)
    after = projected.keys.double().T @ keys
    values = solved.values.double()
    corrected = torch.linalg.lstsq(after.T, (values @ before).T, driver="gelsd" if not after.is_cuda else None)
    correction = corrected.solution.T - values
    size, limit = float(correction.norm()), _MAX_CORRECTION * float(values.norm())
    share = 1.0 if size <= limit or size == 0.0 else limit / size
    return LowRankUpdate((values + share * correction).to(projected.values), projected.keys, solved.solved_for)
