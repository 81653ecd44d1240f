"""``sphere-easyedit export`` and ``apply`` as a user calls them."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from helpers.models import save_tiny_model, tiny_hparams, tiny_model
from helpers.processes import run_forked
from sphere_easyedit.cli.app import app
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.export import base_fingerprint
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.sequential import RunSettings, run_sequential


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in ``base`` and a run of it in ``run``: two batches of two facts, all weights kept."""
    folder = tmp_path_factory.mktemp("export-cli")
    save_tiny_model(folder / "base", "gpt2")
    model, tok = (auto.from_pretrained(folder / "base") for auto in (AutoModelForCausalLM, AutoTokenizer))
    hparams = tiny_hparams(folder, model_name=str(folder / "base"), v_num_grad_steps=2)
    described = {"dataset": "demo", "data": None, "seed": 0}
    run_sequential(model.eval(), tok, load_records("demo", None, 4, 0), hparams, RunSettings(
        folder / "run", 2, described=described, measure=MeasureSettings(before=False, after=False),
        keep_weights_every=2))
    return folder


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "120"}).invoke(app, [str(one) for one in arguments])


def fingerprint(folder: Path) -> str:
    return base_fingerprint(AutoModelForCausalLM.from_pretrained(folder))


def test_out_and_back(workplace: Path, tmp_path: Path) -> None:
    whole = call("export", workplace / "run", "--output", tmp_path / "whole", "--max-shard-size", "50KB")
    assert whole.exit_code == 0, whole.output
    assert "4 edits exported" in whole.stdout
    assert len(list((tmp_path / "whole").glob("model-*"))) > 1
    exact = call("export", workplace / "run", "--as", "deltas", "--exact", "--output", tmp_path / "exact")
    assert exact.exit_code == 0, exact.output
    applied = call("apply", tmp_path / "exact", "--model", workplace / "base", "--output", tmp_path / "applied")
    assert applied.exit_code == 0, applied.output
    assert "4 edits applied" in applied.stdout
    assert fingerprint(tmp_path / "applied") == fingerprint(tmp_path / "whole") != fingerprint(workplace / "base")


def test_earlier_edits(workplace: Path, tmp_path: Path) -> None:
    for at in (2, 4):
        done = call("export", workplace / "run", "--at", at, "--output", tmp_path / str(at))
        assert done.exit_code == 0, done.output
    assert fingerprint(tmp_path / "2") != fingerprint(tmp_path / "4")
    assert "2 of the run's 4" in (tmp_path / "2" / "README.md").read_text()


@pytest.mark.parametrize("content", ["[]", "null", "3"])
def test_a_summary_that_is_no_object_is_refused_in_words(content: str, workplace: Path, tmp_path: Path) -> None:
    shutil.copytree(workplace / "run", tmp_path / "run")
    (tmp_path / "run" / "summary.json").write_text(content)
    done = call("export", tmp_path / "run", "--output", tmp_path / "out", "--as", "deltas")
    assert isinstance(done.exception, ValueError)
    assert re.search(r"summary.json is .*: it was changed by hand or damaged", str(done.exception))


def test_errors_are_printed_by_layer(workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = call("export", workplace / "run", "--as", "lora", "--rank", 1, "--output", tmp_path / "lora", "--dtype",
                "bfloat16")
    assert done.exit_code == 0, done.output
    assert "so facts may be lost: a rank of the number of edits, 4, holds" in caplog.text
    card = (tmp_path / "lora" / "README.md").read_text()
    for layer in (1, 2):
        line = next(line for line in done.stdout.splitlines() if f"transformer.h.{layer}.mlp.c_proj.weight" in line)
        error = line.split("│")[4].strip()
        assert 1e-3 < float(error) < 1
        assert f"| {error} |" in card
    base = AutoModelForCausalLM.from_pretrained(workplace / "base").eval()
    before = base(torch.tensor([[3, 4, 5]])).logits
    assert not torch.equal(PeftModel.from_pretrained(base, str(tmp_path / "lora"))(torch.tensor([[3, 4, 5]])).logits,
                           before)


def test_low_rank_deltas(workplace: Path, tmp_path: Path) -> None:
    for given in ((), ("--tolerance", "0.5")):
        out = tmp_path / "-".join(["deltas", *given]).replace("--", "")
        done = call("export", workplace / "run", "--as", "deltas", "--output", out, *given)
        assert done.exit_code == 0, done.output
        assert "factors" in done.stdout


@pytest.mark.parametrize(("arguments", "match"), [
    (["--as", "lora"], "--as lora needs --rank"),
    (["--as", "model", "--rank", "4"], "--rank has no effect with --as model"),
    (["--exact"], "--exact has no effect with --as model"),
    (["--as", "lora", "--rank", "4", "--exact"], "--exact has no effect with --as lora"),
    (["--as", "deltas", "--rank", "4"], "--rank has no effect with --as deltas"),
    (["--as", "deltas", "--tolerance", "0.1", "--exact"], "--tolerance and --exact exclude each other"),
    (["--as", "deltas", "--exact", "--dtype", "float16"], "leave dtype out"),
    (["--as", "lora", "--rank", "999"], "rank is 999: give 1 to 48"),
    (["--at", "3"], "no weights after 3 edits: kept are 2, 4"),
    (["--max-shard-size", "huge"], "huge"),
], ids=" ".join)
def test_mistakes(arguments: list[str], match: str, workplace: Path, tmp_path: Path) -> None:
    done = call("export", workplace / "run", "--output", tmp_path / "out", *arguments)
    assert isinstance(done.exception, ValueError), done.output
    assert match in str(done.exception)
    assert not list(tmp_path.iterdir())


def test_words_that_are_none_of_the_choices(workplace: Path, tmp_path: Path) -> None:
    for wrong in (["--as", "gguf"], ["--dtype", "int8"], ["--at", "0"]):
        done = call("export", workplace / "run", "--output", tmp_path / "out", *wrong)
        assert done.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused(workplace: Path, tmp_path: Path) -> None:
    call("export", workplace / "run", "--as", "deltas", "--output", tmp_path / "deltas")
    tiny_model("gpt2", initializer_range=0.1).save_pretrained(tmp_path / "other")
    for file in (workplace / "base").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "other")
    done = call("apply", tmp_path / "deltas", "--model", tmp_path / "other", "--output", tmp_path / "out")
    assert isinstance(done.exception, ValueError)
    for expected in (fingerprint(tmp_path / "other"), fingerprint(workplace / "base")):
        assert expected in str(done.exception)
    done = call("apply", tmp_path / "nothing", "--model", workplace / "base", "--output", tmp_path / "out")
    assert "contains no deltas.safetensors" in str(done.exception)
    assert not (tmp_path / "out").exists()


def test_in_a_process_of_its_own(workplace: Path, tmp_path: Path) -> None:
    done = run_forked("export", workplace / "run", "--as", "deltas", "--output", "deltas", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "relative error" in done.stdout
    done = run_forked("apply", "deltas", "--model", workplace / "base", "--output", "deltas", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: deltas is not empty" in done.stderr
    assert "Traceback" not in done.stderr
