"""What becomes of an update between the solve and the weight: a base method's restraint, and SPHERE's projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..core.projection import PrincipalSpace
from ..core.suppression import compensated, frobenius_norm, random_directions, scaled, suppressed
from ..core.updates import LowRankUpdate, Update, dense
from ..hparams import SPHEREHyperParams
from ..models.architecture import EditableModel
from .gram_matrices import GramMatrices
from .reviewing import partway
from .session import EditSession
from .solve import add_update, check_finite


class Shaping:
    """What becomes of an update between the solve and the weight: RECT's restraint, PRUNE's, and SPHERE's projection.

    PRUNE acts on the whole change since the pretrained weight, and only on the weights that are read out; editing goes
    on from the unrestrained ones.

    Attributes:
        unrestrained: PRUNE's weights to go on from after this batch, by layer, on the CPU; else empty.
        written: the batch's changes as they stand in the weights, by layer, as far as they are of low rank: a column
            an edit.
    """

    def __init__(self, editable: EditableModel, hparams: SPHEREHyperParams, session: EditSession, grams: GramMatrices
                 ) -> None:
        self._editable, self._hparams, self._session, self._grams = editable, hparams, session, grams
        self._method = hparams.method
        self._projects = hparams.projects
        self.unrestrained: dict[int, Tensor] = {}
        self.written: dict[int, LowRankUpdate] = {}

    def resume_unrestrained(self) -> None:
        """Put PRUNE's unrestrained weights in place of those read out."""
        for layer, weight in self._session.unrestrained.items():
            self._editable.set_weight(layer, weight)

    def shape(self, layer: int, update: Update) -> Update:
        """Restrain and project one layer's update; the layer's weight must be the one before the update."""
        if self._method.restrains_whole_change:
            return update  # its turn comes with the whole change
        update = self._method.restrain(update, self._editable.weight(layer), self._hparams)
        if not self._projects:
            return update
        return self._suppressed(layer, update)

    def _suppressed(self, layer: int, update: Update) -> Update:
        """The update with its principal part damped, or what stands in its place as a control."""
        hparams, space = self._hparams, self._space(layer)
        if hparams.suppression == "random":
            space = PrincipalSpace.spanned_by(random_directions(space, hparams.seed, layer), space.gamma)
        projected = suppressed(update, space, hparams.alpha)
        if hparams.suppression == "shrink":
            norm = frobenius_norm(update)
            return scaled(update, frobenius_norm(projected) / norm if norm else 1.0)
        if hparams.compensate and isinstance(update, LowRankUpdate) and isinstance(projected, LowRankUpdate):
            return compensated(projected, update)
        return projected

    def write(self, layer: int, update: Update, weight: Tensor | None = None) -> None:
        """Add a shaped update to its layer's weight.

        Args:
            weight: what this gives, where it is known to the bit.
        """
        if weight is not None:
            self._grams.forget(layer)
            self._editable.set_weight(layer, weight)
            return
        self._grams.advance(layer, update)
        add_update(self._editable, layer, update)
        if isinstance(update, LowRankUpdate) and not self._method.restrains_whole_change:
            self.written[layer] = update

    def read_out(self) -> None:
        """Replace PRUNE's unrestrained weights, now all written, by the restrained and projected ones."""
        if not self._method.restrains_whole_change:
            return
        for layer in self._editable.layers:
            weight = self._editable.weight(layer)
            self.unrestrained[layer] = weight.to("cpu", copy=True)
            precise = torch.promote_types(weight.dtype, torch.float32)
            original = self._session.original[layer].to(weight.device, precise)
            change = self._method.restrain_whole_change(weight.to(precise) - original, original, self._hparams)
            if self._projects:
                change = dense(self._suppressed(layer, change))
            check_finite(layer, change)
            self._editable.set_weight(layer, original + change)

    def scale_back(self, before: Mapping[int, Tensor], share: float) -> None:
        """Keep a share of the change that this batch made to the weights, and to PRUNE's unrestrained ones.

        Args:
            before: the edited weights ``(d_out, d_in)`` before the batch, by layer.
            share: above 0 and at most 1.
        """
        for layer, was in before.items():
            weight = self._editable.weight(layer)
            self._editable.set_weight(layer, partway(was, weight, share))
            self._grams.forget(layer)
        self.written = {layer: replace(update, values=share * update.values) for layer, update in self.written.items()}
        for layer, weight in self.unrestrained.items():
            was = self._session.unrestrained.get(layer, self._session.original[layer])
            self.unrestrained[layer] = partway(was, weight, share)

    def _space(self, layer: int) -> PrincipalSpace:
        """The layer's principal space: of the weight as it stands, or of the original one."""
        gamma, weight = self._hparams.gamma, self._editable.weight(layer)
        if not self._method.restrains_whole_change and self._hparams.principal_space == "current":
            gram = self._grams.get(layer)
            if gram is None:  # of a tall weight
                return PrincipalSpace.from_weight(weight, gamma)
            space = PrincipalSpace.from_gram(weight, gram, gamma, self._session.ranks.get(layer))
            self._session.ranks[layer] = space.rank
            return space
        key = f"{layer} {gamma!r}"  # the session outlives the hyperparameters
        if key not in self._session.spaces:
            space = PrincipalSpace.from_weight(self._session.original[layer].to(weight.device), gamma)
            space.directions  # noqa: B018 - formed now, the space no longer refers to the weight
            self._session.spaces[key] = space
        return self._session.spaces[key]
