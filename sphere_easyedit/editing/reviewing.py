"""Callbacks reviewing a batch that has just been written: how much of its change may stand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .callbacks import EditCallback, EditEvent

_REVIEWS = 20  # times that a callback may have one batch lowered


def reviewed(event: EditEvent, callbacks: Sequence[EditCallback], before: Mapping[int, Tensor],
             weights: Callable[[], Mapping[int, Tensor]], scale_back: Callable[[float], None]) -> EditEvent:
    """The event once every callback lets the batch's change stand, which is scaled back until they do.

    Args:
        event: of the batch's end, with its weights in place.
        callbacks: whose ``review`` is asked.
        before: the weights ``(d_out, d_in)`` before the batch, by layer.
        weights: looks them up as they stand.
        scale_back: keeps a share of the change.

    Raises:
        ValueError: a callback returns no share, or is not content with 20 of them.
    """
    for callback in callbacks:
        for _ in range(_REVIEWS):
            share = callback.review(event)
            if not 0.0 < share <= 1.0:  # nan is none either
                raise ValueError(f"{type(callback).__name__}.review returned {share}: give above 0 and at most 1, or "
                                 "raise to undo the batch")
            if share == 1.0:
                break
            scale_back(share)
            now = weights()
            event = replace(event, weights=now, update_norms=change_norms(now, before),
                            strength=event.strength * share)
        else:
            raise ValueError(f"{type(callback).__name__}.review had a batch's change lowered {_REVIEWS} times, to "
                             f"{event.strength:g} of it, and wants less still: raise to undo the batch")
    return event


def change_norms(weights: Mapping[int, Tensor], before: Mapping[int, Tensor]) -> dict[int, float]:
    """Frobenius norm of each layer's change, summed in float64 where the weight is."""
    return {layer: float((weights[layer].double() - was.to(weights[layer].device).double()).norm())
            for layer, was in before.items()}


def partway(start: Tensor, end: Tensor, share: float) -> Tensor:
    """``start + share * (end - start)``, in float32 at least and rounded once."""
    precise = torch.promote_types(end.dtype, torch.float32)
    return torch.lerp(start.to(precise), end.to(precise), share).to(end.dtype)
