"""Efficacy, generalization and specificity of an edited model, by one or several protocols (see :mod:`.protocols`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..datasets.loaders import EditRecord, Protocol
from ..models.architecture import max_positions
from ..models.checks import check_inputs
from ..runs.schema import FACT_METRICS, MetricName
from ..utils.progress import Progress
from .bootstrap import MetricSummary, summary_of
from .protocols import (
    PROTOCOLS,
    PromptScore,
    PromptTarget,
    agreement,
    prompts_by_metric,
    tokenize_pairs,
)
from .teacher_forcing import RowScore, score_rows

__all__ = ["CaseScores", "MetricName", "MetricSummary", "Protocol", "evaluate_protocols", "evaluate_records",
           "prompts_by_metric", "summarise"]


@dataclass(frozen=True)
class CaseScores:
    """The scores of one case.

    Attributes:
        case_id, dataset: of the record.
        protocol: that the scores were computed by; scores of different protocols are not comparable.
        efficacy, generalization, specificity: mean over the case's prompts, 0 to 1; None if it has none.
        efficacy_prompts, generalization_prompts, specificity_prompts: 0 to 1 for each prompt, in the record's
            order.
        efficacy_magnitudes, generalization_magnitudes, specificity_magnitudes: -1 to 1 for each prompt (``rome``).
        specificity_said: for each neighbour the token ids predicted for its target (``easyedit``).
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
        """Mean of a metric's magnitudes; None if there are none."""
        magnitudes: tuple[float, ...] = getattr(self, f"{metric}_magnitudes")
        return _mean(magnitudes)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-serialisable dict without empty optional fields; :meth:`from_dict` reverses it."""
        optional = {field.name for field in fields(self) if field.default == ()}
        return {name: value for name, value in asdict(self).items() if value or name not in optional}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CaseScores:
        """Restore from the dict that :meth:`to_dict` returned, through JSON or not.

        Raises:
            ValueError: a field is missing or unknown.
        """
        wrong = {field.name for field in fields(cls) if field.default != ()} - data.keys() \
            | data.keys() - {field.name for field in fields(cls)}
        if wrong:
            raise ValueError(f"fields {', '.join(sorted(wrong))} are missing or unknown in these scores, which "
                             "CaseScores.to_dict() did not write: evaluate again")
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
    """Mean efficacy over the records in percent, without running their other prompts; None if there are no records.

    Raises:
        ValueError: the protocol is not defined for a record.
    """
    values = [value for value in efficacies(model, tok, records, protocol) if value is not None]
    return 100.0 * sum(values) / len(values) if values else None


def efficacies(model: nn.Module, tok: PreTrainedTokenizerBase, records: Sequence[EditRecord],
               protocol: Protocol = "paper") -> list[float | None]:
    """Each record's efficacy, 0 to 1, without running its other prompts; None where it is not defined.

    Raises:
        ValueError: the protocol is not defined for a record.
    """
    edits_only = [replace(record, paraphrase_prompts=(), neighborhood_prompts=(), generation_prompts=(),
                          portability_prompts=()) for record in records]
    return [score.efficacy for score in evaluate_records(model, tok, edits_only, protocol)]


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

    Prompts of all cases and protocols run together: equal pairs of prompt and target run once, and so do common
    prefixes (see :mod:`.teacher_forcing`). The model (device, mode, gradients) and the tokenizer stay as they are.

    Args:
        model: a causal language model of transformers.
        records: from one or several data sets.
        protocols: see :mod:`.protocols`.
        unedited: the unedited model's scores by ``easyedit``, by case_id. None if this model is the unedited one, whose
            specificity is 1.
        token_budget: maximum number of tokens in a batch, padding included; a longer row is a batch of its own. It
            affects time and memory, and results only by rounding in the model. None for 1024 on a CPU and 8192 on other
            devices.
        progress: called with (prompts done, prompts in total) after each batch.

    Raises:
        TypeError: the model or the tokenizer is not one of transformers.
        ValueError: a protocol is unknown or not defined for a record, the token budget is below 1, ``unedited`` does
            not match the records, a target is blank or has no tokens, a prompt has no tokens, or a prompt with its
            target exceeds the model's context (the message names the case).
    """
    check_inputs(model, tok)
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol {protocol!r} is not known: choose one of {', '.join(PROTOCOLS)}")
    if token_budget is not None and token_budget < 1:
        raise ValueError(f"token_budget is {token_budget}: give the tokens of a batch, 1 or more")
    pairs = {protocol: [PROTOCOLS[protocol].pairs(record) for record in records] for protocol in protocols}
    names: dict[PromptTarget, str] = {}
    with_log_probs: set[PromptTarget] = set()
    for protocol, cases in pairs.items():
        for record, by_metric in zip(records, cases, strict=True):
            for metric, prompts in by_metric.items():
                for pair in (pair for prompt in prompts for pair in prompt):
                    names.setdefault(pair, f"case {record.case_id} ({record.dataset}), {metric}")
                    if PROTOCOLS[protocol].needs_log_probs:
                        with_log_probs.add(pair)
    rows = tokenize_pairs(tok, names, max_positions(model.config))  # type: ignore[arg-type]
    scores = score_rows(model, rows, token_budget, progress,
                        [number for number, pair in enumerate(names) if pair in with_log_probs])
    results = dict(zip(names, scores, strict=True))
    return {
        protocol: [
            _case_scores(record, protocol, {metric: [[results[pair] for pair in prompt] for prompt in prompts]
                                            for metric, prompts in by_metric.items()}, unedited)
            for record, by_metric in zip(records, cases, strict=True)
        ]
        for protocol, cases in pairs.items()
    }


def _case_scores(record: EditRecord, protocol: Protocol, results: Mapping[MetricName, list[list[RowScore]]],
                 unedited: Mapping[int, CaseScores] | None) -> CaseScores:
    """Scores of one case, from the results of each prompt's pairs by metric."""
    rules = PROTOCOLS[protocol]
    scores = {metric: [rules.score(record, prompt) for prompt in prompts] for metric, prompts in results.items()}
    predicted: tuple[tuple[int, ...], ...] = ()
    if rules.needs_unedited:
        predicted = tuple(prompt[0].predicted for prompt in results["specificity"])
        expected = predicted if unedited is None else _unedited_predictions(record, protocol, predicted, unedited)
        scores["specificity"] = [PromptScore(agreement(*pair)) for pair in zip(predicted, expected, strict=True)]
    values = {metric: tuple(score.value for score in scores[metric]) for metric in FACT_METRICS}
    magnitudes = {metric: tuple(score.magnitude for score in scores[metric] if score.magnitude is not None)
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
        specificity_said=predicted,
    )


def _unedited_predictions(record: EditRecord, protocol: Protocol, predicted: tuple[tuple[int, ...], ...],
                          unedited: Mapping[int, CaseScores]) -> tuple[tuple[int, ...], ...]:
    before = unedited.get(record.case_id)
    case = f"case {record.case_id} ({record.dataset})"
    remedy = f"give the unedited model's scores of these records by protocol {protocol}"
    if before is None:
        raise ValueError(f"{case} is not among the {len(unedited)} unedited scores: {remedy}")
    if before.protocol != protocol:
        raise ValueError(f"{case}: the unedited scores are of protocol {before.protocol}: {remedy}")
    if [*map(len, before.specificity_said)] != [*map(len, predicted)]:
        raise ValueError(f"{case}: its neighbours' targets have {[*map(len, predicted)]} tokens, in the unedited "
                         f"scores {[*map(len, before.specificity_said)]}: {remedy}, with the same tokenizer")
    return before.specificity_said


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def summarise(scores: Sequence[CaseScores], seed: int = 0, resamples: int = 1000) -> dict[str, MetricSummary]:
    """Means over cases in percent, with 95% bootstrap intervals over cases.

    Args:
        scores: of one protocol.
        seed: of the resampling; the same seed gives the same intervals.
        resamples: number of bootstrap resamples; the interval is the 2.5th to the 97.5th percentile of their means.

    Returns:
        For each metric ``{"mean": percent, "ci95": [low, high] in percent, "n": cases that have it}``; mean and ci95
        are None if no case has it. For ``rome`` also ``efficacy_magnitude`` and so on.

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
