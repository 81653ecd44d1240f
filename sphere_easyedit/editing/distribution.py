"""Target values and keys of a batch, worked out by all the processes that hold the model, or by the one there is.

Edits of a batch are independent of each other until their keys are solved for, so each process takes some of them, with
about as many tokens as any other's. A batch's parts are grouped otherwise than the whole is, so results differ from one
process's by rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from ..hparams import SPHEREHyperParams
from ..models.architecture import EditableModel
from ..models.distributed import Replicas, merge_parts, split_balanced
from ..models.output_path import OutputPath
from .keys import BatchStates
from .requests import TokenizedRequest
from .target_values import TargetValues, optimise_target_values

_STATES = "states of the batch"


class States(Protocol):
    """What ``solve_batch`` asks of ``keys.BatchStates``, which see."""

    def read(self, layer: int) -> tuple[Tensor, Tensor, Tensor]: ...

    def advance(self, layer: int, to: int) -> None: ...

    def read_all(self) -> dict[int, Tensor]: ...


def target_values(editable: EditableModel, requests: Sequence[TokenizedRequest], hparams: SPHEREHyperParams,
                  progress: Callable[[int], None] | None, paths: Mapping[int, OutputPath]) -> TargetValues:
    """``optimise_target_values`` of a batch; ``progress`` hears of this process's edits as they are done."""
    replicas = Replicas.of(editable.model)
    if replicas is None:
        return optimise_target_values(editable, requests, hparams, progress, paths)
    parts = dealt_out(requests, replicas.world_size)
    found = replicas.run(_optimise, [(_chosen(requests, part), hparams, dict(paths)) for part in parts], progress)
    if progress is not None and (elsewhere := len(requests) - len(parts[0])):
        progress(elsewhere)
    return TargetValues(torch.stack(merge_parts(parts, [list(one.values) for one in found])),
                        merge_parts(parts, [one.losses for one in found]),
                        merge_parts(parts, [one.steps for one in found]))


@contextmanager
def batch_states(editable: EditableModel, requests: Sequence[TokenizedRequest], token_budget: int,
                 paths: Mapping[int, OutputPath]) -> Iterator[States]:
    """The batch's ``BatchStates`` within the context, each process holding those of some edits."""
    replicas = Replicas.of(editable.model)
    if replicas is None:
        yield BatchStates(editable, requests, token_budget, paths)
    else:
        yield _SharedStates(replicas, requests, token_budget, paths)
        replicas.run(_close, [()] * replicas.world_size, sync_weights=False)


class _SharedStates:
    """``BatchStates`` of which each process holds a part; results are on the CPU."""

    def __init__(self, replicas: Replicas, requests: Sequence[TokenizedRequest], token_budget: int,
                 paths: Mapping[int, OutputPath]) -> None:
        self._replicas, self._parts = replicas, dealt_out(requests, replicas.world_size)
        replicas.run(_open, [(_chosen(requests, part), token_budget, dict(paths)) for part in self._parts])

    def read(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        found = self._run(_read, layer)
        keys, states, now = (self._rows([part and part[number] for part in found]) for number in range(3))
        return keys, states, now

    def advance(self, layer: int, to: int) -> None:
        self._run(_advance, layer, to)

    def read_all(self) -> dict[int, Tensor]:
        found = self._run(_read_all)
        layers = next(part for part in found if part)
        return {layer: self._rows([part and part[layer] for part in found]) for layer in layers}

    def _run(self, job: Callable[..., Any], *given: Any) -> list[Any]:
        return self._replicas.run(job, [given] * self._replicas.world_size)

    def _rows(self, found: Sequence[Tensor | None]) -> Tensor:
        """Rows of the processes' parts in the batch's order."""
        return torch.stack(merge_parts(self._parts, [[] if part is None else list(part) for part in found]))


def dealt_out(requests: Sequence[TokenizedRequest], processes: int) -> list[list[int]]:
    """Which of a batch's edits each process takes: about as many tokens as any other."""
    tokens = [sum(len(prompt.ids) + len(request.target_ids) for prompt in (request.plain, *request.contexts))
              for request in requests]
    return split_balanced(tokens, processes)


def _chosen(requests: Sequence[TokenizedRequest], places: Sequence[int]) -> list[TokenizedRequest]:
    return [requests[place] for place in places]


def _optimise(here: Replicas, requests: Sequence[TokenizedRequest], hparams: SPHEREHyperParams,
              paths: Mapping[int, OutputPath]) -> TargetValues:
    if not requests:
        return TargetValues(torch.empty(0, here.editable.hidden_size, dtype=torch.float32), [], [])
    return optimise_target_values(here.editable, requests, hparams, here.progress, paths)


def _open(here: Replicas, requests: Sequence[TokenizedRequest], token_budget: int, paths: Mapping[int, OutputPath]
          ) -> None:
    here.store[_STATES] = BatchStates(here.editable, requests, token_budget, paths) if requests else None


def _read(here: Replicas, layer: int) -> tuple[Tensor, ...] | None:
    states = here.store[_STATES]
    return states and tuple(part.cpu() for part in states.read(layer))


def _advance(here: Replicas, layer: int, to: int) -> None:
    if states := here.store[_STATES]:
        states.advance(layer, to)


def _read_all(here: Replicas) -> dict[int, Tensor] | None:
    states = here.store[_STATES]
    return states and {layer: keys.cpu() for layer, keys in states.read_all().items()}


def _close(here: Replicas) -> None:
    del here.store[_STATES]
