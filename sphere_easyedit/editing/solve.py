"""The native solver: prepares a session and computes the weight updates of a batch layer by layer."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.tensors import widened
from ..core.updates import LowRankUpdate, Update, dense
from ..hparams import SPHEREHyperParams
from ..methods.covariance import load_moment, statistics_files
from ..methods.solvers import KeyHistory, adjusted_keys
from ..methods.statistics_fingerprint import ensure_unchanged
from ..methods.tensor_store import TensorStore
from ..models.architecture import EditableModel, frozen, max_positions
from ..models.checks import check_causal, decoder_errors
from ..models.logit_map import find_logit_map
from ..models.output_path import OutputPath, Scaled
from ..models.output_path_discovery import find_output_paths
from ..models.replay import check_replay, pad_rows
from .contexts import generate_contexts
from .data_parallel import batch_states, target_values
from .requests import EditRequest, TokenizedRequest, tokenize_prompt, tokenize_request
from .session import EditSession
from .target_values import TargetValues

logger = logging.getLogger(__name__)

# Prompts (before the subject, subject, after it) that probe a model before its first edit.
_PROBE_PROMPTS = (("The capital of ", "France", " is the city of"), ("", "John Smith", " plays for the team"),
                  ("In 1998, ", "Anna", " moved to Berlin, where she worked as a"))

UpdateTransform = Callable[[int, Update], Update]


@dataclass(frozen=True)
class BatchSolution:
    """Result of solving one batch; the model's weights are unchanged.

    Attributes:
        updates: weight change by layer, after ``transform`` where one was given.
        history: earlier keys and this batch's, by layer; empty if the method keeps no keys.
        target_values: the optimised z with losses and steps; None if the engine does not report them.
        seconds: wall time by phase.
        weights: exact weight that each unmodified update leads to, by layer; empty if that is ``W + dW``.
    """

    updates: Mapping[int, Update]
    history: dict[int, KeyHistory]
    target_values: TargetValues | None
    seconds: dict[str, float]
    weights: dict[int, Tensor] = field(default_factory=dict)


def prepare_session(editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                    session: EditSession) -> None:
    """Fill in what a session lacks to solve a batch: output paths, context templates, key metrics, key histories.

    Raises:
        ValueError: the model can't be edited with these module names, or statistics or the null space are missing or do
            not fit.
    """
    if set(session.paths) != set(editable.layers):
        session.paths = _find_paths(editable, tok)
    prepare_contexts(editable, tok, hparams, session)
    if any(history.device != editable.device(layer) for layer, history in session.history.items()):
        logger.info("the model moved to another device: the session's state is moved, too")
        session.metrics, session.spaces = {}, {}
        session.history = {layer: history.keys_only() for layer, history in session.history.items()}
    if session.store is None:
        limit = None if hparams.state_memory is None else int(hparams.state_memory * 1e9)
        session.store = TensorStore(limit, None if hparams.state_folder is None else Path(hparams.state_folder))
    if set(session.metrics) != set(editable.layers):
        with unedited(editable, session):
            if hparams.method.needs_statistics(hparams):
                session.statistics = statistics_files(editable, tok, hparams)
            with ensure_unchanged(session.statistics.values()):
                session.metrics = hparams.method.key_metrics(editable, hparams, session.statistics, session.store)
    for layer in editable.layers:
        history = session.history.get(layer)
        metric = session.metrics[layer]
        device = editable.device(layer)
        if history is None:
            history = KeyHistory.empty(editable.d_in(layer), metric, device, session.store)
        elif history.metric is None:  # loaded from a checkpoint, or moved
            history = KeyHistory(history.keys, metric, device, session.store)
        session.history[layer] = history


def prepare_contexts(editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                     session: EditSession) -> None:
    """Take over or generate the context templates, unless the session has them."""
    if session.contexts is None:
        given = hparams.context_templates
        with frozen(editable.model):
            session.contexts = generate_contexts(editable, tok, hparams.seed) if given is None else list(given)


def _find_paths(editable: EditableModel, tok: PreTrainedTokenizerBase) -> dict[int, OutputPath]:
    """Output paths of the edited weights, found and verified by a probe (ValueError if the model is not understood)."""
    limit = max_positions(editable.config)
    prompts = [tokenize_prompt(tok, before, subject, after).ids[:limit] for before, subject, after in _PROBE_PROMPTS]
    with frozen(editable.model), decoder_errors(editable.model):
        check_causal(editable.model, prompts[0])
        find_logit_map(editable, pad_rows(prompts[:1], editable.input_device).input_ids)
        check_replay(editable, prompts[0])
        return find_output_paths(editable, prompts)


def warn_of_indirect_outputs(editable: EditableModel, tok: PreTrainedTokenizerBase, session: EditSession) -> None:
    """Warn, once a session, where EasyEdit's own MEMIT and AlphaEdit edit a model wrongly.

    They assume that the output of the edited weight is added to the residual stream unchanged.
    """
    if session.num_batches:
        return
    try:
        session.paths = _find_paths(editable, tok)
    except ValueError as error:  # EasyEdit may be able to edit a model that the native solver refuses
        logger.warning("%s", error)
        return
    if any(path != Scaled() for path in session.paths.values()):
        logger.warning("%s scales or normalises the output of the edited weights on its way to the residual stream: "
                       "EasyEdit's own executor takes no account of that and edits wrongly. Set executor to 'native'",
                       type(editable.model).__name__)


def tokenize_batch(editable: EditableModel, tok: PreTrainedTokenizerBase, requests: Sequence[EditRequest],
                   session: EditSession) -> list[TokenizedRequest]:
    """Tokenize a batch with the session's context templates.

    Raises:
        ValueError: a target has no tokens, or a prompt exceeds the model's context.
    """
    assert session.contexts is not None
    limit = max_positions(editable.config)
    return [tokenize_request(tok, request, session.contexts, limit) for request in requests]


@contextmanager
def unedited(editable: EditableModel, session: EditSession) -> Iterator[None]:
    """Restore the original weights inside the context: statistics describe the unedited model."""
    with editable.restoring(always=True):
        for layer, weight in session.original.items():
            editable.set_weight(layer, weight)
        yield


def add_update(editable: EditableModel, layer: int, update: Update) -> None:
    """``W <- W + dW``, added in float32 or better.

    Raises:
        ValueError: the new weight is not finite.
    """
    weight = editable.weight(layer)
    changed = (widened(weight) + dense(update).to(weight.device)).to(weight.dtype)
    if not bool(torch.isfinite(changed).all()):
        raise ValueError(f"the update of layer {layer} is not finite in {weight.dtype}: nothing was changed. Look at "
                         "the statistics, L2 or mom2_update_weight")
    editable.set_weight(layer, changed)


def check_finite(layer: int, weight: Tensor) -> None:
    """Refuse a weight or weight change with NaN or infinity (ValueError)."""
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"the executor left non-finite values in layer {layer}: nothing was changed")


def solve_batch(editable: EditableModel, requests: Sequence[TokenizedRequest], hparams: SPHEREHyperParams,
                session: EditSession, transform: UpdateTransform | None = None,
                progress: Callable[[int], None] | None = None) -> BatchSolution:
    """Solve one batch by the base method's closed form, layer after layer; model and session stay unchanged.

    Args:
        editable: the model with the weights that the batch starts from.
        requests: the tokenized edits.
        hparams: the method's settings.
        session: prepared (see ``prepare_session``).
        transform: applied to each layer's update before the next layer is solved (``projection_stage: layer``).
        progress: called with the number of finished target values.

    Raises:
        ValueError: a target value or update is not finite.
    """
    seconds = {}
    with frozen(editable.model), editable.restoring(always=True):
        started = time.perf_counter()
        targets = target_values(editable, requests, hparams, progress, session.paths, session.layouts)
        if not bool(torch.isfinite(targets.values).all()):
            bad = [request.request.case_id for request, value in zip(requests, targets.values, strict=True)
                   if not bool(torch.isfinite(value).all())]
            raise ValueError(f"target values of case_id {bad} are not finite; lower v_lr, or look at the weights")
        seconds["target_values"] = time.perf_counter() - started

        started = time.perf_counter()
        updates: dict[int, Update] = {}
        history = {}
        with batch_states(editable, requests, hparams.token_budget, session.paths) as states:
            for position, layer in enumerate(editable.layers):
                keys, path_states, now = states.read(layer)  # (n, d_in), (n, k), (n, hidden)
                share = (targets.values.to(now.device) - now) / (len(editable.layers) - position)
                residuals = session.paths[layer].input_change(path_states.to(now.device), share)
                update: Update = _solve_layer(editable, layer, keys, residuals, hparams, session)
                if transform is not None:
                    update = transform(layer, update)
                add_update(editable, layer, update)
                updates[layer] = update
                if layer != editable.layers[-1]:
                    states.advance(layer, to=editable.layers[position + 1])
            if hparams.method.keeps_keys(hparams):
                for layer, keys in states.read_all().items():
                    history[layer] = session.history[layer].extended(keys.T)
        seconds["solve"] = time.perf_counter() - started
    return BatchSolution(updates, history, targets, seconds)


def _solve_layer(editable: EditableModel, layer: int, keys: Tensor, residuals: Tensor, hparams: SPHEREHyperParams,
                 session: EditSession) -> LowRankUpdate:
    device = editable.device(layer)
    keys = keys.T.to(device)  # K (d_in, n)
    history = session.history[layer]
    adjusted = adjusted_keys(history, keys)
    if adjusted is None:
        logger.warning("layer %d: solving densely in the space of %d inputs", layer, len(keys))
        adjusted = _solve_densely(editable, layer, keys, history, hparams, session)
    return LowRankUpdate(residuals.T.to(device), adjusted.float(), keys)


def _solve_densely(editable: EditableModel, layer: int, keys: Tensor, history: KeyHistory, hparams: SPHEREHyperParams,
                   session: EditSession) -> Tensor:
    def moment() -> Tensor:
        file = session.statistics[layer]
        with ensure_unchanged([file]):
            return load_moment(file.path, editable.d_in(layer)).to(keys.device)

    try:
        return hparams.method.solve_densely(session.metrics[layer], moment, keys, history, hparams)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise ValueError(f"layer {layer}: the system of keys is singular ({error}); collect statistics from more text "
                         "(mom2_n_samples), or raise L2 or mom2_update_weight") from error
