"""Runs a function of EasyEdit's methods with our hyperparameters and a session's state.

The function itself is unchanged. EasyEdit's methods keep state in the globals of their modules; here it is set from
the session before each call and removed after it, so that two models, or two runs, never share any of it.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from ..editing.requests import parse_requests, tokenize_request
from ..editing.session import EditSession
from ..editing.solve import unedited
from ..editing.target_values import optimise_target_values
from ..hparams import SPHEREHyperParams
from ..methods.corpus import corpus_name
from ..methods.covariance import load_moment, load_projections, null_space_basis, statistics_files
from ..methods.registry import METHODS
from ..methods.statistics_fingerprint import ensure_unchanged
from ..models.architecture import EditableModel, frozen, max_positions
from ..utils.files import atomic_write
from ..utils.locks import exclusive
from ..utils.messages import suggestion
from .method_hparams import CHUNK_FIELDS, chunk_size, hparams_class
from .temporary_changes import attributes_restored, gradients_restored, head_as_parameter, padding, path_names_family

_UNSET = object()
_CONTEXTS = "CONTEXT_TEMPLATES_CACHE"
_KEY_SUMS = "cache_c"  # AlphaEdit's sums over earlier keys, (layers, d_in, d_in), changed in place
# Globals in which EasyEdit's modules keep state, and their initial values; P and cache_c appear with the first edit.
_INITIAL_STATE: Mapping[str, Callable[[], Any]] = MappingProxyType({
    _CONTEXTS: lambda: None, "COV_CACHE": dict, "KZ_CACHE": dict, "inv_mom2_cache": dict,
    "P": lambda: _UNSET, "P_loaded": bool, _KEY_SUMS: lambda: _UNSET, "cache_c_new": bool,
})
# Fields that classes require and their functions never read.
_UNUSED_FIELDS: Mapping[str, Any] = MappingProxyType({
    "model_class": "AutoModelForCausalLM", "tokenizer_class": "AutoTokenizer", "tokenizer_name": "", "dropout": 0.0,
    "no_grad_layers": None, "silent": False, "results_dir": ".", "fp16": False,
})
_CACHE_FILE = "layer_{}_clamp_{}_case_{}.npz"  # EasyEdit fills in the three fields


class WrappedExecutor:
    """A function of EasyEdit's methods, called with our hyperparameters and a session's state.

    Args:
        name: the method's name in EasyEdit's ``ALG_DICT``.
        function: the method's function.
        session: keeps the method's state from batch to batch.
        batchable: whether EasyEdit lists it as editing several requests in one call.

    Raises:
        ValueError: the method can't be wrapped.
    """

    def __init__(self, name: str, function: Callable[..., Any], session: EditSession, batchable: bool = True) -> None:
        self._name, self._function, self._session = name, function, session
        method_class = hparams_class(function)
        if method_class is None:
            raise ValueError(f"base_alg {name!r} can't be wrapped: EasyEdit's function for it takes no layers with one "
                             "weight each, or returns no original weights")
        self._class = method_class
        self._fields = {field.name for field in dataclasses.fields(method_class) if field.init}
        self._known = self._fields  # names of accepted hyperparameters
        self._is_rome_like = "context_template_length_params" in self._fields
        self._reads_prompt = "fact_token" not in self._fields  # fine-tuning: no token of the prompt is looked up
        # EasyEdit's editor uses a list of names that lacks PMET and MEMIT-FE, whose results are then wrong.
        self._padding_side = "left" if self._reads_prompt else "right"
        # EasyEdit's list lacks EAMET; ROME and its variants, which take one request only, name the argument `request`.
        takes_all = "requests" in inspect.signature(function).parameters and not self._reads_prompt
        self._batchable = batchable or takes_all
        self._module = sys.modules[function.__module__]

    def __call__(self, model: nn.Module, tok: PreTrainedTokenizerBase, requests: Sequence[Mapping[str, Any]],
                 hparams: SPHEREHyperParams, copy: bool = False, return_orig_weights: bool = True, **kwargs: Any
                 ) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """Edit in place and return the model with the original weights by parameter name.

        Raises:
            ValueError: the hyperparameters do not fit the method, or it takes one request per call.
        """
        editable = hparams.editable(model, self._session.known_names(model, hparams))
        own = self.check(hparams, editable, len(requests))
        numbered = [_request(raw, self._session.num_edits + i, self._reads_prompt) for i, raw in enumerate(requests)]
        with ExitStack() as stack:
            # The method's state is in its modules' globals, which only one thread at a time may set.
            stack.enter_context(exclusive(model))
            stack.enter_context(exclusive(self._module))
            stack.enter_context(path_names_family(editable))
            stack.enter_context(padding(tok, self._padding_side))
            stack.enter_context(head_as_parameter(editable))
            stack.enter_context(gradients_restored(model))
            stack.enter_context(attributes_restored(getattr(self._function, "__self__", None)))
            stack.enter_context(self._state(editable, hparams, own))
            self._prepare_statistics(editable, tok, hparams, own, stack)
            if kwargs.get("cache_template") is None and self._batches_target_values(hparams):
                folder = hparams.target_values_dir or stack.enter_context(tempfile.TemporaryDirectory())
                kwargs["cache_template"] = str(Path(folder) / _CACHE_FILE)
                self._file_target_values(editable, tok, numbered, hparams, own, kwargs["cache_template"])
            # Some methods return the original weights only if `keep_original_weight` is set.
            edited, originals = self._function(model, tok, numbered, own, **{
                **kwargs, "copy": copy, "return_orig_weights": return_orig_weights, "keep_original_weight": True})
        if not isinstance(originals, Mapping):
            raise ValueError(f"{self._name} returned no original weights by name, so its change can't be projected: "
                             "choose another base_alg")
        return edited, originals

    def check(self, hparams: SPHEREHyperParams, editable: EditableModel, batch_size: int) -> Any:
        """Hyperparameters of the method's own class for a batch of this size.

        Raises:
            ValueError: values are missing, unknown or do not fit, or the method takes one request per call.
        """
        if batch_size > 1 and not self._batchable:
            raise ValueError(f"{self._name} edits one request per call and got {batch_size}: set batch_size to 1")
        given, template = hparams.executor_hparams, editable.names.rewrite_module_tmp
        modules = given.get("rewrite_module_tmps")
        if modules is not None and list(modules) != [template]:
            raise ValueError(f"rewrite_module_tmps is {modules!r}: SPHERE projects one weight per layer; give the one "
                             f"of rewrite_module_tmp, {template!r}")
        weights = given.get("inner_params")
        ours = [template.format(layer) for layer in editable.layers]
        if weights is not None and [str(name).removesuffix(".weight") for name in weights] != ours:
            raise ValueError(f"inner_params is {weights!r}: SPHERE projects one weight per layer, given by layers "
                             f"and rewrite_module_tmp ({', '.join(ours)}); leave inner_params out, or give these")
        if given.get("half") and "half" in self._known:
            raise ValueError("half is true, which would turn the whole model into float16: set it to false, and load "
                             "the model in the desired dtype")
        unknown = [key for key in given if key not in self._known]
        if unknown:
            raise ValueError(f"{unknown[0]!r} (value {given[unknown[0]]!r}) is not a hyperparameter of {self._name}"
                             f"{suggestion(unknown[0], sorted(self._known))}")
        return self._method_hparams(hparams, editable, batch_size)

    def _method_hparams(self, hparams: SPHEREHyperParams, editable: EditableModel, batch_size: int) -> Any:
        """The method's hyperparameter object. Precedence: model facts, then the method's values, then ours."""
        ours = dataclasses.asdict(editable.names) | {
            name: value for name, value in hparams.to_dict().items() if value is not None}
        if hparams.rewrite_module_tmp is None and self._reads_prompt:
            ours["rewrite_module_tmp"] += ".weight"  # fine-tuning picks parameters by substring, a bias too
        transposed = isinstance(editable.down_projection(editable.layers[0]), Conv1D)
        of_model = {
            "alg_name": self._name, "device": str(editable.input_device), "mom2_dataset": corpus_name(hparams),
            # EasyEdit finds by the model's name whether weights are stored transposed.
            "model_name": "gpt2-xl" if transposed else "llama",
            "P_loc": os.devnull,  # any file that exists: P is set beforehand
            "inner_params": [editable.names.rewrite_module_tmp.format(layer) for layer in editable.layers],
        }
        if "P_loc" in self._fields:  # AlphaEdit's class requires both, and reads neither once P is set
            ours.setdefault("mom2_update_weight", 0.0)
            if hparams.nullspace_share is not None:
                ours.setdefault("nullspace_threshold", 0.0)
        values = {**_UNUSED_FIELDS, **ours, **hparams.executor_hparams, **of_model}
        if set(CHUNK_FIELDS) <= self._fields and set(CHUNK_FIELDS) <= values.keys():
            values |= {"batch_size": batch_size, "batch_size_once": chunk_size(values, batch_size)}
        required = [field.name for field in dataclasses.fields(self._class)
                    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"{self._name} needs {', '.join(missing)} (EasyEdit's {self._class.__name__}): add the "
                             "missing values to the hyperparameters")
        return self._class(**{name: value for name, value in values.items() if name in self._fields})

    @contextmanager
    def _state(self, editable: EditableModel, hparams: SPHEREHyperParams, own: Any) -> Iterator[None]:
        """Set the method's module globals from the session; save them to it on success, and restore them in any case.
        """
        package = self._module.__name__.rpartition(".")[0]
        modules = [module for name, module in list(sys.modules.items())
                   if module is self._module or (package and name.startswith(f"{package}."))]
        variables = [(module, name) for module in modules for name in _INITIAL_STATE if name in vars(module)]
        if "P_loc" in self._fields:
            variables += [(self._module, name) for name in ("P", _KEY_SUMS) if (self._module, name) not in variables]
        outside = [(module, name, vars(module).get(name, _UNSET)) for module, name in variables]
        caches, history = self._session.engine_caches, self._session.engine_history
        try:
            for module, name in variables:
                _set_global(module, name, caches.get(f"{module.__name__}:{name}", _INITIAL_STATE[name]()))
            if _KEY_SUMS in history:
                # A copy, since a failed batch must not change the session's.
                _set_global(self._module, _KEY_SUMS, history[_KEY_SUMS].clone())
                _set_global(self._module, "cache_c_new", True)
            contexts = self._session.contexts if hparams.context_templates is None else hparams.context_templates
            if contexts is not None and hasattr(self._module, _CONTEXTS):
                _set_global(self._module, _CONTEXTS, self._nested(contexts))
            yield
            state = {(module, name): vars(module)[name] for module, name in variables if name in vars(module)}
            contexts = state.pop((self._module, _CONTEXTS), None)
            if contexts is not None:
                self._session.contexts = _flat(contexts)
            self._session.engine_history = {name: value for (_, name), value in state.items() if name == _KEY_SUMS}
            self._session.engine_caches = {f"{module.__name__}:{name}": value for (module, name), value
                                           in state.items() if name not in (_KEY_SUMS, "cache_c_new")}
        finally:
            for module, name, value in outside:
                _set_global(module, name, value)

    def _nested(self, contexts: Sequence[str]) -> list[Any]:
        """Context templates in the method's own form: one list for ROME and its variants, nested lists for others."""
        return ["{}", *contexts] if self._is_rome_like else [["{}"], list(contexts)]

    def _prepare_statistics(self, editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                            own: Any, stack: ExitStack) -> None:
        """Make sure that the keys' second moments are on file where EasyEdit finds them, and set its null-space
        projection.

        Files that the session uses for the first time must not change until ``stack`` ends, since the method reads
        them.
        """
        optional = self._is_rome_like and not hparams.mom2_adjustment  # all other methods always read them
        if "stats_dir" not in self._fields or optional:
            return
        projects = "P_loc" in self._fields
        if projects and hparams.P_loc is not None and Path(hparams.P_loc).exists():
            if "P" not in vars(self._module):
                width = editable.d_in(editable.layers[0])
                self._put_projection(load_projections(Path(hparams.P_loc), editable.layers, width))
            return
        with unedited(editable, self._session):
            known = self._session.statistics
            if not known or not all(file.path.exists() for file in known.values()):
                known = self._session.statistics = statistics_files(editable, tok, hparams)
                stack.enter_context(ensure_unchanged(known.values()))
            if projects and "P" not in vars(self._module):
                share = hparams.nullspace_share
                if share is None:
                    layers = [self._module.get_project(editable.model, tok, layer, own) for layer in editable.layers]
                else:
                    moments = [load_moment(known[layer].path, editable.d_in(layer)) for layer in editable.layers]
                    bases = [null_space_basis(moment, share=share).float() for moment in moments]
                    layers = [basis @ basis.T for basis in bases]
                self._put_projection(torch.stack([layer.float().cpu() for layer in layers]))

    def _put_projection(self, stacked: Tensor) -> None:
        _set_global(self._module, "P", stacked)
        _set_global(self._module, "P_loaded", True)

    def _batches_target_values(self, hparams: SPHEREHyperParams) -> bool:
        method = METHODS.find(self._name)
        possible = method is not None and method.reads_target_values and hparams.fact_token == "subject_last"
        if hparams.batched_target_values and not possible:
            raise ValueError("batched_target_values is true, which is supported for MEMIT and AlphaEdit with "
                             f"fact_token subject_last, not for {self._name} with {hparams.fact_token}: leave it out")
        chosen = hparams.batched_target_values
        return possible and (hparams.projects if chosen is None else chosen)

    def _file_target_values(self, editable: EditableModel, tok: PreTrainedTokenizerBase,
                            requests: Sequence[Mapping[str, Any]], hparams: SPHEREHyperParams, own: Any,
                            template: str) -> None:
        """Optimise the batch's target values together, and write them to the files that the method reads."""
        nested = self._module.get_context_templates(editable.model, tok)  # generated by the method if not given
        contexts, limit = _flat(nested), max_positions(editable.config)
        tokenized = [tokenize_request(tok, request, contexts, limit) for request in parse_requests(requests)]
        settings = dataclasses.replace(hparams, v_loss_layer=max(hparams.v_loss_layer, hparams.layers[-1]))
        with frozen(editable.model):
            targets = optimise_target_values(editable, tokenized, settings)
        for request, value in zip(requests, targets.values, strict=True):
            path = Path(template.format(editable.layers[-1], own.clamp_norm_factor, request["case_id"]))
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary, temporary.open("wb") as stream:
                np.savez(stream, v_star=value.float().cpu().numpy())


def _request(raw: Mapping[str, Any], number: int, fill: bool) -> dict[str, Any]:
    """A request in EasyEdit's form, with an id that is unique in the session."""
    request = {**raw, "case_id": number}
    if isinstance(raw["target_new"], Mapping):
        request["target_new"] = raw["target_new"]["str"]
    if fill:
        request["prompt"] = raw["prompt"].replace("{}", raw["subject"])
    return request


def _flat(contexts: Sequence[Any]) -> list[str]:
    groups = [group if isinstance(group, (list, tuple)) else [group] for group in contexts]
    return [template for group in groups for template in group if template != "{}"]


def _set_global(module: ModuleType, name: str, value: Any) -> None:
    if value is _UNSET:
        vars(module).pop(name, None)
    else:
        setattr(module, name, value)
