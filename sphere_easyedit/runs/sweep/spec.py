"""Reads a sweep's YAML file.

.. code-block:: yaml

    model: smollm2-135m            # hyperparameters are hparams: "{method}/{model}", unless that says another file
    dataset: counterfact           # dataset, data, num_edits, batch_size: as `sphere-easyedit edit` takes them
    data: ../shared/data/counterfact.json
    num_edits: 2000
    batch_size: 100
    edit: {eval-every: 500, protocol: [paper, rome], eval-before: false}    # further options; a list repeats one
    set: {v_num_grad_steps: 10, context_templates: []}      # hyperparameters of all runs
    seeds: [0, 1]                  # runs are started seed by seed
    methods: [MEMIT, AlphaEdit]    # or with hyperparameters: {MEMIT: {}, AlphaEdit: {L2: 1}}
    sphere: [false, true]          # false: alpha 0; SPHERE's other hyperparameters have no effect
    gamma: [0.5]                   # default: that of the hyperparameter file
    alpha: [0.5, 0.8]
    runs:                          # further runs, or the only ones; settings not given are those above
      - {name: AlphaEdit-random, method: AlphaEdit, sphere: true, set: {suppression: random}, seeds: [0]}
    slurm: {partition: gpu, time: 480, gpus_per_node: 1}      # for `sweep --launcher slurm`, for each run

An entry of ``runs`` may have all of these keys but methods and slurm. Its ``set`` and ``edit`` are added to those
above. A single value may replace a list of one. Paths are relative to the working directory; ``${NAME}`` is expanded to
an environment variable: ``${SPHERE_DATA}/zsre.json``.

A run is named METHOD-plain-seedS or METHOD-sphere-gammaG-alphaA-seedS; a given ``name`` replaces all but the seed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, get_args

from ...datasets.loaders import DatasetName
from ...defaults import BATCH_SIZE
from ...hparams import SPHEREHyperParams
from ...utils.messages import suggestion
from .checks import as_flag, as_list, as_mapping, as_text, as_whole, check_keys, read_yaml
from .grid import MAX_LENGTH, Group, is_name, runs_of
from .record import Run, Sweep
from .slurm import check_slurm

_RUN_KEYS = ("model", "hparams", "dataset", "data", "num_edits", "batch_size")
_LISTS = ("seeds", "sphere", "gamma", "alpha")
_GRID_KEYS = (*_RUN_KEYS, "edit", "set", *_LISTS, "methods", "runs", "slurm")
_ENTRY_KEYS = ("name", "method", *_RUN_KEYS, "edit", "set", *_LISTS)
# Options of `edit` and hyperparameters that have their own key here, and must be given by it.
_OWN_OPTIONS = MappingProxyType({"hparams": "hparams", "set": "set", "dataset": "dataset", "data": "data",
                                 "num-edits": "num_edits", "batch-size": "batch_size", "seed": "seeds"})
_OWN_HYPERPARAMETERS = MappingProxyType({"gamma": "gamma", "alpha": "alpha", "cumulative_ratio": "gamma",
                                         "suppression_strength": "alpha"})
_SET_BY_SWEEP: Final = ("output", "resume")


def load_sweep(path: str | Path, edit_options: Collection[str] | None = None) -> Sweep:
    """Read a sweep's YAML file (format: see this module), check it, and expand it to runs.

    Args:
        path: the file.
        edit_options: names of the options of ``edit``, without leading dashes, including ``no-`` forms; None: options
            are not checked.

    Raises:
        FileNotFoundError: this file, or a hyperparameter file, does not exist.
        ValueError: the file is not YAML; a key, option or hyperparameter is unknown (the nearest is suggested) or
            wrong; two runs are equal or have the same name; nothing is left to run.
    """
    path = Path(path)
    content = read_yaml(path)
    try:
        return Sweep(tuple(_Reader(content, edit_options).runs()), check_slurm(content.get("slurm"), "slurm"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Reader:
    """Parses the parts of the file."""

    def __init__(self, content: Mapping[str, Any], edit_options: Collection[str] | None) -> None:
        check_keys(content, _GRID_KEYS, "a sweep")
        self._top, self._edit_options = content, edit_options
        self._files: dict[str, dict[str, Any]] = {}  # hyperparameter files that were read
        self._methods = _methods(content.get("methods"))
        self._entries = _entries(content.get("runs"))
        if not self._methods and not self._entries:
            raise ValueError("there is nothing to run: give `methods`, a list, or `runs`")
        self._set = _hyperparameters(content.get("set"), "set")

    def runs(self) -> list[Run]:
        groups = [self._group(f"method {method}", method, {}) for method in self._methods]
        groups += [self._group(where, entry["method"], entry) for where, entry in self._entries.items()]
        return runs_of(groups)

    def _group(self, where: str, method: str, entry: Mapping[str, Any]) -> Group:
        """``entry`` is empty for the grid's groups."""
        changed = {**self._set, **self._methods.get(method, {}), **_hyperparameters(entry.get("set"), f"{where}.set")}
        edit = self._edit(self._top.get("edit"), "edit") | self._edit(entry.get("edit"), f"{where}.edit")
        settings = _settings(method, {name: entry.get(name, self._top.get(name)) for name in _RUN_KEYS}, changed, edit,
                             where)
        lists = {name: _choices(name, self._top.get(name) if entry.get(name) is None else entry[name])
                 for name in _LISTS}
        if settings.hparams not in self._files:
            self._files[settings.hparams] = SPHEREHyperParams.from_hparams(settings.hparams).to_dict()
        return Group(
            where=where, name=_name(entry, where), settings=settings, file=self._files[settings.hparams],
            seeds=tuple(as_whole(seed, f"{where}: a seed", 0) for seed in lists["seeds"] or (0,)),
            sphere=tuple(as_flag(sphere, f"{where}: sphere") for sphere in lists["sphere"] or (False, True)),
            gamma=lists["gamma"] or (None,), alpha=lists["alpha"] or (None,),
        )

    def _edit(self, value: Any, where: str) -> dict[str, Any]:
        """Options of ``edit``."""
        found: dict[str, Any] = {}
        for key, item in as_mapping(value, where).items():
            name = as_text(key, where).replace("_", "-")
            if name in _OWN_OPTIONS:
                raise ValueError(f"{where} holds {key}: give it as `{_OWN_OPTIONS[name]}` beside {where}")
            if name in _SET_BY_SWEEP:
                raise ValueError(f"{where} holds {key}, which the sweep sets for each run: remove it")
            if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
                raise ValueError(f"{where} holds {key!r}: give an option's long name without leading dashes")
            if self._edit_options is not None and name not in self._edit_options:
                raise ValueError(f"{where}: {key} is not an option of `sphere-easyedit edit`"
                                 f"{suggestion(name, self._edit_options)}")
            if name in found:
                raise ValueError(f"{where} holds {name} in two spellings: remove one")
            if not all(isinstance(part, (str, int, float)) for part in as_list(item)):
                raise ValueError(f"{where}.{key} is {item!r:.60}: give a text, a number, true or false, or a list")
            if item is False and self._edit_options is not None and f"no-{name}" not in self._edit_options:
                raise ValueError(f"{where}: {key} is false, but there is no --no-{name}: omit it")
            found[name] = item
        return found


def _choices(name: str, value: Any) -> tuple[Any, ...]:
    """Values of a list; empty for the default."""
    if value == []:
        raise ValueError(f"{name} is an empty list: give a value, or omit it")
    return () if value is None else tuple(as_list(value))


def _methods(value: Any) -> dict[str, dict[str, Any]]:
    """Changed hyperparameters by method."""
    if isinstance(value, Mapping):
        return {as_text(name, "methods"): _hyperparameters(own, f"methods.{name}") for name, own in value.items()}
    names = [] if value is None else [as_text(name, "methods") for name in as_list(value)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"methods has {twice[0]} twice: remove one")
    return {name: {} for name in names}


def _entries(value: Any) -> dict[str, Mapping[str, Any]]:
    """Entries of ``runs`` by location, for errors."""
    if value is not None and not isinstance(value, list):
        raise ValueError(f"runs must be a list of mappings such as {{method: MEMIT}}, not {value!r:.60}")
    entries = {f"runs[{index}]": as_mapping(entry, f"runs[{index}]") for index, entry in enumerate(value or [])}
    for where, entry in entries.items():
        check_keys(entry, _ENTRY_KEYS, where)
        as_text(entry.get("method"), f"{where}.method")
    return entries


def _hyperparameters(value: Any, where: str) -> dict[str, Any]:
    found = {as_text(name, where): item for name, item in as_mapping(value, where).items()}
    for name in found:
        if name in _OWN_HYPERPARAMETERS:
            raise ValueError(f"{where} holds {name}: give it as `{_OWN_HYPERPARAMETERS[name]}` beside {where}")
    return found


def _settings(method: str, given: Mapping[str, Any], changed: Mapping[str, Any], edit: Mapping[str, Any], where: str
              ) -> Run:
    """Template of a run, without name, seed and hyperparameters."""
    hparams = "{method}/{model}" if given["hparams"] is None else as_text(given["hparams"], f"{where}: hparams")
    if "{model}" in hparams:
        hparams = hparams.replace("{model}", as_text(given["model"], f"{where}: model (or hparams, a file)"))
    dataset = "demo" if given["dataset"] is None else as_text(given["dataset"], f"{where}: dataset")
    if dataset not in get_args(DatasetName):
        raise ValueError(f"{where}: dataset {dataset!r} is not known{suggestion(dataset, get_args(DatasetName))}")
    return Run(
        name="", arm="", method=method, sphere=False, seed=0, hparams=hparams.replace("{method}", method), set=changed,
        dataset=dataset, data=None if given["data"] is None else as_text(given["data"], f"{where}: data"),
        num_edits=None if given["num_edits"] is None else as_whole(given["num_edits"], f"{where}: num_edits", 1),
        batch_size=BATCH_SIZE if given["batch_size"] is None else as_whole(given["batch_size"],
                                                                           f"{where}: batch_size", 1),
        edit=edit, hyperparameters={},
    )


def _name(entry: Mapping[str, Any], where: str) -> str | None:
    if "name" not in entry:
        return None
    name = as_text(entry["name"], f"{where}.name")
    if not is_name(name):
        raise ValueError(f"{where}.name is {name!r}, which is not a valid directory name: use at most {MAX_LENGTH} "
                         "ASCII letters and digits, and . _ = + - after the first")
    return name
