"""``benchmarks/study_results.py``: docs/results follows from the archive of the study's runs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from study_results import ARCHIVE, FIGURES, RESULTS, pack, rebuild, unpack

TABLES = ("results", "differences", "gains", "collapse", "correlations", "regressions", "abilities", "curves")


def cells_of(path: Path) -> list[list[str | float]]:
    """A CSV file's cells; numbers as such, since their last digit may depend on the machine."""
    with path.open(newline="") as stream:
        return [[_number(cell) for cell in row] for row in csv.reader(stream)]


def _number(cell: str) -> str | float:
    try:
        return float(cell)
    except ValueError:
        return cell


def test_tables_and_figures_follow_from_the_archive(tmp_path: Path) -> None:
    pytest.importorskip("vl_convert")
    assert ARCHIVE.stat().st_size < 2_000_000
    unpack(ARCHIVE, tmp_path / "runs")
    rebuild(tmp_path / "runs", tmp_path / "rebuilt")
    for folder in (".", "grid"):
        assert (tmp_path / "rebuilt" / folder / "tables.md").read_text() == (RESULTS / folder / "tables.md").read_text()
        for name in TABLES:
            rebuilt = cells_of(tmp_path / "rebuilt" / folder / f"{name}.csv")
            committed = cells_of(RESULTS / folder / f"{name}.csv")
            assert len(rebuilt) == len(committed)
            for row, wanted in zip(rebuilt, committed, strict=True):
                assert row == [pytest.approx(cell, rel=1e-6, abs=1e-12) if isinstance(cell, float) else cell
                               for cell in wanted]
    drawn = {path.stem: path.read_text() for path in (tmp_path / "rebuilt" / "figures").iterdir()}
    assert set(drawn) == set(FIGURES) == {path.stem for path in (RESULTS / "figures").iterdir()}
    assert all(text.startswith("<svg") for text in drawn.values())


def test_equal_runs_make_equal_archives(tmp_path: Path) -> None:
    for name in ("runs/a/scores", "grid/runs/b", "guarded/c", "elsewhere"):
        (tmp_path / "made" / name).mkdir(parents=True)
        (tmp_path / "made" / name / "file.jsonl").write_text(name)
    pack(tmp_path / "made", tmp_path / "one.tar.xz")
    unpack(tmp_path / "one.tar.xz", tmp_path / "unpacked")
    unpacked = (path.relative_to(tmp_path / "unpacked").as_posix() for path in (tmp_path / "unpacked").rglob("*.jsonl"))
    assert sorted(unpacked) == ["grid/runs/b/file.jsonl", "guarded/c/file.jsonl", "runs/a/scores/file.jsonl"]
    pack(tmp_path / "unpacked", tmp_path / "two.tar.xz")
    assert (tmp_path / "one.tar.xz").read_bytes() == (tmp_path / "two.tar.xz").read_bytes()
