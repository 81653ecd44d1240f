"""``app`` with all commands, and ``main``, which runs it and prints errors as one line."""

from __future__ import annotations

import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from .. import __version__
from ..utils.signals import Interrupted, ProcessLost, raise_on_interrupts
from .chat import chat
from .doctor import doctor
from .edit import edit
from .evaluate import evaluate
from .examples import EXAMPLES, FIRST, CommandWithExamples, print_lines
from .export import apply, export
from .hparams import hparams
from .plan import plan
from .remove import remove
from .report import report
from .show import show
from .stats import stats
from .sweep import sweep
from .tune import tune

app = typer.Typer(invoke_without_command=True, pretty_exceptions_enable=False, epilog=
                  "Options and examples of a command: sphere-easyedit COMMAND --help")
for _panel, _commands in {
    "Edit facts": (edit, sweep),
    "Look at a run": (report, chat, show, evaluate),
    "Use the edited model": (export, apply, remove),
    "Prepare": (hparams, tune, stats, plan, doctor),
}.items():
    for _command in _commands:
        app.command(cls=CommandWithExamples, rich_help_panel=_panel)(_command)
app.command("withdraw", hidden=True, deprecated=True)(remove)  # its former name


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sphere-easyedit {__version__}")
        raise typer.Exit


@app.callback()
def start(context: typer.Context, version: Annotated[bool, typer.Option(
        "--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False) -> None:
    """Edit facts into language models with SPHERE (arXiv 2510.01172)."""
    if context.invoked_subcommand is not None:
        return
    commands: Any = context.command
    lines = [f"sphere-easyedit {__version__}: edit facts into language models. Begin with:", ""]
    for name in FIRST:
        lines += [f"{name:<9}{commands.commands[name].get_short_help_str(100)}", f"{'':<9}$ {EXAMPLES[name][0]}", ""]
    print_lines([*lines, "All commands:           sphere-easyedit --help",
                 "Options and examples:   sphere-easyedit edit --help",
                 "What is installed:      sphere-easyedit doctor"])


def main() -> None:
    """Run the command line; a failure ends with one line on standard error.

    Exit status: 2 for bad input, 128+n for signal n, 1 for a lost process or too little memory.
    """
    try:
        with raise_on_interrupts():
            try:
                app()
            except SystemExit as ended:
                _print_example(ended.code)
                raise
            except ProcessLost as error:  # reported here, since a launcher then sends SIGTERM to the other processes
                _end(f"error: {error}; an unfinished batch was undone. `edit --resume` continues a run.", 1)
    except Interrupted as interrupted:
        # Other commands have nothing to continue, or have said how.
        resume = "; an unfinished batch was undone. `edit --resume` continues a run." if _command_is("edit") else ""
        _end(f"ended by {interrupted.name}{resume}", interrupted.exit_status, "yellow")
    except (ValueError, ImportError, OSError) as error:  # OSError: a file that is absent, a disk that is full
        _end(f"error: {error}", 2)
    except (RuntimeError, MemoryError) as error:
        from ..runs.skipping import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _end(f"error: out of memory ({' '.join(str(error).split())}); an unfinished batch was undone. `edit "
             "--resume --on-error skip` continues a run and splits batches that are too large; lower token_budget or "
             "--batch-size to use less memory", 1)


def _command_is(name: str) -> bool:
    return sys.argv[1:2] == [name]


def _print_example(status: object) -> None:
    """End typer's error of usage with an example of the command."""
    if status == 2 and (examples := EXAMPLES.get("".join(sys.argv[1:2]))):
        print_lines([f"Example: {examples[0]}"], to_stderr=True)


def _end(message: str, status: int, style: str = "red") -> NoReturn:
    """End the process with one line on standard error."""
    Console(stderr=True).print(" ".join(message.split()), style=style, markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)
