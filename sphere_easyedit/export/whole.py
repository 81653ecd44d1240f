"""Saves a whole model with its tokenizer in transformers' format."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from torch import nn
from transformers import PreTrainedTokenizerBase

MAX_SHARD_SIZE: Final = "5GB"


def write_model(folder: Path, model: nn.Module, tok: PreTrainedTokenizerBase, max_shard_size: str = MAX_SHARD_SIZE
                ) -> None:
    """Write a model in its dtype, and its tokenizer, into an existing folder.

    Args:
        max_shard_size: of each safetensors file, such as ``200MB``; a larger tensor is a file of its own.

    Raises:
        ValueError: transformers does not understand ``max_shard_size``.
    """
    saved: Any = model
    saved.save_pretrained(folder, max_shard_size=max_shard_size)
    tok.save_pretrained(folder)
