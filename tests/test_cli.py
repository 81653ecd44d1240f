"""The command line as a user runs it: in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import GOLDEN, tiny_config, tiny_hparams, tiny_model

from sphere_easyedit.hparams import SPHEREHyperParams

REPOSITORY = Path(__file__).parents[1]


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120",
                   "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run([sys.executable, "-m", "sphere_easyedit", *arguments], cwd=cwd, env=environment, text=True,
                          capture_output=True, timeout=300, check=False)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer and a hyperparameter file."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(folder / "tiny-llama")
    for file in (GOLDEN / "llama" / "tiny-llama").glob("tokenizer*"):
        (folder / "tiny-llama" / file.name).write_bytes(file.read_bytes())
    settings = tiny_hparams(folder, model_name="tiny-llama").to_dict() | {"stats_dir": "stats"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_edit_runs_end_to_end(workplace: Path) -> None:
    done = run_cli("edit", "--hparams", "tiny.yaml", "--num-edits", "4", "--batch-size", "2", "--seed", "1", "--output",
                   "run", "--set", "v_num_grad_steps=6", "--set", "alpha=0.25", cwd=workplace)
    assert done.returncode == 0, done.stderr
    summary = json.loads((workplace / "run" / "summary.json").read_text())
    assert summary["num_edits"] == 4
    assert f"{summary['post']['efficacy']['mean']:.1f}" in done.stdout
    for word in ("efficacy", "generalization", "specificity", "s an edit", "Hyperspherical energy", "before:",
                 "after:"):
        assert word in done.stdout
    config = yaml.safe_load((workplace / "run" / "config.yaml").read_text())
    assert config["hparams"]["v_num_grad_steps"] == 6
    assert config["hparams"]["alpha"] == 0.25
    assert config["run"]["seed"] == 1


def test_a_run_is_measured_again(workplace: Path) -> None:
    done = run_cli("edit", "--hparams", "tiny.yaml", "--num-edits", "4", "--batch-size", "2", "--output", "again",
                   "--set", "v_num_grad_steps=2", "--no-eval-before", "--eval-every", "2", "--keep-weights-every", "2",
                   cwd=workplace)
    assert done.returncode == 0, done.stderr
    done = run_cli("evaluate", "again", "--at", "2", "--at", "0", "--protocol", "rome", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "0 edits, before, rome: efficacy" in done.stdout
    assert "2 edits, during, rome: efficacy" in done.stdout
    lines = [json.loads(line) for line in (workplace / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["num_edits"], line["protocol"]) for line in lines] == [
        (2, "paper"), (4, "paper"), (0, "rome"), (2, "rome")]
    done = run_cli("evaluate", "again", "--at", "3", cwd=workplace)
    assert done.returncode == 2
    assert "kept are 2, 4" in done.stderr


def test_users_own_facts_and_a_resumed_run(workplace: Path) -> None:
    (workplace / "mine.csv").write_text("prompt,subject,target_new\nThe capital of {} is,France,Rome\n"
                                        "The mayor of {} is,Bonn,Ann\n")
    arguments = ("edit", "--hparams", "tiny.yaml", "--dataset", "facts", "--data", "mine.csv", "--batch-size", "1",
                 "--set", "v_num_grad_steps=2", "--output", "mine", "--resume")
    done = run_cli(*arguments, cwd=workplace)
    assert done.returncode == 0, done.stderr
    summary = (workplace / "mine" / "summary.json").read_text()
    done = run_cli(*arguments, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stderr
    assert (workplace / "mine" / "summary.json").read_text() == summary
    done = run_cli(*arguments, "--batch-size", "2", cwd=workplace)
    assert done.returncode == 2
    assert "batch_size was 1 and is 2" in done.stderr


def test_a_sweep_end_to_end(workplace: Path) -> None:
    (workplace / "sweep.yaml").write_text(yaml.safe_dump({
        "runs": [{"name": f"AlphaEdit-{name}", "method": "AlphaEdit", "hparams": "tiny.yaml", "sphere": name != "plain"}
                 for name in ("plain", "sphere")],
        "num_edits": 4, "batch_size": 2, "set": {"v_num_grad_steps": 2}, "edit": {"share-before": "shared"}}))
    done = run_cli("sweep", "sweep.yaml", "--output", "swept", cwd=workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2/2 AlphaEdit-sphere-seed0: finished" in done.stdout
    table = (workplace / "swept" / "table.csv").read_text()
    assert "AlphaEdit-sphere-seed0" in table
    assert (workplace / "swept" / "differences.csv").read_text().count("\n") > 1
    assert len(list((workplace / "shared").iterdir())) == 1
    done = run_cli("sweep", "sweep.yaml", "--output", "swept", cwd=workplace)
    assert "AlphaEdit-plain-seed0: present" in done.stdout
    assert (workplace / "swept" / "table.csv").read_text() == table


def test_edit_on_zsre_file(workplace: Path, data_dir: Path) -> None:
    file = str(data_dir / "zsre_mend_eval.json")
    done = run_cli("edit", "--hparams", "tiny.yaml", "--dataset", "zsre", "--data", file, "--num-edits", "2",
                   "--batch-size", "2", "--output", "zsre", "--set", "base_alg=MEMIT", "--set",
                   "projection_stage=update", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert json.loads((workplace / "zsre" / "summary.json").read_text())["post"]["specificity"]["n"] == 2


@pytest.mark.parametrize(("arguments", "message"), [
    (["--hparams", "tiny.yaml", "--dataset", "counterfact", "--data", "absent.json"], "absent.json"),
    (["--hparams", "AlphaEdit/smollm2-135n"], "AlphaEdit/smollm2-135m"),
    (["--hparams", "tiny.yaml", "--set", "alpha=1.5"], "alpha"),
    (["--hparams", "tiny.yaml", "--set", "gama=0.5"], "gamma"),
    (["--hparams", "tiny.yaml", "--set", "alpha"], "NAME=VALUE"),
    (["--hparams", "tiny.yaml", "--num-edits", "100000"], "100000"),
    (["--hparams", "tiny.yaml", "--set", "model_name=no/such-model"], "no/such-model"),
    (["--hparams", "tiny.yaml", "--dtype", "fp16"], "bfloat16"),
    (["--hparams", "tiny.yaml", "--set", "layers=[3, 9]", "--set", "v_loss_layer=9"], "4 layers"),
])
def test_a_mistake_ends_in_one_clear_line(workplace: Path, arguments: list[str], message: str) -> None:
    done = run_cli("edit", *arguments, "--output", "mistake", cwd=workplace)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert not (workplace / "mistake" / "summary.json").exists()


def test_no_arguments_show_help(workplace: Path) -> None:
    done = run_cli(cwd=workplace)
    assert "edit" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_hparams_writes_a_yaml_that_loads(workplace: Path) -> None:
    tiny_config("qwen2").save_pretrained(workplace / "tiny-qwen")
    done = run_cli("hparams", "tiny-qwen", "--output", "qwen.yaml", cwd=workplace)
    assert done.returncode == 0, done.stderr
    loaded = SPHEREHyperParams.from_hparams(str(workplace / "qwen.yaml"))
    assert loaded.base_alg == "AlphaEdit"
    assert loaded.v_loss_layer == 3
    printed = run_cli("hparams", "tiny-qwen", cwd=workplace)
    assert yaml.safe_load(printed.stdout) == yaml.safe_load((workplace / "qwen.yaml").read_text())


def test_stats_are_collected_once(workplace: Path) -> None:
    arguments = ("stats", "--hparams", "tiny.yaml", "--set", "stats_dir=more", "--set", "mom2_n_samples=5")
    done = run_cli(*arguments, cwd=workplace)
    assert done.returncode == 0, done.stderr
    files = [workplace / line for line in done.stdout.split()]
    assert len(files) == 2
    written = [file.stat().st_mtime_ns for file in files]
    assert run_cli(*arguments, cwd=workplace).returncode == 0
    assert [file.stat().st_mtime_ns for file in files] == written
