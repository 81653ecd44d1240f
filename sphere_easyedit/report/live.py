"""The report of a run under way, kept up to date while it edits."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Final

from ..editing.callbacks import EditCallback, MeasureEvent, RunState
from ..runs.records import RunRecords
from .build import REFRESH, check_installed, write_report

logger = logging.getLogger(__name__)

_SHARE: Final = 0.05  # of a run's time that its report may take


class LiveReport(EditCallback):
    """Writes a run's ``report.html`` as the run goes on, and the whole report with its figures as files at its end.

    At most a twentieth of the run's time goes into it. A report that can't be written is warned of once, and the run
    goes on.

    Use it as a callback of the run, and ``update`` as its ``progress``: what came too soon after the page before is
    shown while the run measures.

    Attributes:
        page: the finished report; None while there is none.

    Raises:
        ValueError: what draws is not installed.
    """

    def __init__(self) -> None:
        check_installed()
        self.page: Path | None = None
        self._news: RunState | None = None  # that the page does not show
        self._next = 0.0
        self._failed = False

    def on_measured(self, event: MeasureEvent) -> None:
        self._news = event.run
        self.update()

    def update(self, phase: str = "", done: int = 0, total: int = 0) -> None:
        """Take a run's progress call."""
        started = time.monotonic()
        if self._failed or self._news is None or started < self._next or not self._news.measurements:
            return
        try:
            write_report([RunRecords.of(self._news)], files=False, live=True)
        except Exception as error:  # of whatever library
            self._failed = True
            logger.warning("the report is not kept up to date: %s: %s", type(error).__name__, error)
        self._news = None
        self._next = time.monotonic() + max(REFRESH, (time.monotonic() - started) / _SHARE)

    def on_run_end(self, run: RunState) -> None:
        try:
            self.page = write_report([RunRecords.of(run)]).html
        except Exception as error:  # of whatever library
            logger.warning("no report: %s: %s", type(error).__name__, error)
