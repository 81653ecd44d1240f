"""Rebuilds the tables and figures of docs/results from what the study's runs wrote, ``docs/results/runs.tar.xz``.

    python benchmarks/study_results.py                     # docs/results anew
    python benchmarks/study_results.py --output rebuilt    # elsewhere
    python benchmarks/study_results.py --unpack runs       # only the runs: runs/runs, runs/grid/runs, runs/guarded
    python benchmarks/study_results.py --pack runs         # the archive anew, from a folder like that

The archive holds run directories without weights and generated texts. Of docs/results, `weights/` takes the weights
(`study_tables.py --weights`), `guard.csv` too (`drift_guard.py`), and `scaling.json` and `processes.json` come from
benchmarks of their own.
"""

from __future__ import annotations

import argparse
import lzma
import tarfile
import tempfile
from pathlib import Path

from sphere_easyedit.analysis.labels import labelled_runs
from sphere_easyedit.report.build import figures_of, write_figures
from sphere_easyedit.report.runs import named_runs
from sphere_easyedit.runs.records import RunRecords
from sphere_easyedit.utils.files import atomic_write
from study.runs import find_runs
from study_tables import tables_of, write_tables

RESULTS = Path(__file__).parents[1] / "docs" / "results"
ARCHIVE = RESULTS / "runs.tar.xz"
COMMAND = "python benchmarks/study_results.py"
FOLDERS = ("runs", "grid/runs", "guarded")
FIGURES = ("curves", "changes", "forgetting", "shares")
DRAWN = ("MEMIT-plain", "MEMIT-sphere", "MEMIT-random", "MEMITkeys-plain", "MEMITkeys-sphere")  # in the figures


def pack(folder: Path, archive: Path) -> None:
    """Write the archive of the run directories in a folder; equal files give equal archives."""
    files = sorted(path for name in FOLDERS for path in (folder / name).rglob("*") if path.is_file())
    with atomic_write(archive) as temporary, tarfile.open(temporary, "w:xz", preset=9 | lzma.PRESET_EXTREME) as tar:
        for path in files:
            entry = tarfile.TarInfo(path.relative_to(folder).as_posix())
            entry.size = path.stat().st_size
            with path.open("rb") as stream:
                tar.addfile(entry, stream)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the archive into a folder, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")


def rebuild(unpacked: Path, output: Path) -> None:
    """Write all tables, and the figures as SVG, from unpacked runs."""
    for runs, folder in ((unpacked / "runs", output), (unpacked / "grid" / "runs", output / "grid")):
        write_tables(folder, COMMAND, tables_of(labelled_runs(find_runs(runs))))
    drawn = named_runs([RunRecords.read(unpacked / "runs" / f"{name}-seed0") for name in DRAWN])
    write_figures([figure for figure in figures_of(drawn)[0] if figure.name in FIGURES], output / "figures", ("svg",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder to write to")
    parser.add_argument("--unpack", type=Path, metavar="FOLDER", help="unpack the runs and do nothing else")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="write the archive and do nothing else")
    given = parser.parse_args()
    if given.pack is not None:
        pack(given.pack, ARCHIVE)
        print(f"{ARCHIVE}: {ARCHIVE.stat().st_size / 1e6:.2f} MB")
    elif given.unpack is not None:
        unpack(ARCHIVE, given.unpack)
    else:
        with tempfile.TemporaryDirectory() as folder:
            unpack(ARCHIVE, Path(folder))
            rebuild(Path(folder), given.output)


if __name__ == "__main__":
    main()
