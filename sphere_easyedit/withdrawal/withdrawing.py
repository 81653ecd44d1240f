"""Withdrawing facts from an edited model: weights, session and the record of it change together or not at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..editing.session import EditSession
from ..editing.solvers import KeyHistory, LowRankUpdate
from ..exclusive import exclusive
from ..hparams import SPHEREHyperParams, check_hparams
from ..inputs import default_torch_settings
from ..models import EditableModel
from .algebra import LayerStatement, Sum, withdraw_from
from .factors import BatchFactors, read_batches
from .facts import Fact, PastWithdrawal, read_past, still_true, weights_digest, write_past

logger = logging.getLogger(__name__)

_MOSTLY = 0.9  # of the withdrawn change must leave the weight, or a warning is logged


@dataclass(frozen=True)
class Withdrawal:
    """What was withdrawn, and the errors that go with it.

    Attributes:
        facts: withdrawn, in the order in which they were edited.
        staying: facts that stand in the weights still, in that order.
        num_edits: edits ever made to the model; withdrawing does not lower it.
        layers: the statement of each layer, whose ``residuals`` go with ``facts``.
    """

    facts: tuple[Fact, ...]
    staying: tuple[Fact, ...]
    num_edits: int
    layers: tuple[LayerStatement, ...]


def withdraw(model: nn.Module, hparams: SPHEREHyperParams, factors: str | Path, case_ids: Sequence[int | str],
             session: EditSession | None = None) -> Withdrawal:
    """Take facts out of the edited weights: ``W <- W - v_i k~_i^T`` for each of them, in every layer.

    What that leaves is stated, not undone: what other facts put at the withdrawn one's key, and what goes missing at
    theirs. The model is not the one that never saw the fact, since what was edited later was fitted with it in place.

    The session goes on. ``num_edits`` stays, for it numbers batches, checkpoints and records, and says how many edits
    were made; ``Withdrawal.staying`` says how many stand. The withdrawn facts' keys leave the history of earlier keys:
    nothing is left at them to be kept, later edits need not spare them, and the subject can be edited again at full
    strength. ``withdrawn.json`` beside the factors remembers the withdrawal.

    Args:
        model: as the last batch, or withdrawal, left it.
        hparams: that it was edited with.
        factors: folder that ``FactorKeeper`` kept from the first batch on.
        case_ids: of the facts. One that was edited more than once is withdrawn with all of its edits.
        session: of the edits; None for the one that lives on the model object.

    Returns:
        The statement of errors.

    Raises:
        ValueError: a fact is not in the model or was withdrawn already, factors are missing, damaged or of another run,
            or the weights are not those that the session left. Whatever is raised, the model, the session and the
            record are as before.
    """
    check_hparams(hparams)
    folder, editable = Path(factors), hparams.editable(model)
    with default_torch_settings(), exclusive(model):
        return _withdraw(editable, hparams, folder, case_ids, EditSession.of(model) if session is None else session)


def _withdraw(editable: EditableModel, hparams: SPHEREHyperParams, folder: Path, case_ids: Sequence[int | str],
              session: EditSession) -> Withdrawal:
    with session.unchanged_on_error():
        made = session.num_edits
        session.bind(editable, hparams)  # which clears it where it does not fit the model
        if made == 0 or session.num_edits != made:
            found = ("holds no edits" if made == 0 else
                     "does not fit the model: its weights were changed from outside, or the hyperparameters are others")
            raise ValueError(f"the session {found}. Withdraw with the model, session and hyperparameters that edited")
        weights = editable.weights()
        past = still_true(read_past(folder), made, weights)
        left, done = weights_without(session.original, weights, read_batches(folder, made, editable.layers), past,
                                     case_ids)
        history = _without_keys(session.history, done)
        with editable.restored_on_error():
            for layer, weight in left.items():
                editable.set_weight(layer, weight)
            batches = session.num_batches
            session.commit(editable, 0, history, session.unrestrained, {})
            session.num_batches = batches  # none came
            write_past(folder, [*past, PastWithdrawal(made, weights_digest(editable.weights()), done.facts)])
    return done


def weights_without(originals: Mapping[int, Tensor], weights: Mapping[int, Tensor], batches: Sequence[BatchFactors],
                    past: Sequence[PastWithdrawal], case_ids: Sequence[int | str]
                    ) -> tuple[dict[int, Tensor], Withdrawal]:
    """The edited weights without some facts; nothing is changed or written.

    Args:
        originals, weights: ``(d_out, d_in)`` by layer, before the first edit and as they stand.
        batches: all that were edited, in order.
        past: withdrawals that the weights have behind them.
        case_ids: of the facts.

    Returns:
        The new weights ``(d_out, d_in)`` by layer, and the statement.

    Raises:
        ValueError: as ``withdraw`` for facts and factors.
    """
    facts = [fact for batch in batches for fact in batch.facts]
    absent = {fact for entry in past for fact in entry.facts}
    chosen = _chosen(facts, absent, case_ids)
    batch = torch.tensor([fact.batch for fact in facts])
    standing = torch.tensor([fact not in absent for fact in facts])
    withdrawn = torch.tensor([fact in chosen for fact in facts])
    left, statements = {}, []
    for layer, weight in weights.items():
        updates = [one.update(layer, tuple(weight.shape)) for one in batches]
        update = LowRankUpdate(torch.cat([one.values for one in updates], dim=1),
                               torch.cat([one.keys for one in updates], dim=1),
                               torch.cat([one.solved_for for one in updates if one.solved_for is not None], dim=1))
        edits = Sum(_on(update, weight.device), batch.to(weight.device), standing.to(weight.device),
                    withdrawn.to(weight.device), len(batches) + len(past))
        left[layer], statement = withdraw_from(layer, originals[layer], weight, edits)
        if statement.taken < _MOSTLY:
            logger.warning("layer %d: only %.0f%% of the withdrawn change left the weight, since %s is coarser than "
                           "the change: edit and withdraw in float32", layer, 100 * statement.taken, weight.dtype)
        statements.append(statement)
    staying = tuple(fact for fact in facts if fact not in absent and fact not in chosen)
    return left, Withdrawal(tuple(fact for fact in facts if fact in chosen), staying, batches[-1].num_edits,
                            tuple(statements))


def _chosen(facts: Sequence[Fact], absent: set[Fact], case_ids: Sequence[int | str]) -> set[Fact]:
    if isinstance(case_ids, str) or not case_ids:
        raise ValueError(f"case_ids is {case_ids!r}: give a list of at least one case")
    chosen: set[Fact] = set()
    for case_id in case_ids:
        edits = [fact for fact in facts if fact.case_id == case_id]
        if not edits:
            raise ValueError(f"case_id {case_id!r} was not edited: edits.jsonl lists a run's cases")
        standing = {fact for fact in edits if fact not in absent}
        if not standing:
            raise ValueError(f"case_id {case_id!r} was withdrawn already: nothing of it stands in the weights")
        chosen |= standing
    return chosen


def _on(update: LowRankUpdate, device: torch.device) -> LowRankUpdate:
    assert update.solved_for is not None
    return LowRankUpdate(update.values.to(device), update.keys.to(device), update.solved_for.to(device))


def _without_keys(history: Mapping[int, KeyHistory], done: Withdrawal) -> dict[int, KeyHistory]:
    """The earlier keys without those of withdrawn facts; empty histories, of a method that keeps none, as they are."""
    gone = set(done.facts)
    # Columns are the edits in their order, but for those whose keys left with an earlier withdrawal.
    order = sorted((*done.facts, *done.staying), key=lambda fact: (fact.batch, fact.column))
    left: dict[int, KeyHistory] = {}
    for layer, earlier in history.items():
        keys = earlier.keys
        if keys.shape[1] not in (0, len(order)):
            raise ValueError(f"layer {layer}: the session remembers {keys.shape[1]} earlier keys, but {len(order)} "
                             "edits stand in the weights: it is not the session of these edits")
        stays = [column for column in range(keys.shape[1]) if order[column] not in gone]
        # Without a factor, as a session just loaded: the next batch makes it anew.
        left[layer] = KeyHistory(keys[:, stays], None) if len(stays) < keys.shape[1] else earlier
    return left
