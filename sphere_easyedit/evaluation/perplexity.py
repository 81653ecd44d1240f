"""Perplexity of a model on held-out text, and reading that text from files."""

from __future__ import annotations

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

from ..datasets.json_records import json_lines, shown
from ..models.architecture import frozen, input_device, max_positions
from ..models.checks import check_inputs
from ..models.distributed import Replicas, split_balanced
from ..models.tokenization import leading_special_ids
from ..utils.progress import Progress
from .teacher_forcing import TOKENS_PER_LOGITS, fast_token_budget

_LOGITS_CHUNK = 64  # positions converted to float32 at once: a whole window would take 0.25 GB for Llama 3
# An article's title in WikiText. Formulas and legends leave such lines too, but after a word.
_TITLE = re.compile(r"(?:\A\s*|(?<=\n\n)|(?<=[^\w ] \n)) ?= [^=\n].*[^=\n] = ?$", re.MULTILINE)
_WIKITEXT = re.compile(r" @[-,.]@ ")
# Patterns of WikiText's tokenization with the original text, in the order to apply them.
_DETOKENIZE = tuple((re.compile(pattern), original) for pattern, original in (
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
    """Perplexity of a model on some texts.

    Attributes:
        perplexity: ``exp(nll)``; infinite if that overflows a float.
        nll: mean negative log-likelihood of the scored tokens, in nats.
        tokens: number of scored tokens.
        window: length of the windows in tokens, leading special tokens included.
    """

    perplexity: float
    nll: float
    tokens: int
    window: int

    def to_dict(self) -> dict[str, float | int | None]:
        """Convert to a JSON-serialisable dict; infinite and NaN values become None."""
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
    """Compute ``exp(-1/N sum log p(token | earlier tokens of its window))`` over non-overlapping windows.

    Each text is split into windows from its beginning; the last one may be shorter. If the tokenizer starts a text with
    special tokens (BOS), they start each window and all of the window's own tokens are scored; otherwise a window's
    first token is read but not scored. Log-likelihoods are float32, their sum is float64.

    Args:
        model: a causal language model of transformers; stays as it is.
        texts: no window spans two of them.
        max_tokens: number of tokens to read from the beginning of the texts; None for all.
        window: length of a window in tokens, at most the model's context.
        token_budget: a batch has a quarter as many tokens, since each has logits, but at least one window; None for the
            device's default.
        progress: called with (windows done, windows in total) after each batch.

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
        raise ValueError(f"window is {window}, including {len(front)} special tokens: give at least "
                         f"{max(2, len(front) + 1)}")
    skipped = max(1, len(front))  # tokens of a window that are not scored
    windows = [front + own for own in _token_windows(tok, texts, window - len(front), max_tokens)]
    windows = [tokens for tokens in windows if len(tokens) > skipped]
    if not windows:
        raise ValueError(f"the {len(texts)} texts have no token to score: give text of two words or more")
    budget = fast_token_budget(input_device(model).type) if token_budget is None else token_budget
    batch_size = max(1, budget // TOKENS_PER_LOGITS // window)
    tokens = sum(len(one) - skipped for one in windows)
    replicas = Replicas.of(model)
    if replicas is None:
        total = _total_nll(model, windows, batch_size, skipped, progress)
    else:
        shares = [([windows[index] for index in part], batch_size, skipped)
                  for part in split_balanced([len(one) for one in windows], replicas.world_size)]
        total = math.fsum(replicas.run(_share_nll, shares, progress))
    nll = total / tokens
    try:
        return Perplexity(math.exp(nll), nll, tokens, window)
    except OverflowError:
        return Perplexity(math.inf, nll, tokens, window)


def _token_windows(tok: PreTrainedTokenizerBase, texts: Sequence[str], size: int, max_tokens: int | None
                   ) -> Iterator[list[int]]:
    """Token ids of the texts, ``size`` at a time."""
    left = math.inf if max_tokens is None else max_tokens
    for text in texts:
        if left <= 0:
            return
        ids: list[int] = tok(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = ids if left == math.inf else ids[: int(left)]
        left -= len(ids)
        yield from (ids[start: start + size] for start in range(0, len(ids), size))


def _share_nll(replicas: Replicas, windows: Sequence[list[int]], batch_size: int, skipped: int) -> float:
    return _total_nll(replicas.editable.model, windows, batch_size, skipped, replicas.progress)


def _total_nll(model: nn.Module, windows: Sequence[list[int]], batch_size: int, skipped: int,
               progress: Progress | None) -> float:
    """``_batch_nll`` of all windows, in batches of windows of equal length."""
    total, done = 0.0, 0
    with frozen(model), torch.no_grad():
        for _, equally_long in groupby(sorted(windows, key=len, reverse=True), key=len):
            group = list(equally_long)
            for start in range(0, len(group), batch_size):
                batch = torch.tensor(group[start: start + batch_size], device=input_device(model))
                total += _batch_nll(model, batch, skipped)
                done += len(batch)
                if progress is not None:
                    progress(done, len(windows))
    return total


def _batch_nll(model: nn.Module, windows: Tensor, skipped: int) -> float:
    """Sum of the negative log-likelihoods of ``windows`` ``(windows, tokens)`` but for the first ``skipped`` tokens."""
    logits: Tensor = model(input_ids=windows, use_cache=False).logits
    total = 0.0
    for window_logits, tokens in zip(logits, windows.to(logits.device), strict=True):
        for start in range(skipped, len(tokens), _LOGITS_CHUNK):
            wanted = tokens[start: start + _LOGITS_CHUNK]
            chunk = window_logits[start - 1: start - 1 + len(wanted)].float()
            total += float(cross_entropy(chunk, wanted, reduction="none").double().sum())
    return total


def held_out_texts(path: Path | str) -> list[str]:
    """Read texts from a UTF-8 file: the ``text`` fields of a .jsonl file, or the articles of a .txt file.

    A .txt file is one article, unless it is WikiText (recognised by its `` @-@ ``): that is split at its titles
    (`` = Title = ``), and its tokenization (spaces around punctuation and quotes, marks of headings, empty lines) is
    undone. Other files are not changed.

    Raises:
        ValueError: the file does not exist, is neither .txt nor .jsonl, is not valid UTF-8 or JSON lines, or has no
            text.
    """
    path = Path(path)
    if path.suffix not in {".txt", ".jsonl"} or not path.is_file():
        raise ValueError(f"held-out text {str(path)!r} is not an existing .txt or .jsonl file: give the path of one")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it") from error
    texts = [content] if path.suffix == ".txt" else list(_json_texts(path, content))
    if any(_WIKITEXT.search(text) for text in texts):
        texts = [detokenize_wikitext(article) for text in texts for article in _articles(text)]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise ValueError(f"{path} contains no text: give a file that does")
    return texts


def _json_texts(path: Path, content: str) -> Iterator[str]:
    for number, item in json_lines(content, str(path)):
        text = item.get("text") if isinstance(item, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"{path}: line {number} is {shown(item)}, expected an object with a string 'text'")
        yield text


def _articles(text: str) -> list[str]:
    starts = [0, *(title.start() for title in _TITLE.finditer(text)), len(text)]
    return [text[start:stop] for start, stop in pairwise(starts)]


def detokenize_wikitext(text: str) -> str:
    """Undo WikiText's tokenization; each paragraph or heading becomes one line.

    Ambiguous spaces stay: those around single quotation marks, slashes and dashes.
    """
    lines = []
    for line in text.splitlines():
        for pattern, original in _DETOKENIZE:
            line = pattern.sub(original, line)
        lines.append(line.strip())
    return "\n".join(line for line in lines if line)
