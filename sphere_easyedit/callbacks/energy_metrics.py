"""Joins hyperspherical energy with EasyEdit's metrics by case, and correlates the two over batches.

EasyEdit's metrics are a list with one dict per case, in the order of editing: ``{"case_id", "requested_rewrite", "pre":
{...}, "post": {...}}``. Cases are identified by position, since ``batch_edit`` restarts ``case_id`` in every batch. A
case belongs to the first energy record after its edit; with ``every`` above 1 that may be batches later.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any, Final

import numpy as np

# Means and differences closer than this, relative to their operands, are ties: accuracies have many ties, which
# rounding in float64 would break (0.2 - 0.1 and 0.3 - 0.2).
_ROUNDING: Final = 1e-13


@dataclass(frozen=True)
class EnergyRecord:
    """Hyperspherical energy (Eq. 5) of tracked layers after ``num_edits`` edits, and its change since the first."""

    num_edits: int
    energy: dict[int, float]
    relative_change: dict[int, float]


@dataclass(frozen=True)
class Spearman:
    """Spearman's rank correlation of ``n`` points, -1 to 1, and its two-sided p-value.

    Both are nan for fewer than 3 points, and if a series is constant or holds a nan.
    """

    rho: float
    p: float
    n: int


@dataclass(frozen=True)
class MetricCorrelation:
    """Correlation of a metric with hyperspherical energy.

    Attributes:
        energy: over batches (the paper's Figure 2).
        change: of the differences between consecutive batches (Figure 3).
    """

    energy: Spearman
    change: Spearman


def correlate(records: Sequence[EnergyRecord], every: int, metrics: list[dict[str, Any]]
              ) -> dict[str, MetricCorrelation]:
    """``HETracker.correlation`` for these records.

    Raises:
        ValueError: as ``owners``, or the records have no layers.
    """
    owned = owners(records, every, metrics)
    if not records[-1].relative_change:
        raise ValueError("the tracker recorded 0 layers: give it some, or None for all that are edited")
    energies = [_mean(list(record.relative_change.values())) for record in records]
    values: dict[str, dict[int, list[float]]] = {}
    for entry, owner in zip(metrics, owned, strict=True):
        if owner is None:
            continue
        for name, value in _leaves(entry.get("post")):
            by_record = values.setdefault(name, {})
            if not math.isnan(value):
                by_record.setdefault(owner, []).append(value)
    return {name: _correlation([energies[owner] for owner in by_record], [_mean(v) for v in by_record.values()])
            for name, by_record in values.items()}


def owners(records: Sequence[EnergyRecord], every: int, metrics: list[dict[str, Any]]) -> list[int | None]:
    """Index of the record of each entry of ``metrics``; None for cases after the last record.

    Raises:
        ValueError: ``metrics`` is not a list of dicts, there is no record of a batch, or the number of entries differs
            from the number of recorded edits. With ``every`` above 1 there may be more entries, after the last record.
    """
    remedy = "give EasyEdit's list with one dict a case, the first of the three that edit and batch_edit return"
    if not isinstance(metrics, list):
        raise ValueError(f"metrics is a {type(metrics).__name__}: {remedy}")
    for i, entry in enumerate(metrics):
        if not isinstance(entry, dict):
            raise ValueError(f"metrics[{i}] is a {type(entry).__name__}: {remedy}")
    if len(records) < 2:
        raise ValueError(f"the tracker has {len(records)} records, none of them after a batch: have it watch the run "
                         f"that made the metrics, with every ({every}) not above the number of batches")
    first, last = records[0].num_edits, records[-1].num_edits
    edits = last - first
    if len(metrics) < edits or (len(metrics) > edits and every == 1):
        raise ValueError(f"metrics has {len(metrics)} entries, the tracker recorded {edits} edits (from {first} to "
                         f"{last}): give the metrics of the whole run that it watched, and of no other")
    ends = [record.num_edits for record in records[1:]]
    found = [bisect_left(ends, first + i + 1) + 1 for i in range(len(metrics))]
    return [index if index < len(records) else None for index in found]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Dotted path and value of each metric in a phase's dict."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            # Outputs are token ids, not metrics.
            if key != "metric_meta" and not str(key).endswith("_output"):
                yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif name and (numbers := _numbers(value)):
        yield name, _mean(numbers)


def _numbers(value: Any) -> list[float]:
    """Numbers in a number or a nested list; empty if any part is empty or not a number."""
    if isinstance(value, (Real, np.bool_)):
        return [float(value)]
    if not isinstance(value, (list, tuple)):
        return []
    parts = [_numbers(part) for part in value]
    return [number for part in parts for number in part] if all(parts) else []


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _correlation(energies: list[float], values: list[float]) -> MetricCorrelation:
    """Of two series over the same batches, in order."""
    return MetricCorrelation(_spearman(_levels(energies), _levels(values)),
                             _spearman(_differences(energies), _differences(values)))


def _levels(values: list[float]) -> list[float]:
    return _with_ties(values, [abs(value) for value in values])


def _differences(values: list[float]) -> list[float]:
    return _with_ties([after - before for before, after in pairwise(values)],
                      [max(abs(before), abs(after)) for before, after in pairwise(values)])


def _with_ties(values: list[float], sizes: list[float]) -> list[float]:
    """``values``, with those that differ only by rounding made equal; ``sizes``: magnitudes of their operands."""
    tied = list(values)
    for lower, upper in pairwise(sorted(range(len(values)), key=values.__getitem__)):
        distance = values[upper] - values[lower]
        if math.isfinite(distance) and distance <= _ROUNDING * (sizes[lower] + sizes[upper]):
            tied[upper] = tied[lower]
    return tied


def _spearman(left: list[float], right: list[float]) -> Spearman:
    if len(left) < 3 or len(set(left)) == 1 or len(set(right)) == 1:
        return Spearman(math.nan, math.nan, len(left))
    from scipy.stats import spearmanr  # takes a second to import, and an edit does without

    result = spearmanr(left, right)
    return Spearman(float(result.statistic), float(result.pvalue), len(left))
