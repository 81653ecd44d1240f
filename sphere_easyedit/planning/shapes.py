"""The sizes of a model, from its config alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from ..config_fields import hidden_size, num_blocks, text_config
from ..model_class import meta_model
from ..module_discovery import ModuleNames


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that costs depend on.

    Attributes:
        parameters, buffer_bytes: of the whole model, shared tensors counted once.
        itemsize: bytes of a parameter.
        blocks, hidden, vocabulary: number of decoder blocks, width of the residual stream, rows of the LM head.
        block_entries: entries of the matrices in a block; attention and feed-forward network (mean over blocks).
        mlp_entries: entries of those of the feed-forward network alone.
        heads: of queries.
        attention_width, key_value_width: heads times head width, of queries and of keys.
        d_out, d_in: of an edited weight.
        packs: its class lets attention functions be chosen, so it should take packed rows (see ``editing.packing``).
    """

    parameters: int
    buffer_bytes: int
    itemsize: int
    blocks: int
    hidden: int
    vocabulary: int
    block_entries: int
    mlp_entries: int
    heads: int
    attention_width: int
    key_value_width: int
    d_out: int
    d_in: int
    packs: bool

    @property
    def weight_bytes(self) -> int:
        """Parameters and buffers in memory."""
        return self.parameters * self.itemsize + self.buffer_bytes


def model_shape(config: PretrainedConfig, names: ModuleNames, layers: Sequence[int], dtype: torch.dtype
                ) -> ModelShape:
    """Sizes by a config alone: the model is built on the meta device, which takes no memory.

    Raises:
        ValueError: module names or layers do not fit the architecture.
    """
    model = meta_model(config)
    modules = dict(model.named_modules(remove_duplicate=False))

    def module(name: str) -> nn.Module:
        found: nn.Module | None = modules.get(name)
        if found is None:
            raise ValueError(f"{type(model).__name__} has no module {name!r}: correct the module names in the "
                             "hyperparameters")
        return found

    blocks = num_blocks(config)
    if layers[-1] >= blocks:
        raise ValueError(f"layers {list(layers)} do not fit a model of {blocks} layers: give numbers from 0 to "
                         f"{blocks - 1}")
    text = text_config(config)
    for name in ("num_attention_heads", "hidden_size", "vocab_size"):
        if not (size := getattr(text, name, None)):
            raise ValueError(f"the config of {type(model).__name__} has {name} {size!r}, which costs are counted from: "
                             "nothing can be planned for it")
    heads = int(text.num_attention_heads)
    head_width = int(getattr(text, "head_dim", None) or hidden_size(config) // heads)
    key_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    entries = sum(_matrix_entries(module(names.layer_module_tmp.format(i))) for i in range(blocks))
    hidden = hidden_size(config)
    rewritten = names.rewrite_module_tmp.format(layers[0])
    weight = getattr(module(rewritten), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or hidden not in weight.shape:
        raise ValueError(f"{rewritten} has no weight matrix with a side of {hidden}, the hidden size: correct "
                         "rewrite_module_tmp in the hyperparameters")
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        buffer_bytes=sum(buffer.nbytes for buffer in model.buffers()),
        itemsize=dtype.itemsize, blocks=blocks, hidden=hidden, vocabulary=int(text.vocab_size),
        block_entries=entries // blocks,
        mlp_entries=_matrix_entries(module(names.mlp_module_tmp.format(layers[0]))),
        heads=heads, attention_width=heads * head_width, key_value_width=key_heads * head_width,
        d_out=hidden, d_in=weight.numel() // hidden,  # whichever way it is stored
        packs=bool(getattr(model, "_supports_attention_backend", False)))  # transformers names it so, from 4.48 on


def _matrix_entries(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)


def dtype_of(config: PretrainedConfig, wanted: str | None) -> torch.dtype:
    """The dtype that the model would be loaded in: the one asked for, else the checkpoint's by its config.

    Raises:
        ValueError: it is none that a model can be edited in.
    """
    found: Any = wanted
    for part in (config, text_config(config)):
        found = found or getattr(part, "dtype", None) or getattr(part, "torch_dtype", None)
    dtype = getattr(torch, found.removeprefix("torch."), None) if isinstance(found, str) else found
    if found is None:
        return torch.float32
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    raise ValueError(f"dtype {found!r} is none that a model can be edited in: give float32, bfloat16 or float16")
