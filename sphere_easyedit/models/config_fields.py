"""Number of blocks and hidden size from a model's config, under the attribute names of each architecture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "model_dim", "dim")


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The config of the language model: the config itself, or the text part of a multimodal one."""
    own: Any = getattr(config, "get_text_config", None)
    found: Any = None
    if own is not None:
        try:
            found = own(decoder=True)
        except (TypeError, ValueError):  # transformers too old for the argument, or several text parts
            found = None
    if not isinstance(found, PretrainedConfig):
        found = getattr(config, "text_config", None) or config
    if _first(found, _LAYER_COUNTS) is None:  # a wrapper with another name for its text part
        parts = [part for part in vars(found).values() if isinstance(part, PretrainedConfig)]
        decoders = [part for part in map(text_config, parts)
                    if _first(part, _LAYER_COUNTS) is not None and getattr(part, "vocab_size", None)]
        if len(decoders) == 1:
            found = decoders[0]
    text: PretrainedConfig = found
    return text


def _first(config: PretrainedConfig, names: Sequence[str]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def num_blocks(config: PretrainedConfig) -> int:
    """Number of decoder blocks according to the config.

    Raises:
        ValueError: the config has none.
    """
    return _number(config, _LAYER_COUNTS, "number of layers")


def hidden_size(config: PretrainedConfig) -> int:
    """Width of the residual stream according to the config.

    Raises:
        ValueError: the config has none.
    """
    return _number(config, _WIDTHS, "hidden size")


def _number(config: PretrainedConfig, names: Sequence[str], what: str) -> int:
    found = _first(text_config(config), names)
    if found is None:
        raise ValueError(f"{type(config).__name__} names no {what} (looked for {', '.join(names)}): a causal language "
                         "model of transformers is needed")
    return found
