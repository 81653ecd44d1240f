"""``doctor``: check the installation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

from .common import set_up
from .options import option

if TYPE_CHECKING:
    from .diagnosis import Report

_STATUS_STYLES = {"ok": "green", "not installed": "yellow", "none yet": "yellow", "broken": "red"}


def doctor(
    stats_dir: Annotated[Path, option("Folder where statistics are looked for.")] = Path("data/stats"),
) -> None:
    """Check what is installed, and name remedies; exit status 1 if something required is broken or missing."""
    consoles = set_up()
    from .diagnosis import examine

    report = examine(stats_dir)
    consoles.out.print(_table(report))
    for item in report.items:
        if item.remedy is not None:  # below the table, where no border cuts a command
            consoles.print_line(f"{item.name} ({item.status}): {item.remedy}")
    if not report.ok:
        raise typer.Exit(1)


def _table(report: Report) -> Table:
    table = Table("", "item", "status", Column("found", overflow="fold"))  # so that long paths are shown in full
    section = ""
    for item in report.items:
        if item.section != section:
            table.add_section()
        status = Text(item.status, style=_STATUS_STYLES[item.status])
        table.add_row("" if item.section == section else item.section, Text(item.name), status, Text(item.detail))
        section = item.section
    return table
