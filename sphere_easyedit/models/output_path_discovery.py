"""Finds the output path of each edited layer by running its block with changes added to the edited map's output.

Nothing here depends on an architecture's name. Changes of ``y``, the map's output, show whether the block's output at
the same token is ``Scaled``, ``Gated`` or ``Normalised`` (see ``output_path``). Anything else is refused.

Shape legend: B rows of T tokens; n tokens; d the width of the residual stream.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .architecture import EditableModel
from .block_probe import BlockProbe, ProbeRun, probe_step
from .output_path import Gated, Normalised, OutputPath, Scaled
from .replay import BlockReplay, Rows, pad_rows
from .tolerances import is_full_precision, relative_difference, tolerance

logger = logging.getLogger(__name__)


@torch.no_grad()
def find_output_paths(editable: EditableModel, prompts: Sequence[Sequence[int]]) -> dict[int, OutputPath]:
    """Find the output path of every edited layer, and verify it on these prompts.

    The blocks up to the last edited one run once, each edited block about six times more. Weights are not changed.

    Args:
        editable: the model, frozen.
        prompts: token ids.

    Raises:
        ValueError: a block's output depends on the edited map's output in none of the supported ways.
    """
    layers = editable.layers
    rows = pad_rows([list(prompt) for prompt in prompts], editable.input_device)
    replay = BlockReplay.record(editable, rows, layers[0], layers[-1] + 1)
    hidden, paths = replay.hidden, dict[int, OutputPath]()
    for layer, next_layer in zip(layers, [*layers[1:], layers[-1] + 1], strict=True):
        paths[layer] = _find(editable, layer, rows, partial(replay.run, hidden, layer, layer + 1))
        hidden = replay.run(hidden, layer, next_layer)
    kinds = {type(path).__name__.lower() for path in paths.values()
             if not (isinstance(path, Scaled) and path.factor is None)}
    if kinds:
        logger.info("the output of the edited weights reaches the residual stream %s: target changes are converted "
                    "accordingly", " or ".join(sorted(kinds)))
    return paths


def _find(editable: EditableModel, layer: int, rows: Rows, run: Callable[[], Tensor]) -> OutputPath:
    probe = BlockProbe(editable, layer, run)
    first = probe.run()
    real = rows.attention_mask.bool().to(first.output.device) & torch.isfinite(first.output).all(dim=-1)
    if not bool(real.any()):
        raise ValueError(f"the output of {probe.block_name} is not finite before any edit: check the model's weights")
    steps = [probe_step(first, seed) for seed in (0, 1)]
    changes = [probe.run(step).output - first.output for step in steps]
    if not any(bool(change[real].any()) for change in changes):
        raise ValueError(f"{probe.name} has no effect on the output of {probe.block_name}: correct rewrite_module_tmp "
                         "or layer_module_tmp")
    _refuse_effect_on_other_tokens(probe, first, steps[0], real)
    path: OutputPath | None
    factors = changes[0].float() / steps[0].float()
    error = relative_difference(changes[1][real], (factors * steps[1])[real])
    if error < tolerance(first.output):
        path = _linear(factors[real], first.output)
    else:
        path = _find_norm(probe, first, steps, real)
        if path is None:
            raise ValueError(
                f"how {probe.name} reaches the output of {probe.block_name} is not supported: a change of its output "
                f"changes the block's neither by a constant multiple ({error:.1%} off) nor through one norm. Give the "
                "last linear map of the feed-forward network as rewrite_module_tmp; if it is, this architecture can't "
                "be edited there")
    target = probe_step(first, 2)[real].float() * 0.3
    _, state = path.observe(editable, layer, run)
    change = torch.zeros_like(first.output, dtype=torch.float32)
    change[real] = path.input_change(state[real], target)
    measured = (probe.run(change).output - first.output)[real]
    error = relative_difference(measured, path.output_change(state[real], change[real]))
    if not error < tolerance(first.output):
        raise ValueError(f"the output of {probe.block_name} does not change as predicted when the output of "
                         f"{probe.name} changes ({error:.1%} off), so edits there would be wrong: correct "
                         "rewrite_module_tmp; if it is right, this architecture is not supported")
    return path


def _equality(like: Tensor) -> float:
    """Relative difference below which factors are equal to each other, or to 1: what remains is rounding."""
    return 2e-5 if is_full_precision(like) else 1e-2


def _linear(factors: Tensor, like: Tensor) -> OutputPath:
    """The path with these factors ``(n, d)``, measured at n tokens in the precision of ``like``."""
    equal, factors = _equality(like), factors.double()
    by_token = factors.mean(dim=1, keepdim=True)  # (n, 1)
    by_channel = factors.mean(dim=0)  # (d,)
    size = _rms(factors)
    if _rms(factors - by_token) < math.sqrt(len(by_channel)) * equal * size:  # one factor per token
        overall = by_token.mean()
        if _rms(by_token - overall) < equal * size:
            return Scaled() if abs(float(overall) - 1.0) < equal else Scaled(overall.reshape(1).cpu())
        return Gated(by_channel=False)
    return Scaled(by_channel.cpu()) if _rms(factors - by_channel) < 10 * equal * size else Gated(by_channel=True)


def _refuse_effect_on_other_tokens(probe: BlockProbe, first: ProbeRun, step: Tensor, real: Tensor) -> None:
    """Refuse a block in which the map's output at one token changes the block's output at others."""
    tokens = real.nonzero()
    row, at = (int(index) for index in tokens[len(tokens) // 2])
    single = torch.zeros_like(step)
    single[row, at] = step[row, at]
    moved = (probe.run(single).output - first.output).float().norm(dim=-1) * real
    here = float(moved[row, at])
    moved[row, at] = 0.0
    others = float(moved.nan_to_num().max())
    if others > tolerance(first.output) * max(here, others):
        raise ValueError(f"a change of {probe.name} at one token changes the output of {probe.block_name} at others "
                         f"({others:.2g} against {here:.2g} at its own): give a map after which the block mixes no "
                         "tokens as rewrite_module_tmp")


def _find_norm(probe: BlockProbe, first: ProbeRun, steps: Sequence[Tensor], real: Tensor) -> Normalised | None:
    """The path through a norm, if one explains the block's output."""
    runs = [probe.run(step, trace=True) for step in steps]
    for name, (u, n) in probe.run(trace=True).traced.items():
        if any(name not in run.traced for run in runs) or not u.shape == n.shape == first.output.shape:
            continue
        kind = _norm_kind(probe.block.get_submodule(name), u)
        if kind is None:
            continue
        gains, centred, eps = kind
        into_norm = [((run.traced[name][0] - u)[real], step[real]) for run, step in zip(runs, steps, strict=True)]
        out_of_norm = [((run.output - first.output)[real], (run.traced[name][1] - n)[real]) for run in runs]
        before, after = (_by_channel(pairs, first.output) for pairs in (into_norm, out_of_norm))
        if before is not None and after is not None:
            return Normalised(name, (gains * after).cpu(), centred, eps, before.cpu())
    return None


def _by_channel(pairs: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> Tensor | None:
    """The factor ``(1,)`` or ``(d,)`` by which each first tensor is a multiple of the second, or None.

    A channel that is always 0, as behind a norm whose gain is 0 there, does not show its factor: it gets the others'.
    """
    outputs, inputs = (torch.cat([pair[i].double() for pair in pairs]) for i in (0, 1))
    sizes = inputs.square().sum(dim=0)
    overall = ((outputs * inputs).sum() / sizes.sum()).reshape(1)
    factor = torch.where(sizes > 0.0, (outputs * inputs).sum(dim=0) / sizes, overall)
    if not bool(torch.isfinite(factor).all()) or relative_difference(outputs, factor * inputs) > tolerance(like):
        return None
    if _rms(factor - overall) < math.sqrt(len(factor)) * _equality(like) * float(overall.abs()):
        return torch.ones_like(overall) if abs(float(overall) - 1.0) < _equality(like) else overall
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
        return None  # it takes other inputs than hidden states
    sent = (1e3 * spread).to(like).double().cpu() / 1e3  # as rounded
    gains = (outputs * sent).sum(dim=0) / sent.square().sum(dim=0)
    if not bool(torch.isfinite(gains).all()) or not relative_difference(outputs, gains * sent) < tolerance(like):
        return None
    moved = (1e3 * (spread + 1.0)).to(like).double().cpu() / 1e3
    rms = gains * moved / moved.square().mean(dim=1, keepdim=True).sqrt()
    for centred, expected in ((True, gains * sent), (False, rms)):
        if relative_difference(shifted, expected) < tolerance(like):
            share = float((small * gains * sent).sum() / (gains * sent).square().sum())  # 1 / sqrt(1 + eps / 1e-6)
            return gains, centred, max(0.0, 1e-6 * (1.0 / share**2 - 1.0)) if share > 0 else math.inf
    return None


def _rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
