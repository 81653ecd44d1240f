"""SPHERE inside EasyEdit: found, registered with it, and watched while it edits.

The only file that imports ``easyeditor``. It touches EasyEdit's ``ALG_DICT`` (in place),
``BatchEditor.is_batchable_method``, and an editor's own ``apply_algo``, nothing else.
"""

from __future__ import annotations

import copy as copying
import dataclasses
import importlib
import inspect
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..datasets.loaders import EditRecord
from ..editing.callbacks import EditCallback, EditEvent, change_norms, review_batch
from ..editing.pipeline import apply_sphere_to_model
from ..editing.requests import parse_requests
from ..editing.session import EditSession
from ..editing.update_writer import interpolated
from ..hparams import SPHERE, SPHEREHyperParams
from ..hparams_files import find_hparams, read_mapping
from ..methods.registry import METHODS
from ..models.config_fields import num_blocks
from ..models.loading import load_model, model_source, resolve_device
from ..models.model_class import meta_model
from ..models.module_discovery import decoder_parts
from ..utils.messages import kind_and_text, suggestion
from .executor import BASE_METHODS, EasyEditEngine, WrappedExecutor, WrappedSimIE, hparams_class, runs_another
from .partial_imports import import_failure, tolerant_imports, unimportable_modules

logger = logging.getLogger(__name__)

_CHOOSES_LAYERS = ("DINM",)  # edits the layer that it finds toxic, whatever its hyperparameters say
HOME = "EASYEDIT_HOME"
_PACKAGE = "easyeditor"
_METHODS = (f"{_PACKAGE}.models", f"{_PACKAGE}.trainer")  # where methods and their training are


def load_easyedit() -> ModuleType:
    """EasyEdit's package: the one already imported, else from ``EASYEDIT_HOME``, else as installed.

    A method of EasyEdit's that can't be imported leaves all others usable; a warning says which and why.

    Raises:
        ImportError: there is none, it does not import, or it is a release without ``sequential_edit``.
    """
    loaded = sys.modules.get(_PACKAGE)
    if loaded is not None and hasattr(loaded, "ALG_DICT") and has_sequential_edit(loaded):
        return loaded
    home = os.environ.get(HOME)
    if home:
        sys.path.insert(0, home)
    before = set(sys.modules)
    try:
        with tolerant_imports(_METHODS):
            package = importlib.import_module(_PACKAGE)
    except ImportError as error:
        _forget(before)
        where = f"{HOME}={home}" if home else f"this Python, and {HOME} is not set"
        raise ImportError(f"EasyEdit can't be imported from {where} ({error}). Set {HOME} to a checkout of its main "
                          "branch, and install what it imports (this package's extra `easyedit`)") from error
    except BaseException:
        _forget(before)
        raise
    finally:
        if home:
            sys.path.remove(home)
    failed = unimportable_modules(_PACKAGE)
    if failed:
        logger.warning("EasyEdit works without %s, which can't be imported (%s); `sphere-easyedit doctor` says what "
                       "mends it", ", ".join(failed), "; ".join(dict.fromkeys(map(kind_and_text, failed.values()))))
    if not has_sequential_edit(package):
        raise ImportError(f"EasyEdit at {package.__file__} has no BaseEditor.edit(..., sequential_edit=): set {HOME} "
                          "to a checkout of its main branch")
    return package


def _forget(before: set[str]) -> None:
    """Have the next attempt import all of EasyEdit anew: modules that were imported may hold stand-ins by now."""
    for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE and name not in before]:
        del sys.modules[name]


def _check_imported(name: str, function: Any) -> None:
    """Raise ImportError if part of a method, the package that its function is in, can't be imported."""
    for module, error in _unimportable_parts(function).items():
        raise ImportError(f"EasyEdit's {name} can't be used: {import_failure(module, error)}; `sphere-easyedit doctor` "
                          "says what mends it", name=module) from error


def _unimportable_parts(function: Any) -> dict[str, Exception]:
    module = str(getattr(function, "__module__", ""))
    in_methods = any(module.startswith(f"{package}.") for package in _METHODS)
    return unimportable_modules(".".join(module.split(".")[:3])) if in_methods else {}


def has_sequential_edit(package: ModuleType) -> bool:
    """Whether this EasyEdit edits sequentially, which its release on PyPI does not."""
    editor = getattr(package, "BaseEditor", None)
    return editor is not None and "sequential_edit" in inspect.signature(editor.edit).parameters


class RegisteredExecutor:
    """What ``ALG_DICT`` holds under our names; ``replaced`` is what it held there before."""

    def __init__(self, replaced: Any = None) -> None:
        self.replaced = replaced

    def __call__(self, model: nn.Module, tok: PreTrainedTokenizerBase, requests: Sequence[Mapping[str, Any]],
                 hparams: Any, copy: bool = False, return_orig_weights: bool = False, **kwargs: Any
                 ) -> tuple[nn.Module, dict[str, Tensor]]:
        """``apply_sphere_to_model``, for EasyEdit's own hyperparameter objects too."""
        return apply_sphere_to_model(model, tok, requests, _sphere_hparams(hparams), copy, return_orig_weights,
                                     **kwargs)


def _sphere_hparams(hparams: Any) -> Any:
    """EasyEdit's own hyperparameter objects as ours; anything else unchanged, for the caller to check."""
    if isinstance(hparams, SPHEREHyperParams) or not dataclasses.is_dataclass(hparams) or isinstance(hparams, type):
        return hparams
    return SPHEREHyperParams.from_dict(dataclasses.asdict(hparams))


def register() -> None:
    """Make EasyEdit know SPHERE, PRUNE and RECT. Safe to call twice; ``unregister`` undoes it.

    EasyEdit's own SPHERE (AlphaEdit only, one edit at a time) is replaced.

    Raises:
        ImportError: there is no EasyEdit, or an old one.
        ValueError: one of the names is taken by something else; nothing was registered.
    """
    package = load_easyedit()
    algorithms = package.ALG_DICT
    names = [name for name in (SPHERE, *METHODS.offered_to_easyedit)
             if not isinstance(algorithms.get(name), RegisteredExecutor)]
    for name in names:
        if name in algorithms and not (name == SPHERE and _is_easyedits(algorithms[name], package)):
            found = algorithms[name]
            raise ValueError(f"EasyEdit's ALG_DICT already has {name!r}, from {getattr(found, '__module__', found)}: "
                             "remove it, or unregister what put it there")
    for name in names:
        if name in algorithms:
            logger.warning("EasyEdit's own %s is replaced by sphere_easyedit's; unregister() gives it back", name)
        algorithms[name] = RegisteredExecutor(algorithms.get(name))
    editor = _batch_editor(package)
    installed = vars(editor)["is_batchable_method"]
    if not isinstance(installed, _Batchable):
        editor.is_batchable_method = _Batchable(installed)


def unregister() -> None:
    """Undo ``register``: EasyEdit is as it was. Without effect where nothing is registered."""
    package = sys.modules.get("easyeditor")
    if package is None or not isinstance(getattr(package, "ALG_DICT", {}).get(SPHERE), RegisteredExecutor):
        return
    algorithms = package.ALG_DICT
    for name, entry in list(algorithms.items()):
        if isinstance(entry, RegisteredExecutor):
            if entry.replaced is None:
                del algorithms[name]
            else:
                algorithms[name] = entry.replaced
    editor = _batch_editor(package)
    installed = vars(editor)["is_batchable_method"]
    if isinstance(installed, _Batchable):
        editor.is_batchable_method = installed.replaced


class _Batchable(staticmethod):  # type: ignore[type-arg]
    """``BatchEditor.is_batchable_method`` that knows our names too."""

    def __init__(self, replaced: staticmethod) -> None:  # type: ignore[type-arg]
        def is_batchable_method(alg_name: str) -> bool:
            return alg_name in (SPHERE, *METHODS.offered_to_easyedit) or bool(replaced.__func__(alg_name))

        super().__init__(is_batchable_method)
        self.replaced = replaced


def _batch_editor(package: ModuleType) -> Any:
    return importlib.import_module(f"{package.__name__}.editors.batch_editor").BatchEditor


def _is_easyedits(entry: Any, package: ModuleType) -> bool:
    return str(getattr(entry, "__module__", "")).startswith(f"{package.__name__}.models.")


def easyedit_engine(hparams: SPHEREHyperParams, session: EditSession, arguments: Mapping[str, Any]) -> EasyEditEngine:
    """What solves batches by EasyEdit's function of ``base_alg``.

    Raises:
        ImportError, ValueError: see ``wrapped_executor``.
    """
    return EasyEditEngine(wrapped_executor(hparams, session), hparams, arguments)


def wrapped_executor(hparams: SPHEREHyperParams, session: EditSession) -> WrappedExecutor:
    """EasyEdit's executor of ``base_alg``, ready to be wrapped.

    Raises:
        ImportError: there is no EasyEdit, an old one, or one whose part for this method can't be imported.
        ValueError: EasyEdit has no such method, or it can't be wrapped.
    """
    function, batchable = _method("base_alg", hparams.base_alg)
    if not runs_another(function):
        return WrappedExecutor(hparams.base_alg, function, session, batchable)
    base_method = hparams.executor_hparams.get("base_method")
    if base_method not in BASE_METHODS:
        raise ValueError(f"base_method is {base_method!r}: {hparams.base_alg} can be wrapped on "
                         f"{', '.join(BASE_METHODS)}; give one of them")
    base = WrappedExecutor(base_method, *_method("base_method", base_method)[:1], session, batchable=False)
    return WrappedSimIE(hparams.base_alg, function, session, base)


def _method(field: str, name: str) -> tuple[Callable[..., Any], bool]:
    """EasyEdit's function of a method, and whether EasyEdit lists it as editing several requests in one call."""
    package = load_easyedit()
    algorithms = package.ALG_DICT
    if name not in algorithms:
        raise ValueError(f"{field} is {name!r}, which EasyEdit does not have{suggestion(name, sorted(algorithms))}")
    _check_imported(name, algorithms[name])
    return algorithms[name], bool(_batch_editor(package).is_batchable_method(name))


def wrappable(package: ModuleType) -> list[str]:
    """Methods of EasyEdit that ``executor: easyedit`` takes, sorted."""
    return sorted(name for name, function in package.ALG_DICT.items()
                  if name not in (SPHERE, *_CHOOSES_LAYERS) and hparams_class(function) is not None
                  and not _unimportable_parts(function))


def make_editor(hparams: Any, dtype: str | torch.dtype | None = torch.float32) -> Any:
    """EasyEdit's ``BaseEditor`` for any decoder that transformers loads, whatever its name.

    ``BaseEditor.from_hparams`` picks its loader by substrings of the path and refuses names that hold none of them.
    For hyperparameters of ours it registers SPHERE first.

    Args:
        hparams: ours, or of one of EasyEdit's own classes.
        dtype: of the weights; EasyEdit's own is float32. None for the checkpoint's.

    Raises:
        ImportError: there is no EasyEdit, an old one, or one whose part for this method can't be imported.
        ValueError: the model can't be loaded, or registering is refused.
    """
    package = load_easyedit()
    if isinstance(hparams, SPHEREHyperParams):
        register()
    _check_imported(hparams.alg_name, package.ALG_DICT.get(hparams.alg_name))
    model, tok = load_model(hparams.model_name, "auto" if hparams.model_parallel else hparams.device, dtype)
    if tok.pad_token is None:
        tok.pad_token = tok.eos_token
    given = copying.copy(hparams)
    given.model_name = (model, tok)
    editor = package.BaseEditor.from_hparams(given)
    # Evaluation asks the model's name for its family as text.
    editor.model_name = model_source(hparams.model_name)
    editor.hparams = hparams
    return editor


def edit_arguments(records: Sequence[EditRecord]) -> dict[str, Any]:
    """Records as EasyEdit's own examples hand them to ``BaseEditor.edit`` and ``batch_edit``.

    One paraphrase a record (None where it has none), all its neighbours as locality, and ZsRE in EasyEdit's protocol:
    the target is ``alt`` where a record has it, and the neighbour's question is as it stands in the file.
    """
    neighbours = [[prompt.text.removesuffix("?") if record.dataset == "zsre" else prompt.text
                   for prompt in record.neighborhood_prompts] for record in records]
    answers = [[prompt.target for prompt in record.neighborhood_prompts] for record in records]
    return {
        "prompts": [record.edit_prompt for record in records],
        "subject": [record.subject for record in records],
        "target_new": [record.target_alt or record.target_new for record in records],
        "ground_truth": [record.target_true or record.target_new for record in records],
        "rephrase_prompts": [next(iter(record.paraphrase_prompts), None) for record in records],
        "locality_inputs": {"neighborhood": {"prompt": neighbours, "ground_truth": answers}},
    }


def read_hparams(name: str, overrides: Mapping[str, Any] | None = None) -> Any:
    """Hyperparameters from a file of ours, or from one of EasyEdit's for a method of its own, in that method's class.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: there is no EasyEdit, an old one, or one whose part for this method can't be imported.
        ValueError: EasyEdit has no such method, its own class for it reads a second file, or a value is wrong.
    """
    mapping = {**read_mapping(find_hparams(name)), **(overrides or {})}
    alg_name = str(mapping.get("alg_name", SPHERE))
    if alg_name in (SPHERE, *METHODS.offered_to_easyedit):
        return SPHEREHyperParams.from_dict(mapping)
    function = load_easyedit().ALG_DICT.get(alg_name)
    _check_imported(alg_name, function)
    if function is not None and runs_another(function):
        raise ValueError(f"{name} is for alg_name {alg_name!r}, whose class takes the values of base_method from a "
                         "second file: read it with the class's own from_hparams")
    method_class = None if function is None else hparams_class(function)
    if method_class is None:
        known = (SPHERE, *METHODS.offered_to_easyedit, *wrappable(load_easyedit()))
        raise ValueError(f"{name} is for alg_name {alg_name!r}: give a file of {', '.join(known)}")
    if isinstance(mapping.get("device"), int) and resolve_device(mapping["device"]).type == "cpu":
        mapping["device"] = "cpu"
    try:
        return method_class(**mapping)
    except TypeError as error:  # a name that the class does not know, or lacks
        raise ValueError(f"{name}: {error}") from error


@contextmanager
def track(editor: Any, callbacks: Sequence[EditCallback]) -> Iterator[None]:
    """Have callbacks told of every batch that an EasyEdit editor edits inside the context, by whatever algorithm.

    With SPHERE the callbacks learn losses and times by part; for any other algorithm they see the weights
    (down-projections of the layers that its hyperparameters name, else of all blocks), their change and the time, and a
    review scales the change of these weights alone.
    Batches are numbered through the whole context, restored in between or not.

    Args:
        editor: a ``BaseEditor`` (or anything with an ``apply_algo`` of EasyEdit's protocol).
        callbacks: told before and after each batch; an exception from one undoes the batch.
    """
    original = editor.apply_algo
    told = [_Numbered(callbacks)]
    if isinstance(original, RegisteredExecutor):
        editor.apply_algo = partial(original, callbacks=told)
    else:
        editor.apply_algo = partial(_apply_tracked, original, told)
    try:
        yield
    finally:
        editor.apply_algo = original


class _Numbered(EditCallback):
    """Passes events on with one count through a context, also where editing starts afresh in between."""

    def __init__(self, callbacks: Sequence[EditCallback]) -> None:
        self.callbacks = list(callbacks)
        self.num_edits: int | None = None
        self.num_batches = 0
        self._edits_before = self._batches_before = 0

    def on_batch_start(self, event: EditEvent) -> None:
        if self.num_edits is not None:
            self._edits_before = self.num_edits - event.num_edits
            self._batches_before = self.num_batches - event.num_batches
        event = self._numbered(event)
        for callback in self.callbacks:
            callback.on_batch_start(event)

    def review(self, event: EditEvent) -> float:
        event = self._numbered(event)
        return next((share for callback in self.callbacks if (share := callback.review(event)) != 1.0), 1.0)

    def on_batch_end(self, event: EditEvent) -> None:
        event = self._numbered(event)
        for callback in self.callbacks:
            callback.on_batch_end(event)
        self.num_edits, self.num_batches = event.num_edits, event.num_batches

    def _numbered(self, event: EditEvent) -> EditEvent:
        return replace(event, num_edits=event.num_edits + self._edits_before,
                       num_batches=event.num_batches + self._batches_before)


def _apply_tracked(original: Callable[..., Any], callbacks: Sequence[_Numbered], model: Any, tok: Any,
                   requests: Sequence[Mapping[str, Any]], hparams: Any, *args: Any, **kwargs: Any) -> Any:
    """Any of EasyEdit's executors as it is, with events before and after it."""
    names = _tracked_names(model, hparams)
    weights = _tracked_weights(model, names)
    first = callbacks[0].num_edits or 0
    case_ids = [request.get("case_id", first + i) for i, request in enumerate(requests)]
    try:
        parsed = parse_requests(requests, first)
    except ValueError:  # of an algorithm that edits something else than facts
        parsed = []
    event = EditEvent(_decoder(model), weights, first, callbacks[0].num_batches, case_ids, requests=parsed)
    for callback in callbacks:
        callback.on_batch_start(event)
    before = {layer: weight.clone() for layer, weight in weights.items()}
    started = time.perf_counter()
    result = original(model, tok, requests, hparams, *args, **kwargs)
    seconds = {"executor": time.perf_counter() - started}
    edited, originals = result if isinstance(result, tuple) and len(result) == 2 else (model, None)
    weights = _tracked_weights(edited, names)
    event = replace(event, model=_decoder(edited), weights=weights, num_edits=first + len(requests),
                    num_batches=event.num_batches + 1, update_norms=change_norms(weights, before), seconds=seconds)

    @torch.no_grad()
    def scale_back(share: float) -> None:
        for layer, weight in weights.items():
            weight.copy_(interpolated(before[layer], weight, share))

    try:
        event = review_batch(event, callbacks, before, lambda: weights, scale_back)
        for callback in callbacks:
            callback.on_batch_end(event)
    except BaseException:
        with torch.no_grad():
            for layer, weight in weights.items():
                weight.copy_(before[layer])
            for name, original_weight in originals.items() if isinstance(originals, Mapping) else ():
                edited.get_parameter(name).copy_(original_weight)  # those that were not tracked
        raise
    return result


def _decoder(model: Any) -> PreTrainedModel:
    """The transformers model inside whatever an algorithm returned (adapters, EasyEdit's method objects)."""
    while not isinstance(model, PreTrainedModel):
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "model"):
            model = model.model
        else:
            raise ValueError(f"there is no model of transformers in this {type(model).__name__}: its weights can't be "
                             "tracked; edit without track()")
    return model


def _tracked_names(model: Any, hparams: Any) -> dict[int, str]:
    """Names of down-projections by layer: the edited ones, or all where hyperparameters name no layers."""
    decoder = _decoder(model)
    layers = list(getattr(hparams, "layers", None) or ())
    template = getattr(hparams, "rewrite_module_tmp", None)
    if not template:
        try:
            parts = decoder_parts(meta_model(decoder.config))  # the model itself may hold a method's own modules
        except ValueError:
            parts = decoder_parts(decoder)
        template = parts.names(layers).rewrite_module_tmp
    template = template.removesuffix(".weight")
    if not layers:
        places = {name for name, _ in decoder.named_modules(remove_duplicate=False)}
        layers = [layer for layer in range(num_blocks(decoder.config)) if template.format(layer) in places]
    return {layer: template.format(layer) for layer in layers}


def _tracked_weights(model: Any, names: Mapping[int, str]) -> dict[int, Tensor]:
    """Down-projections ``(d_out, d_in)`` by layer, also where a method has put a module of its own around them."""
    decoder = _decoder(model)
    weights = {}
    for layer, name in names.items():
        inner = [module for module in decoder.get_submodule(name).modules()
                 if isinstance(module, (nn.Linear, Conv1D))]
        weight = inner[0].weight.detach()
        if weight.is_meta:
            raise ValueError(f"{name} is offloaded, where EasyEdit's changes would be lost: load the "
                             "model into memory, or edit with apply_sphere_to_model")
        weights[layer] = weight.T if isinstance(inner[0], Conv1D) else weight
    return weights
