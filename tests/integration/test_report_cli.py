"""Reports from the command line, and a run's report while it edits."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.command_line import workplace  # noqa: F401 - a fixture
from helpers.processes import call_cli
from helpers.run_files import write_run
from sphere_easyedit.editing.callbacks import MeasureEvent, RunState
from sphere_easyedit.report import live
from sphere_easyedit.report.live import LiveReport
from sphere_easyedit.runs.directory import RunDirectory
from sphere_easyedit.runs.records import read_state

pytest.importorskip("vl_convert", reason="vl-convert-python (the extra `report`) is not installed")


def test_edit_leaves_a_report_and_older_runs_get_one(workplace: Path) -> None:
    done = call_cli("edit", "--hparams", "tiny.yaml", "--num-edits", "4", "--batch-size", "2", "--seed", "1",
                    "--output", "reported", "--set", "v_num_grad_steps=3", "--report",
                    cwd=workplace)
    assert done.returncode == 0, done.stderr
    run = workplace / "reported"
    assert "Report: reported/report.html" in done.stdout
    page = (run / "report.html").read_text(encoding="utf-8")
    assert 'id="spectra"' in page
    assert 'id="refresh"' not in page
    assert (run / "figures" / "curves.svg").is_file()

    for name in ("neurons.safetensors", "spaces.csv"):
        (run / name).unlink()
    done = call_cli("report", "reported", "--no-figures", "--output", "elsewhere", cwd=workplace)
    assert done.stdout.strip() == "elsewhere/report.html", done.stderr
    assert 'id="spectra"' not in (workplace / "elsewhere" / "report.html").read_text(encoding="utf-8")


def test_what_is_no_run_is_said_in_one_line(workplace: Path) -> None:
    done = call_cli("report", "absent", cwd=workplace)
    assert done.returncode == 2
    assert done.stderr.startswith("error: absent has no config.yaml")


def under_way(run: Path, measurements: int) -> RunState:
    """A run as it stands after so many measurements."""
    state = read_state(RunDirectory(run))
    return replace(state, measurements=state.measurements[:measurements], summary=None)


def test_a_live_report_is_made_of_what_the_run_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "REFRESH", 0)
    monkeypatch.setattr(live, "_SHARE", 1e9)
    run = write_run(tmp_path / "run")
    states = [under_way(run, count) for count in (0, 2, 5)]
    for name in ("metrics.jsonl", "edits.jsonl", "energy.csv", "summary.json", "config.yaml"):
        (run / name).unlink()  # a live report reads none of them
    report = LiveReport()
    report.on_measured(MeasureEvent(states[0]))
    assert not (run / "report.html").exists()  # nothing is measured yet
    report.on_measured(MeasureEvent(states[1]))
    first = (run / "report.html").read_text(encoding="utf-8")
    assert "has not ended" in first
    report.update("editing", 2, 3)
    assert (run / "report.html").read_text(encoding="utf-8") == first  # no news since
    report.on_measured(MeasureEvent(states[2]))
    assert (run / "report.html").read_text(encoding="utf-8") != first


def test_a_live_report_takes_a_share_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    written: list[float] = []
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])

    def write(*_: object, **__: object) -> None:
        written.append(clock[0])
        clock[0] += 4.0

    monkeypatch.setattr(live, "write_report", write)
    event, report = MeasureEvent(under_way(write_run(tmp_path / "run"), 2)), LiveReport()
    for _ in range(300):
        report.on_measured(event)
        clock[0] += 1.0
    assert 3 <= len(written) <= 5  # 4 s each in 300 s and the time that they took
    clock[0] += 100.0
    report.update("during", 1, 2)  # what came too soon to be shown is shown while the run measures
    assert written[-1] == clock[0] - 4.0


@pytest.mark.parametrize("harm", [RuntimeError("Vega is out of order"), KeyError("edits")])
def test_a_report_that_fails_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                         monkeypatch: pytest.MonkeyPatch, harm: Exception) -> None:
    def fail(*_: object, **__: object) -> None:
        raise harm

    monkeypatch.setattr(live, "write_report", fail)
    state, report = under_way(write_run(tmp_path / "run"), 2), LiveReport()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            report.on_measured(MeasureEvent(state))
        report.on_run_end(state)
    assert report.page is None
    assert len(caplog.records) == 2
