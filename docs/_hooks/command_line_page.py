"""The page of the command line, from the declarations of its commands and options."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import typer

from sphere_easyedit.cli.app import app

_INTRODUCTION = """# Command line

Generated from the program itself. `sphere-easyedit COMMAND --help` prints the same, and `sphere-easyedit
--install-completion` makes the shell complete commands, options and their values.
"""


def text() -> str:
    """The page, as Markdown."""
    group: Any = typer.main.get_command(app)
    sections = (_section(name, command) for name, command in group.commands.items() if not command.hidden)
    return "\n".join([_INTRODUCTION, *(line for section in sections for line in section)])


def _section(name: str, command: Any) -> Iterator[str]:
    context = command.make_context(name, [], resilient_parsing=True)
    usage = re.sub(r"[{}]", "", command.get_usage(context).removeprefix("Usage: ")).split()
    yield from (f"## {name}", "", _plain(command.help), "", "```text",
                " ".join(["sphere-easyedit", *(word.upper() if "." in word else word for word in usage)]), "```", "")
    panels: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.params:
        shown = parameter.get_help_record(context)
        if shown is not None:
            kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
            panels.setdefault(parameter.rich_help_panel or kind, []).append(shown)
    for title, rows in panels.items():
        yield from (f"| {title} | |", "| --- | --- |")
        yield from (f"| {_flags(flags)} | {_plain(words)} |" for flags, words in rows)
        yield ""
    if command.epilog:
        yield from ("```text", command.epilog.strip(), "```", "")


def _flags(record: str) -> str:
    """``--dtype <float32|float16>`` as Markdown."""
    flags, _, values = record.partition(" <")
    choices = values.removesuffix(">").removeprefix("list[").removesuffix("]").replace("int range", "integer")
    shown = " ".join(f"`{flag}`" for flag in re.split(r"[ ,/]+", flags))
    return shown + (f" {choices.replace('|', ', ')}" if choices else "")


def _plain(words: str | None) -> str:
    return " ".join((words or "").split()).replace("|", "\\|").replace("<", "&lt;")
