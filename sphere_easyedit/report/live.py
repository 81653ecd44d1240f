"""The report of a run under way, kept up to date while it edits."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Final

from ..evaluation.run_directory import METRICS
from ..evaluation.tail import RunTail
from .build import REFRESH, check_installed, write_report

logger = logging.getLogger(__name__)

_SHARE: Final = 0.05  # of a run's time that its report may take


class LiveReport:
    """Writes a run's ``report.html`` anew when the run has written something, no more often than it is worth.

    It must not cost the run: at most a twentieth of the time goes into it, and a report that can't be written is warned
    of once.

    Args:
        path: run directory.

    Raises:
        ValueError: what draws is not installed.
    """

    def __init__(self, path: Path) -> None:
        check_installed()
        self._path = path
        self._tail = RunTail(path)
        self._next = 0.0
        self._news = False
        self._failed = False

    def update(self, phase: str, done: int, total: int) -> None:
        """To be called with the run's progress."""
        started = time.monotonic()
        if self._failed or started < self._next:
            return
        try:
            told = self._tail.poll()
            self._news |= bool(told.batches or told.points)
            if self._news and (self._path / METRICS).is_file():
                write_report([self._path], files=False, live=True)
                self._news = False
        except Exception as error:  # of whatever library
            self._failed = True
            logger.warning("the report is not kept up to date: %s: %s", type(error).__name__, error)
        self._next = time.monotonic() + max(REFRESH, (time.monotonic() - started) / _SHARE)

    def finish(self) -> Path | None:
        """The whole report of the run, with its figures as files; its path, or None where it can't be written."""
        try:
            return write_report([self._path]).html
        except Exception as error:  # of whatever library
            logger.warning("no report: %s: %s", type(error).__name__, error)
            return None
