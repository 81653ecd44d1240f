"""What ends a run from outside, as exceptions: a batch under way is undone as after any other; files are whole."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The process was asked to end; no ``Exception``, so that nothing takes it for a failure of its own.

    Attributes:
        name: of the signal.
        exit_status: what a shell expects of a process that a signal ended: 128 and its number.
    """

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        self.exit_status = 128 + number
        super().__init__(self.name)


class ProcessLost(BaseException):
    """Another process of the run is gone; no ``Exception`` either."""


@contextmanager
def interrupts_raised() -> Iterator[None]:
    """Raise ``Interrupted`` in the main thread at the first SIGINT or SIGTERM.

    Later ones are ignored within the context: undoing a batch takes milliseconds and must not be cut short itself.
    """
    def interrupt(number: int, frame: FrameType | None) -> None:
        for one in handled:
            signal.signal(one, signal.SIG_IGN)
        raise Interrupted(number)

    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
