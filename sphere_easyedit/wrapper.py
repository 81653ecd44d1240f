"""SPHERE around an executor: take the weight change, restrain it, project it, write it back."""

from __future__ import annotations

import copy as copying
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .callbacks import EditCallback, EditEvent
from .editing.contradictions import warn_of_contradictions
from .editing.executors import prepare_session, restored_after, solve_batch, tokenize_batch, warn_of_indirect_outputs
from .editing.grams import GramMatrices, carries_grams
from .editing.requests import EditRequest, TokenizedRequest, parse_requests, request_dicts
from .editing.session import EditSession
from .editing.solvers import KeyHistory
from .exclusive import exclusive
from .hparams import SPHEREHyperParams, check_hparams
from .inputs import check_model, check_parameters, check_tokenizer, ordinary_torch
from .methods.registry import METHODS
from .models import EditableModel, check_token_ids
from .reviewing import change_norms, reviewed
from .shaping import Shaping, check_finite
from .wrapped import WrappedExecutor

logger = logging.getLogger(__name__)

# EasyEdit's protocol: (model, tok, requests, hparams, copy=, return_orig_weights=, ...) -> (model, original weights).
Executor = Callable[..., tuple[nn.Module, Mapping[str, Tensor]]]


def apply_sphere_to_model(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    requests: Iterable[Any],
    hparams: SPHEREHyperParams,
    copy: bool = False,
    return_orig_weights: bool = False,
    session: EditSession | None = None,
    callbacks: Sequence[EditCallback] = (),
    executor: Executor | None = None,
    progress: Callable[[int], None] | None = None,
    **kwargs: Any,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Edit one batch of facts into a model by a base method with SPHERE (Eq. 12, 13).

    Other threads that edit or evaluate the same model meanwhile wait until the batch is done.

    Args:
        model: a causal language model of transformers, changed in place unless ``copy``.
        tok: its tokenizer.
        requests: EasyEdit's dicts, or dataclass instances with their fields: prompt (holding the subject, or ``{}``),
            subject, target_new, optionally case_id (a text or a whole number of any type). Any iterable of them.
        hparams: base method, gamma, alpha and the rest. ``alpha: 0`` gives the base method untouched.
        copy: edit and return a copy, whose history starts empty.
        return_orig_weights: return the edited weights as they were before this call, by parameter name.
        session: state carried from batch to batch; None for the one that lives on the model object.
        callbacks: told before and after the batch.
        executor: a function of EasyEdit's protocol whose weight change is taken in place of the native solve. It gets
            the requests and ``hparams`` as they are, and ``kwargs``. With ``executor: easyedit`` in the hyperparameters
            it is EasyEdit's own for ``base_alg``, if not given.
        progress: called with the number of edits whose target values are finished; for an executor, once at its end.
        kwargs: handed to ``executor``; EasyEdit's ``keep_original_weight`` and the like mean nothing to native solves.

    Returns:
        The edited model and the original weights (empty unless asked for).

    Raises:
        TypeError: model, tokenizer, hyperparameters, session or callbacks are of a wrong kind.
        ValueError: a request, hyperparameter, statistics file or result is unusable. Whatever is raised, the model and
            the session are as before the call.
        ImportError: ``executor: easyedit``, and EasyEdit can't be imported.
    """
    check_hparams(hparams)
    check_tokenizer(tok)
    check_model(model)
    check_parameters(model)
    dicts = request_dicts(requests)
    if session is not None and not isinstance(session, EditSession):
        raise TypeError(f"session is a {type(session).__name__}: give an EditSession, or None for the model's own")
    if isinstance(callbacks, EditCallback):
        raise TypeError(f"callbacks is a single {type(callbacks).__name__}: wrap it in a list")
    with ordinary_torch():
        if copy:
            with exclusive(model):
                model = copying.deepcopy(model)
        with exclusive(model):
            return _edit_batch(model, tok, dicts, hparams, return_orig_weights, session, callbacks, executor, progress,
                               kwargs)


def _edit_batch(
    model: nn.Module, tok: PreTrainedTokenizerBase, requests: Sequence[Mapping[str, Any]], hparams: SPHEREHyperParams,
    return_orig_weights: bool, session: EditSession | None, callbacks: Sequence[EditCallback],
    executor: Executor | None, progress: Callable[[int], None] | None, kwargs: Mapping[str, Any],
) -> tuple[nn.Module, dict[str, Tensor]]:
    session = EditSession.of(model) if session is None else session
    editable = hparams.editable(model, session.known_names(model, hparams))
    if executor is None and hparams.executor == "easyedit":
        executor = _easyedits_executor(hparams, session)
    if executor is not None and hparams.projection_stage == "layer":
        raise ValueError("projection_stage 'layer' projects within the native solve and can't reach into an executor: "
                         "set projection_stage to 'update'")
    if executor is not None and editable.offloaded_layers:
        raise ValueError(f"the weights of layers {editable.offloaded_layers} are offloaded, where an executor's "
                         "changes would be lost: set executor to 'native', or load the model into memory")
    hparams_as_given = hparams
    hparams = SPHEREHyperParams.from_dict(hparams.to_dict())  # checked again: attributes may have been set since
    with session.unchanged_on_error():
        started = time.perf_counter()
        tokenized: list[TokenizedRequest] = []
        session.bind(editable, hparams)
        parsed = read_requests(editable, tok, requests, session)
        if executor is None:
            prepare_session(editable, tok, hparams, session)
            tokenized = tokenize_batch(editable, tok, parsed, session)
        elif hparams.executor == "easyedit" and METHODS.find(hparams.base_alg) is not None:
            warn_of_indirect_outputs(editable, tok, session)
        warn_of_contradictions(parsed)
        seconds = {"preparation": time.perf_counter() - started}
        weights = editable.weights()
        carried = editable.layers if carries_grams(hparams, executor is None) else []
        grams = GramMatrices(editable, session.grams, carried)
        event = EditEvent(model, weights, session.num_edits, session.num_batches,
                          [request.case_id for request in parsed], grams=grams, requests=parsed)
        for callback in callbacks:
            callback.on_batch_start(event)

        with editable.undone_on_error() as before:
            shaping = Shaping(editable, hparams, session, grams)
            shaping.resume_unrestrained()
            if executor is None:
                losses, history = _edit_natively(editable, tokenized, hparams, session, shaping, seconds, progress)
            else:
                losses, history = [], session.history
                _edit_by(executor, editable, tok, requests, hparams_as_given, shaping, seconds, kwargs)
                if progress is not None:
                    progress(len(parsed))
            # Looked up anew: an executor may have put other tensors in the parameters' place.
            weights = editable.weights()
            event = replace(event, weights=weights, num_edits=session.num_edits + len(parsed),
                            num_batches=session.num_batches + 1, losses=losses,
                            update_norms=change_norms(weights, before), seconds=seconds)
            event = reviewed(event, callbacks, before, editable.weights, partial(shaping.scale_back, before))
            event = replace(event, updates=shaping.written)
            for callback in callbacks:
                callback.on_batch_end(event)
            session.commit(editable, len(parsed), history, shaping.unrestrained, grams.carried)
    originals = {editable.parameter_name(layer): editable.orient(layer, weight).contiguous()
                 for layer, weight in before.items()} if return_orig_weights else {}
    return model, originals


def prepare_method(editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                   session: EditSession, batch_size: int) -> None:
    """Check and collect what editing needs whatever the facts are (statistics, templates).

    Args:
        session: bound to the model (see ``EditSession.bind``).
        batch_size: how many will be edited at once, which not every executor of EasyEdit's can.

    Raises:
        ValueError, ImportError: what ``apply_sphere_to_model`` would refuse for any requests.
    """
    if hparams.executor == "easyedit":
        _easyedits_executor(hparams, session).check(hparams, editable, batch_size)
    else:
        prepare_session(editable, tok, hparams, session)


def read_requests(editable: EditableModel, tok: PreTrainedTokenizerBase, requests: Iterable[Any], session: EditSession
                  ) -> list[EditRequest]:
    """Check requests, also that the tokenizer's ids are the model's: before its tokens get into any statistics.

    Raises:
        ValueError: see ``parse_requests`` and ``check_token_ids``.
    """
    parsed = parse_requests(requests, first_id=session.num_edits)
    for ids in tok([request.prompt + request.target for request in parsed], verbose=False)["input_ids"]:
        check_token_ids(editable.model, max(ids, default=0))
    return parsed


def _easyedits_executor(hparams: SPHEREHyperParams, session: EditSession) -> WrappedExecutor:
    from .easyedit import wrapped_executor  # which imports this file, to register it

    return wrapped_executor(hparams, session)


def _edit_natively(
    editable: EditableModel, requests: Sequence[TokenizedRequest], hparams: SPHEREHyperParams, session: EditSession,
    shaping: Shaping, seconds: dict[str, float], progress: Callable[[int], None] | None,
) -> tuple[list[float], dict[int, KeyHistory]]:
    """Solve and write one batch; returns the target values' losses and the key histories to commit."""
    in_loop = hparams.projection_stage == "layer"
    solution = solve_batch(editable, requests, hparams, session, shaping.shape if in_loop else None, progress)
    started = time.perf_counter()
    for layer, update in solution.updates.items():
        shaping.write(layer, update if in_loop else shaping.shape(layer, update))
    shaping.read_out()
    seconds |= solution.seconds | {"projection": time.perf_counter() - started}
    return solution.target_values.losses, solution.history


def _edit_by(
    executor: Executor, editable: EditableModel, tok: PreTrainedTokenizerBase, requests: Sequence[Mapping[str, Any]],
    hparams: SPHEREHyperParams, shaping: Shaping, seconds: dict[str, float], kwargs: Mapping[str, Any],
) -> None:
    """Let an executor write one batch, and shape the change that it made."""
    started = time.perf_counter()
    with restored_after(editable) as before:
        edited, originals = executor(editable.model, tok, list(requests), hparams, copy=False,
                                     return_orig_weights=True, **kwargs)
        _check_reach(editable, edited, originals)
        after = {layer: editable.weight(layer).clone() for layer in editable.layers}
    seconds["executor"] = time.perf_counter() - started
    started = time.perf_counter()
    for layer, weight in after.items():
        check_finite(layer, weight)
        precise = torch.promote_types(weight.dtype, torch.float32)
        change = weight.to(precise) - before[layer].to(precise)
        shaped = shaping.shape(layer, change)
        if shaped is change:  # the executor's own bits, not a sum that rounds to them
            editable.set_weight(layer, weight)  # no Gram matrix is carried
        else:
            shaping.write(layer, shaped)
    shaping.read_out()
    seconds["projection"] = time.perf_counter() - started


@torch.no_grad()
def _check_reach(editable: EditableModel, edited: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Refuse what an executor did out of our sight; other weights that it says it changed are put back."""
    if edited is not editable.model:
        raise ValueError("the executor returned another model object than it was given: make it edit in place")
    ours = {editable.parameter_name(layer) for layer in editable.layers}
    others = {name: weight for name, weight in originals.items() if name not in ours}
    for name, weight in others.items():
        edited.get_parameter(name).copy_(weight)
    if others:
        raise ValueError(f"the executor changed {sorted(others)} too, which layers {editable.layers} do not cover: "
                         "make its layers and ours the same")
