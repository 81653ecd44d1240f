"""The study's tables of edited weights: cosines between neurons, spectra, and updates in the principal space."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sphere_easyedit.analysis.labels import LabelledRun
from sphere_easyedit.analysis.tables import Cell, Column, Table
from sphere_easyedit.callbacks.spaces import SpaceShare, principal_share
from sphere_easyedit.core.projection import PrincipalSpace
from sphere_easyedit.editing.checkpoints import load_weights, saved_weights
from sphere_easyedit.editing.keys import BatchStates
from sphere_easyedit.editing.requests import parse_requests, tokenize_request
from sphere_easyedit.hparams import SPHEREHyperParams
from sphere_easyedit.methods.covariance import load_moment, moment_path
from sphere_easyedit.methods.statistics_fingerprint import StatisticsFingerprints, ensure_unchanged
from sphere_easyedit.models.architecture import EditableModel, frozen, max_positions
from sphere_easyedit.runs.records import RunRecords

from .comparisons import WHO, who
from .geometry import QUANTILES, neuron_geometry
from .spectra import GAMMAS, moment_share, row_spectrum, update_alignment

logger = logging.getLogger(__name__)

UNEDITED = "unedited"
_SHARE = ".4f"
_LAYER = "layer"
_IDENTITY = (*(column.name for column in WHO), "edits", "from", "to")  # identify a row, besides the layer


def stages(run: RunRecords, editable: EditableModel) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """(edits, copies of the edited weights by layer, ``(d_out, d_in)``): the unedited ones, then each checkpoint's.

    Args:
        run: whose checkpoints are read.
        editable: the model as it was before the run, with the run's layers; unedited again when this ends.

    Raises:
        ValueError: a checkpoint is damaged or of another model.
    """
    unedited = {layer: editable.weight(layer).clone() for layer in editable.layers}
    folder = run.directory / "checkpoints"
    try:
        yield 0, unedited
        for num_edits in saved_weights(folder):
            load_weights(editable, folder, num_edits)
            yield num_edits, {layer: editable.weight(layer).clone() for layer in editable.layers}
    finally:
        for layer, weight in unedited.items():
            editable.set_weight(layer, weight)


def keys_of_edits(editable: EditableModel, tok: PreTrainedTokenizerBase, requests: Sequence[Mapping[str, Any]],
                  contexts: Sequence[str], token_budget: int) -> dict[int, Tensor]:
    """Keys ``(edits, d_in)`` of facts by layer, as editing reads them, by the weights as they stand.

    Args:
        requests: EasyEdit's dicts.
        contexts: templates besides the plain prompt.
        token_budget: padded tokens that go through the model at once.

    Raises:
        ValueError: a request is not of its form, or does not fit the model's context.
    """
    limit = max_positions(editable.config)
    tokenized = [tokenize_request(tok, request, contexts, limit) for request in parse_requests(requests)]
    with frozen(editable.model):
        return BatchStates(editable, tokenized, token_budget).read_all()


def weight_tables(arms: Sequence[LabelledRun], load: Callable[[RunRecords], tuple[EditableModel, SPHEREHyperParams]],
                  keys: Callable[[RunRecords], Mapping[int, Tensor]] | None = None) -> list[Table]:
    """Pairwise cosines and spectra of weights at every checkpoint, and where the change between checkpoints lies.

    A weight that holds nan or infinity is left out with a warning.

    Args:
        arms: of whose runs checkpoints were kept.
        load: gives the unedited model of a run with its layers, and the run's hyperparameters.
        keys: gives ``(n, d_in)`` keys of edits by layer in the unedited model, which ``load`` has just given.

    Returns:
        The tables ``geometry``, ``spectra`` and ``updates``.
    """
    geometry: list[tuple[Cell, ...]] = []
    spectra: list[tuple[Cell, ...]] = []
    updates: list[tuple[Cell, ...]] = []
    described: set[tuple[str, int]] = set()  # unedited weights are those of all runs of a model
    for arm in arms:
        editable, hparams = load(arm.run)
        undescribed = any((arm.run.model, layer) not in described for layer in editable.layers)
        keys_there = keys(arm.run) if keys is not None and undescribed else {}
        paths: dict[int, _Path] = {}
        for num_edits, weights in stages(arm.run, editable):
            for layer, weight in weights.items():
                if not bool(torch.isfinite(weight).all()):
                    logger.warning("%s after %d edits: layer %d holds nan or infinity, left out", arm.run.directory,
                                   num_edits, layer)
                    continue
                if layer in paths:
                    updates.append((*who(arm), layer, *paths[layer].step(num_edits, weight)))
                else:
                    paths[layer] = _Path(num_edits, weight, hparams.gamma)
                if num_edits == 0 and (arm.run.model, layer) in described:
                    continue
                described.add((arm.run.model, layer))
                cells = who(arm) if num_edits else (arm.run.model, None, None, UNEDITED)
                geometry.append((*cells, num_edits, layer, *_geometry(weight)))
                of_keys = ((None, None, None) if num_edits else
                           _shares_of_keys(editable, hparams, layer, weight, keys_there.get(layer)))
                spectra.append((*cells, num_edits, layer, *_spectrum(weight), *of_keys))
        updates += [(*who(arm), layer, *path.whole()) for layer, path in paths.items() if path.steps > 1]
    return [
        Table("geometry", "Pairwise cosines of neurons",
              (*WHO, Column("edits"), Column(_LAYER), Column("mean", _SHARE), Column("std", _SHARE),
               Column("share above 0.5", _SHARE), Column("mean |cos|", _SHARE),
               *(Column(f"q{100 * share:g}", _SHARE) for share in QUANTILES)), tuple(geometry),
              "Over all pairs of rows of an edited weight; q5: the 5% quantile."),
        Table("spectra", "How row directions spread",
              (*WHO, Column("edits"), Column(_LAYER), Column("effective rank"), Column("participation"),
               *(Column(f"rank at gamma {gamma:g}") for gamma in GAMMAS), Column("d_in"),
               Column("keys' second moment in the principal space", _SHARE),
               Column("edits' keys in the principal space", _SHARE), Column("by chance", _SHARE)), tuple(spectra),
              "Effective rank: exponential of the entropy of What^T What's spectrum; participation: one over the sum "
              "of its squared shares. The principal space is that of the run's gamma.").without_empty_columns(),
        Table("updates", "Where the change between checkpoints lies",
              (*WHO, Column(_LAYER), Column("from"), Column("to"), Column("in the principal space", _SHARE),
               Column("by chance", _SHARE), Column("times chance", ".2f"), Column("in the unedited one's", _SHARE),
               Column("cosine with the step before", ".3f"), Column("in its row space", _SHARE),
               Column("by chance there", _SHARE)), tuple(updates),
              "Shares of the change's squared norm: in the principal space of the weight that it was added to, and of "
              "the unedited weight; in the leading row space (90% of the squared norm) of the step before."
              ).without_empty_columns(),
    ]


def over_layers(table: Table) -> Table:
    """A table of ``weight_tables`` with the mean over layers in place of the layers, and how many they are."""
    names = [column.name for column in table.columns]
    kept = [index for index, name in enumerate(names) if name in _IDENTITY]
    averaged = [index for index, name in enumerate(names) if name not in (*_IDENTITY, _LAYER)]
    groups: dict[tuple[Cell, ...], list[tuple[Cell, ...]]] = {}
    for row in table.rows:
        groups.setdefault(tuple(row[index] for index in kept), []).append(row)
    rows = []
    for key, members in groups.items():
        cells = [[row[index] for row in members] for index in averaged]
        rows.append((*key, len(members), *(_mean([cell for cell in column if isinstance(cell, int | float)])
                                           for column in cells)))
    return replace(table, columns=(*(table.columns[index] for index in kept), Column("layers"),
                                   *(table.columns[index] for index in averaged)), rows=tuple(rows))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _geometry(weight: Tensor) -> tuple[Cell, ...]:
    found = neuron_geometry(weight)
    return found.mean, found.std, found.share_above, found.mean_magnitude, *found.quantiles.values()


def _spectrum(weight: Tensor) -> tuple[Cell, ...]:
    found = row_spectrum(weight)
    return found.effective_rank, found.participation, *found.ranks_at.values(), found.d_in


def moment_on_file(editable: EditableModel, hparams: SPHEREHyperParams, layer: int) -> Tensor | None:
    """``C`` of one layer ``(d_in, d_in)`` float32 on the CPU; None if there is no file, or it is another model's.

    Raises:
        ValueError: the file is damaged.
    """
    path = moment_path(editable, hparams, layer)
    check = StatisticsFingerprints(editable, hparams).check(path, layer)
    if check.differences:
        logger.warning("%s is left out: it was collected from %s", path, " and ".join(check.differences))
    if check.file is None or not check.fits:
        return None
    with ensure_unchanged([check.file]):
        return load_moment(path, editable.d_in(layer))


def _shares_of_keys(editable: EditableModel, hparams: SPHEREHyperParams, layer: int, weight: Tensor,
                    keys: Tensor | None) -> tuple[Cell, Cell, Cell]:
    """Shares in the weight's principal space: of the second moment, where its file is, and of keys; and by chance."""
    space = PrincipalSpace.from_weight(weight, hparams.gamma)
    moment = moment_on_file(editable, hparams, layer)
    of_moment = None if moment is None else moment_share(moment.to(weight.device), space).share
    return of_moment, None if keys is None else principal_share(keys, space).share, space.rank / space.d_in


def _ratio(share: SpaceShare) -> float:
    return share.share / share.chance if share.chance else math.nan


class _Path:
    """A weight from checkpoint to checkpoint, and the shares of its changes in principal spaces.

    Args:
        num_edits, weight: where it begins, ``(d_out, d_in)``.
        gamma: of the principal spaces.
    """

    def __init__(self, num_edits: int, weight: Tensor, gamma: float) -> None:
        self._gamma = gamma
        self._first = self._last = num_edits, weight
        self._space = PrincipalSpace.from_weight(weight, gamma)
        self._update: Tensor | None = None
        self.steps = 0

    def step(self, num_edits: int, weight: Tensor) -> tuple[Cell, ...]:
        """Cells of the change since the last step."""
        start, before = self._last
        update = weight - before
        share = principal_share(update, PrincipalSpace.from_weight(before, self._gamma))
        repeated = None if self._update is None else update_alignment(self._update, update)
        self._last, self._update, self.steps = (num_edits, weight), update, self.steps + 1
        return (start, num_edits, share.share, share.chance, _ratio(share), principal_share(update, self._space).share,
                *((None, None, None) if repeated is None else
                  (repeated.cosine, repeated.shared.share, repeated.shared.chance)))

    def whole(self) -> tuple[Cell, ...]:
        """Cells of the change since the beginning."""
        share = principal_share(self._last[1] - self._first[1], self._space)
        return self._first[0], self._last[0], share.share, share.chance, _ratio(share), share.share, None, None, None
