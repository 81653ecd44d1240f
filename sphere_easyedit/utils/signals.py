"""Turns SIGINT and SIGTERM into exceptions, so that an interrupted batch is rolled back like a failed one."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(BaseException):
    """The process got a signal to end; a ``BaseException``, so that no ``except Exception`` catches it.

    Attributes:
        name: the signal's name.
        exit_status: 128 plus the signal's number, as shells expect.
    """

    def __init__(self, number: int) -> None:
        self.name = signal.Signals(number).name
        self.exit_status = 128 + number
        super().__init__(self.name)


class ProcessLost(BaseException):
    """Another process of a distributed run has died."""


@contextmanager
def raise_on_interrupts() -> Iterator[None]:
    """Raise ``Interrupted`` in the main thread at the first SIGINT or SIGTERM.

    Later ones are ignored within the context, so that the rollback, which takes milliseconds, is not interrupted.
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
