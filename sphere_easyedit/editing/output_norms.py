"""From a wanted change of the residual stream to the change of a down-projection's output that makes it.

In most decoders the two are the same. Granite multiplies the output on its way; Gemma 2 and 3 and OLMo 2 normalise it
first, to lengths that may be hundreds of times its own, so a change of the stream written into the weight as it is
would drown the output. MEMIT's and AlphaEdit's papers know neither, and EasyEdit's executors don't either.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..models import EditableModel

# Halvings of the bracket of the multiplier: to the last bit of float64.
_HALVINGS = 100


def ahead_of_stream(editable: EditableModel, layer: int, values: Tensor, wanted: Tensor) -> Tensor:
    """Changes ``(n, d_out)`` of a layer's down-projection outputs that change the residual stream as wanted.

    Args:
        editable: the model.
        layer: number of the block.
        values: ``(n, d_out)`` the outputs as they are.
        wanted: ``(n, hidden_size)`` change of the residual stream; ``d_out`` is ``hidden_size``.

    Returns:
        The changes, on ``wanted``'s device; ``wanted`` itself where nothing lies between output and stream. Where a
        normalisation does, no output may reach the stream that is wanted: then the one that comes nearest.
    """
    multiplier = editable.residual_multiplier
    scaled = wanted if multiplier == 1.0 else wanted / multiplier
    norm = editable.output_norm(layer)
    return scaled if norm is None else _ahead_of_norm(norm, values.to(editable.device(layer)), scaled)


@torch.no_grad()
def _ahead_of_norm(norm: nn.Module, values: Tensor, wanted: Tensor) -> Tensor:
    """``norm(y) = g * y / rms(y)`` moves with the direction of ``y`` alone, so of all outputs of the length that
    ``y`` has, take the one whose normalised form is nearest to ``norm(y) + wanted``.

    With ``y = rms(y) u`` that is ``min |g * u - t|`` over ``|u|^2 = d``, solved by ``u = g t / (g^2 + m)``; ``m``,
    above ``-min g^2``, is found by halving, since ``|u|`` falls with it.
    """
    y, d = values.double(), values.shape[1]
    gains: Tensor = norm(torch.full_like(values[0], 1e3)).to(y)  # of rms 1000, beside which its epsilon is nothing
    target: Tensor = norm(values).to(y) + wanted.to(y)

    def direction(multiplier: Tensor) -> Tensor:
        return gains * target / (gains.square() + multiplier)

    low = -gains.square().min().expand(len(y), 1)
    high = (gains * target).norm(dim=1, keepdim=True) / math.sqrt(d)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        too_long = direction(middle).square().sum(dim=1, keepdim=True) > d
        low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
    u = direction(high)
    u = u * (math.sqrt(d) / u.norm(dim=1, keepdim=True))  # exactly, also where no multiplier gives that length
    change: Tensor = y.square().mean(dim=1, keepdim=True).sqrt() * u - y
    return change.to(wanted.device, wanted.dtype)
