"""What `load_model` loads, and in which words it refuses the rest."""

from __future__ import annotations

import json
import logging
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import tiny_config, tiny_hparams, tiny_model
from helpers.paths import TESTS
from sphere_easyedit.editing.callbacks import EditCallback, EditEvent
from sphere_easyedit.models.loading import load_model
from sphere_easyedit.models.model_class import meta_model
from sphere_easyedit.models.shipped_configs import hub_options, model_config
from sphere_easyedit.utils.messages import one_line

TEXT = {"vocab_size": 1500, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 128,
        "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "image_size": 28, "patch_size": 14}
MROPE = {"rope_type": "default", "mrope_section": [2, 2, 2], "rope_theta": 10000.0}
LLAMA = {**TEXT, "model_type": "llama"}
# Wrappers around a text model: what their configs are made from, by model type.
WRAPPERS: dict[str, dict[str, Any]] = {
    "llava": {"text_config": LLAMA, "vision_config": {**VISION, "model_type": "clip_vision_model"},
               "image_token_index": 1499},
    "qwen2_5_vl": {"text_config": {**TEXT, "rope_scaling": MROPE, "rope_parameters": MROPE},
                   "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32,
                                      "out_hidden_size": 48}},
    "mistral3": {"text_config": {**TEXT, "model_type": "mistral"},
                  "vision_config": {**VISION, "model_type": "pixtral", "head_dim": 8}},
    "paligemma": {"text_config": {**TEXT, "model_type": "gemma"}, "projection_dim": 48,
                   "vision_config": {**VISION, "model_type": "siglip_vision_model", "projection_dim": 48}},
    "gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "idefics3": {"text_config": LLAMA, "vision_config": VISION},
    "smolvlm": {"text_config": LLAMA, "vision_config": VISION},
}


def save(config: PretrainedConfig, auto: Any, folder: Path, tok: PreTrainedTokenizerBase) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        getattr(auto, "from_config", getattr(auto, "_from_config", None))(config).save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def config_of(family: str, **settings: Any) -> PretrainedConfig:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = AutoConfig.for_model(family, **settings)
    if isinstance(getattr(config, "text_config", None), dict):
        pytest.skip(f"transformers {transformers.__version__} gives {family} no config of its text model")
    return config


def refusal(call: Callable[[], object]) -> str:
    """The message of a refusal, which is one line and short, whatever transformers had to say."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 450
    return message


class Losses(EditCallback):
    """Keeps the last losses that the optimiser reported."""

    losses: Sequence[float] = ()

    def on_batch_end(self, event: EditEvent) -> None:
        self.losses = list(event.losses)


# --- wrappers around a decoder -------------------------------------------------------------------------------------


def target_nll(model: nn.Module, tok: PreTrainedTokenizerBase, request: dict[str, str]) -> float:
    """Mean over the target's tokens, by a plain forward pass."""
    ids = tok(request["prompt"] + " " + request["target_new"], return_tensors="pt").input_ids
    start = len(tok(request["prompt"]).input_ids)
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].float()
    return float(nn.functional.cross_entropy(logits[start - 1: -1], ids[0, start:]))


@pytest.mark.parametrize("family", [family for family in WRAPPERS if family != "paligemma"])
def test_a_wrapper_is_loaded_by_name_and_edited(family: str, tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    settings = WRAPPERS[family]
    auto = getattr(transformers, "AutoModelForImageTextToText", None) or transformers.AutoModelForVision2Seq
    folder = save(config_of(family, **settings), auto, tmp_path / family, tok)
    model, tokenizer = load_model(str(folder), "cpu")
    assert type(model).__name__ == json.loads((folder / "config.json").read_text())["architectures"][0]
    # One token asks for another: no other place is there, which an edited weight would change, too.
    request, seen = {"prompt": "A", "subject": "A", "target_new": "of"}, Losses()
    assert len(tok("A of").input_ids) == 2
    [root] = [name.removesuffix(".layers.1.mlp.down_proj") for name, module in model.named_modules()
              if name.endswith("layers.1.mlp.down_proj") and module.out_features == 48]
    [head] = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    before = target_nll(model, tokenizer, request)
    hparams = tiny_hparams(
        tmp_path, base_alg="MEMIT", alpha=0.0, layers=[1], mom2_update_weight=1e-5, context_templates=[],
        kl_factor=0.0, v_weight_decay=0.0, v_num_grad_steps=10, rewrite_module_tmp=f"{root}.layers.{{}}.mlp.down_proj",
        layer_module_tmp=f"{root}.layers.{{}}", mlp_module_tmp=f"{root}.layers.{{}}.mlp",
        attn_module_tmp=f"{root}.layers.{{}}.self_attn", ln_f_module=f"{root}.norm", lm_head_module=head)
    edited, _ = sphere.apply_sphere_to_model(model, tokenizer, [request], hparams, callbacks=[seen])
    after = target_nll(edited, tokenizer, request)
    assert seen.losses[0] < before - 0.1  # through Gemma 3's output norm, one layer reaches no further
    assert after == pytest.approx(seen.losses[0], abs=0.02)


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    """The loss of a target would have seen the target; through causal attention the same weights are edited."""
    config = config_of("paligemma", **WRAPPERS["paligemma"])
    folder = save(config, transformers.PaliGemmaForConditionalGeneration, tmp_path / "paligemma", tok)
    with torch.no_grad():
        model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(folder).eval()
        one, other = (model(input_ids=torch.tensor([[5, 6, last]])).logits[0, :2] for last in (7, 8))
    if torch.equal(one, other):
        pytest.skip(f"PaliGemma of transformers {transformers.__version__} is causal on text alone")
    assert "PaliGemmaForConditionalGeneration is not causal" in refusal(
        lambda: load_model(str(folder), "cpu"))


def test_a_wrapper_is_planned_and_described_by_its_config(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    config = config_of("llava", **WRAPPERS["llava"])
    config.architectures = ["LlavaForConditionalGeneration"]
    with torch.device("meta"):
        expected = transformers.LlavaForConditionalGeneration(config)
    built = meta_model(config)
    assert {name: parameter.shape for name, parameter in built.named_parameters()} == {
        name: parameter.shape for name, parameter in expected.named_parameters()}
    assert all(parameter.is_meta for parameter in built.parameters())


def test_a_tokenizer_that_was_saved_with_a_processor_is_found(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    folder = save(config_of("llava", **WRAPPERS["llava"]), transformers.LlavaForConditionalGeneration,
                  tmp_path / "llava", tok)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    transformers.LlavaProcessor(transformers.CLIPImageProcessor(), tok, patch_size=14).save_pretrained(folder)
    assert load_model(str(folder), "cpu")[1]("The capital of France")["input_ids"] == tok(
        "The capital of France")["input_ids"]


def test_a_model_that_needs_more_than_text_is_refused(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    config = config_of("blip-2", text_config={"model_type": "opt", "vocab_size": 1500, "hidden_size": 16, "ffn_dim": 16,
                                              "num_hidden_layers": 1, "num_attention_heads": 2,
                                              "word_embed_proj_dim": 16},
                       vision_config={**VISION, "model_type": "blip_2_vision_model"},
                       qformer_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                                       "num_attention_heads": 2, "encoder_hidden_size": 16}, image_token_index=1499)
    folder = save(config, transformers.Blip2ForConditionalGeneration, tmp_path / "blip", tok)
    said = refusal(lambda: load_model(str(folder), "cpu"))
    assert "Blip2ForConditionalGeneration does not run on text alone" in said


# --- what is none ------------------------------------------------------------------------------------------------

ENCODING = {"vocab_size": 1500, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16,
            "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "pad_token_id": 0,
            "decoder_start_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "forced_eos_token_id": None}
BERT = {"vocab_size": 1500, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2}
NONE = {
    "t5": ({"vocab_size": 1500, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2},
           "AutoModelForSeq2SeqLM", "'t5' is an encoder-decoder"),
    "bart": (ENCODING, "AutoModelForSeq2SeqLM", "'bart' is an encoder-decoder"),
    "whisper": ({**ENCODING, "max_source_positions": 8, "max_target_positions": 8, "begin_suppress_tokens": None},
                "AutoModelForSpeechSeq2Seq", "'whisper' is an encoder-decoder"),
    "bert": (BERT, "AutoModelForMaskedLM", "'bert' is an encoder"),
    "roberta": (BERT, "AutoModelForSequenceClassification", "'roberta' is an encoder"),
    "wav2vec2": ({**BERT, "conv_dim": [8], "conv_kernel": [2], "conv_stride": [2], "num_feat_extract_layers": 1,
                  "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2},
                 "AutoModelForCTC", "'wav2vec2' is not a causal language model"),
    "vit": (VISION, "AutoModelForImageClassification", "'vit' is not a causal language model"),
    "llama": (TEXT, "AutoModelForSequenceClassification",
              "its checkpoint lacks 1 weights of a LlamaForCausalLM, such as lm_head.weight"),
}


@pytest.mark.parametrize("family", NONE)
def test_what_is_no_decoder_of_text_is_refused_in_a_line(family: str, tmp_path: Path,
                                                         tok: PreTrainedTokenizerBase) -> None:
    settings, auto, why = NONE[family]
    folder = save(config_of(family, **settings), getattr(transformers, auto), tmp_path / family, tok)
    said = refusal(lambda: load_model(str(folder), "cpu"))
    assert why in said
    assert "give a" in said


def test_a_decoder_of_an_encoders_kind_is_loaded(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    folder = save(config_of("bert", **BERT, is_decoder=True), transformers.AutoModelForCausalLM, tmp_path / "bert", tok)
    assert type(load_model(str(folder), "cpu")[0]).__name__ == "BertLMHeadModel"


def test_a_pipeline_of_diffusion_is_refused_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert "can't be loaded" in refusal(lambda: load_model(str(tmp_path), "cpu"))


# --- damaged and incomplete folders ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tok = transformers.AutoTokenizer.from_pretrained(TESTS / "golden" / "llama" / "tiny-llama")
    tiny_model("llama").save_pretrained(folder, max_shard_size="100KB")
    tok.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


def without_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()


def without_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def with_a_cut_shard(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:1000])


def with_noise_for_a_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].write_bytes(b"no tensors" * 100)


def without_a_tensor(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = folder / content["weight_map"]["model.layers.2.mlp.down_proj.weight"]
    tensors = load_file(shard)
    del tensors["model.layers.2.mlp.down_proj.weight"], content["weight_map"]["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, shard, {"format": "pt"})
    index.write_text(json.dumps(content))


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without_model_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))


def of_an_unknown_kind(folder: Path) -> None:
    _change_config(folder, model_type="llama99")


def of_other_shapes(folder: Path) -> None:
    _change_config(folder, intermediate_size=84)


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(("damage", "why"), [
    (without_tokenizer, "its tokenizer can't be read"),
    (without_weights, "its weights can't be read"),
    (without_a_shard, "its weights can't be read"),
    (with_a_cut_shard, "its weights can't be read"),
    (with_noise_for_a_shard, "its weights can't be read"),
    (without_a_tensor, "lacks 1 weights of a LlamaForCausalLM, such as model.layers.2.mlp.down_proj.weight"),
    (without_model_type, "model_type"),
    (of_an_unknown_kind, "llama99"),
    (of_other_shapes, "its weights can't be read"),
    (without_config, "config.json"),
], ids=lambda value: getattr(value, "__name__", None))
def test_a_damaged_folder_is_refused_in_a_line_with_the_remedy(
        damage: Callable[[Path], None], why: str, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(whole, folder)
    damage(folder)
    said = refusal(lambda: load_model(str(folder), "cpu"))
    assert said.startswith(f"model {str(folder)!r} can't be loaded: ")
    assert why in said
    assert any(remedy in said for remedy in ("give a", "put tokenizer.json", "again", "correct its config.json"))


def test_an_adapter_is_loaded_by_what_its_base_is(whole: Path, tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(whole)
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj"], r=2))
    adapted.save_pretrained(tmp_path / "lora")
    tok.save_pretrained(tmp_path / "lora")
    model, _ = load_model(str(tmp_path / "lora"), "cpu")
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_a_long_error_is_told_in_a_line() -> None:
    assert one_line(ValueError("first\n\n  second\tthird")) == "first second third"
    assert one_line(KeyError("odd")) == "KeyError: 'odd'"
    assert one_line(RuntimeError()) == "RuntimeError"
    assert one_line("word " * 1000) == ("word " * 40)[:-1][:199] + "…"


# --- the hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No network, and no word to huggingface_hub that there is none."""
    def refused(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    yield


def test_an_unknown_name_without_network_is_refused_at_once(unreachable: None, caplog: pytest.LogCaptureFixture
                                                            ) -> None:
    started = time.perf_counter()
    said = refusal(lambda: load_model("nobody/no-such-model", "cpu"))
    assert time.perf_counter() - started < 5
    assert "there is no such folder" in said
    assert "the hub can't be reached" in said
    assert not [record for record in caplog.records if "Retry" in record.getMessage()]


def test_what_is_cached_is_loaded_without_network(unreachable: None, whole: Path, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
                                                  ) -> None:
    repository = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(whole, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    started = time.perf_counter()
    with caplog.at_level(logging.INFO, "sphere_easyedit"):
        options = hub_options("somebody/tiny")
    assert options == {"local_files_only": True}
    assert time.perf_counter() - started < 5
    assert "using the cached" in caplog.text


def test_a_folders_config_is_read_without_asking_the_hub(unreachable: None, whole: Path) -> None:
    assert model_config(str(whole)).to_dict()["hidden_size"] == tiny_config("llama").hidden_size
    assert hub_options(str(whole)) == {}


def test_a_path_that_is_not_there_is_no_hub_name(unreachable: None) -> None:
    assert "there is no such folder" in refusal(lambda: load_model("/nowhere/at/all", "cpu"))
