"""The study's tables of arms side by side, from the records of its runs.

Runs are compared within an experiment: one model, data set, seed and number of edits. What differs there is the arm:
the base method, and what was done to its updates (nothing, SPHERE, or a control in SPHERE's place). Differences and
gains are computed between arms that share all other hyperparameters.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from sphere_easyedit.analysis.labels import DATASET_TITLES, LabelledRun, dataset_title
from sphere_easyedit.analysis.tables import Cell, Column, Table
from sphere_easyedit.evaluation.paired import PairedDifference, Values, paired_bootstrap
from sphere_easyedit.runs.records import PAPER, SPHERE
from sphere_easyedit.runs.schema import METRIC_NAMES, CaseId, Measurement

from .gains import paired_gain

logger = logging.getLogger(__name__)

WHO: Final = (Column("model"), Column("data set"), Column("seed"), Column("method"))
_SHARES: Final = METRIC_NAMES[:3]  # 0 to 1 in scores of cases, percent in the means of a run


def who(arm: LabelledRun) -> tuple[Cell, ...]:
    """Cells of ``WHO``."""
    return arm.run.model, dataset_title(arm.run.dataset), arm.run.draw, arm.label


def results_table(arms: Sequence[LabelledRun], protocol: str = PAPER) -> Table:
    """In the form of the paper's Table 1: a row a method, and for each data set what was measured after the last edit.

    The unedited model stands above: on the facts of the longest run. Runs that have not ended are left out.
    """
    known = list(DATASET_TITLES)
    datasets = sorted({arm.run.dataset for arm in arms},
                      key=lambda name: (known.index(name) if name in known else len(known), name))
    ended = []
    for arm in arms:
        point = arm.run.after(protocol)
        if point is None:
            logger.warning("%s has not ended, or not by the protocol %s: left out", arm.run.directory, protocol)
        else:
            ended.append((arm, point))
    by_row: dict[tuple[str, str, int | str | None], dict[str, Measurement]] = {}
    for model in sorted({arm.run.model for arm, _ in ended}):
        unedited = by_row.setdefault((model, "unedited", None), {})
        for arm, _ in sorted(ended, key=lambda pair: -pair[1].num_edits):
            before = arm.run.before(protocol)
            if arm.run.model == model and before is not None:
                unedited.setdefault(arm.run.dataset, before)
        for arm, after in ended:
            if arm.run.model == model:
                by_row.setdefault((model, arm.label, arm.run.draw), {})[arm.run.dataset] = after
    columns = [Column("model"), Column("method"), Column("seed")]
    for dataset in datasets:
        columns += [Column(f"{dataset_title(dataset)} {name}") for name in ("edits", *METRIC_NAMES)]
    rows = []
    for (model, label, seed), points in by_row.items():
        row: list[Cell] = [model, label, seed]
        for dataset in datasets:
            row += [None] * (1 + len(METRIC_NAMES)) if dataset not in points else [
                points[dataset].num_edits, *(points[dataset].metrics.get(name) for name in METRIC_NAMES)]
        rows.append(tuple(row))
    return Table("results", "After the last edit", tuple(columns), tuple(rows),
                 f"Protocol `{protocol}`, mean over cases with its 95% interval (bootstrap over cases)."
                 ).without_empty_columns()


def differences_table(arms: Sequence[LabelledRun], protocol: str = PAPER, seed: int = 0, resamples: int = 10_000
                      ) -> Table:
    """What SPHERE does to each base method, and what it does beyond its controls: SPHERE's score minus the other arm's
    on the same cases, after the last edit."""
    return _compared(
        arms, protocol, "differences", "SPHERE minus another arm of its experiment, in points",
        lambda ours, theirs: paired_bootstrap(ours, theirs, seed, resamples),
        against=lambda arm: arm.run.variant != SPHERE).without_empty_columns()


def gains_table(arms: Sequence[LabelledRun], protocol: str = PAPER, seed: int = 0, resamples: int = 10_000) -> Table:
    """Relative gain of each base method from SPHERE (the paper's Figure 7), ``100 (with / without - 1)``."""
    table = _compared(
        arms, protocol, "gains", "Relative gain of each base method from SPHERE, in percent",
        lambda ours, theirs: paired_gain(ours, theirs, seed, resamples), against=lambda arm: arm.run.variant is None)
    rows = []
    for row in table.rows:
        by_column = {column.name: cell for column, cell in zip(table.columns, row, strict=True)}
        gains = [cell.mean for name in _SHARES if isinstance(cell := by_column[name], PairedDifference)]
        whole = len(gains) == len(_SHARES) and all(map(math.isfinite, gains))
        rows.append((*row, float(np.mean(gains)) if whole else None))
    columns = (*table.columns, Column("mean of " + ", ".join(_SHARES)))
    return replace(table, columns=columns, rows=tuple(rows)).without_empty_columns()


def _compared(arms: Sequence[LabelledRun], protocol: str, name: str, title: str,
              compare: Callable[[Values, Values], PairedDifference], against: Callable[[LabelledRun], bool]) -> Table:
    """SPHERE's arms beside others of their experiments, case by case."""
    experiments: defaultdict[tuple[object, ...], list[tuple[LabelledRun, Measurement]]] = defaultdict(list)
    for arm in arms:
        run, after = arm.run, arm.run.after(protocol)
        if after is not None:
            experiments[run.model, run.dataset, run.draw, run.base, after.num_edits].append((arm, after))
    rows: list[tuple[Cell, ...]] = []
    for members in experiments.values():
        for arm, after in members:
            for other, _ in members:
                if arm.run.variant == SPHERE and against(other) and arm.run.shares_settings(other.run):
                    scores = _scores(arm, after, protocol), _scores(other, after, protocol)
                    found = [_paired(*scores, metric, compare) for metric in METRIC_NAMES]
                    if any(cell is not None for cell in found):
                        rows.append((*who(arm), other.label, after.num_edits, *found))
    return Table(name, title, (*WHO, Column("against"), Column("edits"), *(Column(metric) for metric in METRIC_NAMES)),
                 tuple(rows), f"Protocol `{protocol}`, on the cases that both runs scored, with a 95% interval "
                              "(bootstrap over pairs).")


def _scores(arm: LabelledRun, point: Measurement, protocol: str) -> Mapping[CaseId, Mapping[str, float]]:
    try:
        return arm.run.scores(point.when, point.num_edits, protocol)
    except ValueError as error:
        logger.warning("left out of comparisons: %s", error)
        return {}


def _paired(ours: Mapping[CaseId, Mapping[str, float]], theirs: Mapping[CaseId, Mapping[str, float]], metric: str,
            compare: Callable[[Values, Values], PairedDifference]) -> PairedDifference | None:
    shared = [case for case, scores in ours.items() if metric in scores and metric in theirs.get(case, {})]
    if not shared:
        return None
    scale = 100.0 if metric in _SHARES else 1.0
    left, right = (scale * np.array([scores[case][metric] for case in shared]) for scores in (ours, theirs))
    return compare(left, right)


def abilities_table(arms: Sequence[LabelledRun]) -> Table:
    """General abilities by number of edits: a row a run and point, a column a task."""
    points = [(arm, point) for arm in arms for point in sorted(arm.run.abilities, key=lambda point: point.num_edits)]
    tasks = sorted({task for _, point in points for task in point.abilities})
    rows = tuple((*who(arm), point.num_edits, *(point.abilities.get(task) for task in tasks)) for arm, point in points)
    protocols = sorted({point.protocol for _, point in points})
    return Table("abilities", "General abilities", (*WHO, Column("edits"), *(Column(task) for task in tasks)), rows,
                 f"Protocol: {'; '.join(protocols)}." if protocols else "")
