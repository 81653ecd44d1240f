"""Quantised base models: edited layers are dequantised, or the model is refused before anything is touched."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

import sphere_easyedit as sphere
from helpers.models import REQUESTS, edited_weights, relative_error, tiny_hparams, tiny_model
from sphere_easyedit.models.architecture import EditableModel
from sphere_easyedit.models.module_discovery import module_names
from sphere_easyedit.models.quantization import dequantise

BITS = {4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True},
        8: {"load_in_8bit": True}}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., nn.Module]:
    """Loads a tiny model quantised by bitsandbytes, whose blocks of 64 ask for widths of them."""
    pytest.importorskip("bitsandbytes")

    def loaded(family: str, bits: int, **options: Any) -> nn.Module:
        from transformers import BitsAndBytesConfig

        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        wide = {"hidden_size": 64, "intermediate_size": 128} if family == "llama" else {}
        plain = tiny_model(family, **wide)
        plain.save_pretrained(tmp_path / family)
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / family, quantization_config=BitsAndBytesConfig(**BITS[bits]), device_map="cpu", **options)
        return model.eval()

    return loaded


def editable_of(model: nn.Module, layers: tuple[int, ...] = (1, 2)) -> EditableModel:
    return EditableModel(model, module_names(model.config), list(layers))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8, 9]])).logits


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_only_the_edited_layers_are_dequantised(family: str, bits: int, load: Callable[..., nn.Module],
                                                caplog: pytest.LogCaptureFixture) -> None:
    model, plain = load(family, bits), load(family, bits).dequantize()
    before = logits(model)  # the first pass moves the scales of 8 bits
    kinds = {name: type(module) for name, module in model.named_modules()}
    editable = editable_of(model)
    names = [editable.names.rewrite_module_tmp.format(layer) for layer in (1, 2)]
    changed = {name: type(module) for name, module in model.named_modules() if type(module) is not kinds[name]}
    assert changed == dict.fromkeys(names, nn.Linear if family == "llama" else Conv1D)
    assert caplog.text.count("can't be edited") == 1
    assert f"{bits}-bit weights can't be edited: {', '.join(names)} are dequantised to float32" in caplog.text
    for layer in (1, 2):
        wanted = editable_of(plain).weight(layer)
        assert torch.allclose(editable.weight(layer), wanted, rtol=1e-6)
        assert editable.down_projection(layer) is model.get_submodule(names[layer - 1])
    # Of 8 bits the inputs are quantised too, which those of plain layers are not.
    assert relative_error(logits(model), before) < (1e-6 if bits == 4 else 0.05)
    caplog.clear()
    editable_of(model)
    assert not caplog.text  # there is nothing left to do


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_edited_quantised_model_is_loaded_as_it_was_saved(family: str, bits: int, load: Callable[..., nn.Module],
                                                             tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = load(family, bits)
    hparams = tiny_hparams(tmp_path, v_num_grad_steps=3, mom2_n_samples=2)
    editable = hparams.editable(model)
    before = edited_weights(model, hparams)
    sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    after = edited_weights(model, hparams)
    assert all(not torch.equal(after[layer], before[layer]) for layer in (1, 2))
    model.save_pretrained(tmp_path / "edited")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "edited", device_map="cpu").eval()
    assert all(torch.equal(editable_of(again).parameter(layer), editable.parameter(layer)) for layer in (1, 2))
    assert torch.equal(logits(again), logits(model))
    assert type(again.get_submodule("lm_head")) is nn.Linear  # as it was without a list


def test_a_copy_leaves_the_model_quantised(load: Callable[..., nn.Module], tok: PreTrainedTokenizerBase,
                                           tmp_path: Path) -> None:
    model = load("llama", 4)
    before = logits(model)
    sphere.apply_sphere_to_model(model, tok, REQUESTS, tiny_hparams(tmp_path, v_num_grad_steps=2, mom2_n_samples=2),
                                 copy=True)
    assert type(model.get_submodule("model.layers.1.mlp.down_proj").weight).__name__ == "Params4bit"
    assert torch.equal(logits(model), before)


def test_biases_hooks_and_modes_are_kept(load: Callable[..., nn.Module]) -> None:
    model = load("gpt2", 8)
    hooks = pytest.importorskip("accelerate.hooks")
    seen = []

    class Notes(hooks.ModelHook):  # type: ignore[misc,name-defined]
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(type(module))
            return args, kwargs

    hooks.add_hook_to_module(model.get_submodule("transformer.h.1.mlp.c_proj"), Notes())
    bias = model.get_submodule("transformer.h.1.mlp.c_proj").bias.detach().clone().normal_()
    model.get_submodule("transformer.h.1.mlp.c_proj").bias.data.copy_(bias)
    model.train()
    editable = editable_of(model)
    assert editable.down_projection(1).training
    assert torch.equal(editable.down_projection(1).bias, bias)  # type: ignore[arg-type]
    logits(model)
    assert seen == [Conv1D]


def test_a_weight_that_is_not_yet_quantised(load: Callable[..., nn.Module]) -> None:
    functional = pytest.importorskip("bitsandbytes")
    model = tiny_model("llama")
    model.get_submodule("model.layers.2.mlp").down_proj = functional.nn.Linear4bit(80, 48, bias=False)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.down_proj\.weight is not quantised by bitsandbytes yet"):
        editable_of(model)


# --- refused ------------------------------------------------------------------------------------------------


def refused(model: nn.Module, message: str) -> None:
    state = dict(model.named_modules())
    with pytest.raises(ValueError, match=message):
        editable_of(model)
    assert dict(model.named_modules()) == state
    assert editable_of(model, (1,)).layers == [1]  # only edited layers matter


def test_layers_of_torch(tmp_path: Path) -> None:
    quantisation = pytest.importorskip("torch.ao.nn.quantized.dynamic")
    model = tiny_model("llama")
    model.get_submodule("model.layers.2.mlp").down_proj = quantisation.Linear(80, 48)
    refused(model, r"layers\.2\.mlp\.down_proj is quantised \(Linear\).*load the base model in float32")


@pytest.mark.parametrize(("dtype", "held"), [(torch.int8, r"torch\.int8"), (torch.float8_e4m3fn, r"float8_e4m3fn")])
def test_dtypes(dtype: torch.dtype, held: str) -> None:
    model = tiny_model("llama")
    module = model.get_submodule("model.layers.2.mlp.down_proj")
    module.weight = nn.Parameter(module.weight.detach().to(dtype), requires_grad=False)
    refused(model, rf"down_proj\.weight holds .*{held}: a quantised weight can't be edited; load the base model")


def test_weights_under_other_names() -> None:
    class Packed(nn.Module):  # as GPTQ's and AWQ's layers
        def __init__(self) -> None:
            super().__init__()
            self.qweight = nn.Parameter(torch.zeros(10, 48, dtype=torch.int32), requires_grad=False)

    model = tiny_model("llama")
    model.quantization_method = SimpleNamespace(value="gptq")
    model.get_submodule("model.layers.2.mlp").down_proj = Packed()
    refused(model, r"layers\.2\.mlp\.down_proj is quantised \(gptq\)")


def test_torchao_which_calls_itself_float32() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny_model("llama")
    quantization.quantize_(model.get_submodule("model.layers.2.mlp.down_proj"), quantization.Int8WeightOnlyConfig())
    refused(model, r"down_proj\.weight holds torch\.float32 in a torchao\.\S+: a quantised weight")


def test_nothing_to_dequantise() -> None:
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    assert dequantise(model, ["model.layers.1.mlp.down_proj"]) == {}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
