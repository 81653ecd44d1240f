"""What becomes of an update between the solve and the weight: a base method's restraint, and SPHERE's projection."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .editing.executors import Update, add_update, dense
from .editing.grams import GramMatrices
from .editing.restraints import prune, rect
from .editing.session import EditSession
from .editing.solvers import LowRankUpdate
from .hparams import SPHEREHyperParams
from .models import EditableModel
from .projection import PrincipalSpace


class Shaping:
    """What becomes of an update between the solve and the weight: RECT's restraint, PRUNE's, and SPHERE's projection.

    PRUNE acts on the whole change since the pretrained weight, and only on the weights that are read out; editing goes
    on from the unrestrained ones.

    Attributes:
        unrestrained: PRUNE's weights to go on from after this batch, by layer, on the CPU; else empty.
    """

    def __init__(self, editable: EditableModel, hparams: SPHEREHyperParams, session: EditSession, grams: GramMatrices
                 ) -> None:
        self._editable, self._hparams, self._session, self._grams = editable, hparams, session, grams
        self._prunes = hparams.base_alg == "PRUNE"
        self._projects = hparams.projects
        self.unrestrained: dict[int, Tensor] = {}

    @property
    def leaves_updates(self) -> bool:
        """Whether ``shape`` gives every update back as it is."""
        return self._prunes or (not self._projects and self._hparams.base_alg != "RECT")

    def resume_unrestrained(self) -> None:
        """Put PRUNE's unrestrained weights in place of those read out."""
        for layer, weight in self._session.unrestrained.items():
            self._editable.set_weight(layer, weight)

    def shape(self, layer: int, update: Update) -> Update:
        """Restrain and project one layer's update; the layer's weight must be the one before the update."""
        if self._prunes:
            return update  # its turn comes with the whole change
        if self._hparams.base_alg == "RECT":
            update = rect(dense(update), self._editable.weight(layer), self._hparams.rect_keep)
        if not self._projects:
            return update
        return self._suppressed(layer, update)

    def _suppressed(self, layer: int, update: Update) -> Update:
        """The update with its principal part damped, or what stands in its place as a control."""
        alpha, space = self._hparams.alpha, self._space(layer)
        if self._hparams.suppression == "random":
            space = PrincipalSpace.spanned_by(random_directions(space, self._hparams.seed, layer), space.gamma)
        if not isinstance(update, LowRankUpdate):
            projected: Update = space.suppress(update, alpha)
        else:  # projecting R K^T is projecting its keys
            projected = LowRankUpdate(update.values, space.suppress_keys(update.keys, alpha))
        if self._hparams.suppression != "shrink":
            return projected
        norm = frobenius_norm(update)
        share = frobenius_norm(projected) / norm if norm else 1.0
        if isinstance(update, LowRankUpdate):
            return LowRankUpdate(share * update.values, update.keys)
        return share * update

    def write(self, layer: int, update: Update) -> None:
        """Add a shaped update to its layer's weight."""
        self._grams.advance(layer, update)
        add_update(self._editable, layer, update)

    def read_out(self) -> None:
        """Replace PRUNE's unrestrained weights, now all written, by the restrained and projected ones."""
        if not self._prunes:
            return
        for layer in self._editable.layers:
            weight = self._editable.weight(layer)
            self.unrestrained[layer] = weight.to("cpu", copy=True)
            precise = torch.promote_types(weight.dtype, torch.float32)
            original = self._session.original[layer].to(weight.device, precise)
            change = prune(weight.to(precise) - original, original, self._hparams.prune_log_base)
            if self._projects:
                change = dense(self._suppressed(layer, change))
            check_finite(layer, change)
            self._editable.set_weight(layer, original + change)

    def _space(self, layer: int) -> PrincipalSpace:
        weight = self._editable.weight(layer)
        if not self._prunes and self._hparams.principal_space == "current":
            gram = self._grams.get(layer)
            if gram is None:  # of a tall weight
                return PrincipalSpace.from_weight(weight, self._hparams.gamma)
            space = PrincipalSpace.from_gram(weight, gram, self._hparams.gamma, self._session.ranks.get(layer))
            self._session.ranks[layer] = space.rank
            return space
        kept = self._session.spaces.get(layer)
        if kept is None or kept.gamma != self._hparams.gamma:
            space = PrincipalSpace.from_weight(self._session.original[layer].to(weight.device), self._hparams.gamma)
            space.directions  # noqa: B018 - formed now, the space no longer refers to the weight
            self._session.spaces[layer] = space
        return self._session.spaces[layer]


def check_finite(layer: int, weight: Tensor) -> None:
    """Refuse a weight, or a change of one, that holds nan or infinity (ValueError)."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"the executor left non-finite values in layer {layer}: nothing was changed")


def frobenius_norm(update: Update) -> float:
    """``||dW||_F``; of factors by ``||R K^T||_F^2 = tr (R^T R)(K^T K)``, without the product of both."""
    if not isinstance(update, LowRankUpdate):
        return float(update.double().norm())
    values, keys = update.values.double(), update.keys.double()
    return math.sqrt(max(0.0, float(((values.T @ values) * (keys.T @ keys)).sum())))


def random_directions(like: PrincipalSpace, seed: int, layer: int) -> Tensor:
    """Orthonormal columns ``(d_in, r)`` that have nothing to do with the weight: as many as ``like`` has.

    The same seed and layer give the same directions from batch to batch; a space of higher rank has those of a lower
    one and some more.
    """
    drawn = np.random.default_rng([seed, layer]).standard_normal((like.rank, like.d_in))
    basis, _ = torch.linalg.qr(torch.from_numpy(drawn).T)
    columns: Tensor = basis
    return columns.to(like.device, torch.float32)
