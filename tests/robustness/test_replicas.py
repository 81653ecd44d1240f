"""One model on several processes: they end with the same weights, take their share of the work, and notice each other's
end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer

from helpers.golden import GOLDEN
from helpers.models import relative_error, tiny_hparams, tiny_model
from helpers.processes import ENVIRONMENT, forked
from sphere_easyedit import SPHEREHyperParams
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.evaluation.text_quality import Decoding
from sphere_easyedit.models.architecture import EditableModel
from sphere_easyedit.models.distributed import ProcessInfo, Replicas, merge_parts, split_balanced, split_contiguous
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.sequential import RunSettings, run_sequential
from sphere_easyedit.utils.signals import ProcessLost

TEXT = " ".join(f"The {noun} of the town is {number} years old." for number, noun in
                enumerate(["mayor", "church", "bridge", "school", "river", "market", "tower", "wall"] * 4))
COSTS = st.lists(st.integers(0, 50), max_size=40)


@given(COSTS, st.integers(1, 7))
def test_shares_hold_every_place_once_and_are_about_equal(costs: list[int], parts: int) -> None:
    found = split_balanced(costs, parts)
    assert len(found) == parts
    assert sorted(place for part in found for place in part) == list(range(len(costs)))
    assert all(part == sorted(part) for part in found)
    most = max(sum(costs[place] for place in part) for part in found)
    assert most <= sum(costs) / parts + max(costs, default=0)
    assert merge_parts(found, [[costs[place] for place in part] for part in found]) == costs


@given(COSTS, st.integers(1, 7))
def test_stretches_follow_each_other_and_are_about_equal(costs: list[int], parts: int) -> None:
    found = split_contiguous(costs, parts)
    assert len(found) == parts
    assert [place for part in found for place in part] == list(range(len(costs)))
    most = max(sum(costs[place] for place in part) for part in found)
    assert most <= sum(costs) / parts + max(costs, default=0)


def test_a_model_has_no_replicas_and_its_copy_has_none() -> None:
    assert Replicas.of(tiny_model("llama")) is None


class Processes:
    """So many processes that know each other, each running ``work(process, folder, *given)``."""

    def __init__(self, size: int, work: Callable[..., None], folder: Path, *given: Any) -> None:
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._started = []
        for index in range(size):
            environment = {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(size),
                           "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                           "GLOO_SOCKET_IFNAME": "lo"}
            self._started.append(forked(_joined, environment, work, folder, given))

    def wait(self, timeout: float = 120) -> list[int | None]:
        """Exit statuses; None of a process that still runs."""
        until = time.monotonic() + timeout
        for one in self._started:
            one.join(max(0.0, until - time.monotonic()))
        return [one.exitcode for one in self._started]

    def kill(self, index: int) -> None:
        self._started[index].kill()


def _joined(environment: dict[str, str], work: Callable[..., None], folder: Path, given: Sequence[Any]) -> None:
    os.environ.update({**ENVIRONMENT, **environment})
    torch.set_num_threads(1)
    process = ProcessInfo.join("cpu")
    with open(folder / f"stderr-{process.rank}", "w", encoding="utf-8") as stream:
        os.dup2(stream.fileno(), 2)
        try:
            work(process, folder, *given)
        except ProcessLost as error:
            stream.write(str(error))
            stream.flush()
            os._exit(7)


def lead_or_follow(process: ProcessInfo, editable: EditableModel, work: Callable[[], object]) -> None:
    """Do the work on the first process, with the others' help if there are any."""
    if process.world_size == 1:
        work()
        return
    replicas = Replicas(editable, process)
    if process.rank:
        replicas.follow()
        return
    with replicas.leading():
        work()


def edit_here(process: ProcessInfo, folder: Path, family: str, settings: dict[str, Any], num_edits: int,
              batch_size: int, measured: bool, counted: bool) -> None:
    """A run of which this process leads or follows; it leaves its weights, and counts its own work if asked to."""
    model, tok = tiny_model(family), AutoTokenizer.from_pretrained(GOLDEN / "llama" / "tiny-llama")
    hparams = SPHEREHyperParams.from_dict(settings)
    editable = hparams.editable(model)
    counter = FlopCounterMode(display=False)  # which makes a tiny model's run several times as long
    with counter if counted else nullcontext():
        lead_or_follow(process, editable, lambda: run(folder, model, tok, hparams, num_edits, batch_size, measured))
    save_file({str(layer): weight.contiguous() for layer, weight in editable.weights().items()},
              folder / f"weights-{process.rank}.safetensors", metadata={"flops": str(counter.get_total_flops())})


def run(folder: Path, model: Any, tok: Any, hparams: SPHEREHyperParams, num_edits: int, batch_size: int, measured: bool
        ) -> None:
    measure = MeasureSettings(before=False, after=False)
    if measured:
        text = folder / "text.txt"
        text.write_text(TEXT)
        measure = MeasureSettings(protocols=("paper", "rome"), text=text, text_tokens=96,
                                  decoding=Decoding(max_new_tokens=8))
    run_sequential(model, tok, load_records("demo", None, num_edits, 0), hparams,
                   RunSettings(folder / "run", batch_size, measure=measure, examples=2 if measured else 0))


def edited_by(size: int, folder: Path, family: str, settings: dict[str, Any], num_edits: int = 6, batch_size: int = 4,
              measured: bool = False, counted: bool = False) -> list[dict[str, torch.Tensor]]:
    """Each process's weights after a run by so many."""
    processes = Processes(size, edit_here, folder, family, settings, num_edits, batch_size, measured, counted)
    statuses = processes.wait()
    assert statuses == [0] * size, [(folder / f"stderr-{index}").read_text()[-2000:] for index in range(size)]
    return [load_file(folder / f"weights-{index}.safetensors") for index in range(size)]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]) if tolerance == 0 else (
            relative_error(one[name], other[name]) < tolerance), name


# Three processes and a last batch of three, four processes and one of two: somebody has nothing to do.
@pytest.mark.parametrize(("base_alg", "family", "size"), [
    ("MEMIT", "gpt2", 2), ("AlphaEdit", "llama", 3), ("RECT", "qwen2", 2), ("PRUNE", "llama", 2),
    ("AlphaEdit", "gpt2", 4)])
def test_processes_edit_as_one_does(base_alg: str, family: str, size: int, tmp_path: Path) -> None:
    settings = tiny_hparams(tmp_path, base_alg=base_alg).to_dict()
    (alone,) = edited_by(1, tmp_path / "alone", family, settings)
    together = edited_by(size, tmp_path / "together", family, settings)
    for other in together[1:]:
        assert_same(together[0], other)
    assert_same(together[0], alone, 1e-5)
    original = tiny_hparams(tmp_path, base_alg=base_alg).editable(tiny_model(family)).weights()
    assert all(relative_error(together[0][str(layer)], weight) > 1e-3 for layer, weight in original.items())


def test_processes_measure_and_collect_statistics_as_one_does(tmp_path: Path) -> None:
    found = {}
    for size in (1, 3):
        settings = tiny_hparams(tmp_path / str(size)).to_dict()
        edited_by(size, tmp_path / f"run-{size}", "llama", settings, num_edits=5, batch_size=3, measured=True)
        run_folder = tmp_path / f"run-{size}" / "run"
        found[size] = ([json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()],
                       json.loads((run_folder / "examples.json").read_text()),
                       yaml.safe_load((run_folder / "config.yaml").read_text())["machine"]["processes"])
    (alone, said, one), (together, said_together, three) = found[1], found[3]
    assert said == said_together and (one, three) == (1, 3)
    for line, other in zip(alone, together, strict=True):
        assert line["watched"]["perplexity"] == pytest.approx(other["watched"]["perplexity"], rel=1e-4)
        for metric in ("efficacy", "generalization", "specificity", "efficacy_magnitude"):
            if metric in line:
                assert line[metric]["mean"] == pytest.approx(other[metric]["mean"], abs=1e-3), metric
    moments = {size: load_moments(tmp_path / str(size)) for size in (1, 3)}
    assert moments[1].keys() == moments[3].keys()
    for name, moment in moments[1].items():
        assert relative_error(moments[3][name], moment) < 1e-6


def load_moments(folder: Path) -> dict[str, torch.Tensor]:
    import numpy as np

    return {path.name: torch.from_numpy(np.load(path)["mom2.mom2"]) for path in sorted(folder.rglob("*.npz"))}


def test_work_of_a_process_falls_with_their_number(tmp_path: Path) -> None:
    settings = tiny_hparams(tmp_path, base_alg="MEMIT").to_dict()
    edited_by(1, tmp_path / "statistics", "llama", settings, num_edits=1)  # which are there from now on
    flops = {}
    for size in (1, 4):
        edited_by(size, tmp_path / str(size), "llama", settings, num_edits=24, batch_size=24, counted=True)
        flops[size] = [flops_of(tmp_path / str(size) / f"weights-{index}.safetensors") for index in range(size)]
    share = flops[1][0] / 4
    assert all(0.7 * share < others < 1.3 * share for others in flops[4][1:]), flops


def flops_of(path: Path) -> int:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stored:
        return int(stored.metadata()["flops"])


def fail_elsewhere(process: ProcessInfo, folder: Path) -> None:
    model = tiny_model("llama")
    replicas = Replicas(tiny_hparams(folder).editable(model), process)
    if process.rank:
        replicas.follow()
        return
    with replicas.leading():
        with pytest.raises(ValueError, match="process 1 says no"):
            replicas.run(refuse, [()] * 2)
        with pytest.raises(RuntimeError, match="^Unsendable: 1 and 2$"):
            replicas.run(fail_oddly, [()] * 2)
        assert replicas.run(index_of, [()] * 2) == [0, 1]  # they go on together
    (folder / "done").touch()


def refuse(here: Replicas) -> None:
    if here.process.rank:
        raise ValueError(f"process {here.process.rank} says no")


class Unsendable(Exception):
    """Which pickle takes, and can't make again."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def fail_oddly(here: Replicas) -> None:
    if here.process.rank:
        raise Unsendable(1, 2)


def index_of(here: Replicas) -> int:
    return here.process.rank


def test_an_error_elsewhere_is_raised_by_the_leader_and_leaves_all_at_work(tmp_path: Path) -> None:
    assert Processes(2, fail_elsewhere, tmp_path).wait() == [0, 0]
    assert (tmp_path / "done").exists()


def different_models(process: ProcessInfo, folder: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter("model.embed_tokens.weight")[0, 0] += process.rank
    with pytest.raises(ValueError, match="the models of the 2 processes differ"):
        Replicas(tiny_hparams(folder).editable(model), process)


def test_different_models_are_refused(tmp_path: Path) -> None:
    assert Processes(2, different_models, tmp_path).wait() == [0, 0]


def edit_long(process: ProcessInfo, folder: Path, settings: dict[str, Any]) -> None:
    """A run of several batches that goes on where an earlier one was cut off."""
    model, tok = tiny_model("llama"), AutoTokenizer.from_pretrained(GOLDEN / "llama" / "tiny-llama")
    hparams = SPHEREHyperParams.from_dict(settings)
    run_settings = RunSettings(folder / "run", 3, checkpoint_every=6, resume=True,
                               measure=MeasureSettings(before=False))
    lead_or_follow(process, hparams.editable(model), lambda: run_sequential(
        model, tok, load_records("demo", None, 24, 0), hparams, run_settings))


def wait_for_lines(path: Path, count: int, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < until, f"{path} has no {count} lines after {seconds} s"
        time.sleep(0.01)


@pytest.mark.parametrize("killed", [0, 1], ids=["leader", "follower"])
def test_a_killed_process_ends_the_others_and_the_run_resumes_to_the_same_bits(killed: int, tmp_path: Path) -> None:
    settings = tiny_hparams(tmp_path).to_dict()
    whole = Processes(2, edit_long, tmp_path / "whole", settings)
    assert whole.wait() == [0, 0]
    cut = Processes(2, edit_long, tmp_path / "cut", settings)
    wait_for_lines(tmp_path / "cut" / "run" / "edits.jsonl", 4)
    cut.kill(killed)
    began = time.monotonic()
    statuses = cut.wait(60)
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] == 7, f"after {time.monotonic() - began:.0f} s"
    assert "lost its connection to another" in (tmp_path / "cut" / f"stderr-{1 - killed}").read_text()
    assert not (tmp_path / "cut" / "run" / "summary.json").exists()
    assert Processes(2, edit_long, tmp_path / "cut", settings).wait() == [0, 0]
    summaries = [json.loads((tmp_path / name / "run" / "summary.json").read_text()) for name in ("whole", "cut")]
    assert summaries[0]["weights_sha256"] == summaries[1]["weights_sha256"]
    assert summaries[0]["post"] == summaries[1]["post"]


def launched(folder: Path) -> subprocess.Popen[str]:
    """The command line by two processes of accelerate's launcher; without a GPU it is gloo that they talk by."""
    settings = tiny_hparams(folder, model_name=str(GOLDEN / "llama" / "tiny-llama")).to_dict()
    (folder / "hparams.yaml").write_text(yaml.safe_dump(settings))
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines",
         "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "sphere_easyedit", "edit", "--hparams",
         str(folder / "hparams.yaml"), "--dataset", "demo", "--num-edits", "30", "--batch-size", "3", "--output",
         str(folder / "run"), "--no-eval-before"],
        env={**os.environ, **ENVIRONMENT}, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_under_accelerates_launcher_a_killed_process_ends_the_run(tmp_path: Path) -> None:
    launcher = launched(tmp_path)
    wait_for_lines(tmp_path / "run" / "edits.jsonl", 2)
    workers = [int(pid) for pid in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()]
    follower = next(pid for pid in workers if b"\0RANK=1\0" in b"\0" + Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(follower, signal.SIGKILL)
    told, _ = launcher.communicate(timeout=60)
    assert launcher.returncode != 0
    assert "an unfinished batch was undone" in told, told
