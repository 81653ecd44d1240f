"""What a run is doing, on one line of standard error; plain lines where that is no terminal."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from .editing.remaining import rough_duration
from .energy_metrics import EnergyRecord
from .evaluation.measuring import METRIC_NAMES
from .evaluation.tail import RunTail

logger = logging.getLogger(__name__)

_LOOK_EVERY: Final = 0.5  # seconds
_BAR_WIDTH: Final = 20
_EDITING: Final = "editing"
_MEASURING: Final = {"before": "measuring before", "during": "measuring", "last_batch": "measuring the batch",
                     "after": "measuring after"}


class LiveLine:
    """One live line while a run edits and measures; where standard error is no terminal, a plain line a batch and one
    a measurement, without control characters.

    It shows the edits done, seconds an edit, time left, the drift of hyperspherical energy (mean over layers of its
    relative change since the unedited model), the efficacy of the last batch where the run measured it, and what is
    being measured. It knows this from the run's ``progress`` calls and, by a thread of its own, from the run
    directory's files, of which it only reads.

    Time left is the edits left times the seconds an edit took, the mean over the batches that this process has ended.
    It knows nothing of measurements to come, and nothing at all before the first batch has ended.

    Use it as a context, and hand ``update`` to the run.

    Args:
        path: the run directory; need not be there yet.
        console: of standard error; the same that log messages go to, so that they stand above the live line.
        num_edits: edits of the whole run; None where nothing is to be edited.
    """

    def __init__(self, path: Path, console: Console, num_edits: int | None = None) -> None:
        self._console = console
        self._tail = RunTail(path)
        self._total = num_edits
        self._done = 0
        self._phase = ""
        self._measuring: tuple[str, int, int] | None = None
        self._batch: Mapping[str, Any] = {}
        self._energy: EnergyRecord | None = None
        self._seconds, self._edits = 0.0, 0  # of the batches that this process ended
        self._failed = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress", daemon=True)
        self._live: Live | None = None
        # Not `is_terminal`, which FORCE_COLOR sets for files, too.
        if console.file.isatty() and not console.is_dumb_terminal:
            self._live = Live(console=console, get_renderable=self._rendered)

    def __enter__(self) -> LiveLine:
        self._look(earlier=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._stopped.set()
        self._thread.join()
        self._look()
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

    def _watch(self) -> None:
        while not self._stopped.wait(_LOOK_EVERY):
            self._look()

    def _look(self, earlier: bool = False) -> None:
        """Read what is new in the run's files; what stands there ``earlier`` is not told and does not count as ours."""
        if self._failed:
            return
        try:
            news = self._tail.poll()
            self._energy = news.energy
            for batch in news.batches:
                self._batch = batch
                if not earlier:
                    self._seconds += batch["wall_seconds"]
                    self._edits += len(batch["case_ids"])
                    self._say(self._edited(batch["num_edits"], self._tail.energy.get(batch["num_edits"])))
            if earlier and news.batches:
                self._done = news.batches[-1]["num_edits"]
            for point in [] if earlier else news.points:
                self._measuring = None
                self._say(point_text(point))
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._failed = True
            logger.warning("progress is shown no more, the run goes on: %s: %s", type(error).__name__, error)

    def _say(self, text: str) -> None:
        if self._live is None:
            self._console.print(Text(text), soft_wrap=True)

    def _edited(self, done: int, energy: EnergyRecord | None) -> str:
        """What is known of the edits, as far as it is known."""
        if self._total is None:
            return ""
        parts = [f"{done}/{self._total} edits"]
        if self._edits:
            each = self._seconds / self._edits
            parts.append(f"{each:.2f} s an edit")
            if done < self._total:
                parts.append(f"{rough_duration(each * (self._total - done))} left")
        if energy is not None and energy.num_edits:
            changes = energy.relative_change.values()
            parts.append(f"HE {sum(changes) / len(changes):+.1e}")
        if (efficacy := self._batch.get("efficacy")) is not None:
            parts.append(f"efficacy of the batch {efficacy:.1f}")
        return ", ".join(parts)

    def _rendered(self) -> Table:
        measuring, total, done = self._measuring, self._total, self._done
        parts = [self._edited(done, self._energy)]
        if measuring is not None:
            what, done_of_it, all_of_it = measuring
            parts.append(f"{what} {done_of_it}/{all_of_it}")
            if total is None:
                done, total = done_of_it, all_of_it
        line = Table.grid(Column(width=_BAR_WIDTH), Column(no_wrap=True, overflow="ellipsis"), padding=(0, 1, 0, 0))
        line.add_row(ProgressBar(total or 1, done, _BAR_WIDTH), Text(", ".join(part for part in parts if part)))
        return line


def point_text(point: Mapping[str, Any]) -> str:
    """A line of ``metrics.jsonl`` in words: when, by which protocol, and its main numbers.

    >>> point_text({"num_edits": 300, "when": "during", "protocol": "paper", "efficacy": {"mean": 97.0}})
    '300 edits, during, paper: efficacy 97.0'
    """
    found = point.get("abilities") or {name: point[name] for name in METRIC_NAMES if name in point}
    numbers = {name: score["mean"] for name, score in found.items()}
    numbers["perplexity"] = (point.get("watched") or {}).get("perplexity")
    shown = ", ".join(f"{name} {value:.1f}" for name, value in numbers.items() if value is not None)
    return f"{point['num_edits']} edits, {point['when']}, {point['protocol']}: {shown or 'nothing measured'}"
