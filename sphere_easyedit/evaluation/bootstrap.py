"""Means over cases with intervals by bootstrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypedDict

import numpy as np
from numpy.typing import NDArray

_BLOCK_DRAWS: Final = 2**18  # drawn at once: 3 MB of indices and values, which stay in caches


class MetricSummary(TypedDict):
    """One metric over all cases that have it; None where no case has it."""

    mean: float | None
    ci95: list[float] | None
    n: int


def summary_of(values: Sequence[float | None], scale: float = 1.0, seed: int = 0, resamples: int = 1000
               ) -> MetricSummary:
    """Mean of the values that are there, times ``scale``, with its 95% interval.

    Args:
        values: one a case; None where a case has none.
        scale: 100 for percent.
        seed, resamples: see :func:`bootstrap_interval`.

    Raises:
        ValueError: resamples is below 1.
    """
    there = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(there):
        return {"mean": None, "ci95": None, "n": 0}
    low, high = bootstrap_interval(there, seed, resamples)
    return {"mean": scale * float(there.mean()), "ci95": [scale * low, scale * high], "n": len(there)}


def bootstrap_interval(values: NDArray[np.float64], seed: int = 0, resamples: int = 1000) -> tuple[float, float]:
    """The 2.5th to the 97.5th percentile of the means of ``values`` drawn anew with replacement.

    Memory is bounded, whatever ``resamples`` and the number of values.

    Args:
        values: ``(n,)``, at least one.
        seed: of the drawing; the same seed gives the same interval.
        resamples: how many times they are drawn anew.

    Raises:
        ValueError: resamples is below 1.
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: give 1 or more")
    generator = np.random.default_rng(seed)
    n = len(values)
    rows = max(1, _BLOCK_DRAWS // n)
    means = [values[generator.integers(0, n, (min(rows, resamples - start), n), dtype=np.int32)].mean(axis=1)
             for start in range(0, resamples, rows)]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(low), float(high)
