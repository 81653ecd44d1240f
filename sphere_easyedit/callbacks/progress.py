"""Shows the progress of a run as a live line on standard error, or as plain lines if that is not a terminal."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from ..editing.callbacks import EditCallback, EditEvent, MeasureEvent
from ..runs.schema import BatchRecord, Measurement
from ..utils.remaining_time import rough_duration
from .energy_metrics import EnergyRecord

_BAR_WIDTH: Final = 20
_EDITING: Final = "editing"
_MEASURING: Final = {"before": "measuring before", "during": "measuring", "last_batch": "measuring the batch",
                     "after": "measuring after"}


class LiveLine(EditCallback):
    """A live progress line; if standard error is not a terminal, a plain line per batch and measurement instead.

    Shows the edits done, seconds per edit, remaining time, relative change of hyperspherical energy (mean over layers),
    efficacy of the last batch if measured, and the current measurement. The remaining time is that of the remaining
    edits at the mean speed of this process; measurements are not counted.

    Use it as a context, pass it to the run as a callback and ``update`` as its ``progress``.

    Args:
        console: console of standard error, shared with log messages so that they appear above the line.
        num_edits: edits of the whole run; None if nothing is edited.

    Attributes:
        step: what the run is doing, such as "measuring before 3/50".
    """

    def __init__(self, console: Console, num_edits: int | None = None) -> None:
        self._console = console
        self._total = num_edits
        self._done = 0
        self._phase = ""
        self.step = "preparing"
        self._measuring: tuple[str, int, int] | None = None
        self._batch: BatchRecord | None = None
        self._energy: EnergyRecord | None = None
        self._seconds, self._edits = 0.0, 0  # of this process's batches
        self._live: Live | None = None
        # Not `is_terminal`, which FORCE_COLOR also sets for files.
        if console.file.isatty() and not console.is_dumb_terminal:
            self._live = Live(console=console, get_renderable=self._rendered)

    def __enter__(self) -> LiveLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, phase: str, done: int, total: int) -> None:
        """Progress callback of a run."""
        if phase == _EDITING:
            self._done, self._total, self._measuring = done, total, None
        else:
            self._measuring = (_MEASURING.get(phase, phase), done, total)
        self.step = f"{_MEASURING.get(phase, phase)} {done}/{total}"
        if self._live is not None:
            self._live.start()  # not earlier: preparation has its own progress bars
            if phase != self._phase:
                self._live.refresh()
        self._phase = phase

    def on_batch_start(self, event: EditEvent) -> None:
        self.step = "editing"

    def on_measured(self, event: MeasureEvent) -> None:
        if event.run.energy:
            self._energy = event.run.energy[-1]
        if event.batch is not None:
            self._batch = event.batch
            self._seconds += event.batch.wall_seconds
            self._edits += len(event.batch.case_ids)
            self._say(self._edited(event.batch.num_edits))
        if event.measurement is not None:
            self._measuring = None
            self.step = "finishing" if self._done == self._total else "preparing"
            self._say(point_text(event.measurement))

    def _say(self, text: str) -> None:
        if self._live is None:
            with suppress(OSError, ValueError):  # standard error was closed: the run goes on
                self._console.print(Text(text), soft_wrap=True)

    def _edited(self, done: int) -> str:
        """Text on the edits done."""
        if self._total is None:
            return ""
        parts = [f"{done}/{self._total} edits"]
        if self._edits:
            each = self._seconds / self._edits
            parts.append(f"{each:.2f} s an edit")
            if done < self._total:
                parts.append(f"{rough_duration(each * (self._total - done))} left")
        if self._energy is not None and self._energy.num_edits:
            changes = self._energy.relative_change.values()
            parts.append(f"HE {sum(changes) / len(changes):+.1e}")
        if self._batch is not None and self._batch.efficacy is not None:
            parts.append(f"efficacy of the batch {self._batch.efficacy:.1f}")
        return ", ".join(parts)

    def _rendered(self) -> Table:
        measuring, total, done = self._measuring, self._total, self._done
        parts = [self._edited(done)]
        if measuring is not None:
            what, done_of_it, all_of_it = measuring
            parts.append(f"{what} {done_of_it}/{all_of_it}")
            if total is None:
                done, total = done_of_it, all_of_it
        line = Table.grid(Column(width=_BAR_WIDTH), Column(no_wrap=True, overflow="ellipsis"), padding=(0, 1, 0, 0))
        line.add_row(ProgressBar(total or 1, done, _BAR_WIDTH), Text(", ".join(part for part in parts if part)))
        return line


def point_text(point: Measurement) -> str:
    """One line on a measurement: when, protocol, and main metrics.

    >>> from sphere_easyedit.runs.schema import Estimate
    >>> point_text(Measurement(300, "during", "paper", {"efficacy": Estimate(97.0, None, 150)}))
    '300 edits, during, paper: efficacy 97.0'
    """
    numbers = {name: found.mean for name, found in (point.abilities or point.main_metrics()).items() if found.n}
    if point.perplexity is not None:
        numbers["perplexity"] = point.perplexity
    shown = ", ".join(f"{name} {value:.1f}" for name, value in numbers.items())
    return f"{point.num_edits} edits, {point.when}, {point.protocol}: {shown or 'nothing measured'}"
