"""Files that a run writes and downloads."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

from ..editing.corpus import GENERATED
from ..editing.covariance import FACTOR_FILED_FROM
from ..editing.executors import is_alphaedit
from ..hparams import SPHEREHyperParams
from ..loading import SMOLLM2
from .counts import keeps_keys
from .inventory import Statistics
from .results import DiskItem, Download, PlanSettings
from .shapes import ModelShape
from .sizes import DOUBLE, FLOAT, HEADER, metric_bytes, moment_bytes, original_weight_bytes


def disk_items(shape: ModelShape, hparams: SPHEREHyperParams, settings: PlanSettings, statistics: Statistics,
               source: str) -> list[DiskItem]:
    """Files that a run writes, or wrote before.

    A run directory holds the edited weights and the session (original weights, PRUNE's unrestrained ones, all keys in
    float32, two sums of integers for each row and column), and about 600 bytes a case and 500 a batch of text.
    """
    items = _statistics_items(shape, hparams, statistics)
    layers, weights = len(hparams.layers), original_weight_bytes(shape, hparams)
    keeps = hparams.executor == "native" and keeps_keys(hparams)
    keys = layers * shape.d_in * settings.num_edits * FLOAT if keeps else 0
    sums = layers * 2 * (shape.d_out + shape.d_in) * DOUBLE
    copies = 2 if hparams.base_alg == "PRUNE" else 1
    items.append(DiskItem("checkpoint: weights", "checkpoints/", weights + HEADER, False))
    items.append(DiskItem("checkpoint: session", "checkpoints/", copies * weights + keys + sums + 2 * HEADER, False))
    text = 600 * settings.num_edits + (500 + 60 * layers) * math.ceil(settings.num_edits / settings.batch_size) + 4096
    items.append(DiskItem("tables and settings", "run directory", text, False))
    if hparams.model_name.lower() == SMOLLM2:
        size = sum(file.stat().st_size for file in Path(source).iterdir() if file.is_file())
        items.append(DiskItem("converted model", source, size, True))
    return items


def _statistics_items(shape: ModelShape, hparams: SPHEREHyperParams, statistics: Statistics) -> list[DiskItem]:
    if not statistics.paths:
        return []
    items = []
    folder = str(next(iter(statistics.paths.values())).parent)
    for present in (True, False):
        paths = [path for layer, path in statistics.paths.items() if (layer not in statistics.missing) == present]
        size = sum(path.stat().st_size if present else moment_bytes(shape, hparams) for path in paths)
        if paths:
            items.append(DiskItem(f"statistics of {len(paths)} layers", folder, size, present))
    if is_alphaedit(hparams) or shape.d_in >= FACTOR_FILED_FROM:
        what = "null spaces" if is_alphaedit(hparams) else "factors of C"
        size = metric_bytes(shape, hparams) + len(hparams.layers) * HEADER
        items.append(DiskItem(what, folder, size, statistics.metric_is_filed))
    return items


def downloads(hparams: SPHEREHyperParams, model_bytes: int | None, statistics: Statistics) -> list[Download]:
    """What has to come over the network.

    Args:
        model_bytes: of the weights; None where nothing of them is to be downloaded.
    """
    found = []
    if model_bytes is not None:
        found.append(Download(hparams.model_name, model_bytes, "weights"))
    named = hparams.mom2_dataset != GENERATED and Path(hparams.mom2_dataset).suffix not in {".txt", ".jsonl"}
    if statistics.missing and named:
        absent = "" if importlib.util.find_spec("datasets") else "; needs: pip install datasets"
        found.append(Download(hparams.mom2_dataset, None, "text for statistics, streamed until "
                                                          f"{hparams.mom2_n_samples} texts are there{absent}"))
    return found
