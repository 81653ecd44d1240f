"""Tables of a sweep for reading: the ends of its arms, and what SPHERE changed."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..runs.schema import Estimate
from .sweep_results import WATCHED
from .tables import Cell, Column, Table

Row = Mapping[str, Any]

_TITLES = {"after": "After the last edit", "last_batch": "The last batch"}
_OF_FACTS = ("dataset", "model_name")  # settings that matter before anything is edited
_ANY_SIZE = ".4g"  # where a column's numbers are not all percent


def wide_tables(rows: Sequence[Row], settings: Sequence[str]) -> list[Table]:
    """A table for each protocol with a row an arm and a column a metric, at the end of the runs that came to it.

    Args:
        rows: as ``SweepTable.rows``.
        settings: names of the columns that tell arms apart.
    """
    ends = {row["run"]: row["num_edits"] for row in rows if row["when"] == "after"}
    final = [row for row in rows if row["num_edits"] == ends.get(row["run"])]
    tables = []
    for when, title in _TITLES.items():
        protocols = dict.fromkeys(row["protocol"] for row in final if row["when"] == when)
        for protocol in sorted(protocols, key=lambda one: one == WATCHED):  # what is watched comes last
            chosen = [row for row in final if (row["when"], row["protocol"]) == (when, protocol)]
            before = [row for row in rows if (row["when"], row["protocol"]) == ("before", protocol)]
            name = f"protocol {protocol}" if protocol != WATCHED else "watched"
            spec = ".1f" if protocol != WATCHED else _ANY_SIZE
            tables.append(_wide(f"{title}, {name}", chosen, before, settings, spec))
    return tables


def changes_table(rows: Sequence[Row], settings: Sequence[str]) -> Table:
    """A row for each difference.

    Args:
        rows: as ``SweepTable.differences``.
        settings: names of the columns that tell arms apart.
    """
    columns = [*map(Column, settings), Column("edits"), Column("protocol"), Column("metric"), Column("with", _ANY_SIZE),
               Column("without", _ANY_SIZE), Column("difference", f"+{_ANY_SIZE}"), Column("over seeds"),
               Column("95% over seeds"), Column("95% over cases"), Column("seeds")]
    lines = [(*(as_text(row[name]) for name in settings), row["num_edits"], row["protocol"] or "watched", row["metric"],
              row["arm_mean"], row["reference_mean"], _without_rounding(row),
              _range(row["lowest"], row["highest"]) if row["pairs"] > 1 else None,
              _range(row["t95_low"], row["t95_high"]), _range(row["cases95_low"], row["cases95_high"]), row["seeds"])
             for row in rows]
    return Table("changes", "With SPHERE minus without, after the last edit", tuple(columns), tuple(lines),
                 "Over seeds: lowest to highest, and Student's 95% interval from 3 seeds on. Over cases: 95% interval "
                 "by paired bootstrap, which speaks for other cases with these seeds.")


def as_text(value: Any) -> str | None:
    """A setting's value in a cell."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, dict)):
        return json.dumps(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def several(values: Iterable[Any]) -> str:
    """Different values, in their order, with spaces between."""
    return " ".join(str(value) for value in dict.fromkeys(values))


def _wide(title: str, final: Sequence[Row], before: Sequence[Row], settings: Sequence[str], spec: str) -> Table:
    metrics = list(dict.fromkeys(row["metric"] for row in final))
    lines: list[tuple[Cell, ...]] = []
    first: dict[Any, str] = {}  # all runs of a seed start from one model, so the first one's numbers do
    unedited = [row for row in before if first.setdefault((row["seed"], _facts(row)), row["run"]) == row["run"]]
    for of_facts in _grouped(unedited, _facts):
        known = [as_text(of_facts[0][name]) if name in _OF_FACTS else None for name in settings]
        lines.append(("unedited", *known[1:], *_cells(of_facts, metrics)))
    for of_arm in _grouped(final, lambda row: row["arm"]):
        lines.append((*(as_text(of_arm[0][name]) for name in settings), *_cells(of_arm, metrics)))
    columns = [*map(Column, settings), Column("seeds"), Column("edits"), *(Column(metric, spec) for metric in metrics)]
    return Table("wide", title, tuple(columns), tuple(lines))


def _facts(row: Row) -> tuple[Any, ...]:
    return tuple(as_text(row.get(name)) for name in _OF_FACTS)


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> list[list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return list(groups.values())


def _cells(rows: Sequence[Row], metrics: Sequence[str]) -> list[Cell]:
    return [several(row["seed"] for row in rows), several(row["num_edits"] for row in rows),
            *(_cell([row for row in rows if row["metric"] == metric]) for metric in metrics)]


def _cell(rows: Sequence[Row]) -> Estimate | None:
    """One metric of an arm: over the seeds where there are several, else over the cases of the one."""
    if not rows:
        return None
    means = [row["mean"] for row in rows]
    if len(rows) > 1:
        return Estimate(math.fsum(means) / len(means), (min(means), max(means)), len(rows))
    low, high = rows[0]["ci95_low"], rows[0]["ci95_high"]
    return Estimate(means[0], None if low is None else (low, high), rows[0]["n"] or 0)


def _without_rounding(row: Row) -> float:
    """The difference; 0 where it is rounding of the means alone."""
    rounding = 1e-12 * max(abs(row["arm_mean"]), abs(row["reference_mean"]))
    return 0.0 if abs(row["difference"]) <= rounding < math.inf else row["difference"]


def _range(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{low:+{_ANY_SIZE}} to {high:+{_ANY_SIZE}}"
