"""Splits a batch's target values and keys over the processes that hold replicas of the model, if there are several.

The edits of a batch are independent until their keys are solved for, so each process takes some of them, about equally
many tokens. Since the parts are grouped into micro-batches differently than the whole batch, results differ from those
of one process by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..hparams import SPHEREHyperParams
from ..models.architecture import EditableModel
from ..models.distributed import Replicas, merge_parts, split_balanced
from ..models.output_path import OutputPath
from .keys import BatchStates
from .requests import TokenizedRequest
from .row_layout import KnownLayouts
from .target_values import TargetValues, optimise_target_values

_STATES, _LAYOUTS = "states of the batch", "layouts of rows"


def target_values(editable: EditableModel, requests: Sequence[TokenizedRequest], hparams: SPHEREHyperParams,
                  progress: Callable[[int], None] | None, paths: Mapping[int, OutputPath], layouts: KnownLayouts
                  ) -> TargetValues:
    """``optimise_target_values`` over all processes; ``progress`` follows this process's edits."""
    replicas = Replicas.of(editable.model)
    if replicas is None:
        return optimise_target_values(editable, requests, hparams, progress, paths, layouts)
    parts = split_over_processes(requests, replicas.world_size)
    results = replicas.run(_optimise, [([requests[i] for i in part], hparams, dict(paths)) for part in parts], progress)
    if progress is not None and (elsewhere := len(requests) - len(parts[0])):
        progress(elsewhere)
    return TargetValues(torch.stack(merge_parts(parts, [list(result.values) for result in results])),
                        merge_parts(parts, [result.losses for result in results]),
                        merge_parts(parts, [result.steps for result in results]))


@contextmanager
def batch_states(editable: EditableModel, requests: Sequence[TokenizedRequest], token_budget: int,
                 paths: Mapping[int, OutputPath]) -> Iterator[BatchStates | _DistributedStates]:
    """``BatchStates`` of a batch, split over all processes within the context."""
    replicas = Replicas.of(editable.model)
    if replicas is None:
        yield BatchStates(editable, requests, token_budget, paths)
    else:
        yield _DistributedStates(replicas, requests, token_budget, paths)
        replicas.run(_close, [()] * replicas.world_size, sync_weights=False)


class _DistributedStates:
    """``BatchStates`` of which each process holds a part; results are on the CPU."""

    def __init__(self, replicas: Replicas, requests: Sequence[TokenizedRequest], token_budget: int,
                 paths: Mapping[int, OutputPath]) -> None:
        self._replicas, self._parts = replicas, split_over_processes(requests, replicas.world_size)
        replicas.run(_open, [([requests[i] for i in part], token_budget, dict(paths)) for part in self._parts])

    def read(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        results = self._run(_read, layer)
        keys, states, now = (self._merged([result and result[number] for result in results]) for number in range(3))
        return keys, states, now

    def advance(self, layer: int, to: int) -> None:
        self._run(_advance, layer, to)

    def read_all(self) -> dict[int, Tensor]:
        results = self._run(_read_all)
        layers = next(result for result in results if result)
        return {layer: self._merged([result and result[layer] for result in results]) for layer in layers}

    def _run(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        return self._replicas.run(job, [arguments] * self._replicas.world_size)

    def _merged(self, results: Sequence[Tensor | None]) -> Tensor:
        """Rows from all processes in the order of the batch."""
        return torch.stack(merge_parts(self._parts, [[] if rows is None else list(rows) for rows in results]))


def split_over_processes(requests: Sequence[TokenizedRequest], processes: int) -> list[list[int]]:
    """Indices of the edits that each process takes, with about equally many tokens."""
    tokens = [sum(len(prompt.ids) + len(request.target_ids) for prompt in (request.plain, *request.contexts))
              for request in requests]
    return split_balanced(tokens, processes)


# Jobs that each process runs on its own replica.

def _optimise(replica: Replicas, requests: Sequence[TokenizedRequest], hparams: SPHEREHyperParams,
              paths: Mapping[int, OutputPath]) -> TargetValues:
    if not requests:
        return TargetValues(torch.empty(0, replica.editable.hidden_size, dtype=torch.float32), [], [])
    layouts = replica.store.setdefault(_LAYOUTS, KnownLayouts())
    return optimise_target_values(replica.editable, requests, hparams, replica.progress, paths, layouts)


def _open(replica: Replicas, requests: Sequence[TokenizedRequest], token_budget: int, paths: Mapping[int, OutputPath]
          ) -> None:
    replica.store[_STATES] = BatchStates(replica.editable, requests, token_budget, paths) if requests else None


def _read(replica: Replicas, layer: int) -> tuple[Tensor, ...] | None:
    states = replica.store[_STATES]
    return states and tuple(part.cpu() for part in states.read(layer))


def _advance(replica: Replicas, layer: int, to: int) -> None:
    if states := replica.store[_STATES]:
        states.advance(layer, to)


def _read_all(replica: Replicas) -> dict[int, Tensor] | None:
    states = replica.store[_STATES]
    return states and {layer: keys.cpu() for layer, keys in states.read_all().items()}


def _close(replica: Replicas) -> None:
    del replica.store[_STATES]
