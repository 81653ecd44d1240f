"""Following a run's files, and the line that tells of them."""

from __future__ import annotations

import io
import json
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from sphere_easyedit.energy_metrics import EnergyRecord
from sphere_easyedit.evaluation import run_directory, tail
from sphere_easyedit.evaluation.run_directory import EDITS, METRICS, RunDirectory
from sphere_easyedit.evaluation.tail import RunTail
from sphere_easyedit.he_tracker import HETracker, read_energy_csv
from sphere_easyedit.progress import LiveLine, point_text


def batch(num_edits: int, size: int = 100, seconds: float = 40.0, **more: Any) -> dict[str, Any]:
    return {"num_edits": num_edits, "case_ids": list(range(size)), "wall_seconds": seconds, **more}


def write_energy(folder: Path, changes: dict[int, float]) -> list[EnergyRecord]:
    """An energy.csv of two layers, whose mean change is the one given."""
    tracker = HETracker()
    tracker.records = [EnergyRecord(edits, {4: 100.0 * (1 + 2 * change), 5: 50.0}, {4: 2 * change, 5: 0.0})
                       for edits, change in changes.items()]
    tracker.to_csv(folder / "energy.csv")
    return tracker.records


def told(news: tail.News) -> list[int]:
    return [line["num_edits"] for line in news.batches]


def test_tail_tells_each_line_once(tmp_path: Path) -> None:
    run, follower = RunDirectory(tmp_path / "run"), RunTail(tmp_path / "run")
    assert follower.poll() == tail.News((), (), None)
    run.append(EDITS, batch(100))
    assert told(follower.poll()) == [100]
    run.append(METRICS, {"num_edits": 100, "when": "during"})
    run.append(EDITS, batch(200))
    news = follower.poll()
    assert told(news) == [200]
    assert news.points == ({"num_edits": 100, "when": "during"},)
    assert follower.poll() == tail.News((), (), None)


def test_tail_waits_for_a_torn_line(tmp_path: Path) -> None:
    follower, whole = RunTail(tmp_path), json.dumps(batch(100)) + "\n"
    with (tmp_path / EDITS).open("w") as stream:
        stream.write(whole[:20])
        stream.flush()
        assert told(follower.poll()) == []
        stream.write(whole[20:])
        stream.flush()
        assert told(follower.poll()) == [100]


def test_tail_of_a_resumed_run(tmp_path: Path) -> None:
    run, follower = RunDirectory(tmp_path), RunTail(tmp_path)
    for num_edits in (100, 200, 300):
        run.append(EDITS, batch(num_edits))
    write_energy(tmp_path, {0: 0.0, 100: 1e-5, 200: 2e-5, 300: 3e-5})
    assert told(follower.poll()) == [100, 200, 300]
    run.keep_until(EDITS, 200)
    records = write_energy(tmp_path, {0: 0.0, 100: 1e-5, 200: 2e-5})
    news = follower.poll()
    assert told(news) == []
    assert news.energy == records[-1]
    assert list(follower.energy.values()) == records
    # One that grows past its old length before one looks is found out, too.
    run.keep_until(EDITS, 100)
    for num_edits in (200, 300, 400):
        run.append(EDITS, batch(num_edits, seconds=41.0))
    assert told(follower.poll()) == [200, 300, 400]


@settings(deadline=None)  # every line is on the disk before the next
@given(st.lists(st.tuples(st.sampled_from(["append", "cut", "look"]), st.integers(0, 9)), max_size=30))
def test_tail_tells_what_stands_and_nothing_twice(tmp_path_factory: pytest.TempPathFactory,
                                                  steps: list[tuple[str, int]]) -> None:
    folder = tmp_path_factory.mktemp("run")
    run, follower, found, written = RunDirectory(folder), RunTail(folder), [], 0
    for what, number in steps:
        if what == "append":
            written += 1
            run.append(EDITS, {"num_edits": len(run.lines(EDITS)) + 1, "stamp": written})
        elif what == "cut":
            run.keep_until(EDITS, number)
        else:
            found += [line["stamp"] for line in follower.poll().batches]
    found += [line["stamp"] for line in follower.poll().batches]
    assert len(found) == len(set(found))
    assert {line["stamp"] for line in run.lines(EDITS)} <= set(found)


def test_tail_reads_no_more_than_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / EDITS).write_text("".join(json.dumps(batch(number)) + "\n" for number in range(1, 3001)))
    follower = RunTail(tmp_path)
    assert len(follower.poll().batches) == 3000
    parsed: list[bytes] = []
    loads = json.loads
    monkeypatch.setattr(run_directory.json, "loads", lambda text: (parsed.append(text), loads(text))[1])
    RunDirectory(tmp_path).append(EDITS, batch(3001))
    assert told(follower.poll()) == [3001]
    assert len(parsed) == 1


def test_tail_names_a_damaged_line_and_goes_on(tmp_path: Path) -> None:
    follower = RunTail(tmp_path)
    (tmp_path / EDITS).write_text(json.dumps(batch(100)) + "\n{no\n")
    with pytest.raises(ValueError, match=r"edits\.jsonl, line 2 is no JSON"):
        follower.poll()
    RunDirectory(tmp_path).append(EDITS, batch(300))
    assert told(follower.poll()) == [300]


def test_tail_reads_energy_as_the_tracker_wrote_it(tmp_path: Path) -> None:
    generator, changes = random.Random(0), {0: 0.0}
    follower = RunTail(tmp_path)
    for num_edits in range(100, 600, 100):
        changes[num_edits] = generator.gauss(0, 1e-5)
        write_energy(tmp_path, changes)
        follower.poll()
    assert list(follower.energy.values()) == read_energy_csv(tmp_path / "energy.csv")


@pytest.fixture
def plain() -> tuple[Console, Callable[[], list[str]]]:
    """A console that is no terminal, and what was written to it."""
    stream = io.StringIO()
    return Console(file=stream, width=40), lambda: stream.getvalue().splitlines()


def test_a_plain_line_a_batch(tmp_path: Path, plain: tuple[Console, Callable[[], list[str]]]) -> None:
    console, lines = plain
    run = RunDirectory(tmp_path)
    run.append(EDITS, batch(100, seconds=4000.0))  # of a process before this one
    with LiveLine(tmp_path, console, 2000) as line:
        for done in range(101, 201):
            line.update("editing", done, 2000)
        write_energy(tmp_path, {0: 0.0, 100: 1e-5, 200: 1.23e-5})
        run.append(EDITS, batch(200, seconds=40.0, efficacy=97.0))
        line.update("during", 200, 200)
        run.append(METRICS, {"num_edits": 200, "when": "during", "protocol": "paper", "efficacy": {"mean": 96.5},
                             "specificity": {"mean": None}, "watched": {"perplexity": 25.34}})
    # 1,800 edits at 0.4 s are 12 minutes.
    assert lines() == ["200/2000 edits, 0.40 s an edit, 12 min left, HE +1.2e-05, efficacy of the batch 97.0",
                       "200 edits, during, paper: efficacy 96.5, perplexity 25.3"]


def test_what_was_not_measured_is_not_shown(tmp_path: Path, plain: tuple[Console, Callable[[], list[str]]]) -> None:
    console, lines = plain
    with LiveLine(tmp_path, console, 200):
        RunDirectory(tmp_path).append(EDITS, batch(100))
        RunDirectory(tmp_path).append(EDITS, batch(200, efficacy=None))
    assert lines() == ["100/200 edits, 0.40 s an edit, 40 s left", "200/200 edits, 0.40 s an edit"]


def test_lines_that_cannot_be_read_do_not_end_a_run(tmp_path: Path, plain: tuple[Console, Callable[[], list[str]]],
                                                    caplog: pytest.LogCaptureFixture) -> None:
    console, lines = plain
    with caplog.at_level(logging.WARNING), LiveLine(tmp_path, console, 200) as line:
        (tmp_path / EDITS).write_text('{"num_edits": 100}\n')
        line.update("unheard of", 1, 2)
    assert lines() == []
    assert [record.message for record in caplog.records] == [
        "progress is shown no more, the run goes on: KeyError: 'wall_seconds'"]


def test_numbers_that_are_not_finite_are_told(tmp_path: Path, plain: tuple[Console, Callable[[], list[str]]]) -> None:
    console, lines = plain
    with LiveLine(tmp_path, console, 200):
        write_energy(tmp_path, {0: 0.0, 100: float("nan")})
        RunDirectory(tmp_path).append(EDITS, batch(100, seconds=float("inf"), efficacy=0.0))
    assert lines() == ["100/200 edits, inf s an edit, ? left, HE +nan, efficacy of the batch 0.0"]


def test_abilities_in_words() -> None:
    line = {"num_edits": 300, "when": "during", "protocol": "lm-eval", "abilities": {
        "rte": {"mean": 51.25, "n": 80}, "gsm8k": {"mean": None, "n": 0}}}
    assert point_text(line) == "300 edits, during, lm-eval: rte 51.2"
