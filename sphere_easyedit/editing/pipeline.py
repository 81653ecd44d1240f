"""SPHERE around an executor: take the weight change, restrain it, project it, write it back."""

from __future__ import annotations

import copy as copying
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..hparams import SPHEREHyperParams, check_hparams
from ..models.architecture import EditableModel, check_token_ids
from ..models.checks import check_model, check_parameters, check_tokenizer, default_torch_settings
from ..utils.locks import exclusive
from .callbacks import EditCallback, EditEvent
from .contradictions import warn_of_contradictions
from .engines import Batch, Executor, ExecutorEngine, engine_of
from .gram_matrices import GramMatrices, carries_grams
from .projecting import Shaping
from .requests import EditRequest, parse_requests, request_dicts
from .reviewing import change_norms, reviewed
from .session import EditSession


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
    with default_torch_settings():
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
    engine = engine_of(hparams, session, kwargs) if executor is None else ExecutorEngine(executor, hparams, kwargs)
    engine.check(editable, hparams)
    hparams = SPHEREHyperParams.from_dict(hparams.to_dict())  # checked again: attributes may have been set since
    with session.unchanged_on_error():
        started = time.perf_counter()
        session.bind(editable, hparams)
        batch = Batch(tok, requests, read_requests(editable, tok, requests, session))
        batch = engine.prepare(editable, batch, hparams, session)
        warn_of_contradictions(batch.requests)
        seconds = {"preparation": time.perf_counter() - started}
        grams = GramMatrices(editable, session.grams,
                             editable.layers if carries_grams(hparams, engine.is_low_rank) else [])
        event = EditEvent(model, editable.weights(), session.num_edits, session.num_batches,
                          [request.case_id for request in batch.requests], grams=grams, requests=batch.requests)
        for callback in callbacks:
            callback.on_batch_start(event)

        with editable.restored_on_error() as before:
            shaping = Shaping(editable, hparams, session, grams)
            shaping.resume_unrestrained()
            in_loop = hparams.projection_stage == "layer"
            solution = engine.solve(editable, batch, hparams, session, shaping.shape if in_loop else None, progress)
            started = time.perf_counter()
            for layer, update in solution.updates.items():
                shaped = update if in_loop else shaping.shape(layer, update)
                shaping.write(layer, shaped, solution.weights.get(layer) if shaped is update else None)
            shaping.read_out()
            seconds |= solution.seconds | {"projection": time.perf_counter() - started}

            # Looked up anew: an executor may have put other tensors in the parameters' place.
            weights = editable.weights()
            targets = solution.target_values
            event = replace(event, weights=weights, num_edits=session.num_edits + len(batch.requests),
                            num_batches=session.num_batches + 1, losses=[] if targets is None else targets.losses,
                            update_norms=change_norms(weights, before), seconds=seconds)
            event = reviewed(event, callbacks, before, editable.weights, partial(shaping.scale_back, before))
            event = replace(event, updates=shaping.written)
            for callback in callbacks:
                callback.on_batch_end(event)
            session.commit(editable, len(batch.requests), solution.history, shaping.unrestrained, grams.carried)
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
    engine_of(hparams, session).prepare_run(editable, tok, hparams, session, batch_size)


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
