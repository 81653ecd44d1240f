"""Finds edits that can't be made by bisection, skips them, and counts the rest."""

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


class SkippedFacts:
    """The facts that a run skipped, and the conversion between facts tried and edits made."""

    def __init__(self, skipped: Iterable[Skipped] = ()) -> None:
        self._by_index = {one.index: one for one in skipped}

    def add(self, skipped: Iterable[Skipped]) -> None:
        """Add skipped facts."""
        self._by_index |= {one.index: one for one in skipped}

    def __contains__(self, index: int) -> bool:
        return index in self._by_index

    def edited(self, tried: int) -> int:
        """Number of edits in the model once the first ``tried`` facts have been tried."""
        return tried - sum(index < tried for index in self._by_index)

    def tried(self, num_edits: int, batch_ends: Sequence[int]) -> int:
        """The first batch end, or 0, at which the model held ``num_edits``.

        Raises:
            ValueError: there is none.
        """
        for end in (0, *batch_ends):
            if self.edited(end) == num_edits:
                return end
        raise ValueError(f"no batch ended with {num_edits} edits in the model: the checkpoint is of another run, or "
                         "skipped.jsonl was changed")

    def in_order(self) -> list[Skipped]:
        """All, by index."""
        return [self._by_index[index] for index in sorted(self._by_index)]


def edit_by_bisection(
    items: Sequence[T], edit: Callable[[Sequence[T]], None], failure: Callable[[Sequence[T]], Exception | None],
    on_error: OnError, name: Callable[[T], str] = str,
) -> list[tuple[T, Exception]]:
    """Edit a batch; if it fails, find the edits that fail alone by bisection.

    Each level of the bisection costs at most as much as the batch. If the batch fails with an error that all edits
    share, a few edits are tried alone (see ``tries_needed``), and if all of them fail with it, it is raised.

    Args:
        items: the batch.
        edit: makes these edits, or raises and restores the model.
        failure: tries these edits, restores the model in any case, and returns what was raised. Only errors of the
            edits themselves count here, not those of callbacks.
        on_error: ``stop`` makes no edits if one fails alone; ``skip`` makes the others. If several fail together but
            none alone (out of memory, say), ``skip`` makes them in two halves.
        name: how an error names an item.

    Returns:
        Items that fail alone, each with its error.

    Raises:
        Exception: what ``edit`` raised, if no edit fails alone; always ``StopEditing``.
        ValueError: with ``stop``, some edits fail alone (all are named); with either, several fail alone with the same
            error; with ``skip``, every edit fails alone.
    """
    if not items:
        return []
    try:
        edit(items)
        return []
    except StopEditing:
        raise
    except Exception as error:
        _release(error)

        def failure_of(indices: Sequence[int]) -> Exception | None:
            failed = failure([items[index] for index in indices])
            if failed is not None:
                _release(failed)
            return failed

        together = failure_of(range(len(items)))
        if together is None:
            raise
        failing = _failing_alone(range(len(items)), together, failure_of, try_few=True)
        all_fail = len(failing) == len(items) > 1
        if on_error == "stop":
            if not failing:
                raise
            reasons = "; ".join(f"{name(items[index])} ({kind_and_text(why)})" for index, why in failing.items())
            raise ValueError(f"{len(failing)} of {len(items)} edits fail by themselves, and the batch was undone: "
                             f"{reasons}. "
                             + ("The edits are hardly the cause" if all_fail else "on_error skip leaves them out")
                             ) from error
        if all_fail:
            raise ValueError(f"each of the {len(items)} edits of this batch fails by itself, and it was undone: "
                             f"{kind_and_text(error)}") from error
    rest = [item for index, item in enumerate(items) if index not in failing]
    if failing:
        return ([(items[index], why) for index, why in failing.items()]
                + edit_by_bisection(rest, edit, failure, on_error, name))
    logger.warning("%d edits fail together (%s) but none alone: they are edited in two halves", len(items),
                   kind_and_text(together))
    middle = len(rest) // 2
    return (edit_by_bisection(rest[:middle], edit, failure, on_error, name)
            + edit_by_bisection(rest[middle:], edit, failure, on_error, name))


def _failing_alone(indices: Sequence[int], error: Exception, failure: Callable[[Sequence[int]], Exception | None],
                   try_few: bool = False) -> dict[int, Exception]:
    """Which of the indices, which fail together with ``error``, fail alone, and with what.

    Raises:
        ValueError: with ``try_few``, a few of them, evenly spread, all fail alone with this same error.
    """
    if len(indices) == 1:
        return {indices[0]: error}
    middle = len(indices) // 2
    halves = [(half, failed) for half in (indices[:middle], indices[middle:]) if (failed := failure(half)) is not None]
    if try_few and len(indices) > 2 and [kind_and_text(failed) for _, failed in halves] == [kind_and_text(error)] * 2:
        count = tries_needed(len(indices))
        alone = (failure([indices[number * (len(indices) - 1) // (count - 1)]]) for number in range(count))
        if all(failed is not None and kind_and_text(failed) == kind_and_text(error) for failed in alone):
            raise ValueError(f"{kind_and_text(error)} (so do {count} of the batch's {len(indices)} edits by "
                             "themselves: the edits are hardly the cause, and the batch was undone)") from error
    found: dict[int, Exception] = {}
    for half, failed in halves:
        found |= _failing_alone(half, failed, failure)
    return found


def tries_needed(count: int) -> int:
    """Number of single edits that must fail with one error for it to count as the error of all: 2 + log2(edits)."""
    return min(count, 1 + count.bit_length())


def _release(error: BaseException) -> None:
    """Free what the frames of a failed attempt hold: after running out of memory, the next attempt needs it."""
    chain: list[BaseException] = []
    while error not in chain:
        chain.append(error)
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__ or error
    torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host ran out of memory."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"  # torch has moved the class
            or "can't allocate memory" in str(error))  # torch on a CPU raises a plain RuntimeError
