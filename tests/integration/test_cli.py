"""The command line as a user runs it: in a process of its own, or forked or called, where only the time differs."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
import typer
import yaml
from typer.testing import CliRunner

from helpers.architectures import architecture_config
from helpers.command_line import workplace  # noqa: F401 - a fixture
from helpers.doc_blocks import PAGES
from helpers.models import tiny_config
from helpers.paths import REPOSITORY
from helpers.processes import ENVIRONMENT, call_cli, run_forked
from sphere_easyedit.cli import app as app_module
from sphere_easyedit.cli import main
from sphere_easyedit.hparams import SPHEREHyperParams

COMMAND = [sys.executable, "-m", "sphere_easyedit"]
COMMANDS = typer.main.get_group(app_module.app).commands
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def run_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], cwd=cwd, env={**os.environ, **ENVIRONMENT}, text=True,
                          capture_output=True, timeout=300, check=False)


def edit(workplace: Path, output: str, *more: str) -> subprocess.CompletedProcess[str]:
    """An ``edit`` of four facts in two batches, unless told otherwise, that has to succeed."""
    done = call_cli("edit", "--hparams", "tiny.yaml", "--num-edits", "4", "--batch-size", "2", "--output", output,
                    *more, cwd=workplace)
    assert done.returncode == 0, done.stderr
    return done


def run_cli_in_terminal(*arguments: str, cwd: Path) -> tuple[int, str]:
    """Exit status, and standard error as a terminal gets it."""
    ours, theirs = pty.openpty()
    with subprocess.Popen([*COMMAND, *arguments], cwd=cwd, env={**os.environ, **ENVIRONMENT, "TERM": "xterm"},
                          stdin=theirs, stdout=subprocess.DEVNULL, stderr=theirs) as process:
        os.close(theirs)
        read = b""
        try:
            while chunk := os.read(ours, 65536):
                read += chunk
        except OSError:  # how Linux says that the other end was closed
            pass
        os.close(ours)
    return process.returncode, read.decode()


def test_edit_runs_end_to_end(workplace: Path) -> None:
    done = run_cli("edit", "--hparams", "tiny.yaml", "--num-edits", "4", "--batch-size", "2", "--seed", "1", "--output",
                   "run", "--set", "v_num_grad_steps=6", "--set", "alpha=0.25", cwd=workplace)
    assert done.returncode == 0, done.stderr
    summary = json.loads((workplace / "run" / "summary.json").read_text())
    assert summary["num_edits"] == 4
    assert f"{summary['post']['efficacy']['mean']:.1f}" in done.stdout
    first = json.loads((workplace / "run" / "cases.jsonl").read_text().splitlines()[0])
    for word in ("efficacy", "generalization", "specificity", "s an edit", "Hyperspherical energy", "before:",
                 "after:", f"case {first['case_id']}: {first['prompt']}", "alpha 0.25: the share",
                 "Next: sphere-easyedit chat run, sphere-easyedit report run"):
        assert word in done.stdout
    assert not CONTROL.search(done.stderr), done.stderr
    assert re.search(r"^2/4 edits, \d+\.\d\d s an edit, \d+ s left, HE [+-]\d\.\de[+-]\d\d", done.stderr, re.MULTILINE)
    assert [line.split(",")[0] for line in done.stderr.splitlines() if re.match(r"\d+/\d+ edits", line)] == [
        "2/4 edits", "4/4 edits"]
    assert f"4 edits, after, paper: efficacy {summary['post']['efficacy']['mean']:.1f}" in done.stderr
    config = yaml.safe_load((workplace / "run" / "config.yaml").read_text())
    assert config["hparams"]["v_num_grad_steps"] == 6
    assert config["hparams"]["alpha"] == 0.25
    assert config["run"]["seed"] == 1


def test_a_run_is_measured_again(workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(workplace, "again", "--set", "v_num_grad_steps=2", "--no-eval-before", "--eval-every", "2",
         "--keep-weights-every", "2", "--guard", "lower")
    assert "--guard has nothing to act on: its first 5 batches" in caplog.text
    done = call_cli("evaluate", "again", "--at", "2", "--at", "0", "--protocol", "rome", "--quiet", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "0 edits, before, rome: efficacy" in done.stdout
    assert "2 edits, during, rome: efficacy" in done.stdout
    lines = [json.loads(line) for line in (workplace / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["num_edits"], line["protocol"]) for line in lines] == [
        (2, "paper"), (4, "paper"), (0, "rome"), (2, "rome")]
    for mistake, message in ((("--at", "3"), "kept are 2, 4"), (("--no-facts",), "nothing to measure")):
        done = call_cli("evaluate", "again", *mistake, cwd=workplace)
        assert done.returncode == 2
        assert message in done.stderr


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory.\nTried 2 GiB"),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_is_told_in_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(app_module, "app", mock.Mock(side_effect=error))
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert said.startswith(f"error: out of memory ({' '.join(str(error).split())})") and said.count("\n") == 1
    assert "--on-error skip" in said


def test_errors_of_the_program_are_not_taken_for_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_module, "app", mock.Mock(side_effect=RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):
        main()


def test_a_terminal_has_one_live_line(workplace: Path) -> None:
    status, said = run_cli_in_terminal("edit", "--hparams", "tiny.yaml", "--num-edits", "4", "--batch-size", "2",
                                       "--output", "terminal", "--set", "v_num_grad_steps=4", cwd=workplace)
    assert status == 0, said
    assert "\x1b[" in said
    assert re.search(r"4/4 edits, .*s an edit, .*HE [+-]", said)
    assert "measuring before" in said
    # Below the log messages nothing is left of it but one line.
    lines = [line for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said).split("\n") if "edits" in line]
    assert len(lines) == 1
    assert "4/4 edits" in lines[0].rsplit("\r", maxsplit=1)[-1] + lines[0]


def test_quiet_says_the_result_alone_and_trackers_keep_quiet(workplace: Path) -> None:
    tracker = ("--tracker", "tensorboard") if importlib.util.find_spec("tensorboard") else ()
    done = run_cli("edit", "--hparams", "tiny.yaml", "--num-edits", "4", "--batch-size", "2", "--output", "quiet",
                   "--set", "v_num_grad_steps=4", "--set", "stats_dir=quiet-stats", "--quiet", *tracker, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "metric (%)" in done.stdout
    assert "Run directory: quiet" in done.stdout
    if tracker:
        assert list((workplace / "quiet" / "trackers" / "sphere-easyedit").glob("events*"))


def test_show_puts_three_models_side_by_side(workplace: Path) -> None:
    edit(workplace, "shown", "--num-edits", "2", "--batch-size", "1", "--set", "v_num_grad_steps=4",
         "--keep-weights-every", "1", "--no-eval-before")
    case = json.loads((workplace / "shown" / "cases.jsonl").read_text().splitlines()[1])
    done = call_cli("show", "shown", "--case", str(case["case_id"]), "--max-new-tokens", "4", cwd=workplace)
    assert done.returncode == 0, done.stderr
    for words in ("unedited", "edited", "rolled back", "paraphrase", "neighborhood", "generation",
                  "Edit 2 of 2; the edited model holds the first 2", f"New target: {case['target_new']}",
                  "Scores after the run (%): efficacy", "The original weights are back, bit for bit."):
        assert words in done.stdout
    done = call_cli("show", "shown", "--case", str(case["case_id"]), "--at", "1", "--max-new-tokens", "4", "--json",
                   cwd=workplace)
    assert done.returncode == 0, done.stderr
    study = json.loads(done.stdout)
    assert (study["number"], study["num_edits"], study["is_edited"], study["restored"]) == (2, 1, False, True)
    assert study["continuations"][0]["prompt"] == case["prompt"]
    done = call_cli("show", "shown", "--case", "123456", cwd=workplace)
    assert done.returncode == 2
    assert "no case 123456: nearest are" in done.stderr


def test_users_own_facts_and_a_resumed_run(workplace: Path) -> None:
    (workplace / "mine.csv").write_text("prompt,subject,target_new\nThe capital of {} is,France,Rome\n"
                                        "The mayor of {} is,Bonn,Ann\n")
    arguments = ("edit", "--hparams", "tiny.yaml", "--dataset", "facts", "--data", "mine.csv", "--batch-size", "1",
                 "--set", "v_num_grad_steps=2", "--output", "mine", "--resume")
    done = run_forked(*arguments, cwd=workplace)
    assert done.returncode == 0, done.stderr
    summary = (workplace / "mine" / "summary.json").read_text()
    done = run_forked(*arguments, cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stderr
    assert (workplace / "mine" / "summary.json").read_text() == summary
    done = run_forked(*arguments, "--batch-size", "2", cwd=workplace)
    assert done.returncode == 2
    assert "batch_size was 1 and is 2" in done.stderr


def test_a_sweep_end_to_end(workplace: Path) -> None:
    (workplace / "sweep.yaml").write_text(yaml.safe_dump({
        "runs": [{"name": f"AlphaEdit-{name}", "method": "AlphaEdit", "hparams": "tiny.yaml", "sphere": name != "plain"}
                 for name in ("plain", "sphere")],
        "num_edits": 4, "batch_size": 2, "set": {"v_num_grad_steps": 2}, "edit": {"share-before": "shared"}}))
    done = run_forked("sweep", "sweep.yaml", "--output", "swept", cwd=workplace)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2/2 AlphaEdit-sphere-seed0: finished" in done.stdout
    table = (workplace / "swept" / "table.csv").read_text()
    assert "AlphaEdit-sphere-seed0" in table
    assert (workplace / "swept" / "differences.csv").read_text().count("\n") > 1
    assert len(list((workplace / "shared").iterdir())) == 1
    done = call_cli("sweep", "sweep.yaml", "--output", "swept", cwd=workplace)
    assert "AlphaEdit-plain-seed0: present" in done.stdout
    done = run_forked("sweep", "sweep.yaml", "--output", "swept", "--quiet", cwd=workplace)
    assert "present" not in done.stdout
    assert "table.csv" in done.stdout
    assert done.stderr == ""
    assert (workplace / "swept" / "table.csv").read_text() == table


def test_edit_on_zsre_file(workplace: Path, data_dir: Path) -> None:
    file = str(data_dir / "zsre_mend_eval.json")
    done = run_forked("edit", "--hparams", "tiny.yaml", "--dataset", "zsre", "--data", file, "--num-edits", "2",
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
    (["--hparams", "tiny.yaml", "--tracker", "tensorbord"], "tensorboard"),
    (["--hparams", "tiny.yaml", "--quiet", "--verbose"], "give one"),
    (["--hparams", "tiny.yaml", "--set", "layers=[3, 9]", "--set", "v_loss_layer=9"], "4 layers"),
])
def test_a_mistake_ends_in_one_clear_line(workplace: Path, arguments: list[str], message: str) -> None:
    done = call_cli("edit", *arguments, "--output", "mistake", cwd=workplace)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert message in done.stderr
    assert not (workplace / "mistake" / "summary.json").exists()


def test_no_arguments_show_help(workplace: Path) -> None:
    done = run_cli(cwd=workplace)
    assert "edit" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_line_starts_without_torch() -> None:
    code = "import sys; import sphere_easyedit.cli.app; sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, **ENVIRONMENT}, check=False).returncode == 0


def test_every_option_is_described_once() -> None:
    """In a sentence, and in the same one wherever commands share the option; in edit under one of seven headings."""
    described: dict[str, dict[str, str]] = {}
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert re.fullmatch(r"[A-Za-z].*\.", parameter.help, re.DOTALL), (name, parameter.name)
                described.setdefault(name, {})[parameter.name] = parameter.help
    assert {parameter.rich_help_panel for parameter in COMMANDS["edit"].params} == {
        "Data", "Method", "Evaluation", "Checkpoints", "Repair", "Guard", "Output"}
    shared = described["edit"].keys() & described["evaluate"].keys()
    assert len(shared) > 15
    assert all(described["edit"][name] == described["evaluate"][name] for name in shared)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_documented_command_lines_have_options_that_exist(page: Path) -> None:
    """Those within sentences; code blocks are run by test_docs_blocks.py."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, arguments in re.findall(rf"sphere[-_]easyedit ({'|'.join(COMMANDS)})\b([^\n`#]*)", text):
        known = {flag for one in COMMANDS[name].params for flag in (*one.opts, *one.secondary_opts)}
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", arguments)) <= known, (name, arguments)


def test_shells_complete_options_and_their_values() -> None:
    for words, expected in (("edit --guard-", "--guard-warmup"), ("export run --as del", "deltas")):
        done = CliRunner().invoke(app_module.app, prog_name="sphere-easyedit", env={
            "_SPHERE_EASYEDIT_COMPLETE": "complete_bash", "COMP_WORDS": f"sphere-easyedit {words}",
            "COMP_CWORD": str(len(words.split()))})
        assert expected in done.output.split()


def test_hparams_writes_a_yaml_that_loads(workplace: Path) -> None:
    tiny_config("qwen2").save_pretrained(workplace / "tiny-qwen")
    done = run_forked("hparams", "tiny-qwen", "--output", "qwen.yaml", cwd=workplace)
    assert done.returncode == 0, done.stderr
    loaded = SPHEREHyperParams.from_hparams(str(workplace / "qwen.yaml"))
    assert loaded.base_alg == "AlphaEdit"
    assert loaded.v_loss_layer == 3
    printed = call_cli("hparams", "tiny-qwen", cwd=workplace)
    assert yaml.safe_load(printed.stdout) == yaml.safe_load((workplace / "qwen.yaml").read_text())


def test_hparams_needs_no_more_than_a_config(workplace: Path) -> None:
    """Of any decoder; where experts are in the way, the file says which layers it chose and why."""
    architecture_config("qwen3_moe:dense_first", num_hidden_layers=16).save_pretrained(workplace / "tiny-moe")
    done = call_cli("hparams", "tiny-moe", "--base-alg", "MEMIT", cwd=workplace)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout)["layers"] == [2]
    assert "# layers [2] in place of [2, 3, 4]" in done.stdout
    assert "layers [3, 4] have routed experts" in done.stdout.replace("\n# ", " ")


@pytest.mark.parametrize(("label", "message"), [
    ("mixtral", "have routed experts"), ("mamba", "have no MLP"), ("t5", "'t5' is an encoder-decoder")])
def test_hparams_of_a_model_that_can_not_be_edited_is_one_line(label: str, message: str, workplace: Path) -> None:
    (workplace / label).mkdir()
    if label == "t5":
        (workplace / label / "config.json").write_text('{"model_type": "t5"}')
    else:
        architecture_config(label).save_pretrained(workplace / label)
    done = call_cli("hparams", label, cwd=workplace)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_stats_are_collected_once(workplace: Path) -> None:
    arguments = ("stats", "--hparams", "tiny.yaml", "--set", "stats_dir=more", "--set", "mom2_n_samples=5")
    done = run_forked(*arguments, cwd=workplace)
    assert done.returncode == 0, done.stderr
    files = [workplace / line for line in done.stdout.split()]
    assert len(files) == 2
    written = [file.stat().st_mtime_ns for file in files]
    assert run_forked(*arguments, cwd=workplace).returncode == 0
    assert [file.stat().st_mtime_ns for file in files] == written
