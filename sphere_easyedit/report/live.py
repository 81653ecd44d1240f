"""Keeps the report of a run up to date while the run edits."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Final

from ..editing.callbacks import EditCallback, MeasureEvent, RunState
from ..runs.records import RunRecords
from .build import REFRESH, check_installed, write_report

logger = logging.getLogger(__name__)

_SHARE: Final = 0.05  # maximum share of a run's time for its report


class LiveReport(EditCallback):
    """Writes a run's ``report.html`` during the run, and at its end the whole report with its figures as files.

    It takes at most a twentieth of the run's time. A report that can't be written gives one warning, and the run
    continues.

    Use it as a callback of the run, and ``update`` as its ``progress``, so that results that came too soon after the
    last page are shown during the next measurement.

    Attributes:
        page: the finished report; None until then.

    Raises:
        ValueError: a library that draws is not installed.
    """

    def __init__(self) -> None:
        check_installed()
        self.page: Path | None = None
        self._pending: RunState | None = None  # not yet on the page
        self._next = 0.0
        self._failed = False

    def on_measured(self, event: MeasureEvent) -> None:
        self._pending = event.run
        self.update()

    def update(self, phase: str = "", done: int = 0, total: int = 0) -> None:
        """Write the page if it is due; a run's ``progress`` function."""
        started = time.monotonic()
        if self._failed or self._pending is None or started < self._next or not self._pending.measurements:
            return
        try:
            write_report([RunRecords.of(self._pending)], files=False, live=True)
        except Exception as error:  # from any library
            self._failed = True
            logger.warning("the report is not kept up to date: %s: %s", type(error).__name__, error)
        self._pending = None
        self._next = time.monotonic() + max(REFRESH, (time.monotonic() - started) / _SHARE)

    def on_run_end(self, run: RunState) -> None:
        try:
            self.page = write_report([RunRecords.of(run)]).html
        except Exception as error:  # from any library
            logger.warning("no report: %s: %s", type(error).__name__, error)
