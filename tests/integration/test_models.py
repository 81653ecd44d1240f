"""Architectures: where their parts are, which way their weights lie, and logits cut out of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

import sphere_easyedit as sphere
from helpers.models import REQUESTS, edited_weights, tiny_hparams, tiny_model
from sphere_easyedit.models.architecture import EditableModel, frozen, logits_at, max_positions
from sphere_easyedit.models.config_fields import num_blocks
from sphere_easyedit.models.logit_map import find_logit_map
from sphere_easyedit.models.module_discovery import module_names

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gpt2", "gptj")
SIZES: dict[str, Any] = {"vocab_size": 100, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
                         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12,
                         "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
                         "initializer_range": 0.15}
# What makes a model's logits something else than its head's output.
LOGIT_CONFIGS = [(family, {}) for family in FAMILIES] + [
    ("gemma2", {"final_logit_softcapping": 3.0}), ("gemma3_text", {"final_logit_softcapping": 3.0}),
    ("granite", {"logits_scaling": 4.0})]


class FooConfig(LlamaConfig):
    model_type = "foo"


def _known_config(model_type: str, **changes: Any) -> PretrainedConfig:
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    if model_type == "gemma3":
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "image_size": 28, "patch_size": 14}
        return AutoConfig.for_model(model_type, text_config={**SIZES, **changes}, vision_config=vision)
    if model_type in ("gpt2", "gptj"):
        changes = {"n_inner": 80, "rotary_dim": 8, **changes}
    return AutoConfig.for_model(model_type, **{**SIZES, **changes})


def _known_model(model_type: str, **changes: Any) -> nn.Module:
    """A tiny decoder whose norms and biases, too, are other than ones and zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(_known_config(model_type, **changes)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def _editable(model: nn.Module, layers: Sequence[int] = (1, 2)) -> EditableModel:
    return EditableModel(model, module_names(model.config), list(layers))


def test_number_of_blocks_and_positions() -> None:
    for family in FAMILIES:
        config = tiny_model(family).config
        assert (num_blocks(config), max_positions(config)) == (4, 128)
    multimodal = _known_config("gemma3")
    assert (num_blocks(multimodal), max_positions(multimodal)) == (3, 64)


def test_unknown_architecture_names_the_nearest_and_the_remedy() -> None:
    with pytest.raises(ValueError, match="'lama' is not known to transformers") as caught:
        module_names(_config_of_type("lama"))
    message = str(caught.value)
    assert "nearest known: llama" in message
    assert "give the loaded model" in message
    assert all(field in message for field in asdict(module_names(_known_config("llama"))))


def _config_of_type(model_type: str) -> PretrainedConfig:
    config = PretrainedConfig()
    config.model_type = model_type
    return config


def _foo_model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(FooConfig(**{**SIZES, "vocab_size": 1500, "max_position_embeddings": 128,
                                             "num_hidden_layers": 4})).eval()


@pytest.mark.parametrize("given", [True, False])
def test_unknown_architecture_is_edited(given: bool, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The same weights give the same edit, whether the names are the user's or found, and whatever the type."""
    foo, llama = _foo_model(), tiny_model("llama", hidden_size=48)
    llama.load_state_dict(foo.state_dict())
    names = asdict(module_names(llama.config))
    named = tiny_hparams(tmp_path, **{**names, "rewrite_module_tmp": names["rewrite_module_tmp"] + ".weight"})
    before = edited_weights(foo, named)
    sphere.apply_sphere_to_model(foo, tok, REQUESTS, named if given else tiny_hparams(tmp_path))
    sphere.apply_sphere_to_model(llama, tok, REQUESTS, tiny_hparams(tmp_path))
    for layer, weight in edited_weights(foo, named).items():
        assert not torch.equal(weight, before[layer])
        assert torch.equal(weight, edited_weights(llama, named)[layer])


def _forward_of(editable: EditableModel, layer: int, inputs: Tensor) -> Tensor:
    return editable.down_projection(layer)(inputs)


@pytest.mark.parametrize(("family", "changes"), [
    ("llama", {}), ("gpt2", {}), ("gptj", {}), ("gpt2", {"n_inner": 48}), ("llama", {"intermediate_size": 48})])
def test_weight_has_neurons_as_rows(family: str, changes: dict[str, Any]) -> None:
    """``y = x W^T + b``, also where the weight is square and its shape tells nothing."""
    editable = _editable(tiny_model(family, **changes))
    d_in = changes.get("n_inner", changes.get("intermediate_size", 80))
    weight = editable.weight(2)
    assert weight.shape == (48, d_in) == (editable.hidden_size, editable.d_in(2))
    assert editable.is_transposed(2) == (family == "gpt2")
    inputs = torch.randn(5, d_in, generator=torch.Generator().manual_seed(0))
    bias = getattr(editable.down_projection(2), "bias", None)
    torch.testing.assert_close(_forward_of(editable, 2, inputs), F.linear(inputs, weight, bias))
    if d_in == 48:
        assert not torch.allclose(_forward_of(editable, 2, inputs), F.linear(inputs, weight.T, bias))
    stored = editable.parameter(2)
    assert torch.equal(editable.orient(2, editable.orient(2, stored)), stored)
    assert editable.model.get_parameter(editable.parameter_name(2)) is stored


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_set_weight_is_exact(family: str, dtype: torch.dtype) -> None:
    editable = _editable(tiny_model(family).to(dtype))
    parameter, original = editable.parameter(1), editable.parameter(1).detach().clone()
    other = editable.parameter(2).detach().clone()
    kept = editable.weight(1).clone()
    value = torch.randn(kept.shape, generator=torch.Generator().manual_seed(0))
    editable.set_weight(1, value)
    assert torch.equal(editable.weight(1), value.to(dtype))
    editable.set_weight(1, kept)
    assert editable.parameter(1) is parameter
    assert torch.equal(parameter, original)
    assert torch.equal(editable.parameter(2), other)


@pytest.mark.parametrize(("layers", "message"), [
    ([1, 4], r"layers \[1, 4\] do not fit a model of 4 layers: give numbers from 0 to 3"),
    ([-1, 2], "do not fit a model of 4 layers"), ([], "do not fit"),
    ([2, 1], "must ascend"), ([1, 1], "must ascend")])
def test_wrong_layers(layers: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _editable(tiny_model("llama"), layers)


@pytest.mark.parametrize("field", ["rewrite_module_tmp", "ln_f_module", "lm_head_module"])
def test_missing_module_is_named(field: str) -> None:
    model = tiny_model("llama")
    names = module_names(model.config)
    right = getattr(names, field)
    wrong = right.replace("model", "decoder").replace("lm_head", "lm_heads")
    with pytest.raises(ValueError, match=f"no module '{wrong.format(1)}'; nearest is '{right.format(1)}'"):
        EditableModel(model, replace(names, **{field: wrong}), [1, 2])


@pytest.mark.parametrize(("changes", "message"), [
    ({"layers": [2, 7], "v_loss_layer": 7}, "do not fit a model of 4 layers"),
    ({"layer_module_tmp": "transformer.blocks.{}"}, r"no module 'transformer\.blocks\.")])
def test_wrong_names_and_layers_leave_the_model_alone(changes: dict[str, Any], message: str,
                                                      tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hparams = tiny_hparams(tmp_path, **{**asdict(module_names(model.config)), **changes})
    with pytest.raises(ValueError, match=message):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_module_without_a_matrix() -> None:
    model = tiny_model("llama")
    names = replace(module_names(model.config), rewrite_module_tmp="model.layers.{}.input_layernorm")
    with pytest.raises(ValueError, match=r"layers\.1\.input_layernorm\.weight is not a matrix"):
        EditableModel(model, names, [1])


def test_weight_on_the_meta_device() -> None:
    model = tiny_model("llama")
    module = model.get_submodule("model.layers.2.mlp.down_proj")
    module.weight = nn.Parameter(module.weight.detach().to("meta"), requires_grad=False)
    with pytest.raises(ValueError, match=r"down_proj\.weight is offloaded \(on the meta device\)"):
        _editable(model)
    assert _editable(model, [1]).layers == [1]  # only edited layers matter


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT"])
def test_tied_embeddings(base_alg: str, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    hparams = tiny_hparams(tmp_path, base_alg=base_alg, mom2_update_weight=0.1)
    embeddings = model.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is embeddings
    before, rest = edited_weights(model, hparams), {name: value.clone() for name, value in model.state_dict().items()}
    target = tok(" Rome")["input_ids"][0]
    prompt = torch.tensor([tok(REQUESTS[0]["prompt"])["input_ids"]])

    def log_prob() -> float:
        with torch.no_grad():
            return float(model(prompt).logits[0, -1].log_softmax(-1)[target])

    unedited = log_prob()
    sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    assert log_prob() > unedited + 0.4
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight is embeddings
    assert all(not torch.equal(weight, before[layer]) for layer, weight in edited_weights(model, hparams).items())
    edited = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in hparams.layers}
    assert all(torch.equal(value, rest[name]) for name, value in model.state_dict().items() if name not in edited)


def _last_hidden(editable: EditableModel, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Output of the last block, and the model's logits."""
    hidden: list[Tensor] = []
    handle = editable.block(editable.num_blocks - 1).register_forward_hook(
        lambda _m, _a, output: hidden.append(output[0] if isinstance(output, tuple) else output))
    try:
        with torch.no_grad():
            logits = editable.model(input_ids=input_ids).logits
    finally:
        handle.remove()
    return hidden[0], logits


@pytest.mark.parametrize(("model_type", "changes"), LOGIT_CONFIGS)
def test_logits_are_the_models_own(model_type: str, changes: dict[str, Any]) -> None:
    editable = _editable(_known_model(model_type, **changes))
    input_ids = torch.randint(1, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    hidden, logits = _last_hidden(editable, input_ids)
    editable.logit_map = find_logit_map(editable, input_ids[:1])
    with torch.no_grad():
        ours = editable.logits(hidden.flatten(0, 1))
    torch.testing.assert_close(ours, logits.flatten(0, 1), rtol=1e-4, atol=1e-5)
    if "final_logit_softcapping" in changes:
        uncapped = editable.lm_head(editable.final_norm(hidden)).detach()
        assert float(uncapped.abs().max()) > 3.0  # or the cap would not show


def test_logits_are_float32() -> None:
    editable = _editable(tiny_model("llama").to(torch.bfloat16))
    assert editable.logits(torch.randn(3, 48).to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize(("model_type", "changes"), LOGIT_CONFIGS)
def test_logits_at_chosen_positions(model_type: str, changes: dict[str, Any]) -> None:
    model = _known_model(model_type, **changes)
    generator = torch.Generator().manual_seed(0)
    lengths = [4, 11, 7]
    sequences = [torch.randint(1, 100, (length,), generator=generator) for length in lengths]
    input_ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = (torch.arange(11) < torch.tensor(lengths).unsqueeze(1)).long()
    rows, columns = torch.tensor([2, 0, 1, 1, 2, 1]), torch.tensor([6, 3, 0, 10, 2, 10])
    with torch.no_grad():
        found = logits_at(model, input_ids, mask, rows, columns)
        alone = [model(input_ids=sequence.unsqueeze(0)).logits[0] for sequence in sequences]
        whole = model(input_ids=input_ids, attention_mask=mask).logits
    expected = torch.stack([alone[row][column] for row, column in zip(rows.tolist(), columns.tolist(), strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert whole.shape == (3, 11, 100)  # the head works on all positions again
    assert found.dtype == torch.float32
    assert not found.requires_grad


def test_logits_at_cleans_up_after_an_error() -> None:
    model = _known_model("llama")
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(IndexError):
        logits_at(model, ids, torch.ones_like(ids), torch.tensor([0]), torch.tensor([5]))
    assert model(input_ids=ids).logits.shape == (1, 3, 100)


def _state(model: nn.Module) -> tuple[list[bool], list[bool]]:
    return [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize("fails", [False, True])
def test_frozen_restores_everything(fails: bool) -> None:
    model = tiny_model("llama").train()
    model.model.layers[2].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = _state(model)
    assert len(set(before[0])) == len(set(before[1])) == 2

    def work() -> None:
        with frozen(model), frozen(model):
            assert not any(flag for flags in _state(model) for flag in flags)
            model.model.layers[1].train()  # what someone does inside does not stay
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            work()
    else:
        work()
    assert _state(model) == before


def test_editing_restores_training_mode(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Dropout is off while an edit is computed, and the model is in the caller's mode afterwards."""
    trained, evaluated = (tiny_model("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5) for _ in range(2))
    trained.train()
    hparams = tiny_hparams(tmp_path)
    before = _state(trained)
    sphere.apply_sphere_to_model(trained, tok, REQUESTS, hparams)
    sphere.apply_sphere_to_model(evaluated, tok, REQUESTS, hparams)
    assert _state(trained) == before
    for layer, weight in edited_weights(trained, hparams).items():
        assert torch.equal(weight, edited_weights(evaluated, hparams)[layer])
