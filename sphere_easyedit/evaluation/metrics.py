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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict, get_args

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..models import max_positions
from ..tokenization import continuation_ids_batch
from .datasets import EditRecord
from .teacher_forcing import Progress, Row, score_rows

logger = logging.getLogger(__name__)

Protocol = Literal["paper"]
MetricName = Literal["efficacy", "generalization", "specificity"]


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


def evaluate_records(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    protocol: Protocol = "paper",
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> list[CaseScores]:
    """Score every record, in the records' order.

    Prompts of all cases are gathered and run together: equal pairs of prompt and target once, and what prompts
    or targets begin with in common once, too (see :mod:`.teacher_forcing`). Neither the model (device, mode,
    gradients) nor the tokenizer is changed.

    Args:
        model: a causal language model of transformers.
        records: of one or several data sets.
        protocol: see the module's text.
        token_budget: tokens of a batch, padding included; a longer row makes a batch of its own. It changes
            time and memory, and results by no more than rounding in the model. None for what is fast: 1024 on a
            CPU, 8192 elsewhere.
        progress: called with (pairs of prompt and target done, pairs in all) after each batch.

    Raises:
        ValueError: the protocol is unknown, the token budget is below 1, a target is blank or has no tokens,
            a prompt has no tokens to predict from, or a prompt with its target passes the model's context
            (the case is named).
    """
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol {protocol!r} is not known: choose one of {', '.join(get_args(Protocol))}")
    if token_budget is not None and token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}: give the tokens of a batch, 1 or more")
    questions = [_questions(record) for record in records]
    owners: dict[tuple[str, str], tuple[EditRecord, MetricName]] = {}
    for record, by_metric in zip(records, questions, strict=True):
        for metric, pairs in by_metric.items():
            for pair in pairs:
                owners.setdefault(pair, (record, metric))
    rows = _tokenised(tok, owners, _context(model))
    hits = score_rows(model, rows, token_budget, progress)
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
) -> list[Row]:
    """Rows in the order of ``owners``, each fit to be run."""
    prompts = [text for text, _ in owners]
    continuations = [" " + target for _, target in owners]
    rows = [Row(*ids) for ids in continuation_ids_batch(tok, prompts, continuations)]
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
