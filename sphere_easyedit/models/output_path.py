"""How a block's output depends on the output of the linear map that is edited: scaled, gated or normalised.

An edit should change the residual stream at a token by a given vector, and writes into a linear map inside the block
(the down-projection of its feed-forward network). Most decoders add that map's output to the stream unchanged. Others
multiply it by a constant (Granite, Falcon-H1), normalise it first (Gemma 2 and 3, OLMo 2 and 3), normalise the sum
(post-norm blocks), or multiply it by a factor that depends on the token (shared experts). The papers of MEMIT and
AlphaEdit, and EasyEdit's executors, treat only the first case.

With ``y`` the map's output and ``h`` the block's output at a token:

- ``Scaled``: ``h = h0 + c * y``, one ``c`` for all tokens (1 in most models);
- ``Gated``: ``h = h0 + c * y`` with ``c`` depending on the token;
- ``Normalised``: ``h = h0 + c * norm(u)`` with ``u = u0 + b * y``, by a module that is an RMS or layer norm.

``output_path_discovery`` finds which of them holds. Shape legend: B rows of T tokens; n tokens; d the width of the
residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .architecture import EditableModel
from .block_probe import BlockProbe, probe_step
from .replay import as_rows, first_input

# Halvings of the bracket of a Lagrange multiplier: to the last bit of float64.
_HALVINGS = 100


class OutputPath(Protocol):
    """The path from the edited map's output to the block's output."""

    def observe(self, editable: EditableModel, layer: int, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Run the block, and record the state of each token that the other methods need.

        Args:
            run: runs block ``layer`` on B rows of T tokens.

        Returns:
            The block's output ``(B, T, d)`` and the state ``(B, T, k)``; k may be 0.
        """

    def input_change(self, state: Tensor, output_change: Tensor) -> Tensor:
        """Change ``(n, d)`` of the map's output that changes the block's output by ``output_change`` ``(n, d)``.

        Args:
            state: ``(n, k)``, as ``observe`` recorded it at these tokens.
        """

    def output_change(self, state: Tensor, input_change: Tensor) -> Tensor:
        """Change ``(n, d)`` of the block's output that a change ``(n, d)`` of the map's output makes."""


@dataclass(frozen=True)
class Scaled:
    """``h = h0 + factor * y``; ``factor`` is ``(1,)`` or ``(d,)``, or None for 1."""

    factor: Tensor | None = None

    def observe(self, editable: EditableModel, layer: int, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        output = run()
        return output, output.new_empty(*output.shape[:2], 0)

    def input_change(self, state: Tensor, output_change: Tensor) -> Tensor:
        """``output_change`` itself if the factor is 1."""
        return output_change if self.factor is None else output_change / self.factor.to(output_change)

    def output_change(self, state: Tensor, input_change: Tensor) -> Tensor:
        return input_change if self.factor is None else input_change * self.factor.to(input_change)


@dataclass(frozen=True)
class Gated:
    """``h = h0 + c * y`` with a factor ``c`` that depends on the token; the state is ``c``.

    Attributes:
        by_channel: each channel has its own factor.
    """

    by_channel: bool

    def observe(self, editable: EditableModel, layer: int, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Runs the block twice."""
        probe = BlockProbe(editable, layer, run)
        first = probe.run()
        step = probe_step(first, 0)
        factors = (probe.run(step).output - first.output).float() / step.float()
        return first.output, factors if self.by_channel else factors.mean(dim=-1, keepdim=True)

    def input_change(self, state: Tensor, output_change: Tensor) -> Tensor:
        return output_change / state.to(output_change)

    def output_change(self, state: Tensor, input_change: Tensor) -> Tensor:
        return input_change * state.to(input_change)


@dataclass(frozen=True)
class Normalised:
    """``h = h0 + norm(u)`` with ``u = u0 + before * y``; the state is ``u``.

    ``norm(u) = gains * (u - mean(u)) / sqrt(mean square + eps) + bias``; an RMS norm does not subtract the mean.

    Attributes:
        module: name of the norm within the block.
        gains: ``(d,)`` float64, times any constant that multiplies the norm's output on its way to ``h``.
        centred: the norm subtracts the mean.
        eps: added to the mean square.
        before: ``(1,)`` or ``(d,)`` float64.
    """

    module: str
    gains: Tensor
    centred: bool
    eps: float
    before: Tensor

    def observe(self, editable: EditableModel, layer: int, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        inputs: list[Tensor] = []
        norm = editable.block(layer).get_submodule(self.module)
        handle = norm.register_forward_pre_hook(lambda _module, args, kwargs: inputs.append(first_input(args, kwargs)),
                                                with_kwargs=True)
        try:
            output = run()
        finally:
            handle.remove()
        return output, as_rows(inputs[-1], output.shape[0], output.shape[1], self.module)

    @torch.no_grad()
    def input_change(self, state: Tensor, output_change: Tensor) -> Tensor:
        """Of all changes that keep the length of ``u``, the one whose effect is nearest to ``output_change``.

        The norm depends on the direction of ``u`` alone. With ``v`` the normalised ``u``, that is
        ``min |gains * v - target|`` over vectors of the length of ``v`` (and of mean 0 if the norm subtracts it),
        solved by ``v = (gains * target - nu) / (gains^2 + mu)``. ``mu``, above minus the smallest eigenvalue of
        ``diag(gains^2)`` on these vectors, is found by halving, since ``|v|`` falls with it.
        """
        u = state.double()
        gains, before = self.gains.to(u.device), self.before.to(u.device)
        centred, scale = self._centred_and_scale(u)
        v = centred / scale
        length = v.norm(dim=1, keepdim=True)
        target = gains * v + output_change.to(u)

        def nearest(mu: Tensor) -> Tensor:
            weights = 1.0 / (gains.square() + mu)
            free = gains * target * weights
            if not self.centred:
                return free
            return free - weights * (free.sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True))

        low = -self._smallest_eigenvalue().to(u.device).expand(len(u), 1)
        high = (gains * target).norm(dim=1, keepdim=True) / length.clamp_min(torch.finfo(u.dtype).tiny)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            too_long = nearest(middle).norm(dim=1, keepdim=True) > length
            low, high = torch.where(too_long, middle, low), torch.where(too_long, high, middle)
        solution = nearest(high)
        solution = solution * (length / solution.norm(dim=1, keepdim=True))  # exactly, even if no mu gives that length
        change: Tensor = scale * (solution - v) / before
        return change.to(output_change)

    def output_change(self, state: Tensor, input_change: Tensor) -> Tensor:
        u = state.double()

        def normalised(u: Tensor) -> Tensor:
            centred, scale = self._centred_and_scale(u)
            return centred / scale

        moved = normalised(u + self.before.to(u.device) * input_change.double()) - normalised(u)
        return (self.gains.to(u.device) * moved).to(input_change)

    def nearest_output_change(self, state: Tensor, output_change: Tensor) -> Tensor:
        """The change ``(n, d)`` of the block's output nearest to a given one that some change of ``y`` makes."""
        state = state.to(output_change.device)
        return self.output_change(state, self.input_change(state, output_change))

    def _centred_and_scale(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """``u`` without its mean if the norm subtracts it, and what the norm divides it by, ``(n, 1)``."""
        centred = u - u.mean(dim=1, keepdim=True) if self.centred else u
        return centred, (centred.square().mean(dim=1, keepdim=True) + self.eps).sqrt()

    def _smallest_eigenvalue(self) -> Tensor:
        """The smallest eigenvalue ``(1,)`` of ``diag(gains^2)`` on the vectors that a normalised input can be.

        If the norm subtracts the mean, it is the root of ``sum 1 / (gains^2 - x)`` between the two smallest
        ``gains^2``.
        """
        squares = self.gains.square().sort().values
        low, high = squares[:1], squares[1:2]
        if not self.centred:
            return low
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            below = (1.0 / (squares - middle)).sum() < 0.0
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return low
