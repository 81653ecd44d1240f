"""Help, examples and errors of the command line, which load nothing heavy."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

import pytest
import typer

import sphere_easyedit
from helpers.paths import REPOSITORY
from helpers.processes import ENVIRONMENT, call_cli
from sphere_easyedit.cli import app as app_module
from sphere_easyedit.cli.app import app
from sphere_easyedit.cli.examples import EXAMPLES, FIRST
from sphere_easyedit.hparams_files import find_hparams

COMMANDS = typer.main.get_group(app).commands
VISIBLE = [name for name, command in COMMANDS.items() if not command.hidden]


def test_help_and_errors_of_usage_import_nothing_heavy() -> None:
    code = """
import sys
from sphere_easyedit.cli import main
for arguments, status in (([], 0), (["--help"], 0), (["--version"], 0), (["edit", "--help"], 0), (["edit", "--no"], 2)):
    sys.argv[1:] = arguments
    try:
        main()
    except SystemExit as ended:
        assert (ended.code or 0) == status, (arguments, ended.code)
    assert not {"torch", "transformers", "numpy"} & {*sys.modules}, arguments
"""
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=False,
                          env={**os.environ, **ENVIRONMENT})
    assert done.returncode == 0, done.stderr
    assert f"\nsphere-easyedit {sphere_easyedit.__version__}\n" in done.stdout


def test_without_arguments_it_shows_what_to_begin_with() -> None:
    shown = call_cli(cwd=REPOSITORY).stdout
    assert len(FIRST) == 4
    assert [line.split()[0] for line in shown.splitlines() if re.match(r"[a-z]+ +[A-Z]", line)] == list(FIRST)
    assert all(f"$ {EXAMPLES[name][0]}\n" in shown for name in FIRST)
    assert "sphere-easyedit --help" in shown


def test_every_command_stands_in_a_panel() -> None:
    shown = call_cli("--help", cwd=REPOSITORY).stdout
    assert "─ Commands ─" not in shown  # where typer puts commands without a panel
    assert all(re.search(rf"^│ {name} ", shown, re.MULTILINE) for name in VISIBLE)


@pytest.mark.parametrize("name", VISIBLE)
def test_examples_end_the_help_and_are_understood(name: str) -> None:
    shown = call_cli(name, "--help", cwd=REPOSITORY).stdout
    assert shown.rstrip().endswith("\n".join(["Examples:", *(f"  {example}" for example in EXAMPLES[name])]))
    for example in EXAMPLES[name]:
        program, command, *arguments = shlex.split(example)
        assert (program, command) == ("sphere-easyedit", name)
        params = COMMANDS[name].make_context(name, arguments).params
        grouped = getattr(COMMANDS[name].callback, "__wrapped__", None)
        original: Any = getattr(grouped, "__wrapped__", grouped)
        for hint in get_type_hints(original, include_extras=True).values() if original is not None else ():
            if isinstance(hint, type) and is_dataclass(hint):  # refuses options that do not go together
                hint(**{one.name: params[one.name] for one in fields(hint)})
        if params.get("hparams") is not None:
            find_hparams(params["hparams"])


@pytest.mark.parametrize(("arguments", "remedy"), [
    (("shwo",), "Did you mean 'show'?"),
    (("edit", "--num-edit", "3"), f"Example: {EXAMPLES['edit'][0]}"),
    (("show",), f"Example: {EXAMPLES['show'][0]}"),
    (("plan", "--hparams", "AlphaEdit/smollm2", "--num-edits", "3"), "nearest shipped: AlphaEdit/smollm2-135m. For"),
    (("evaluate", "tests"), "tests has no config.yaml: give the directory of a run, as `edit --output` makes it"),
    (("chat", "nowhere"), "For another model: sphere-easyedit hparams MODEL --output FILE.yaml"),
    (("chat", "nowhere", "--at", "3"), "--at applies to run directories, but 'nowhere' is none: leave it out"),
])
def test_errors_end_with_what_to_type(arguments: tuple[str, ...], remedy: str) -> None:
    done = call_cli(*arguments, cwd=REPOSITORY)
    assert done.returncode == 2
    assert remedy in done.stderr


@pytest.mark.parametrize("command", ["edit", "tune"])
def test_only_edit_is_continued_by_its_resume(command: str, monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(app_module, "app", interrupted)
    monkeypatch.setattr("sys.argv", ["sphere-easyedit", command])
    with pytest.raises(SystemExit) as ended:
        app_module.main()
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert "ended by SIGINT" in said
    assert ("edit --resume" in said) is (command == "edit")
