"""A sweep's runs as submitit's jobs, for a SLURM of which only the commands are there.

submitit is the real one; ``sbatch`` keeps what it is given, and tests start that as SLURM would.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.models import save_tiny_model, tiny_hparams
from helpers.processes import call_cli
from helpers.sweeps import PROGRAM, calls, is_alive, run_named, sweep_of, wait_for
from sphere_easyedit.runs.sweep import load_sweep, parse_slurm, submit_sweep
from sphere_easyedit.runs.sweep.slurm import check_slurm

submitit = pytest.importorskip("submitit", reason="needs submitit: pip install 'sphere-easyedit[cluster]'")

SLURM = {
    "sbatch": '''number=$(($(ls {bin}/*.sh 2>/dev/null | wc -l) + 100))
[ -e {bin}/refuse ] && {{ echo "Invalid partition" >&2; exit 1; }}
cp "$1" {bin}/$number.sh; echo "Submitted batch job $number"''',
    "srun": 'shift 3; exec "$@"',  # --unbuffered --output FILE
    "sacct": "cat {bin}/states 2>/dev/null || exit 1",
    "scontrol": 'echo "$@" >> {bin}/scontrol.log',
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    file = tmp_path_factory.mktemp("program") / "program.py"
    file.write_text(PROGRAM)
    return sys.executable, str(file)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on PATH with SLURM's commands; NUMBER.sh is what the job of that number was submitted with."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in SLURM.items():
        (folder / name).write_text("#!/bin/bash\n" + text.format(bin=folder) + "\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    submitit.SlurmJob.watcher.clear()
    return folder


def options(script: Path) -> dict[str, str]:
    """What a script asks of SLURM."""
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", script.read_text(), re.MULTILINE)
    return {name: value.strip("'\"") for name, value in found}


def start_job(slurm: Path, job: str, **more: str) -> subprocess.Popen[bytes]:
    """Start a submitted job as SLURM would."""
    number, _, task = job.partition("_")
    own = {"SLURM_JOB_ID": str(int(number) * 10 + int(task or 0)), "SLURM_JOB_NUM_NODES": "1"}
    if task:
        own |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": task}
    return subprocess.Popen(["bash", str(slurm / f"{number}.sh")], env={**os.environ, **own, **more},
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def say(slurm: Path, **states: str) -> None:
    """Have sacct answer with these states, by job, ``_`` in front."""
    lines = [f"{job.removeprefix('_')}|{state}|node1" for job, state in states.items()]
    (slurm / "states").write_text("\n".join(["JobID|State|NodeList", *lines]) + "\n")
    submitit.SlurmJob.watcher.clear()


def test_runs_are_an_array(tmp_path: Path, program: tuple[str, str], slurm: Path) -> None:
    out = tmp_path / "my sweep"
    runs = [run_named("memit"), run_named("other")]
    settings = check_slurm({"partition": "gpu", "time": 1470, "gpus-per-node": 1, "cpus_per_task": 8,
                            "mem": "64GB", "array_parallelism": 1, "signal_delay_s": 45, "setup": "module load cuda",
                            "additional_parameters": {"reservation": "mine"}, "max_num_timeout": 7}, "slurm")
    submitted = submit_sweep(sweep_of(*runs), out, settings, program)
    assert [(one.name, one.status, one.job) for one in submitted] == [
        ("memit-seed0", "submitted", "100_0"), ("other-seed0", "submitted", "100_1")]
    expected = {"partition": "gpu", "time": "1470", "gpus-per-node": "1", "cpus-per-task": "8", "mem": "64GB",
                "array": "0-1%1", "signal": "USR2@45", "job-name": "sphere-my sweep", "reservation": "mine"}
    assert expected.items() <= options(slurm / "100.sh").items()
    assert "\nmodule load cuda\n" in (slurm / "100.sh").read_text()
    for folder in (out / "submitit").iterdir():
        assert folder.stat().st_mode & 0o777 == 0o700
    (out / "memit-seed0").mkdir()
    (out / "memit-seed0" / "summary.json").write_text('{"num_edits": 4}')
    say(slurm, _100_0="COMPLETED", _100_1="FAILED")
    again = submit_sweep(sweep_of(*runs), out, settings, program)
    assert [(one.status, one.job) for one in again] == [("present", None), ("submitted", "101")]


def test_a_job_is_the_local_command(tmp_path: Path, program: tuple[str, str], slurm: Path,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    runs = [run_named("a"), run_named("b", "fail")]
    sweep = replace(sweep_of(*runs), slurm={"cpus_per_task": 3})
    submitted = submit_sweep(sweep, "out", None, program)
    assert options(slurm / "100.sh")["time"] == "1440"
    monkeypatch.chdir("/")  # a job begins where it was submitted
    codes = [start_job(slurm, str(one.job), SLURM_CPUS_PER_TASK="3").wait() for one in submitted]
    assert codes[0] == 0
    assert codes[1] != 0  # which is what `afterok` goes by
    monkeypatch.chdir(tmp_path)
    assert [call["arguments"] for call in calls(tmp_path / "out")] == [run.arguments(Path("out") / run.name)
                                                                      for run in runs]
    assert {call["threads"] for call in calls(tmp_path / "out")} == {"3"}
    assert (tmp_path / "out" / "a-seed0" / "summary.json").exists()
    assert "the reason" in (tmp_path / "out" / "b-seed0.log").read_text()


def test_what_is_under_way_is_not_submitted_again(tmp_path: Path, program: tuple[str, str], slurm: Path,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    runs = [run_named("memit"), run_named("a"), run_named("b")]
    submit_sweep(sweep_of(*runs), tmp_path, {}, program)
    assert submit_sweep(sweep_of(*runs), tmp_path, {}, program)[0].status == "under way"
    assert "sacct does not list job 100_0 of memit-seed0" in caplog.text
    caplog.clear()
    say(slurm, _100_0="RUNNING", _100_1="FAILED", _100_2="PENDING")
    grown = sweep_of(*runs, run_named("prune"))
    submitted = submit_sweep(grown, tmp_path, {}, program)
    assert [(one.status, one.job) for one in submitted] == [
        ("under way", "100_0"), ("submitted", "101_0"), ("under way", "100_2"), ("submitted", "101_1")]
    assert caplog.text == ""


def test_a_preempted_job_is_queued_again_and_goes_on(tmp_path: Path, program: tuple[str, str], slurm: Path) -> None:
    submitted = submit_sweep(sweep_of(run_named("a", "hang-once"), run_named("b")), tmp_path, {}, program)
    job = start_job(slurm, "100_0")
    wait_for(lambda: (tmp_path / "a-seed0" / "hung").exists())
    (call,) = calls(tmp_path)
    os.kill(call["pid"], signal.SIGTERM)  # SLURM asks all processes of a job, in this order
    os.killpg(job.pid, signal.SIGTERM)
    assert is_alive(call["pid"])
    os.kill(call["pid"], signal.SIGUSR2)
    os.killpg(job.pid, signal.SIGUSR2)  # ends bash, too, which SLURM would not ask
    wait_for(lambda: (slurm / "scontrol.log").exists())
    assert (slurm / "scontrol.log").read_text() == "requeue 100_0\n"
    wait_for(lambda: not is_alive(call["pid"]))
    job.wait()
    assert "KeyboardInterrupt" in (tmp_path / "a-seed0.log").read_text()  # it was asked to undo its batch
    say(slurm, _100_0="REQUEUED", _100_1="PENDING")
    assert [one.status for one in submit_sweep(sweep_of(run_named("a", "hang-once"), run_named("b")), tmp_path, {},
                                               program)] == ["under way"] * 2
    assert start_job(slurm, str(submitted[0].job)).wait() == 0
    assert (tmp_path / "a-seed0" / "summary.json").exists()


def test_what_slurm_refuses(tmp_path: Path, program: tuple[str, str], slurm: Path, monkeypatch: pytest.MonkeyPatch
                            ) -> None:
    (slurm / "refuse").touch()
    with pytest.raises(ValueError, match="SLURM refused a-seed0(?s:.*)Invalid partition"):
        submit_sweep(sweep_of(run_named("a")), tmp_path, {}, program)
    (slurm / "refuse").unlink()
    with pytest.raises(ValueError, match=r"slurm: Unavailable parameter\(s\): \['partion'\]: give names of sbatch's"):
        submit_sweep(sweep_of(run_named("a")), tmp_path, {"partion": "gpu"}, program)
    assert submit_sweep(sweep_of(run_named("a")), tmp_path, {}, program)[0].status == "submitted"
    jobs = json.loads((tmp_path / "jobs.json").read_text())
    for name, value in (("folder", "../elsewhere"), ("job_id", "100 --all"), ("more", "")):
        (tmp_path / "jobs.json").write_text(json.dumps({"a-seed0": {**jobs["a-seed0"], name: value}}))
        with pytest.raises(ValueError, match="jobs.json is not a list of submitted jobs"):
            submit_sweep(sweep_of(run_named("a")), tmp_path, {}, program)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match="sbatch is not on PATH"):
        submit_sweep(sweep_of(run_named("a")), tmp_path, {}, program)


def test_without_submitit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ValueError, match=r"pip install 'sphere-easyedit\[cluster\]'"):
        submit_sweep(sweep_of(run_named("a")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_settings_of_the_file_and_of_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text('model: smollm2-135m\nmethods: MEMIT\nslurm: {partition: gpu, time: 240}\n')
    assert load_sweep(file).slurm == {"partition": "gpu", "time": 240}
    assert parse_slurm(["mem=64GB", "gpus-per-node=2", "gpus_per_node=1", "exclusive=true", "time=90"]) == {
        "mem": "64GB", "gpus_per_node": 1, "exclusive": True, "time": 90}


@pytest.mark.parametrize(("given", "message"), [
    ({"nodes": 2}, "a run is one process"), ({"time": "8:00:00"}, "time, in minutes, is '8:00:00'"),
    ({"time": 0}, "at least 1"), ({"max_num_timeout": "two"}, "max_num_timeout is 'two'"), ([1], "must be a mapping"),
])
def test_settings_that_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_slurm(given, "slurm")
    with pytest.raises(ValueError, match="has no '='"):
        parse_slurm(["partition"])
    with pytest.raises(ValueError, match="is '8:00:00': give a whole number"):  # which YAML reads as 28800
        parse_slurm(["time=8:00:00"])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its hyperparameter file, and a sweep of two runs."""
    folder = tmp_path_factory.mktemp("cluster")
    save_tiny_model(folder / "tiny-llama", "llama")
    settings = tiny_hparams(folder, model_name="tiny-llama").to_dict() | {"stats_dir": "stats"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    (folder / "sweep.yaml").write_text(yaml.safe_dump({
        "runs": [{"name": f"AlphaEdit-{name}", "method": "AlphaEdit", "hparams": "tiny.yaml", "sphere": name != "plain"}
                 for name in ("plain", "sphere")],
        "num_edits": 4, "batch_size": 2, "set": {"v_num_grad_steps": 2}, "edit": {"eval-before": False, "examples": 0},
        "slurm": {"partition": "gpu", "time": 10}}))
    return folder


def test_slurm_from_the_command_line(workplace: Path, slurm: Path) -> None:
    arguments = ["sweep", "sweep.yaml", "--output", "queued"]
    done = call_cli(*arguments, "--launcher", "slurm", "--slurm", "partition=long", "--slurm", "gpus_per_node=1",
                    cwd=workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1/2 AlphaEdit-plain-seed0: submitted (job 100_0)" in done.stdout
    assert {"partition": "long", "time": "10", "gpus-per-node": "1"}.items() <= options(slurm / "100.sh").items()
    assert "Not finished: AlphaEdit-plain-seed0" in (workplace / "queued" / "table.md").read_text()
    say(slurm, _100_0="FAILED", _100_1="PENDING")
    done = call_cli(*arguments, "--launcher", "slurm", cwd=workplace)
    assert "1/2 AlphaEdit-plain-seed0: submitted (job 101)" in done.stdout
    assert "2/2 AlphaEdit-sphere-seed0: under way (job 100_1)" in done.stdout
    for given, message in ((["--slurm", "mem=1"], "give --launcher slurm"),
                           (["--launcher", "slurm", "--jobs", "2"], "array_parallelism")):
        refused = call_cli(*arguments, *given, cwd=workplace)
        assert refused.returncode == 2
        assert message in refused.stderr
