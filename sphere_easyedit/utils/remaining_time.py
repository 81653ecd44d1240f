"""Progress bars that also log how long the work will take, since a log shows no bar."""

from __future__ import annotations

import logging
import math
import time
from types import TracebackType

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

_TIMED = 1.0  # seconds of work that an estimate goes by
_COLD = 5.0  # seconds from which a first step tells enough, whatever was made ready within it


class RemainingTime:
    """A progress bar that logs once, early, about how long the work will take.

    The first step is not counted unless it is long: within it devices and libraries make themselves ready. Work that is
    done within a second or so logs nothing. Use it as a context.

    Args:
        work: what is done, for the bar and the log.
        total: units of work in all; units should take about the same time each.
        unit: their name.
    """

    def __init__(self, work: str, total: int, unit: str) -> None:
        self._work, self._total = work, total
        self._bar = tqdm(total=total, desc=work, unit=unit, leave=False)
        self._done = self._counted = 0
        self._started = time.perf_counter()
        self._is_first, self._is_told = True, False

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
            if not self._is_told and seconds >= _TIMED and self._done < self._total:
                self._is_told = True
                logger.info("%s: about %s to go", self._work,
                            rough_duration(seconds / self._counted * (self._total - self._done)))
        self._is_first = False


def rough_duration(seconds: float) -> str:
    """A duration for people, in seconds, minutes or hours."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
