"""Data-parallel editing: several processes hold the same model, and a leader distributes work to the others.

Processes are started by accelerate's launcher or torchrun and communicate by torch.distributed (gloo on CPUs, nccl on
GPUs). The **leader** (rank 0) alone edits, decides and writes files, with the same code as a single process. Work that
can be divided (target values, keys, evaluation, statistics: the callers of ``Replicas.run``) is sent to all processes
as a **job**, and the results are gathered. Before a job the leader broadcasts the edited weights that changed since the
last one, so a batch that it rolls back or repeats needs no further coordination.

Jobs and their arguments are pickled between processes of one run, which trust each other.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..utils.signals import ProcessLost
from .architecture import EditableModel, frozen
from .fingerprint import Fingerprint, model_fingerprint, weights_checksum

logger = logging.getLogger(__name__)

T = TypeVar("T")
Job = Callable[..., T]  # called with the process's own Replicas, then its arguments

_ATTRIBUTE = "_sphere_replicas"
# A lost process is noticed by its connection or by the launcher; the leader itself may be busy for hours.
_TIMEOUT = timedelta(days=2)


@dataclass(frozen=True)
class ProcessInfo:
    """Rank and device of this process.

    Attributes:
        rank: 0 is the leader.
        world_size: number of processes.
        device: device of its model, as hyperparameters name it.
    """

    rank: int
    world_size: int
    device: str

    @classmethod
    def join(cls, device: int | str | None = None) -> ProcessInfo:
        """Join the processes that ``accelerate launch`` or ``torchrun`` started; without a launcher, one process.

        Args:
            device: the hyperparameters' device. Each process gets a GPU, unless it is ``cpu`` or there are none.

        Raises:
            ValueError: this machine has fewer GPUs than processes.
        """
        from accelerate import PartialState  # type: ignore[import-untyped]

        on_cpu = device == "cpu" or not torch.cuda.is_available()  # accelerate uses the CPU only if asked to
        state: Any = PartialState(cpu=on_cpu, timeout=_TIMEOUT)
        own: torch.device = state.device
        if state.num_processes > 1 and own.type == "cuda":
            if state.local_process_index >= torch.cuda.device_count():
                raise ValueError(f"process {state.process_index} is number {state.local_process_index} of its machine, "
                                 f"which has {torch.cuda.device_count()} GPUs: start one process per GPU")
            return cls(state.process_index, state.num_processes, str(own))
        return cls(state.process_index, state.num_processes, own.type)


@dataclass(frozen=True)
class _Failure:
    """An error raised by a job."""

    error: Exception


class Replicas:
    """One of several processes that hold the same model.

    Args:
        editable: this process's model, with the layers to edit.
        process: this process's rank and device.

    Attributes:
        editable, process: as given.
        store: values that jobs keep on this process from one job to the next.
        progress: progress callback of a job; None except on the leader.

    Raises:
        ValueError: the processes' models differ.
    """

    def __init__(self, editable: EditableModel, process: ProcessInfo) -> None:
        self.editable, self.process = editable, process
        self.store: dict[str, Any] = {}
        self.progress: Callable[..., None] | None = None
        self._broken = False
        with self._communicating():
            found: list[Any] = [None] * process.world_size
            dist.all_gather_object(found, model_fingerprint(editable.model))
        if len(set(found)) > 1:
            raise ValueError(f"the models of the {process.world_size} processes differ: load the same weights in all")
        self._known = self._fingerprints()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model exists on this process only

    @classmethod
    def of(cls, model: nn.Module) -> Replicas | None:
        """The replicas whose leader holds this model, or None."""
        found = getattr(model, _ATTRIBUTE, None)
        return found if isinstance(found, cls) else None

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.process.world_size

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Distribute jobs to the other processes; at the end check that all hold the same weights, and stop them.

        Raises:
            ProcessLost: a process has died.
            RuntimeError: a process's weights differ from the leader's.
        """
        vars(self.editable.model)[_ATTRIBUTE] = self
        try:
            yield
            checksums = self.run(_checksum, [()] * self.world_size)
            if any(one != checksums[0] for one in checksums):
                raise RuntimeError("the weights of the processes differ after editing: discard them, and report this")
            logger.info("%d processes hold the same weights, bit for bit", self.world_size)
        finally:
            vars(self.editable.model).pop(_ATTRIBUTE, None)
            if not self._broken:
                with self._communicating():
                    _broadcast(None)

    def follow(self) -> None:
        """Run the leader's jobs until it ends.

        Raises:
            ProcessLost: the leader has died.
        """
        with frozen(self.editable.model):
            while True:
                with self._communicating():
                    message = _broadcast()
                if message is None:
                    return
                job, shares, changed = message
                with self._communicating():
                    self._broadcast_weights(changed)
                found = self._attempt(job, shares[self.process.rank])
                with self._communicating():
                    dist.gather_object(found, dst=0)

    def run(self, job: Job[T], shares: Sequence[tuple[Any, ...]], progress: Callable[..., None] | None = None,
            sync_weights: bool = True) -> list[T]:
        """Run a job on every process, with the leader's weights.

        Args:
            job: an importable function. Tensors that it returns should be on the CPU.
            shares: the job's arguments after the process's own ``Replicas``, by rank.
            progress: progress callback of the leader's own share.
            sync_weights: broadcast changed weights first; not needed by a job that does not use the model.

        Returns:
            The job's results, by rank.

        Raises:
            Exception: the job's error of the lowest rank that failed.
            ProcessLost: a process has died.
        """
        if self._broken:
            raise ProcessLost("an earlier job was interrupted: restart the processes")
        now = self._fingerprints() if sync_weights else self._known
        changed = [layer for layer, was in self._known.items() if now[layer] != was]
        with self._communicating():
            _broadcast((job, list(shares), changed))
            self._broadcast_weights(changed)
        self._known = now
        self.progress = progress
        try:
            own = self._attempt(job, shares[0])
        except BaseException:
            self._broken = True  # the others wait in gather
            raise
        finally:
            self.progress = None
        found: list[Any] = [None] * self.world_size
        with self._communicating():
            dist.gather_object(own, found, dst=0)
        for rank, result in enumerate(found):
            if isinstance(result, _Failure):
                if rank:
                    logger.warning("process %d failed: %s", rank, result.error)
                raise result.error
        return found

    def sum_to_leader(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes into the leader's tensor; called by a job that runs on all of them."""
        with self._communicating():
            sent = self._on_device(tensor)
            dist.reduce(sent, dst=0)
            if sent is not tensor:
                tensor.copy_(sent)

    def _attempt(self, job: Job[T], share: tuple[Any, ...]) -> T | _Failure:
        try:
            return job(self, *share)
        except Exception as error:  # raised by the leader
            return _Failure(_portable(error))

    def _broadcast_weights(self, layers: Sequence[int]) -> None:
        for layer in layers:
            weight = self.editable.weight(layer)
            sent = self._on_device(weight)
            dist.broadcast(sent, src=0)
            if self.process.rank:
                self.editable.set_weight(layer, sent)

    def _on_device(self, tensor: Tensor) -> Tensor:
        """A tensor on the device of this process's backend."""
        return tensor.to(self.process.device).contiguous()

    def _fingerprints(self) -> dict[int, Fingerprint]:
        return {layer: Fingerprint.of(weight) for layer, weight in self.editable.weights().items()}

    @contextmanager
    def _communicating(self) -> Iterator[None]:
        try:
            yield
        except torch.cuda.OutOfMemoryError:  # a RuntimeError, too
            self._broken = True
            raise
        except RuntimeError as error:  # torch's error for a lost connection
            self._broken = True
            raise ProcessLost(f"process {self.process.rank} of {self.world_size} lost its connection to another, which "
                              f"has ended or been killed ({str(error).splitlines()[0]})") from error
        except BaseException:
            self._broken = True
            raise


def _portable(error: Exception) -> Exception:
    """The error, or a RuntimeError with its text if it can't be pickled."""
    try:
        pickle.dumps(copy.copy(error))  # copying builds it as unpickling does
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _broadcast(message: Any = None) -> Any:
    """The leader's message, on every process."""
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _checksum(replicas: Replicas) -> str:
    return weights_checksum(replicas.editable)


def split_balanced(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Split the indices of ``costs`` into parts of about equal cost, each ascending; some may be empty.

    The most expensive come first, each to the cheapest part: no part exceeds the average by more than one item.
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        part = min(range(parts), key=sums.__getitem__)
        found[part].append(index)
        sums[part] += costs[index]
    return [sorted(part) for part in found]


def split_contiguous(costs: Sequence[float], parts: int) -> list[range]:
    """Split the indices of ``costs`` into contiguous ranges of about equal cost."""
    total, done, ends = sum(costs), 0.0, [0]
    for index, cost in enumerate(costs):
        done += cost
        while len(ends) < parts and done >= total * len(ends) / parts:
            ends.append(index + 1)
    ends += [len(costs)] * (parts + 1 - len(ends))
    return [range(start, stop) for start, stop in pairwise(ends)]


def merge_parts(parts: Sequence[Sequence[int]], results: Sequence[Sequence[T]]) -> list[T]:
    """Results of all parts, in the order of the indices."""
    by_index = {index: result for part, own in zip(parts, results, strict=True)
                for index, result in zip(part, own, strict=True)}
    return [by_index[index] for index in range(len(by_index))]
