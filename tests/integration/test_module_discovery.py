"""Where decoders keep their parts, found in the module trees of many architectures."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutput
from transformers.pytorch_utils import Conv1D

import sphere_easyedit as sphere
from helpers.architectures import ARCHITECTURES, NEWER, WRAPS_TEXT_MODELS, architecture_config, tiny_architecture
from helpers.models import tiny_hparams, tiny_model
from sphere_easyedit.hparams import SPHEREHyperParams
from sphere_easyedit.hparams_files import starting_file, starting_hparams
from sphere_easyedit.models.architecture import EditableModel
from sphere_easyedit.models.config_fields import hidden_size, num_blocks, text_config
from sphere_easyedit.models.model_class import meta_model
from sphere_easyedit.models.module_discovery import (
    ModuleNames,
    decoder_parts,
    model_module_names,
    module_names,
)


def _names(blocks: str, down: str, attention: str, norm: str, head: str = "lm_head") -> ModuleNames:
    mlp = down.rpartition(".")[0] or down  # of linear maps that hang on the block, the last stands for the MLP
    return ModuleNames(f"{blocks}.{{}}.{down}", f"{blocks}.{{}}", f"{blocks}.{{}}.{mlp}", f"{blocks}.{{}}.{attention}",
                       norm, head)


LLAMA = _names("model.layers", "mlp.down_proj", "self_attn", "model.norm")
INNER = (_names("model.language_model.layers", "mlp.down_proj", "self_attn", "model.language_model.norm")
         if WRAPS_TEXT_MODELS else
         _names("language_model.model.layers", "mlp.down_proj", "self_attn", "language_model.model.norm",
                "language_model.lm_head"))
IDEFICS = _names("model.text_model.layers", "mlp.down_proj", "self_attn", "model.text_model.norm")
NEOX = _names("gpt_neox.layers", "mlp.dense_4h_to_h", "attention", "gpt_neox.final_layer_norm",
              "lm_head" if NEWER else "embed_out")
FALCON = _names("transformer.h", "mlp.dense_4h_to_h", "self_attention", "transformer.ln_f")
GPT = _names("transformer.h", "mlp.c_proj", "attn", "transformer.ln_f")
GPTJ = _names("transformer.h", "mlp.fc_out", "attn", "transformer.ln_f")
SHARED = _names("model.layers", "mlp.shared_experts.down_proj", "self_attn", "model.norm")
GRANITE = _names("model.layers", "shared_mlp.output_linear", "self_attn", "model.norm")
LFM2 = _names("model.layers", "feed_forward.w2", "self_attn", "model.embedding_norm")
LLAMA4 = _names("model.layers", "feed_forward.down_proj", "self_attn", "model.norm")
HYBRID = _names("model.layers", "feed_forward.down_proj", "self_attn", "model.final_layernorm")

EXPECTED = {
    **dict.fromkeys((
        "llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "stablelm", "smollm3", "granite", "seed_oss", "helium",
        "hunyuan_v1_dense", "ernie4_5", "diffllama", "bitnet", "glm", "cwm", "vaultgemma", "jais2", "hyperclovax",
        "granite_swa", "youtu", "ministral", "gemma2", "gemma3_text", "glm4", "olmo2", "olmo3", "exaone4", "olmo",
        "cohere", "cohere2", "nemotron", "arcee", "apertus", "doge", "gemma3n_text", "gemma4_text", "gemma4_text:dense",
        "qwen3_5_text", "olmo_hybrid", "qwen2_moe:dense_first", "qwen3_moe:dense_first", "deepseek_v2", "deepseek_v3",
        "glm4_moe", "ernie4_5_moe"), LLAMA),
    "starcoder2": _names("model.layers", "mlp.c_proj", "self_attn", "model.norm"),
    "nanochat": _names("model.layers", "mlp.fc2", "self_attn", "model.norm"),
    "persimmon": _names("model.layers", "mlp.dense_4h_to_h", "self_attn", "model.final_layernorm"),
    "phi": _names("model.layers", "mlp.fc2", "self_attn", "model.final_layernorm"),
    "gpt_neox": NEOX, "gpt_neox:sequential": NEOX,
    "falcon": FALCON, "falcon:sequential": FALCON, "falcon:new": FALCON, "bloom": FALCON,
    "xglm": _names("model.layers", "fc2", "self_attn", "model.layer_norm"),
    "opt": _names("model.decoder.layers", "fc2", "self_attn", "model.decoder.final_layer_norm"),
    "biogpt": _names("biogpt.layers", "fc2", "self_attn", "biogpt.layer_norm", "output_projection"),
    "gpt2": GPT, "gpt_bigcode": GPT, "gpt_neo": GPT, "gptj": GPTJ, "codegen": GPTJ,
    "mpt": _names("transformer.blocks", "ffn.down_proj", "attn", "transformer.norm_f"),
    "ctrl": _names("transformer.h", "ffn.2", "multi_head_attention", "transformer.layernorm"),
    "qwen2_moe": _names("model.layers", "mlp.shared_expert.down_proj", "self_attn", "model.norm"),
    "qwen3_next": _names("model.layers", "mlp.shared_expert.down_proj", "self_attn", "model.norm"),
    "dots1": SHARED,
    "hunyuan_v1_moe": _names("model.layers", "mlp.shared_mlp.down_proj", "self_attn", "model.norm"),
    "llama4_text": LLAMA4, "llama4": LLAMA4,
    "granitemoeshared": GRANITE, "granitemoehybrid": GRANITE, "granitemoehybrid:experts": GRANITE,
    "lfm2": LFM2, "lfm2_moe": LFM2,
    "jamba": _names("model.layers", "feed_forward.down_proj", "mamba", "model.final_layernorm"),
    "bamba": HYBRID, "falcon_h1": HYBRID, "falcon_h1:multipliers": HYBRID,
    "recurrent_gemma": _names("model.layers", "mlp_block.down_proj", "temporal_block", "model.final_norm"),
    "nemotron_h": _names("model.layers", "mixer.down_proj", "mixer", "model.norm_f"),
    "rwkv": _names("rwkv.blocks", "feed_forward.value", "attention", "rwkv.ln_out", "head"),
    "modernbert-decoder": _names("model.layers", "mlp.Wo", "attn", "model.final_norm", "decoder"),
    **dict.fromkeys(("gemma3", "llava", "llava_next", "paligemma", "paligemma:gemma", "mistral3", "qwen2_vl",
                     "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "aya_vision"), INNER),
    "idefics3": IDEFICS, "smolvlm": IDEFICS,
}
ALL_ROUTED = r"can't be edited: layers \[0, 1, 2, 3\] have routed experts, which can't be edited$"
NO_MLP = r"can't be edited: layers \[0, 1, 2, 3\] have no MLP$"
REFUSED = {
    **dict.fromkeys(("mixtral", "phimoe", "olmoe", "gpt_oss", "dbrx", "qwen3_moe", "granitemoe", "minimax", "flex_olmo",
                     "jetmoe"), ALL_ROUTED),
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), NO_MLP),
    "openai-gpt": "has no norm between its last block and its LM head",
    "zamba2": r"layers \[2, 5\] share their MLP's weights with other layers; layers \[0, 1, 3, 4\] have no MLP$",
}
# Down-projections by layer, where they are not the same module in all.
PLACES = {
    "qwen2_moe:dense_first": {"mlp.down_proj": (0, 1), "mlp.shared_expert.down_proj": (2, 3)},
    "qwen3_moe:dense_first": {"mlp.down_proj": (0, 1, 2)},
    "deepseek_v2": {"mlp.down_proj": (0, 1), "mlp.shared_experts.down_proj": (2, 3)},
    "deepseek_v3": {"mlp.down_proj": (0, 1, 2), "mlp.shared_experts.down_proj": (3,)},
    "dots1": {"mlp.down_proj": (0,), "mlp.shared_experts.down_proj": (1, 2, 3)},
    "glm4_moe": {"mlp.down_proj": (0, 1), "mlp.shared_experts.down_proj": (2, 3)},
    "ernie4_5_moe": {"mlp.down_proj": (0, 1), "mlp.shared_experts.down_proj": (2, 3)},
    "llama4_text": {"feed_forward.down_proj": (0, 2), "feed_forward.shared_expert.down_proj": (1, 3)},
    "llama4": {"feed_forward.down_proj": (0, 2), "feed_forward.shared_expert.down_proj": (1, 3)},
    "lfm2_moe": {"feed_forward.w2": (0, 1)},
    "jamba": {"feed_forward.down_proj": (0, 2)},
    "nemotron_h": {"mixer.down_proj": (1, 3, 5)},
}
# Types that are also tested with an inner width equal to the hidden size.
SQUARE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo", "olmo2", "granite",
          "stablelm", "smollm3", "gemma3", "gpt2", "gptj")


def test_every_architecture_is_expected_or_refused() -> None:
    assert {*EXPECTED, *REFUSED} == {*ARCHITECTURES}
    assert not {*EXPECTED} & {*REFUSED}


@pytest.mark.parametrize("label", EXPECTED)
def test_names(label: str) -> None:
    config = architecture_config(label)
    assert module_names(config) == EXPECTED[label]
    model = tiny_architecture(label)
    assert model_module_names(model) == EXPECTED[label]
    parts = decoder_parts(model)
    assert dict(parts.downs) == PLACES.get(label, {next(iter(parts.downs)): tuple(range(num_blocks(config)))})
    assert hidden_size(config) == 48
    assert parts.num_blocks == num_blocks(config) == len(model.get_submodule(parts.blocks))


@pytest.mark.parametrize("label", REFUSED)
def test_refused_in_one_line(label: str) -> None:
    config = architecture_config(label)
    for refused in (lambda: module_names(config), lambda: model_module_names(meta_model(config)),
                    lambda: starting_hparams(config, "m")):
        with pytest.raises(ValueError, match=REFUSED[label]) as caught:
            refused()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", SQUARE)
def test_square_down_projections_are_found(label: str) -> None:
    """Where the inner width is the hidden size, shapes do not tell an MLP's linear maps apart."""
    same = {"n_inner": 48} if label.startswith("gpt") else {"intermediate_size": 48}
    if label == "gemma3":
        same = {"text_config": {**ARCHITECTURES[label]["text_config"], **same}}
    assert module_names(architecture_config(label, **same)) == EXPECTED[label]


@pytest.mark.parametrize("label", sorted({*EXPECTED} - {"modernbert-decoder", "gemma3n_text"}))
def test_norm_and_head_make_the_logits(label: str) -> None:
    """Up to a factor or a cap that keeps the order. ModernBERT's head has another layer, Gemma 3n several streams."""
    model = tiny_architecture(label)
    names = model_module_names(model)
    hidden: list[Tensor] = []
    block = model.get_submodule(names.layer_module_tmp.format(num_blocks(model.config) - 1))
    block.register_forward_hook(lambda _m, _a, out: hidden.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(5, 14).unsqueeze(0), use_cache=False).logits[0]
        ours = model.get_submodule(names.lm_head_module)(model.get_submodule(names.ln_f_module)(hidden[0][0]))
    ranks = [part.argsort().argsort().double() for part in (logits, ours)]
    correlations = [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*ranks, strict=True)]
    assert min(correlations) > 0.9999


@pytest.mark.parametrize("label", sorted({*EXPECTED} - {"gemma3n_text"}))
def test_the_down_projection_is_the_last_map_of_the_mlp(label: str) -> None:
    """What it gives out is all that its block adds to the stream for a token besides what the mixer adds.

    With its weight and bias at zero, the block's output changes, and the MLP's other maps have no effect any more.
    """
    model = tiny_architecture(label)
    names, parts = model_module_names(model), decoder_parts(model)
    layer = parts.downs[parts.options()[0]][-1]
    block, mlp = (model.get_submodule(name.format(layer)) for name in (names.layer_module_tmp, names.mlp_module_tmp))
    down = model.get_submodule(names.rewrite_module_tmp.format(layer))
    outputs: list[Tensor] = []
    block.register_forward_hook(lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out))

    @torch.no_grad()
    def output() -> Tensor:
        model(input_ids=torch.arange(5, 14).unsqueeze(0), use_cache=False)
        return outputs[-1].clone()

    whole = output()
    with torch.no_grad():
        for parameter in down.parameters():
            parameter.zero_()
        without = output()
        assert not torch.allclose(whole, without, atol=1e-3)
        others = [module for module in (block if mlp is down else mlp).children()
                  if isinstance(module, (nn.Linear, Conv1D)) and module is not down]
        assert others
        for module in others:
            module.weight.zero_()
    torch.testing.assert_close(output(), without)


def test_a_model_at_hand_is_named_for_the_layers_to_edit() -> None:
    config = architecture_config("qwen2_moe:dense_first")
    dense, shared = LLAMA, EXPECTED["qwen2_moe"]
    assert module_names(config, [0, 1]) == module_names(config) == dense
    assert module_names(config, [2, 3]) == shared
    model = tiny_architecture("qwen2_moe:dense_first")
    assert SPHEREHyperParams(**_settings([2, 3])).editable(model).names == shared
    assert SPHEREHyperParams(**_settings([2, 3])).module_names(config) == shared
    given = asdict(dense)
    assert SPHEREHyperParams(**_settings([1], **given)).editable(model).names == dense


def _settings(layers: list[int], **changes: Any) -> dict[str, Any]:
    return {"model_name": "tiny", "layers": layers, "v_num_grad_steps": 5, "v_lr": 0.5, "v_loss_layer": 3,
            "v_weight_decay": 0.5, "clamp_norm_factor": 0.75, "kl_factor": 0.0625, "nullspace_threshold": 0.02,
            "L2": 0.1, **changes}


@pytest.mark.parametrize(("label", "layers", "message"), [
    ("qwen3_moe:dense_first", [2, 3],
     r"layers \[3\]: layers \[3\] have routed experts, which can't be edited; layers with mlp.down_proj: 0, 1, 2$"),
    ("jamba", [1, 3], r"layers \[1, 3\] have routed experts, which can't be edited; "
                      r"layers with feed_forward.down_proj: 0, 2$"),
    ("nemotron_h", [1, 2], r"layers \[2\] have no MLP; layers with mixer.down_proj: 1, 3, 5$"),
    ("qwen2_moe:dense_first", [1, 2], r"layers \[2\] have their down-projection at mlp.shared_expert.down_proj; "
                                      r"layers with mlp.down_proj: 0, 1; "
                                      r"layers with mlp.shared_expert.down_proj: 2, 3$")])
def test_layers_without_such_an_mlp_are_named(label: str, layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPHEREHyperParams(**_settings(layers, v_loss_layer=3)).editable(tiny_architecture(label))


def test_routed_layers_are_named_where_names_are_given() -> None:
    model = tiny_architecture("mixtral")
    with pytest.raises(ValueError, match=r"layers \[1, 2\] have routed experts"):
        EditableModel(model, LLAMA, [1, 2])
    dense = tiny_model("llama")
    wrong = asdict(LLAMA) | {"rewrite_module_tmp": "model.layers.{}.mlp.up_prj"}
    with pytest.raises(ValueError, match=r"no module 'model\.layers\.1\.mlp\.up_prj'; nearest is"):
        EditableModel(dense, ModuleNames(**wrong), [1])


def test_several_candidates_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """Gemma 4's per-layer inputs have a projection to the hidden size, here wider than the MLP."""
    caplog.set_level(logging.INFO, "sphere_easyedit")
    names = module_names(architecture_config("gemma4_text", hidden_size_per_layer_input=256))
    assert names.rewrite_module_tmp == "model.layers.{}.mlp.down_proj"
    (line,) = caplog.messages
    assert "mlp.down_proj, per_layer_projection" in line
    assert "mlp.down_proj is edited, since it has the inner width that the config names" in line


def test_several_candidates_are_told_once_a_session(tok: PreTrainedTokenizerBase, tmp_path: Path,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    for block in model.model.layers:
        block.gate, block.projection = nn.Linear(48, 16), nn.Linear(16, 48)
    caplog.set_level(logging.INFO, "sphere_easyedit")
    for name in ("Rome", "Oslo"):
        sphere.apply_sphere_to_model(model, tok, [{"prompt": "{} is in", "subject": name, "target_new": "France"}],
                                     tiny_hparams(tmp_path))
    assert sum("mlp.down_proj is edited, since" in message for message in caplog.messages) == 1


# Encoders and other models


@pytest.mark.parametrize(("model_type", "message"), [
    ("t5", "'t5' is an encoder-decoder"), ("bart", "'bart' is an encoder-decoder"),
    ("whisper", "'whisper' is an encoder-decoder"), ("bert", "'bert' is an encoder,"),
    ("roberta", "'roberta' is an encoder,"), ("vit", "'vit' is not a causal language model"),
    ("clip", "'clip' is not a causal language model")])
def test_models_that_are_no_decoders_are_refused_shortly(model_type: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        module_names(AutoConfig.for_model(model_type))
    assert len(str(caught.value)) < 130


def test_a_model_without_a_head_is_refused() -> None:
    headless = AutoModel.from_config(architecture_config("llama"))
    with pytest.raises(ValueError, match="LlamaModel has no LM head"):
        model_module_names(headless)
    with pytest.raises(ValueError, match="Linear has no transformers config"):
        model_module_names(nn.Linear(2, 2))


def test_a_config_that_builds_no_model_is_refused_in_one_line() -> None:
    config = architecture_config("llama")
    config.hidden_act = "no such function"
    with pytest.raises(ValueError, match="no model can be built from this LlamaConfig: ") as caught:
        module_names(config)
    assert "\n" not in str(caught.value)


# Architectures that transformers has no class for


class OddConfig(PretrainedConfig):
    model_type = "odd"

    def __init__(self, dim: int = 48, n_layers: int = 4, vocab_size: int = 1500, **kwargs: Any) -> None:
        self.dim, self.n_layers, self.vocab_size = dim, n_layers, vocab_size
        super().__init__(**kwargs)


class Mix(nn.Module):
    """Attention with one head, under no name that tells."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.d(nn.functional.scaled_dot_product_attention(self.a(x), self.b(x), self.c(x), is_causal=True))


class OddBlock(nn.Module):
    def __init__(self, dim: int, choices: int) -> None:
        super().__init__()
        self.lookup = Mix(dim)
        self.pre, self.post = nn.LayerNorm(dim), nn.LayerNorm(dim)
        if choices:
            self.pick = nn.Linear(dim, choices)
            self.parts = nn.ModuleList(nn.Sequential(nn.Linear(dim, 80), nn.ReLU(), nn.Linear(80, dim))
                                       for _ in range(choices))
        else:
            # The one that is edited is registered first.
            self.dense = nn.ModuleDict({"back": nn.Linear(80, dim), "up": nn.Linear(dim, 80)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.lookup(self.pre(x))
        return x + self.dense["back"](self.dense["up"](self.post(x)).relu())


class OddForText(PreTrainedModel):
    config_class = OddConfig
    _tied_weights_keys: Any = None

    def __init__(self, config: OddConfig, routed: tuple[int, ...] = (), choices: int = 3) -> None:
        super().__init__(config)
        dim = config.dim
        # A tower of as many blocks of the same width, which sees no tokens, in front.
        self.tower = nn.ModuleDict({"stages": nn.ModuleList(OddBlock(dim, 0) for _ in range(config.n_layers)),
                                    "norm": nn.LayerNorm(dim)})
        self.body = nn.ModuleDict({
            "last": nn.LayerNorm(dim), "words": nn.Embedding(config.vocab_size, dim),
            "stages": nn.ModuleList(OddBlock(dim, choices if i in routed else 0) for i in range(config.n_layers))})
        self.out = nn.Linear(dim, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.body["words"]

    def get_output_embeddings(self) -> nn.Module:
        return self.out

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> CausalLMOutput:
        x = self.body["words"](input_ids)
        for stage in self.body["stages"]:
            x = stage(x)
        return CausalLMOutput(logits=self.out(self.body["last"](x)))


ODD = ModuleNames("body.stages.{}.dense.back", "body.stages.{}", "body.stages.{}.dense", "body.stages.{}.lookup",
                  "body.last", "out")


def test_an_unknown_architecture_is_read_from_its_module_tree() -> None:
    model = OddForText(OddConfig())
    assert model_module_names(model) == ODD
    assert (num_blocks(model.config), hidden_size(model.config)) == (4, 48)
    with pytest.raises(ValueError, match="architecture 'odd' is not known to transformers"):
        module_names(model.config)


@pytest.mark.parametrize("choices", [3, 4])
def test_experts_are_told_by_their_router_whatever_they_are_called(choices: int) -> None:
    """Also where there are as many of them as blocks."""
    parts = decoder_parts(OddForText(OddConfig(), routed=(1, 3), choices=choices))
    assert parts.blocks == "body.stages"
    assert (dict(parts.downs), parts.routed) == ({"dense.back": (0, 2)}, (1, 3))
    assert parts.names() == ODD


def test_two_mlps_of_one_width_in_a_block_are_ambiguous() -> None:
    model = OddForText(OddConfig())
    for stage in model.body["stages"]:
        stage.second = nn.Sequential(nn.Linear(48, 80), nn.ReLU(), nn.Linear(80, 48))
    with pytest.raises(ValueError, match=r"layers \[0, 1, 2, 3\] have several possible down-projections "
                                         r"\(dense\.back, second\.2\)$"):
        model_module_names(model)
    for stage in model.body["stages"]:
        stage.second = nn.Sequential(nn.Linear(48, 60), nn.ReLU(), nn.Linear(60, 48))  # an adapter
    assert model_module_names(model) == ODD


def test_two_lists_of_blocks_are_ambiguous() -> None:
    model = OddForText(OddConfig())
    model.body["others"] = nn.ModuleList(OddBlock(48, 0) for _ in range(4))
    with pytest.raises(ValueError, match=r"several lists of 4 decoder blocks \(body\.stages, body\.others\)"):
        model_module_names(model)
    model.config.n_layers = 5
    with pytest.raises(ValueError, match=r"no list of 5 decoder blocks \(tower\.stages \(4\), body\.stages \(4\)"):
        model_module_names(model)


class WrapperConfig(PretrainedConfig):
    model_type = "odd-wrapper"

    def __init__(self, speech: Any = None, words: Any = None, **kwargs: Any) -> None:
        self.speech, self.words = speech, words
        super().__init__(**kwargs)


def test_a_wrapper_may_name_its_text_config_otherwise() -> None:
    words = OddConfig(n_layers=5)
    wrapper = WrapperConfig(PretrainedConfig(num_hidden_layers=7, hidden_size=9), words)
    assert text_config(wrapper) is words
    assert (num_blocks(wrapper), hidden_size(wrapper)) == (5, 48)
    with pytest.raises(ValueError, match="WrapperConfig names no number of layers"):
        num_blocks(WrapperConfig())


# Starting files


@pytest.mark.parametrize(("label", "base"), [*((label, "AlphaEdit") for label in EXPECTED), ("jamba", "FT"),
                                             ("jamba", "ROME"), ("gpt2", "FT"), ("llava", "ROME")])
def test_a_starting_file_from_a_config_alone_fits_the_model(label: str, base: str, tmp_path: Path) -> None:
    architecture_config(label).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    hparams = SPHEREHyperParams.from_dict(yaml.safe_load(starting_file(config, str(tmp_path), base)))
    model = tiny_architecture(label)
    editable = EditableModel(model, hparams.module_names(config), hparams.layers)
    assert editable.names == model_module_names(model, hparams.layers)


@pytest.mark.parametrize(("label", "changes", "layers", "place"), [
    # The band of 32 layers is 4 to 8.
    ("qwen3_moe", {"num_hidden_layers": 32, "mlp_only_layers": list(range(6))}, [4, 5], "mlp.down_proj"),
    ("qwen3_moe", {"num_hidden_layers": 32, "mlp_only_layers": [0, 1, 2, 12, 20]}, [0, 1, 2, 12, 20], "mlp.down_proj"),
    ("qwen3_moe", {"num_hidden_layers": 32, "mlp_only_layers": [0, 1, 2, 9, 10, 12, 20, 30]}, [0, 1, 2, 9, 10],
     "mlp.down_proj"),
    ("deepseek_v3", {"num_hidden_layers": 32}, [4, 5, 6, 7, 8], "mlp.shared_experts.down_proj"),
    ("deepseek_v3", {"num_hidden_layers": 32, "first_k_dense_replace": 7}, [4, 5, 6], "mlp.down_proj"),
    ("llama4_text", {"num_hidden_layers": 32}, [4, 6, 8], "feed_forward.down_proj"),
    ("jamba", {"num_hidden_layers": 32}, [4, 6, 8], "feed_forward.down_proj"),
])
def test_starting_layers_are_those_next_to_the_published_depth_that_have_an_mlp(
        label: str, changes: dict[str, Any], layers: list[int], place: str, caplog: pytest.LogCaptureFixture) -> None:
    if "layer_types" in ARCHITECTURES[label]:
        changes = {"layer_types": ARCHITECTURES[label]["layer_types"] * 8, **changes}
    caplog.set_level(logging.INFO, "sphere_easyedit")
    config = architecture_config(label, **changes)
    start = starting_hparams(config, "m")
    assert start["layers"] == layers
    assert start["rewrite_module_tmp"] == f"model.layers.{{}}.{place}"
    told = [line for line in caplog.messages if line.startswith(f"layers {layers} in place of [4, 5, 6, 7, 8]")]
    header = starting_file(config, "m").split("alg_name")[0]
    if layers == [4, 5, 6, 7, 8]:
        assert not told
        assert "in place of" not in header
    else:
        assert len(told) == 1
        assert told[0].split(":")[0] in header.replace("\n# ", " ")
