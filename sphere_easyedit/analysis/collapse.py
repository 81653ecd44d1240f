"""Finds the number of edits at which a model collapses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from ..runs.records import PAPER, RunRecords

Reason = Literal["efficacy", "perplexity"]


@dataclass(frozen=True)
class Collapse:
    """The first measurement at which a model has collapsed, and by which criterion.

    The collapse happened between the previous measurement and this one.
    """

    num_edits: int
    reasons: tuple[Reason, ...]


def collapse_point(num_edits: Sequence[int], efficacy: Sequence[float | None], perplexity: Sequence[float | None],
                   unedited_perplexity: float | None, share: float = 0.5, perplexity_factor: float = 10.0
                   ) -> Collapse | None:
    """First point where efficacy is below ``share`` of its running maximum, or perplexity above ``perplexity_factor``
    times the unedited model's; None if neither happens.

    The maximum is over the edited model's points so far. A perplexity that is nan or infinite exceeds any factor. None
    means not measured.

    Args:
        num_edits: edits at each point, increasing.
        efficacy: on all facts so far or a sample of them, in any unit.
        perplexity: on held-out text.
        unedited_perplexity: None: perplexity is not considered.
        share: in (0, 1].
        perplexity_factor: at least 1.

    Raises:
        ValueError: the series differ in length, the edits do not increase, or a threshold is out of range.
    """
    if not len(num_edits) == len(efficacy) == len(perplexity):
        raise ValueError(f"{len(num_edits)} numbers of edits, {len(efficacy)} efficacies and {len(perplexity)} "
                         "perplexities: give one of each for every point")
    if any(later <= earlier for earlier, later in pairwise(num_edits)):
        raise ValueError(f"numbers of edits {list(num_edits)} do not rise: sort the points, one for each number")
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: give one above 0, at most 1")
    if not perplexity_factor >= 1:
        raise ValueError(f"perplexity_factor is {perplexity_factor}: give 1 or more")
    best = -math.inf
    for edits, score, value in zip(num_edits, efficacy, perplexity, strict=True):
        reasons: list[Reason] = []
        if score is not None:
            best = max(best, score)
            if score < share * best:
                reasons.append("efficacy")
        if (value is not None and unedited_perplexity is not None
                and not (math.isfinite(value) and value <= perplexity_factor * unedited_perplexity)):
            reasons.append("perplexity")
        if reasons:
            return Collapse(edits, tuple(reasons))
    return None


def collapse_of(run: RunRecords, protocol: str = PAPER, share: float = 0.5, perplexity_factor: float = 10.0
                ) -> Collapse | None:
    """``collapse_point`` of a run's trajectory."""
    points, before = run.trajectory(protocol), run.before(protocol)
    efficacy = [point.metrics["efficacy"].mean if "efficacy" in point.metrics else None for point in points]
    return collapse_point([point.num_edits for point in points], efficacy, [point.perplexity for point in points],
                          None if before is None else before.perplexity, share, perplexity_factor)
