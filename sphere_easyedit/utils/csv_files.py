"""Reads CSV files that this package wrote."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def read_csv(path: Path, columns: Sequence[str], parse: Callable[[Mapping[str, str]], T]) -> list[T]:
    """What ``parse`` makes of each line, which it gets by column name.

    Raises:
        ValueError: the file is not CSV or has other columns, or ``parse`` raises a ValueError or TypeError.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        try:
            if list(reader.fieldnames or ()) != list(columns):
                raise ValueError(f"its columns are {reader.fieldnames}, not {list(columns)}")
            return [parse(row) for row in reader]
        except (TypeError, ValueError, csv.Error) as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}; remove the file if it is no longer needed, or "
                             "restore it") from error
