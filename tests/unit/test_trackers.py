"""A run's numbers in experiment trackers."""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from accelerate import tracking
from transformers import AutoTokenizer

from helpers.golden import GOLDEN
from helpers.models import tiny_hparams, tiny_model
from sphere_easyedit.callbacks.he_tracker import read_energy_csv
from sphere_easyedit.callbacks.trackers import RunTrackers, batch_numbers, flat_config, point_numbers
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.callbacks import MeasureEvent, RunState
from sphere_easyedit.runs.directory import RunDirectory
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.schema import EDITS, METRICS, AbilityEstimate, BatchRecord, Estimate, Measurement
from sphere_easyedit.runs.sequential import RunSettings, run_sequential


class StandIn(tracking.GeneralTracker):  # type: ignore[misc]
    """Remembers what it was told, and fails at a given call."""

    name = "stand-in"
    requires_logging_directory = False

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.config: dict[str, Any] = {}
        self.logged: list[tuple[int | None, dict[str, float]]] = []
        self.calls, self.fails_at, self.finished = 0, fails_at, False

    @property
    def tracker(self) -> StandIn:
        return self

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.config = values

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.calls += 1
        if self.calls == self.fails_at:
            raise ConnectionError("no route to host")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


class OtherStandIn(StandIn):
    name = "other"


class Edit(Protocol):
    """Edit five facts in batches of two into ``folder / "run"``; what the summary says."""

    def __call__(self, folder: Path, trackers: list[Any], resume: bool = False) -> dict[str, Any]: ...


@pytest.fixture(scope="module")
def edit(tmp_path_factory: pytest.TempPathFactory) -> Edit:
    statistics = tmp_path_factory.mktemp("statistics")  # made once for all runs
    tok = AutoTokenizer.from_pretrained(GOLDEN / "llama" / "tiny-llama")

    def edit(folder: Path, trackers: list[Any], resume: bool = False) -> dict[str, Any]:
        with RunTrackers(trackers) as watching:
            result = run_sequential(
                tiny_model("llama"), tok, load_records("demo", None, 5, 0),
                tiny_hparams(statistics, v_num_grad_steps=4),
                RunSettings(folder / "run", 2, measure=MeasureSettings(protocols=("paper", "rome"), every=4),
                            resume=resume, described={"dataset": "demo", "seed": 0}), [watching])
        return result.summary

    return edit


def test_a_tracker_is_told_the_whole_run(tmp_path: Path, edit: Edit) -> None:
    one, threads = StandIn(), torch.get_num_threads()
    edit(tmp_path, [one])
    assert torch.get_num_threads() == threads  # they decide about bits
    steps = [step for step, _ in one.logged]
    assert steps == sorted(steps, key=lambda step: step or 0)
    by_step: dict[int | None, dict[str, float]] = {}
    for step, values in one.logged:
        by_step.setdefault(step, {}).update(values)
    assert list(by_step) == [0, 2, 4, 5]
    lines = RunDirectory(tmp_path / "run").lines(EDITS)
    records = {record.num_edits: record for record in read_energy_csv(tmp_path / "run" / "energy.csv")}
    for line in lines:
        found = by_step[line["num_edits"]]
        assert found["batch/seconds_per_edit"] == line["wall_seconds"] / len(line["case_ids"])
        assert found["batch/mean_loss"] == pytest.approx(sum(line["losses"]) / len(line["losses"]))
        assert found["update_norm/layer_1"] == line["update_norms"]["1"]
        change = records[line["num_edits"]].relative_change
        assert (found["energy_change/layer_1"], found["energy_change/layer_2"]) == (change[1], change[2])
        assert found["energy_change/mean"] == pytest.approx((change[1] + change[2]) / 2)
    points = {(line["num_edits"], line["when"], line["protocol"]): line["specificity"]["mean"]
              for line in RunDirectory(tmp_path / "run").lines(METRICS)}
    assert len(points) == 6
    for (num_edits, when, protocol), mean in points.items():
        assert by_step[num_edits][f"{protocol}/{when}/specificity"] == mean
    assert one.config["layers"] == "[1, 2]"
    assert one.config["alpha"] == 0.5
    assert one.config["run.num_edits"] == 5
    assert one.finished


def test_tensorboard_reads_it_back_and_a_resumed_run_stands_once(tmp_path: Path, edit: Edit) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    summary = edit(tmp_path, ["tensorboard"])
    run = RunDirectory(tmp_path / "run")
    (run.path / "summary.json").unlink()
    run.keep_until(EDITS, 4)
    for name in ("weights-5", "session-5"):
        (run.checkpoints / f"{name}.safetensors").unlink()
    again = edit(tmp_path, ["tensorboard"], resume=True)  # from the start, as no checkpoint is left
    assert again["weights_sha256"] == summary["weights_sha256"]
    assert len(list((run.path / "trackers" / "sphere-easyedit").glob("events*"))) == 2
    events = EventAccumulator(str(run.path / "trackers" / "sphere-easyedit"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("energy_change/layer_2")]
    expected = [(record.num_edits, record.relative_change[2])
                for record in read_energy_csv(run.path / "energy.csv")[1:]]
    assert [step for step, _ in found] == [2, 4, 5]
    assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert [event.step for event in events.Scalars("rome/during/efficacy")] == [4]


def test_trackers_change_no_bit(tmp_path: Path, edit: Edit) -> None:
    for name in ("with", "without"):
        (tmp_path / name).mkdir()
    with_one = edit(tmp_path / "with", [StandIn()])
    assert with_one["weights_sha256"] == edit(tmp_path / "without", [])["weights_sha256"]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = RunState(tmp_path, {"hparams": {"alpha": 0.5, "layers": [4, 5]}, "run": {"num_edits": 4}},
                   [BatchRecord(2, (1, 2), wall_seconds=4.0, update_norms={4: 1.5})])
    with RunTrackers(["wandb"], quiet=True) as watching:
        watching.on_measured(MeasureEvent(run, batch=run.batches[0]))
        watching.on_measured(MeasureEvent(run, measurement=Measurement(
            2, "during", "paper", {"specificity": Estimate(75.0, None, 4)})))
    names = {b"update_norm/layer_4", b"paper/during/specificity", b"batch/seconds_per_edit"}
    deadline = time.monotonic() + 30  # its service may write for a moment after `finish` has returned
    while time.monotonic() < deadline:
        files = list((tmp_path / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
        missing = {name for name in names if not any(name in file.read_bytes() for file in files)}
        if not missing:
            break
        time.sleep(0.05)
    assert len(files) == 1
    assert not missing


def test_a_tracker_that_fails_is_left_out(tmp_path: Path, edit: Edit,
                                          caplog: pytest.LogCaptureFixture) -> None:
    failing, other = StandIn(fails_at=2), OtherStandIn()
    with caplog.at_level(logging.WARNING, "sphere_easyedit.callbacks.trackers"):
        summary = edit(tmp_path, [failing, other])
    assert summary["num_edits"] == 5
    assert len(failing.logged) == 1
    assert failing.calls == 2
    assert len(other.logged) > 5
    assert [record.message for record in caplog.records] == [
        "tracker stand-in failed and is dropped, the run goes on: ConnectionError: no route to host"]


def test_a_refused_run_begins_no_tracker(tmp_path: Path, edit: Edit) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other.txt").write_text("mine")
    one = StandIn()
    with pytest.raises(ValueError, match="is not empty"):
        edit(tmp_path, [one])
    assert not one.finished
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["other.txt"]


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    one, batch = StandIn(), BatchRecord(2, (1, 2), wall_seconds=4.0, losses=(math.nan, 1.0),
                                        update_norms={4: math.inf}, efficacy=50.0)
    with RunTrackers([one]) as watching:
        watching.on_measured(MeasureEvent(RunState(tmp_path, {"hparams": {}, "run": {}}, [batch]), batch=batch))
    assert one.logged == [(2, {"batch/seconds_per_edit": 2.0, "batch/efficacy": 50.0})]


def test_a_resumed_run_is_told_from_its_beginning(tmp_path: Path) -> None:
    batches = [BatchRecord(number, (number,), wall_seconds=1.0) for number in (1, 2, 3)]
    points = [Measurement(number, "during", "paper", {"efficacy": Estimate(50.0, None, 1)}) for number in (1, 3)]
    one, config = StandIn(), {"hparams": {}, "run": {}}
    with RunTrackers([one]) as watching:
        watching.on_measured(MeasureEvent(RunState(tmp_path, config, batches, points[:1]), batch=batches[2]))
        watching.on_measured(MeasureEvent(RunState(tmp_path, config, batches, points), measurement=points[1]))
    assert [(step, *values) for step, values in one.logged] == [
        (1, "batch/seconds_per_edit"), (1, "paper/during/efficacy"), (2, "batch/seconds_per_edit"),
        (3, "batch/seconds_per_edit"), (3, "paper/during/efficacy")]


def test_names_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="'tensorbord' is not known: choose one of .*tensorboard.*wandb"):
        RunTrackers(["tensorbord"])
    with pytest.raises(ValueError, match="'all' is not known"):
        RunTrackers(["all"])
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
    with pytest.raises(ValueError, match="'comet_ml' is not installed: pip install comet_ml"):
        RunTrackers(["comet_ml"])


def test_numbers_of_records() -> None:
    abilities = Measurement(4, "after", "lm-eval 0.4", abilities={
        "rte": AbilityEstimate(50.0, n=4), "boolq": AbilityEstimate(math.nan)})
    assert point_numbers(abilities) == {"abilities/after/rte": 50.0}
    point = Measurement(4, "during", "rome", {"efficacy": Estimate(75.0, None, 4), "fluency": Estimate(5.5, None, 4)},
                        25.0, {4: 1.0}, 4, seconds=1.0)
    assert point_numbers(point) == {"rome/during/efficacy": 75.0, "rome/during/fluency": 5.5,
                                    "perplexity/during": 25.0}
    assert batch_numbers(BatchRecord(4, (1,), wall_seconds=2.0), {}) == {"batch/seconds_per_edit": 2.0}


def test_config_is_flat_and_plain() -> None:
    flat = flat_config({"hparams": {"alpha": 0.5, "layers": [4, 5], "P_loc": None, "batched": True,
                                    "moments": {"samples": 3}}, "run": {"seed": 1, "measure": {"every": 2}}})
    assert flat == {"alpha": 0.5, "layers": json.dumps([4, 5]), "batched": True, "moments.samples": 3, "run.seed": 1}
