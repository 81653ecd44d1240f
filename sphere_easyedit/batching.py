"""Which rows of tokens go through a model together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from .models import max_positions, text_config

# A batch costs about as much as so many tokens besides its own, as a share of the most that are run at once.
_OVERHEAD = 16


def kind_by_length(config: PretrainedConfig) -> Callable[[int], int]:
    """A function from a row's number of tokens to its kind: rows may share a batch if they are of one kind.

    Rotary embeddings of the types ``longrope`` (one set of frequencies up to a limit, another beyond it) and
    ``dynamic`` (one set for each length beyond a limit) choose their frequencies by the longest row of a batch. Rows of
    one kind get the frequencies that each of them gets alone. A longer row's kind is never smaller. Models with other
    rotary embeddings, or without, have one kind, 0.
    """
    config = text_config(config)
    limits: set[int] = set()
    grows = False
    for rope in _rope_settings(config):
        name = str(rope.get("rope_type", rope.get("type")))
        if name in {"longrope", "su"} or "dynamic" in name:
            grows |= "dynamic" in name
            # Releases of transformers differ in which of these is the limit. A wrong one only makes batches smaller.
            found = (rope.get("original_max_position_embeddings"), max_positions(config),
                     getattr(config, "original_max_position_embeddings", None))
            limits |= {int(limit) for limit in found if limit}

    def kind(length: int) -> int:
        passed = sum(length > limit for limit in limits)
        return length if passed and grows else passed

    return kind


def _rope_settings(config: PretrainedConfig) -> list[dict[str, Any]]:
    """A config's settings of rotary embeddings, of which there may be some for each type of layer."""
    found = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]  # of transformers 5 and 4
    settings = [rope for rope in found if isinstance(rope, dict)]
    return settings + [inner for rope in settings for inner in rope.values() if isinstance(inner, dict)]


def of_one_kind(lengths: Sequence[int], kind: Callable[[int], int]) -> list[list[int]]:
    """Indices of rows in groups whose rows may run together (see ``kind_by_length``), each in ascending order."""
    groups: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        groups.setdefault(kind(length), []).append(index)
    return list(groups.values())


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
