"""Means over cases with intervals by bootstrap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, TypedDict

import numpy as np
from numpy.typing import NDArray

_BLOCK_DRAWS: Final = 2**18  # drawn at once: 3 to 6 MB of indices and values, which stay in caches


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
    """The 2.5th to the 97.5th percentile of the means of ``values`` resampled with replacement.

    Memory is bounded, whatever ``resamples`` and the number of values.

    Args:
        values: ``(n,)``, at least one.
        seed: of the drawing; the same seed gives the same interval.
        resamples: how many times they are drawn anew.

    Raises:
        ValueError: resamples is below 1.
    """
    return percentile_interval(lambda drawn: values[drawn].mean(axis=1), len(values), seed, resamples, np.int32)


def percentile_interval(statistic: Callable[[NDArray[Any]], NDArray[np.float64]], n: int, seed: int, resamples: int,
                        dtype: type[np.integer[Any]] = np.int64) -> tuple[float, float]:
    """The 2.5th to the 97.5th percentile of a statistic over resamples of n observations.

    Args:
        statistic: of indices ``(resamples, n)``, a value for each resample; nan or infinite values may come out.
        n: observations.
        seed, resamples: see :func:`bootstrap_interval`.
        dtype: of the indices; the two integer types draw differently.

    Raises:
        ValueError: resamples is below 1.
    """
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: give 1 or more")
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK_DRAWS // n)
    values = [statistic(generator.integers(0, n, (min(rows, resamples - start), n), dtype=dtype))
              for start in range(0, resamples, rows)]
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return float(low), float(high)
