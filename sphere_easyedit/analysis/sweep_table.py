"""Tables of a sweep: every number as CSV; final results and the effect of SPHERE as Markdown."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from ..hparams import SPHERE_ONLY
from ..runs.schema import Estimate
from ..runs.sweep.record import KEEPING, RECORD, Run, read_record
from ..utils.files import atomic_write
from .sweep_results import (
    WATCHED,
    Difference,
    MeasuredRun,
    MetricValue,
    differences,
    with_and_without_sphere,
)
from .tables import Cell, Column, Table

TableRow = Mapping[str, Any]

ROWS: Final = "table.csv"
DIFFERENCES: Final = "differences.csv"
MARKDOWN: Final = "table.md"

_OF_RUN = ("run", "arm", "seed")
_OF_ROW = ("num_edits", "when", "protocol", "metric", "mean", "ci95_low", "ci95_high", "n")
_OF_DIFFERENCE = ("num_edits", "when", "protocol", "metric", "arm_mean", "reference_mean", "difference", "lowest",
                  "highest", "t95_low", "t95_high", "pairs", "seeds", "cases95_low", "cases95_high", "cases")
_TITLES: Final = {"after": "After the last edit", "last_batch": "The last batch"}
_OF_UNEDITED: Final = ("dataset", "model_name")  # settings that affect the unedited model's numbers
_GENERAL: Final = ".4g"  # format of columns whose numbers are not all percent


@dataclass(frozen=True)
class SweepTable:
    """Results of a sweep.

    Attributes:
        settings: columns that distinguish arms: method, sphere, gamma, alpha, and whatever else differs.
        rows: a row per number (``table.csv``): run, arm, seed, the settings (None if not applicable), num_edits, when,
            protocol, metric, mean, ci95_low, ci95_high, n. See ``MetricValue``.
        differences: a row per number that both an arm with SPHERE and the same arm without it have
            (``differences.csv``). See ``Difference``.
        unfinished: names of unfinished runs; their rows are those so far.
        alone: names of runs with SPHERE that have no counterpart without it.
    """

    settings: tuple[str, ...]
    rows: tuple[TableRow, ...]
    differences: tuple[TableRow, ...]
    unfinished: tuple[str, ...]
    alone: tuple[str, ...]

    def write(self, folder: str | Path) -> list[Path]:
        """Write ``table.csv``, ``differences.csv`` and ``table.md``; returns their paths."""
        folder = Path(folder)
        _write_csv(folder / ROWS, (*_OF_RUN, *self.settings, *_OF_ROW), self.rows)
        _write_csv(folder / DIFFERENCES, ("arm", "reference", *self.settings, *_OF_DIFFERENCE), self.differences)
        with atomic_write(folder / MARKDOWN) as temporary:
            temporary.write_text(self.to_markdown(), encoding="utf-8")
        return [folder / name for name in (ROWS, DIFFERENCES, MARKDOWN)]

    def to_markdown(self) -> str:
        """Final results (a table per protocol, a row per arm), differences by SPHERE, and unfinished runs."""
        parts = ["# Sweep", "One seed: mean (95% interval over cases). Several: mean over seeds (lowest to highest)."]
        parts += [table.to_markdown().strip() for table in wide_tables(self.rows, self.settings)]
        if changed := [row for row in self.differences if row["when"] == "after"]:
            settings = [name for name in self.settings if name != "sphere"]
            parts.append(changes_table(changed, settings).without_empty_columns().to_markdown().strip())
        for title, names in (("Not finished", self.unfinished),
                             ("With SPHERE, but no counterpart without it", self.alone)):
            parts += [f"{title}: {', '.join(names)}."] if names else []
        return "\n\n".join(parts) + "\n"


def collect(output: str | Path) -> SweepTable:
    """Read the results of a sweep so far; ``SweepTable.write`` writes them.

    Raises:
        ValueError: ``output`` is not a sweep's folder, or a run's file is damaged.
    """
    measured = _measured(Path(output))
    settings = _settings([one.run for one in measured])
    rows = [{"run": one.run.name, "arm": one.run.arm, "seed": one.run.seed, **_settings_of(one.run, settings),
             **_row(value)} for one in measured for value in one.measurements.values()]
    pairs, alone = with_and_without_sphere(measured)
    changes = [{**_settings_of(of_arm[0][0].run, settings), **_difference_row(difference)}
               for of_arm in pairs.values() for difference in differences(of_arm)]
    unfinished = tuple(one.run.name for one in measured if not one.finished)
    return SweepTable(tuple(settings), tuple(rows), tuple(changes), unfinished, tuple(alone))


def _measured(output: Path) -> list[MeasuredRun]:
    sweep = read_record(output)
    if sweep is None:
        raise ValueError(f"{output} has no {RECORD}: give the folder of a started sweep")
    return [MeasuredRun(run, output / run.name) for run in sweep.runs]


def _settings(runs: Sequence[Run]) -> dict[str, Callable[[Run], Any]]:
    """Functions that read the settings that distinguish arms, by column name."""
    found: dict[str, Callable[[Run], Any]] = {
        "method": attrgetter("method"), "sphere": attrgetter("sphere"), "gamma": partial(_hyperparameter, name="gamma"),
        "alpha": partial(_hyperparameter, name="alpha")}
    taken = {*found, *_OF_RUN, *_OF_ROW, *_OF_DIFFERENCE}
    further: dict[str, Callable[[Run], Any]] = {name: attrgetter(name) for name in ("dataset", "batch_size")}
    further |= {f"edit.{name}" if name in taken else name: partial(_edit_option, name=name)
                for run in runs for name in run.edit if name not in KEEPING}
    found |= {name: read for name, read in further.items() if len({as_text(read(run)) for run in runs}) > 1}
    for name in dict.fromkeys(["model_name", *(name for run in runs for name in run.set)]):
        # Methods have different hyperparameters, so only differences between runs of one method count.
        values = {(run.method, as_text(run.value(name))) for run in runs if run.sphere or name not in SPHERE_ONLY}
        if name not in ("gamma", "alpha") and len(values) > len({method for method, _ in values}):
            found[f"set.{name}" if name in {*taken, *found} else name] = partial(_hyperparameter, name=name)
    return found


def _edit_option(run: Run, name: str) -> Any:
    return run.edit.get(name)


def _hyperparameter(run: Run, name: str) -> Any:
    """A hyperparameter; None if it has no effect. (alpha has one: without SPHERE it is 0.)"""
    return run.value(name) if run.sphere or name == "alpha" or name not in SPHERE_ONLY else None


def _settings_of(run: Run, settings: Mapping[str, Callable[[Run], Any]]) -> dict[str, Any]:
    return {name: read(run) for name, read in settings.items()}


def _row(value: MetricValue) -> dict[str, Any]:
    low, high = value.ci95 or (None, None)
    return {"num_edits": value.num_edits, "when": value.when, "protocol": value.protocol, "metric": value.metric,
            "mean": value.mean, "ci95_low": low, "ci95_high": high, "n": value.n}


def _difference_row(found: Difference) -> dict[str, Any]:
    t95, cases95 = found.t95 or (None, None), found.cases95 or (None, None)
    return {"arm": found.arm, "reference": found.reference, "num_edits": found.num_edits, "when": found.when,
            "protocol": found.protocol, "metric": found.metric, "arm_mean": found.arm_mean,
            "reference_mean": found.reference_mean, "difference": found.mean, "lowest": found.lowest,
            "highest": found.highest, "t95_low": t95[0], "t95_high": t95[1], "pairs": len(found.seeds),
            "seeds": several(found.seeds), "cases95_low": cases95[0], "cases95_high": cases95[1], "cases": found.cases}


def _write_csv(path: Path, names: Sequence[str], rows: Iterable[TableRow]) -> None:
    cells = [tuple(as_text(row[name]) if isinstance(row[name], (list, dict)) else row[name] for name in names)
             for row in rows]
    Table(path.stem, "", tuple(map(Column, names)), tuple(cells)).write_csv(path)


def wide_tables(rows: Sequence[TableRow], settings: Sequence[str]) -> list[Table]:
    """A table per protocol with a row per arm and a column per metric, of finished runs after the last edit.

    Args:
        rows: as ``SweepTable.rows``.
        settings: columns that distinguish arms.
    """
    ends = {row["run"]: row["num_edits"] for row in rows if row["when"] == "after"}
    final = [row for row in rows if row["num_edits"] == ends.get(row["run"])]
    tables = []
    for when, title in _TITLES.items():
        protocols = dict.fromkeys(row["protocol"] for row in final if row["when"] == when)
        for protocol in sorted(protocols, key=lambda one: one == WATCHED):  # last
            chosen = [row for row in final if (row["when"], row["protocol"]) == (when, protocol)]
            before = [row for row in rows if (row["when"], row["protocol"]) == ("before", protocol)]
            name = f"protocol {protocol}" if protocol != WATCHED else "watched"
            spec = ".1f" if protocol != WATCHED else _GENERAL
            tables.append(_wide(f"{title}, {name}", chosen, before, settings, spec))
    return tables


def changes_table(rows: Sequence[TableRow], settings: Sequence[str]) -> Table:
    """A row for each difference.

    Args:
        rows: as ``SweepTable.differences``.
        settings: columns that distinguish arms.
    """
    columns = [*map(Column, settings), Column("edits"), Column("protocol"), Column("metric"), Column("with", _GENERAL),
               Column("without", _GENERAL), Column("difference", f"+{_GENERAL}"), Column("over seeds"),
               Column("95% over seeds"), Column("95% over cases"), Column("seeds")]
    lines = [(*(as_text(row[name]) for name in settings), row["num_edits"], row["protocol"] or "watched", row["metric"],
              row["arm_mean"], row["reference_mean"], _without_rounding(row),
              _range(row["lowest"], row["highest"]) if row["pairs"] > 1 else None,
              _range(row["t95_low"], row["t95_high"]), _range(row["cases95_low"], row["cases95_high"]), row["seeds"])
             for row in rows]
    return Table("changes", "With SPHERE minus without, after the last edit", tuple(columns), tuple(lines),
                 "Over seeds: lowest to highest, and Student's 95% interval from 3 seeds on. Over cases: 95% interval "
                 "by paired bootstrap, which generalises to other cases with the same seeds.")


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
    """Distinct values, joined by spaces."""
    return " ".join(str(value) for value in dict.fromkeys(values))


def _wide(title: str, final: Sequence[TableRow], before: Sequence[TableRow], settings: Sequence[str], spec: str
          ) -> Table:
    metrics = list(dict.fromkeys(row["metric"] for row in final))
    lines: list[tuple[Cell, ...]] = []
    first: dict[Any, str] = {}  # runs of one seed share the unedited model, so the first one's numbers are enough
    unedited = [row for row in before if first.setdefault((row["seed"], _facts(row)), row["run"]) == row["run"]]
    for of_facts in _grouped(unedited, _facts):
        known = [as_text(of_facts[0][name]) if name in _OF_UNEDITED else None for name in settings]
        lines.append(("unedited", *known[1:], *_cells(of_facts, metrics)))
    for of_arm in _grouped(final, lambda row: row["arm"]):
        lines.append((*(as_text(of_arm[0][name]) for name in settings), *_cells(of_arm, metrics)))
    columns = [*map(Column, settings), Column("seeds"), Column("edits"), *(Column(metric, spec) for metric in metrics)]
    return Table("wide", title, tuple(columns), tuple(lines))


def _facts(row: TableRow) -> tuple[Any, ...]:
    return tuple(as_text(row.get(name)) for name in _OF_UNEDITED)


def _grouped(rows: Iterable[TableRow], key: Callable[[TableRow], Any]) -> list[list[TableRow]]:
    groups: dict[Any, list[TableRow]] = defaultdict(list)
    for row in rows:
        groups[key(row)].append(row)
    return list(groups.values())


def _cells(rows: Sequence[TableRow], metrics: Sequence[str]) -> list[Cell]:
    return [several(row["seed"] for row in rows), several(row["num_edits"] for row in rows),
            *(_cell([row for row in rows if row["metric"] == metric]) for metric in metrics)]


def _cell(rows: Sequence[TableRow]) -> Estimate | None:
    """One metric of an arm: mean and range over several seeds, or the mean and interval of a single one."""
    if not rows:
        return None
    means = [row["mean"] for row in rows]
    if len(rows) > 1:
        return Estimate(math.fsum(means) / len(means), (min(means), max(means)), len(rows))
    low, high = rows[0]["ci95_low"], rows[0]["ci95_high"]
    return Estimate(means[0], None if low is None else (low, high), rows[0]["n"] or 0)


def _without_rounding(row: TableRow) -> float:
    """The difference; 0 if it is only rounding of the means."""
    rounding = 1e-12 * max(abs(row["arm_mean"]), abs(row["reference_mean"]))
    return 0.0 if abs(row["difference"]) <= rounding < math.inf else row["difference"]


def _range(low: float | None, high: float | None) -> str | None:
    return None if low is None or high is None else f"{low:+{_GENERAL}} to {high:+{_GENERAL}}"
