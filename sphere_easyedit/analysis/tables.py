"""Tables of numbers, written as Markdown and CSV."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from ..evaluation.paired import PairedDifference
from ..runs.schema import Estimate
from ..utils.files import atomic_write

Cell = str | int | float | Estimate | PairedDifference | None
NOTHING: Final = "-"


@dataclass(frozen=True)
class Column:
    """A column's heading, and the format of its numbers in Markdown."""

    name: str
    spec: str = ".1f"


@dataclass(frozen=True)
class Table:
    """Rows of cells, each as long as the columns.

    Attributes:
        name: stem of its files.
        title: heading.
        columns: headings and formats.
        rows: cells: text, number, mean with interval, or None (empty).
        note: text below the title.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.name}, row {number} has {len(row)} cells for {len(self.columns)} "
                                 "columns")

    def without_empty_columns(self) -> Table:
        """The table without columns that are empty in all rows; a table without rows is unchanged."""
        kept = [index for index in range(len(self.columns))
                if not self.rows or any(row[index] is not None for row in self.rows)]
        return replace(self, columns=tuple(self.columns[index] for index in kept),
                       rows=tuple(tuple(row[index] for index in kept) for row in self.rows))

    def to_markdown(self) -> str:
        """Title, note and table, with intervals as ``mean (low to high)``."""
        lines = [[column.name for column in self.columns],
                 ["---:" if self._is_numeric(index) else "---" for index in range(len(self.columns))],
                 *([_text(cell, column.spec) for cell, column in zip(row, self.columns, strict=True)]
                   for row in self.rows)]
        table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return "\n\n".join(part for part in (f"### {self.title}", self.note, table) if part) + "\n"

    def write_csv(self, path: Path) -> None:
        """Write one line per row, numbers in full precision; a column of intervals becomes mean, low, high and n."""
        spread = [any(isinstance(row[index], Estimate | PairedDifference) for row in self.rows)
                  for index in range(len(self.columns))]
        with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream)
            writer.writerow([name for column, wide in zip(self.columns, spread, strict=True)
                             for name in ([column.name, *(f"{column.name} {part}" for part in ("low", "high", "n"))]
                                          if wide else [column.name])])
            for row in self.rows:
                writer.writerow([value for cell, wide in zip(row, spread, strict=True)
                                 for value in (_parts(cell) if wide else [_plain(cell)])])

    def _is_numeric(self, index: int) -> bool:
        cells = [row[index] for row in self.rows if row[index] is not None]
        return bool(cells) and not any(isinstance(cell, str) for cell in cells)


def _text(cell: Cell, spec: str) -> str:
    if cell is None:
        return NOTHING
    if isinstance(cell, Estimate | PairedDifference):
        if math.isnan(cell.mean):
            return NOTHING
        mean = _number(cell.mean, spec)
        if cell.ci95 is None or any(map(math.isnan, cell.ci95)):
            return mean
        return f"{mean} ({_number(cell.ci95[0], spec)} to {_number(cell.ci95[1], spec)})"
    if isinstance(cell, float):
        return NOTHING if math.isnan(cell) else _number(cell, spec)
    return str(cell)


def _number(value: float, spec: str) -> str:
    text = format(value, spec)
    return text.removeprefix("-") if float(text) == 0 else text  # no minus sign for what rounds to 0


def _plain(cell: Cell) -> str | int:
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    return repr(cell) if isinstance(cell, float) else cell if isinstance(cell, int) else str(cell)


def _parts(cell: Cell) -> list[str | int]:
    if not isinstance(cell, Estimate | PairedDifference):
        return [_plain(cell), "", "", ""]
    low, high = cell.ci95 if cell.ci95 is not None else (None, None)
    return [_plain(cell.mean), _plain(low), _plain(high), cell.n]
