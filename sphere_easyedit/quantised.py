"""Layers of quantised base models, dequantised so that they can be edited.

A change of weights is far smaller than the steps that a quantised weight can take, so rounding it into them again would
undo the edit. The layers that are edited are therefore kept unquantised; all others stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

_EDITABLE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_PLAIN = (Tensor, nn.Parameter)
_BITSANDBYTES = {"Params4bit": "4-bit", "Int8Params": "8-bit"}
_REMEDY = ("load the base model in float32, bfloat16 or float16, or quantise it by bitsandbytes (load_in_4bit, "
           "load_in_8bit), whose edited layers are dequantised")


def check_editable(model: nn.Module, name: str) -> None:
    """Refuse a module whose weight can't be edited, nor be dequantised for it.

    Args:
        model: the model that it is in.
        name: of the module.

    Raises:
        ValueError: it has no matrix, or a quantised one that ``dequantise`` does not know.
    """
    module = model.get_submodule(name)
    weight = getattr(module, "weight", None)
    method = getattr(model, "quantization_method", None) or getattr(module, "quant_method", None)
    if not isinstance(weight, Tensor):
        if method is not None or "quantized" in type(module).__module__:
            by = type(module).__name__ if method is None else getattr(method, "value", method)
            raise ValueError(f"{name} is quantised ({by}), and a quantised weight can't be edited: {_REMEDY}")
        raise ValueError(f"{name}.weight is no matrix: rewrite_module_tmp must name a linear layer")
    kind = type(weight)
    if kind.__name__ in _BITSANDBYTES:
        if not _is_quantised(weight):
            raise ValueError(f"{name}.weight is to be quantised by bitsandbytes and is not yet: move the model to its "
                             "device first")
        return
    if "weight" not in module._parameters:
        raise ValueError(f"{name}.weight is computed from other parameters (by pruning, weight norm or another "
                         "parametrisation), which an edit would not reach: remove the parametrisation first, as "
                         "torch.nn.utils.parametrize.remove_parametrizations and torch.nn.utils.prune.remove do")
    if weight.dim() != 2:
        raise ValueError(f"{name}.weight is no matrix: rewrite_module_tmp must name a linear layer")
    if weight.dtype not in _EDITABLE or kind not in _PLAIN:
        held = f"{weight.dtype}" + ("" if kind in _PLAIN else f" in a {kind.__module__}.{kind.__name__}")
        raise ValueError(f"{name}.weight holds {held}: a quantised weight can't be edited; {_REMEDY}")


def _is_quantised(weight: Any) -> bool:
    """Whether a weight of bitsandbytes has its values in their few bits, which it gets on its device."""
    if weight.is_meta or weight.is_floating_point():
        return False
    return type(weight).__name__ == "Int8Params" or weight.quant_state is not None


@torch.no_grad()
def dequantise(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Put plain linear layers in the place of those of bitsandbytes, with a warning that says what it costs.

    Their weights are what the quantised ones stand for, in the dtype of the model's hidden states. The model's
    quantisation config is told to leave them so, for a saved model to be loaded as it was.

    Args:
        model: changed in place.
        names: of modules, each of which ``check_editable`` let pass; those that are not quantised stay.

    Returns:
        The new modules by name.
    """
    modules = {name: model.get_submodule(name) for name in names}
    quantised = {name: module for name, module in modules.items() if type(module.weight).__name__ in _BITSANDBYTES}
    if not quantised:
        return {}
    dtype = _states_dtype(model)
    plain = {name: _plain_linear(module, dtype) for name, module in quantised.items()}
    before = sum(_bytes(module.weight) for module in quantised.values())
    after = sum(_bytes(module.weight) for module in plain.values())
    bits = " and ".join(sorted({_BITSANDBYTES[type(module.weight).__name__] for module in quantised.values()}))
    logger.warning("%s weights can't be edited: %s %s dequantised to %s for good, which takes %.1f MB in place of %.1f",
                   bits, ", ".join(plain), "is" if len(plain) == 1 else "are", str(dtype).removeprefix("torch."),
                   after / 1e6, before / 1e6)
    for name, module in plain.items():
        hook = getattr(quantised[name], "_hf_hook", None)
        if hook is not None:  # spread over several devices
            from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped,unused-ignore]

            add_hook_to_module(module, hook)
        model.set_submodule(name, module)
    _keep_from_quantisation(model)
    return dict(plain)


@torch.no_grad()
def dequantised(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Weight and bias, under their names in the model, that ``dequantise`` would give a module; none if it is plain."""
    module = model.get_submodule(name)
    if type(getattr(module, "weight", None)).__name__ not in _BITSANDBYTES:
        return {}
    plain = _plain_linear(module, _states_dtype(model))
    return {f"{name}.{part}": values.detach() for part, values in plain.named_parameters()}


def _states_dtype(model: nn.Module) -> torch.dtype:
    """Of the model's hidden states."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    dtype: torch.dtype = embeddings.weight.dtype
    return dtype


def _bytes(weight: Any) -> int:
    return int(weight.numel() * weight.element_size())


def _plain_linear(module: Any, dtype: torch.dtype) -> nn.Module:
    from bitsandbytes import functional  # type: ignore[import-not-found,import-untyped,unused-ignore]

    weight = module.weight
    if type(weight).__name__ == "Params4bit":
        values = functional.dequantize_4bit(weight.data, weight.quant_state)
    else:  # the scales of rows move to the module's state with its first forward pass
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        values = functional.int8_vectorwise_dequant(weight.data, scales)
    plain: Any
    if getattr(module, "source_cls", None) is Conv1D:  # as which a saved model is loaded again
        plain = Conv1D(module.out_features, module.in_features)  # type: ignore[no-untyped-call]
        values = values.T.contiguous()
    else:
        plain = nn.Linear(module.in_features, module.out_features, device="meta")
    plain.weight = nn.Parameter(values.to(dtype), requires_grad=False)
    plain.bias = None if module.bias is None else nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    plain.train(module.training)
    made: nn.Module = plain
    return made


def _keep_from_quantisation(model: Any) -> None:
    config = getattr(model.config, "quantization_config", None)
    if config is None or not hasattr(config, "llm_int8_skip_modules"):
        return
    # A list leaves no defaults, such as the LM head, so all plain layers are named.
    config.llm_int8_skip_modules = [name for name, module in model.named_modules()
                                    if type(module) in (nn.Linear, Conv1D)]
