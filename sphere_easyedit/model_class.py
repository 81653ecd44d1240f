"""The class of transformers that a config's model is loaded as, and the model without weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .config_fields import text_config
from .messages import nearest, one_line

# Wrappers around a decoder, which run on text alone, too.
_WRAPPER_CLASSES = (
    ("MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING", "AutoModelForImageTextToText"),
    ("MODEL_FOR_MULTIMODAL_LM_MAPPING", "AutoModelForMultimodalLM"),
    ("MODEL_FOR_VISION_2_SEQ_MAPPING", "AutoModelForVision2Seq"),
)
_CAUSAL = "MODEL_FOR_CAUSAL_LM_MAPPING"
WANTED = "give a decoder-only causal language model"


def language_model_class(config: PretrainedConfig) -> Any:
    """The class of transformers that a model to be edited is loaded with, by its config alone.

    It is ``AutoModelForCausalLM`` where that knows the config; else the class that the checkpoint was saved from, if
    that generates text; else the auto class that knows the config among those of models that read more than text.

    Raises:
        ValueError: encoders, encoder-decoders, and models that generate no text.
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
        raise ValueError(f"{kind!r} is no causal language model of transformers: {WANTED}")
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
        raise ValueError(f"{kind!r} is an encoder-decoder, which can't be edited: {WANTED}")
    if type(config) in _mapping("MODEL_FOR_MASKED_LM_MAPPING") and not getattr(config, "is_decoder", False):
        raise ValueError(f"{kind!r} is an encoder, which sees the tokens after a word, too: {WANTED}")


def meta_model(config: PretrainedConfig) -> nn.Module:
    """The model of a config on the meta device, where it takes no memory; remote code is never run.

    Raises:
        ValueError: see ``language_model_class``; or the config's values do not fit together.
    """
    loader = language_model_class(config)
    config = copy.deepcopy(config)
    if loader is transformers.AutoModelForCausalLM:
        built = getattr(_mapping(_CAUSAL)[type(config)], "config_class", None)
        if built is not None and not isinstance(config, built) and isinstance(text_config(config), built):
            config = text_config(config)  # of such wrappers transformers loads the text model alone
    make = getattr(loader, "from_config", None) or loader._from_config
    try:
        try:
            with torch.device("meta"):
                model: nn.Module = make(config)
        except NotImplementedError:  # it reads values of tensors while it is built
            from accelerate import init_empty_weights  # type: ignore[import-untyped]

            with init_empty_weights():
                model = make(config)
    except Exception as error:  # checks of configs and missing packages: of many kinds
        raise ValueError(f"no model can be built from this {type(config).__name__}: {one_line(error).rstrip('.')}: "
                         "correct config.json") from error
    return model


def _mapping(name: str) -> Any:
    return getattr(modeling_auto, name, None) or {}
