"""Context managers that adapt a model and a tokenizer to EasyEdit's functions, and restore them afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..methods.covariance import model_folder
from ..models.architecture import EditableModel


@contextmanager
def path_names_family(editable: EditableModel) -> Iterator[None]:
    """Prefix the model's path with its family's name, since EasyEdit finds the family by substrings of the path.

    The last component stays, since statistics are filed under it.
    """
    config: Any = editable.config
    path = config._name_or_path
    family = "gpt2-xl" if isinstance(editable.down_projection(editable.layers[0]), Conv1D) else str(config.model_type)
    config._name_or_path = f"{family}/{model_folder(editable)}"
    try:
        yield
    finally:
        config._name_or_path = path


@contextmanager
def padding(tok: PreTrainedTokenizerBase, side: str) -> Iterator[None]:
    """Set the tokenizer's padding side, and a padding token if it has none."""
    before, token = tok.padding_side, tok.pad_token
    tok.padding_side = side
    if token is None:
        tok.pad_token = tok.eos_token
    try:
        yield
    finally:
        tok.padding_side = before
        if token is None:
            tok.pad_token = None


@contextmanager
def head_as_parameter(editable: EditableModel) -> Iterator[None]:
    """Make the LM head's weight a named parameter, which it is not while tied to the embeddings; memory is shared."""
    head: Any = editable.lm_head
    tied = head.weight
    names = {name for name, _ in editable.model.named_parameters()}
    if f"{editable.names.lm_head_module}.weight" not in names:
        head.weight = nn.Parameter(tied.detach(), requires_grad=False)
    try:
        yield
    finally:
        head.weight = tied


@contextmanager
def attributes_restored(instance: Any) -> Iterator[None]:
    """Restore an object's attributes (None: no object), since EasyEdit's executor classes keep the last model."""
    kept = {} if instance is None else dict(vars(instance))
    try:
        yield
    finally:
        if instance is not None:
            vars(instance).clear()
            vars(instance).update(kept)


@contextmanager
def gradients_restored(model: nn.Module) -> Iterator[None]:
    """Restore the parameters' gradients and their ``requires_grad``."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
