"""The content of ``config.yaml``, and the check that a resumed run has the same settings."""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any, Final

import torch
from torch import nn

from ..editing.session import EditSession
from ..hparams import SPHEREHyperParams
from ..models.distributed import Replicas
from .directory import RunDirectory
from .schema import CONFIG

logger = logging.getLogger(__name__)

_PACKAGES = ("sphere-easyedit", "torch", "transformers", "numpy", "scipy", "safetensors", "tokenizers")
# Entries of config.yaml's "run" that may not change when a run is resumed: they affect bits, or the comparability of
# measurements.
_FIXED: Final = ("records", "batch_size", "checkpoint_every")
# Hyperparameters that affect no bits.
_PLACEMENT: Final = ("device", "stats_dir", "state_memory", "state_folder")
_FIXED_MEASURES: Final = ("protocols", "before", "cases", "sample", "seed", "text", "text_tokens", "decoding",
                          "references")
_FIXED_ABILITIES: Final = ("num_fewshot", "limit")


def package_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Version of each package; None if it is not installed."""
    versions: dict[str, str | None] = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def model_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a run's model was loaded in, for ``load_model``; None if it had several."""
    dtypes = (config.get("model") or {}).get("dtypes") or []
    return str(dtypes[0]).removeprefix("torch.") if len(dtypes) == 1 else None


def run_config(model: nn.Module, hparams: SPHEREHyperParams, run: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``config.yaml``: everything resolved, versions, machine.

    Args:
        run: settings of what the run edits and measures.
    """
    replicas = Replicas.of(model)
    return {
        "run": dict(run),
        "hparams": hparams.to_dict(),
        "versions": {"python": platform.python_version()} | package_versions(_PACKAGES),
        "model": {"devices": sorted({str(parameter.device) for parameter in model.parameters()}),
                  "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
                  "context_templates": EditSession.of(model).contexts},
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(),
                    "processes": 1 if replicas is None else replicas.world_size,
                    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
    }


def check_same_run(run: RunDirectory, config: Mapping[str, Any]) -> bool:
    """Check that a resumed run has the settings that it began with.

    Returns:
        Whether versions, threads, processes and kind of machine are the same, too.

    Raises:
        ValueError: a setting that affects bits, or the comparability of measurements, has changed.
    """
    was = run.read_config()
    try:
        hparams_then = SPHEREHyperParams.from_dict(was["hparams"]).to_dict()
        pairs = {f"hyperparameter {name}": (hparams_then.get(name), value)
                 for name, value in config["hparams"].items() if name not in _PLACEMENT}
        pairs |= {name: (was["run"].get(name), config["run"][name]) for name in _FIXED}
        pairs["follows"] = (was["run"].get("follows"), None)  # removed: PRUNE took another run's weights
        pairs |= {f"measure.{name}": (was["run"]["measure"].get(name), config["run"]["measure"][name])
                  for name in _FIXED_MEASURES}
        pairs["repair"] = (was["run"].get("repair"), config["run"]["repair"])
        if "callbacks" in was["run"]:  # older runs did not write them down
            pairs["callbacks"] = (was["run"]["callbacks"], config["run"]["callbacks"])
        old, new = was["run"]["measure"].get("abilities") or {}, config["run"]["measure"]["abilities"]
        if old.get("tasks") and new["tasks"]:
            pairs |= {f"measure.abilities.{name}": (old.get(name), new[name]) for name in _FIXED_ABILITIES}
            pairs["measure.abilities.max_new_tokens"] = (old.get("max_new_tokens"), None)  # a removed setting
        versions = was["versions"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{run.path / CONFIG} is not the configuration of a run that can be resumed ({error}): give "
                         "another directory") from error
    differing = [f"{name} was {then!r} and is {now!r}" for name, (then, now) in pairs.items() if then != now]
    if differing:
        raise ValueError(f"{run.path} can't be resumed with other settings: {'; '.join(differing)}. Give the same "
                         "ones, or another directory")
    changed = [f"{name} {versions.get(name)} -> {now}" for name, now in config["versions"].items()
               if versions.get(name) != now]
    machine = {"processes": 1, **(was.get("machine") or {})}
    # The order of summation depends on the number of threads and the kind of processor.
    changed += [f"{name} {machine.get(name)} -> {now}" for name, now in config["machine"].items()
                if machine.get(name) != now]
    if changed:
        logger.warning("resumed with other versions or on another machine (%s): bits may differ from here on",
                       ", ".join(changed))
    return not changed
