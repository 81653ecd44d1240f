"""The line that tells what a run is doing."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sphere_easyedit.callbacks.energy_metrics import EnergyRecord
from sphere_easyedit.callbacks.progress import LiveLine, point_text
from sphere_easyedit.editing.callbacks import MeasureEvent, RunState
from sphere_easyedit.runs.schema import AbilityEstimate, BatchRecord, Estimate, Measurement


def batch_event(num_edits: int, change: float | None = None, **more: Any) -> MeasureEvent:
    """A batch of 100 edits in 40 s, whose mean change of energy over two layers is the one given."""
    energy = [] if change is None else [EnergyRecord(num_edits, {4: 100.0, 5: 50.0}, {4: 2 * change, 5: 0.0})]
    batch = BatchRecord(num_edits, tuple(range(100)), **{"wall_seconds": 40.0, **more})
    return MeasureEvent(RunState(Path("run"), {}, energy=energy), batch=batch)


def point_event(point: Measurement) -> MeasureEvent:
    return MeasureEvent(RunState(Path("run"), {}), measurement=point)


@pytest.fixture
def plain() -> tuple[Console, Callable[[], list[str]]]:
    """A console that is no terminal, and what was written to it."""
    stream = io.StringIO()
    return Console(file=stream, width=40), lambda: stream.getvalue().splitlines()


def test_a_plain_line_a_batch(plain: tuple[Console, Callable[[], list[str]]]) -> None:
    console, lines = plain
    with LiveLine(console, 2000) as line:
        for done in range(101, 201):  # the first hundred are another process's
            line.update("editing", done, 2000)
        line.on_measured(batch_event(200, 1.23e-5, efficacy=97.0))
        line.update("during", 200, 200)
        line.on_measured(point_event(Measurement(200, "during", "paper", {
            "efficacy": Estimate(96.5, None, 4), "specificity": Estimate(float("nan"), None, 0)}, 25.34)))
    # 1,800 edits at 0.4 s are 12 minutes.
    assert lines() == ["200/2000 edits, 0.40 s an edit, 12 min left, HE +1.2e-05, efficacy of the batch 97.0",
                       "200 edits, during, paper: efficacy 96.5, perplexity 25.3"]


def test_the_step_under_way_is_known(plain: tuple[Console, Callable[[], list[str]]]) -> None:
    line = LiveLine(plain[0], 50)
    steps = [line.step]
    for phase, done in (("before", 3), ("editing", 25), ("after", 50)):
        line.update(phase, done, 50)
        steps.append(line.step)
    assert steps == ["preparing", "measuring before 3/50", "editing 25/50", "measuring after 50/50"]


def test_what_was_not_measured_is_not_shown(plain: tuple[Console, Callable[[], list[str]]]) -> None:
    console, lines = plain
    with LiveLine(console, 200) as line:
        line.on_measured(batch_event(100))
        line.on_measured(batch_event(200, efficacy=None))
    assert lines() == ["100/200 edits, 0.40 s an edit, 40 s left", "200/200 edits, 0.40 s an edit"]


def test_a_closed_standard_error_does_not_end_a_run() -> None:
    stream = io.StringIO()
    with LiveLine(Console(file=stream), 200) as line:
        stream.close()
        line.update("unheard of", 1, 2)
        line.on_measured(batch_event(100))


def test_numbers_that_are_not_finite_are_told(plain: tuple[Console, Callable[[], list[str]]]) -> None:
    console, lines = plain
    with LiveLine(console, 200) as line:
        line.on_measured(batch_event(100, float("nan"), wall_seconds=float("inf"), efficacy=0.0))
    assert lines() == ["100/200 edits, inf s an edit, ? left, HE +nan, efficacy of the batch 0.0"]


def test_abilities_in_words() -> None:
    point = Measurement(300, "during", "lm-eval", abilities={
        "rte": AbilityEstimate(51.25, n=80), "gsm8k": AbilityEstimate(float("nan"))})
    assert point_text(point) == "300 edits, during, lm-eval: rte 51.2"
