"""Builds EasyEdit's editors for any decoder, and tracks the batches that an editor edits."""

from __future__ import annotations

import copy as copying
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..datasets.loaders import EditRecord
from ..editing.callbacks import EditCallback, EditEvent, change_norms, review_batch
from ..editing.requests import parse_requests
from ..editing.update_writer import interpolated
from ..hparams import SPHERE, SPHEREHyperParams
from ..hparams_files import find_hparams, read_mapping
from ..methods.registry import METHODS
from ..models.config_fields import num_blocks
from ..models.loading import load_model, model_source, resolve_device
from ..models.model_class import meta_model
from ..models.module_discovery import decoder_parts
from ..speed import with_speed
from .discovery import check_imported, load_easyedit, wrappable
from .method_hparams import hparams_class, runs_another
from .plugin import RegisteredExecutor, register


def make_editor(hparams: Any, dtype: str | torch.dtype | None = torch.float32) -> Any:
    """Make EasyEdit's ``BaseEditor`` for any decoder that transformers loads.

    ``BaseEditor.from_hparams`` chooses its loader by substrings of the path and refuses paths without a known one.
    Our hyperparameters register SPHERE first.

    Args:
        hparams: ours, or an object of one of EasyEdit's classes.
        dtype: type of the weights (EasyEdit uses float32); None for the checkpoint's own.

    Raises:
        ImportError: there is no EasyEdit, an old one, or one whose part for this method can't be imported.
        ValueError: the model can't be loaded, or registering is refused.
    """
    package = load_easyedit()
    if isinstance(hparams, SPHEREHyperParams):
        register()
    check_imported(hparams.alg_name, package.ALG_DICT.get(hparams.alg_name))
    model, tok = load_model(hparams.model_name, "auto" if hparams.model_parallel else hparams.device, dtype)
    if tok.pad_token is None:
        tok.pad_token = tok.eos_token
    given = copying.copy(hparams)
    given.model_name = (model, tok)
    editor = package.BaseEditor.from_hparams(given)
    # EasyEdit's evaluation looks for the model's family in this text.
    editor.model_name = model_source(hparams.model_name)
    editor.hparams = hparams
    return editor


def edit_arguments(records: Sequence[EditRecord]) -> dict[str, Any]:
    """Arguments of ``BaseEditor.edit`` and ``batch_edit`` for records, as in EasyEdit's own examples.

    One paraphrase per record (None if it has none), all its neighbours as locality, and ZsRE in EasyEdit's protocol:
    the target is ``alt`` if a record has it, and the neighbour's question is as in the file.
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
    """Read one of our hyperparameter files, or one of EasyEdit's into the class of its method.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: there is no EasyEdit, an old one, or one whose part for this method can't be imported.
        ValueError: EasyEdit has no such method, its class reads a second file, or a value is wrong.
    """
    mapping = {**read_mapping(find_hparams(name)), **with_speed(overrides or {})}
    alg_name = str(mapping.get("alg_name", SPHERE))
    if alg_name in (SPHERE, *METHODS.offered_to_easyedit):
        return SPHEREHyperParams.from_dict(mapping)
    function = load_easyedit().ALG_DICT.get(alg_name)
    check_imported(alg_name, function)
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
    except TypeError as error:  # an unknown or a missing name
        raise ValueError(f"{name}: {error}") from error


@contextmanager
def track(editor: Any, callbacks: Sequence[EditCallback]) -> Iterator[None]:
    """Call callbacks for every batch that an EasyEdit editor edits inside the context, with any algorithm.

    With SPHERE, events contain losses and times by part; with any other algorithm the weights (down-projections of the
    layers in its hyperparameters, else of all blocks), their change and the time. A review then scales the change of
    these weights only. Batches are numbered through the whole context, even if weights are restored in between.

    Args:
        editor: a ``BaseEditor``, or any object with an ``apply_algo`` of EasyEdit's signature.
        callbacks: called before and after each batch; an exception from one undoes the batch.
    """
    original = editor.apply_algo
    numbered = _NumberedCallbacks(callbacks)
    if isinstance(original, RegisteredExecutor):
        editor.apply_algo = partial(original, callbacks=[numbered])
    else:
        editor.apply_algo = partial(_apply_tracked, original, numbered)
    try:
        yield
    finally:
        editor.apply_algo = original


class _NumberedCallbacks(EditCallback):
    """Passes events on with edits and batches counted through a context, even if editing restarts in between."""

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


def _apply_tracked(original: Callable[..., Any], callbacks: _NumberedCallbacks, model: Any, tok: Any,
                   requests: Sequence[Mapping[str, Any]], hparams: Any, *args: Any, **kwargs: Any) -> Any:
    """Call one of EasyEdit's executors, with events before and after it."""
    names = _tracked_names(model, hparams)
    weights = _tracked_weights(model, names)
    first = callbacks.num_edits or 0
    case_ids = [request.get("case_id", first + i) for i, request in enumerate(requests)]
    try:
        parsed = parse_requests(requests, first)
    except ValueError:  # of an algorithm that edits other things than facts
        parsed = []
    event = EditEvent(_decoder(model), weights, first, callbacks.num_batches, case_ids, requests=parsed)
    callbacks.on_batch_start(event)
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
        callbacks.on_batch_end(review_batch(event, [callbacks], before, lambda: weights, scale_back))
    except BaseException:
        with torch.no_grad():
            for layer, weight in weights.items():
                weight.copy_(before[layer])
            for name, original_weight in originals.items() if isinstance(originals, Mapping) else ():
                edited.get_parameter(name).copy_(original_weight)  # those that were not tracked
        raise
    return result


def _decoder(model: Any) -> PreTrainedModel:
    """The transformers model inside what an algorithm returned (adapters, EasyEdit's method objects)."""
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
    """Names of down-projections by layer: the edited ones, or all if the hyperparameters contain no layers."""
    decoder = _decoder(model)
    layers = list(getattr(hparams, "layers", None) or ())
    template = getattr(hparams, "rewrite_module_tmp", None)
    if not template:
        try:
            parts = decoder_parts(meta_model(decoder.config))  # the model itself may contain a method's own modules
        except ValueError:
            parts = decoder_parts(decoder)
        template = parts.names(layers).rewrite_module_tmp
    template = template.removesuffix(".weight")
    if not layers:
        modules = {name for name, _ in decoder.named_modules(remove_duplicate=False)}
        layers = [layer for layer in range(num_blocks(decoder.config)) if template.format(layer) in modules]
    return {layer: template.format(layer) for layer in layers}


def _tracked_weights(model: Any, names: Mapping[int, str]) -> dict[int, Tensor]:
    """Down-projections ``(d_out, d_in)`` by layer, also if a method has wrapped them in its own modules."""
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
