"""Edits one batch: prepare, compute keys and target values, solve, restrain, project, write, notify callbacks."""

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
from .callbacks import EditCallback, EditEvent, change_norms, review_batch
from .contradictions import warn_of_contradictions
from .engines import Batch, Executor, ExecutorEngine, engine_of
from .gram_matrices import GramMatrices, carries_grams
from .requests import EditRequest, parse_requests, request_dicts
from .session import EditSession
from .update_writer import UpdateWriter


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
    replaces: Sequence[int] = (),
    **kwargs: Any,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Edit one batch of facts into a model by a base method with SPHERE (Eq. 12, 13).

    Other threads that edit or evaluate the same model wait until the batch is done.

    Args:
        model: a causal language model of transformers, changed in place unless ``copy``.
        tok: its tokenizer.
        requests: any iterable of EasyEdit's dicts, or of dataclass instances with the same fields: prompt (containing
            the subject, or ``{}``), subject, target_new, and optionally case_id (a string or an integer of any type).
        hparams: base method, gamma, alpha and the rest. ``alpha: 0`` runs the base method alone.
        copy: edit and return a copy of the model, with an empty session.
        return_orig_weights: also return the edited weights as they were before this call, by parameter name.
        session: state carried from batch to batch; by default the one stored on the model object.
        callbacks: called before and after the batch.
        executor: function of EasyEdit's protocol whose weight change is used instead of the native solve. It receives
            the requests and ``hparams`` unchanged, and ``kwargs``. By default, ``executor: easyedit`` in the
            hyperparameters selects EasyEdit's own function for ``base_alg``.
        progress: called with the number of edits whose target values are finished; with an executor, once at its end.
        replaces: earlier edits of the session, counted from 0, that these requests make anew, as ``repair`` does: their
            keys no longer count, and the new ones take the last places in that order. Native methods only.
        kwargs: passed to ``executor``; ignored by native solves (EasyEdit's ``keep_original_weight`` and the like).

    Returns:
        The edited model and the original weights (empty unless asked for).

    Raises:
        TypeError: model, tokenizer, hyperparameters, session or callbacks have a wrong type.
        ValueError: a request, hyperparameter, statistics file or result is unusable. After any exception, the model and
            the session are as before the call.
        ImportError: ``executor: easyedit``, but EasyEdit can't be imported.
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
                               list(replaces), kwargs)


def _edit_batch(
    model: nn.Module, tok: PreTrainedTokenizerBase, requests: Sequence[Mapping[str, Any]], hparams: SPHEREHyperParams,
    return_orig_weights: bool, session: EditSession | None, callbacks: Sequence[EditCallback],
    executor: Executor | None, progress: Callable[[int], None] | None, replaces: list[int], kwargs: Mapping[str, Any],
) -> tuple[nn.Module, dict[str, Tensor]]:
    session = EditSession.of(model) if session is None else session
    editable = hparams.editable(model, session.known_names(model, hparams))
    engine = engine_of(hparams, session, kwargs) if executor is None else ExecutorEngine(executor, hparams, kwargs)
    engine.check(editable, hparams)
    if replaces and isinstance(engine, ExecutorEngine):
        raise ValueError("replaces is given, but an executor's state does not tell single edits apart: set executor to "
                         "'native'")
    hparams = SPHEREHyperParams.from_dict(hparams.to_dict())  # validates attributes that were set after construction
    with session.unchanged_on_error():
        # 1. Prepare: check and tokenize the requests, collect statistics and context templates if missing.
        started = time.perf_counter()
        session.bind(editable, hparams)
        batch = engine.prepare(editable, Batch(tok, requests, read_requests(editable, tok, requests, session)), hparams,
                               session)
        session.forget_keys(replaces)
        warn_of_contradictions(batch.requests)
        added = len(batch.requests) - len(replaces)
        seconds = {"preparation": time.perf_counter() - started}
        grams = GramMatrices(editable, session.grams,
                             editable.layers if carries_grams(hparams, engine.is_low_rank) else [])
        event = EditEvent(model, editable.weights(), session.num_edits, session.num_batches,
                          [request.case_id for request in batch.requests], grams=grams, requests=batch.requests)
        for callback in callbacks:
            callback.on_batch_start(event)

        with editable.restoring() as before:
            # 2. Compute keys and target values, and solve. At stage "layer", each layer's update is restrained and
            # projected before the next layer is solved.
            writer = UpdateWriter(editable, hparams, session, grams)
            writer.load_unrestrained()
            in_loop = hparams.projection_stage == "layer"
            solution = engine.solve(editable, batch, hparams, session, writer.restrain_and_project if in_loop else None,
                                    progress)

            # 3. Restrain, project and write.
            started = time.perf_counter()
            for layer, update in solution.updates.items():
                final = update if in_loop else writer.restrain_and_project(layer, update)
                writer.write(layer, final, solution.weights.get(layer) if final is update else None)
            writer.write_restrained_weights()
            seconds |= solution.seconds | {"projection": time.perf_counter() - started}

            # 4. Notify callbacks, which may scale the change back, and update the session.
            weights = editable.weights()  # read again: an executor may have replaced the parameters
            targets = solution.target_values
            event = replace(event, weights=weights, num_edits=session.num_edits + added,
                            num_batches=session.num_batches + 1, losses=[] if targets is None else targets.losses,
                            update_norms=change_norms(weights, before), seconds=seconds)
            event = review_batch(event, callbacks, before, editable.weights, partial(writer.scale_back, before))
            event = replace(event, updates=writer.written)
            for callback in callbacks:
                callback.on_batch_end(event)
            session.commit(editable, added, solution.history, writer.unrestrained, grams.carried)
    originals = {editable.parameter_name(layer): editable.orient(layer, weight).contiguous()
                 for layer, weight in before.items()} if return_orig_weights else {}
    return model, originals


def read_requests(editable: EditableModel, tok: PreTrainedTokenizerBase, requests: Iterable[Any], session: EditSession
                  ) -> list[EditRequest]:
    """Parse and check requests, and check that the tokenizer's ids are within the model's vocabulary.

    Raises:
        ValueError: see ``parse_requests`` and ``check_token_ids``.
    """
    parsed = parse_requests(requests, first_id=session.num_edits)
    for ids in tok([request.prompt + request.target for request in parsed], verbose=False)["input_ids"]:
        check_token_ids(editable.model, max(ids, default=0))
    return parsed
