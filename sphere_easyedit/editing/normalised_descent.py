"""Gradient descent with steps of a set length, one for each edit: the other optimiser of target values."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

MOMENTUM = 0.5
LAST_LENGTH = 0.1  # of the first step's


class NormalisedDescent:
    """Moves each row of ``values`` along the running average of its normalised gradients.

    A row's step has the length that is given for it, times a factor that falls from 1 towards 0.1 along half a cosine.
    Unlike Adam, which scales every coordinate by itself, this keeps the gradient's direction; that takes fewer steps
    where the gradient's scale varies by orders of magnitude between edits and from step to step.

    Args:
        values: ``(edits, hidden_size)``, with gradients in ``grad``; changed in place.
        lengths: ``(edits, 1)``, norm of the first step.
        steps: number of steps that are planned.
    """

    def __init__(self, values: Tensor, lengths: Tensor, steps: int) -> None:
        self._values, self._lengths, self._steps = values, lengths, steps
        self._average = torch.zeros_like(values)
        self._taken = 0

    @torch.no_grad()
    def step(self) -> None:
        """Take one step; a row whose gradients were all zero stays where it is."""
        assert self._values.grad is not None
        self._average.lerp_(F.normalize(self._values.grad, dim=1), 1 - MOMENTUM)
        falling = 0.5 * (1 + math.cos(math.pi * self._taken / self._steps))
        factor = LAST_LENGTH + (1 - LAST_LENGTH) * falling
        self._values.sub_(factor * self._lengths * F.normalize(self._average, dim=1))
        self._taken += 1
