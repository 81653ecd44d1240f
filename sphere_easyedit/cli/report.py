"""``report``: write runs as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import set_up
from .options import option


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, shown side by side.")],
    output: Annotated[Path | None, option("Folder to write to (the run directory if not given and there is only one "
                                        "run).")] = None,
    figures: Annotated[bool, option("Also write the figures as SVG and PNG.")] = True,
) -> None:
    """Make report.html of runs, and their figures as files."""
    consoles = set_up()
    from ..report import write_report

    consoles.print_line(str(write_report(runs, output, figures).html))
