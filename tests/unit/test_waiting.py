"""A command that prints nothing for a while says that it is still at work."""

from __future__ import annotations

import io
import time

import pytest

from sphere_easyedit.cli import waiting as module
from sphere_easyedit.cli.waiting import WatchedConsole, report_waiting


@pytest.mark.parametrize(("longest", "lines"), [(0.1, True), (100.0, False)])
def test_only_a_long_silence_is_broken(longest: float, lines: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST", longest)
    stream = io.StringIO()
    with report_waiting(WatchedConsole(file=stream), lambda: "measuring before 3/50"):
        time.sleep(1.1)
    text = stream.getvalue()
    assert ("still at work (measuring before 3/50), " in text) is lines
    time.sleep(0.7)
    assert stream.getvalue() == text  # nothing follows the end of the work


def test_a_closed_stream_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LONGEST", 0.0)
    stream = io.StringIO()
    console = WatchedConsole(file=stream)
    stream.close()
    with report_waiting(console, str):
        time.sleep(0.7)
