"""Selects the transformers class to load a model with by its config, and builds the model on the meta device."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ..utils.messages import nearest, one_line
from .config_fields import text_config

# Auto classes of multimodal models, many of which also run on text alone.
_WRAPPER_CLASSES = (
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "AutoModelForImageTextToText"),
    ("MODEL_FOR_MULTIMODAL_LM_MAPPING", "AutoModelForMultimodalLM"),
    ("MODEL_FOR_VISION_2_SEQ_MAPPING", "AutoModelForVision2Seq"),
)
_CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING"
DECODER_REMEDY = "give a decoder-only causal language model"


def language_model_class(config: PretrainedConfig) -> Any:
    """The transformers class to load a model with, by its config alone.

    ``AutoModelForCausalLM`` if it supports the config; else the class that the checkpoint was saved from, if that
    generates text; else the multimodal auto class that supports the config.

    Raises:
        ValueError: the config is of an encoder, an encoder-decoder, or a model that does not generate text.
    """
    check_decoder(config)
    kind = str(config.model_type)
    if type(config) in _mapping(_CAUSAL):
        return transformers.AutoModelForCausalLM
    saved_from = getattr(transformers, (config.architectures or [""])[0], None)
    if isinstance(saved_from, type) and issubclass(saved_from, PreTrainedModel) and saved_from.can_generate():
        return saved_from
    for mapping, auto in _WRAPPER_CLASSES:
        if type(config) in _mapping(mapping):
            return getattr(transformers, auto)
    if kind in transformers.CONFIG_MAPPING:
        raise ValueError(f"{kind!r} is not a causal language model of transformers: {DECODER_REMEDY}")
    near = nearest(kind, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    hint = f" (nearest known: {near[0]})" if near else ""
    raise ValueError(f"architecture {kind!r} is not known to transformers {transformers.__version__}{hint}: upgrade "
                     "transformers, give the loaded model, or its module names in the hyperparameters "
                     "(rewrite_module_tmp, layer_module_tmp, mlp_module_tmp, attn_module_tmp, "
                     "ln_f_module, lm_head_module)")


def check_decoder(config: PretrainedConfig) -> None:
    """Refuse encoders and encoder-decoders (ValueError)."""
    kind = str(config.model_type)
    if any(getattr(part, "is_encoder_decoder", False) for part in (config, text_config(config))):
        raise ValueError(f"{kind!r} is an encoder-decoder, which can't be edited: {DECODER_REMEDY}")
    if type(config) in _mapping("MODEL_FOR_MASKED_LM_MAPPING") and not getattr(config, "is_decoder", False):
        raise ValueError(f"{kind!r} is an encoder, whose attention is bidirectional: {DECODER_REMEDY}")


def meta_model(config: PretrainedConfig) -> nn.Module:
    """The model of a config on the meta device, without memory for weights; remote code is never run.

    Raises:
        ValueError: see ``language_model_class``; or the config is inconsistent.
    """
    loader = language_model_class(config)
    config = copy.deepcopy(config)
    if loader is transformers.AutoModelForCausalLM:
        built = getattr(_mapping(_CAUSAL)[type(config)], "config_class", None)
        if built is not None and not isinstance(config, built) and isinstance(text_config(config), built):
            config = text_config(config)  # transformers loads only the text model of such wrappers
    make = getattr(loader, "from_config", None) or loader._from_config
    try:
        try:
            with torch.device("meta"):
                model: nn.Module = make(config)
        except NotImplementedError:  # its constructor reads tensor values
            from accelerate import init_empty_weights  # type: ignore[import-untyped]

            with init_empty_weights():
                model = make(config)
    except Exception as error:  # inconsistent configs and missing packages raise many types
        raise ValueError(f"no model can be built from this {type(config).__name__}: {one_line(error).rstrip('.')}: "
                         "correct config.json") from error
    return model


def _mapping(name: str) -> Any:
    return getattr(modeling_auto, name, None) or {}
