"""Presets of the target-value optimisation: what ``speed`` stands for.

``exact`` optimises as EasyEdit does. The others take one context a step in turn, and few steps along normalised
gradients in place of Adam's 25; ``fast`` computes in bfloat16, too. docs/howto/speed.md has what they cost in quality.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from .utils.messages import nearest

SpeedName = Literal["exact", "balanced", "fast"]

SPEEDS: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "exact": {"contexts_per_step": None, "target_dtype": None, "normalised_steps": None},
    "balanced": {"contexts_per_step": 1, "target_dtype": None, "normalised_steps": 11},
    "fast": {"contexts_per_step": 1, "target_dtype": "bfloat16", "normalised_steps": 9},
})
SPEED_FIELDS = tuple(SPEEDS["exact"])


def with_speed(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of hyperparameters with ``speed`` replaced by the values it stands for, but for those that are given.

    Raises:
        ValueError: there is no such speed.
    """
    given = dict(mapping)
    speed = given.pop("speed", None)
    if speed is None:
        return given
    if not isinstance(speed, str) or speed not in SPEEDS:
        near = nearest(str(speed), SPEEDS)
        raise ValueError(f"speed is {speed!r} but must be {', '.join(SPEEDS)}" + (f": did you mean {near[0]!r}?"
                                                                                 if near else ""))
    return {**SPEEDS[speed], **given}
