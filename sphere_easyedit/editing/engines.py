"""What solves a batch: the native closed forms, or a function of EasyEdit's protocol. One interface for both."""

from __future__ import annotations

import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..hparams import SPHEREHyperParams
from ..models.architecture import EditableModel
from .requests import EditRequest, TokenizedRequest
from .session import EditSession
from .solve import (
    BatchSolution,
    ShapeUpdate,
    check_finite,
    prepare_session,
    restored_after,
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
        given: the requests as they were given, as dicts.
        requests: the same, checked.
        tokenized: the same in tokens; empty where the engine tokenises by itself.
    """

    tok: PreTrainedTokenizerBase
    given: Sequence[Mapping[str, Any]]
    requests: Sequence[EditRequest]
    tokenized: Sequence[TokenizedRequest] = ()


class Engine(Protocol):
    """Solves batches for weight changes.

    Attributes:
        is_low_rank: updates come as factors, a column an edit.
    """

    is_low_rank: ClassVar[bool]

    def check(self, editable: EditableModel, hparams: SPHEREHyperParams) -> None:
        """Refuse a model or settings that it can't edit by (ValueError)."""

    def prepare_run(self, editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                    session: EditSession, batch_size: int) -> None:
        """Check and collect what editing needs whatever the facts are.

        Raises:
            ValueError, ImportError: what no batch of this size could be edited for.
        """

    def prepare(self, editable: EditableModel, batch: Batch, hparams: SPHEREHyperParams, session: EditSession) -> Batch:
        """Check a batch and collect what it needs; gives the batch to solve.

        Raises:
            ValueError: a request, or a file that solving needs, is unusable.
        """

    def solve(self, editable: EditableModel, batch: Batch, hparams: SPHEREHyperParams, session: EditSession,
              shape_in_loop: ShapeUpdate | None, progress: Callable[[int], None] | None) -> BatchSolution:
        """Weight changes for a batch; the weights are left as they were.

        Args:
            batch: prepared.
            shape_in_loop: applied to each layer's update before the next layer is solved; None for no such thing.
            progress: called with the number of finished edits.

        Raises:
            ValueError: a result is unusable.
        """


class NativeEngine:
    """The closed forms of the registered methods."""

    is_low_rank: ClassVar[bool] = True

    def check(self, editable: EditableModel, hparams: SPHEREHyperParams) -> None:
        """Nothing is refused here."""

    def prepare_run(self, editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                    session: EditSession, batch_size: int) -> None:
        prepare_session(editable, tok, hparams, session)

    def prepare(self, editable: EditableModel, batch: Batch, hparams: SPHEREHyperParams, session: EditSession) -> Batch:
        prepare_session(editable, batch.tok, hparams, session)
        return replace(batch, tokenized=tokenize_batch(editable, batch.tok, batch.requests, session))

    def solve(self, editable: EditableModel, batch: Batch, hparams: SPHEREHyperParams, session: EditSession,
              shape_in_loop: ShapeUpdate | None, progress: Callable[[int], None] | None) -> BatchSolution:
        return solve_batch(editable, batch.tokenized, hparams, session, shape_in_loop, progress)


class ExecutorEngine:
    """A function of EasyEdit's protocol, whose change of the weights is taken as the update.

    Args:
        function: edits a model in place.
        hparams: handed to it.
        arguments: handed to it by name.
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

    def prepare_run(self, editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                    session: EditSession, batch_size: int) -> None:
        """Nothing is known of what it needs."""

    def prepare(self, editable: EditableModel, batch: Batch, hparams: SPHEREHyperParams, session: EditSession) -> Batch:
        return batch

    def solve(self, editable: EditableModel, batch: Batch, hparams: SPHEREHyperParams, session: EditSession,
              shape_in_loop: ShapeUpdate | None, progress: Callable[[int], None] | None) -> BatchSolution:
        started = time.perf_counter()
        with restored_after(editable):
            edited, originals = self._function(editable.model, batch.tok, list(batch.given), self._hparams, copy=False,
                                               return_orig_weights=True, **self._arguments)
            _check_reach(editable, edited, originals)
            after = {layer: editable.weight(layer).clone() for layer in editable.layers}
        seconds = {"executor": time.perf_counter() - started}
        for layer, weight in after.items():
            check_finite(layer, weight)
        if progress is not None:
            progress(len(batch.requests))
        return BatchSolution({layer: _change(weight, editable.weight(layer)) for layer, weight in after.items()},
                             session.history, None, seconds, after)


def _change(after: Tensor, before: Tensor) -> Tensor:
    """``after - before`` in float32 at least."""
    precise = torch.promote_types(after.dtype, torch.float32)
    return after.to(precise) - before.to(precise)


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


def _native_engine(*_: object) -> NativeEngine:
    return NativeEngine()


# The factory of the engine that each value of `executor` names; EasyEdit's is imported only where it is used.
_ENGINES = MappingProxyType({"native": "sphere_easyedit.editing.engines:_native_engine",
                             "easyedit": "sphere_easyedit.easyedit.engine:easyedit_engine"})


def engine_of(hparams: SPHEREHyperParams, session: EditSession, arguments: Mapping[str, Any] = MappingProxyType({})
              ) -> Engine:
    """The engine that ``executor`` of the hyperparameters names.

    Args:
        session: where EasyEdit's functions keep their state.
        arguments: handed to EasyEdit's functions by name.

    Raises:
        ImportError: it is EasyEdit's, which can't be imported.
        ValueError: EasyEdit has no such method.
    """
    engine: Engine = pkgutil.resolve_name(_ENGINES[hparams.executor])(hparams, session, arguments)
    return engine
