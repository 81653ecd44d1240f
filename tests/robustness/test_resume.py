"""A run that was killed and resumed ends as one that never was."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from helpers.models import save_tiny_model, tiny_hparams, tiny_model
from helpers.processes import Started
from sphere_easyedit import EditCallback, EditEvent, SPHEREHyperParams
from sphere_easyedit.callbacks.neurons import NeuronRecord
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.checkpoints import resumable, saved_weights
from sphere_easyedit.runs.measuring import Measurer
from sphere_easyedit.runs.schedule import MeasureSettings, due_measurements
from sphere_easyedit.runs.sequential import RunResult, RunSettings, run_sequential
from sphere_easyedit.utils.signals import Interrupted, raise_on_interrupts

TIMES = ("preparation_seconds", "editing_seconds", "evaluation_seconds", "peak_memory_bytes")
TEXT = " ".join(f"The {noun} of the town is {number} years old." for number, noun in
                enumerate(["mayor", "church", "bridge", "school", "river", "market", "tower", "wall"] * 4))


class InterruptedError_(KeyboardInterrupt):
    """What stands for a kill in this process."""


class KilledIn(EditCallback):
    """Interrupts the run in a batch, when its weights are already in the model."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_batch_end(self, event: EditEvent) -> None:
        if event.num_batches == self.batch:
            raise InterruptedError_


def without_times(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name not in TIMES}


def lines_of(run: Path, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / name).read_text().splitlines()]
    for line in lines:
        for timed in ("seconds", "wall_seconds"):
            line.pop(timed, None)
    return lines


def run_it(folder: Path, name: str, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
           callbacks: list[EditCallback] | None = None, model: nn.Module | None = None, **settings: Any) -> RunResult:
    text = folder / "text.txt"
    text.write_text(TEXT)
    measure = MeasureSettings(protocols=("paper", "rome"), every=4, sample=3, last_batch=True, text=text,
                              text_tokens=96)
    given = {"checkpoint_every": 4, "measure": measure, "resume": True, "examples": 1, **settings}
    return run_sequential(model or tiny_model("llama"), tok, load_records("demo", None, 9, 0), hparams,
                          RunSettings(folder / name, 2, **given), callbacks=callbacks or [])


METHODS: dict[str, dict[str, Any]] = {
    "AlphaEdit": {},
    "MEMIT": {"keep_previous_keys": True, "principal_space": "pretrained"},
    "RECT": {},
    "PRUNE": {},
    "ReplayFT": {"ft_lr": 0.01, "ft_epochs": 2, "kl_factor": 1.0},
}
Undisturbed = tuple[Path, SPHEREHyperParams, RunResult]


@pytest.fixture(scope="module")
def undisturbed(llama_stats: Path, tmp_path_factory: pytest.TempPathFactory
                ) -> Callable[[str, PreTrainedTokenizerBase], Undisturbed]:
    """Of a method: the folder with its run ``whole``, its hyperparameters, and what the run came to."""
    folder, done = tmp_path_factory.mktemp("undisturbed"), dict[str, Undisturbed]()

    def of(method: str, tok: PreTrainedTokenizerBase) -> Undisturbed:
        if method not in done:
            hparams = tiny_hparams(llama_stats, v_num_grad_steps=4, base_alg=method, **METHODS[method])
            (folder / method).mkdir()
            done[method] = folder / method, hparams, run_it(folder / method, "whole", tok, hparams)
        return done[method]

    return of


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_an_interrupted_run_ends_like_an_undisturbed_one(
        tmp_path: Path, tok: PreTrainedTokenizerBase, batch: int, method: str,
        undisturbed: Callable[[str, PreTrainedTokenizerBase], Undisturbed]) -> None:
    folder, hparams, whole = undisturbed(method, tok)
    with pytest.raises(InterruptedError_):
        run_it(tmp_path, "killed", tok, hparams, [KilledIn(batch)])
    resumed = run_it(tmp_path, "killed", tok, hparams)
    assert without_times(resumed.summary) == without_times(whole.summary)
    assert resumed.tracker.records == whole.tracker.records
    assert resumed.generations == whole.generations
    for name in ("edits.jsonl", "metrics.jsonl"):
        assert lines_of(tmp_path / "killed", name) == lines_of(folder / "whole", name)
    for name in ("energy.csv", "cases.jsonl", "spaces.csv", "neurons.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (folder / "whole" / name).read_bytes()


def test_measurements_are_not_paid_for_twice(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    hparams = tiny_hparams(llama_stats, v_num_grad_steps=2)
    with pytest.raises(InterruptedError_):
        run_it(tmp_path, "run", tok, hparams, [KilledIn(4)], checkpoint_every=8)  # batches 1 to 3 are lost
    before = lines_of(tmp_path / "run", "metrics.jsonl")
    assert {line["num_edits"] for line in before} == {0, 2, 4, 6}
    measured = []
    original = Measurer.scores

    def noted(self: Measurer, point: Any) -> Any:
        measured.append((point.when, point.num_edits))
        return original(self, point)

    monkeypatch.setattr(Measurer, "scores", noted)
    result = run_it(tmp_path, "run", tok, hparams, checkpoint_every=8)
    assert {("before", 0), ("after", 9)} <= set(measured)  # read again for cases.jsonl
    assert not [point for point in measured if 0 < point[1] <= 6]
    assert lines_of(tmp_path / "run", "metrics.jsonl")[: len(before)] == before
    assert result.summary["num_edits"] == 9


def test_a_torn_chunk_of_scores_is_measured_again(tmp_path: Path, llama_stats: Path,
                                                  tok: PreTrainedTokenizerBase) -> None:
    hparams = tiny_hparams(llama_stats, v_num_grad_steps=2)
    whole = run_it(tmp_path, "run", tok, hparams)
    run = tmp_path / "run"
    scores = (run / "scores" / "after-9.jsonl").read_bytes()
    (run / "scores" / "after-9.jsonl").write_bytes(scores[: len(scores) // 2])
    metrics = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(line for line in metrics if '"after"' not in line) + '{"num_edi')
    (run / "summary.json").unlink()
    again = run_it(tmp_path, "run", tok, hparams)
    assert without_times(again.summary) == without_times(whole.summary)
    assert (run / "scores" / "after-9.jsonl").read_bytes() == scores


def test_a_finished_run_is_left_alone(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    hparams = tiny_hparams(llama_stats, v_num_grad_steps=2)
    whole = run_it(tmp_path, "run", tok, hparams)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    again = run_it(tmp_path, "run", tok, hparams)
    assert again.summary == whole.summary
    assert again.generations == whole.generations
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_other_settings_are_refused(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    hparams = tiny_hparams(llama_stats, v_num_grad_steps=2)
    with pytest.raises(InterruptedError_):
        run_it(tmp_path, "run", tok, hparams, [KilledIn(3)])
    for name, value in (("alpha", 0.25), ("v_lr", 0.25), ("L2", 3.0)):
        with pytest.raises(ValueError, match=name):
            run_it(tmp_path, "run", tok, tiny_hparams(llama_stats, **{"v_num_grad_steps": 2, name: value}))
    for records, batch_size, protocols in ((8, 2, ("paper",)), (9, 3, ("paper",)), (9, 2, ("rome",))):
        with pytest.raises(ValueError, match="other settings"):
            run_sequential(tiny_model("llama"), tok, load_records("demo", None, records, 0), hparams,
                           RunSettings(tmp_path / "run", batch_size, resume=True, checkpoint_every=4,
                                       measure=MeasureSettings(protocols=protocols)))


def test_a_model_with_other_weights_is_refused(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    hparams = tiny_hparams(llama_stats, v_num_grad_steps=2)
    with pytest.raises(InterruptedError_):
        run_it(tmp_path, "run", tok, hparams, [KilledIn(4)])
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 1.0
    with pytest.raises(ValueError, match="other weights"):
        run_it(tmp_path, "run", tok, hparams, model=model)


def test_old_checkpoints_go_and_kept_weights_stay(tmp_path: Path, llama_stats: Path,
                                                  tok: PreTrainedTokenizerBase) -> None:
    hparams = tiny_hparams(llama_stats, v_num_grad_steps=2)
    run_it(tmp_path, "one", tok, hparams, checkpoint_every=2, keep_checkpoints=1, keep_weights_every=4)
    folder = tmp_path / "one" / "checkpoints"
    assert resumable(folder) == [9]
    assert saved_weights(folder) == [4, 8, 9]
    run_it(tmp_path, "all", tok, hparams, checkpoint_every=2, keep_checkpoints=0)
    assert resumable(tmp_path / "all" / "checkpoints") == [2, 4, 6, 8, 9]


def test_a_run_that_took_anothers_weights_is_not_resumed(tmp_path: Path, llama_stats: Path,
                                                         tok: PreTrainedTokenizerBase) -> None:
    """Older versions let PRUNE take the weights of a run of MEMIT, which left no session to go on from."""
    hparams = tiny_hparams(llama_stats, v_num_grad_steps=2)
    run_it(tmp_path, "run", tok, hparams)
    config = tmp_path / "run" / "config.yaml"
    content = yaml.safe_load(config.read_text())
    for follows, refused in ((None, False), ("memit", True)):
        content["run"]["follows"] = follows
        config.write_text(yaml.safe_dump(content))
        if refused:
            with pytest.raises(ValueError, match="follows was 'memit' and is None"):
                run_it(tmp_path, "run", tok, hparams)
        else:
            run_it(tmp_path, "run", tok, hparams)


def test_other_versions_measure_again_what_comes_later(tmp_path: Path, llama_stats: Path,
                                                       tok: PreTrainedTokenizerBase) -> None:
    hparams = tiny_hparams(llama_stats, v_num_grad_steps=2)
    with pytest.raises(InterruptedError_):
        run_it(tmp_path, "run", tok, hparams, [KilledIn(4)])  # a checkpoint after 4 edits, measured up to 6
    run = tmp_path / "run"
    (run / "texts").mkdir()
    for name in ("scores", "texts"):
        for num_edits in (4, 6):
            (run / name / f"last_batch-{num_edits}.jsonl").touch()
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["versions"]["torch"] = "2.2.0"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InterruptedError_):
        run_it(tmp_path, "run", tok, hparams, [KilledIn(3)])
    assert [path.name for path in sorted((run / "texts").iterdir())] == ["last_batch-4.jsonl"]
    assert not (run / "scores" / "last_batch-6.jsonl").exists()
    assert NeuronRecord.read(run / "neurons.safetensors").num_edits == 4
    assert max(line["num_edits"] for line in lines_of(run, "metrics.jsonl")) == 4


def test_runs_share_what_they_measured_before(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    from sphere_easyedit.runs import measuring

    hparams, records = tiny_hparams(llama_stats, v_num_grad_steps=2), load_records("demo", None, 4, 0)
    measure = MeasureSettings(shared_before=tmp_path / "shared")
    one = run_sequential(tiny_model("llama"), tok, records, hparams, RunSettings(tmp_path / "one", 2, measure=measure))
    calls = []
    original = measuring.evaluate_protocols
    monkeypatch.setattr(measuring, "evaluate_protocols",
                        lambda *args, **more: calls.append(1) or original(*args, **more))
    two = run_sequential(tiny_model("llama"), tok, records, hparams, RunSettings(tmp_path / "two", 2, measure=measure))
    assert len(calls) == 1  # after editing
    assert two.summary["pre"] == one.summary["pre"]
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.embed_tokens.weight[0, 0] += 1.0
    run_sequential(other, tok, records, hparams, RunSettings(tmp_path / "three", 2, measure=measure))
    assert len(calls) == 3
    assert len(list((tmp_path / "shared").iterdir())) == 2  # one a model, none of an edited one


def test_points_of_a_run() -> None:
    settings = MeasureSettings(every=5, sample=4, last_batch=True)
    assert [point.when for point in due_measurements(0, 0, 12, settings)] == ["before"]
    assert [point.when for point in due_measurements(3, 3, 12, settings)] == ["last_batch"]
    last, during = due_measurements(6, 3, 12, settings)
    assert last.cases == (3, 4, 5)
    assert len(set(during.cases)) == 4
    assert set(during.cases) <= set(range(6))
    assert during == due_measurements(6, 3, 12, settings)[1]  # the same sample in every run
    assert [point.when for point in due_measurements(12, 3, 12, settings)] == ["last_batch", "after"]
    assert due_measurements(0, 0, 12, MeasureSettings(before=False)) == []


@pytest.mark.parametrize("settings", [{"every": 0}, {"sample": 0}, {"protocols": ()}, {"protocols": ("paper", "paper")},
                                      {"protocols": ("easyedit",), "before": False},
                                      {"protocols": ("easyedit",), "cases": 3, "every": 2}, {"cases": 0}])
def test_impossible_measures_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        MeasureSettings(**settings)


Start = Callable[[Path], Started]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Starts the command line on a tiny model: 24 edits in batches of 3, measured on the way, to a directory."""
    folder = tmp_path_factory.mktemp("command")
    save_tiny_model(folder / "tiny-llama", "llama")
    settings = tiny_hparams(folder, model_name="tiny-llama", v_num_grad_steps=8).to_dict() | {"stats_dir": "stats"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    (folder / "text.txt").write_text(TEXT)
    assert Started("--help", cwd=folder).wait() == 0  # the time of starting the server is no run's

    def start(output: Path) -> Started:
        return Started(
            "edit", "--hparams", "tiny.yaml", "--num-edits", "24", "--batch-size", "3", "--seed", "1", "--eval-every",
            "6", "--eval-last-batch", "--checkpoint-every", "1", "--text", "text.txt", "--text-tokens", "64",
            "--output", output, "--resume", "--on-error", "skip", "--guard", "warn", "--guard-facts", "4",
            "--keep-factors", cwd=folder)

    return start


@pytest.fixture(scope="module")
def whole(start: Start, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that was left alone, and the seconds that it took."""
    output = tmp_path_factory.mktemp("whole") / "run"
    started = time.monotonic()
    process = start(output)
    assert process.wait() == 0, process.stderr
    return output, time.monotonic() - started


def assert_same_run(one: Path, other: Path) -> None:
    """All that does not tell of time is the same."""
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    assert without_times(summaries[1]) == without_times(summaries[0])
    for name in ("edits.jsonl", "metrics.jsonl"):
        assert lines_of(other, name) == lines_of(one, name)
    for name in ("energy.csv", "spaces.csv", "neurons.safetensors", "guard.json"):
        assert (other / name).read_bytes() == (one / name).read_bytes()
    factors = [{path.name: path.read_bytes() for path in (run / "factors").iterdir()} for run in (one, other)]
    assert factors[0] == factors[1] and len(factors[0]) >= 8


def test_kill_9_at_random_moments(start: Start, whole: tuple[Path, float], tmp_path: Path) -> None:
    """The command line, killed five times and resumed, against one that was left alone."""
    undisturbed, seconds = whole
    killed, moments, kills = tmp_path / "killed", random.Random(0), 0
    while kills < 5:
        process = start(killed)
        try:
            process.wait(timeout=moments.uniform(0.1, 0.95) * seconds)
            break  # it was faster than the blow
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            status = process.wait()
            if status == 0:  # it ended in between
                break
            assert status == -signal.SIGKILL
            kills += 1
    last = start(killed)
    assert last.wait() == 0, last.stderr
    assert_same_run(undisturbed, killed)


def test_sigterm_and_ctrl_c_end_in_good_order(start: Start, whole: tuple[Path, float], tmp_path: Path) -> None:
    """Asked to end in mid-run, the command line says so, exits as a shell expects, and can be gone on with."""
    ended = tmp_path / "ended"
    edits = ended / "edits.jsonl"
    for number, name in ((signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")):
        already = len(edits.read_text().splitlines()) if edits.exists() else 0
        process, deadline = start(ended), time.monotonic() + 300
        while not edits.exists() or len(edits.read_text().splitlines()) <= already:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        assert process.wait() == 128 + number, process.stderr
        said = process.stderr
        assert f"ended by {name}" in said and "--resume" in said and "Traceback" not in said
    last = start(ended)
    assert last.wait() == 0, last.stderr
    assert_same_run(whole[0], ended)


def test_a_second_signal_does_not_cut_the_undoing_short() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught, raise_on_interrupts():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)  # never slept through
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            undone = True
    assert undone and (caught.value.name, caught.value.exit_status) == ("SIGTERM", 143)
    assert signal.getsignal(signal.SIGTERM) is before
