"""Dequantises the edited layers of quantised models, and refuses weights that can't be edited.

An edit is far smaller than a quantisation step, so quantising the edited weight again would undo it. Edited layers
therefore stay unquantised; all other layers stay quantised.
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
    """Refuse a module whose weight can be neither edited nor dequantised.

    Args:
        model: the model that contains the module.
        name: the module's name.

    Raises:
        ValueError: it has no weight matrix, or a quantised one that ``dequantise`` does not support.
    """
    module = model.get_submodule(name)
    weight = getattr(module, "weight", None)
    method = getattr(model, "quantization_method", None) or getattr(module, "quant_method", None)
    if not isinstance(weight, Tensor):
        if method is not None or "quantized" in type(module).__module__:
            by = type(module).__name__ if method is None else getattr(method, "value", method)
            raise ValueError(f"{name} is quantised ({by}), and a quantised weight can't be edited: {_REMEDY}")
        raise ValueError(f"{name}.weight is not a matrix: rewrite_module_tmp must name a linear layer")
    kind = type(weight)
    if kind.__name__ in _BITSANDBYTES:
        if not _is_quantised(weight):
            raise ValueError(f"{name}.weight is not quantised by bitsandbytes yet: move the model to its device "
                             "first")
        return
    if "weight" not in module._parameters:
        raise ValueError(f"{name}.weight is computed from other parameters (by pruning, weight norm or another "
                         "parametrisation), which an edit would not reach: remove the parametrisation first, as "
                         "torch.nn.utils.parametrize.remove_parametrizations and torch.nn.utils.prune.remove do")
    if weight.dim() != 2:
        raise ValueError(f"{name}.weight is not a matrix: rewrite_module_tmp must name a linear layer")
    if weight.dtype not in _EDITABLE or kind not in _PLAIN:
        held = f"{weight.dtype}" + ("" if kind in _PLAIN else f" in a {kind.__module__}.{kind.__name__}")
        raise ValueError(f"{name}.weight holds {held}: a quantised weight can't be edited; {_REMEDY}")


def _is_quantised(weight: Any) -> bool:
    """Whether a bitsandbytes weight is quantised already, which happens when it is moved to its device."""
    if weight.is_meta or weight.is_floating_point():
        return False
    return type(weight).__name__ == "Int8Params" or weight.quant_state is not None


@torch.no_grad()
def dequantise(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Replace bitsandbytes layers by unquantised linear layers, with a warning about the memory that they take.

    The new weights are the dequantised ones in the dtype of the model's hidden states. The model's quantisation config
    then lists them as not quantised, so that a saved model loads as it was.

    Args:
        model: changed in place.
        names: modules that passed ``check_editable``; those that are not quantised are left alone.

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
    logger.warning("%s weights can't be edited: %s %s dequantised to %s, which takes %.1f MB instead of %.1f", bits,
                   ", ".join(plain), "is" if len(plain) == 1 else "are", str(dtype).removeprefix("torch."),
                   after / 1e6, before / 1e6)
    for name, module in plain.items():
        hook = getattr(quantised[name], "_hf_hook", None)
        if hook is not None:  # of accelerate, on several devices
            from accelerate.hooks import add_hook_to_module  # type: ignore[import-untyped,unused-ignore]

            add_hook_to_module(module, hook)
        model.set_submodule(name, module)
    _exclude_from_quantisation(model)
    return dict(plain)


@torch.no_grad()
def dequantised(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Dequantised weight and bias of a module, by parameter name; empty if the module is not quantised."""
    module = model.get_submodule(name)
    if type(getattr(module, "weight", None)).__name__ not in _BITSANDBYTES:
        return {}
    plain = _plain_linear(module, _states_dtype(model))
    return {f"{name}.{part}": values.detach() for part, values in plain.named_parameters()}


def _states_dtype(model: nn.Module) -> torch.dtype:
    """Dtype of the model's hidden states."""
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
    else:  # the row scales move to the module's state in its first forward pass
        scales = weight.SCB if weight.SCB is not None else module.state.SCB
        values = functional.int8_vectorwise_dequant(weight.data, scales)
    plain: Any
    if getattr(module, "source_cls", None) is Conv1D:  # the class that a saved model is loaded with
        plain = Conv1D(module.out_features, module.in_features)  # type: ignore[no-untyped-call]
        values = values.T.contiguous()
    else:
        plain = nn.Linear(module.in_features, module.out_features, device="meta")
    plain.weight = nn.Parameter(values.to(dtype), requires_grad=False)
    plain.bias = None if module.bias is None else nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
    plain.train(module.training)
    made: nn.Module = plain
    return made


def _exclude_from_quantisation(model: Any) -> None:
    config = getattr(model.config, "quantization_config", None)
    if config is None or not hasattr(config, "llm_int8_skip_modules"):
        return
    # A list replaces the defaults (the LM head), so all unquantised layers are listed.
    config.llm_int8_skip_modules = [name for name, module in model.named_modules()
                                    if type(module) in (nn.Linear, Conv1D)]
