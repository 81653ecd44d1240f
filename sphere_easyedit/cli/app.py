"""``app`` with all commands, and ``main``, which runs it and prints errors as one line."""

from __future__ import annotations

import sys
from typing import NoReturn

import typer
from rich.console import Console

from ..utils.signals import Interrupted, ProcessLost, raise_on_interrupts
from .doctor import doctor
from .edit import edit
from .evaluate import evaluate
from .export import apply, export
from .hparams import hparams
from .plan import plan
from .remove import remove
from .report import report
from .show import show
from .stats import stats
from .sweep import sweep
from .tune import tune

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False,
                  help="Edit facts into language models with SPHERE (arXiv 2510.01172).")
for _command in (edit, evaluate, show, report, sweep, hparams, tune, stats, doctor, plan, export, apply, remove):
    app.command()(_command)
app.command("withdraw", hidden=True, deprecated=True)(remove)  # its former name


def main() -> None:
    """Run the command line; a failure ends with one line on standard error.

    Exit status: 2 for bad input, 128+n for signal n, 1 for a lost process or too little memory.
    """
    try:
        with raise_on_interrupts():
            try:
                app()
            except ProcessLost as error:  # reported here, since a launcher then sends SIGTERM to the other processes
                _end(f"error: {error}; an unfinished batch was undone. `edit --resume` continues a run.", 1)
    except Interrupted as interrupted:
        _end(f"ended by {interrupted.name}; an unfinished batch was undone. `edit --resume` continues a run.",
             interrupted.exit_status, "yellow")
    except (ValueError, ImportError, OSError) as error:  # OSError: a file that is absent, a disk that is full
        _end(f"error: {error}", 2)
    except (RuntimeError, MemoryError) as error:
        from ..runs.skipping import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        _end(f"error: out of memory ({' '.join(str(error).split())}); an unfinished batch was undone. `edit "
             "--resume --on-error skip` continues a run and splits batches that are too large; lower token_budget or "
             "--batch-size to use less memory", 1)


def _end(message: str, status: int, style: str = "red") -> NoReturn:
    """End the process with one line on standard error."""
    Console(stderr=True).print(" ".join(message.split()), style=style, markup=False, highlight=False, soft_wrap=True)
    sys.exit(status)
