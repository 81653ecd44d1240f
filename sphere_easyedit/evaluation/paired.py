"""Differences between two runs that were measured on the same cases (or seeds), with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

_BLOCK_DRAWS: Final = 2**20  # drawn at once: 16 MB of indices and values


@dataclass(frozen=True)
class PairedDifference:
    """Mean of ``a - b`` over ``n`` pairs, in the units of the input.

    Attributes:
        mean: over the pairs.
        ci95: 95% interval by bootstrap over pairs (percentiles 2.5 and 97.5); None for a single pair, which says
            nothing about spread.
        n: pairs of which both values are there.
    """

    mean: float
    ci95: tuple[float, float] | None
    n: int


def paired_bootstrap(a: Sequence[float | None] | NDArray[np.float64], b: Sequence[float | None] | NDArray[np.float64],
                     seed: int = 0, resamples: int = 10_000) -> PairedDifference:
    """Mean of ``a - b`` with a 95% interval: pairs are drawn anew with replacement, so what both share cancels.

    Memory is bounded, whatever ``resamples`` and the number of pairs.

    Args:
        a, b: ``(pairs,)`` values of the two runs in the same order. A pair with None or nan in it is left out.
        seed: of the resampling; the same seed gives the same interval.
        resamples: how many times the pairs are drawn anew.

    Raises:
        ValueError: the two differ in length or aren't 1-D, a value is infinite, no pair has both values, or
            resamples is below 1.
    """
    left, right = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if left.ndim != 1 or left.shape != right.shape:
        raise ValueError(f"a and b have the shapes {left.shape} and {right.shape}: give two series of the same cases, "
                         "in the same order")
    if np.isinf(left).any() or np.isinf(right).any():
        raise ValueError("a or b holds an infinite value: leave it out, with None in its place")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: give 1 or more")
    differences = left - right
    differences = differences[~np.isnan(differences)]
    n = len(differences)
    if n == 0:
        raise ValueError(f"none of {len(left)} pairs has both values: compare runs that share cases and metrics")
    mean = float(differences.mean())
    if n == 1:
        return PairedDifference(mean, None, n)
    generator = np.random.default_rng(seed)
    rows = max(1, _BLOCK_DRAWS // n)
    means = np.concatenate([
        differences[generator.integers(0, n, (min(rows, resamples - start), n))].mean(axis=1)
        for start in range(0, resamples, rows)])
    low, high = np.percentile(means, [2.5, 97.5])
    return PairedDifference(mean, (float(low), float(high)), n)
