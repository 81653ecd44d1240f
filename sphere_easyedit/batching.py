"""Which rows of tokens go through a model together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A batch costs about as much as so many tokens besides its own, as a share of the most that are run at once.
_OVERHEAD = 16


def padded_batches(
    lengths: Sequence[int],
    token_budget: int,
    costs: Sequence[int] | None = None,
    cost_budget: int = 0,
) -> list[list[int]]:
    """Indices of rows in batches of like length, cut so that padding and the number of batches cost least.

    Batches come longest first: one that does not fit in memory fails at once.

    Args:
        lengths: tokens of each row.
        token_budget: most tokens of a batch, padding included. A longer row is a batch of its own.
        costs: for each row, of whatever else a batch must not have too much; a dearer row is a batch of its own.
        cost_budget: most of it in a batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    widths = np.array([lengths[index] for index in order])
    spent = np.cumsum([0] + [0 if costs is None else costs[index] for index in order])
    # Shortest path over where to cut: best[stop] is the least cost of the first `stop` rows in order.
    best = np.zeros(len(order) + 1)
    cuts = [0] * len(best)
    first = 0  # where a batch up to `stop` may begin at the earliest
    for stop in range(1, len(best)):
        while first < stop - 1 and (
            widths[first] * (stop - first) > token_budget or spent[stop] - spent[first] > cost_budget
        ):
            first += 1
        padded = widths[first:stop] * np.arange(stop - first, 0, -1)
        totals = best[first:stop] + padded + token_budget / _OVERHEAD
        cuts[stop] = first + int(totals.argmin())
        best[stop] = totals.min()
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        batches.append(order[cuts[stop] : stop])
        stop = cuts[stop]
    return batches[::-1]
