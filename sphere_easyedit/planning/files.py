"""Files that a run needs, writes and downloads, and which of them are on this machine."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import huggingface_hub
import torch
from transformers import PretrainedConfig

from ..hparams import SPHEREHyperParams
from ..methods.corpus import GENERATED, GENERATED_LENGTH
from ..methods.covariance import MIN_STORED_FACTOR_SIZE, moment_path
from ..models.architecture import max_positions
from .memory import DOUBLE, FLOAT, keeps_keys, state_bytes
from .results import DiskItem, Download
from .sizes import CHARACTERS_PER_TOKEN, ModelShape, Statistics

_HEADER: Final = 1024  # bytes of names and shapes in a file of arrays, about
_TEXT_FILES: Final = {".txt", ".jsonl"}


def bytes_to_download(source: str, shape: ModelShape) -> int | None:
    """Bytes of a model's weights that are not on this machine; None where all are, 0 for a folder without weights."""
    size, folder = 0, Path(source)
    if not folder.is_dir():
        cached = huggingface_hub.try_to_load_from_cache(source, "config.json")
        size, folder = shape.parameters * shape.itemsize, Path(cached).parent if isinstance(cached, str) else folder
    for index in folder.glob("*.index.json"):
        content = json.loads(index.read_text(encoding="utf-8"))
        shards = set(content.get("weight_map", {}).values())
        size = size and int(content.get("metadata", {}).get("total_size", size))
        return None if shards and all((folder / name).exists() for name in shards) else size
    files = (file for ending in ("safetensors", "bin") for file in folder.glob(f"*model*.{ending}"))
    return None if any(file.exists() for file in files) else size


def find_statistics(config: PretrainedConfig, hparams: SPHEREHyperParams) -> Statistics:
    """Look for a run's statistics."""
    given = hparams.method.uses_null_space and hparams.P_loc is not None and Path(hparams.P_loc).exists()
    if hparams.executor != "native" or given:
        return Statistics({})
    located: Any = SimpleNamespace(names=hparams.module_names(config), config=config)  # all that the path depends on
    paths = {layer: moment_path(located, hparams, layer) for layer in hparams.layers}
    kind = "null_space_*" if hparams.method.uses_null_space else "cholesky"
    filed = all(any(path.parent.glob(f"{path.stem}_{kind}.safetensors")) for path in paths.values())
    missing = sum(not path.exists() for path in paths.values())
    return Statistics(paths, missing, filed, _corpus_tokens(hparams, max_positions(config)) if missing else 0)


def _corpus_tokens(hparams: SPHEREHyperParams, limit: int | None) -> int:
    longest, samples = min(hparams.mom2_max_length, limit or hparams.mom2_max_length), hparams.mom2_n_samples
    path = Path(hparams.mom2_dataset)
    if path.suffix in _TEXT_FILES and path.is_file():
        lengths = [min(longest, math.ceil(len(line) / CHARACTERS_PER_TOKEN))
                   for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return round(sum(lengths) * min(1.0, samples / max(1, len(lengths))))
    return samples * (min(longest, GENERATED_LENGTH) if hparams.mom2_dataset == GENERATED else longest)


def disk_items(shape: ModelShape, hparams: SPHEREHyperParams, num_edits: int, statistics: Statistics) -> list[DiskItem]:
    """Checkpoints (edited weights and session) and statistics; tables of a run are small."""
    layers, state = len(hparams.layers), state_bytes(shape, hparams, num_edits)
    keys = layers * shape.d_in * num_edits * FLOAT if keeps_keys(hparams) else 0
    sums = layers * 2 * (shape.d_out + shape.d_in) * DOUBLE  # by which a session recognises its weights
    session = state["original"] + state["unrestrained"] + keys + sums + 2 * _HEADER
    items = [DiskItem("checkpoint: weights", "checkpoints/", state["original"] + _HEADER, False),
             DiskItem("checkpoint: session", "checkpoints/", session, False)]
    if statistics.paths:
        folder = str(next(iter(statistics.paths.values())).parent)
        there = [path.stat().st_size for path in statistics.paths.values() if path.exists()]
        each = shape.d_in**2 * getattr(torch, hparams.mom2_dtype).itemsize + _HEADER
        items += [DiskItem(f"statistics of {count} layers", folder, size, present) for count, size, present in (
            (len(there), sum(there), True), (statistics.missing, statistics.missing * each, False)) if count]
        if hparams.method.uses_null_space or shape.d_in >= MIN_STORED_FACTOR_SIZE:
            items.append(DiskItem("null spaces" if hparams.method.uses_null_space else "factors of C", folder,
                                  state["metrics"] + layers * _HEADER, statistics.metric_is_filed))
    return items


def downloads(hparams: SPHEREHyperParams, model_bytes: int | None, statistics: Statistics) -> list[Download]:
    """Weights (where any bytes of them are to come) and the text of missing statistics."""
    found = [Download(hparams.model_name, model_bytes, "weights")] if model_bytes else []
    named = hparams.mom2_dataset != GENERATED and Path(hparams.mom2_dataset).suffix not in _TEXT_FILES
    if statistics.missing and named:
        found.append(Download(hparams.mom2_dataset, None, f"{hparams.mom2_n_samples} texts for statistics, streamed"))
    return found
