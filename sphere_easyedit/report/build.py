"""From run directories to report.html, and the same figures as SVG and PNG."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

from ..runs.directory import RunDirectory
from ..runs.records import RunRecords
from ..utils.files import atomic_write
from .abilities import abilities_figure
from .cases import tables_of
from .changes import changes_figure
from .curves import curves_figure
from .figure import Figure, as_file
from .forgetting import forgetting_figure
from .gains import gains_figure
from .neurons import Neurons
from .notices import notices_of
from .page import Page
from .runs import ReportRun, named_runs
from .shares import shares_figure

_SCALE: Final = 2.0  # of PNG files against their SVG
REFRESH: Final = 30  # seconds from one state of a live page to the next, at least
_DRAWING: Final = MappingProxyType({"vl-convert-python": "vl_convert", "Jinja2": "jinja2", "scikit-learn": "sklearn"})


@dataclass(frozen=True)
class ReportFiles:
    """What was written: the page, and the figures' files."""

    html: Path
    figures: tuple[Path, ...]


def write_report(runs: Sequence[str | Path | RunRecords], output: str | Path | None = None, files: bool = True,
                 live: bool = False) -> ReportFiles:
    """Write ``report.html``, self-contained, and the figures beside it in ``figures/`` as SVG and PNG.

    Args:
        runs: run directories, of runs that ended or are under way, or what was read of them.
        output: folder to write to; the run's own directory where there is one run.
        files: also write SVG and PNG.
        live: for a run in progress: the page reloads itself, and figures that take seconds are left for the end.

    Raises:
        ValueError: a directory holds no run or a damaged one, several runs are given without ``output``, what draws is
            not installed, or the page or ``figures/`` leads out of the folder. Nothing is then written.
    """
    if output is None and len(runs) != 1:
        raise ValueError(f"{len(runs)} runs are given: say where the report of all of them goes (output)")
    check_installed()
    read = [run if isinstance(run, RunRecords) else RunRecords.read(run) for run in runs]
    folder = read[0].directory if output is None else Path(output)
    place = RunDirectory(folder).path_of  # mostly a run's own, which may come from somebody else
    html, drawn, coordinates = place("report.html"), place("figures"), place("figures/places.json")
    named = named_runs(read)
    figures, notes = figures_of(named, live, coordinates)
    title = named[0].label if len(named) == 1 else f"{len(named)} runs"
    page = Page(f"SPHERE: {title}", named, notices_of(named), figures, tables_of(named), notes,
                REFRESH if live else None).html()
    with atomic_write(html) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return ReportFiles(html, tuple(write_figures(figures, drawn)) if files else ())


def check_installed() -> None:
    """Refuse early where what draws is missing.

    Raises:
        ValueError: names it, and the command that mends it.
    """
    missing = [package for package, module in _DRAWING.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"a report needs {', '.join(missing)}: pip install 'sphere-easyedit[report]'")


def figures_of(runs: Sequence[ReportRun], live: bool = False, coordinates: Path | None = None
               ) -> tuple[list[Figure], list[str]]:
    """All figures that the runs have data for, and notes why others are missing.

    Args:
        runs: of the report.
        live: leave out the figures that take seconds to compute.
        coordinates: JSON file that caches t-SNE's coordinates; None for no cache.
    """
    notes = []
    neurons = Neurons(runs, coordinates)
    found = [curves_figure(runs), changes_figure(runs), gains_figure(runs), forgetting_figure(runs),
             abilities_figure(runs), shares_figure(runs), *neurons.figures(embedded=not live)]
    figures = [figure for figure in found if figure is not None]
    names = {figure.name for figure in figures}
    for name, text in (
            ("changes", "No regression of changes: it takes three pairs of evaluations (`edit --eval-every`)."),
            ("gains", "No bars of gains: they take finished runs of a base method without SPHERE and with it, on the "
                      "same facts."),
            ("forgetting", "No forgetting: it takes evaluations' scores, in a run's `scores/`."),
            ("abilities", "No general abilities: `edit --abilities` or `evaluate --abilities` measure them."),
            ("shares", "No shares in the principal space: `evaluate --neurons` finds them from kept weights."),
            ("heatmaps", "No pictures of neurons: `evaluate --neurons` makes them from kept weights.")):
        if name not in names:
            notes.append(text)
    return figures, notes


def write_figures(figures: Sequence[Figure], folder: Path, suffixes: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Each figure in files of these kinds, with its first choices."""
    import vl_convert

    written = []
    for figure in figures:
        spec = as_file(figure)
        for suffix in suffixes:
            path = folder / f"{figure.name}.{suffix}"
            with atomic_write(path) as temporary:
                if suffix == "svg":
                    temporary.write_text(vl_convert.vegalite_to_svg(spec), encoding="utf-8")
                else:
                    temporary.write_bytes(vl_convert.vegalite_to_png(spec, scale=_SCALE))
            written.append(path)
    return written
