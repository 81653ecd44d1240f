"""What of a model and its statistics is on this machine."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import huggingface_hub
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from ..configs import is_here
from ..editing.corpus import GENERATED, GENERATED_LENGTH
from ..editing.covariance import FACTOR_FILED_FROM, moment_path
from ..editing.executors import is_alphaedit
from ..hparams import SPHEREHyperParams
from ..models import EditableModel, ModuleNames, max_positions
from .facts import CHARACTERS_PER_TOKEN
from .shapes import ModelShape

logger = logging.getLogger(__name__)


def find_weights(source: str, shape: ModelShape) -> tuple[bool, int | None]:
    """Whether a model's weights are on this machine, and the bytes to download where they are not.

    A cached index of shards says the size exactly; else it is the parameters'. None for a folder, which nothing can be
    downloaded into.
    """
    names = ("model.safetensors", "pytorch_model.bin")
    folder = Path(source)
    if folder.is_dir():
        files = (file for ending in ("safetensors", "bin") for file in folder.glob(f"*model*.{ending}"))
        return any(file.exists() for file in files), None
    cached = [huggingface_hub.try_to_load_from_cache(source, name) for name in names]
    if any(isinstance(path, str) for path in cached):
        return True, None
    for name in names:
        index = huggingface_hub.try_to_load_from_cache(source, f"{name}.index.json")
        if isinstance(index, str):
            return _shards(source, Path(index), shape)
    return False, shape.parameters * shape.itemsize


def _shards(source: str, index: Path, shape: ModelShape) -> tuple[bool, int | None]:
    content = json.loads(index.read_text(encoding="utf-8"))
    shards = set(content.get("weight_map", {}).values())
    if shards and all(isinstance(huggingface_hub.try_to_load_from_cache(source, name), str) for name in shards):
        return True, None
    return False, int(content.get("metadata", {}).get("total_size", shape.parameters * shape.itemsize))


def find_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """A model's tokenizer, if it is here."""
    if not is_here(source):  # transformers would ask the hub for the config, in spite of local_files_only
        return None
    try:
        tok: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # what is missing or does not fit shows as many kinds
        logger.debug("no tokenizer of %s: %s", source, error)
        return None
    return tok


@dataclass(frozen=True)
class Statistics:
    """Second moments of keys that a run needs.

    Attributes:
        paths: by layer; none where the run needs no statistics.
        missing: layers whose file is not there.
        metric_is_filed: null spaces, or factors wide enough to be filed, lie beside all of them.
        tokens: of the text that missing ones come from.
        note: how sure that number is.
    """

    paths: Mapping[int, Path]
    missing: Sequence[int] = ()
    metric_is_filed: bool = False
    tokens: int = 0
    note: str = ""


@dataclass(frozen=True)
class _Located:
    """What paths of statistics ask of an EditableModel, for a model that is not loaded."""

    names: ModuleNames
    config: PretrainedConfig


def find_statistics(config: PretrainedConfig, shape: ModelShape, hparams: SPHEREHyperParams) -> Statistics:
    """Statistics by what is on file and what would have to be collected."""
    given = is_alphaedit(hparams) and hparams.P_loc is not None and Path(hparams.P_loc).exists()
    if hparams.executor != "native" or given:
        return Statistics({})
    located = cast(EditableModel, _Located(hparams.module_names(config), config))
    paths = {layer: moment_path(located, hparams, layer) for layer in hparams.layers}
    missing = [layer for layer, path in paths.items() if not path.exists()]
    tokens, note = _corpus_tokens(hparams, max_positions(config)) if missing else (0, "")
    return Statistics(paths, missing, _metric_is_filed(paths, shape, hparams), tokens, note)


def _metric_is_filed(paths: Mapping[int, Path], shape: ModelShape, hparams: SPHEREHyperParams) -> bool:
    if not is_alphaedit(hparams) and shape.d_in < FACTOR_FILED_FROM:
        return False
    kind = "null_space_*" if is_alphaedit(hparams) else "cholesky"
    return all(any(path.parent.glob(f"{path.stem}_{kind}.safetensors")) for path in paths.values())


def _corpus_tokens(hparams: SPHEREHyperParams, limit: int | None) -> tuple[int, str]:
    """Tokens of the text that statistics come from, and how sure that is."""
    longest = min(hparams.mom2_max_length, limit or hparams.mom2_max_length)
    samples = hparams.mom2_n_samples
    if hparams.mom2_dataset == GENERATED:
        return samples * min(longest, GENERATED_LENGTH), ""
    path = Path(hparams.mom2_dataset)
    if path.suffix in {".txt", ".jsonl"} and path.is_file():
        lengths = [min(longest, math.ceil(len(line) / CHARACTERS_PER_TOKEN))
                   for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        return round(sum(lengths) * min(1.0, samples / max(1, len(lengths)))), ""
    return samples * longest, f"statistics: {samples} texts of {hparams.mom2_dataset}, at most {longest} tokens each"
