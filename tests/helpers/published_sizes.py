"""Sizes of published models, as their configs on the hub have them."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig


def _sizes(blocks: int, hidden: int, inner: int, heads: int, key_heads: int, vocabulary: int, **rest: Any
           ) -> dict[str, Any]:
    return {"num_hidden_layers": blocks, "hidden_size": hidden, "intermediate_size": inner,
            "num_attention_heads": heads, "num_key_value_heads": key_heads, "vocab_size": vocabulary, **rest}


_LLAMA = {"model_type": "llama", "tie_word_embeddings": True}
_QWEN = {"model_type": "qwen3", "head_dim": 128}
_GEMMA = {"model_type": "gemma3_text", "head_dim": 256, "sliding_window": 512}

# Short name of the hyperparameter files: hub name, and what the model's config has.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3.2-1b": ("meta-llama/Llama-3.2-1B", _sizes(16, 2048, 8192, 32, 8, 128256, **_LLAMA)),
    "llama3.2-3b": ("meta-llama/Llama-3.2-3B", _sizes(28, 3072, 8192, 24, 8, 128256, **_LLAMA)),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", _sizes(28, 1024, 3072, 16, 8, 151936, tie_word_embeddings=True, **_QWEN)),
    "qwen3-1.7b": ("Qwen/Qwen3-1.7B", _sizes(28, 2048, 6144, 16, 8, 151936, tie_word_embeddings=True, **_QWEN)),
    "qwen3-4b": ("Qwen/Qwen3-4B", _sizes(36, 2560, 9728, 32, 8, 151936, tie_word_embeddings=True, **_QWEN)),
    "qwen3-8b": ("Qwen/Qwen3-8B", _sizes(36, 4096, 12288, 32, 8, 151936, tie_word_embeddings=False, **_QWEN)),
    "gemma3-270m": ("google/gemma-3-270m", _sizes(18, 640, 2048, 4, 1, 262144, **_GEMMA)),
    "gemma3-1b": ("google/gemma-3-1b-pt", _sizes(26, 1152, 6912, 4, 1, 262144, **_GEMMA)),
    "gemma3-4b": ("google/gemma-3-4b-pt", {"model_type": "gemma3", "text_config": _sizes(
        34, 2560, 10240, 8, 4, 262208, **{**_GEMMA, "sliding_window": 1024})}),
    "olmo2-1b": ("allenai/OLMo-2-0425-1B", _sizes(16, 2048, 8192, 16, 16, 100352, model_type="olmo2")),
    "olmo2-7b": ("allenai/OLMo-2-1124-7B", _sizes(32, 4096, 11008, 32, 32, 100352, model_type="olmo2")),
    "olmo3-7b": ("allenai/Olmo-3-1025-7B", _sizes(32, 4096, 11008, 32, 32, 100278, model_type="olmo3")),
}


def published_config(name: str) -> PretrainedConfig:
    """Config of a published model of these sizes, by its hyperparameter files' short name."""
    return AutoConfig.for_model(**PUBLISHED[name][1])
