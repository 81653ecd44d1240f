"""The exports as whole folders: content and card, there complete or not at all."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .adapter import write_adapter
from .card import LayerError, write_card
from .deltas import TOLERANCE, Deltas, apply_deltas, deltas_of, write_deltas
from .edited import EditedWeights
from .folders import check_free, new_folder
from .whole import MAX_SHARD_SIZE, check_shard_size, write_model


def export_model(folder: Path, model: nn.Module, tok: PreTrainedTokenizerBase, edited: EditedWeights,
                 dtype: torch.dtype | None = None, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write the whole edited model, which plain transformers loads.

    Args:
        folder: new or empty.
        model: the unedited model; holds the edited weights at the end, in ``dtype``.
        tok: its tokenizer.
        edited: what editing changed in it.
        dtype: to round all parameters to; as they are if None.
        max_shard_size: of each file of weights.

    Raises:
        ValueError: the folder is not empty, or ``max_shard_size`` is no size.
    """
    check_shard_size(max_shard_size)
    with new_folder(folder) as temporary:
        edited.put_into(model)
        if dtype is not None:
            model.to(dtype)
        write_model(temporary, model, tok, max_shard_size)
        write_card(temporary, "model", edited.provenance,
                   note="" if dtype is None else f"All parameters were rounded to {_name(dtype)}.")


def export_deltas(folder: Path, edited: EditedWeights, *, rank: int | None = None, tolerance: float = TOLERANCE,
                  exact: bool = False, dtype: torch.dtype | None = None) -> tuple[LayerError, ...]:
    """Write what editing changed; ``deltas_of`` has the arguments.

    Returns:
        How each parameter is stored, and with what error.

    Raises:
        ValueError: the folder is not empty, or what ``deltas_of`` refuses.
    """
    check_free(folder)  # before the work
    deltas = deltas_of(edited, rank=rank, tolerance=tolerance, exact=exact, dtype=dtype)
    with new_folder(folder) as temporary:
        write_deltas(temporary, deltas)
        write_card(temporary, "deltas", deltas.origin, deltas.layers)
    return deltas.layers


def export_adapter(folder: Path, model: nn.Module, edited: EditedWeights, rank: int,
                   dtype: torch.dtype = torch.float32) -> tuple[LayerError, ...]:
    """Write a LoRA adapter; ``write_adapter`` has the arguments.

    Returns:
        What the adapter leaves out, by parameter.

    Raises:
        ValueError: the folder is not empty, or what ``write_adapter`` refuses.
    """
    with new_folder(folder) as temporary:
        layers = write_adapter(temporary, model, edited, rank, dtype)
        write_card(temporary, "lora", edited.provenance, layers)
    return layers


def export_applied(folder: Path, model: nn.Module, tok: PreTrainedTokenizerBase, deltas: Deltas,
                   max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Put deltas on a fresh copy of the base model and write the whole model.

    Args:
        folder: new or empty.
        model: the unedited base model; holds the edited weights at the end.
        tok: its tokenizer.
        deltas: what editing changed.

    Raises:
        ValueError: the folder is not empty, ``max_shard_size`` is no size, or the model is not the deltas' base.
    """
    check_shard_size(max_shard_size)
    with new_folder(folder) as temporary:
        apply_deltas(model, deltas)
        write_model(temporary, model, tok, max_shard_size)
        write_card(temporary, "model", deltas.origin, deltas.layers)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
