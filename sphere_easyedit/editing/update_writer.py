"""Restrains, projects and writes the weight updates of one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..core.projection import PrincipalSpace
from ..core.suppression import compensated, frobenius_norm, random_directions, scaled, suppressed
from ..core.tensors import widened
from ..core.updates import LowRankUpdate, Update, dense
from ..hparams import SPHEREHyperParams
from ..models.architecture import EditableModel
from .gram_matrices import GramMatrices
from .session import EditSession
from .solve import add_update, check_finite


class UpdateWriter:
    """Applies the base method's restraint (RECT, PRUNE) and SPHERE's projection, and writes the result to the weights.

    PRUNE restrains the whole change since the pretrained weight, and only in the weights that are evaluated and saved;
    the next batch starts from the unrestrained weights.

    Attributes:
        unrestrained: PRUNE's weights for the next batch to start from, by layer, on the CPU; else empty.
        written: the batch's low-rank changes as they were written, by layer, one column an edit.
    """

    def __init__(self, editable: EditableModel, hparams: SPHEREHyperParams, session: EditSession, grams: GramMatrices
                 ) -> None:
        self._editable, self._hparams, self._session, self._grams = editable, hparams, session, grams
        self._method = hparams.method
        self.unrestrained: dict[int, Tensor] = {}
        self.written: dict[int, LowRankUpdate] = {}

    def load_unrestrained(self) -> None:
        """Put PRUNE's unrestrained weights of the last batch into the model."""
        for layer, weight in self._session.unrestrained.items():
            self._editable.set_weight(layer, weight)

    def restrain_and_project(self, layer: int, update: Update) -> Update:
        """Restrain and project one layer's update; the model must hold the weight from before the update.

        PRUNE's updates are returned as they are (see ``write_restrained_weights``).
        """
        if self._method.restrains_whole_change:
            return update
        update = self._method.restrain(update, self._editable.weight(layer), self._hparams)
        return self._project(layer, update) if self._hparams.projects else update

    def _project(self, layer: int, update: Update) -> Update:
        """``dW (I - alpha U U^T)`` (Eq. 12, 13), or what ``suppression`` or ``compensate`` asks for instead."""
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
        """Add a restrained and projected update to its layer's weight.

        Args:
            weight: the exact sum, if known; it is then written as it is.
        """
        if weight is not None:
            self._grams.forget(layer)
            self._editable.set_weight(layer, weight)
            return
        self._grams.advance(layer, update)
        add_update(self._editable, layer, update)
        if isinstance(update, LowRankUpdate) and not self._method.restrains_whole_change:
            self.written[layer] = update

    def write_restrained_weights(self) -> None:
        """Keep PRUNE's unrestrained weights aside, and restrain and project the whole change in the model."""
        if not self._method.restrains_whole_change:
            return
        for layer in self._editable.layers:
            weight = self._editable.weight(layer)
            self.unrestrained[layer] = weight.to("cpu", copy=True)
            original = widened(self._session.original[layer].to(weight.device))
            change = self._method.restrain_whole_change(widened(weight) - original, original, self._hparams)
            if self._hparams.projects:
                change = dense(self._project(layer, change))
            check_finite(layer, change)
            self._editable.set_weight(layer, original + change)

    def scale_back(self, before: Mapping[int, Tensor], share: float) -> None:
        """Keep only a share of the batch's change, in the weights and in PRUNE's unrestrained ones.

        Args:
            before: weights ``(d_out, d_in)`` before the batch, by layer.
            share: in (0, 1].
        """
        for layer, old in before.items():
            self._editable.set_weight(layer, interpolated(old, self._editable.weight(layer), share))
            self._grams.forget(layer)
        self.written = {layer: replace(update, values=share * update.values) for layer, update in self.written.items()}
        for layer, weight in self.unrestrained.items():
            old = self._session.unrestrained.get(layer, self._session.original[layer])
            self.unrestrained[layer] = interpolated(old, weight, share)

    def _space(self, layer: int) -> PrincipalSpace:
        """Principal space of the layer's current or original weight, as ``principal_space`` says."""
        gamma, weight = self._hparams.gamma, self._editable.weight(layer)
        if self._hparams.principal_space == "current":
            gram = self._grams.get(layer)
            if gram is None:  # d_out > d_in
                return PrincipalSpace.from_weight(weight, gamma)
            space = PrincipalSpace.from_gram(weight, gram, gamma, self._session.ranks.get(layer))
            self._session.ranks[layer] = space.rank
            return space
        key = f"{layer} {gamma!r}"  # gamma may change within a session
        if key not in self._session.spaces:
            space = PrincipalSpace.from_weight(self._session.original[layer].to(weight.device), gamma)
            space.directions  # noqa: B018 - once computed, the space no longer holds the weight
            self._session.spaces[key] = space
        return self._session.spaces[key]


def interpolated(start: Tensor, end: Tensor, share: float) -> Tensor:
    """``start + share * (end - start)``, computed in float32 at least and rounded once."""
    return torch.lerp(widened(start), widened(end), share).to(end.dtype)
