"""Reads or generates the text that statistics are collected from: a local file, a data set, or the model's own text."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..models.architecture import EditableModel, max_positions
from ..models.sampling import generator_on, sample_tokens
from ..utils.remaining_time import RemainingTime

if TYPE_CHECKING:
    from ..hparams import SPHEREHyperParams

logger = logging.getLogger(__name__)

GENERATED = "generated"
GENERATED_LENGTH = 128  # tokens of a generated text: long enough for varied keys, short enough to stay coherent
GENERATED_AT_ONCE = 100
# EasyEdit's names of data sets, with the hub's name and configuration.
_HUB_NAMES = {
    "wikipedia": ("wikimedia/wikipedia", "20231101.en"),
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1"),
}
_REMEDY = "set mom2_dataset to a local .txt or .jsonl file, or to 'generated' for text by the model itself"


def corpus_name(hparams: SPHEREHyperParams) -> str:
    """Name of the text source in statistics paths: file stem, data set, or for generated text its seed and length."""
    dataset = hparams.mom2_dataset
    if dataset == GENERATED:
        return f"{GENERATED}-seed{hparams.seed}-t{min(hparams.mom2_max_length, GENERATED_LENGTH)}"
    source = text_source(hparams)
    return source.stem if isinstance(source, Path) else dataset.replace("/", "_")


def text_source(hparams: SPHEREHyperParams) -> Path | list[str | None] | None:
    """The text source: a local file, a hub data set with its configuration, or None for generated text."""
    dataset = hparams.mom2_dataset
    if dataset == GENERATED:
        return None
    path = Path(dataset)
    return path if path.suffix in {".txt", ".jsonl"} else list(_HUB_NAMES.get(dataset, (dataset, None)))


def text_length(editable: EditableModel, hparams: SPHEREHyperParams) -> int:
    """Maximum tokens of a text: ``mom2_max_length``, at most the model's context."""
    return min(hparams.mom2_max_length, max_positions(editable.config) or hparams.mom2_max_length)


def token_sequences(editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams, max_length: int
                    ) -> list[list[int]]:
    """Token ids of up to ``mom2_n_samples`` texts, each truncated to ``max_length`` tokens, drawn with the seed.

    Raises:
        ValueError: the source does not exist, can't be reached, or holds no text.
    """
    samples = hparams.mom2_n_samples
    if hparams.mom2_dataset == GENERATED:
        return _generate(editable, tok, samples, min(max_length, GENERATED_LENGTH), hparams.seed)
    texts = _read_texts(hparams, samples)
    if len(texts) < samples:
        logger.warning("%s holds %d texts, fewer than mom2_n_samples %d", hparams.mom2_dataset, len(texts), samples)
    encoded = tok(texts, truncation=True, max_length=max_length)["input_ids"]
    return [list(ids) for ids in encoded if ids]


def _read_texts(hparams: SPHEREHyperParams, samples: int) -> list[str]:
    dataset, seed, source = hparams.mom2_dataset, hparams.seed, text_source(hparams)
    if isinstance(source, Path):
        if not source.is_file():
            raise ValueError(f"mom2_dataset {dataset!r} is not a file; {_REMEDY}")
        texts = list(_file_texts(source))
        order = np.random.default_rng(seed).permutation(len(texts))[:samples]
        texts = [texts[i] for i in order]
    else:
        texts = _hub_texts(dataset, samples, seed)
    if not texts:
        raise ValueError(f"mom2_dataset {dataset!r} holds no text; {_REMEDY}")
    return texts


def _file_texts(path: Path) -> Iterator[str]:
    """Lines of a .txt file, or the ``text`` fields of a .jsonl file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if path.suffix == ".txt":
            yield line.strip()
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON object with a 'text' field ({error})") from error
        if isinstance(text, str) and text.strip():
            yield text


def _hub_texts(dataset: str, samples: int, seed: int) -> list[str]:
    name, config = _HUB_NAMES.get(dataset, (dataset, None))
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ValueError(f"mom2_dataset {dataset!r} needs the datasets library (pip install datasets); "
                         f"or {_REMEDY}") from error
    try:
        stream = datasets.load_dataset(name, config, split="train", streaming=True)
        return _take_texts((record["text"] for record in stream.shuffle(seed=seed)), samples)
    except Exception as error:  # offline, unknown name, missing column
        raise ValueError(f"mom2_dataset {dataset!r} ({name}) can't be read: {error}; {_REMEDY}") from error


def _take_texts(texts: Iterable[str], samples: int) -> list[str]:
    taken: list[str] = []
    for text in texts:
        if text.strip():
            taken.append(text)
        if len(taken) == samples:
            break
    return taken


@torch.no_grad()
def _generate(editable: EditableModel, tok: PreTrainedTokenizerBase, samples: int, length: int, seed: int
              ) -> list[list[int]]:
    """Texts sampled from the model at temperature 1, starting with its start token."""
    starts = [tok.bos_token_id, tok.eos_token_id, tok.pad_token_id]
    start = next((token for token in starts if token is not None), 0)
    device = editable.input_device
    logger.info("the model writes %d texts of %d tokens for its statistics; a text of your own takes less time: --set "
                "mom2_dataset=FILE.txt", samples, length)
    sequences: list[list[int]] = []
    batches = -(-samples // GENERATED_AT_ONCE)
    generator = generator_on(device, seed)
    with RemainingTime("generating text", batches * (length - 1), "step") as remaining:
        steps = StoppingCriteriaList([_Steps(remaining)])
        while len(sequences) < samples:
            count = min(GENERATED_AT_ONCE, samples - len(sequences))
            prompt = torch.full((count, 1), start, dtype=torch.long, device=device)
            out = sample_tokens(editable.model, prompt, torch.ones_like(prompt), generator, temperature=1.0, top_k=0,
                                top_p=1.0, max_new_tokens=length - 1, pad_token_id=start, stopping_criteria=steps)
            sequences.extend(_until_end(row, tok.eos_token_id) for row in out.tolist())
    return sequences


class _Steps(StoppingCriteria):
    """Reports generation steps to a progress bar; never stops generation."""

    def __init__(self, remaining: RemainingTime) -> None:
        self._remaining = remaining

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """False for every row."""
        self._remaining.update(1)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _until_end(ids: list[int], eos: int | None) -> list[int]:
    """A generated text without the padding after its end token."""
    return ids[: ids.index(eos, 1) + 1] if eos is not None and eos in ids[1:] else ids
