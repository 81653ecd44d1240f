"""Runs some modules of a model in another precision than their weights are stored in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def computing_in(modules: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    """Let modules compute in ``dtype`` inside the context, with rounded copies of their weights.

    Floating-point arguments are rounded when one of the modules is called, so its output has this precision, too. The
    stored weights do not change, nor do other modules that share them (the embedding, where the head is tied to it).

    Args:
        modules: for example decoder blocks.
        dtype: of weights, buffers and states.

    Raises:
        ValueError: a weight is offloaded or quantised.
    """
    stored = [(tensors, name, tensor) for module in modules for part in module.modules()
              for tensors in (part._parameters, part._buffers) for name, tensor in tensors.items()
              if tensor is not None]
    for module in modules:
        for name, parameter in module.named_parameters():
            if parameter.is_meta or not parameter.is_floating_point():
                raise ValueError(f"target_dtype can't be used with {name} of {type(module).__name__}, which is "
                                 "offloaded or quantised: leave target_dtype out")
    with ExitStack() as stack:
        for module in modules:
            handle = module.register_forward_pre_hook(
                lambda _module, args, kwargs: (_rounded(args, dtype), _rounded(kwargs, dtype)), with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(_put, stored)
        _put([(tensors, name, _copy(tensor, dtype)) for tensors, name, tensor in stored])
        yield


def _put(stored: Sequence[tuple[dict[str, Any], str, Tensor]]) -> None:
    for tensors, name, tensor in stored:
        tensors[name] = tensor


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor
    copy = tensor.detach().to(dtype)
    return nn.Parameter(copy, requires_grad=False) if isinstance(tensor, nn.Parameter) else copy


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    """``value``, or tensors in a tuple or dict, in ``dtype``."""
    if isinstance(value, tuple):
        return tuple(_rounded(item, dtype) for item in value)
    if isinstance(value, dict):
        return {name: _rounded(item, dtype) for name, item in value.items()}
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
        return value
    # Masks contain the lowest float32, which would round to minus infinity: NaN in a row that is masked throughout.
    limits = torch.finfo(dtype)
    return value.clamp(limits.min, limits.max).to(dtype)
