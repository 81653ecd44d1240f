"""Finds prompts that are edited to different targets, which contradict each other."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Sequence

from .requests import EditRequest

logger = logging.getLogger(__name__)

_MAX_LISTED = 5  # prompts listed in the warning


def normalised(text: str) -> str:
    """Text for comparison: case-folded, in NFC, with whitespace collapsed and stripped."""
    folded = unicodedata.normalize("NFD", text).casefold()  # canonical caseless matching, Unicode's D145
    return " ".join(unicodedata.normalize("NFC", folded).split())


def groups_of_equals(keys: Iterable[object]) -> list[list[int]]:
    """Indices of each group of two or more equal keys."""
    groups: dict[object, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return [group for group in groups.values() if len(group) > 1]


def contradictions(prompts: Iterable[str], targets: Iterable[str]) -> list[list[int]]:
    """Indices of each group of equal prompts with different targets, compared as ``normalised``."""
    compared = [normalised(target) for target in targets]
    return [group for group in groups_of_equals(map(normalised, prompts))
            if len({compared[index] for index in group}) > 1]


def warn_of_contradictions(requests: Sequence[EditRequest]) -> None:
    """Log a warning with the prompts of a batch that are edited to different targets."""
    groups = contradictions((request.prompt for request in requests), (request.target for request in requests))
    if not groups:
        return
    listed = ["{!r} to {}".format(requests[group[0]].prompt, " and ".join(
        f"{requests[i].target.strip()!r} (case_id {requests[i].case_id})" for i in group))
        for group in groups[:_MAX_LISTED]]
    if len(groups) > _MAX_LISTED:
        listed.append(f"and {len(groups) - _MAX_LISTED} more")
    logger.warning("the batch edits one prompt to different targets, of which at most one can hold: %s",
                   "; ".join(listed))
