"""Shows that the program is still at work when it has printed nothing for a while."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from rich.console import Console

_LONGEST: Final = 8.0  # seconds without a line
_FIRST: Final = 600.0  # seconds after which lines become rarer, so that the log of a long run stays short
_SHARE: Final = 0.05  # of the time so far that may then pass without a line


class WatchedConsole(Console):
    """A console that knows when it was made and when it last printed."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.made_at = self.printed_at = time.monotonic()

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print, as ``Console.print`` does."""
        self.printed_at = time.monotonic()
        super().print(*objects, **settings)


@contextmanager
def report_waiting(console: WatchedConsole, step: Callable[[], str]) -> Iterator[None]:
    """Print a line with the command's time so far after each silence of 8 s, or longer ones after ten minutes.

    Args:
        step: returns what is being done, such as "measuring before 3/50"; empty if that is not known.
    """
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.5):
            now = time.monotonic()
            seconds = now - console.made_at
            if now - console.printed_at >= (_LONGEST if seconds < _FIRST else _SHARE * seconds):
                what = f" ({found})" if (found := step()) else ""
                try:
                    console.print(f"... still at work{what}, {seconds:.0f} s so far", style="dim", highlight=False,
                                  markup=False)
                except (OSError, ValueError):  # standard error was closed
                    return

    thread = threading.Thread(target=watch, name="waiting", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
