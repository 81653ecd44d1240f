"""How long work will take, said early and in units for people."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from helpers.models import tiny_hparams, tiny_model
from sphere_easyedit.methods.covariance import second_moments
from sphere_easyedit.utils import remaining_time as remaining
from sphere_easyedit.utils.remaining_time import RemainingTime, rough_duration


class Clock:
    """A clock that goes on by what the work takes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(remaining.time, "perf_counter", lambda: self.now)


def said(steps: list[tuple[int, float]], total: int, clock: Clock, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The log after steps of so many units and seconds."""
    caplog.set_level(logging.INFO, "sphere_easyedit")
    caplog.clear()
    with RemainingTime("statistics", total, "token") as work:
        for units, seconds in steps:
            clock.now += seconds
            work.update(units)
    return list(caplog.messages)


def test_an_estimate_once_and_early(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock(monkeypatch)
    # The first step makes things ready; of the next 0.4 s each, three make a second: 30 units in 1.2 s.
    steps = [(10, 3.0), *[(10, 0.4)] * 99]
    assert said(steps, 1000, clock, caplog) == ["statistics: about 38 s to go"]
    # A long first step tells enough: 10 units in 60 s.
    assert said([(10, 60.0), (990, 5940.0)], 1000, clock, caplog) == ["statistics: about 1.6 h to go"]
    assert said([(10, 60.0), (30, 180.0)], 40, clock, caplog) == ["statistics: about 3 min to go"]


@pytest.mark.parametrize("steps", [[], [(40, 60.0)], [(10, 0.1)] * 4, [(10, 3.0), (30, 0.9)]])
def test_short_work_says_nothing(steps: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch,
                                 caplog: pytest.LogCaptureFixture) -> None:
    assert said(steps, 40, Clock(monkeypatch), caplog) == []


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (89.0, "89 s"), (90.0, "2 min"), (5399.0, "90 min"),
                                               (5400.0, "1.5 h"), (float("inf"), "?")])
def test_durations_for_people(seconds: float, text: str) -> None:
    assert rough_duration(seconds) == text


def test_collecting_and_generating_say_how_long_they_take(tok: PreTrainedTokenizerBase, tmp_path: Path,
                                                          monkeypatch: pytest.MonkeyPatch,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    """Both before they are through, with the model's own steps and batches."""
    monkeypatch.setattr(remaining, "_TIMED", 0.0)
    monkeypatch.setattr("sphere_easyedit.methods.covariance.TOKENS_AT_ONCE", 200)
    hparams = tiny_hparams(tmp_path, mom2_max_length=40)
    caplog.set_level(logging.INFO, "sphere_easyedit")
    second_moments(hparams.editable(tiny_model("llama")), tok, hparams)
    told = [message for message in caplog.messages if "to go" in message]
    assert [message.partition(":")[0] for message in told] == ["generating text", "statistics"]
    assert all(message.endswith(" s to go") for message in told)
