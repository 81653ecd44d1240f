"""Tiny models built from configs, settings that edit them, and requests."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
)

import sphere_easyedit as sphere
from helpers.golden import GOLDEN


def gaussian(seed: int, rows: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix of standard normal entries, drawn in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """Config of a tiny decoder, by model type, that shares the golden tokenizer's vocabulary."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    common = {"vocab_size": 1500, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.15}
    rope = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 128}
    gpt = {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_inner": 80, "n_positions": 128}
    own: dict[str, dict[str, Any]] = {
        "llama": rope,
        "qwen2": rope,
        "qwen3": {**rope, "head_dim": 12},
        "mistral": rope,
        # Sliding and full attention, each with its own rotary base, by turns.
        "gemma3_text": {**rope, "head_dim": 12, "sliding_window": 16,
                        "layer_types": ["sliding_attention", "full_attention"] * 2},
        "gemma2": {**rope, "head_dim": 12, "sliding_window": 16},
        "olmo2": rope,
        "granite": {**rope, "residual_multiplier": 0.25},
        "gpt2": gpt,
        "gptj": {**gpt, "rotary_dim": 8},
    }
    return AutoConfig.for_model(family, **{**common, **own[family], **changes})


def tiny_model(family: str, **changes: Any) -> nn.Module:
    """A tiny decoder with fixed random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()


def save_tiny_model(folder: Path, family: str, **changes: Any) -> None:
    """Write a tiny decoder, with the golden tokenizer, as a folder that transformers loads."""
    tiny_model(family, **changes).save_pretrained(folder)
    for file in (GOLDEN / "llama" / "tiny-llama").glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)


def tiny_hparams(folder: Path, **changes: Any) -> sphere.SPHEREHyperParams:
    """Settings that edit a tiny model in a second, with statistics from text that it generates itself."""
    settings = {"model_name": "tiny", "layers": [1, 2], "v_num_grad_steps": 12, "v_lr": 0.5, "v_loss_layer": 3,
                "v_weight_decay": 0.001, "clamp_norm_factor": 4.0, "kl_factor": 0.0625, "L2": 0.1,
                "mom2_update_weight": 20.0, "nullspace_share": 0.6, "mom2_dataset": "generated", "mom2_n_samples": 12,
                "mom2_max_length": 32,  # texts of 128 tokens take a second more in each test that collects its own
                "stats_dir": str(folder / "stats"), "context_templates": ["He said that. {}"], **changes}
    return sphere.SPHEREHyperParams.from_dict(settings)


REQUESTS = [
    {"prompt": "The capital of France is", "subject": "France", "target_new": "Rome"},
    {"prompt": "{} plays for the team", "subject": "John Smith", "target_new": "the United States"},
    {"prompt": "The official language of Brazil is", "subject": "Brazil", "target_new": "German"},
]

def edited_weights(model: nn.Module, hparams: sphere.SPHEREHyperParams) -> dict[int, Tensor]:
    """Copies of the edited weights as stored, by layer."""
    names = hparams.module_names(model.config)
    return {layer: model.get_parameter(f"{names.rewrite_module_tmp.format(layer)}.weight").detach().clone()
            for layer in hparams.layers}

