"""A sweep's processes, with a program in place of the real one that does what its option says."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.sweeps import PROGRAM, calls, is_alive, run_named, sweep_of, wait_for
from sphere_easyedit.runs.sweep import Run, Sweep, run_sweep
from sphere_easyedit.runs.sweep.record import RECORD


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    file = tmp_path_factory.mktemp("program") / "program.py"
    file.write_text(PROGRAM)
    return sys.executable, str(file)


def test_runs_all_and_again_none(tmp_path: Path, program: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    told: list[tuple[str, str, int, int]] = []
    sweep = sweep_of(run_named("a"), run_named("b"))
    out = tmp_path / "deep" / "out"
    result = run_sweep(sweep, out, 2, lambda *one: told.append(one), program)
    assert [(one.name, one.status, one.returncode) for one in result.outcomes] == [
        ("a-seed0", "finished", 0), ("b-seed0", "finished", 0)]
    assert result.failed == ()
    assert told[:2] == [("a-seed0", "started", 0, 2), ("b-seed0", "started", 0, 2)]
    assert {one[:2] for one in told[2:]} == {("a-seed0", "finished"), ("b-seed0", "finished")}
    assert [one[2:] for one in told[2:]] == [(1, 2), (2, 2)]
    first = calls(out)[0]
    assert first["arguments"] == sweep.runs[["a-seed0", "b-seed0"].index(first["name"])].arguments(out / first["name"])
    cores = len(os.sched_getaffinity(0))
    assert {call["threads"] for call in calls(out)} == {str(max(1, cores // 2))}
    assert (out / "a-seed0.log").read_text().startswith("# ")
    assert "hello from a-seed0" in (out / "a-seed0.log").read_text()
    assert [entry["name"] for entry in yaml.safe_load((out / RECORD).read_text())["runs"]] == ["a-seed0", "b-seed0"]

    told.clear()
    again = run_sweep(sweep, out, 2, lambda *one: told.append(one), program)
    assert [(one.status, one.returncode) for one in again.outcomes] == [("present", None)] * 2
    assert told == [("a-seed0", "present", 1, 2), ("b-seed0", "present", 2, 2)]
    assert len(calls(out)) == 2


def test_threads_that_are_set_stay(tmp_path: Path, program: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    run_sweep(sweep_of(run_named("a")), tmp_path, 1, None, program)
    assert calls(tmp_path)[0]["threads"] == "7"


def test_a_failure_does_not_stop_the_others_and_is_tried_again(tmp_path: Path, program: tuple[str, str]) -> None:
    sweep = sweep_of(run_named("a", "fail-once"), run_named("b"), run_named("c", "silent"))
    result = run_sweep(sweep, tmp_path, 1, None, program)
    assert [(one.status, one.returncode) for one in result.outcomes] == [("failed", 3), ("finished", 0), ("failed", 0)]
    failed = result.failed[0]
    assert failed.tail.splitlines()[-1] == "the reason"
    assert len(failed.tail.splitlines()) <= 20
    assert failed.log == tmp_path / "a-seed0.log"
    again = run_sweep(sweep, tmp_path, 1, None, program)
    assert [one.status for one in again.outcomes] == ["finished", "present", "failed"]
    log = (tmp_path / "a-seed0.log").read_text()
    assert log.count("hello from") == 2  # what the first attempt said is still there


def test_no_more_at_a_time_than_jobs_and_in_order(tmp_path: Path, program: tuple[str, str]) -> None:
    stubs = {"a": "meet", "b": "meet", "c": "work", "d": "work", "e": "work"}  # the first two end only side by side
    run_sweep(sweep_of(*(run_named(*one) for one in stubs.items())), tmp_path, 2, None, program)
    events = sorted([(call["at"], 1, call["name"]) for call in calls(tmp_path)]
                    + [(call["at"], -1, call["name"]) for call in calls(tmp_path, "ended")])
    at_once = [sum(step for _, step, _ in events[: place + 1]) for place in range(len(events))]
    assert max(at_once) == 2
    assert {name for _, _, name in events[:2]} == {"a-seed0", "b-seed0"}
    assert [name for _, step, name in events if step == 1][-1] == "e-seed0"


def test_a_record_of_an_older_version_is_read(tmp_path: Path, program: tuple[str, str]) -> None:
    run_sweep(sweep_of(run_named("a")), tmp_path, 1, None, program)
    content = yaml.safe_load((tmp_path / RECORD).read_text())
    content["runs"][0]["follows"] = "memit-seed0"
    (tmp_path / RECORD).write_text(yaml.safe_dump(content))
    assert run_sweep(sweep_of(run_named("a")), tmp_path, 1, None, program).outcomes[0].status == "present"


def test_a_sweep_may_only_grow(tmp_path: Path, program: tuple[str, str]) -> None:
    run_sweep(sweep_of(run_named("a")), tmp_path, 1, None, program)
    grown = run_sweep(sweep_of(run_named("b"), run_named("a")), tmp_path, 1, None, program)
    assert [one.status for one in grown.outcomes] == ["finished", "present"]
    for changed, message in ((run_named("a", batch_size=3), "batch_size was 2 and is 3 now"),
                             (run_named("a", set={"alpha": 0, "v_lr": 1}), "set was"),
                             (run_named("a", hyperparameters={"alpha": 0.0, "v_lr": 1.0}), "v_lr was 0.5 and is 1.0"),
                             (run_named("c"), "has a run a-seed0, which is not in this sweep")):
        with pytest.raises(ValueError, match=message):
            run_sweep(sweep_of(changed, run_named("b")), tmp_path, 1, None, program)
    assert len(calls(tmp_path)) == 2
    # A hyperparameter that came into being since, and another machine's device, change nothing.
    newer = run_named("a", hyperparameters={"alpha": 0.0, "v_lr": 0.5, "device": "cpu", "new": 1})
    assert run_sweep(sweep_of(newer, run_named("b")), tmp_path, 1, None, program).failed == ()


@pytest.mark.parametrize(("config", "summary", "message"), [
    ({"hparams": {"alpha": 0.5, "v_lr": 0.5}, "run": {}}, {"num_edits": 4}, "alpha was 0.5 and is 0.0 now"),
    ({"hparams": {}, "run": {"seed": 1}}, {"num_edits": 4}, "seed was 1 and is 0 now"),
    ({"hparams": {"alpha": 0.0}, "run": {"seed": 0}}, {"num_edits": 5}, "num_edits was 5 and is 4 now"),
])
def test_a_finished_run_of_other_settings_is_refused(tmp_path: Path, program: tuple[str, str], config: dict[str, Any],
                                                     summary: dict[str, Any], message: str) -> None:
    (tmp_path / "b-seed0").mkdir()
    (tmp_path / "b-seed0" / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "b-seed0" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=message):
        run_sweep(sweep_of(run_named("a"), run_named("b")), tmp_path, 1, None, program)
    assert calls(tmp_path) == []


def test_a_finished_run_of_the_same_settings_is_taken_over(tmp_path: Path, program: tuple[str, str]) -> None:
    (tmp_path / "a-seed0").mkdir()
    config = {"hparams": {"alpha": 0.0, "v_lr": 0.5, "device": "cuda"},
              "run": {"seed": 0, "dataset": "demo", "data": None, "command": "sphere-easyedit edit"}}
    (tmp_path / "a-seed0" / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "a-seed0" / "summary.json").write_text(json.dumps({"num_edits": 4}))
    assert run_sweep(sweep_of(run_named("a")), tmp_path, 1, None, program).outcomes[0].status == "present"


def test_what_is_refused_before_anything_starts(tmp_path: Path, program: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="jobs is 0"):
        run_sweep(sweep_of(run_named("a")), tmp_path / "out", 0, None, program)
    with pytest.raises(ValueError, match="no-such-file.json does not exist"):
        run_sweep(sweep_of(run_named("a", data="no-such-file.json")), tmp_path / "out", 1, None, program)
    assert not (tmp_path / "out").exists()
    (tmp_path / RECORD).write_text("runs: [{name: a}]")
    with pytest.raises(ValueError, match="not a record of a sweep"):
        run_sweep(sweep_of(run_named("a")), tmp_path, 1, None, program)


def test_an_error_in_between_ends_the_processes(tmp_path: Path, program: tuple[str, str]) -> None:
    def fails(name: str, status: str, done: int, total: int) -> None:
        if name == "b-seed0" and status == "finished":
            raise RuntimeError("as planned")

    with pytest.raises(RuntimeError, match="as planned"):
        run_sweep(sweep_of(run_named("a", "hang"), run_named("b")), tmp_path, 2, fails, program)
    for call in calls(tmp_path):
        assert not is_alive(call["pid"])


def start_sweep(output: Path, program: tuple[str, str], *runs: Run) -> Any:
    """A sweep in a process of its own, which leaves with 130 after KeyboardInterrupt."""

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        try:
            run_sweep(Sweep(runs), output, 2, None, program, grace_seconds=0.5)
        except KeyboardInterrupt:
            sys.exit(130)

    process = multiprocessing.get_context("fork").Process(target=work)  # a new one would import torch for seconds
    process.start()
    return process


@pytest.mark.parametrize(("number", "returncode"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_that_was_started(tmp_path: Path, program: tuple[str, str], number: signal.Signals,
                                            returncode: int) -> None:
    process = start_sweep(tmp_path, program, run_named("a", "with-child"), run_named("b", "stubborn"), run_named("c"))
    child = tmp_path / "a-seed0" / "child"
    wait_for(lambda: len(calls(tmp_path)) == 2 and child.exists() and child.read_text() != "")
    pids = [call["pid"] for call in calls(tmp_path)] + [int(child.read_text())]
    assert all(map(is_alive, pids))
    os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode == returncode
    wait_for(lambda: not any(map(is_alive, pids)), 2.0)
    assert {call["name"] for call in calls(tmp_path)} == {"a-seed0", "b-seed0"}  # c was not begun
    # It can go on from there: the record knows all three.
    assert len(yaml.safe_load((tmp_path / RECORD).read_text())["runs"]) == 3


def test_one_sweep_a_folder_even_when_the_first_was_killed(tmp_path: Path, program: tuple[str, str]) -> None:
    run = run_named("a", "hang-once")
    process = start_sweep(tmp_path, program, run)
    wait_for(lambda: len(calls(tmp_path)) == 1)
    with pytest.raises(ValueError, match=f"in use by the sweep of process {process.pid}"):
        run_sweep(sweep_of(run), tmp_path, 1, None, program)
    process.kill()
    process.join()
    orphan = calls(tmp_path)[0]["pid"]
    assert is_alive(orphan)
    with pytest.raises(ValueError, match="runs that it left behind"):
        run_sweep(sweep_of(run), tmp_path, 1, None, program)
    assert len(calls(tmp_path)) == 1
    os.kill(orphan, signal.SIGKILL)
    wait_for(lambda: not is_alive(orphan))
    assert run_sweep(sweep_of(run), tmp_path, 1, None, program).outcomes[0].status == "finished"
