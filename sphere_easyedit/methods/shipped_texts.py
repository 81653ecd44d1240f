"""Generated texts that ship with the package (``mom2_dataset: generated``), so that no user waits for the same text.

A small model takes minutes on a CPU to write the text that its statistics are collected from. Each file in
``data/texts`` holds the token ids that ``corpus.token_sequences`` gave for one model, tokenizer, seed, length and
number of texts. It is found by a digest of all these, the model's weights included, and the statistics collected from
it have the fingerprint, and on the same hardware the bits, that they would have without the file.

``benchmarks/ship_texts.py`` writes the files.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError

from .checked_tensors import read_checked, write_checked
from .statistics_fingerprint import differing_fields

logger = logging.getLogger(__name__)

FOLDER: Final = Path(__file__).parents[1] / "data" / "texts"
_FORMAT: Final = "sphere-easyedit texts 1"


def shipped_texts(origin: Mapping[str, Any], folder: Path = FOLDER) -> list[list[int]] | None:
    """Token ids of the texts with this origin (see ``StatisticsFingerprints.text_origin``); None if none are shipped.

    A damaged file is reported and left out.
    """
    for path in folder.glob(f"*-{_digest(origin)}.safetensors"):
        try:
            metadata, tensors = read_checked(path)
            stored = json.loads(metadata["origin"])
            if metadata["format"] != _FORMAT or _digest(stored) != _digest(origin):
                raise ValueError(f"{path} holds other texts than its name says")
            if differing_fields(stored["config"], origin["config"]):
                continue
            tokens = iter(tensors["tokens"].tolist())
            return [list(islice(tokens, length)) for length in tensors["lengths"].tolist()]
        except (ValueError, KeyError, TypeError) as error:
            logger.warning("%s: the model writes its text anew, which takes minutes. Install the package again", error)
    return None


def write_texts(name: str, origin: Mapping[str, Any], sequences: Sequence[Sequence[int]], folder: Path = FOLDER
                ) -> Path:
    """Write texts for ``shipped_texts``; returns the file's path.

    Args:
        name: of the model, for the file's name.

    Raises:
        ValueError: the file can't be written.
    """
    path = folder / f"{name}-{_digest(origin)}.safetensors"
    tokens = [token for sequence in sequences for token in sequence]
    try:
        write_checked(path, {"format": _FORMAT, "origin": json.dumps(origin, sort_keys=True)},
                      {"tokens": torch.tensor(tokens, dtype=torch.int32),
                       "lengths": torch.tensor([len(one) for one in sequences])})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be written ({error}): give another folder") from error
    return path


def _digest(origin: Mapping[str, Any]) -> str:
    """Digest of all but the config, whose fields change with the version of transformers."""
    exact = {name: value for name, value in origin.items() if name != "config"}
    return hashlib.sha256(json.dumps(exact, sort_keys=True).encode()).hexdigest()[:16]
