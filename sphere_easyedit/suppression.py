"""What SPHERE's suppression can be varied in, beyond the paper, and its controls. Tensors in, tensors out.

All default to the paper's: directions of the weight's neurons, as many as pass the share gamma, damped by a fixed
alpha.

Shape legend: d_out neurons (rows), d_in inputs of each, r rank of a space, n edits in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .editing.executors import Update
from .editing.solvers import LowRankUpdate
from .projection import PrincipalSpace

_BISECTIONS = 20
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


def knee(spectrum: Tensor) -> int:
    """Where a descending spectrum bends: the number of eigenvalues in front of its knee, at least 1.

    The knee is the point farthest below the chord from the first eigenvalue to the last (Satopaa et al., 2011). A
    straight spectrum has none and counts as 1.

    Args:
        spectrum: ``(m,)`` eigenvalues, descending.

    Raises:
        ValueError: there are none.
    """
    if not len(spectrum):
        raise ValueError("the spectrum is empty: give the eigenvalues of a weight that is not zero")
    values = spectrum.double().cpu()
    if len(values) < 3:
        return 1
    chord = values[0] + (values[-1] - values[0]) * torch.arange(len(values), dtype=torch.float64) / (len(values) - 1)
    below = chord - values
    return max(1, int(below.argmax())) if float(below.max()) > 1e-9 * float(values[0].abs()) else 1


def knee_space(weight: Tensor) -> PrincipalSpace:
    """The principal space in front of the spectrum's knee, in place of that which passes a share gamma.

    Args:
        weight: ``(d_out, d_in)``, rows are neurons.
    """
    whole = PrincipalSpace.from_weight(weight, 1.0)
    rank = knee(whole.spectrum)
    share = float(whole.spectrum[:rank].sum() / whole.spectrum.sum())
    return PrincipalSpace.spanned_by(whole.directions[:, :rank], min(1.0, share))


def joint_space(weight: Tensor | None, moment: Tensor, gamma: float) -> PrincipalSpace:
    """The principal space of the keys' second moment, or of weight and keys together.

    The leading eigenvectors of ``What^T What / tr + C / tr C`` (without a weight: of C alone), as many as first pass
    the share gamma, as in Eq. 11.

    Args:
        weight: ``(d_out, d_in)``, rows are neurons; None for the keys' space.
        moment: C ``(d_in, d_in)``, the second moment of keys.
        gamma: share of the total, in (0, 1].
    """
    total = moment.double() / moment.double().diagonal().sum()
    if weight is not None:
        unit = torch.nn.functional.normalize(weight.double(), dim=1)
        gram = unit.T @ unit
        total = total + gram / gram.diagonal().sum()
    values, vectors = torch.linalg.eigh(total)
    values = values.flip(0).clamp(min=0)
    rank = int((values.cumsum(0) / values.sum() <= gamma).sum()) + 1
    kept = vectors.flip(1)[:, : min(rank, len(values))]
    return PrincipalSpace.spanned_by(kept.float(), gamma)


def within_budget(change_of: Callable[[Update], float], update: Update, space: PrincipalSpace, alpha: float,
                  budget: float) -> tuple[Update, float]:
    """The update damped as little as keeps the change of hyperspherical energy within a budget.

    alpha is raised from the given one towards 1, and where all of the principal part taken out is not enough, the rest
    is shrunk.

    Args:
        change_of: relative change of hyperspherical energy that an update would make, either sign.
        update: before suppression.
        space: its principal space.
        alpha: the least strength.
        budget: largest allowed size of the change, above 0.

    Returns:
        The update and the alpha that it was damped with.
    """
    def holds(candidate: Update) -> bool:
        return abs(change_of(candidate)) <= budget

    found = suppressed(update, space, alpha)
    if holds(found):
        return found, alpha
    whole = suppressed(update, space, 1.0)
    if holds(whole):
        strength = _least(lambda value: holds(suppressed(update, space, value)), alpha, 1.0)
        return suppressed(update, space, strength), strength
    return scaled(whole, 1.0 - _least(lambda value: holds(scaled(whole, 1.0 - value)), 0.0, 1.0)), 1.0


def _least(holds: Callable[[float], bool], low: float, high: float) -> float:
    """A value that holds, with one hardly smaller that does not; ``high`` holds and ``low`` does not."""
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


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
