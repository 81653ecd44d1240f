"""Differences between two runs that were measured on the same cases (or seeds), with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .bootstrap import bootstrap_interval

Values = Sequence[float | None] | NDArray[np.float64]


@dataclass(frozen=True)
class PairedDifference:
    """Difference between run a and run b over ``n`` pairs.

    Attributes:
        mean: mean of ``a - b`` in the units of the input, or as documented by the function that returns it.
        ci95: 95% interval by bootstrap over pairs (percentiles 2.5 and 97.5); None for a single pair, which has
            no spread.
        n: pairs of which both values are there.
    """

    mean: float
    ci95: tuple[float, float] | None
    n: int


def paired_bootstrap(a: Values, b: Values, seed: int = 0, resamples: int = 10_000) -> PairedDifference:
    """Mean of ``a - b`` with a 95% interval: pairs are resampled with replacement, so what both share cancels.

    Memory is bounded, whatever ``resamples`` and the number of pairs.

    Args:
        a, b: ``(pairs,)`` values of the two runs in the same order. A pair with None or nan in it is left out.
        seed: of the resampling; the same seed gives the same interval.
        resamples: how many times the pairs are drawn anew.

    Raises:
        ValueError: the two differ in length or aren't 1-D, a value is infinite, no pair has both values, or
            resamples is below 1.
    """
    left, right = paired_values(a, b)
    differences = left - right
    interval = bootstrap_interval(differences, seed, resamples)
    return PairedDifference(float(differences.mean()), None if len(differences) == 1 else interval, len(differences))


def paired_values(a: Values, b: Values) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Both series, checked, without the pairs that miss a value."""
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.ndim != 1 or left.shape != right.shape:
        raise ValueError(f"a and b have the shapes {left.shape} and {right.shape}: give two series of the same cases, "
                         "in the same order")
    if np.isinf(left).any() or np.isinf(right).any():
        raise ValueError("a or b holds an infinite value: leave it out, with None in its place")
    there = ~(np.isnan(left) | np.isnan(right))
    if not there.any():
        raise ValueError(f"none of {len(left)} pairs has both values: compare runs that share cases and metrics")
    return left[there], right[there]
