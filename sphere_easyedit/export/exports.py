"""The exports as folders of weights and a card, written complete or not at all."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .adapter import write_adapter
from .card import LayerError, write_card
from .deltas import TOLERANCE, Deltas, apply_deltas, compute_deltas, write_deltas
from .edited import EditedWeights
from .folders import check_free, new_folder
from .whole import MAX_SHARD_SIZE, write_model

logger = logging.getLogger(__name__)

_LOSSY: Final = 0.01  # relative error of an adapter's change above which a warning is logged


def export_model(folder: Path, model: nn.Module, tok: PreTrainedTokenizerBase, edited: EditedWeights,
                 dtype: torch.dtype | None = None, max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Write the whole edited model, which transformers can load.

    Args:
        folder: new or empty.
        model: the unedited model; has the edited weights afterwards, in ``dtype``.
        tok: its tokenizer.
        edited: its edited weights.
        dtype: to round all parameters to; None to leave them as they are.
        max_shard_size: of each file of weights.

    Raises:
        ValueError: the folder is not empty, or ``max_shard_size`` is not a size.
    """
    with new_folder(folder) as temporary:
        edited.copy_into(model)
        if dtype is not None:
            model.to(dtype)
        write_model(temporary, model, tok, max_shard_size)
        write_card(temporary, "model", edited.provenance,
                   note="" if dtype is None else f"All parameters were rounded to {str(dtype).removeprefix('torch.')}.")


def export_deltas(folder: Path, edited: EditedWeights, *, tolerance: float = TOLERANCE, exact: bool = False,
                  dtype: torch.dtype | None = None) -> tuple[LayerError, ...]:
    """Write deltas to the base model; see ``compute_deltas`` for the arguments.

    Returns:
        How each parameter is stored, and with what error.

    Raises:
        ValueError: the folder is not empty, or as ``compute_deltas`` does.
    """
    check_free(folder)  # before the computation
    deltas = compute_deltas(edited, tolerance=tolerance, exact=exact, dtype=dtype)
    with new_folder(folder) as temporary:
        write_deltas(temporary, deltas)
        write_card(temporary, "deltas", deltas.origin, deltas.layers)
    return deltas.layers


def export_adapter(folder: Path, model: nn.Module, edited: EditedWeights, rank: int,
                   dtype: torch.dtype = torch.float32) -> tuple[LayerError, ...]:
    """Write a LoRA adapter; see ``write_adapter`` for the arguments.

    Returns:
        The approximation error of each parameter.

    Raises:
        ValueError: the folder is not empty, or as ``write_adapter`` does.
    """
    with new_folder(folder) as temporary:
        layers = write_adapter(temporary, model, edited, rank, dtype)
        largest = max(layer.relative_error for layer in layers)
        if largest > _LOSSY:
            logger.warning("an adapter of rank %d has a relative error of %.0f%%, so facts may be lost: a rank of the "
                           "number of edits, %d, holds the whole change", rank, 100 * largest,
                           edited.provenance.num_edits)
        write_card(temporary, "lora", edited.provenance, layers)
    return layers


def export_applied(folder: Path, model: nn.Module, tok: PreTrainedTokenizerBase, deltas: Deltas,
                   max_shard_size: str = MAX_SHARD_SIZE) -> None:
    """Apply deltas to the base model and write the whole edited model.

    Args:
        folder: new or empty.
        model: the unedited base model; has the edited weights afterwards.
        tok: its tokenizer.
        deltas: see ``read_deltas``.

    Raises:
        ValueError: the folder is not empty, ``max_shard_size`` is not a size, or the model is not the deltas' base.
    """
    with new_folder(folder) as temporary:
        apply_deltas(model, deltas)
        write_model(temporary, model, tok, max_shard_size)
        write_card(temporary, "model", deltas.origin, deltas.layers)
