"""Every code block of README.md and docs/ is run, with a tiny model in place of the one that it names.

What can't be run here is in ``NOT_RUN``, with the reason; its words are still parsed by the real command line, or by
the script's own parser, so an option that was renamed fails.
"""

from __future__ import annotations

import argparse
import copy
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import sphere_easyedit as sphere
from conftest import without_easyedit
from helpers.doc_blocks import PAGES, Block, Shell, blocks
from helpers.doc_stand_ins import StandIns, small_settings
from helpers.models import REQUESTS
from helpers.paths import REPOSITORY, TESTS
from helpers.processes import call_cli
from sphere_easyedit.cli.app import app
from sphere_easyedit.easyedit.discovery import load_easyedit
from sphere_easyedit.methods.registry import METHODS
from sphere_easyedit.runs.sweep import load_sweep

COMMANDS: dict[str, Any] = typer.main.get_group(app).commands
# A regular expression that finds the command, and why it is parsed only.
NOT_RUN = {
    r"tuned/best.yaml": "made by `tune`",
    r"^sphere-easyedit sweep ": "starts processes, and takes hours for the study's files; the file is read",
    r" --abilities ": "lm-eval takes seconds a task: tests/integration/test_abilities.py",
    r" --hparams (FT/|ROME)": "needs EasyEdit's checkout: tests/slow/test_easyedit_checkout.py",
    r" --tracker ": "starts a tracker: tests/unit/test_trackers.py",
    r"^sphere-easyedit tune ": "searches for minutes",
    r"^sphere-easyedit chat ": "asks for input",
    r"^(accelerate launch|torchrun) ": "starts several processes: tests/robustness/test_replicas.py",
    r"^python (benchmarks|tests)/": "takes minutes to hours",
    r"^python -c ": "needs Gemma's weights",
    r"^(python -m )?pytest ": "the tests themselves",
    r"^pip ": "installs",
    r"^(git|mkdocs|tensorboard|pip-audit|pip-licenses)\b": "another program; tests/slow/test_site.py builds the site",
    r"^\w+\.sh\b": "makes .venv from package registries",
}
# The first line of a Python block, and why it is compiled only.
NOT_RUN_PYTHON = {
    "from sphere_easyedit.models.distributed import ProcessInfo, Replicas":
        "several processes: tests/robustness/test_replicas.py",
    "from pathlib import Path":
        "the checkpoints of the run whose model it is: tests/integration/test_rollback.py",
}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> StandIns:
    return StandIns(tmp_path_factory.mktemp("stand-ins"))


@pytest.fixture(scope="module")
def done() -> set[str]:
    """Commands that were run, so that none is run twice with the same options."""
    return set()


@pytest.fixture
def shell(stand_ins: StandIns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """A furnished folder; hyperparameter files that are read become those of the tiny model."""
    environment = {"SPHERE_DATA": str(stand_ins.data), "STUDY": str(tmp_path / "study")}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    made = Shell(tmp_path / "here", environment)
    stand_ins.furnish(made.folder)
    monkeypatch.chdir(made.folder)
    read = sphere.SPHEREHyperParams.from_hparams
    monkeypatch.setattr(sphere.SPHEREHyperParams, "from_hparams", staticmethod(small_settings(read, stand_ins)))
    return made


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_blocks_run(page: Path, shell: Shell, stand_ins: StandIns, done: set[str],
                    monkeypatch: pytest.MonkeyPatch) -> None:
    given = blocks(page)
    names: dict[str, Any] = {}
    with _easyedit(any("easyeditor" in block.text for block in given), monkeypatch), _methods_restored():
        for block in given:
            if block.title is not None:
                (shell.folder / block.title).write_text(block.text, encoding="utf-8")
            if block.language == "bash":
                for words in shell.commands(block):
                    _command(words, block, shell.folder, stand_ins, done)
            elif block.language == "python":
                names = names or _names()
                _python(block, names)
            elif block.language == "yaml":
                assert isinstance(yaml.safe_load(block.text), dict), block.where
            elif block.language in ("json", "csv"):
                assert block.title is not None, f"{block.where}: give the file it shows as title"
            else:
                assert block.language in ("text", "math"), f"{block.where}: {block.language}?"


def test_nothing_is_left_out_in_vain(shell: Shell) -> None:
    """Each reason in the tables is of a block that is still there."""
    given = [block for page in PAGES for block in blocks(page)]
    commands = [" ".join(words) for block in given if block.language == "bash" for words in shell.commands(block)]
    assert len(commands) > 80
    assert [pattern for pattern in NOT_RUN if not any(re.search(pattern, words) for words in commands)] == []
    first_lines = {block.text.splitlines()[0].split("  #")[0] for block in given if block.language == "python"}
    assert set(NOT_RUN_PYTHON) - first_lines == set()


def _command(words: list[str], block: Block, folder: Path, stand_ins: StandIns, done: set[str]) -> None:
    """Check a command, and run it if it can be run and was not run before with the same options."""
    line = " ".join(words)
    program, *rest = words
    reason = next((NOT_RUN[pattern] for pattern in NOT_RUN if re.search(pattern, line)), None)
    if program in ("accelerate", "torchrun"):
        assert rest[rest.index("-m") + 1] == "sphere_easyedit", line
        program, rest = "sphere-easyedit", rest[rest.index("-m") + 2:]
    if program == "sphere-easyedit":
        _parse(rest, f"{block.where}: {line}")
        options = re.sub(r" --output \S+", "", line)
        if reason is None and (options not in done or rest[0] not in ("edit", "evaluate")):
            ran = call_cli(*stand_ins.arguments(_completed(rest), folder), cwd=folder)
            assert ran.returncode == 0 or rest[0] == "doctor", f"{block.where}: {line}\n{ran.stderr}"
            done.add(options)
        return
    assert reason is not None, f"{block.where}: nothing is known of {line!r}"
    if program == "python" and rest[0] == "-c":
        compile(rest[1], block.where, "exec")
    elif program == "python" and rest[0].startswith("benchmarks/"):
        _parse_arguments(REPOSITORY / rest[0], rest[1:])
    elif program == "pip":
        _check_extras(line)
    else:
        files = [word.split("::")[0] for word in rest if word.startswith("tests/")]
        assert all((REPOSITORY / file).exists() for file in files), line


def _completed(words: list[str]) -> list[str]:
    """With the options that ``...`` stands for."""
    if "..." in words:
        for option, value in (("--hparams", "AlphaEdit/smollm2-135m"), ("--output", "runs/any")):
            if option not in words:
                words = [*words, option, value]
    return [word for word in words if word != "..."]


def _parse(words: list[str], where: str) -> None:
    """By the real command line, which refuses options and values that it doesn't know."""
    name, *rest = _completed(words)
    assert name in COMMANDS, where
    try:
        COMMANDS[name].make_context(name, list(rest))
    except Exception as error:
        raise AssertionError(f"{where}: {error}") from error
    if name == "sweep":
        load_sweep(rest[0])


class _ParsedError(Exception):
    """The script has parsed its arguments."""


def _parse_arguments(script: Path, words: list[str]) -> None:
    """By the script's own parser, without running it."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_leave(self: argparse.ArgumentParser, *given: Any) -> None:
        parse(self, *given)
        raise _ParsedError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(_ParsedError):
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_leave)
        patch.setattr(sys, "argv", [str(script), *words])
        runpy.run_path(str(script), run_name="__main__")


def _check_extras(line: str) -> None:
    extras = [extra for found in re.findall(r"\[([\w,]+)\]", line) for extra in found.split(",")]
    declared = re.findall(r'^        "(\w+)": \[', (REPOSITORY / "setup.py").read_text(), re.MULTILINE)
    assert set(extras) <= set(declared), line


@contextmanager
def _easyedit(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in for EasyEdit, if a page imports it."""
    if not wanted:
        yield
        return
    monkeypatch.setenv("EASYEDIT_HOME", str(TESTS / "helpers" / "stand_in"))
    with without_easyedit():
        load_easyedit()
        yield


def _python(block: Block, names: dict[str, Any]) -> None:
    code = compile(block.text, block.where, "exec")
    if block.text.splitlines()[0].split("  #")[0] not in NOT_RUN_PYTHON:
        exec(code, names)


@contextmanager
def _methods_restored() -> Iterator[None]:
    """Methods that blocks register are gone afterwards."""
    before = set(METHODS.names)
    try:
        yield
    finally:
        for name in set(METHODS.names) - before:
            sphere.unregister_method(name)


def _names() -> dict[str, Any]:
    """What blocks use without having made it."""
    facts = [{**request, "prompt": request["prompt"].replace("{}", request["subject"])} for request in REQUESTS]
    hparams = sphere.SPHEREHyperParams.from_hparams("AlphaEdit/smollm2-135m")
    model, tok = sphere.load_model(hparams.model_name)
    base = copy.deepcopy(model)
    sphere.apply_sphere_to_model(model, tok, facts[:1], hparams)
    return {"sphere": sphere, "Path": Path, "hparams": hparams, "model": model, "tok": tok,
            "settings": {**hparams.to_dict(), "mom2_update_weight": 20.0},
            "requests": [{**fact, "case_id": 117 + number} for number, fact in enumerate(facts)],
            "prompts": [fact["prompt"] for fact in facts], "subjects": [fact["subject"] for fact in facts],
            "targets": [fact["target_new"] for fact in facts], "base": base}
