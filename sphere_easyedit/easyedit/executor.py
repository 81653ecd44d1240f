"""One of EasyEdit's executors as an executor of ours: its hyperparameters, its module globals, its look-ups.

Its function is called as it is. What it reads and keeps outside of its arguments is put in place before the call and
taken away after it, so that two models, or two runs, never share any of it.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
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

from ..editing.engines import Batch, ExecutorEngine
from ..editing.requests import parse_requests, tokenize_request
from ..editing.session import EditSession
from ..editing.solve import unedited, warn_of_indirect_outputs
from ..editing.target_values import optimise_target_values
from ..hparams import SPHEREHyperParams
from ..methods.corpus import corpus_name
from ..methods.covariance import load_moment, load_projections, model_folder, null_space_basis, statistics_files
from ..methods.registry import METHODS
from ..methods.statistics_fingerprint import ensure_unchanged
from ..models.architecture import EditableModel, frozen, max_positions
from ..utils.files import atomic_write
from ..utils.locks import exclusive
from ..utils.messages import suggestion

logger = logging.getLogger(__name__)

# Methods that SimIE runs, of those that can be wrapped.
BASE_METHODS = ("ROME", "MEMIT", "FT")

_ABSENT = object()
_CONTEXTS = "CONTEXT_TEMPLATES_CACHE"
_KEY_SUMS = "cache_c"  # AlphaEdit's sums of earlier keys, (layers, d_in, d_in), changed in place
# Names under which EasyEdit's modules keep state, and how each begins; P and cache_c appear with the first edit.
_PRISTINE: Mapping[str, Callable[[], Any]] = MappingProxyType({
    _CONTEXTS: lambda: None, "COV_CACHE": dict, "KZ_CACHE": dict, "inv_mom2_cache": dict,
    "P": lambda: _ABSENT, "P_loaded": bool, _KEY_SUMS: lambda: _ABSENT, "cache_c_new": bool,
})
_KEY_MOMENTS = "matrix_P."  # SimIE's, (d_in, d_in) by parameter name, added to with every request
# Fields of ULTRAEDIT's class alone: how many requests share a forward pass, how many rows are normalised at once.
_PORTIONS = ("batch_size_once", "editor_batch_size")
# What classes ask for and their functions never read.
_UNREAD: Mapping[str, Any] = MappingProxyType({
    "model_class": "AutoModelForCausalLM", "tokenizer_class": "AutoTokenizer", "tokenizer_name": "", "dropout": 0.0,
    "no_grad_layers": None, "silent": False, "results_dir": ".", "fp16": False,
})
_CACHE_FILE = "layer_{}_clamp_{}_case_{}.npz"  # the three slots that EasyEdit fills


class WrappedExecutor:
    """A function of EasyEdit's protocol, called with our hyperparameters and a session's state.

    Args:
        name: the method, as EasyEdit's ``ALG_DICT`` calls it.
        function: the method's function.
        session: where its state lives from batch to batch.
        batchable: whether EasyEdit lists it as editing several requests in one call.

    Raises:
        ValueError: the method can't be wrapped.
    """

    def __init__(self, name: str, function: Callable[..., Any], session: EditSession, batchable: bool = True) -> None:
        self._name, self._function, self._session = name, function, session
        method_class = hparams_class(function)
        if method_class is None:
            raise ValueError(f"base_alg {name!r} can't be wrapped: EasyEdit's function for it takes no layers with one "
                             "weight each and returns no original weights")
        self._class = method_class
        self._fields = {field.name for field in dataclasses.fields(method_class) if field.init}
        self._known = self._fields  # names that may be given
        self._is_rome_like = "context_template_length_params" in self._fields
        self._reads_prompt = "fact_token" not in self._fields  # fine-tuning: no place in the prompt to look up
        # EasyEdit's editor goes by a list of names that lacks PMET and MEMIT-FE, which then compute nonsense.
        self._padding_side = "left" if self._reads_prompt else "right"
        # Its list lacks EAMET; ROME and its kin, which take the first request only, call their argument `request`.
        takes_all = "requests" in inspect.signature(function).parameters and not self._reads_prompt
        self._batchable = batchable or takes_all
        self._module = sys.modules[function.__module__]

    def __call__(self, model: nn.Module, tok: PreTrainedTokenizerBase, requests: Sequence[Mapping[str, Any]],
                 hparams: SPHEREHyperParams, copy: bool = False, return_orig_weights: bool = True, **kwargs: Any
                 ) -> tuple[nn.Module, Mapping[str, Tensor]]:
        """Edit in place and return the model with the original weights by parameter name.

        Raises:
            ValueError: the hyperparameters do not fit the method, or it takes one request a call.
        """
        editable = hparams.editable(model, self._session.known_names(model, hparams))
        own = self.check(hparams, editable, len(requests))
        numbered = [_request(raw, self._session.num_edits + i, self._reads_prompt) for i, raw in enumerate(requests)]
        with ExitStack() as stack:
            # The method's state is in its modules' globals: one thread at a time may put its own there.
            stack.enter_context(exclusive(model))
            stack.enter_context(exclusive(self._module))
            stack.enter_context(_named(editable))
            stack.enter_context(_padded(tok, self._padding_side))
            stack.enter_context(_untied(editable))
            stack.enter_context(_gradients_restored(model))
            stack.enter_context(_attributes_restored(getattr(self._function, "__self__", None)))
            stack.enter_context(self._state(editable, hparams, own))
            self._prepare_statistics(editable, tok, hparams, own, stack)
            if kwargs.get("cache_template") is None and self._batches_target_values(hparams):
                folder = hparams.target_values_dir or stack.enter_context(tempfile.TemporaryDirectory())
                kwargs["cache_template"] = str(Path(folder) / _CACHE_FILE)
                self._file_target_values(editable, tok, numbered, hparams, own, kwargs["cache_template"])
            # Some methods return the original weights only when told to keep them.
            edited, originals = self._function(model, tok, numbered, own, **{
                **kwargs, "copy": copy, "return_orig_weights": return_orig_weights, "keep_original_weight": True})
        if not isinstance(originals, Mapping):
            raise ValueError(f"{self._name} returned no original weights by name, so its change can't be taken over")
        return edited, originals

    def check(self, hparams: SPHEREHyperParams, editable: EditableModel, batch_size: int) -> Any:
        """Hyperparameters of the method's own class for a batch of this size.

        Raises:
            ValueError: values are missing, unknown or do not fit, or the method takes one request a call.
        """
        if batch_size > 1 and not self._batchable:
            raise ValueError(f"{self._name} edits one request a call and got {batch_size}: set batch_size to 1")
        given, template = hparams.executor_hparams, editable.names.rewrite_module_tmp
        modules = given.get("rewrite_module_tmps")
        if modules is not None and list(modules) != [template]:
            raise ValueError(f"rewrite_module_tmps is {modules!r}: SPHERE projects one weight a layer; give it the one "
                             f"that rewrite_module_tmp names, {template!r}")
        weights = given.get("inner_params")
        ours = [template.format(layer) for layer in editable.layers]
        if weights is not None and [str(name).removesuffix(".weight") for name in weights] != ours:
            raise ValueError(f"inner_params is {weights!r}: SPHERE projects one weight a layer, those that layers and "
                             f"rewrite_module_tmp name ({', '.join(ours)}); leave inner_params out, or give these")
        if given.get("half") and "half" in self._known:
            raise ValueError("half is true, which would turn the whole model into float16: set it to false, and load "
                             "the model in the dtype that you want")
        unknown = [key for key in given if key not in self._known]
        if unknown:
            raise ValueError(f"{unknown[0]!r} (value {given[unknown[0]]!r}) is no hyperparameter of {self._name}"
                             f"{suggestion(unknown[0], sorted(self._known))}")
        return self._own_hparams(hparams, editable, batch_size)

    def _own_hparams(self, hparams: SPHEREHyperParams, editable: EditableModel, batch_size: int) -> Any:
        """The method's own class: its own values before ours, what the model tells before both."""
        ours = dataclasses.asdict(editable.names) | {
            name: value for name, value in hparams.to_dict().items() if value is not None}
        if hparams.rewrite_module_tmp is None and self._reads_prompt:
            ours["rewrite_module_tmp"] += ".weight"  # fine-tuning picks parameters by substring, a bias too
        transposed = isinstance(editable.down_projection(editable.layers[0]), Conv1D)
        known = {
            "alg_name": self._name, "device": str(editable.input_device), "mom2_dataset": corpus_name(hparams),
            # Which way round a weight is stored is told by the model's name.
            "model_name": "gpt2-xl" if transposed else "llama",
            "P_loc": os.devnull,  # any file that exists: P is put in place beforehand
            "inner_params": [editable.names.rewrite_module_tmp.format(layer) for layer in editable.layers],
        }
        if "P_loc" in self._fields:  # AlphaEdit's class asks for both, and reads neither once P is in place
            ours.setdefault("mom2_update_weight", 0.0)
            if hparams.nullspace_share is not None:
                ours.setdefault("nullspace_threshold", 0.0)
        values = {**_UNREAD, **ours, **hparams.executor_hparams, **known}
        if set(_PORTIONS) <= self._fields and set(_PORTIONS) <= values.keys():
            values |= {"batch_size": batch_size, "batch_size_once": _portion(values, batch_size)}
        required = [field.name for field in dataclasses.fields(self._class)
                    if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"{self._name} needs {', '.join(missing)} (EasyEdit's {self._class.__name__}): add the "
                             "missing values to the hyperparameters")
        return self._class(**{name: value for name, value in values.items() if name in self._fields})

    @contextmanager
    def _state(self, editable: EditableModel, hparams: SPHEREHyperParams, own: Any) -> Iterator[None]:
        """The session's state in the method's module globals; kept when all went well, gone from them in any case."""
        package = self._module.__name__.rpartition(".")[0]
        modules = [module for name, module in list(sys.modules.items())
                   if module is self._module or (package and name.startswith(f"{package}."))]
        slots = [(module, name) for module in modules for name in _PRISTINE if name in vars(module)]
        if "P_loc" in self._fields:
            slots += [(self._module, name) for name in ("P", _KEY_SUMS) if (self._module, name) not in slots]
        outside = [(module, name, vars(module).get(name, _ABSENT)) for module, name in slots]
        caches, history = self._session.engine_caches, self._session.engine_history
        try:
            for module, name in slots:
                _put(module, name, caches.get(f"{module.__name__}:{name}", _PRISTINE[name]()))
            if _KEY_SUMS in history:
                _put(self._module, _KEY_SUMS, history[_KEY_SUMS].clone())  # a failed batch leaves the session's own
                _put(self._module, "cache_c_new", True)
            contexts = self._session.contexts if hparams.context_templates is None else hparams.context_templates
            if contexts is not None and hasattr(self._module, _CONTEXTS):
                _put(self._module, _CONTEXTS, self._nested(contexts))
            yield
            found = {(module, name): vars(module)[name] for module, name in slots if name in vars(module)}
            contexts = found.pop((self._module, _CONTEXTS), None)
            if contexts is not None:
                self._session.contexts = _flat(contexts)
            self._session.engine_history = {name: value for (_, name), value in found.items() if name == _KEY_SUMS}
            self._session.engine_caches = {f"{module.__name__}:{name}": value for (module, name), value
                                             in found.items() if name not in (_KEY_SUMS, "cache_c_new")}
        finally:
            for module, name, value in outside:
                _put(module, name, value)

    def _nested(self, contexts: Sequence[str]) -> list[Any]:
        """Context templates as the method keeps them; ROME and its kin in one list, all others by kind."""
        return ["{}", *contexts] if self._is_rome_like else [["{}"], list(contexts)]

    def _prepare_statistics(self, editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                            own: Any, stack: ExitStack) -> None:
        """Have the keys' second moments on file, where EasyEdit finds them, and the null-space projection in place.

        Until ``stack`` ends, files that the session looks at for the first time must stay: the method reads them.
        """
        optional = self._is_rome_like and not hparams.mom2_adjustment  # all others read them whatever it says
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
        _put(self._module, "P", stacked)
        _put(self._module, "P_loaded", True)

    def _batches_target_values(self, hparams: SPHEREHyperParams) -> bool:
        method = METHODS.find(self._name)
        possible = method is not None and method.reads_target_values and hparams.fact_token == "subject_last"
        if hparams.batched_target_values and not possible:
            raise ValueError("batched_target_values is true, which our optimiser offers for MEMIT and AlphaEdit with "
                             f"fact_token subject_last, not for {self._name} with {hparams.fact_token}: leave it out")
        wanted = hparams.batched_target_values
        return possible and (hparams.projects if wanted is None else wanted)

    def _file_target_values(self, editable: EditableModel, tok: PreTrainedTokenizerBase,
                            requests: Sequence[Mapping[str, Any]], hparams: SPHEREHyperParams, own: Any,
                            template: str) -> None:
        """Optimise the batch's target values at once, and file them where the method looks for them."""
        nested = self._module.get_context_templates(editable.model, tok)  # made by the method itself if not given
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


class WrappedSimIE(WrappedExecutor):
    """SimIE: for each request in turn another method edits the original weights, and part of its change is kept.

    Its function keeps its state on the hyperparameter object. Here second moments of keys are in the session, original
    weights too, and the weights to go on from are the model's, which SPHERE may have changed.

    Args:
        name, function, session: as for ``WrappedExecutor``.
        base: the other method, wrapped for the same session.
    """

    def __init__(self, name: str, function: Callable[..., Any], session: EditSession, base: WrappedExecutor) -> None:
        super().__init__(name, function, session)
        self._base = base
        self._batchable = True  # its function goes through the requests itself
        self._known = self._fields | base._known
        self._padding_side = base._padding_side

    def _own_hparams(self, hparams: SPHEREHyperParams, editable: EditableModel, batch_size: int) -> Any:
        own = super()._own_hparams(hparams, editable, batch_size)
        own._base_hparams = self._base._own_hparams(hparams, editable, 1)
        return own

    @contextmanager
    def _state(self, editable: EditableModel, hparams: SPHEREHyperParams, own: Any) -> Iterator[None]:
        # The other method's state is in its own modules' globals (see ``__call__``).
        with exclusive(self._base._module), self._base._state(editable, hparams, own._base_hparams):
            moments = {name.removeprefix(_KEY_MOMENTS): moment for name, moment
                       in self._session.engine_history.items() if name.startswith(_KEY_MOMENTS)}
            if moments:
                own._simie_instance = self._resumed(editable, own, moments)
                own._simie_call_count = own._simie_total_edits = self._session.num_edits
            yield
        self._session.engine_history = {f"{_KEY_MOMENTS}{name}": moment.cpu() for name, moment
                                          in own._simie_instance.matrix_P.items()}

    def _resumed(self, editable: EditableModel, own: Any, moments: Mapping[str, Tensor]) -> Any:
        simie: Any = vars(self._module)["SimIE"](lamHyper=own.lamHyper, init=own.init_model, solver=own.solver)
        originals = {editable.parameter_name(layer): editable.orient(layer, weight)
                     for layer, weight in self._session.original.items()}
        simie.initialization(own.model_name, originals, own.device, own.fast)
        # Copies, since the method adds to them in place, and a failed batch must leave the session's own.
        simie.matrix_P = {name: moments[name].to(held.device, copy=True) for name, held in simie.matrix_P.items()}
        simie.weights_copy = {editable.parameter_name(layer): editable.orient(layer, weight).to(
            simie.weights_copy[editable.parameter_name(layer)].device, copy=True)
            for layer, weight in editable.weights().items()}
        return simie

    def _prepare_statistics(self, editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                            own: Any, stack: ExitStack) -> None:
        self._base._prepare_statistics(editable, tok, hparams, own._base_hparams, stack)


class EasyEditEngine(ExecutorEngine):
    """One of EasyEdit's functions as what solves a batch.

    Args:
        executor: the function, wrapped.
        hparams, arguments: as for ``ExecutorEngine``.
    """

    def __init__(self, executor: WrappedExecutor, hparams: SPHEREHyperParams, arguments: Mapping[str, Any]) -> None:
        super().__init__(executor, hparams, arguments)
        self._executor = executor

    def prepare_run(self, editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
                    session: EditSession, batch_size: int) -> None:
        self._executor.check(hparams, editable, batch_size)

    def prepare(self, editable: EditableModel, batch: Batch, hparams: SPHEREHyperParams, session: EditSession) -> Batch:
        if METHODS.find(hparams.base_alg) is not None:
            warn_of_indirect_outputs(editable, batch.tok, session)
        return batch


def hparams_class(function: Callable[..., Any]) -> type | None:
    """The hyperparameter class of an executor that can be wrapped, by its signature; None for any other."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return None
    parameter = signature.parameters.get("hparams")
    annotation = None if parameter is None else parameter.annotation
    if isinstance(annotation, str):
        annotation = getattr(sys.modules.get(function.__module__), annotation, None)
    if not (isinstance(annotation, type) and dataclasses.is_dataclass(annotation)):
        return None
    names = {field.name for field in dataclasses.fields(annotation)}
    fits = any(wanted <= names for wanted in ({"layers", "rewrite_module_tmp"}, {"inner_params", *_PORTIONS},
                                              {"base_method"}))
    return annotation if fits and "return_orig_weights" in signature.parameters else None


def runs_another(function: Callable[..., Any]) -> bool:
    """Whether an executor runs another method of EasyEdit's, which its hyperparameters name (SimIE)."""
    method_class = hparams_class(function)
    return method_class is not None and "base_method" in {field.name for field in dataclasses.fields(method_class)}


def _portion(values: Mapping[str, Any], batch_size: int) -> int:
    """The largest portion up to ``batch_size_once`` that divides the batch, since EasyEdit drops what is left over."""
    for name in _PORTIONS:
        if not isinstance(values[name], int) or values[name] < 1:
            raise ValueError(f"{name} is {values[name]!r}: give a whole number from 1 up")
    wanted = min(values["batch_size_once"], batch_size)
    portion = next(size for size in range(wanted, 0, -1) if batch_size % size == 0)
    if portion != wanted:
        logger.info("batch_size_once is %d, of which %d requests hold no whole number: taking %d at once",
                    values["batch_size_once"], batch_size, portion)
    return portion


def _request(raw: Mapping[str, Any], number: int, fill: bool) -> dict[str, Any]:
    """A request as EasyEdit's functions want it, with an id that no other of the session has."""
    request = {**raw, "case_id": number}
    if isinstance(raw["target_new"], Mapping):
        request["target_new"] = raw["target_new"]["str"]
    if fill:
        request["prompt"] = raw["prompt"].replace("{}", raw["subject"])
    return request


def _flat(contexts: Sequence[Any]) -> list[str]:
    groups = [group if isinstance(group, (list, tuple)) else [group] for group in contexts]
    return [template for group in groups for template in group if template != "{}"]


def _put(module: ModuleType, name: str, value: Any) -> None:
    if value is _ABSENT:
        vars(module).pop(name, None)
    else:
        setattr(module, name, value)


@contextmanager
def _named(editable: EditableModel) -> Iterator[None]:
    """The model under a path that begins with its family's name, since EasyEdit tells families by substrings of it.

    The folder's own name stays, since statistics are filed under it.
    """
    config: Any = editable.config
    path = config._name_or_path
    family = "gpt2-xl" if isinstance(editable.down_projection(editable.layers[0]), Conv1D) else str(config.model_type)
    config._name_or_path = f"{family}/{model_folder(editable)}"
    try:
        yield
    finally:
        config._name_or_path = path


@contextmanager
def _padded(tok: PreTrainedTokenizerBase, side: str) -> Iterator[None]:
    """The tokenizer padding on the side that the method needs, and with something to pad with."""
    before, token = tok.padding_side, tok.pad_token
    tok.padding_side = side
    if token is None:
        tok.pad_token = tok.eos_token
    try:
        yield
    finally:
        tok.padding_side = before
        if token is None:
            tok.pad_token = None


@contextmanager
def _untied(editable: EditableModel) -> Iterator[None]:
    """The LM head's weight as a named parameter, which it is not while tied to the embeddings; the same memory."""
    head: Any = editable.lm_head
    tied = head.weight
    names = {name for name, _ in editable.model.named_parameters()}
    if f"{editable.names.lm_head_module}.weight" not in names:
        head.weight = nn.Parameter(tied.detach(), requires_grad=False)
    try:
        yield
    finally:
        head.weight = tied


@contextmanager
def _attributes_restored(instance: Any) -> Iterator[None]:
    """An object's attributes as before, None for no object: EasyEdit's executors of a class keep the last model."""
    kept = {} if instance is None else dict(vars(instance))
    try:
        yield
    finally:
        if instance is not None:
            vars(instance).clear()
            vars(instance).update(kept)


@contextmanager
def _gradients_restored(model: nn.Module) -> Iterator[None]:
    """Which parameters take gradients, and those gradients, as before."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag, gradient in before:
            parameter.requires_grad_(flag)
            parameter.grad = gradient
