"""Edits that can't be made: found by bisection, left out of the run, and written down."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeVar

import torch

from ..editing.callbacks import StopEditing
from ..utils.messages import kind_and_text
from .schema import Skipped

logger = logging.getLogger(__name__)

OnError = Literal["stop", "skip"]
T = TypeVar("T")


class Skips:
    """What a run left out, and how many edits the model holds once so many of its facts have been tried.

    Args:
        skipped: in any order.
    """

    def __init__(self, skipped: Iterable[Skipped] = ()) -> None:
        self._by_index = {one.index: one for one in skipped}

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Leave these out, too."""
        self._by_index |= {one.index: one for one in skipped}

    def __contains__(self, index: int) -> bool:
        return index in self._by_index

    def edited(self, tried: int) -> int:
        """Edits in the model once the first so many facts have been tried."""
        return tried - sum(index < tried for index in self._by_index)

    def tried(self, num_edits: int, ends: Sequence[int]) -> int:
        """The first end of a batch, or 0, at which the model held so many edits.

        Raises:
            ValueError: there is none.
        """
        for end in (0, *ends):
            if self.edited(end) == num_edits:
                return end
        raise ValueError(f"no batch ended with {num_edits} edits in the model: the checkpoint is of another run, or "
                         "skipped.jsonl was changed")

    def in_order(self) -> list[Skipped]:
        """All, by index."""
        return [self._by_index[index] for index in sorted(self._by_index)]


def edit_around_faults(
    items: Sequence[T], edit: Callable[[Sequence[T]], None], failure: Callable[[Sequence[T]], Exception | None],
    on_error: OnError,
) -> list[tuple[T, Exception]]:
    """Edit a batch, and find by bisection the edits that make it fail.

    Each level of the bisection costs as much again as the batch, at most. An error that all edits share is not looked
    for edit by edit: a few are tried alone (see ``enough_tries``), and if all of them fail with the error of the whole
    batch, it is raised.

    Args:
        items: the batch.
        edit: makes some of the batch's edits, or raises and leaves everything as it was.
        failure: tries to, leaves everything as it was in any case, and returns what was raised. Only the edits' own
            faults count here, not those of callbacks.
        on_error: ``stop`` makes none of the edits where one is at fault, ``skip`` makes the others. Where several fail
            together but none of them alone (out of memory, say), ``skip`` makes them in two halves.

    Returns:
        Items at fault, each with its error.

    Raises:
        Exception: what ``edit`` raised, if no edit is at fault by itself; ``StopEditing`` in any case.
        ValueError: names the edits at fault with ``stop``; in either case, several edits fail with the same error by
            themselves, or with ``skip`` each of them fails, which is no fault of single ones.
    """
    if not items:
        return []
    try:
        edit(items)
        return []
    except StopEditing:
        raise
    except Exception as error:
        _let_go(error)

        def tried(indices: Sequence[int]) -> Exception | None:
            failed = failure([items[index] for index in indices])
            if failed is not None:
                _let_go(failed)
            return failed

        together = tried(range(len(items)))
        if together is None:
            raise
        at_fault = _at_fault(range(len(items)), together, tried, few=True)
        all_are = len(at_fault) == len(items) > 1
        if on_error == "stop":
            if not at_fault:
                raise
            told = "; ".join(f"{items[index]} ({kind_and_text(why)})" for index, why in at_fault.items())
            raise ValueError(f"{len(at_fault)} of {len(items)} edits fail by themselves, and the batch was undone: "
                             f"{told}. "
                             + ("It is hardly the edits' fault" if all_are else "on_error skip leaves them out")
                             ) from error
        if all_are:
            raise ValueError(f"each of the {len(items)} edits of this batch fails by itself, and it was undone: "
                             f"{kind_and_text(error)}") from error
    faults = [(items[index], why) for index, why in at_fault.items()]
    rest = [item for index, item in enumerate(items) if index not in at_fault]
    if faults:
        return faults + edit_around_faults(rest, edit, failure, on_error)
    logger.warning("%d edits fail together (%s) but none alone: they are edited in two halves", len(items),
                   kind_and_text(together))
    middle = len(rest) // 2
    return (edit_around_faults(rest[:middle], edit, failure, on_error)
            + edit_around_faults(rest[middle:], edit, failure, on_error))


def _at_fault(indices: Sequence[int], error: Exception, failure: Callable[[Sequence[int]], Exception | None],
              few: bool = False) -> dict[int, Exception]:
    """Which of the indices, which fail together with ``error``, fail alone.

    Raises:
        ValueError: with ``few``, some of them, spread over all, fail alone with this very error.
    """
    if len(indices) == 1:
        return {indices[0]: error}
    middle = len(indices) // 2
    halves = [(half, failed) for half in (indices[:middle], indices[middle:]) if (failed := failure(half)) is not None]
    if few and len(indices) > 2 and [kind_and_text(failed) for _, failed in halves] == [kind_and_text(error)] * 2:
        count = enough_tries(len(indices))
        alone = (failure([indices[number * (len(indices) - 1) // (count - 1)]]) for number in range(count))
        if all(failed is not None and kind_and_text(failed) == kind_and_text(error) for failed in alone):
            raise ValueError(f"{kind_and_text(error)} (so do {count} of the batch's {len(indices)} edits by "
                             "themselves: it is hardly their fault, and the batch was undone)") from error
    found: dict[int, Exception] = {}
    for half, failed in halves:
        found |= _at_fault(half, failed, failure)
    return found


def enough_tries(count: int) -> int:
    """Number of single edits that must fail with one error for it to count as the error of all: 2 + log2(edits)."""
    return min(count, 1 + count.bit_length())


def _let_go(error: BaseException) -> None:
    """Give back what the frames of a failed attempt hold: where memory ran out, the next attempt needs it."""
    chain: list[BaseException] = []
    while error not in chain:
        chain.append(error)
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__ or error
    torch.cuda.empty_cache()  # nothing where CUDA was not used


def out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no more memory."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch's moved
            or "can't allocate memory" in str(error))  # torch's on a CPU, a plain RuntimeError
