"""Examples of every command, which end its ``--help``; the first one also ends errors of usage and the start page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from rich.console import Console
from typer.core import TyperCommand

EXAMPLES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({command: tuple(
    f"sphere-easyedit {command} {arguments}".rstrip() for arguments in examples) for command, examples in {
    "edit": (
        "--hparams AlphaEdit/smollm2-135m --num-edits 50 --batch-size 25 --output runs/first --report",
        "--hparams AlphaEdit/llama3-8b --dataset facts --data mine.csv --output runs/mine",
        "--hparams MEMIT/smollm2-135m --set alpha=0 --output runs/memit --resume",
    ),
    "chat": ("runs/first", "AlphaEdit/smollm2-135m"),
    "show": ("runs/first --case 531", "runs/first --case 'Barry Bonds' --at 25 --json"),
    "report": ("runs/first", "runs/memit runs/memit-sphere --output compared"),
    "evaluate": (
        "runs/first --protocol rome --protocol easyedit",
        "runs/first --no-facts --at 0 --at 50 --abilities boolq",
    ),
    "sweep": ("study.yaml --output runs/study --jobs 2", "study.yaml --output runs/study --collect-only"),
    "export": (
        "runs/first --output edited",
        "runs/first --as deltas --output deltas",
        "runs/first --as lora --rank 50 --output adapter",
    ),
    "apply": ("deltas --model smollm2-135m --output edited",),
    "remove": ("runs/first --case 3 --case 7 --output without",),
    "hparams": ("Qwen/Qwen2.5-0.5B --output qwen.yaml", "models/mine --base-alg MEMIT --output mine.yaml"),
    "tune": ("smollm2-135m --dataset facts --data mine.csv --budget 30 --output tuned",),
    "stats": ("--hparams AlphaEdit/llama3-8b",),
    "plan": ("--hparams AlphaEdit/llama3-8b --num-edits 2000 --batch-size 100",),
    "doctor": ("",),
}.items()})

# The commands to begin with, as the start page shows them.
FIRST: Final = ("edit", "chat", "report", "hparams")


class CommandWithExamples(TyperCommand):
    """A command whose help ends with its examples, unwrapped for copying, as an ``epilog`` would not be."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help and the examples."""
        super().format_help(ctx, formatter)
        print_lines(["Examples:", *(f"  {example}" for example in EXAMPLES.get(self.name or "", ()))])


def print_lines(lines: Iterable[str], to_stderr: bool = False) -> None:
    """Print lines without markup, highlighting or wrapping."""
    Console(stderr=to_stderr).print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
