"""Engines that compute the weight updates of a batch: the native solver, or a function of EasyEdit's protocol."""

from __future__ import annotations

import pkgutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..core.tensors import widened
from ..hparams import SPHEREHyperParams
from ..models.architecture import EditableModel
from . import fine_tuning
from .requests import EditRequest, TokenizedRequest
from .session import EditSession
from .solve import (
    BatchSolution,
    UpdateTransform,
    check_finite,
    prepare_contexts,
    prepare_session,
    solve_batch,
    tokenize_batch,
)

# EasyEdit's protocol: (model, tok, requests, hparams, copy=, return_orig_weights=, ...) -> (model, original weights).
Executor = Callable[..., tuple[nn.Module, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Batch:
    """The edits of one batch.

    Attributes:
        tok: the model's tokenizer.
        given: the requests as the caller gave them, as dicts.
        requests: the parsed requests.
        tokenized: the tokenized requests; empty where the engine tokenizes by itself.
    """

    tok: PreTrainedTokenizerBase
    given: Sequence[Mapping[str, Any]]
    requests: Sequence[EditRequest]
    tokenized: Sequence[TokenizedRequest] = ()


class Engine:
    """Computes the weight updates of a batch from prepared requests.

    Attributes:
        is_low_rank: updates are ``LowRankUpdate``, one column an edit.
    """

    is_low_rank: ClassVar[bool]

    def check(self, editable: EditableModel, hparams: SPHEREHyperParams) -> None:
        """Refuse a model or settings that this engine can't edit with (ValueError)."""

    def prepare_run(self, editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                    session: EditSession, batch_size: int) -> None:
        """Check and collect what any batch needs (statistics, context templates), before a run's first batch.

        Args:
            session: bound to the model (see ``EditSession.bind``).
            batch_size: edits a batch, which some of EasyEdit's functions limit to one.

        Raises:
            ValueError, ImportError: no batch of this size could be edited.
        """

    def check_requests(self, editable: EditableModel, tok: PreTrainedTokenizerBase, requests: Sequence[EditRequest],
                       session: EditSession) -> None:
        """Refuse requests that can't be edited (ValueError); after ``prepare_run``."""

    def prepare(self, editable: EditableModel, batch: Batch, hparams: SPHEREHyperParams, session: EditSession) -> Batch:
        """Check a batch, collect what it needs, and return the batch to solve.

        Raises:
            ValueError: a request, or a file that solving needs, is unusable.
        """
        return batch

    def solve(self, editable: EditableModel, batch: Batch, hparams: SPHEREHyperParams, session: EditSession,
              transform: UpdateTransform | None, progress: Callable[[int], None] | None) -> BatchSolution:
        """Compute the weight updates of a prepared batch; the weights are left as they were.

        Args:
            transform: applied to each layer's update before the next layer is solved, if given.
            progress: called with the number of finished edits.

        Raises:
            ValueError: a result is unusable.
        """
        raise NotImplementedError


class NativeEngine(Engine):
    """Solves the closed forms of the registered methods."""

    is_low_rank: ClassVar[bool] = True

    def prepare_run(self, editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                    session: EditSession, batch_size: int) -> None:
        prepare_session(editable, tok, hparams, session)

    def check_requests(self, editable: EditableModel, tok: PreTrainedTokenizerBase, requests: Sequence[EditRequest],
                       session: EditSession) -> None:
        tokenize_batch(editable, tok, requests, session)

    def prepare(self, editable: EditableModel, batch: Batch, hparams: SPHEREHyperParams, session: EditSession) -> Batch:
        self.prepare_run(editable, batch.tok, hparams, session, len(batch.requests))
        return replace(batch, tokenized=tokenize_batch(editable, batch.tok, batch.requests, session))

    def solve(self, editable: EditableModel, batch: Batch, hparams: SPHEREHyperParams, session: EditSession,
              transform: UpdateTransform | None, progress: Callable[[int], None] | None) -> BatchSolution:
        return solve_batch(editable, batch.tokenized, hparams, session, transform, progress)


class FineTuningEngine(NativeEngine):
    """Trains the edited weights (see ``fine_tuning``)."""

    is_low_rank: ClassVar[bool] = False

    def check(self, editable: EditableModel, hparams: SPHEREHyperParams) -> None:
        if hparams.projection_stage == "layer":
            raise ValueError(f"projection_stage 'layer' projects each layer before the next is solved, but "
                             f"{hparams.base_alg} trains all layers together: set projection_stage to 'update'")
        if editable.offloaded_layers:
            raise ValueError(f"the weights of layers {editable.offloaded_layers} are offloaded, which "
                             f"{hparams.base_alg} can't train: load the model into memory")

    def prepare_run(self, editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                    session: EditSession, batch_size: int) -> None:
        prepare_contexts(editable, tok, hparams, session)
        fine_tuning.prepare(editable, tok, hparams, session)

    def solve(self, editable: EditableModel, batch: Batch, hparams: SPHEREHyperParams, session: EditSession,
              transform: UpdateTransform | None, progress: Callable[[int], None] | None) -> BatchSolution:
        started = time.perf_counter()
        trained = fine_tuning.fine_tune(editable, batch.tokenized, hparams, session, progress)
        session.engine_history = fine_tuning.history_of(trained.memory)
        after = {layer: weight.to(editable.weight(layer).dtype) for layer, weight in trained.weights.items()}
        seconds = {"fine_tuning": time.perf_counter() - started}
        return BatchSolution(_WeightChanges(editable, after), session.history, None, seconds, after)


class ExecutorEngine(Engine):
    """Runs a function of EasyEdit's protocol and takes its change of the weights as the update.

    Args:
        function: edits a model in place.
        hparams: passed to it.
        arguments: keyword arguments passed to it.
    """

    is_low_rank: ClassVar[bool] = False

    def __init__(self, function: Executor, hparams: SPHEREHyperParams, arguments: Mapping[str, Any]) -> None:
        self._function, self._hparams, self._arguments = function, hparams, arguments

    def check(self, editable: EditableModel, hparams: SPHEREHyperParams) -> None:
        if hparams.projection_stage == "layer":
            raise ValueError("projection_stage 'layer' projects within the native solve and can't reach into an "
                             "executor: set projection_stage to 'update'")
        if editable.offloaded_layers:
            raise ValueError(f"the weights of layers {editable.offloaded_layers} are offloaded, where an executor's "
                             "changes would be lost: set executor to 'native', or load the model into memory")

    def solve(self, editable: EditableModel, batch: Batch, hparams: SPHEREHyperParams, session: EditSession,
              transform: UpdateTransform | None, progress: Callable[[int], None] | None) -> BatchSolution:
        started = time.perf_counter()
        with editable.restoring(always=True):
            edited, originals = self._function(editable.model, batch.tok, list(batch.given), self._hparams, copy=False,
                                               return_orig_weights=True, **self._arguments)
            _check_scope(editable, edited, originals)
            after = {layer: editable.weight(layer).clone() for layer in editable.layers}
        seconds = {"executor": time.perf_counter() - started}
        for layer, weight in after.items():
            check_finite(layer, weight)
        if progress is not None:
            progress(len(batch.requests))
        return BatchSolution(_WeightChanges(editable, after), session.history, None, seconds, after)


class _WeightChanges(Mapping[int, Tensor]):
    """Changes from the model's current weights to given ones, by layer, in float32 at least.

    Computed when read, so that only one layer's dense change is in memory at a time.
    """

    def __init__(self, editable: EditableModel, after: Mapping[int, Tensor]) -> None:
        self._editable, self._after = editable, after

    def __getitem__(self, layer: int) -> Tensor:
        return widened(self._after[layer]) - widened(self._editable.weight(layer))

    def __iter__(self) -> Iterator[int]:
        return iter(self._after)

    def __len__(self) -> int:
        return len(self._after)


@torch.no_grad()
def _check_scope(editable: EditableModel, edited: nn.Module, originals: Mapping[str, Tensor]) -> None:
    """Refuse an executor that changed anything but the edited layers (ValueError); other weights are restored."""
    if edited is not editable.model:
        raise ValueError("the executor returned another model object than it was given: make it edit in place")
    ours = {editable.parameter_name(layer) for layer in editable.layers}
    others = {name: weight for name, weight in originals.items() if name not in ours}
    for name, weight in others.items():
        edited.get_parameter(name).copy_(weight)
    if others:
        raise ValueError(f"the executor changed {sorted(others)} too, which layers {editable.layers} do not cover: "
                         "make its layers and ours the same")


def engine_of(hparams: SPHEREHyperParams, session: EditSession, arguments: Mapping[str, Any] = MappingProxyType({})
              ) -> Engine:
    """Return the engine that ``executor`` of the hyperparameters names.

    Args:
        session: where EasyEdit's functions keep their state.
        arguments: keyword arguments passed to EasyEdit's functions.

    Raises:
        ImportError: it is EasyEdit's, and EasyEdit can't be imported.
        ValueError: EasyEdit has no such method.
    """
    if hparams.executor == "native":
        return FineTuningEngine() if hparams.method.fine_tunes else NativeEngine()
    # Resolved by name, since ``easyedit`` is above this package and is imported only where it is used.
    easyedit_engine = pkgutil.resolve_name("sphere_easyedit.easyedit.engine:easyedit_engine")
    engine: Engine = easyedit_engine(hparams, session, arguments)
    return engine
