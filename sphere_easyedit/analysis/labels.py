"""Order and labels of runs in tables and figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from ..runs.records import SPHERE, RunRecords

DATASET_TITLES: Final = MappingProxyType({"counterfact": "CounterFact", "zsre": "ZsRE"})


@dataclass(frozen=True)
class LabelledRun:
    """A run and its label: the method, with the directory's name added if several runs share the method."""

    label: str
    run: RunRecords


def labelled_runs(runs: Iterable[RunRecords]) -> list[LabelledRun]:
    """Label runs, ordered by model, data set, seed, base method and variant (plain, SPHERE, controls)."""
    ordered = sorted(runs, key=lambda run: (run.model, run.dataset, -1 if run.seed is None else run.seed,
                                            -1 if run.order_seed is None else run.order_seed, run.base,
                                            _rank(run.variant), run.variant or "", run.name))
    counts = Counter((run.model, run.dataset, run.draw, run.method) for run in ordered)
    return [LabelledRun(run.method if counts[run.model, run.dataset, run.draw, run.method] == 1
                else f"{run.method} ({run.name})", run) for run in ordered]


def dataset_title(dataset: str) -> str:
    """A data set's name for display."""
    return DATASET_TITLES.get(dataset, dataset)


def _rank(variant: str | None) -> int:
    return 0 if variant is None else 1 if variant == SPHERE else 2
