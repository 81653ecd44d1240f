"""Tiny decoders of many architectures, built from their configs alone, with random weights.

`ARCHITECTURES` maps a label to the config's keyword changes. A label is the config's `model_type`, or the model type
and a variant after a colon, as in `falcon:sequential`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PretrainedConfig

NEWER = Version(transformers.__version__) >= Version("5")
# Before it, a vision-language model holds a whole causal language model.
WRAPS_TEXT_MODELS = Version(transformers.__version__) >= Version("4.52")
VOCABULARY = {"vocab_size": 1500, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {**VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128, "initializer_range": 0.15}
GPT = {**VOCABULARY, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_inner": 80, "n_positions": 128,
       "initializer_range": 0.15}
VISION = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14, "num_channels": 3}


def _changed(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`base` with changes; ``...`` as a value takes a key away."""
    return {key: value for key, value in (base | changes).items() if value is not ...}


def _rope(**changes: Any) -> dict[str, Any]:
    return _changed(SIZES, **changes)


def _gpt(**changes: Any) -> dict[str, Any]:
    return _changed(GPT, **changes)


def _wrapper(text: str, text_changes: dict[str, Any] | None = None, vision: str | None = None,
             vision_changes: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A vision-language config around a text model's."""
    named = {} if vision is None else {"model_type": vision}
    return {"text_config": {"model_type": text, **_rope(**(text_changes or {}))},
            "vision_config": {**named, **_changed(VISION, **(vision_changes or {}))}, **changes}


_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
_LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
           "head_dim": ..., "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 2, "n_group": 1,
           "topk_group": 1, **_EXPERTS}
_LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
           "layer_types": ["linear_attention", "full_attention"] * 2}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 4,
          "mamba_expand": 2, "mamba_chunk_size": 16}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    # Llama's layout: gated MLPs, a norm in front of each part.
    "llama": _rope(),
    "mistral": _rope(),
    "qwen2": _rope(head_dim=...),
    "qwen3": _rope(),
    "gemma": _rope(),
    "phi3": _rope(head_dim=...),
    "stablelm": _rope(head_dim=..., partial_rotary_factor=0.5),
    "smollm3": _rope(head_dim=...),
    "granite": _rope(residual_multiplier=0.25),
    "seed_oss": _rope(),
    "helium": _rope(),
    "hunyuan_v1_dense": _rope(),
    "ernie4_5": _rope(),
    "diffllama": _rope(head_dim=...),
    "bitnet": _rope(head_dim=...),
    "glm": _rope(),
    "cwm": _rope(),
    "vaultgemma": _rope(sliding_window=16),
    "jais2": _rope(),
    "hyperclovax": _rope(),
    "granite_swa": _rope(head_dim=..., sliding_window=16),
    "youtu": _rope(q_lora_rank=24, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
                   head_dim=..., num_key_value_heads=4),
    "ministral": _rope(sliding_window=16),
    # Norms behind the parts, or on both sides.
    "gemma2": _rope(sliding_window=16),
    "gemma3_text": _rope(sliding_window=16, layer_types=["sliding_attention", "full_attention"] * 2),
    "glm4": _rope(),
    "olmo2": _rope(),
    "olmo3": _rope(sliding_window=16),
    "exaone4": _rope(head_dim=..., sliding_window=16),
    # MLPs without a gate, and parallel blocks.
    "olmo": _rope(head_dim=...),
    "cohere": _rope(head_dim=..., logit_scale=0.25),
    "cohere2": _rope(head_dim=..., sliding_window=16, logit_scale=0.25),
    "starcoder2": _rope(head_dim=...),
    "nemotron": _rope(),
    "arcee": _rope(head_dim=...),
    "apertus": _rope(head_dim=...),
    "nanochat": _rope(head_dim=...),
    "persimmon": _rope(head_dim=...),
    "phi": _rope(head_dim=...),
    "gpt_neox": _rope(head_dim=..., num_key_value_heads=..., rotary_pct=0.5),
    "gpt_neox:sequential": _rope(head_dim=..., num_key_value_heads=..., rotary_pct=0.5, use_parallel_residual=False),
    "falcon": _rope(head_dim=..., num_key_value_heads=..., ffn_hidden_size=80),
    "falcon:sequential": _rope(head_dim=..., num_key_value_heads=..., ffn_hidden_size=80, parallel_attn=False,
                               multi_query=False, alibi=True, bias=True),
    "falcon:new": _rope(head_dim=..., num_key_value_heads=..., ffn_hidden_size=80, new_decoder_architecture=True,
                        num_kv_heads=2),
    "xglm": {**VOCABULARY, "d_model": 48, "ffn_dim": 80, "num_layers": 4, "attention_heads": 4,
             "max_position_embeddings": 128, "init_std": 0.15},
    "opt": {**VOCABULARY, "hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 80, "num_hidden_layers": 4,
            "num_attention_heads": 4, "max_position_embeddings": 128, "init_std": 0.15},
    "biogpt": _rope(head_dim=..., num_key_value_heads=...),
    # GPT's layout.
    "gpt2": _gpt(),
    "gptj": _gpt(rotary_dim=8),
    "codegen": _gpt(rotary_dim=8),
    "gpt_bigcode": _gpt(),
    "gpt_neo": {**VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_layers": 4, "num_heads": 4,
                "attention_types": [[["global", "local"], 2]], "window_size": 16, "max_position_embeddings": 128,
                "initializer_range": 0.15},
    "bloom": {**VOCABULARY, "hidden_size": 48, "n_layer": 4, "n_head": 4, "initializer_range": 0.15},
    "mpt": {**VOCABULARY, "d_model": 48, "n_heads": 4, "n_layers": 4, "expansion_ratio": 2, "max_seq_len": 128,
            "initializer_range": 0.15},
    "openai-gpt": _gpt(n_inner=...),
    "ctrl": {**VOCABULARY, "n_embd": 48, "dff": 80, "n_layer": 4, "n_head": 4, "n_positions": 128,
             "initializer_range": 0.15},
    # Routed experts in some layers or in all, with or without a shared expert.
    "mixtral": _rope(head_dim=..., num_local_experts=4, num_experts_per_tok=2),
    "phimoe": _rope(head_dim=..., num_local_experts=4, num_experts_per_tok=2),
    "olmoe": _rope(head_dim=..., num_experts=4, num_experts_per_tok=2),
    "gpt_oss": _rope(num_local_experts=4, num_experts_per_tok=2, sliding_window=16),
    "dbrx": {**VOCABULARY, "d_model": 48, "n_heads": 4, "n_layers": 4, "max_seq_len": 128, "initializer_range": 0.15,
             "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
             "ffn_config": {"ffn_hidden_size": 80, "moe_num_experts": 4, "moe_top_k": 2,
                            **({"hidden_size": 48} if NEWER else {})}},
    "qwen2_moe": _rope(head_dim=..., num_experts=4, shared_expert_intermediate_size=56, **_EXPERTS),
    "qwen2_moe:dense_first": _rope(head_dim=..., num_experts=4, shared_expert_intermediate_size=56,
                                   mlp_only_layers=[0, 1], **_EXPERTS),
    "qwen3_moe": _rope(num_experts=4, **_EXPERTS),
    "qwen3_moe:dense_first": _rope(num_experts=4, mlp_only_layers=[0, 1, 2], **_EXPERTS),
    "qwen3_next": _rope(num_experts=4, shared_expert_intermediate_size=56, **_EXPERTS, **_LINEAR),
    "deepseek_v2": _rope(first_k_dense_replace=2, topk_method="greedy", **_LATENT),
    "deepseek_v3": _rope(first_k_dense_replace=3, **_LATENT),
    "dots1": _rope(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1,
                   **_EXPERTS),
    "glm4_moe": _rope(n_routed_experts=4, n_shared_experts=1, first_k_dense_replace=2, n_group=1, topk_group=1,
                      **_EXPERTS),
    "ernie4_5_moe": _rope(head_dim=..., moe_num_experts=4, moe_k=2, moe_intermediate_size=40, moe_num_shared_experts=1,
                          moe_layer_start_index=2),
    "hunyuan_v1_moe": _rope(num_experts=4, moe_topk=2),
    "llama4_text": _rope(intermediate_size_mlp=72, num_local_experts=4, num_experts_per_tok=1,
                         interleave_moe_layer_step=2),
    "granitemoe": _rope(head_dim=..., num_local_experts=4, num_experts_per_tok=2),
    "granitemoeshared": _rope(head_dim=..., num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=56),
    "minimax": _rope(num_local_experts=4, num_experts_per_tok=2, block_size=16,
                     layer_types=["linear_attention", "full_attention"] * 2),
    "flex_olmo": _rope(head_dim=..., num_experts=4, num_experts_per_tok=2),
    "jetmoe": {**VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "kv_channels": 12,
               "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2,
               "max_position_embeddings": 128, "initializer_range": 0.15},
    # Recurrent models, alone and with attention.
    "granitemoehybrid": _rope(head_dim=..., num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=56,
                              layer_types=["mamba", "attention"] * 2, **_MAMBA),
    "granitemoehybrid:experts": _rope(head_dim=..., num_local_experts=4, num_experts_per_tok=2,
                                      shared_intermediate_size=56, layer_types=["mamba", "attention"] * 2, **_MAMBA),
    "lfm2": _rope(block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"] * 2),
    "lfm2_moe": _rope(head_dim=..., num_experts=4, num_dense_layers=2, layer_types=["conv", "full_attention"] * 2,
                      **_EXPERTS),
    "jamba": _rope(head_dim=..., num_experts=4, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1,
                   attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, mamba_dt_rank=4,
                   use_mamba_kernels=False),
    "bamba": _rope(head_dim=..., attn_layer_indices=[1, 3], **_MAMBA),
    "falcon_h1": _rope(mamba_d_ssm=96, **_MAMBA),
    "falcon_h1:multipliers": _rope(mamba_d_ssm=96, mlp_multipliers=[1.0, 0.3], lm_head_multiplier=0.5, **_MAMBA),
    "recurrent_gemma": _rope(lru_width=48, block_types=["recurrent", "attention"], attention_window_size=64,
                             logits_soft_cap=30.0),
    "zamba2": _rope(head_dim=..., num_key_value_heads=4, num_hidden_layers=6, mamba_d_state=8, mamba_expand=2,
                    n_mamba_heads=4, mamba_headdim=24, mamba_ngroups=1, chunk_size=16, num_mem_blocks=1,
                    layers_block_type=["mamba", "mamba", "hybrid", "mamba", "mamba", "hybrid"], adapter_rank=8,
                    use_mem_rope=True, use_mamba_kernels=False),
    "nemotron_h": _rope(num_hidden_layers=6, layers_block_type=["mamba", "mlp", "attention", "mlp", "mamba", "mlp"],
                        mamba_num_heads=4, mamba_head_dim=24, ssm_state_size=8, n_groups=1, conv_kernel=4, expand=2,
                        chunk_size=16, use_mamba_kernels=False),
    "qwen3_5_text": _rope(**_LINEAR),
    "olmo_hybrid": _rope(head_dim=..., **_LINEAR),
    "mamba": {**VOCABULARY, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 4, "initializer_range": 0.15,
              "use_mambapy": False},
    "mamba2": {**VOCABULARY, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 4, "num_heads": 4, "head_dim": 24,
               "n_groups": 1, "expand": 2, "chunk_size": 16, "initializer_range": 0.15},
    "falcon_mamba": {**VOCABULARY, "hidden_size": 48, "state_size": 8, "num_hidden_layers": 4,
                     "initializer_range": 0.15},
    "rwkv": {**VOCABULARY, "hidden_size": 48, "attention_hidden_size": 48, "intermediate_size": 80,
             "num_hidden_layers": 4, "context_length": 128},
    # Others of their own kind.
    "doge": _rope(head_dim=..., keep_window_size=64),
    "modernbert-decoder": _rope(head_dim=..., num_key_value_heads=..., local_attention=16, cls_token_id=0,
                                sep_token_id=0),
    "gemma3n_text": _rope(num_hidden_layers=5, sliding_window=16, vocab_size_per_layer_input=1500,
                          hidden_size_per_layer_input=16, laurel_rank=8, altup_num_inputs=2, num_kv_shared_layers=0,
                          layer_types=["sliding_attention", "sliding_attention", "full_attention",
                                       "sliding_attention", "full_attention"],
                          activation_sparsity_pattern=[0.0] * 5, intermediate_size=[80] * 5),
    "gemma4_text": _rope(sliding_window=16, vocab_size_per_layer_input=1500, hidden_size_per_layer_input=16,
                         global_head_dim=12, num_kv_shared_layers=0,
                         layer_types=["sliding_attention", "full_attention"] * 2),
    "gemma4_text:dense": _rope(sliding_window=16, vocab_size_per_layer_input=1500, hidden_size_per_layer_input=0,
                         global_head_dim=12, num_kv_shared_layers=0,
                         layer_types=["sliding_attention", "full_attention"] * 2),
    # A text model inside a vision-language one.
    "gemma3": _wrapper("gemma3_text", {"sliding_window": 16}, "siglip_vision_model", mm_tokens_per_image=4),
    "llava": _wrapper("llama", vision="clip_vision_model", vision_changes={"projection_dim": 32}),
    "llava_next": _wrapper("mistral", vision="clip_vision_model", vision_changes={"projection_dim": 32}),
    "paligemma": _wrapper("gemma2", {"sliding_window": 16}, "siglip_vision_model", {"projection_dim": 48},
                          projection_dim=48),
    # Through Gemma 1, words see those after them.
    "paligemma:gemma": _wrapper("gemma", {}, "siglip_vision_model", {"projection_dim": 48}, projection_dim=48),
    "mistral3": _wrapper("mistral", vision="pixtral", vision_changes={"head_dim": 16}),
    "qwen2_vl": _wrapper("qwen2_vl_text", {"head_dim": ..., "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}, "rope_scaling": {
        "type": "mrope", "rope_type": "default", "mrope_section": [2, 2, 2]}},
        vision_changes={"depth": 4, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2, "hidden_size": 48}),
    "qwen2_5_vl": _wrapper("qwen2_5_vl_text", {"head_dim": ..., "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}, "rope_scaling": {
        "type": "mrope", "rope_type": "default", "mrope_section": [2, 2, 2]}},
        vision_changes={"depth": 4, "num_heads": 2, "out_hidden_size": 48}),
    "qwen3_vl": _wrapper("qwen3_vl_text", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 2, 2]}, "rope_scaling": {
        "rope_type": "default", "mrope_section": [2, 2, 2]}},
        vision_changes={"depth": 4, "num_heads": 2, "out_hidden_size": 48, "deepstack_visual_indexes": [0, 1],
                        "num_position_embeddings": 16}),
    "idefics3": _wrapper("llama", vision="idefics3_vision", image_token_id=1, scale_factor=2),
    "smolvlm": _wrapper("llama", vision="smolvlm_vision", image_token_id=1, scale_factor=2),
    "internvl": _wrapper("qwen2", {"head_dim": ...}, "internvl_vision", {"image_size": [28, 28],
                                                                         "patch_size": [14, 14]}),
    "llava_onevision": _wrapper("qwen2", {"head_dim": ...}, "siglip_vision_model"),
    "llama4": _wrapper("llama4_text", {"intermediate_size_mlp": 72, "num_local_experts": 4, "num_experts_per_tok": 1,
                                       "interleave_moe_layer_step": 2}, "llama4_vision_model",
                       {"vision_output_dim": 48, "projector_input_dim": 32, "projector_output_dim": 32}),
    "aya_vision": _wrapper("cohere2", {"head_dim": ..., "sliding_window": 16}, "siglip_vision_model"),
}


def architecture_config(label: str, **changes: Any) -> PretrainedConfig:
    """Config of the tiny decoder with this label; skips the test where transformers has no such type."""
    model_type = label.partition(":")[0]
    flat = model_type in ("qwen2_vl", "qwen2_5_vl") and not WRAPS_TEXT_MODELS  # their configs had no part for text
    if model_type not in CONFIG_MAPPING or flat:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    return AutoConfig.for_model(model_type, **_changed(ARCHITECTURES[label], **changes))


def tiny_architecture(label: str, **changes: Any) -> nn.Module:
    """The tiny decoder with this label on the CPU, in float32, with fixed random weights.

    Args:
        label: one of `ARCHITECTURES`.
        changes: keywords of the outer config, in place of those in `ARCHITECTURES`.
    """
    config = architecture_config(label, **changes)
    causal = AutoModelForCausalLM._model_mapping
    if type(config) in causal:
        auto = AutoModelForCausalLM
        if not isinstance(config, causal[type(config)].config_class):  # a wrapper whose text model is loaded alone
            config = config.get_text_config()
    else:
        auto = getattr(transformers, "AutoModelForImageTextToText", None) or transformers.AutoModelForVision2Seq
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return auto.from_config(config).eval()
