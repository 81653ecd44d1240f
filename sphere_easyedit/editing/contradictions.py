"""Find prompts that are edited to several targets, of which at most one can hold."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Sequence

from .requests import EditRequest

logger = logging.getLogger(__name__)

_NAMED = 5  # prompts that the warning names


def normalised(text: str) -> str:
    """Text as it is compared here: without case, in Unicode's NFC, one space for any whitespace and none around it."""
    folded = unicodedata.normalize("NFD", text).casefold()  # canonical caseless matching, Unicode's D145
    return " ".join(unicodedata.normalize("NFC", folded).split())


def groups_of_equals(keys: Iterable[object]) -> list[list[int]]:
    """Positions of equal keys, where there are two or more."""
    found: dict[object, list[int]] = {}
    for position, key in enumerate(keys):
        found.setdefault(key, []).append(position)
    return [group for group in found.values() if len(group) > 1]


def contradictions(prompts: Iterable[str], targets: Iterable[str]) -> list[list[int]]:
    """Positions of prompts that are the same while their targets are not, both compared as ``normalised``."""
    said = [normalised(target) for target in targets]
    return [group for group in groups_of_equals(map(normalised, prompts))
            if len({said[position] for position in group}) > 1]


def warn_of_contradictions(requests: Sequence[EditRequest]) -> None:
    """Log the prompts of a batch that are edited to several targets, with their cases."""
    found = contradictions((request.prompt for request in requests), (request.target for request in requests))
    if not found:
        return
    named = ["{!r} to {}".format(requests[group[0]].prompt, " and ".join(
        f"{requests[place].target.strip()!r} (case_id {requests[place].case_id})" for place in group))
        for group in found[:_NAMED]]
    if len(found) > _NAMED:
        named.append(f"and {len(found) - _NAMED} more")
    logger.warning("the batch edits one prompt to different targets, of which at most one can hold: %s",
                   "; ".join(named))
