"""How a block's output depends on the output of the weight that is edited, found by running the block.

Editing wants the residual stream to change by some vector at a token and writes into a linear map inside the block
(the down-projection of its feed-forward network). In most decoders what that map puts out is added to the stream as it
is. Others multiply it by a constant (Granite, Falcon-H1), normalise it first (Gemma 2 and 3, OLMo 2 and 3), normalise
the sum (post-norm blocks), or multiply it by a gate that depends on the token (shared experts). MEMIT's and AlphaEdit's
papers know none of these, nor do EasyEdit's executors.

Nothing here knows an architecture. With ``y`` the map's output at a token, the block is run a few times with ``y``
changed, which tells whether its output ``h`` is, for that token alone,

- ``h = h0 + c * y``: straight (``c = 1``), scaled (one ``c`` for all tokens), or gated (``c`` depends on the token);
- ``h = h0 + c * norm(u)`` with ``u = u0 + b * y``: normalised, by a module that is an RMS or layer norm.

What fits neither is refused, with the numbers.

Shape legend: B rows of T tokens; n tokens looked at; d the width of the residual stream.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .architecture import EditableModel
from .replay import BlockReplay, Rows, as_rows, first_input, pad_rows

logger = logging.getLogger(__name__)

# Halvings of the bracket of a Lagrange multiplier: to the last bit of float64.
_HALVINGS = 100
# Largest relative error of what a path predicts, by whether the model is in float32 (or wider) or in half precision.
_TOLERANCE: Mapping[bool, float] = MappingProxyType({True: 1e-3, False: 5e-2})
# Factors this near to 1, or to each other, are equal: what is left is rounding.
_SAME: Mapping[bool, float] = MappingProxyType({True: 2e-5, False: 1e-2})


class OutputPath(Protocol):
    """The way from the edited map's output to the block's output."""

    def observe(self, editable: EditableModel, layer: int, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Run the block and read what ``change`` needs to know of each token.

        Args:
            run: runs block ``layer`` on B rows of T tokens.

        Returns:
            The block's output ``(B, T, d)`` and the state ``(B, T, k)``; k may be 0.
        """

    def change(self, state: Tensor, wanted: Tensor) -> Tensor:
        """Change ``(n, d)`` of the map's output that changes the block's output by ``wanted`` ``(n, d)``.

        Args:
            state: ``(n, k)``, as ``observe`` read it at these tokens.
        """

    def effect(self, state: Tensor, change: Tensor) -> Tensor:
        """What a change ``(n, d)`` of the map's output does to the block's output at these tokens."""


@dataclass(frozen=True)
class Scaled:
    """``h = h0 + factor * y``; ``factor`` ``(1,)`` or ``(d,)``, None for 1."""

    factor: Tensor | None = None

    def observe(self, editable: EditableModel, layer: int, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """See ``OutputPath``; no state is needed."""
        output = run()
        return output, output.new_empty(*output.shape[:2], 0)

    def change(self, state: Tensor, wanted: Tensor) -> Tensor:
        """See ``OutputPath``; ``wanted`` itself where the factor is 1."""
        return wanted if self.factor is None else wanted / self.factor.to(wanted)

    def effect(self, state: Tensor, change: Tensor) -> Tensor:
        """See ``OutputPath``."""
        return change if self.factor is None else change * self.factor.to(change)


@dataclass(frozen=True)
class Gated:
    """``h = h0 + c * y`` with a factor ``c`` that depends on the token; the state is ``c``.

    Attributes:
        by_channel: each channel has a factor of its own.
    """

    by_channel: bool

    def observe(self, editable: EditableModel, layer: int, run: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """See ``OutputPath``; runs the block twice."""
        probe = _Probe(editable, layer, run)
        first = probe.run()
        step = _step(first, 0)
        factors = _ratio(probe.run(step).output - first.output, step)
        return first.output, factors if self.by_channel else factors.mean(dim=-1, keepdim=True)

    def change(self, state: Tensor, wanted: Tensor) -> Tensor:
        """See ``OutputPath``."""
        factors = state.to(wanted)
        return wanted / factors

    def effect(self, state: Tensor, change: Tensor) -> Tensor:
        """See ``OutputPath``."""
        return change * state.to(change)


@dataclass(frozen=True)
class Normalised:
    """``h = h0 + norm(u)`` with ``u = u0 + before * y``; the state is ``u``.

    ``norm(u) = gains * (u - mean(u)) / sqrt(mean square + eps) + bias``; an RMS norm does not subtract the mean.

    Attributes:
        module: name of the norm within the block.
        gains: ``(d,)`` float64, with whatever the norm's output is multiplied by on its way to ``h``.
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
        """See ``OutputPath``."""
        seen: list[Tensor] = []
        norm = editable.block(layer).get_submodule(self.module)
        handle = norm.register_forward_pre_hook(lambda _module, args, kwargs: seen.append(first_input(args, kwargs)),
                                                with_kwargs=True)
        try:
            output = run()
        finally:
            handle.remove()
        return output, as_rows(seen[-1], output.shape[0], output.shape[1], self.module)

    @torch.no_grad()
    def change(self, state: Tensor, wanted: Tensor) -> Tensor:
        """See ``OutputPath``; of all changes that keep the length of ``u``, the one whose effect is nearest to
        ``wanted``.

        The norm moves with the direction of ``u`` alone. With ``v`` the normalised ``u``, that is
        ``min |gains * v - target|`` over vectors of the length of ``v`` (and of mean 0 where the norm subtracts it),
        solved by ``v = (gains * target - nu) / (gains^2 + mu)``. ``mu``, above minus the smallest eigenvalue of
        ``diag(gains^2)`` on these vectors, is found by halving, since ``|v|`` falls with it.
        """
        u = state.double()
        gains, before = self.gains.to(u.device), self.before.to(u.device)
        spread = u - u.mean(dim=1, keepdim=True) if self.centred else u
        scale = (spread.square().mean(dim=1, keepdim=True) + self.eps).sqrt()  # (n, 1)
        v = spread / scale
        length = v.norm(dim=1, keepdim=True)
        target = gains * v + wanted.to(u)

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
        found = nearest(high)
        found = found * (length / found.norm(dim=1, keepdim=True))  # exactly, also where no mu gives that length
        change: Tensor = scale * (found - v) / before
        return change.to(wanted)

    def reachable(self, state: Tensor, wanted: Tensor) -> Tensor:
        """The change ``(n, d)`` of the block's output nearest to ``wanted`` that any change of ``y`` makes."""
        state = state.to(wanted.device)
        return self.effect(state, self.change(state, wanted))

    def _smallest_eigenvalue(self) -> Tensor:
        """The smallest eigenvalue ``(1,)`` of ``diag(gains^2)`` on the vectors that a normalised input can be.

        With the mean subtracted it is the root of ``sum 1 / (gains^2 - x)`` between the two smallest ``gains^2``.
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

    def effect(self, state: Tensor, change: Tensor) -> Tensor:
        """See ``OutputPath``."""
        u = state.double()

        def normalised(u: Tensor) -> Tensor:
            spread = u - u.mean(dim=1, keepdim=True) if self.centred else u
            return spread / (spread.square().mean(dim=1, keepdim=True) + self.eps).sqrt()

        moved = normalised(u + self.before.to(u.device) * change.double()) - normalised(u)
        return (self.gains.to(u.device) * moved).to(change)


# --- finding the path ---------------------------------------------------------------------------------------


@torch.no_grad()
def find_output_paths(editable: EditableModel, prompts: Sequence[Sequence[int]]) -> dict[int, OutputPath]:
    """The output path of every edited layer, proven on these prompts.

    The blocks up to the last edited one run once, each edited block some six times more. Weights are not touched.

    Args:
        editable: the model, frozen.
        prompts: token ids.

    Raises:
        ValueError: a layer's block output does not follow from the edited map's in a way that is understood.
    """
    layers = editable.layers
    rows = pad_rows([list(prompt) for prompt in prompts], editable.input_device)
    replay = BlockReplay.record(editable, rows, layers[0], layers[-1] + 1)
    hidden, paths = replay.hidden, dict[int, OutputPath]()
    for layer, following in zip(layers, [*layers[1:], layers[-1] + 1], strict=True):
        paths[layer] = _find(editable, layer, rows, partial(replay.run, hidden, layer, layer + 1))
        hidden = replay.run(hidden, layer, following)
    kinds = {type(path).__name__.lower() for path in paths.values()
             if not (isinstance(path, Scaled) and path.factor is None)}
    if kinds:
        logger.info("the edited weights' output reaches the residual stream %s: changes are carried back through that",
                    " or ".join(sorted(kinds)))
    return paths


def _find(editable: EditableModel, layer: int, rows: Rows, run: Callable[[], Tensor]) -> OutputPath:
    probe = _Probe(editable, layer, run)
    first = probe.run()
    real = rows.attention_mask.bool().to(first.output.device) & torch.isfinite(first.output).all(dim=-1)
    if not bool(real.any()):
        raise ValueError(f"the output of {probe.block_name} is not finite before any edit: look at the model's weights")
    steps = [_step(first, seed) for seed in (0, 1)]
    runs = [probe.run(step) for step in steps]
    moved = [one.output - first.output for one in runs]
    if not any(bool(change[real].any()) for change in moved):
        raise ValueError(f"{probe.name} has no effect on the output of {probe.block_name}: correct rewrite_module_tmp "
                         "or layer_module_tmp")
    _refuse_reach(probe, first, steps[0], real)
    path: OutputPath | None
    factors = _ratio(moved[0], steps[0])
    full = first.output.element_size() >= 4
    error = _relative(moved[1][real], (factors * steps[1])[real])
    if error < _TOLERANCE[full]:
        path = _linear(factors[real], full)
    else:
        path = _find_norm(probe, first, steps, real)
        if path is None:
            raise ValueError(
                f"how {probe.name} reaches the output of {probe.block_name} is not understood: a change of its output "
                f"moves the block's by something else than a constant multiple ({error:.1%} off) or a normalisation "
                "of it. Name the last linear map of the feed-forward network in rewrite_module_tmp; if it is, this "
                "architecture can't be edited there")
    wanted = _step(first, 2)[real].float() * 0.3
    _, state = path.observe(editable, layer, run)
    change = torch.zeros_like(first.output, dtype=torch.float32)
    change[real] = path.change(state[real], wanted)
    found = (probe.run(change).output - first.output)[real]
    error = _relative(found, path.effect(state[real], change[real]))
    if not error < _TOLERANCE[full]:
        raise ValueError(f"the output of {probe.block_name} moves by something else than what is added to the output "
                         f"of {probe.name} ({error:.1%} off), so it can't be edited right: correct rewrite_module_tmp; "
                         "if it is right, this architecture is not supported")
    return path


def _linear(factors: Tensor, full: bool) -> OutputPath:
    """The path with these factors ``(n, d)``, measured at n tokens."""
    same, factors = _SAME[full], factors.double()
    by_token = factors.mean(dim=1, keepdim=True)  # (n, 1)
    by_channel = factors.mean(dim=0)  # (d,)
    size = float(factors.square().mean().sqrt())
    one_factor_a_token = _rms(factors - by_token) < math.sqrt(len(by_channel)) * same * size
    if one_factor_a_token:
        overall = by_token.mean()
        if _rms(by_token - overall) < same * size:
            return Scaled() if abs(float(overall) - 1.0) < same else Scaled(overall.reshape(1).cpu())
        return Gated(by_channel=False)
    return Scaled(by_channel.cpu()) if _rms(factors - by_channel) < 10 * same * size else Gated(by_channel=True)


def _refuse_reach(probe: _Probe, first: _Run, step: Tensor, real: Tensor) -> None:
    """Refuse a block in which a token's output moves that of other tokens."""
    tokens = real.nonzero()
    row, at = (int(index) for index in tokens[len(tokens) // 2])
    single = torch.zeros_like(step)
    single[row, at] = step[row, at]
    moved = (probe.run(single).output - first.output).float().norm(dim=-1) * real
    here = float(moved[row, at])
    moved[row, at] = 0.0
    others = float(moved.nan_to_num().max())
    if others > _TOLERANCE[first.output.element_size() >= 4] * max(here, others):
        raise ValueError(f"a change of {probe.name} at one token moves the output of {probe.block_name} at others "
                         f"({others:.2g} against {here:.2g} at its own): name a map that the block's mixing of tokens "
                         "does not follow in rewrite_module_tmp")


def _find_norm(probe: _Probe, first: _Run, steps: Sequence[Tensor], real: Tensor) -> Normalised | None:
    """The path through a norm, if there is one that explains the block's output."""
    runs = [probe.run(step, trace=True) for step in steps]
    traced = probe.run(trace=True)
    full = first.output.element_size() >= 4
    for name, (u, n) in traced.traced.items():
        if any(name not in one.traced for one in runs) or not u.shape == n.shape == first.output.shape:
            continue
        kind = _norm_kind(probe.block.get_submodule(name), u)
        if kind is None:
            continue
        gains, centred, eps = kind
        pairs = [(one.traced[name][0] - u, one.traced[name][1] - n, one.output - first.output, step)
                 for one, step in zip(runs, steps, strict=True)]
        before = _by_channel([(entered[real], step[real]) for entered, _, _, step in pairs], full)
        after = _by_channel([(moved[real], left[real]) for _, left, moved, _ in pairs], full)
        if before is None or after is None:
            continue
        return Normalised(name, (gains * after).cpu(), centred, eps, before.cpu())
    return None


def _by_channel(pairs: Sequence[tuple[Tensor, Tensor]], full: bool) -> Tensor | None:
    """The factor ``(1,)`` or ``(d,)`` by which each first tensor is a multiple of the second, None if it is not."""
    outputs, inputs = (torch.cat([pair[i].double() for pair in pairs]) for i in (0, 1))
    factor = (outputs * inputs).sum(dim=0) / inputs.square().sum(dim=0)
    if not bool(torch.isfinite(factor).all()) or _relative(outputs, factor * inputs) > _TOLERANCE[full]:
        return None
    overall = ((outputs * inputs).sum() / inputs.square().sum()).reshape(1)
    if _rms(factor - overall) < math.sqrt(len(factor)) * _SAME[full] * float(overall.abs()):
        one = abs(float(overall) - 1.0) < _SAME[full]
        return torch.ones_like(overall) if one else overall
    return factor


def _norm_kind(module: nn.Module, like: Tensor) -> tuple[Tensor, bool, float] | None:
    """Gains ``(d,)`` float64, whether it subtracts the mean, and eps, if a module is an RMS or layer norm."""
    d = like.shape[-1]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(3, d, generator=generator, dtype=torch.float64)
    spread = drawn - drawn.mean(dim=1, keepdim=True)
    spread = spread / spread.square().mean(dim=1, keepdim=True).sqrt()  # mean 0, mean square 1

    def run(x: Tensor) -> Tensor:
        out: Tensor = module(x.to(like).unsqueeze(0))
        return out[0].double().cpu()

    try:
        bias = run(torch.zeros(1, d, dtype=torch.float64))[0]
        outputs = run(1e3 * spread) - bias
        shifted = run(1e3 * (spread + 1.0)) - bias
        small = run(1e-3 * spread) - bias
    except (TypeError, RuntimeError, IndexError, ValueError, AttributeError):
        return None  # it takes something else than hidden states
    sent = (1e3 * spread).to(like).double().cpu() / 1e3  # as rounded
    gains = (outputs * sent).sum(dim=0) / sent.square().sum(dim=0)
    full = like.element_size() >= 4
    if not bool(torch.isfinite(gains).all()) or not _relative(outputs, gains * sent) < _TOLERANCE[full]:
        return None
    moved = (1e3 * (spread + 1.0)).to(like).double().cpu() / 1e3
    rms = gains * moved / moved.square().mean(dim=1, keepdim=True).sqrt()
    for centred, expected in ((True, gains * sent), (False, rms)):
        if _relative(shifted, expected) < _TOLERANCE[full]:
            share = float((small * gains * sent).sum() / (gains * sent).square().sum())  # 1 / sqrt(1 + eps / 1e-6)
            return gains, centred, max(0.0, 1e-6 * (1.0 / share**2 - 1.0)) if share > 0 else math.inf
    return None


@dataclass(frozen=True)
class _Run:
    """One run of a block.

    Attributes:
        output: ``(B, T, d)``.
        y: ``(B, T, d)``, the edited map's output as it was before anything was added to it.
        traced: input and output ``(B, T, ...)`` of the modules that ran after the edited map, by name within the block.
    """

    output: Tensor
    y: Tensor
    traced: dict[str, tuple[Tensor, Tensor]]


class _Probe:
    """A block that can be run with something added to the output of its edited map."""

    def __init__(self, editable: EditableModel, layer: int, run: Callable[[], Tensor]) -> None:
        self.block, self._module = editable.block(layer), editable.down_projection(layer)
        self.name = editable.names.rewrite_module_tmp.format(layer)
        self.block_name = editable.names.layer_module_tmp.format(layer)
        self._width, self._run = editable.hidden_size, run

    def run(self, added: Tensor | None = None, trace: bool = False) -> _Run:
        """Run the block, with ``added`` ``(B, T, d)`` on top of the map's output.

        Raises:
            ValueError: the map does not run once for each token, or has another width than the residual stream.
        """
        seen: list[Tensor] = []
        traced: dict[str, tuple[Tensor, Tensor]] = {}

        def at_map(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            seen.append(output)
            return None if added is None else output + added.to(output).reshape(output.shape)

        def note(name: str) -> Any:
            began: list[bool] = []

            def before(_module: nn.Module, _args: Any) -> None:
                began.append(bool(seen))

            def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                entered = first_input(args, kwargs)
                if began.pop() and isinstance(entered, Tensor) and isinstance(output, Tensor):
                    traced[name] = entered, output

            return before, after

        handles = [self._module.register_forward_hook(at_map)]
        for name, module in self.block.named_modules() if trace else ():
            if module is not self._module:
                before, after = note(name)
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            output = self._run()
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(output, Tensor) or output.dim() != 3 or output.shape[-1] != self._width:
            raise ValueError(f"{self.block_name} gives hidden states of shape {tuple(output.shape)} where "
                             f"(rows, tokens, {self._width}) is expected: this architecture is not supported")
        if len(seen) != 1:
            raise ValueError(f"{self.name} runs {len(seen)} times in {self.block_name}, not once: correct "
                             "rewrite_module_tmp")
        if seen[0].shape[-1] != self._width:
            raise ValueError(f"{self.name} puts out {seen[0].shape[-1]} numbers a token, but the residual stream has "
                             f"{self._width}: name the linear map that ends the feed-forward network in "
                             "rewrite_module_tmp")
        rows, tokens = output.shape[:2]
        found = {name: (as_rows(u, rows, tokens, name), as_rows(n, rows, tokens, name))
                 for name, (u, n) in traced.items()
                 if u.shape[:-1].numel() == n.shape[:-1].numel() == rows * tokens}
        return _Run(output, as_rows(seen[0], rows, tokens, self.name), found)


def _step(run: _Run, seed: int) -> Tensor:
    """Random signs ``(B, T, d)``, as large at each token as the states there are, so that they stand above rounding."""
    size = torch.maximum(run.output.float().square().mean(dim=-1, keepdim=True),
                         run.y.float().square().mean(dim=-1, keepdim=True)).sqrt()
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, run.output.shape, generator=generator, dtype=torch.int8) * 2 - 1
    return (size * signs.to(size)).to(run.output.dtype)


def _ratio(output: Tensor, step: Tensor) -> Tensor:
    return output.float() / step.float()


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def _relative(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of what was expected; infinite where that is 0."""
    size = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / size if size else math.inf
