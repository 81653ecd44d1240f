"""Remove facts from edited weights: subtract each fact's own part of the change, and state what that leaves.

Fact i added ``v_i k~_i^T`` to the weight. Subtracting it changes the output at any key k by ``-v_i (k~_i . k)``. What
remains at the fact's own key, and what goes missing at others', follows from the stored factors. Sums are in float64.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

import torch
from torch import Tensor, nn

from ..core.updates import LowRankUpdate
from ..editing.session import EditSession
from ..hparams import SPHEREHyperParams, check_hparams
from ..methods.solvers import KeyHistory
from ..models.checks import default_torch_settings
from ..utils.locks import exclusive
from . import factors as files
from .factors import Fact, PastRemoval, read_removals, still_valid, weights_digest, write_removals

logger = logging.getLogger(__name__)
_MOSTLY: Final = 0.9  # share of the removed change that must leave the weight, or a warning is logged
# Roundings of a batch are below eps/2 of the weight, those of a batch that was scaled back below eps: twice that.
_SAFETY: Final = 2.0


@dataclass(frozen=True)
class Edits:
    """All m edits of a layer, one column each.

    ``update`` has values ``(d_out, m)`` and keys ``(d_in, m)``; ``batch`` numbers, ascending, and the masks ``present``
    in the weight and ``removed`` now are ``(m,)``. ``steps`` counts how often the weight was written and rounded.
    """

    update: LowRankUpdate
    batch: Tensor
    present: Tensor
    removed: Tensor
    steps: int


@dataclass(frozen=True)
class LayerReport:
    """What removing facts did to a layer, to first order, at the keys k that facts were solved for.

    Attributes:
        residuals: Output at the removed fact's key due to its own and later batches, relative to the fact's own.
            ``||sum_j v_j (k~_j . k_i)|| / ||v_i (k~_i . k_i)||``.
        largest, median: change at the keys of the facts that stay, over what they put there:
            ``||sum_i v_i (k~_i . k_j)|| / ||v_j (k~_j . k_j)||``. 0 if none stays.
        taken: share of the removed change that left the weight after rounding to its dtype.
        rounding: ``||W - W_0 - sum||_F`` over the facts that stay, relative to the sum before.
    """

    layer: int
    residuals: tuple[float, ...]
    largest: float
    median: float
    taken: float
    rounding: float


@dataclass(frozen=True)
class Removal:
    """Facts removed and facts still present, in the order of editing; edits ever made; the report of each layer."""

    facts: tuple[Fact, ...]
    staying: tuple[Fact, ...]
    num_edits: int
    layers: tuple[LayerReport, ...]


def remove_facts(model: nn.Module, hparams: SPHEREHyperParams, factors: str | Path, case_ids: Sequence[int | str],
                 session: EditSession | None = None) -> Removal:
    """Remove facts from the edited weights: ``W <- W - v_i k~_i^T`` for each of them, in every layer.

    The model is not the one that never saw the fact: later edits were fitted with it in place. Editing can go on.
    ``num_edits`` still counts all edits made; the keys of removed facts leave the history of earlier keys, so that the
    subject can be edited again at full strength. The removal is recorded beside the factors.

    Args:
        model: as the last batch or removal left it.
        hparams: with which it was edited.
        factors: folder of the ``FactorKeeper``, kept from the first batch on.
        case_ids: cases of the facts; a case that was edited more than once is removed with all of its edits.
        session: of the edits; None for the one that belongs to the model object.

    Raises:
        ValueError: a fact is not in the model or was removed already, factors are missing, damaged or of another run,
            or the weights are not those that the session left. Model, session and record are then as before.
    """
    check_hparams(hparams)
    folder, editable = Path(factors), hparams.editable(model)
    session = EditSession.of(model) if session is None else session
    with default_torch_settings(), exclusive(model), session.unchanged_on_error():
        made, batches = session.num_edits, session.num_batches
        session.bind(editable, hparams)  # clears a session that does not fit the model
        if made == 0 or session.num_edits != made:
            found = ("holds no edits" if made == 0 else
                     "does not fit the model: its weights were changed from outside, or the hyperparameters are others")
            raise ValueError(f"the session {found}. Give the model, session and hyperparameters of the edits")
        weights = editable.weights()
        past = still_valid(read_removals(folder), made, weights)
        left, done = weights_without(session.original, weights, folder, made, past, case_ids)
        history = _without_keys(session.history, done)
        with editable.restoring():
            for layer, weight in left.items():
                editable.set_weight(layer, weight)
            session.commit(editable, 0, history, session.unrestrained, {})
            session.num_batches = batches  # a removal is no batch
            session.key_files = ()  # they have the removed keys, too
            write_removals(folder, [*past, PastRemoval(made, weights_digest(editable.weights()), done.facts)])
    return done


def weights_without(originals: Mapping[int, Tensor], weights: Mapping[int, Tensor], folder: Path, num_edits: int,
                    past: Sequence[PastRemoval], case_ids: Sequence[int | str]) -> tuple[dict[int, Tensor], Removal]:
    """The edited weights ``(d_out, d_in)`` without some facts, and the report; changes and writes nothing.

    ``originals`` and ``weights`` are those before the first edit and now; ``past`` are removals that the latter
    include.
    """
    batches = files.read_batches(folder, num_edits, list(weights))
    facts = [fact for batch in batches for fact in batch.facts]
    absent = {fact for entry in past for fact in entry.facts}
    chosen = _chosen(facts, absent, case_ids)
    left, reports = {}, []
    for layer, weight in weights.items():
        updates = [files.read_update(files.factors_path(folder, batch.num_edits), layer, tuple(weight.shape))
                   for batch in batches]
        update = LowRankUpdate(*(torch.cat([getattr(one, part) for one in updates], dim=1).to(weight.device)
                                 for part in ("values", "keys", "solved_for")))
        batch, present, removed = (torch.tensor(column, device=weight.device) for column in (
            [fact.batch for fact in facts], [fact not in absent for fact in facts], [fact in chosen for fact in facts]))
        edits = Edits(update, batch, present, removed, len(batches) + len(past))
        left[layer], report = remove_from(layer, originals[layer], weight, edits)
        if report.taken < _MOSTLY:
            logger.warning("layer %d: only %.0f%% of the removed change left the weight, since %s is coarser than the "
                           "change: edit and remove facts in float32", layer, 100 * report.taken, weight.dtype)
        reports.append(report)
    return left, Removal(tuple(fact for fact in facts if fact in chosen),
                         tuple(fact for fact in facts if fact not in absent | chosen), num_edits, tuple(reports))


def _chosen(facts: Sequence[Fact], absent: set[Fact], case_ids: Sequence[int | str]) -> set[Fact]:
    if isinstance(case_ids, str) or not case_ids:
        raise ValueError(f"case_ids is {case_ids!r}: give a list of at least one case")
    chosen: set[Fact] = set()
    for case_id in case_ids:
        edits = {fact for fact in facts if fact.case_id == case_id}
        if not edits - absent:
            raise ValueError(f"case_id {case_id!r} was removed already: nothing of it is left in the weights" if edits
                             else f"case_id {case_id!r} was not edited: edits.jsonl lists a run's cases")
        chosen |= edits - absent
    return chosen


def _without_keys(history: Mapping[int, KeyHistory], done: Removal) -> dict[int, KeyHistory]:
    """The earlier keys without those of removed facts; histories of a method that keeps no keys are empty."""
    # Columns are in the order of editing.
    order = sorted((*done.facts, *done.staying), key=lambda fact: (fact.batch, fact.column))
    stays = [column for column, fact in enumerate(order) if fact not in done.facts]
    left: dict[int, KeyHistory] = {}
    for layer, earlier in history.items():
        if earlier.keys.shape[1] not in (0, len(order)):
            raise ValueError(f"layer {layer}: the session holds {earlier.keys.shape[1]} earlier keys, but {len(order)} "
                             "edits are in the weights: give the session of these edits")
        # Without a factor, as in a session just loaded: the next batch computes it.
        left[layer] = KeyHistory(earlier.keys[:, stays], None) if earlier.keys.shape[1] else earlier
    return left


def remove_from(layer: int, original: Tensor, weight: Tensor, edits: Edits) -> tuple[Tensor, LayerReport]:
    """Remove facts from one weight W, given W_0, both ``(d_out, d_in)``; returns it rounded once to its dtype.

    Raises:
        ValueError: W is not W_0 plus the edits that are present, as far as rounding tells, or the new weight is not
            finite.
    """
    first, now = original.to(weight.device).double(), weight.double()
    values, keys = edits.update.values.double(), edits.update.keys.double()
    whole, part = (values[:, chosen] @ keys[:, chosen].T for chosen in (edits.present, edits.removed))
    reach = float((values.norm(dim=0) * keys.norm(dim=0)).sum())  # no weight on the way was further from W_0
    _, sizes = torch.unique_consecutive(edits.batch, return_counts=True)
    allowed = _SAFETY * (edits.steps * torch.finfo(weight.dtype).eps * (float(first.norm()) + reach)
                         + torch.finfo(torch.float32).eps * float(sizes.max()) * reach)
    if not (off := float((now - first - whole).norm())) <= allowed:
        raise ValueError(f"layer {layer}: the weight is not the original one plus the edits on file. It is off by "
                         f"{off:.2e} (Frobenius norm), rounding explains {allowed:.2e} at most: the factors are of "
                         "another run, or something else changed the weights. Give the folder that was kept while this "
                         "model was edited")
    left = (now - part).to(weight.dtype)
    if not bool(left.isfinite().all()):
        raise ValueError(f"layer {layer} without these facts is not finite in {weight.dtype}: nothing was changed")
    residuals, others = (found.tolist() for found in disturbances(edits))
    size, norm = float((part * part).sum()), float(whole.norm())
    error = float((left.double() - first - (whole - part)).norm())
    return left, LayerReport(layer, tuple(residuals), max(others, default=0.0), median(others or [0.0]),
                             float(((now - left.double()) * part).sum()) / size if size else 1.0,
                             error / norm if norm else 0.0)


def disturbances(edits: Edits) -> tuple[Tensor, Tensor]:
    """``residuals`` of the removed facts, and the changes at the keys of those that stay (see ``LayerReport``)."""
    assert edits.update.solved_for is not None
    values, keys, at = (part.double() for part in (edits.update.values, edits.update.keys, edits.update.solved_for))
    gone, stays = edits.removed, edits.present & ~edits.removed
    own = values.norm(dim=0) * (keys * at).sum(dim=0).abs()  # ||v_i (k~_i . k_i)||
    counts = stays[:, None] & (edits.batch[:, None] >= edits.batch[gone])  # (m, removed)
    put = (values @ ((keys.T @ at[:, gone]) * counts)).norm(dim=0)
    missing = (values[:, gone] @ (keys[:, gone].T @ at[:, stays])).norm(dim=0)
    return (torch.where(put == 0, put, put / own[gone]), torch.where(missing == 0, missing, missing / own[stays]))
