"""The sizes of large models as published, for benchmarks that build their shapes without having their weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from sphere_easyedit import SPHEREHyperParams
from sphere_easyedit.models.architecture import EditableModel


@dataclass(frozen=True)
class PublishedModel:
    """A model by its ``config.json``.

    Attributes:
        name: on the hub.
        hparams: our settings for it, by the name behind the base method.
        changes: of them, where they are another model's.
        config: what sizes depend on.
    """

    name: str
    hparams: str
    changes: Mapping[str, Any]
    config: Mapping[str, Any]

    def loaded_config(self) -> PretrainedConfig:
        """As transformers reads it."""
        return AutoConfig.for_model(**self.config)

    def settings(self, base_alg: str, **changes: Any) -> SPHEREHyperParams:
        """Our settings for this model."""
        loaded = SPHEREHyperParams.from_hparams(f"{base_alg}/{self.hparams}").to_dict()
        return SPHEREHyperParams.from_dict({**loaded, "model_name": self.name, **self.changes, **changes})

    def write_folder(self, parent: Path, tokenizer: Path | None) -> Path:
        """A folder with the config, and a stand-in's tokenizer if given, which ``plan`` takes for the model's."""
        folder = parent / self.name.rsplit("/", maxsplit=1)[-1]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(dict(self.config)), encoding="utf-8")
        for name in ("tokenizer.json", "tokenizer_config.json") if tokenizer is not None else ():
            shutil.copy(tokenizer / name, folder / name)
        return folder


def _model(name: str, hparams: str, config: Mapping[str, Any], **changes: Any) -> PublishedModel:
    return PublishedModel(name, hparams, changes, MappingProxyType(config))


_LLAMA3 = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
           "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
           "hidden_act": "silu", "tie_word_embeddings": False, "dtype": "bfloat16"}
# From the models' own config.json on the hub; all three are published in bfloat16.
MODELS: Final[Mapping[str, PublishedModel]] = MappingProxyType({
    "llama3-8b": _model(
        "meta-llama/Meta-Llama-3-8B-Instruct", "llama3-8b",
        {**_LLAMA3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32}),
    "qwen2.5-7b": _model(
        "Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b",
        {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 152064, "hidden_size": 3584,
         "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
         "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
         "tie_word_embeddings": False, "dtype": "bfloat16"}),
    # No settings of ours are made for it: those of the 8B model, with the loss at its last block.
    "llama3-70b": _model(
        "meta-llama/Meta-Llama-3-70B-Instruct", "llama3-8b",
        {**_LLAMA3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
         "num_attention_heads": 64}, v_loss_layer=79),
})


def empty_model(model: PublishedModel) -> nn.Module:
    """The whole model on the meta device, which takes no memory."""
    with init_empty_weights(include_buffers=True):
        built: nn.Module = AutoModelForCausalLM.from_config(model.loaded_config())
    return built.eval()


def with_one_weight(model: PublishedModel, dtype: torch.dtype, seed: int = 0) -> EditableModel:
    """The model on the meta device but for the down-projection of its first edited layer, random, on the CPU.

    Its entries have standard deviation 0.02, as LLMs are initialised.
    """
    layer = model.settings("MEMIT").layers[0]
    hparams = model.settings("MEMIT", layers=[layer])  # others' weights are nowhere
    built = empty_model(model)
    name = f"{hparams.rewrite_module_tmp.format(layer)}.weight"
    generator = torch.Generator().manual_seed(seed)
    weight: Tensor = torch.empty(built.get_parameter(name).shape).normal_(0.0, 0.02, generator=generator)
    set_module_tensor_to_device(built, name, "cpu", value=weight, dtype=dtype)
    return hparams.editable(built)
