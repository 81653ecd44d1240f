"""Perplexity on held-out text: how much of its language a model has kept."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerBase

from ..inputs import check_inputs
from ..models import frozen, input_device, max_positions
from ..replicas import Replicas, split_balanced
from ..tokenization import leading_special_ids
from .teacher_forcing import TOKENS_PER_PLACE, Progress, fast_token_budget

_PLACES = 64  # whose logits become float32 at once: a whole window's would be 0.25 GB for Llama 3
# An article's title in WikiText. Formulas and legends leave such lines too, but behind a word.
_TITLE = re.compile(r"(?:\A\s*|(?<=\n\n)|(?<=[^\w ] \n)) ?= [^=\n].*[^=\n] = ?$", re.MULTILINE)
_WIKITEXT = re.compile(r" @[-,.]@ ")
# What WikiText's tokenisation put in, and what stood there, in this order.
_NATURAL = tuple((re.compile(pattern), natural) for pattern, natural in (
    (r" @([-,.])@ ", r"\1"),
    (r"^ ?((?:= )+)(.+?)(?: =)+ ?$", r"\2"),  # headings
    (r'" ([^"]*?) "', r'"\1"'),
    (r" ('(?:s|t|re|ve|ll|d|m)\b)", r"\1"),
    (r"s ' ", r"s' "),
    (r" ([,.;:!?%)\]}])", r"\1"),
    (r"([(\[{$£€#]) ", r"\1"),
))


@dataclass(frozen=True)
class Perplexity:
    """How well a model foretells text.

    Attributes:
        perplexity: ``exp(nll)``; infinite where that passes a float.
        nll: mean negative log-likelihood of a scored token, in nats.
        tokens: how many were scored.
        window: tokens that the model saw at once, special ones in front included.
    """

    perplexity: float
    nll: float
    tokens: int
    window: int

    def to_dict(self) -> dict[str, float | int | None]:
        """As JSON takes it: None for what is infinite or no number."""
        return {name: value if math.isfinite(value) else None for name, value in asdict(self).items()}


def perplexity(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_tokens: int | None = None,
    window: int = 512,
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """``exp(-1/N sum log p(token | those before it in its window))`` over consecutive windows that don't overlap.

    A text is cut into windows from its beginning; its last one may be shorter. Where the tokenizer puts special tokens
    in front of a text (BOS), they stand in front of each window and all of the window's own tokens are scored; else a
    window's first token is read but not scored. Log-likelihoods are float32, their sum is float64.

    Args:
        model: a causal language model of transformers; stays as it is.
        texts: one after the other; no window spans two.
        max_tokens: so many tokens of the texts are read, from the first one's beginning; None for all.
        window: tokens that the model sees at once; of the model's context where that is less.
        token_budget: a batch has a fourth as many places where logits are made, or one window; None for what is fast on
            the model's device.
        progress: called with (windows done, windows in all) after each batch.

    Raises:
        TypeError: the model or the tokenizer is not one of transformers.
        ValueError: a number is out of range, or the texts have no token to score.
    """
    check_inputs(model, tok)
    for name, value in (("max_tokens", max_tokens), ("token_budget", token_budget)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: give 1 or more, or None")
    front = leading_special_ids(tok)
    window = min(window, max_positions(model.config) or window)  # type: ignore[arg-type]
    if window < 2 or window <= len(front):
        raise ValueError(f"window is {window}, with {len(front)} special tokens in front: give at least "
                         f"{max(2, len(front) + 1)}")
    skipped = max(1, len(front))  # tokens of a window that are not scored
    windows = [front + own for own in _cut(tok, texts, window - len(front), max_tokens)]
    windows = [tokens for tokens in windows if len(tokens) > skipped]
    if not windows:
        raise ValueError(f"the {len(texts)} texts have no token to score: give text of two words or more")
    budget = fast_token_budget(input_device(model).type) if token_budget is None else token_budget
    at_once = max(1, budget // TOKENS_PER_PLACE // window)
    tokens = sum(len(one) - skipped for one in windows)
    replicas = Replicas.of(model)
    if replicas is None:
        total = _sum_of_windows(model, windows, at_once, skipped, progress)
    else:
        shares = [([windows[place] for place in part], at_once, skipped)
                  for part in split_balanced([len(one) for one in windows], replicas.world_size)]
        total = math.fsum(replicas.run(_share_of_windows, shares, progress))
    nll = total / tokens
    try:
        return Perplexity(math.exp(nll), nll, tokens, window)
    except OverflowError:
        return Perplexity(math.inf, nll, tokens, window)


def _cut(tok: PreTrainedTokenizerBase, texts: Sequence[str], size: int, max_tokens: int | None) -> Iterator[list[int]]:
    """Token ids of the texts, ``size`` at a time."""
    left = math.inf if max_tokens is None else max_tokens
    for text in texts:
        if left <= 0:
            return
        ids: list[int] = tok(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids if left == math.inf else ids[: int(left)]
        left -= len(ids)
        yield from (ids[start: start + size] for start in range(0, len(ids), size))


def _share_of_windows(here: Replicas, windows: Sequence[list[int]], at_once: int, skipped: int) -> float:
    return _sum_of_windows(here.editable.model, windows, at_once, skipped, here.progress)


def _sum_of_windows(model: nn.Module, windows: Sequence[list[int]], at_once: int, skipped: int,
                    progress: Progress | None) -> float:
    """``_sum_nll`` of all windows, so many at once."""
    total, done = 0.0, 0
    with frozen(model), torch.no_grad():
        for _, alike in groupby(sorted(windows, key=len, reverse=True), key=len):
            group = list(alike)
            for start in range(0, len(group), at_once):
                batch = torch.tensor(group[start: start + at_once], device=input_device(model))
                total += _sum_nll(model, batch, skipped)
                done += len(batch)
                if progress is not None:
                    progress(done, len(windows))
    return total


def _sum_nll(model: nn.Module, windows: Tensor, skipped: int) -> float:
    """Summed over all tokens of ``windows`` ``(windows, tokens)`` but the first ``skipped`` of each."""
    logits: Tensor = model(input_ids=windows, use_cache=False).logits
    total = 0.0
    for said, tokens in zip(logits, windows.to(logits.device), strict=True):
        for start in range(skipped, len(tokens), _PLACES):
            wanted = tokens[start: start + _PLACES]
            piece = said[start - 1: start - 1 + len(wanted)].float()
            total += float(cross_entropy(piece, wanted, reduction="none").double().sum())
    return total


def held_out_texts(path: Path | str) -> list[str]:
    """Texts of a UTF-8 file: the ``text`` fields of a .jsonl file, or a .txt file's articles.

    A .txt file is one article, but for WikiText's, which are told by their titles (`` = Title = ``). WikiText's
    tokenisation (`` @-@ ``, spaces around punctuation and quotes, marks of headings, empty lines) is undone in a file
    that bears its marks; of other files nothing is changed.

    Raises:
        ValueError: there is no such file, it is neither .txt nor .jsonl, no UTF-8, not of the form, or without text.
    """
    path = Path(path)
    if path.suffix not in {".txt", ".jsonl"} or not path.is_file():
        raise ValueError(f"held-out text {str(path)!r} is no .txt or .jsonl file: give the path of one")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}): convert it") from error
    texts = [content] if path.suffix == ".txt" else list(_json_texts(path, content))
    if any(_WIKITEXT.search(text) for text in texts):
        texts = [natural_text(article) for text in texts for article in _articles(text)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} holds no text: give a file that does")
    return texts


def _json_texts(path: Path, content: str) -> Iterator[str]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no JSON object with a 'text' field ({error})") from error
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {number}: 'text' is {text!r}, not a string")
        yield text


def _articles(text: str) -> list[str]:
    starts = [0, *(title.start() for title in _TITLE.finditer(text)), len(text)]
    return [text[start:stop] for start, stop in pairwise(starts)]


def natural_text(text: str) -> str:
    """WikiText without its tokenisation, a paragraph or heading a line.

    What can't be told is left: spaces around single quotation marks, slashes and dashes.
    """
    lines = []
    for line in text.splitlines():
        for pattern, natural in _NATURAL:
            line = pattern.sub(natural, line)
        lines.append(line.strip())
    return "\n".join(line for line in lines if line)
