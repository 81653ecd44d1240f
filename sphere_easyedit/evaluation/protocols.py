"""The three protocols for efficacy, generalization and specificity: which prompts each scores, and how.

Numbers of different protocols are not comparable, so each result names its own. In all of them a prompt's score is 0 to
1, a case's score the mean over its prompts, a run's the mean over its cases. Everything is teacher-forced: a prompt and
its target run through the model once, and each target token is predicted from the true tokens before it.

``paper``
    What the code of SPHERE's authors computes, which goes back to ROME and MEMIT. A target token that is the argmax is
    a **hit**.

    ==============  ====================================  =============================================
    metric          CounterFact and the like              ZsRE
    ==============  ====================================  =============================================
    efficacy        edit prompt -> ``target_new``         question -> ``answers[0]``
    generalization  paraphrases -> ``target_new``         rephrased question -> ``answers[0]``
    specificity     neighbours -> ``target_true``         ``loc + "?"`` -> ``loc_ans``
    prompt's score  1 where **every** target token is a   the **share** of target tokens that are hits
                    hit, else 0
    ==============  ====================================  =============================================

    All compare with the true target, specificity included, not with the unedited model's predictions. Target tokens are
    those of ``prompt + " " + target`` beyond the prompt's, so a tokenizer's BOS is never one of them.

``rome``
    ROME's ES, PS and NS. With ``l(t)`` the mean over a target's tokens of the natural log-probability of each, and
    ``p(t) = exp(l(t))``:

    ==============  ===========================  ====================================  =======================
    metric          prompts                      1 where, else 0                       magnitude
    ==============  ===========================  ====================================  =======================
    efficacy        edit prompt                  ``l(target_new) > l(target_true)``    EM = p(new) - p(true)
    generalization  paraphrases                  ``l(target_new) > l(target_true)``    PM = p(new) - p(true)
    specificity     neighbours                   ``l(their target) > l(target_new)``   NM = p(theirs) - p(new)
    ==============  ===========================  ====================================  =======================

    A tie scores 0; magnitudes are -1 to 1; a NaN probability (a broken model) counts as 0. A CounterFact neighbour's
    own target is ``target_true``. Tokens as in ``paper``. ZsRE has no ``target_true`` and is refused.

``easyedit``
    EasyEdit's ``compute_edit_quality`` with its default metric, called with what ``easyedit.edit_arguments`` passes.

    ==============  =========================================  =================================================
    metric          prompts                                    prompt's score
    ==============  =========================================  =================================================
    efficacy        edit prompt -> ``target_new``              share of target tokens that are hits: rewrite_acc
    generalization  the **first** paraphrase ->                the same: rephrase_acc
                    ``target_new``
    specificity     neighbours -> their targets, ZsRE's        share of target tokens for which the argmax is
                    ``loc`` without ``"?"``                    that of the **unedited** model: locality acc
    ==============  =========================================  =================================================

    The unedited model agrees with itself: its specificity is 1. Tokens are those of a plain tokenizer call on
    ``prompt + " " + target``, with special tokens at both ends. The first ``len(tok(prompt))`` of them count as the
    prompt, the rest as the target. So if the tokenizer appends an EOS, the first target token is not scored and the EOS
    is; if it merges characters of prompt and target into one token, fewer target tokens are scored. Each padding token
    (EOS if there is none) that ``prompt + " " + target`` has beyond the prompt's moves the start of the target one
    token to the right. EasyEdit's ``max_length`` truncates nothing: it is raised to the longest prompt with its target.
    Measured is ``target_new``: for ZsRE, edit in ``alt`` as EasyEdit's users do (``with_protocol_targets``).
    One difference remains: here each row runs without padding, while EasyEdit left-pads a case's neighbours without
    adjusting positions, which changes the predictions of models with absolute positions (GPT-2) for shorter prompts.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from transformers import PreTrainedTokenizerBase

from ..datasets.loaders import EditRecord, Protocol
from ..models.row_logits import TargetRow
from ..models.tokenization import continuation_ids_batch
from ..runs.schema import MetricName
from .teacher_forcing import RowScore


@dataclass(frozen=True)
class PromptTarget:
    """A prompt and a target (without a leading space) that the model scores.

    Attributes:
        easyedit_tokens: whether the two are tokenized as EasyEdit does (see the module's text).
    """

    prompt: str
    target: str
    easyedit_tokens: bool = False


@dataclass(frozen=True)
class PromptScore:
    """The score of one prompt; ``magnitude`` is set by ``rome`` only."""

    value: float
    magnitude: float | None = None


class ProtocolRules(ABC):
    """Which prompts of a record a protocol scores, and how.

    Attributes:
        needs_log_probs: whether scores need log-probabilities of the target tokens.
        needs_unedited: whether specificity compares with the unedited model's predictions.
    """

    needs_log_probs: bool = False
    needs_unedited: bool = False

    @abstractmethod
    def pairs(self, record: EditRecord) -> dict[MetricName, list[list[PromptTarget]]]:
        """By metric, for each prompt the pairs that its score needs."""

    @abstractmethod
    def score(self, record: EditRecord, results: Sequence[RowScore]) -> PromptScore:
        """Score one prompt from the results of its pairs; not used for specificity with ``needs_unedited``."""


class _Paper(ProtocolRules):
    def pairs(self, record: EditRecord) -> dict[MetricName, list[list[PromptTarget]]]:
        return {metric: [[PromptTarget(*pair)] for pair in pairs]
                for metric, pairs in prompts_by_metric(record).items()}

    def score(self, record: EditRecord, results: Sequence[RowScore]) -> PromptScore:
        hits = results[0].hits
        return PromptScore(_fraction(hits) if record.dataset == "zsre" else float(all(hits)))


class _Rome(ProtocolRules):
    needs_log_probs = True

    def pairs(self, record: EditRecord) -> dict[MetricName, list[list[PromptTarget]]]:
        if record.target_true is None:
            raise ValueError(
                f"case {record.case_id} ({record.dataset}) has no target_true, which protocol rome compares target_new "
                "with: use protocol paper or easyedit, or leave the case out"
            )
        competing: dict[MetricName, str] = {"efficacy": record.target_true, "generalization": record.target_true,
                                            "specificity": record.target_new}
        return {metric: [[PromptTarget(*pair), PromptTarget(pair[0], competing[metric])] for pair in pairs]
                for metric, pairs in prompts_by_metric(record).items()}

    def score(self, record: EditRecord, results: Sequence[RowScore]) -> PromptScore:
        own, other = map(_mean_log_prob, results)
        return PromptScore(float(own > other), math.exp(own) - math.exp(other))


class _EasyEdit(ProtocolRules):
    needs_unedited = True

    def pairs(self, record: EditRecord) -> dict[MetricName, list[list[PromptTarget]]]:
        zsre = record.dataset == "zsre"
        return {
            "efficacy": [[PromptTarget(record.edit_prompt, record.target_new, easyedit_tokens=True)]],
            "generalization": [[PromptTarget(text, record.target_new, easyedit_tokens=True)]
                               for text in record.paraphrase_prompts[:1]],
            "specificity": [[PromptTarget(prompt.text.removesuffix("?") if zsre else prompt.text, prompt.target,
                                          easyedit_tokens=True)] for prompt in record.neighborhood_prompts],
        }

    def score(self, record: EditRecord, results: Sequence[RowScore]) -> PromptScore:
        return PromptScore(_fraction(results[0].hits))


PROTOCOLS: Final[Mapping[Protocol, ProtocolRules]] = MappingProxyType(
    {"paper": _Paper(), "rome": _Rome(), "easyedit": _EasyEdit()})


def needing_unedited(protocols: Iterable[Protocol]) -> list[Protocol]:
    """Those of the protocols that compare with the unedited model's predictions."""
    return [protocol for protocol in protocols if protocol in PROTOCOLS and PROTOCOLS[protocol].needs_unedited]


def prompts_by_metric(record: EditRecord) -> dict[MetricName, list[tuple[str, str]]]:
    """All (prompt, target) pairs of a record by the metric they measure, as ``paper`` and ``rome`` use them."""
    return {
        "efficacy": [(record.edit_prompt, record.target_new)],
        "generalization": [(text, record.target_new) for text in record.paraphrase_prompts],
        "specificity": [(prompt.text, prompt.target) for prompt in record.neighborhood_prompts],
    }


def agreement(predicted: Sequence[int], unedited: Sequence[int]) -> float:
    """Share of predicted tokens that equal the unedited model's."""
    return _fraction([one == other for one, other in zip(predicted, unedited, strict=True)])


def tokenize_pairs(tok: PreTrainedTokenizerBase, pairs: Mapping[PromptTarget, str], context: int | None
                   ) -> list[TargetRow]:
    """Tokenize pairs, in their order.

    Args:
        pairs: each with the name that an error calls it by.
        context: maximum number of tokens that the model reads; None for no limit.

    Raises:
        ValueError: a target is blank or has no tokens, a prompt has no tokens, or both exceed the context.
    """
    easyedit = iter(_easyedit_rows(tok, [pair for pair in pairs if pair.easyedit_tokens]))
    others = [pair for pair in pairs if not pair.easyedit_tokens]
    continued = iter(continuation_ids_batch(tok, [pair.prompt for pair in others],
                                            [" " + pair.target for pair in others]))
    rows = [next(easyedit) if pair.easyedit_tokens else TargetRow(*next(continued)) for pair in pairs]
    for row, (pair, name) in zip(rows, pairs.items(), strict=True):
        where = f"{name} prompt {pair.prompt[:80]!r}"
        # A blank target still has the token of the space in front of it.
        if not row.target or not pair.target.strip():
            raise ValueError(f"{where}: target {pair.target!r} has no tokens; give one that the tokenizer knows")
        if not row.prompt:
            raise ValueError(f"{where}: the prompt has no tokens to predict from; give one that is not empty")
        if context is not None and len(row.input_ids) > context:
            raise ValueError(
                f"{where}: {len(row.input_ids)} tokens with its target, but the model's context is {context}; "
                "shorten the prompt or leave the case out"
            )
    return rows


def _easyedit_rows(tok: PreTrainedTokenizerBase, pairs: Sequence[PromptTarget]) -> Iterator[TargetRow]:
    """The tokens of prompt and target together, split where EasyEdit splits them."""
    if not pairs:
        return
    prompts = tok([pair.prompt for pair in pairs], verbose=False)["input_ids"]
    wholes = tok([f"{pair.prompt} {pair.target}" for pair in pairs], verbose=False)["input_ids"]
    padding = tok.eos_token_id if tok.pad_token_id is None else tok.pad_token_id
    for prompt, whole in zip(prompts, wholes, strict=True):
        start = len(prompt) + whole.count(padding) - prompt.count(padding)
        yield TargetRow(list(whole[:start]), list(whole[start:]))


def _fraction(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def _mean_log_prob(result: RowScore) -> float:
    assert result.log_probs is not None  # requested for protocols with needs_log_probs
    mean = math.fsum(result.log_probs) / len(result.log_probs)
    return -math.inf if math.isnan(mean) else mean
