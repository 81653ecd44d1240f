"""Relative gain of one run over another on the same cases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sphere_easyedit.evaluation.bootstrap import percentile_interval
from sphere_easyedit.evaluation.paired import PairedDifference, Values, paired_values


def paired_gain(a: Values, b: Values, seed: int = 0, resamples: int = 10_000) -> PairedDifference:
    """Relative gain ``100 (mean a / mean b - 1)`` in percent, with a 95% interval as in ``paired_bootstrap``.

    It is nan where b's mean is 0; the interval alone is None where resamples in which b's mean is 0 reach into it.

    Args and raises: as ``paired_bootstrap``.
    """
    left, right = paired_values(a, b)

    def gains(drawn: NDArray[Any]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = 100 * (left[drawn].mean(axis=1) / right[drawn].mean(axis=1) - 1)
        return found

    n, base = len(left), float(right.mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = percentile_interval(gains, n, seed, resamples)
    if base == 0:
        return PairedDifference(math.nan, None, n)
    interval = (low, high) if n > 1 and np.isfinite([low, high]).all() else None
    return PairedDifference(100 * (float(left.mean()) / base - 1), interval, n)
