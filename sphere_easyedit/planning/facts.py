"""The facts to edit, in tokens: a sample that stands for all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from transformers import PreTrainedTokenizerBase

from ..editing.requests import EditRequest, TokenizedPrompt, TokenizedRequest, parse_requests, tokenize_request
from ..editing.sharing import dealt_out
from ..evaluation.datasets import EditRecord, load_records
from ..evaluation.metrics import prompts_by_metric
from ..tokenization import continuation_ids_batch
from .results import PlanSettings

CHARACTERS_PER_TOKEN: Final = 4.0  # of English text, where no tokenizer is at hand
# Beginnings as long as the generated ones, where none are given and the model is not here to write them.
STAND_IN_CONTEXTS: Final = ("The first thing that I want to say is. {}",
                            "Therefore, it is important to know that the. {}",
                            "Because of this, the number of people who. {}",
                            "I have been working on this for a. {}", "You can use this to make your own new. {}")
_SAMPLE: Final = 300  # facts; the run's others are taken to be like them


@dataclass(frozen=True)
class Facts:
    """The sample in tokens.

    Attributes:
        requests: its edits.
        scored: by record, (tokens read, target tokens) of each pair of prompt and target where it first occurs.
    """

    requests: list[TokenizedRequest]
    scored: list[list[tuple[int, int]]]

    def batches(self, batch_size: int) -> list[list[TokenizedRequest]]:
        """The edits in the run's batches."""
        return [self.requests[i: i + batch_size] for i in range(0, len(self.requests), batch_size)]

    def shares(self, batch_size: int, processes: int) -> list[list[list[TokenizedRequest]]]:
        """The same by batch and process, as ``editing.sharing`` deals them out; shares without an edit are left out."""
        return [[[batch[place] for place in part] for part in dealt_out(batch, processes) if part]
                for batch in self.batches(batch_size)]


def sample(settings: PlanSettings) -> list[EditRecord]:
    """The run's first records; the demo set, which is no large one, stands for more of its kind."""
    wanted = min(settings.num_edits, max(_SAMPLE, settings.batch_size))
    count = None if settings.dataset == "demo" else settings.num_edits
    return load_records(settings.dataset, settings.data, count, settings.seed)[:wanted]


def facts_in_tokens(records: Sequence[EditRecord], tok: PreTrainedTokenizerBase | None, contexts: Sequence[str],
                    limit: int | None) -> Facts:
    """Token counts of facts; without a tokenizer by their number of characters.

    Raises:
        ValueError: as for the run itself, a fact does not fit the model's context or has an empty target.
    """
    requests = parse_requests([record.request() for record in records])
    pairs = _pairs(records)
    if tok is None:
        return Facts([_estimated(number, request, contexts) for number, request in enumerate(requests)],
                     [[(_count(text) + _count(target), _count(target)) for text, target in group] for group in pairs])
    flat = [pair for group in pairs for pair in group]
    ids = iter(continuation_ids_batch(tok, [text for text, _ in flat], [f" {target}" for _, target in flat]))
    counts = [[next(ids) for _ in group] for group in pairs]
    return Facts([tokenize_request(tok, request, contexts, limit) for request in requests],
                 [[(len(prompt) + len(target) - 1, len(target)) for prompt, target in group] for group in counts])


def _pairs(records: Sequence[EditRecord]) -> list[list[tuple[str, str]]]:
    """Prompts and targets that are scored, by record; pairs that occurred before cost nothing more."""
    seen: set[tuple[str, str]] = set()
    found = []
    for record in records:
        pairs = [pair for prompts in prompts_by_metric(record).values() for pair in prompts]
        fresh = [pair for pair in dict.fromkeys(pairs) if pair not in seen]
        seen.update(fresh)
        found.append(fresh)
    return found


def _count(text: str) -> int:
    return max(1, math.ceil(len(text) / CHARACTERS_PER_TOKEN))


def _estimated(number: int, request: EditRequest, contexts: Sequence[str]) -> TokenizedRequest:
    """A request's prompts and target, as many tokens long as its texts let expect.

    Prompts of two requests begin alike as far as their context goes, and no further.
    """
    def prompt(front: str, before: str, after: str) -> TokenizedPrompt:
        shared = _count(front) if front else 0
        upto = shared + _count(before) + 1  # a token that most tokenizers put in front
        return TokenizedPrompt((0,) * shared + (1 + number,) * (upto - shared + (_count(after) if after else 0)),
                               upto - 1)

    before = request.before + request.subject
    filled = tuple(prompt(template.partition("{}")[0], before, request.after) for template in contexts)
    return TokenizedRequest(request, prompt("", before, request.after), filled, prompt("", request.subject, ""),
                            (0,) * _count(request.target))
