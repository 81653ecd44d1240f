"""What a run is doing, on one line of standard error; plain lines where that is no terminal."""

from __future__ import annotations

from contextlib import suppress
from types import TracebackType
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from ..editing.callbacks import EditCallback, MeasureEvent
from ..runs.schema import BatchRecord, Measurement
from ..utils.remaining_time import rough_duration
from .energy_metrics import EnergyRecord

_BAR_WIDTH: Final = 20
_EDITING: Final = "editing"
_MEASURING: Final = {"before": "measuring before", "during": "measuring", "last_batch": "measuring the batch",
                     "after": "measuring after"}


class LiveLine(EditCallback):
    """One live line while a run edits and measures; where standard error is no terminal, a plain line a batch and one
    a measurement, without control characters.

    It shows the edits done, seconds an edit, time left, the drift of hyperspherical energy (mean over layers of its
    relative change since the unedited model), the efficacy of the last batch where the run measured it, and what is
    being measured.

    Time left is the edits left times the seconds an edit took, the mean over the batches of this process. Measurements
    to come are not counted; before the first batch has ended it is not known.

    Use it as a context, pass it to the run as a callback and ``update`` as its ``progress``.

    Args:
        console: of standard error; the same that log messages go to, so that they stand above the live line.
        num_edits: edits of the whole run; None where nothing is to be edited.
    """

    def __init__(self, console: Console, num_edits: int | None = None) -> None:
        self._console = console
        self._total = num_edits
        self._done = 0
        self._phase = ""
        self._measuring: tuple[str, int, int] | None = None
        self._batch: BatchRecord | None = None
        self._energy: EnergyRecord | None = None
        self._seconds, self._edits = 0.0, 0  # of this process's batches
        self._live: Live | None = None
        # Not `is_terminal`, which FORCE_COLOR sets for files, too.
        if console.file.isatty() and not console.is_dumb_terminal:
            self._live = Live(console=console, get_renderable=self._rendered)

    def __enter__(self) -> LiveLine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(self, phase: str, done: int, total: int) -> None:
        """Take a run's progress call: what is being done, how far, of how much."""
        if phase == _EDITING:
            self._done, self._total, self._measuring = done, total, None
        else:
            self._measuring = (_MEASURING.get(phase, phase), done, total)
        if self._live is not None:
            self._live.start()  # only now: a run that is refused leaves no line, and one that prepares has its own bars
            if phase != self._phase:
                self._live.refresh()
        self._phase = phase

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
            self._say(point_text(event.measurement))

    def _say(self, text: str) -> None:
        if self._live is None:
            with suppress(OSError, ValueError):  # nobody reads standard error any more: the run goes on
                self._console.print(Text(text), soft_wrap=True)

    def _edited(self, done: int) -> str:
        """What is known of the edits."""
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
    """A measurement in words: when, by which protocol, and its main numbers.

    >>> from sphere_easyedit.runs.schema import Estimate
    >>> point_text(Measurement(300, "during", "paper", {"efficacy": Estimate(97.0, None, 150)}))
    '300 edits, during, paper: efficacy 97.0'
    """
    numbers = {name: found.mean for name, found in (point.abilities or point.main_metrics()).items() if found.n}
    if point.perplexity is not None:
        numbers["perplexity"] = point.perplexity
    shown = ", ".join(f"{name} {value:.1f}" for name, value in numbers.items())
    return f"{point.num_edits} edits, {point.when}, {point.protocol}: {shown or 'nothing measured'}"
