"""Groups rows of tokens into batches that run through a model together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from transformers import PretrainedConfig

from .architecture import max_positions
from .config_fields import text_config

# A batch has a fixed cost of about the token budget divided by this, besides its tokens.
_OVERHEAD = 16


def length_class(config: PretrainedConfig) -> Callable[[int], int]:
    """A function from a row's number of tokens to its length class: rows of one class may share a batch.

    Rotary embeddings of the types ``longrope`` (one set of frequencies up to a limit, another beyond it) and
    ``dynamic`` (a set for each length beyond a limit) choose their frequencies by the longest row of a batch. Rows of
    one class get the same frequencies in a batch as alone. The class never decreases with length. Models with other
    rotary embeddings, or without, have one class, 0.
    """
    config = text_config(config)
    limits: set[int] = set()
    grows = False
    for rope in _rope_settings(config):
        name = str(rope.get("rope_type", rope.get("type")))
        if name in {"longrope", "su"} or "dynamic" in name:
            grows |= "dynamic" in name
            # Which of these is the limit depends on the transformers release. A wrong one only makes batches smaller.
            found = (rope.get("original_max_position_embeddings"), max_positions(config),
                     getattr(config, "original_max_position_embeddings", None))
            limits |= {int(limit) for limit in found if limit}

    def kind(length: int) -> int:
        passed = sum(length > limit for limit in limits)
        return length if passed and grows else passed

    return kind


def _rope_settings(config: PretrainedConfig) -> list[dict[str, Any]]:
    """A config's settings of rotary embeddings; there may be one for each layer type."""
    found = [getattr(config, name, None) for name in ("rope_parameters", "rope_scaling")]  # of transformers 5 and 4
    settings = [rope for rope in found if isinstance(rope, dict)]
    return settings + [inner for rope in settings for inner in rope.values() if isinstance(inner, dict)]


def group_by_class(lengths: Sequence[int], kind: Callable[[int], int]) -> list[list[int]]:
    """Indices of rows grouped by length class (see ``length_class``), ascending in each group."""
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
    """Indices of rows in batches of similar length, chosen to minimise padding and the number of batches.

    The longest batch comes first, so that running out of memory shows at once.

    Args:
        lengths: tokens of each row.
        token_budget: maximal number of tokens in a batch, padding included. A longer row is a batch of its own.
        costs: another cost of each row that is limited per batch; a more expensive row is a batch of its own.
        cost_budget: maximal sum of ``costs`` in a batch.
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    widths = np.array([lengths[index] for index in order])
    spent = np.cumsum([0] + [0 if costs is None else costs[index] for index in order])
    # Dynamic programme over cuts: best[stop] is the least cost of the first `stop` rows in order.
    best = np.zeros(len(order) + 1)
    cuts = [0] * len(best)
    first = 0  # earliest start of a batch that ends at `stop`
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
