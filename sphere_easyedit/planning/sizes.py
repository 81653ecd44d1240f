"""Sizes of a model, from its config alone, and of the facts to edit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import PretrainedConfig

from ..datasets.loaders import EditRecord
from ..editing.requests import parse_requests
from ..evaluation.protocols import prompts_by_metric
from ..models.config_fields import hidden_size, num_blocks, text_config
from ..models.model_class import meta_model
from ..models.module_discovery import ModuleNames

CHARACTERS_PER_TOKEN: Final = 4.0  # of English text
_CONTEXTS: Final = ("", *["x" * 40] * 5)  # about the lengths of the plain prompt's front and the generated contexts


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder that costs depend on.

    Attributes:
        parameters: number of them, shared ones counted once.
        itemsize: bytes of a parameter.
        blocks, hidden, vocabulary: number of decoder blocks, width of the residual stream, rows of the LM head.
        block_entries: entries of the matrices in a block (mean over blocks).
        d_out, d_in: of an edited weight.
    """

    parameters: int
    itemsize: int
    blocks: int
    hidden: int
    vocabulary: int
    block_entries: int
    d_out: int
    d_in: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters."""
        return self.parameters * self.itemsize


def model_shape(config: PretrainedConfig, names: ModuleNames, layers: Sequence[int], dtype: torch.dtype
                ) -> ModelShape:
    """Read sizes off a model built on the meta device, which takes no memory.

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
    hidden, vocabulary = hidden_size(config), int(text_config(config).vocab_size)
    entries = sum(parameter.numel() for i in range(blocks)
                  for parameter in module(names.layer_module_tmp.format(i)).parameters() if parameter.dim() == 2)
    rewritten = names.rewrite_module_tmp.format(layers[0])
    weight = getattr(module(rewritten), "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2 or hidden not in weight.shape:
        raise ValueError(f"{rewritten} has no weight matrix with a side of {hidden}, the hidden size: correct "
                         "rewrite_module_tmp in the hyperparameters")
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        itemsize=dtype.itemsize, blocks=blocks, hidden=hidden, vocabulary=vocabulary, block_entries=entries // blocks,
        d_out=hidden, d_in=weight.numel() // hidden)  # stored either way


def dtype_of(config: PretrainedConfig, wanted: str | None) -> torch.dtype:
    """The dtype in which the model would be loaded: the given one, else the checkpoint's by its config.

    Raises:
        ValueError: a model can't be edited in it.
    """
    stated = [getattr(part, name, None) for part in (config, text_config(config)) for name in ("dtype", "torch_dtype")]
    found = next((each for each in (wanted, *stated) if each), "float32")
    dtype = getattr(torch, str(found).removeprefix("torch."), None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    raise ValueError(f"dtype {found!r} is none that a model can be edited in: give float32, bfloat16 or float16")


@dataclass(frozen=True)
class Tokens:
    """Mean number of tokens of an edit, by its characters.

    Attributes:
        read: in all its prompts with the target: plain, in each context, and the drift prompt.
        taken: in those of its prompts that one gradient step takes.
        stepped: of these, from the subject's last token on, which the step runs.
        predicted: positions at which a step asks the LM head.
        scored: read in one evaluation.
    """

    read: float
    taken: float
    stepped: float
    predicted: float
    scored: float


def count_tokens(records: Sequence[EditRecord], contexts: Sequence[str] | None, per_step: int | None = None) -> Tokens:
    """Count the tokens of an edit.

    Args:
        contexts: context templates; None before they are generated.
        per_step: number of them that a gradient step takes; None for all.
    """
    def count(*texts: str) -> float:
        return max(1.0, len("".join(texts)) / CHARACTERS_PER_TOKEN)

    fronts = _CONTEXTS if contexts is None else ("", *contexts)
    step_fronts = fronts if per_step is None else fronts[: 1 + per_step]
    read = taken = stepped = predicted = 0.0
    for request in parse_requests([record.request() for record in records]):
        read += sum(count(front, request.prompt, request.target) for front in fronts) + count(request.subject)
        taken += sum(count(front, request.prompt, request.target) for front in step_fronts) + count(request.subject)
        stepped += len(step_fronts) * count(request.after, request.target) + 1
        predicted += len(step_fronts) * count(request.target) + 1
    # A prompt and target that occur again are not scored again.
    pairs = {pair for record in records for prompts in prompts_by_metric(record).values() for pair in prompts}
    scored = sum(count(*pair) for pair in pairs)
    return Tokens(*(total / len(records) for total in (read, taken, stepped, predicted, scored)))


@dataclass(frozen=True)
class Statistics:
    """Second moments of keys: files by layer (none where a run needs none), number of missing ones, whether null spaces
    or factors lie beside all of them, and tokens of the text that missing ones are collected from, at most.
    """

    paths: dict[int, Path]
    missing: int = 0
    metric_is_filed: bool = False
    tokens: int = 0
