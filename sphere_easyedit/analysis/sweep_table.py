"""A sweep's results in one table: every number as CSV, the ends of the runs and what SPHERE changed as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

from ..hparams import SPHERE_ONLY
from ..runs.sweep.record import KEEPING, RECORD, Run, read_record
from ..utils.files import atomic_write
from .sweep_markdown import Row, as_text, changes_table, several, wide_tables
from .sweep_pairs import Difference, differences, same_seeds, with_and_without_sphere
from .sweep_results import MeasuredRun, Measurement
from .tables import Column, Table

ROWS: Final = "table.csv"
DIFFERENCES: Final = "differences.csv"
MARKDOWN: Final = "table.md"

_OF_RUN = ("run", "arm", "seed")
_OF_ROW = ("num_edits", "when", "protocol", "metric", "mean", "ci95_low", "ci95_high", "n")
_OF_DIFFERENCE = ("num_edits", "when", "protocol", "metric", "arm_mean", "reference_mean", "difference", "lowest",
                  "highest", "t95_low", "t95_high", "pairs", "seeds", "cases95_low", "cases95_high", "cases")


@dataclass(frozen=True)
class SweepTable:
    """What a sweep found.

    Attributes:
        settings: names of the columns that tell arms apart: method, sphere, gamma, alpha, and what else differs.
        rows: a row a measurement (``table.csv``): run, arm, seed, the settings, num_edits, when, protocol, metric,
            mean, ci95_low, ci95_high, n. None where a setting plays no part. See ``results.Measurement``.
        differences: a row for each measurement that an arm with SPHERE shares with the same arm without it
            (``differences.csv``). See ``pairs.Difference``.
        unfinished: names of the runs that have not come to their end; their rows go as far as they got.
        alone: names of the runs with SPHERE that have no counterpart without it.
    """

    settings: tuple[str, ...]
    rows: tuple[Row, ...]
    differences: tuple[Row, ...]
    unfinished: tuple[str, ...]
    alone: tuple[str, ...]

    def write(self, folder: str | Path) -> list[Path]:
        """Write ``table.csv``, ``differences.csv`` and ``table.md``, and say where they are."""
        folder = Path(folder)
        _write_csv(folder / ROWS, (*_OF_RUN, *self.settings, *_OF_ROW), self.rows)
        _write_csv(folder / DIFFERENCES, ("arm", "reference", *self.settings, *_OF_DIFFERENCE), self.differences)
        with atomic_write(folder / MARKDOWN) as temporary:
            temporary.write_text(self.to_markdown(), encoding="utf-8")
        return [folder / name for name in (ROWS, DIFFERENCES, MARKDOWN)]

    def to_markdown(self) -> str:
        """The ends of the runs, a table a protocol and a row an arm; then what SPHERE changed; then what is missing."""
        parts = ["# Sweep", "One seed: mean (95% interval over cases). Several: mean over seeds (lowest to highest)."]
        parts += [table.to_markdown().strip() for table in wide_tables(self.rows, self.settings)]
        if changed := [row for row in self.differences if row["when"] == "after"]:
            told = [name for name in self.settings if name != "sphere"]
            parts.append(changes_table(changed, told).without_empty_columns().to_markdown().strip())
        for title, names in (("Not finished", self.unfinished), ("With SPHERE, and none without it", self.alone)):
            parts += [f"{title}: {', '.join(names)}."] if names else []
        return "\n\n".join(parts) + "\n"


def collect(output: str | Path) -> SweepTable:
    """Read what the runs of a sweep have measured so far. Nothing is written; ``SweepTable.write`` does that.

    Raises:
        ValueError: ``output`` is no sweep's folder, or a run's file is damaged.
    """
    measured = _measured(Path(output))
    settings = _settings([one.run for one in measured])
    rows = [{**_of_run(one.run), **_of_arm(one.run, settings), **_row(measurement)}
            for one in measured for measurement in one.measurements.values()]
    pairs, alone = with_and_without_sphere(measured)
    changes = [{**_of_arm(of_arm[0][0].run, settings), **_difference_row(difference)}
               for of_arm in pairs.values() for difference in differences(of_arm)]
    unfinished = tuple(one.run.name for one in measured if not one.finished)
    return SweepTable(tuple(settings), tuple(rows), tuple(changes), unfinished, tuple(alone))


def compare(output: str | Path, arm: str, reference: str) -> list[Difference]:
    """One arm minus another, paired by seed: SPHERE minus its control, say. An arm is a run's name without its seed.

    Raises:
        ValueError: as ``collect``; or an arm is unknown, or they share no seed.
    """
    return differences(same_seeds(_measured(Path(output)), arm, reference))


def _measured(output: Path) -> list[MeasuredRun]:
    sweep = read_record(output)
    if sweep is None:
        raise ValueError(f"{output} has no {RECORD}: give the folder of a sweep that was started")
    return [MeasuredRun(run, output / run.name) for run in sweep.runs]


def _settings(runs: Sequence[Run]) -> dict[str, Callable[[Run], Any]]:
    """How to read each setting that tells arms apart, by its column's name."""
    found: dict[str, Callable[[Run], Any]] = {
        "method": attrgetter("method"), "sphere": attrgetter("sphere"), "gamma": partial(_hyperparameter, name="gamma"),
        "alpha": partial(_hyperparameter, name="alpha")}
    taken = {*found, *_OF_RUN, *_OF_ROW, *_OF_DIFFERENCE}
    further: dict[str, Callable[[Run], Any]] = {name: attrgetter(name) for name in ("dataset", "batch_size")}
    further |= {f"edit.{name}" if name in taken else name: partial(_edit_option, name=name)
                for run in runs for name in run.edit if name not in KEEPING}
    found |= {name: read for name, read in further.items() if len({as_text(read(run)) for run in runs}) > 1}
    for name in dict.fromkeys(["model_name", *(name for run in runs for name in run.set)]):
        # Methods have hyperparameters of their own, so what counts is whether runs of one method differ.
        values = {(run.method, as_text(run.value(name))) for run in runs if run.sphere or name not in SPHERE_ONLY}
        if name not in ("gamma", "alpha") and len(values) > len({method for method, _ in values}):
            found[f"set.{name}" if name in {*taken, *found} else name] = partial(_hyperparameter, name=name)
    return found


def _edit_option(run: Run, name: str) -> Any:
    return run.edit.get(name)


def _hyperparameter(run: Run, name: str) -> Any:
    """None where it plays no part; alpha does, being 0."""
    return run.value(name) if run.sphere or name == "alpha" or name not in SPHERE_ONLY else None


def _of_run(run: Run) -> dict[str, Any]:
    return dict(zip(_OF_RUN, (run.name, run.arm, run.seed), strict=True))


def _of_arm(run: Run, settings: Mapping[str, Callable[[Run], Any]]) -> dict[str, Any]:
    return {name: read(run) for name, read in settings.items()}


def _row(measurement: Measurement) -> dict[str, Any]:
    low, high = measurement.ci95 or (None, None)
    return {"num_edits": measurement.num_edits, "when": measurement.when, "protocol": measurement.protocol,
            "metric": measurement.metric, "mean": measurement.mean, "ci95_low": low, "ci95_high": high,
            "n": measurement.n}


def _difference_row(found: Difference) -> dict[str, Any]:
    t95, cases95 = found.t95 or (None, None), found.cases95 or (None, None)
    return {"arm": found.arm, "reference": found.reference, "num_edits": found.num_edits, "when": found.when,
            "protocol": found.protocol, "metric": found.metric, "arm_mean": found.arm_mean,
            "reference_mean": found.reference_mean, "difference": found.mean, "lowest": found.lowest,
            "highest": found.highest, "t95_low": t95[0], "t95_high": t95[1], "pairs": len(found.seeds),
            "seeds": several(found.seeds), "cases95_low": cases95[0], "cases95_high": cases95[1], "cases": found.cases}


def _write_csv(path: Path, names: Sequence[str], rows: Iterable[Row]) -> None:
    cells = [tuple(as_text(row[name]) if isinstance(row[name], (list, dict)) else row[name] for name in names)
             for row in rows]
    Table(path.stem, "", tuple(map(Column, names)), tuple(cells)).write_csv(path)
