"""Shared by the commands: terminal and log setup, and loading the model."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from .waiting import WatchedConsole, report_waiting

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ..callbacks.progress import LiveLine
    from ..hparams import SPHEREHyperParams
    from ..report.live import LiveReport
    from ..utils.progress import PhaseProgress


logger = logging.getLogger(__name__)

_SPINS: Final = "3000"  # turns of the loop in which an OpenMP thread waits before it sleeps


class Consoles(NamedTuple):
    """Standard output, for results, and standard error, for log messages and the live line."""

    out: Console
    err: WatchedConsole  # shared by log and live line, so that they do not overwrite each other

    def print_line(self, text: str, style: str = "") -> None:
        """Print a text to standard output without markup, highlighting or wrapping."""
        self.out.print(Text(text, style=style), soft_wrap=True)


def set_up(verbose: bool = False, quiet: bool = False) -> Consoles:
    """Set up logging, and return the consoles to print to.

    Args:
        verbose: log debug messages, too.
        quiet: log warnings and errors only, and show no progress bars.

    Raises:
        ValueError: both are given.
    """
    if verbose and quiet:
        raise ValueError("--verbose and --quiet exclude each other: give one")
    consoles = Consoles(Console(), WatchedConsole(stderr=True))
    if quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported, so this comes before that
    if "OMP_WAIT_POLICY" not in os.environ:  # read when torch is imported
        # OpenMP's threads wait for each other by spinning, by default for milliseconds, which makes every operation
        # slow where other programs need the cores (docs/PERFORMANCE.md).
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
    handler = RichHandler(console=consoles.err, show_path=False, show_time=False)
    handler.addFilter(_unwritten)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    # Slow steps are announced before they start, at level INFO.
    level = logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO
    logging.getLogger("sphere_easyedit").setLevel(level)
    return consoles


def _unwritten(record: logging.LogRecord) -> bool:
    """Whether no handler below the root's writes a record to the terminal, as huggingface_hub's does."""
    logger: logging.Logger | None = logging.getLogger(record.name)
    while logger is not None and logger.parent is not None:
        if any(isinstance(handler, logging.StreamHandler) and handler.stream in (
                sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)
               for handler in logger.handlers):
            return False
        logger = logger.parent
    return True


def load(model_name: str, device: int | str | None, dtype: str | torch.dtype | None = None
         ) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """``loading.load_model`` without progress bars of transformers."""
    from ..models.loading import load_model

    hide_bars_of_transformers()
    return load_model(model_name, device, dtype)


def hide_bars_of_transformers() -> None:
    """Turn off the progress bars that transformers shows when it loads a model."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def load_for(hparams: SPHEREHyperParams, dtype: str | torch.dtype | None
             ) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load the model of hyperparameters on their device."""
    return load(hparams.model_name, "auto" if hparams.model_parallel else hparams.device, dtype)


def load_replicas(hparams: SPHEREHyperParams, dtype: str | None
                  ) -> tuple[nn.Module, PreTrainedTokenizerBase, AbstractContextManager[None]]:
    """Load the model, in every process if ``accelerate launch`` or ``torchrun`` started several.

    All processes but the first work for it from here on, and exit here.

    Returns:
        The model, its tokenizer, and the context in which the other processes work for this one.

    Raises:
        ValueError: there are several processes, but the hyperparameters allow only one.
    """
    from ..models.distributed import ProcessInfo, Replicas

    process = ProcessInfo.join(hparams.device)
    if process.world_size == 1:
        return *load_for(hparams, dtype), nullcontext()
    for name, value in (("model_parallel", hparams.model_parallel), ("executor", hparams.executor == "easyedit")):
        if value:
            raise ValueError(f"{name} is {getattr(hparams, name)!r}, which is not supported with {process.world_size} "
                             "processes: start one process, or change it")
    if process.rank:
        logging.getLogger("sphere_easyedit").setLevel(logging.WARNING)
    model, tok = load_for(replace(hparams, device=process.device), dtype)
    replicas = Replicas(hparams.editable(model), process)
    if process.rank:
        replicas.follow()
        raise typer.Exit
    return model, tok, replicas.leading()


@contextmanager
def live_line(consoles: Consoles, quiet: bool, num_edits: int | None = None) -> Iterator[list[LiveLine]]:
    """Show a run's progress on one line, unless ``quiet``; yields a list of that line or an empty one."""
    from ..callbacks.progress import LiveLine

    if quiet:
        yield []
    else:
        line = LiveLine(consoles.err, num_edits)
        # On a terminal the line itself shows it, and before it the progress bars do.
        alive = nullcontext() if consoles.err.file.isatty() else report_waiting(consoles.err, lambda: line.step)
        with line, alive:
            yield [line]


@contextmanager
def starting(consoles: Consoles, quiet: bool = False) -> Iterator[None]:
    """The part of a command that imports libraries and loads a model: says so at once, and that it is still at work."""
    logger.info("loading PyTorch and transformers, which takes a few seconds")
    with nullcontext() if quiet else report_waiting(consoles.err, lambda: "loading"):
        yield


def progress_of(watchers: Sequence[LiveLine | LiveReport]) -> PhaseProgress:
    """A run's ``progress`` that updates all watchers."""
    def update(phase: str, done: int, total: int) -> None:
        for watcher in watchers:
            watcher.update(phase, done, total)

    return update


def on_one_line(text: str) -> str:
    """A text with line breaks and other control characters escaped, as JSON escapes them."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
