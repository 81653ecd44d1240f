"""What an edited model says: efficacy, generalization and specificity by one or several protocols.

:mod:`.protocols` defines them. The model is run once over what all of them ask.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..inputs import check_inputs
from ..models import max_positions
from ..runs.schema import FACT_METRICS, MetricName
from .bootstrap import MetricSummary, summary_of
from .datasets import EditRecord
from .protocols import (
    RULES,
    PromptScore,
    Protocol,
    Question,
    agreement,
    questions_of,
    rows_of,
)
from .teacher_forcing import Progress, RowScore, score_rows

__all__ = ["CaseScores", "MetricName", "MetricSummary", "Protocol", "evaluate_protocols", "evaluate_records",
           "questions_of", "summarise"]


@dataclass(frozen=True)
class CaseScores:
    """How a model did on one case.

    Attributes:
        case_id, dataset: of the record.
        protocol: by which the numbers were computed; numbers of two protocols don't compare.
        efficacy, generalization, specificity: mean over the case's prompts, 0 to 1; None where it has none.
        efficacy_prompts, generalization_prompts, specificity_prompts: 0 to 1 for each prompt, in the record's
            order.
        efficacy_magnitudes, generalization_magnitudes, specificity_magnitudes: of ``rome``, -1 to 1 for each prompt.
        specificity_said: of ``easyedit``, for each neighbour the tokens that the model said at its target's places.
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
    efficacy_magnitudes: tuple[float, ...] = ()
    generalization_magnitudes: tuple[float, ...] = ()
    specificity_magnitudes: tuple[float, ...] = ()
    specificity_said: tuple[tuple[int, ...], ...] = ()

    def magnitude(self, metric: MetricName) -> float | None:
        """Mean of a metric's magnitudes; None where there are none."""
        found: tuple[float, ...] = getattr(self, f"{metric}_magnitudes")
        return _mean(found)

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, without what is empty by default; :meth:`from_dict` gives back an equal object."""
        empty = {field.name for field in fields(self) if field.default == ()}
        return {name: value for name, value in asdict(self).items() if value or name not in empty}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CaseScores:
        """Of what :meth:`to_dict` gave, through JSON or not.

        Raises:
            ValueError: a field is missing or not known.
        """
        unlike = {field.name for field in fields(cls) if field.default != ()} - data.keys() \
            | data.keys() - {field.name for field in fields(cls)}
        if unlike:
            raise ValueError(f"these scores lack or don't know {', '.join(sorted(unlike))}: they are not CaseScores' "
                             "to_dict(); evaluate again")
        return cls(**{name: _tuples(value) for name, value in data.items()})


def evaluate_records(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    protocol: Protocol = "paper",
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> list[CaseScores]:
    """Score every record by one protocol, in the records' order: see :func:`evaluate_protocols`."""
    return evaluate_protocols(model, tok, records, [protocol], None, token_budget, progress)[protocol]


def edit_efficacy(model: nn.Module, tok: PreTrainedTokenizerBase, records: Sequence[EditRecord],
                  protocol: Protocol = "paper") -> float | None:
    """Percent of facts that the model says, on the edit prompts alone; None where the protocol has none of these facts.

    Raises:
        ValueError: the protocol does not fit the facts.
    """
    asked = [replace(record, paraphrase_prompts=(), neighborhood_prompts=(), generation_prompts=(),
                     portability_prompts=()) for record in records]
    found = [score.efficacy for score in evaluate_records(model, tok, asked, protocol) if score.efficacy is not None]
    return 100.0 * sum(found) / len(found) if found else None


def evaluate_protocols(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    protocols: Sequence[Protocol],
    unedited: Mapping[int, CaseScores] | None = None,
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> dict[Protocol, list[CaseScores]]:
    """Score every record by each protocol, in the records' order.

    Prompts of all cases and protocols are gathered and run together: equal pairs of prompt and target once, and what
    prompts or targets begin with in common once, too (see :mod:`.teacher_forcing`). Neither the model (device, mode,
    gradients) nor the tokenizer is changed.

    Args:
        model: a causal language model of transformers.
        records: of one or several data sets.
        protocols: see :mod:`.protocols`.
        unedited: what ``easyedit`` gave for the unedited model, by case_id. None says that this model is the
            unedited one, which agrees with itself: specificity is 1.
        token_budget: tokens of a batch, padding included; a longer row makes a batch of its own. It changes
            time and memory, and results by no more than rounding in the model. None for what is fast: 1024 on a
            CPU, 8192 elsewhere.
        progress: called with (questions done, questions in all) after each batch.

    Raises:
        TypeError: the model or the tokenizer is not one of transformers.
        ValueError: a protocol is unknown or does not fit a record, the token budget is below 1, ``unedited`` does not
            fit the records, a target is blank or has no tokens, a prompt has no tokens to predict from, or a prompt
            with its target passes the model's context (the case is named).
    """
    check_inputs(model, tok)
    for protocol in protocols:
        if protocol not in RULES:
            raise ValueError(f"protocol {protocol!r} is not known: choose one of {', '.join(RULES)}")
    if token_budget is not None and token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}: give the tokens of a batch, 1 or more")
    asked = {protocol: [RULES[protocol].questions(record) for record in records] for protocol in protocols}
    names: dict[Question, str] = {}
    weighed: set[Question] = set()
    for protocol, cases in asked.items():
        for record, by_metric in zip(records, cases, strict=True):
            for metric, prompts in by_metric.items():
                for question in (question for questions in prompts for question in questions):
                    names.setdefault(question, f"case {record.case_id} ({record.dataset}), {metric}")
                    if RULES[protocol].weighs:
                        weighed.add(question)
    rows = rows_of(tok, names, max_positions(model.config))  # type: ignore[arg-type]
    scores = score_rows(model, rows, token_budget, progress,
                        [number for number, question in enumerate(names) if question in weighed])
    answers = dict(zip(names, scores, strict=True))
    return {
        protocol: [
            _case_scores(record, protocol, {metric: [[answers[question] for question in questions]
                                                     for questions in prompts]
                                            for metric, prompts in by_metric.items()}, unedited)
            for record, by_metric in zip(records, cases, strict=True)
        ]
        for protocol, cases in asked.items()
    }


def _case_scores(record: EditRecord, protocol: Protocol, answers: Mapping[MetricName, list[list[RowScore]]],
                 unedited: Mapping[int, CaseScores] | None) -> CaseScores:
    rules = RULES[protocol]
    found = {metric: [rules.score(record, answer) for answer in prompts] for metric, prompts in answers.items()}
    said: tuple[tuple[int, ...], ...] = ()
    if rules.remembers:
        said = tuple(answer[0].said for answer in answers["specificity"])
        before = said if unedited is None else _said_before(record, protocol, said, unedited)
        found["specificity"] = [PromptScore(agreement(*pair)) for pair in zip(said, before, strict=True)]
    values = {metric: tuple(score.value for score in found[metric]) for metric in FACT_METRICS}
    magnitudes = {metric: tuple(score.magnitude for score in found[metric] if score.magnitude is not None)
                  for metric in FACT_METRICS}
    return CaseScores(
        case_id=record.case_id,
        dataset=record.dataset,
        protocol=protocol,
        efficacy=_mean(values["efficacy"]),
        generalization=_mean(values["generalization"]),
        specificity=_mean(values["specificity"]),
        efficacy_prompts=values["efficacy"],
        generalization_prompts=values["generalization"],
        specificity_prompts=values["specificity"],
        efficacy_magnitudes=magnitudes["efficacy"],
        generalization_magnitudes=magnitudes["generalization"],
        specificity_magnitudes=magnitudes["specificity"],
        specificity_said=said,
    )


def _said_before(record: EditRecord, protocol: Protocol, said: tuple[tuple[int, ...], ...],
                 unedited: Mapping[int, CaseScores]) -> tuple[tuple[int, ...], ...]:
    before = unedited.get(record.case_id)
    case = f"case {record.case_id} ({record.dataset})"
    remedy = f"give the unedited model's scores of these records by protocol {protocol}"
    if before is None:
        raise ValueError(f"{case} is not among the {len(unedited)} unedited scores: {remedy}")
    if before.protocol != protocol:
        raise ValueError(f"{case}: the unedited scores are of protocol {before.protocol}: {remedy}")
    if [*map(len, before.specificity_said)] != [*map(len, said)]:
        raise ValueError(f"{case}: its neighbours' targets have {[*map(len, said)]} tokens, in the unedited scores "
                         f"{[*map(len, before.specificity_said)]}: {remedy}, with the same tokenizer")
    return before.specificity_said


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value



def summarise(scores: Sequence[CaseScores], seed: int = 0, resamples: int = 1000) -> dict[str, MetricSummary]:
    """Means over cases in percent, with 95% intervals by bootstrap over cases.

    Args:
        scores: of one protocol.
        seed: of the resampling; the same seed gives the same intervals.
        resamples: how many times the cases are drawn anew; the interval is the 2.5th to the 97.5th percentile
            of their means.

    Returns:
        For each metric ``{"mean": percent, "ci95": [low, high] in percent, "n": cases that have it}``. Where
        no case has it, mean and ci95 are None and n is 0. For ``rome`` also ``efficacy_magnitude`` and so on.

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
    values: dict[str, list[float | None]] = {
        metric: [getattr(score, metric) for score in scores] for metric in FACT_METRICS}
    if any(score.efficacy_magnitudes for score in scores):
        values |= {f"{metric}_magnitude": [score.magnitude(metric) for score in scores] for metric in FACT_METRICS}
    return {name: summary_of(cases, 100.0, seed, resamples) for name, cases in values.items()}
