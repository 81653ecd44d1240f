"""Continuations against a plain forward pass for every token, on models with every type of cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig

from helpers.metric_records import AROUND, tokenizer
from helpers.models import tiny_model
from sphere_easyedit.evaluation.generation import generate_continuations
from sphere_easyedit.evaluation.perplexity import perplexity
from sphere_easyedit.evaluation.teacher_forcing import score_rows
from sphere_easyedit.models.architecture import max_positions
from sphere_easyedit.models.row_logits import TargetRow

OLD = Version(transformers.__version__) < Version("5")
IDS = {"vocab_size": 1500, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LIKE_LLAMA = {**IDS, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
              "intermediate_size": 80, "max_position_embeddings": 128}
LIKE_GPT = {**IDS, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 128}
LIKE_MAMBA = {**IDS, "hidden_size": 48, "num_hidden_layers": 4, "state_size": 8}
HEADS = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_d_state": 8, "mamba_n_groups": 1}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LIKE_LLAMA,
    "gpt2": LIKE_GPT,
    "gpt_bigcode": {**LIKE_GPT, "multi_query": True},
    "bloom": {**IDS, "hidden_size": 48, "n_layer": 4, "n_head": 4},
    "mpt": {**IDS, "d_model": 48, "n_layers": 4, "n_heads": 4, "max_seq_len": 128},
    "falcon": {**IDS, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "alibi": True},
    # Position embeddings that start at 2.
    "opt": {**IDS, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 80,
            "max_position_embeddings": 128, "word_embed_proj_dim": 48},
    "xglm": {**IDS, "d_model": 48, "num_layers": 4, "attention_heads": 4, "ffn_dim": 80,
             "max_position_embeddings": 128},
    "ctrl": {**LIKE_GPT, "dff": 80},
    "openai-gpt": LIKE_GPT,  # without a cache
    # Attention windows shorter than the texts.
    "gemma3_text": {**LIKE_LLAMA, "head_dim": 12, "sliding_window": 16,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
    "recurrent_gemma": {**LIKE_LLAMA, "num_key_value_heads": 1, "lru_width": 48, "attention_window_size": 16,
                        "head_dim": 12},
    # Recurrent and convolutional states, alone and alternating with attention.
    "mamba": LIKE_MAMBA,
    "mamba2": {**LIKE_MAMBA, "num_heads": 8, "head_dim": 12, "n_groups": 1},
    "falcon_mamba": LIKE_MAMBA,
    "rwkv": {**IDS, "hidden_size": 48, "num_hidden_layers": 4, "attention_hidden_size": 48, "intermediate_size": 80,
             "context_length": 128},
    "bamba": {**LIKE_LLAMA, **HEADS, "attn_layer_indices": [1, 3]},
    "jamba": {**LIKE_LLAMA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "num_experts": 2,
              "mamba_d_state": 8, "mamba_dt_rank": 4},
    "zamba2": {**LIKE_LLAMA, "num_key_value_heads": 4, "mamba_d_state": 8, "mamba_headdim": 12, "mamba_ngroups": 1,
               "n_mamba_heads": 8, "layers_block_type": ["mamba", "hybrid"] * 2, "use_mem_rope": True,
               "num_mem_blocks": 1},
    "falcon_h1": {**LIKE_LLAMA, **HEADS, "mamba_d_ssm": 96},
    "granitemoehybrid": {**LIKE_LLAMA, **HEADS, "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 0,
                         "shared_intermediate_size": 80},
    "lfm2": {**LIKE_LLAMA, "full_attn_idxs": [1, 3]},
    "qwen3_next": {**LIKE_LLAMA, "head_dim": 12, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
                   "linear_key_head_dim": 12, "linear_value_head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2,
                   "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
}
PROMPTS = ["The capital of France is", "A", "Who is here today, my friend, and why does nobody ever tell me about it?",
           "The mother tongue of that man"]
STEPS = 12


def model_of(model_type: str) -> nn.Module:
    """A tiny model with random weights, large enough for attention and recurrences to matter."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    if OLD and model_type in {"openai-gpt", "recurrent_gemma", "mamba2", "jamba"}:
        pytest.skip(f"in transformers {transformers.__version__} plain forward passes of {model_type} fail in part")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(model_type, **MODELS[model_type])
        model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0)
    return model


@pytest.fixture
def llama() -> Any:
    return tiny_model("llama", initializer_range=0.2, max_position_embeddings=256)


def argmax(logits: torch.Tensor, _step: int) -> int:
    return int(logits.argmax())


@torch.no_grad()
def slow_tokens(model: Any, ids: list[int], steps: int, ends: set[int],
                choose: Callable[[torch.Tensor, int], int] = argmax) -> list[int]:
    """New tokens, by a plain forward pass over all tokens for every new one."""
    new: list[int] = []
    while len(new) < steps:
        new.append(choose(model(torch.tensor([ids + new]), use_cache=False).logits[0, -1], len(new)))
        if new[-1] in ends:
            return new[:-1]
    return new


def prompt_ids(tok: Any, prompt: str, kind: str) -> list[int]:
    return AROUND[kind][0] + list(tok(prompt, add_special_tokens=False).input_ids)


def decoded(tok: Any, prompt_ids: list[int], new_ids: list[int]) -> str:
    prompt = tok.decode(prompt_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    whole = tok.decode(prompt_ids + new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert whole.startswith(prompt)
    return str(whole[len(prompt) :])


def slow_texts(model: Any, tok: Any, prompts: list[str], steps: int, kind: str = "plain", ends: set[int] | None = None
               ) -> list[str]:
    ids = [prompt_ids(tok, prompt, kind) for prompt in prompts]
    return [decoded(tok, one, slow_tokens(model, one, steps, {tok.eos_token_id} | (ends or set()))) for one in ids]


@pytest.mark.parametrize("model_type", MODELS)
def test_is_what_plain_forward_passes_give(model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    """With the model's cache, except for RWKV's, which mixes up the rows of a batch in transformers 5.23, and some that
    fail after short prompts in older releases."""
    model, tok = model_of(model_type), tokenizer("plain")
    expected = slow_texts(model, tok, PROMPTS, STEPS)
    assert len(set(expected)) > 1
    with caplog.at_level(logging.INFO, logger="sphere_easyedit"):
        assert generate_continuations(model, tok, PROMPTS, STEPS) == expected
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("sphere_easyedit")]
    if OLD or model_type == "rwkv":
        assert all("gives other states with a cache" in message for message in messages) and len(messages) <= 1
    else:
        assert not messages
    assert generate_continuations(model, tok, PROMPTS, STEPS) == expected  # the model is unchanged


def generate_wrongly(model: Any, most_tokens: int) -> Any:
    """The model's ``generate``, with wrong positions for tokens after a cache of few tokens."""
    original = model.generate

    def shift(_module: Any, _args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple(part.roll(1, dims=-1) if part.shape[1] == 1 else part for part in output)

    def generate(**kwargs: Any) -> Any:
        wrong = kwargs["input_ids"].shape[1] <= most_tokens
        handles = [module.register_forward_hook(shift) for name, module in model.named_modules()
                   if wrong and name.endswith("rotary_emb")]
        try:
            return original(**kwargs)
        finally:
            for handle in handles:
                handle.remove()

    return generate


@pytest.mark.parametrize("most_tokens", [100, 1])
def test_a_cache_that_gives_something_else_is_not_used(most_tokens: int, monkeypatch: pytest.MonkeyPatch,
                                                       caplog: pytest.LogCaptureFixture) -> None:
    """Also if it is wrong after short prompts only, as convolutions in some releases of transformers are."""
    model, tok = tiny_model("llama", initializer_range=0.2), tokenizer("plain")
    expected = slow_texts(model, tok, PROMPTS, STEPS)
    monkeypatch.setattr(model, "generate", generate_wrongly(model, most_tokens))
    with caplog.at_level(logging.INFO, logger="sphere_easyedit"):
        assert generate_continuations(model, tok, PROMPTS, STEPS) == expected
    assert len(caplog.records) == 1
    assert "LlamaForCausalLM gives other states with a cache" in caplog.text


def test_a_model_that_cannot_generate(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, tok = tiny_model("llama", initializer_range=0.2), tokenizer("plain")
    expected = slow_texts(model, tok, PROMPTS, STEPS)

    def broken(*_args: Any, **_kwargs: Any) -> None:
        raise ValueError("get_seq_length")

    monkeypatch.setattr(model, "generate", broken)
    with caplog.at_level(logging.INFO, logger="sphere_easyedit"):
        assert generate_continuations(model, tok, PROMPTS, STEPS) == expected
    assert [record.getMessage() for record in caplog.records] == [
        "LlamaForCausalLM can't generate with a cache (ValueError: get_seq_length): generating without one"]


@pytest.mark.parametrize("kind", ["plain", "both"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_of_the_model_s_settings_only_end_tokens_apply(family: str, kind: str) -> None:
    """A prompt may contain end tokens; the settings stay as they are."""
    model, tok = tiny_model(family, initializer_range=0.2), tokenizer(kind)
    tok.pad_token = None
    prompts = [*PROMPTS, f"The capital{tok.eos_token} of France is{tok.eos_token} the"]
    assert prompt_ids(tok, prompts[-1], kind).count(tok.eos_token_id) >= 2
    # An end token that the first continuation contains.
    end = slow_tokens(model, prompt_ids(tok, PROMPTS[0], kind), 12, set())[5]
    for ends in (None, tok.eos_token_id, [end, 7]):
        expected = slow_texts(model, tok, prompts, 12, kind, {end, 7} if isinstance(ends, list) else None)
        assert len(set(expected)) > 1
        own = GenerationConfig(num_beams=3, repetition_penalty=5.0, do_sample=True, max_length=5, min_new_tokens=20,
                               suppress_tokens=[int(tok(" the").input_ids[-1])], eos_token_id=ends)
        model.generation_config = own
        before = own.to_dict()
        assert generate_continuations(model, tok, prompts, 12) == expected
        assert model.generation_config is own
        assert own.to_dict() == before


def test_continuations_refuse(llama: Any) -> None:
    tok = tokenizer("plain")
    assert generate_continuations(llama, tok, []) == []
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: generate_continuations(llama, tok, ["A"], 0), "max_new_tokens is 0"),
        (lambda: generate_continuations(llama, tok, ["A", ""]), r"prompt 1 \(''\) has no tokens"),
        (lambda: generate_continuations(llama, tok, ["A"], top_k=0, seeds=[[1]]), "top_k is 0"),
        (lambda: generate_continuations(llama, tok, ["A"], top_k=5), "top_k is 5, with no seeds for 1 prompts"),
        (lambda: generate_continuations(llama, tok, ["A"], top_k=5, seeds=[]), "with 0 seeds for 1 prompts"),
        (lambda: generate_continuations(llama, tok, ["A"], seeds=[[1]]), "top_k is None, with 1 seeds"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sampled_continuations_depend_on_their_prompt_and_seed_alone(family: str) -> None:
    model, tok = tiny_model(family, initializer_range=0.2), tokenizer("bos")
    prompts, seeds = [*PROMPTS, PROMPTS[0]], [(3, number) for number in range(5)]
    texts = generate_continuations(model, tok, prompts, 12, 4, seeds)
    assert texts[0] != texts[4]  # another seed
    assert texts[0] != generate_continuations(model, tok, prompts[:1], 12)[0]
    for prompt, seed, text in zip(prompts, seeds, texts, strict=True):
        assert generate_continuations(model, tok, [prompt], 12, 4, [seed]) == [text]
        draws = np.random.default_rng(seed).random(12).tolist()

        def sample(logits: torch.Tensor, step: int, draws: list[float] = draws) -> int:
            most_likely = logits.double().argsort(descending=True)[:4]
            cumulative = torch.softmax(logits.double()[most_likely], dim=0).cumsum(0)
            return int(most_likely[int((cumulative <= draws[step]).sum())])

        ids = prompt_ids(tok, prompt, "bos")
        assert text == decoded(tok, ids, slow_tokens(model, ids, 12, {tok.eos_token_id}, sample))
    greedy = generate_continuations(model, tok, prompts, 12)
    assert generate_continuations(model, tok, prompts, 12, 1, seeds) == greedy


def test_tokens_are_sampled_by_their_probabilities(llama: Any) -> None:
    tok, count = tokenizer("plain"), 1000
    logits = llama(torch.tensor([tok("The").input_ids])).logits[0, -1].detach().double()
    values, tokens = logits.topk(3)
    values = torch.softmax(values, dim=0)
    texts = generate_continuations(llama, tok, ["The"] * count, 1, 3, [[number] for number in range(count)])
    assert set(texts) <= {tok.decode([token]) for token in tokens.tolist()}
    for value, token in zip(values.tolist(), tokens.tolist(), strict=True):
        found = texts.count(tok.decode([token]))
        assert abs(found - count * value) < 4 * (count * value * (1 - value)) ** 0.5


def test_prompts_generate_together_and_equal_ones_once(llama: Any) -> None:
    tok, rows = tokenizer("plain"), []
    prompts = ["The mother tongue of Danielle Darrieux is", "A", "Who", "The capital", "Who is here, and why?"]
    handle = llama.lm_head.register_forward_hook(lambda _module, _args, out: rows.append(tuple(out.shape[:2])))
    seen: list[tuple[int, int]] = []
    try:
        texts = generate_continuations(llama, tok, prompts * 3, 80, progress=lambda *done: seen.append(done))
    finally:
        handle.remove()
    assert texts[:5] == texts[5:10] == texts[10:]
    assert set(rows[:-1]) == {(5, 1)}  # five rows, logits of their last position only
    longest, shortest = max(counts := [len(tok(prompt).input_ids) for prompt in prompts]), min(counts)
    assert rows[-1] == (1, 2 * (longest - shortest + 80))  # two of them again, without a cache
    assert seen == [(5, 5)]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mamba"])
def test_within_an_outer_inference_mode(model_type: str) -> None:
    """The same values, and a model that can be trained afterwards."""
    model, tok = model_of(model_type), tokenizer("plain")
    rows = [TargetRow([5, 6, 7], [8, 9]), TargetRow([5, 6], [9]), TargetRow([20, 21, 22, 23], [24])]

    def all_values() -> tuple[Any, ...]:
        return (score_rows(model, rows, log_probs_for=range(3)), generate_continuations(model, tok, PROMPTS, 4),
                perplexity(model, tok, PROMPTS, window=8))

    expected = all_values()
    with torch.inference_mode():
        assert all_values() == expected
    with torch.no_grad():
        assert all_values() == expected
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(torch.tensor([[5, 6, 7]])).logits.sum().backward()
    assert all_values() == expected


# --- the context's limit --------------------------------------------------------------------------------------

LIMITED = ("gpt2", "gpt_bigcode", "openai-gpt", "ctrl", "mpt", "opt", "rwkv", "llama")


@pytest.mark.parametrize("model_type", LIMITED)
def test_prompts_past_the_context_are_refused(model_type: str) -> None:
    """Whatever name the config has for the limit; just within it, everything runs."""
    model, tok = model_of(model_type), tokenizer("plain")
    assert max_positions(model.config) == 128
    text = "X" + " a" * 125
    assert len(tok(text).input_ids) == 126
    assert len(generate_continuations(model, tok, [text], 3)) == 1
    with pytest.raises(ValueError, match=r"has 126 tokens: with max_new_tokens 4 it exceeds .* context of 128"):
        generate_continuations(model, tok, [text], 4)
    long = "X" + " a" * 400
    assert perplexity(model, tok, [long], window=512).window == 128


def test_names_of_the_limit() -> None:
    for model_type, changes, expected in (
        ("bloom", {"seq_length": 64}, 64), ("bloom", {}, None), ("mamba", {}, None),
        ("xlnet", {}, None),  # whose config says -1
        ("whisper", {"max_target_positions": 32}, 32), ("codegen", {"n_positions": 64, "n_ctx": 96}, 64),
        ("mpt", {"max_seq_len": 32}, 32)):
        assert max_positions(AutoConfig.for_model(model_type, **changes)) == expected, model_type
