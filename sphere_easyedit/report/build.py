"""Writes report.html for run directories, and its figures as SVG and PNG."""

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
from .neurons import NeuronFigures
from .notices import notices_of
from .page import Page
from .runs import ReportRun, named_runs
from .shares import shares_figure

_SCALE: Final = 2.0  # pixels of PNG files per pixel of their SVG
REFRESH: Final = 30  # minimum seconds between two versions of a live page
_REQUIRED: Final = MappingProxyType({"vl-convert-python": "vl_convert", "Jinja2": "jinja2", "scikit-learn": "sklearn"})
# By figure: the note if it is missing.
_MISSING: Final = MappingProxyType({
    "changes": "No regression of changes: it needs three pairs of evaluations (`edit --eval-every`).",
    "gains": "No comparison of base methods: it needs finished runs with and without SPHERE on the same facts.",
    "forgetting": "No forgetting: it needs the scores of evaluations, in a run's `scores/`.",
    "abilities": "No general abilities: `edit --abilities` or `evaluate --abilities` measure them.",
    "shares": "No shares in the principal space: the run has no spaces.csv, which `edit` writes.",
    "heatmaps": "No figures of neurons: the run has no neurons.safetensors, which `edit` writes.",
})


@dataclass(frozen=True)
class ReportFiles:
    """The files of a report."""

    html: Path
    figures: tuple[Path, ...]


def write_report(runs: Sequence[str | Path | RunRecords], output: str | Path | None = None, files: bool = True,
                 live: bool = False) -> ReportFiles:
    """Write ``report.html``, self-contained, and the figures beside it in ``figures/`` as SVG and PNG.

    Args:
        runs: directories of finished or unfinished runs, or their records.
        output: folder to write to; by default the directory of the only run.
        files: also write SVG and PNG.
        live: for a run in progress: the page reloads itself, and figures that take seconds to compute are left out.

    Raises:
        ValueError: a directory contains no run or a damaged one, several runs are given without ``output``, a library
            that draws is not installed, or the page or ``figures/`` leads out of the folder. Nothing is then written.
    """
    if output is None and len(runs) != 1:
        raise ValueError(f"{len(runs)} runs are given: give output, the folder of their report")
    check_installed()
    read = [run if isinstance(run, RunRecords) else RunRecords.read(run) for run in runs]
    folder = read[0].directory if output is None else Path(output)
    path_in_folder = RunDirectory(folder).path_of  # mostly a run's own folder, which may be untrusted
    html, drawn = path_in_folder("report.html"), path_in_folder("figures")
    coordinates = path_in_folder("figures/places.json")
    named = named_runs(read)
    figures, notes = figures_of(named, live, coordinates)
    title = named[0].label if len(named) == 1 else f"{len(named)} runs"
    page = Page(f"SPHERE: {title}", named, notices_of(named), figures, tables_of(named), notes,
                REFRESH if live else None).html()
    with atomic_write(html) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return ReportFiles(html, tuple(write_figures(figures, drawn)) if files else ())


def check_installed() -> None:
    """Refuse early (ValueError) if a library that draws is not installed."""
    missing = [package for package, module in _REQUIRED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"a report needs {', '.join(missing)}: pip install 'sphere-easyedit[report]'")


def figures_of(runs: Sequence[ReportRun], live: bool = False, coordinates: Path | None = None
               ) -> tuple[list[Figure], list[str]]:
    """All figures that the runs have data for, and notes why others are missing.

    Args:
        live: leave out the figures that take seconds to compute.
        coordinates: JSON file that caches t-SNE's coordinates; None for no cache.
    """
    neurons = NeuronFigures(runs, coordinates)
    candidates = [curves_figure(runs), changes_figure(runs), gains_figure(runs), forgetting_figure(runs),
                  abilities_figure(runs), shares_figure(runs), *neurons.figures(embedded=not live)]
    figures = [figure for figure in candidates if figure is not None]
    names = {figure.name for figure in figures}
    return figures, [note for name, note in _MISSING.items() if name not in names]


def write_figures(figures: Sequence[Figure], folder: Path, suffixes: Sequence[str] = ("svg", "png")) -> list[Path]:
    """Write each figure to a file of each kind, with the first options of its choices."""
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
