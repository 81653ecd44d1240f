"""The same model on several processes: the first leads, the others work for it.

The engine is accelerate and torch.distributed: their launchers start the processes and tell each its place, their
collectives carry what passes between them (gloo on CPUs, nccl on GPUs). The **leader** alone edits, decides and writes
files, by the very code of a single process. What can be shared out (target values, keys, evaluation, statistics: see
who calls ``Replicas.run``) goes to all processes as a **job**, and comes back to it; before a job it hands over the
edited weights that have changed since the last one, bit for bit. So nothing needs to be decided twice, and a batch that
is undone, lowered or tried again on the leader is so everywhere.

Jobs and their shares are pickled, by and for processes of one run that trust each other.
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

from .fingerprints import Fingerprint, model_fingerprint, weights_checksum
from .models import EditableModel, frozen
from .signals import ProcessLost

logger = logging.getLogger(__name__)

T = TypeVar("T")
Job = Callable[..., T]  # called with the process's own Replicas, then its share

_ATTRIBUTE = "_sphere_replicas"
# A lost process shows by its connection or by the launcher, not by the clock: the leader may be busy for hours.
_PATIENCE = timedelta(days=2)


@dataclass(frozen=True)
class Place:
    """Which process of how many this is, and the device that is its own.

    Attributes:
        index, size: of the processes; 0 leads.
        device: where its model belongs, as hyperparameters name it.
    """

    index: int
    size: int
    device: str

    @classmethod
    def joined(cls, device: int | str | None = None) -> Place:
        """Join the processes that ``accelerate launch`` or ``torchrun`` started; a place of one without them.

        Args:
            device: what the hyperparameters say. Each process has a GPU of its own, unless it is ``cpu`` or there are
                none.

        Raises:
            ValueError: there are fewer GPUs here than processes.
        """
        from accelerate import PartialState  # type: ignore[import-untyped]

        on_cpu = device == "cpu" or not torch.cuda.is_available()  # accelerate joins by CPU only where it is told to
        state: Any = PartialState(cpu=on_cpu, timeout=_PATIENCE)
        place: torch.device = state.device
        if state.num_processes > 1 and place.type == "cuda":
            if state.local_process_index >= torch.cuda.device_count():
                raise ValueError(f"process {state.process_index} is number {state.local_process_index} of its machine, "
                                 f"which has {torch.cuda.device_count()} GPUs: start as many processes as GPUs")
            return cls(state.process_index, state.num_processes, str(place))
        return cls(state.process_index, state.num_processes, place.type)


@dataclass(frozen=True)
class _Failure:
    """What a job raised on a process."""

    error: Exception


class Replicas:
    """One of the processes that hold the same model.

    Args:
        editable: this process's model, with the layers that are edited.
        place: this process.

    Attributes:
        editable: as given.
        store: what jobs keep from one to the next on this process.
        progress: whom a job tells how far it is; None on all but the leader.

    Raises:
        ValueError: the processes' models differ.
    """

    def __init__(self, editable: EditableModel, place: Place) -> None:
        self.editable, self.place = editable, place
        self.store: dict[str, Any] = {}
        self.progress: Callable[..., None] | None = None
        self._broken = False
        with self._talking():
            found: list[Any] = [None] * place.size
            dist.all_gather_object(found, model_fingerprint(editable.model))
        if len(set(found)) > 1:
            raise ValueError(f"the models of the {place.size} processes differ: load the same weights in all of them")
        self._known = self._fingerprints()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None  # a copy of the model is on this process alone

    @classmethod
    def of(cls, model: nn.Module) -> Replicas | None:
        """The replicas that a model leads, or None."""
        found = getattr(model, _ATTRIBUTE, None)
        return found if isinstance(found, cls) else None

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.place.size

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Have the other processes work for this one; at the end they hold its weights, bit for bit, and are let go.

        Raises:
            ProcessLost: one of them is gone.
            RuntimeError: their weights are not the leader's, against all care.
        """
        vars(self.editable.model)[_ATTRIBUTE] = self
        try:
            yield
            checksums = self.run(_checksum, [()] * self.size)
            if any(one != checksums[0] for one in checksums):
                raise RuntimeError("the weights of the processes differ after editing: trust none of them, and tell us")
            logger.info("%d processes hold the same weights, bit for bit", self.size)
        finally:
            vars(self.editable.model).pop(_ATTRIBUTE, None)
            if not self._broken:
                with self._talking():
                    _broadcast(None)

    def follow(self) -> None:
        """Do the leader's jobs until it lets go.

        Raises:
            ProcessLost: it is gone.
        """
        with frozen(self.editable.model):
            while True:
                with self._talking():
                    message = _broadcast()
                if message is None:
                    return
                job, shares, changed = message
                with self._talking():
                    self._exchange(changed)
                found = self._attempt(job, shares[self.place.index])
                with self._talking():
                    dist.gather_object(found, dst=0)

    def run(self, job: Job[T], shares: Sequence[tuple[Any, ...]], progress: Callable[..., None] | None = None,
            hand_over: bool = True) -> list[T]:
        """Have every process do a job on its share, by the leader's weights.

        Args:
            job: a function that can be imported by its name. Tensors that it returns should be on the CPU.
            shares: its arguments behind the process's own ``Replicas``, by process.
            progress: of the leader's own share.
            hand_over: weights that have changed; a job that does not use the model can leave that to the next.

        Returns:
            What it returned, by process.

        Raises:
            Exception: what the job raised, on the first process where it did.
            ProcessLost: a process is gone.
        """
        if self._broken:
            raise ProcessLost("an earlier job was cut off: start the processes anew")
        now = self._fingerprints() if hand_over else self._known
        changed = [layer for layer, was in self._known.items() if now[layer] != was]
        with self._talking():
            _broadcast((job, list(shares), changed))
            self._exchange(changed)
        self._known = now
        self.progress = progress
        try:
            own = self._attempt(job, shares[0])
        except BaseException:
            self._broken = True  # the others wait to be asked for theirs
            raise
        finally:
            self.progress = None
        found: list[Any] = [None] * self.size
        with self._talking():
            dist.gather_object(own, found, dst=0)
        for index, one in enumerate(found):
            if isinstance(one, _Failure):
                if index:
                    logger.warning("process %d failed: %s", index, one.error)
                raise one.error
        return found

    def sum_to_leader(self, tensor: Tensor) -> None:
        """Within a job that every process reaches: the sum over processes takes the tensor's place on the leader."""
        with self._talking():
            there = self._here(tensor)
            dist.reduce(there, dst=0)
            if there is not tensor:
                tensor.copy_(there)

    def _attempt(self, job: Job[T], share: tuple[Any, ...]) -> T | _Failure:
        try:
            return job(self, *share)
        except Exception as error:  # the leader decides what becomes of it
            return _Failure(_portable(error))

    def _exchange(self, layers: Sequence[int]) -> None:
        for layer in layers:
            weight = self.editable.weight(layer)
            there = self._here(weight)
            dist.broadcast(there, src=0)
            if self.place.index:
                self.editable.set_weight(layer, there)

    def _here(self, tensor: Tensor) -> Tensor:
        """A tensor where this process's backend takes it from."""
        return tensor.to(self.place.device).contiguous()

    def _fingerprints(self) -> dict[int, Fingerprint]:
        return {layer: Fingerprint.of(weight) for layer, weight in self.editable.weights().items()}

    @contextmanager
    def _talking(self) -> Iterator[None]:
        try:
            yield
        except torch.cuda.OutOfMemoryError:  # a RuntimeError, too
            self._broken = True
            raise
        except RuntimeError as error:  # torch's word for whatever befalls a connection
            self._broken = True
            raise ProcessLost(f"process {self.place.index} of {self.size} lost touch with another, which has ended or "
                              f"been killed ({str(error).splitlines()[0]})") from error
        except BaseException:
            self._broken = True
            raise


def _portable(error: Exception) -> Exception:
    """The error, or where it can't be sent to another process one that says the same."""
    try:
        pickle.dumps(copy.copy(error))  # a copy is made as a pickle is read
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _broadcast(message: Any = None) -> Any:
    """The leader's message, on every process."""
    box = [message]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _checksum(here: Replicas) -> str:
    return weights_checksum(here.editable)


def shared_out(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Places ``0 .. len(costs) - 1`` in so many parts of about equal cost, each ascending; some may be empty.

    The dearest first, each to the part that has least: no part has more than the average and one item's cost.
    """
    found: list[list[int]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        part = min(range(parts), key=sums.__getitem__)
        found[part].append(place)
        sums[part] += costs[place]
    return [sorted(part) for part in found]


def stretches(costs: Sequence[float], parts: int) -> list[range]:
    """So many stretches of the places ``0 .. len(costs) - 1``, one behind the other, of about equal cost."""
    total, done, ends = sum(costs), 0.0, [0]
    for place, cost in enumerate(costs):
        done += cost
        while len(ends) < parts and done >= total * len(ends) / parts:
            ends.append(place + 1)
    ends += [len(costs)] * (parts + 1 - len(ends))
    return [range(start, stop) for start, stop in pairwise(ends)]


def put_together(parts: Sequence[Sequence[int]], found: Sequence[Sequence[T]]) -> list[T]:
    """Results of all parts, in the order of the places."""
    by_place = {place: one for part, ones in zip(parts, found, strict=True)
                for place, one in zip(part, ones, strict=True)}
    return [by_place[place] for place in range(len(by_place))]
