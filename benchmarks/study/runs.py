"""Finds the runs in a folder."""

from __future__ import annotations

from pathlib import Path

from sphere_easyedit.runs import schema
from sphere_easyedit.runs.records import RunRecords


def find_runs(folder: str | Path) -> list[RunRecords]:
    """All runs in or under a folder, by path: directories with a ``config.yaml`` and a ``metrics.jsonl``.

    Raises:
        ValueError: there are none, or one is damaged.
    """
    found = [path.parent for path in sorted(Path(folder).rglob(schema.METRICS))
             if (path.parent / schema.CONFIG).is_file()]
    if not found:
        raise ValueError(f"{folder} holds no run (a directory with {schema.CONFIG} and {schema.METRICS}): give a "
                         "folder of runs")
    return [RunRecords.read(path) for path in found]
