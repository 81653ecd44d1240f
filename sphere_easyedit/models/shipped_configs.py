"""Finds configs of models: in a folder, the hub's cache or the hub, or among those shipped for planning."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, get_session
from transformers import AutoConfig, PretrainedConfig
from transformers.utils.peft_utils import find_adapter_config_file

from ..utils.messages import one_line

logger = logging.getLogger(__name__)

_SHIPPED = "data/configs.json"
_TIMEOUT = 5.0  # seconds for the hub to answer


def hub_options(source: str) -> dict[str, Any]:
    """Options of ``from_pretrained`` that restrict it to the cache if the hub can't be reached.

    huggingface_hub tries each file six times within half a minute before it gives up, cached or not.

    Raises:
        ValueError: the hub can't be reached and nothing of the model is cached.
    """
    if Path(source).is_dir():
        return {}
    cached = is_local(source)
    why = _unreachable()
    if why is None:
        return {}
    if not cached:
        raise ValueError(f"there is no such folder, nothing of it is in {constants.HF_HUB_CACHE}, and the hub can't be "
                         f"reached ({why})")
    logger.info("the hub can't be reached (%s): using the cached %s", why, source)
    return {"local_files_only": True}


def is_local(source: str) -> bool:
    """Whether a model is a folder, or its config in the hub's cache.

    Raises:
        ValueError: it is neither a folder nor a valid name of the hub.
    """
    try:
        return Path(source).is_dir() or any(isinstance(huggingface_hub.try_to_load_from_cache(source, name), str)
                                            for name in ("config.json", "adapter_config.json"))
    except ValueError as error:
        raise ValueError("there is no such folder") from error


def _unreachable() -> str | None:
    """Why the hub can't be reached, by one short request; None if it answers at all."""
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception as error:  # of requests or httpx, by huggingface_hub's version
        return one_line(error)
    return None


def model_config(source: str, options: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """A model's config from a folder, the hub's cache or the hub; an adapter's (PEFT) is that of its base model.

    Args:
        options: result of ``hub_options`` for this source, if already known.

    Raises:
        ValueError: there is none, or it can't be read.
    """
    options = hub_options(source) if options is None else options
    try:
        adapter = find_adapter_config_file(source, **options)
        if adapter is not None:
            source = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
            options = hub_options(source)
        # Without model_type, transformers before 5 uses one that occurs in the folder's name, with its defaults.
        if "model_type" not in PretrainedConfig.get_config_dict(source, **options)[0]:
            raise ValueError("there is no config.json with a model_type")
        config: PretrainedConfig = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
    except ImportError:
        raise
    except Exception as error:  # many kinds: damaged JSON, unknown models, values out of range
        raise ValueError(one_line(error).rstrip(".")) from error
    return config


def planning_config(model_name: str, source: str) -> PretrainedConfig:
    """A config for planning: the model's own if it is on this machine, else the shipped one, else the hub's.

    Args:
        model_name: as the hyperparameters have it.
        source: the source that transformers loads (see ``loading.model_source``).

    Raises:
        ValueError: there is none, or it can't be read.
    """
    try:
        shipped = None if is_local(source) else shipped_config(source)
        if shipped is not None:
            logger.info("%s is not on this machine: using the sizes that the package ships", model_name)
            return shipped
        return model_config(source)
    except ValueError as error:
        raise ValueError(f"the config of {model_name!r} can't be read: {error}: give a folder with config.json, or "
                         "a hub name that is cached or reachable") from error


def shipped_models() -> dict[str, dict[str, Any]]:
    """The size-related part of ``config.json`` by hub name, for models with a shipped hyperparameter file."""
    text = (resources.files("sphere_easyedit") / _SHIPPED).read_text(encoding="utf-8")
    return {name: entry["config"] for entry in json.loads(text) for name in entry["models"]}


def shipped_config(name: str) -> PretrainedConfig | None:
    """The shipped config of a hub name, or None; values that do not affect sizes are transformers' defaults.

    Raises:
        ValueError: the installed transformers does not know the architecture.
    """
    numbers = shipped_models().get(name)
    if numbers is None:
        return None
    try:
        config: PretrainedConfig = AutoConfig.for_model(**numbers)
    except ValueError as error:
        kind = numbers["model_type"]
        raise ValueError(f"the installed transformers does not know the architecture {kind!r}: upgrade it") from error
    config.name_or_path = name
    return config
