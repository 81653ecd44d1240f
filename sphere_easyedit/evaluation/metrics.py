"""What an edited model says: efficacy, generalization and specificity.

Protocol ``paper`` is the one of the SPHERE paper's code, which goes back to ROME and MEMIT. Everything is
teacher-forced and greedy: a prompt and its target are run through the model once, and a target token is a hit
where it is the argmax of the logits in front of it. A case's score is the mean over its prompts, a run's the
mean over its cases.

==============  ====================================  =============================================
metric          CounterFact and the demo set          ZsRE
==============  ====================================  =============================================
efficacy        edit prompt -> ``target_new``         question -> ``answers[0]``
generalization  paraphrases -> ``target_new``         rephrased question -> ``answers[0]``
specificity     neighbours -> ``target_true``         ``loc + "?"`` -> ``loc_ans``
prompt's score  1 where **every** target token is a   the **share** of target tokens that are hits
                hit, else 0
==============  ====================================  =============================================

All against the truth, specificity included, and not against what the unedited model said. Target tokens are
those of ``prompt + " " + target`` beyond the prompt's, so a tokenizer's BOS never is one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..models import frozen, input_device, logits_at, max_positions
from ..tokenization import continuation_ids_batch
from .datasets import EditRecord

logger = logging.getLogger(__name__)

Protocol = Literal["paper"]
MetricName = Literal["efficacy", "generalization", "specificity"]
Progress = Callable[[int, int], None]

# Logits of a position cost a whole vocabulary of float32, 0.5 MB for Llama 3, where its hidden state costs
# 8 kB: batches of short prompts reach this bound before the token budget.
_TOKENS_PER_LOGIT_ROW = 8
# Tokens in one batch of greedy generation, whose first step makes logits for all of them.
_GENERATION_TOKENS = 512


@dataclass(frozen=True)
class CaseScores:
    """How a model did on one case.

    Attributes:
        case_id, dataset: of the record.
        protocol: by which the numbers were computed; numbers of two protocols don't compare.
        efficacy, generalization, specificity: mean over the case's prompts, 0 to 1; None where it has none.
        efficacy_prompts, generalization_prompts, specificity_prompts: 0 to 1 for each prompt, in the record's
            order.
    """

    case_id: int
    dataset: str
    protocol: str
    efficacy: float | None
    generalization: float | None
    specificity: float | None
    efficacy_prompts: tuple[float, ...]
    generalization_prompts: tuple[float, ...]
    specificity_prompts: tuple[float, ...]


class MetricSummary(TypedDict):
    """One metric over all cases that have it: percent, and None where no case has it."""

    mean: float | None
    ci95: list[float] | None
    n: int


@dataclass(frozen=True)
class _Row:
    """A prompt with its target in tokens: what the model is run on."""

    prompt: list[int]
    target: list[int]

    @property
    def fed(self) -> list[int]:
        """Model input: the last target token is predicted but never read."""
        return self.prompt + self.target[:-1]


def evaluate_records(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    protocol: Protocol = "paper",
    token_budget: int = 8192,
    progress: Progress | None = None,
) -> list[CaseScores]:
    """Score every record, in the records' order.

    Prompts of all cases are gathered, equal pairs of prompt and target are run once, and batches are made of
    rows of similar length, longest first, so that a batch that does not fit in memory fails at the start.
    Neither the model (device, mode, gradients) nor the tokenizer is changed.

    Args:
        model: a causal language model of transformers.
        records: of one or several data sets.
        protocol: see the module's text.
        token_budget: tokens of a batch, padding included; a longer row makes a batch of its own. It changes
            the memory used, and results by no more than rounding in the model.
        progress: called with (rows done, rows in all) after each batch.

    Raises:
        ValueError: the protocol is unknown, the token budget is below 1, a target is blank or has no tokens,
            a prompt has no tokens to predict from, or a prompt with its target passes the model's context
            (the case is named).
    """
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol {protocol!r} is not known: choose one of {', '.join(get_args(Protocol))}")
    if token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}: give the tokens of a batch, 1 or more")
    questions = [_questions(record) for record in records]
    owners: dict[tuple[str, str], tuple[EditRecord, MetricName]] = {}
    for record, by_metric in zip(records, questions, strict=True):
        for metric, pairs in by_metric.items():
            for pair in pairs:
                owners.setdefault(pair, (record, metric))
    rows = _tokenised(tok, owners, _context(model))
    hits = _score_rows(model, rows, token_budget, progress)
    correct = dict(zip(owners, hits, strict=True))

    scores = []
    for record, by_metric in zip(records, questions, strict=True):
        value = _share if record.dataset == "zsre" else _every
        per_prompt = {
            metric: tuple(value(correct[pair]) for pair in pairs) for metric, pairs in by_metric.items()
        }
        scores.append(
            CaseScores(
                case_id=record.case_id,
                dataset=record.dataset,
                protocol=protocol,
                efficacy=_mean(per_prompt["efficacy"]),
                generalization=_mean(per_prompt["generalization"]),
                specificity=_mean(per_prompt["specificity"]),
                efficacy_prompts=per_prompt["efficacy"],
                generalization_prompts=per_prompt["generalization"],
                specificity_prompts=per_prompt["specificity"],
            )
        )
    return scores


def _questions(record: EditRecord) -> dict[MetricName, list[tuple[str, str]]]:
    """Prompts of a case with their targets, by what they measure."""
    return {
        "efficacy": [(record.edit_prompt, record.target_new)],
        "generalization": [(text, record.target_new) for text in record.paraphrase_prompts],
        "specificity": [(prompt.text, prompt.target) for prompt in record.neighborhood_prompts],
    }


def _every(hits: list[bool]) -> float:
    return float(all(hits))


def _share(hits: list[bool]) -> float:
    return sum(hits) / len(hits)


def _mean(values: tuple[float, ...]) -> float | None:
    return sum(values) / len(values) if values else None


def _context(model: nn.Module) -> int | None:
    return max_positions(model.config)  # type: ignore[arg-type]


def _tokenised(
    tok: PreTrainedTokenizerBase,
    owners: dict[tuple[str, str], tuple[EditRecord, MetricName]],
    context: int | None,
) -> list[_Row]:
    """Rows in the order of ``owners``, each fit to be run."""
    prompts = [text for text, _ in owners]
    continuations = [" " + target for _, target in owners]
    rows = [_Row(*ids) for ids in continuation_ids_batch(tok, prompts, continuations)]
    for row, ((text, target), (record, metric)) in zip(rows, owners.items(), strict=True):
        where = f"case {record.case_id} ({record.dataset}), {metric} prompt {text[:80]!r}"
        # A blank target still leaves the token of the space in front of it.
        if not row.target or not target.strip():
            raise ValueError(f"{where}: target {target!r} has no tokens; give one that the tokenizer knows")
        if not row.prompt:
            raise ValueError(f"{where}: the prompt has no tokens to predict from; give one that is not empty")
        if context is not None and len(row.fed) > context:
            raise ValueError(
                f"{where}: {len(row.fed)} tokens with its target, but the model's context is {context}; "
                "shorten the prompt or leave the case out"
            )
    return rows


def _score_rows(
    model: nn.Module, rows: list[_Row], token_budget: int, progress: Progress | None
) -> list[list[bool]]:
    """For each row, whether each of its target tokens is the argmax."""
    device = input_device(model)
    hits: list[list[bool]] = [[] for _ in rows]
    done = 0
    with frozen(model):
        for batch in _batches(rows, token_budget):
            found = _score_batch(model, [rows[index] for index in batch], device)
            for index, row_hits in zip(batch, found, strict=True):
                hits[index] = row_hits
            done += len(batch)
            if progress is not None:
                progress(done, len(rows))
    return hits


def _batches(rows: list[_Row], token_budget: int) -> list[list[int]]:
    """Indices of rows by falling length, cut where the padded tokens or the logits would be too many."""
    most_logits = max(1, token_budget // _TOKENS_PER_LOGIT_ROW)
    batches: list[list[int]] = []
    width = logits = 0
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index].fed)):
        row = rows[index]
        fits = batches and width * (len(batches[-1]) + 1) <= token_budget
        if not fits or logits + len(row.target) > most_logits:
            batches.append([])
            width, logits = len(row.fed), 0
        batches[-1].append(index)
        logits += len(row.target)
    return batches


def _score_batch(model: nn.Module, rows: list[_Row], device: torch.device) -> list[list[bool]]:
    width = max(len(row.fed) for row in rows)
    # Any id will do as padding: it stands behind all that is read, and the mask hides it.
    input_ids = torch.zeros(len(rows), width, dtype=torch.long)  # (rows, width)
    mask = torch.zeros_like(input_ids)
    at_row: list[int] = []
    at_column: list[int] = []
    for number, row in enumerate(rows):
        length = len(row.fed)
        input_ids[number, :length] = torch.tensor(row.fed)
        mask[number, :length] = 1
        at_row += [number] * len(row.target)
        at_column += range(len(row.prompt) - 1, length)
    logits = logits_at(
        model,
        input_ids.to(device),
        mask.to(device),
        torch.tensor(at_row, device=device),
        torch.tensor(at_column, device=device),
    )  # (target tokens of all rows, vocabulary)
    wanted = torch.tensor([token for row in rows for token in row.target])
    equal: list[bool] = (logits.argmax(dim=-1).cpu() == wanted).tolist()
    found = []
    start = 0
    for row in rows:
        found.append(equal[start : start + len(row.target)])
        start += len(row.target)
    return found


def summarise(
    scores: Sequence[CaseScores], seed: int = 0, resamples: int = 1000
) -> dict[MetricName, MetricSummary]:
    """Means over cases in percent, with 95% intervals by bootstrap over cases.

    Args:
        scores: of one protocol.
        seed: of the resampling; the same seed gives the same intervals.
        resamples: how many times the cases are drawn anew; the interval is the 2.5th to the 97.5th percentile
            of their means.

    Returns:
        For each metric ``{"mean": percent, "ci95": [low, high] in percent, "n": cases that have it}``. Where
        no case has it, mean and ci95 are None and n is 0.

    Raises:
        ValueError: there are no scores, they are of several protocols, or resamples is below 1.
    """
    if not scores:
        raise ValueError("there are no scores to summarise: evaluate at least one record")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}: give 1 or more")
    protocols = sorted({score.protocol for score in scores})
    if len(protocols) > 1:
        raise ValueError(f"scores are of the protocols {', '.join(protocols)}: summarise each on its own")
    summary: dict[MetricName, MetricSummary] = {}
    for metric in get_args(MetricName):
        values = np.array([v for v in (getattr(score, metric) for score in scores) if v is not None])
        if not len(values):
            summary[metric] = {"mean": None, "ci95": None, "n": 0}
            continue
        generator = np.random.default_rng(seed)
        # One draw at a time: all of them at once would be resamples x cases numbers.
        means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(resamples)]
        low, high = np.percentile(means, [2.5, 97.5])
        summary[metric] = {
            "mean": 100 * float(values.mean()),
            "ci95": [100 * float(low), 100 * float(high)],
            "n": len(values),
        }
    return summary


def generate_continuations(
    model: nn.Module, tok: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 20
) -> list[str]:
    """What the model says after each prompt, greedily: the continuations alone, without special tokens.

    Greedy to the letter: the model's own generation settings (penalties, temperature) don't count, its end
    tokens do. Prompts of equal length run together, so nothing is padded, and a prompt's continuation does
    not depend on the others; model and tokenizer stay as they are.

    Raises:
        ValueError: max_new_tokens is below 1, a prompt has no tokens, or with ``max_new_tokens`` it passes
            the model's context.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: give 1 or more")
    context = _context(model)
    prompt_ids = [ids for ids, _ in continuation_ids_batch(tok, prompts, [""] * len(prompts))]
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"prompt {index} ({prompts[index]!r}) has no tokens: give one that is not empty")
        # The last new token is not read any more.
        if context is not None and len(ids) + max_new_tokens - 1 > context:
            raise ValueError(
                f"prompt {index} ({prompts[index][:80]!r}) has {len(ids)} tokens: with max_new_tokens "
                f"{max_new_tokens} it passes the model's context of {context}; shorten it or ask for fewer"
            )
        by_length.setdefault(len(ids), []).append(index)
    device = input_device(model)
    ends = _end_ids(model, tok)
    texts = [""] * len(prompts)
    with frozen(model), torch.no_grad():
        for length, group in by_length.items():
            size = max(1, _GENERATION_TOKENS // length)
            for start in range(0, len(group), size):
                chunk = group[start : start + size]
                input_ids = torch.tensor([prompt_ids[index] for index in chunk], device=device)
                found = _greedy(model, input_ids, max_new_tokens, ends)
                for index, new_ids in zip(chunk, found, strict=True):
                    texts[index] = _new_text(tok, prompt_ids[index], new_ids)
    return texts


def _end_ids(model: nn.Module, tok: PreTrainedTokenizerBase) -> set[int]:
    settings = getattr(model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    ends = set(named if isinstance(named, list) else [named]) | {tok.eos_token_id}
    return {int(end) for end in ends if end is not None}


def _greedy(model: nn.Module, input_ids: Tensor, max_new_tokens: int, ends: set[int]) -> list[list[int]]:
    """New token ids of each row of ``input_ids`` ``(rows, tokens)``, up to its first end token."""
    new: list[list[int]] = [[] for _ in range(len(input_ids))]
    ended = [False] * len(new)
    mask = torch.ones_like(input_ids)
    feed, past = input_ids, None
    for _ in range(max_new_tokens):
        out = model(input_ids=feed, attention_mask=mask, past_key_values=past, use_cache=True)
        past = out.past_key_values
        chosen = out.logits[:, -1].float().argmax(dim=-1)  # (rows,)
        for number, token in enumerate(chosen.tolist()):
            ended[number] = ended[number] or token in ends
            if not ended[number]:
                new[number].append(token)
        if all(ended):
            break
        feed = chosen.to(input_ids.device).unsqueeze(1)
        mask = torch.cat([mask, torch.ones_like(feed)], dim=1)
    return new


def _new_text(tok: PreTrainedTokenizerBase, prompt_ids: list[int], new_ids: list[int]) -> str:
    """The new tokens as text, with the space at the seam, which some tokenizers drop where a text starts."""

    def decode(ids: list[int]) -> str:
        return str(tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    head, whole = decode(prompt_ids), decode(prompt_ids + new_ids)
    return whole[len(head) :] if whole.startswith(head) else decode(new_ids)
