"""Finds the scale and soft cap that a model applies to its logits, by running it once.

Gemma and RecurrentGemma softly cap their logits; Granite, Cohere and Falcon-H1 scale them or the head's input, each
under a config name of its own. Here a hook feeds the LM head the last state at several scales, and the scale and cap
are fitted to the resulting logits.

Shape legend: n states; d the width of the residual stream; V the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor, nn

from ..utils.messages import one_line
from .tolerances import is_full_precision, tolerance

if TYPE_CHECKING:
    from .architecture import EditableModel

# Multiples of the last state fed to the head: the state itself, one for the slope at 0, one that reaches a cap.
_SCALES = (1.0, 1.0 / 64.0, 64.0)
_FITTED = 4096  # number of logits that a cap is fitted to


@dataclass(frozen=True)
class LogitMap:
    """``logits = cap * tanh(scale * head(input_scale * norm(states)) / cap)``; without the tanh where cap is None."""

    input_scale: float = 1.0
    scale: float = 1.0
    cap: float | None = None

    def logits(self, states: Tensor, final_norm: nn.Module, head: nn.Module) -> Tensor:
        """Logits ``(n, V)`` in float32 of last-block outputs ``(n, d)``."""
        entering = final_norm(states)
        raw: Tensor = head(entering if self.input_scale == 1.0 else entering * self.input_scale).float()
        return self.from_head(raw)

    def from_head(self, raw: Tensor) -> Tensor:
        """Logits from the head's output."""
        scaled = raw if self.scale == 1.0 else raw * self.scale
        return scaled if self.cap is None else torch.tanh(scaled / self.cap) * self.cap


@torch.no_grad()
def find_logit_map(editable: EditableModel, input_ids: Tensor) -> LogitMap:
    """Find how a model computes its logits from its last block's output, by one run on a prompt.

    Args:
        editable: the model with its final norm and LM head, frozen.
        input_ids: ``(1, tokens)``.

    Raises:
        ValueError: the logits are not the final norm, the LM head, constant factors and a soft cap applied in turn.
    """
    names, model = editable.names, type(editable.model).__name__
    states, entering, raw, own = _run(editable, input_ids)
    if states is None:
        last = names.layer_module_tmp.format(editable.num_blocks - 1)
        raise ValueError(f"{last!r} returns no hidden states in a forward pass of {model}: give the decoder blocks as "
                         "layer_module_tmp")
    if raw is None or entering is None:
        raise ValueError(f"{names.lm_head_module!r} is not run on hidden states in a forward pass of {model}: give the "
                         "module that computes the logits as lm_head_module")
    if raw.shape[-1] != own.shape[-1]:
        raise ValueError(f"{names.lm_head_module!r} returns {raw.shape[-1]} numbers per token, but {model} has "
                         f"{own.shape[-1]} logits: give the module that computes the logits as lm_head_module")
    if states.shape[-1] != entering.shape[-1] or states.dim() != 3:
        raise ValueError(f"{names.lm_head_module!r} takes states of shape {tuple(entering.shape)}, but the last block "
                         f"returns {tuple(states.shape)}: {model} does more between the two than "
                         f"{names.ln_f_module!r}, which is not supported")
    if not bool(torch.isfinite(own).all() and torch.isfinite(raw).all()):
        return _not_finite(own, raw, model)
    # The error below which no cap is fitted, and the distance from 1 below which a factor counts as 1.
    rounding, no_factor = (1e-5, 1e-5) if is_full_precision(own, raw) else (2e-2, 2e-3)
    input_scale, off = _multiple(entering, _normed(editable, states)[0, -1])
    if off > tolerance(own, raw):
        raise ValueError(f"the input of {names.lm_head_module!r} is not what {names.ln_f_module!r} returns for the "
                         f"last block's output of {model} (relative error {off:.1%}): correct these module names; if "
                         "they are right, this architecture is not supported")
    scale, off = _multiple(own, raw)
    cap = None
    if not off < rounding:
        capped = _soft_cap(own, raw)
        if capped[-1] < off:
            scale, cap, off = capped
        if not off < tolerance(own, raw):
            raise ValueError(f"the logits of {model} are not what {names.lm_head_module!r} returns, nor a multiple of "
                             f"it, softly capped or not (relative error {off:.1%}): correct lm_head_module; if it is "
                             "right, this architecture's transform of its logits is not supported")
    input_scale, scale = (1.0 if abs(factor - 1.0) < no_factor else factor for factor in (input_scale, scale))
    return LogitMap(input_scale, scale, cap)


def _normed(editable: EditableModel, states: Tensor) -> Tensor:
    """The final norm's output for ``states``, of the same shape; ValueError if it can't be a norm."""
    try:
        normed: Any = editable.final_norm(states)
        why = "" if isinstance(normed, Tensor) and normed.shape == states.shape else "the shape changes"
    except (TypeError, RuntimeError, IndexError, ValueError, AttributeError) as error:
        why = one_line(error)
    if why:
        raise ValueError(f"{editable.names.ln_f_module!r} does not take the last block's output as a norm does "
                         f"({why}): give the norm before the LM head as ln_f_module")
    return normed  # type: ignore[no-any-return]


def _run(editable: EditableModel, input_ids: Tensor
         ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Run the prompt once per scale, as one batch.

    Returns:
        The last block's output ``(1, tokens, d)``; the head's input at the last token, ``(d,)``; the head's output and
        the logits at all multiples of that input, each ``(scales, V)``. None where a hook was not called.
    """
    states: list[Tensor] = []
    entering: list[Tensor] = []
    raw: list[Tensor] = []

    def feed(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not (args and _is_states(args[0])):
            return None
        fed = args[0].clone()
        last = fed.view(len(_SCALES), -1, fed.shape[-1])[:, -1]
        entering.append(last[0].clone())
        last.mul_(torch.tensor(_SCALES, device=fed.device, dtype=fed.dtype)[:, None])
        return (fed, *args[1:])

    def recorder(found: list[Tensor]) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if _is_states(first):
                found.append(first)

        return hook

    handles = [editable.block(editable.num_blocks - 1).register_forward_hook(recorder(states)),
               editable.lm_head.register_forward_pre_hook(feed),
               editable.lm_head.register_forward_hook(recorder(raw))]
    rows = input_ids.expand(len(_SCALES), -1)
    try:
        logits: Tensor = editable.model(input_ids=rows, attention_mask=torch.ones_like(rows), use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return (states[0][:1] if states else None, entering[0] if entering else None,
            raw[0].reshape(len(_SCALES), -1, raw[0].shape[-1])[:, -1] if raw else None, logits[:, -1])


def _is_states(value: Any) -> bool:
    """Whether a module's input or output can be hidden states of the batch."""
    return (isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1
            and value.shape[:-1].numel() % len(_SCALES) == 0)


def _multiple(found: Tensor, of: Tensor) -> tuple[float, float]:
    """Least-squares factor from ``of`` to ``found``, and the relative difference that remains."""
    x, y = of.double().flatten(), found.double().flatten().to(of.device)
    factor = float((x @ y) / (x @ x))
    return factor, float((y - factor * x).norm() / y.norm())


def _soft_cap(own: Tensor, raw: Tensor) -> tuple[float, float, float]:
    """Fit ``cap * tanh(scale * raw / cap)`` to the logits: scale, cap, and the relative difference that remains."""
    y, x = own.double().cpu().flatten(), raw.double().cpu().flatten()
    slope, _ = _multiple(own[1], raw[1])
    some = x.abs().argsort().flip(0)[::math.ceil(len(x) / _FITTED)]  # a sample of all magnitudes with the largest

    def capped(logs: np.ndarray, raw: Tensor) -> Tensor:
        scale, cap = (math.copysign(math.exp(logs[0]), slope), math.exp(logs[1]))
        return torch.tanh(raw * scale / cap) * cap

    largest = float(y.abs().max())
    found = scipy.optimize.least_squares(lambda logs: (capped(logs, x[some]) - y[some]).numpy() / largest,
                                         [math.log(abs(slope)), math.log(1.1 * largest)], xtol=1e-12, ftol=1e-12,
                                         gtol=1e-12)
    scale, cap = (float(value) for value in np.exp(found.x))
    return math.copysign(scale, slope), cap, float((capped(found.x, x) - y).norm() / y.norm())


def _not_finite(own: Tensor, raw: Tensor, model: str) -> LogitMap:
    """Handle logits that are not finite: refuse a model that masks tokens; a broken model shows in its losses later."""
    if bool(torch.isfinite(raw).all()):
        masked = int((~torch.isfinite(own)).any(dim=0).sum())
        raise ValueError(f"{model} overwrites {masked} of its {own.shape[-1]} logits with values that are not finite, "
                         "which is not supported")
    return LogitMap()
