"""A progress bar that also logs an estimate of the remaining time, since logs show no bars."""

from __future__ import annotations

import logging
import math
import time
from types import TracebackType

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

_TIMED = 1.0  # minimum seconds of work for an estimate
_COLD = 5.0  # seconds from which a first step counts despite its initialisation


class RemainingTime:
    """A progress bar that logs once, early, an estimate of the remaining time. Use it as a context.

    The first step is not counted unless it is long, since devices and libraries initialise in it. Work of a second or
    so logs nothing.

    Args:
        work: name of the work, for the bar and the log.
        total: total number of units, which should take about the same time each.
        unit: name of a unit.
    """

    def __init__(self, work: str, total: int, unit: str) -> None:
        self._work, self._total = work, total
        self._bar = tqdm(total=total, desc=work, unit=unit, leave=False)
        self._done = self._counted = 0
        self._started = time.perf_counter()
        self._is_first, self._is_logged = True, False

    def __enter__(self) -> RemainingTime:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._bar.close()

    def update(self, units: int) -> None:
        """Count a finished step of this many units."""
        self._bar.update(units)
        self._done += units
        now = time.perf_counter()
        seconds = now - self._started
        if self._is_first and seconds < _COLD:
            self._started = now
        else:
            self._counted += units
            if not self._is_logged and seconds >= _TIMED and self._done < self._total:
                self._is_logged = True
                logger.info("%s: about %s to go", self._work,
                            rough_duration(seconds / self._counted * (self._total - self._done)))
        self._is_first = False


def rough_duration(seconds: float) -> str:
    """A duration as text in seconds, minutes or hours."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
