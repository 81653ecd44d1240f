"""Three ways of telling whether an edit has worked, which the field mixes up: what each asks, and how it scores.

Numbers of two protocols don't compare, so each result names its own. In all of them a prompt's score is 0 to 1, a
case's the mean over its prompts, a run's the mean over its cases; everything is teacher-forced: a prompt and its target
run through the model once, and each target token is predicted from the true tokens in front of it.

``paper``
    What the code of SPHERE's authors computes, which goes back to ROME and MEMIT. A target token is a **hit** where it
    is the argmax.

    ==============  ====================================  =============================================
    metric          CounterFact and the like              ZsRE
    ==============  ====================================  =============================================
    efficacy        edit prompt -> ``target_new``         question -> ``answers[0]``
    generalization  paraphrases -> ``target_new``         rephrased question -> ``answers[0]``
    specificity     neighbours -> ``target_true``         ``loc + "?"`` -> ``loc_ans``
    prompt's score  1 where **every** target token is a   the **share** of target tokens that are hits
                    hit, else 0
    ==============  ====================================  =============================================

    All against the truth, specificity included, and not against what the unedited model said. Target tokens are
    those of ``prompt + " " + target`` beyond the prompt's, so a tokenizer's BOS never is one.

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

    A tie is 0; magnitudes are -1 to 1; a probability that is no number (a broken model) is 0. A CounterFact
    neighbour's own target is ``target_true``. Tokens as in ``paper``. ZsRE has no ``target_true``: refused.

``easyedit``
    EasyEdit's ``compute_edit_quality`` with its default metric, asked with what ``easyedit.edit_arguments`` gives it.

    ==============  =========================================  =================================================
    metric          prompts                                    prompt's score
    ==============  =========================================  =================================================
    efficacy        edit prompt -> ``target_new``              share of target tokens that are hits: rewrite_acc
    generalization  the **first** paraphrase ->                the same: rephrase_acc
                    ``target_new``
    specificity     neighbours -> their targets, ZsRE's        share of the target's places where the argmax is
                    ``loc`` without ``"?"``                    that of the **unedited** model: locality acc
    ==============  =========================================  =================================================

    The unedited model agrees with itself: its specificity is 1. Tokens are those of the tokenizer's plain call on
    ``prompt + " " + target``, special tokens at both ends included, and the target's are what is left behind as many as
    the plain call on ``prompt`` gives. So where the tokenizer puts an EOS behind a text, the first target token is not
    scored and the EOS is; where it merges over the seam, the last of the merged tokens are. Where the padding token
    (else EOS) stands in the texts, those of the whole that are not in the prompt shift the target back by as many.
    EasyEdit's ``max_length`` cuts nothing: it is raised to the longest prompt with its target.
    ``target_new`` is what is measured: for ZsRE, edit ``alt`` in as EasyEdit's users do (``with_protocol_targets``).
    What differs: a row runs by itself, EasyEdit pads a case's neighbours on the left without telling positions, which
    changes what models with absolute positions (GPT-2) say to the shorter ones.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

from transformers import PreTrainedTokenizerBase

from ..runs.schema import MetricName
from ..tokenization import continuation_ids_batch
from .datasets import EditRecord
from .teacher_forcing import Row, RowScore

Protocol = Literal["paper", "rome", "easyedit"]


@dataclass(frozen=True)
class Question:
    """A prompt with a target (no space in front) that the model is run on, and how the two become tokens."""

    prompt: str
    target: str
    plainly: bool = False  # as EasyEdit does


@dataclass(frozen=True)
class PromptScore:
    """How the model did on one prompt; ``magnitude`` in ``rome`` alone."""

    value: float
    magnitude: float | None = None


class Rules(ABC):
    """What a protocol asks of a record, and how it scores the answers."""

    weighs: bool = False  # whether it needs log-probabilities
    remembers: bool = False  # whether specificity is measured against what the unedited model said

    @abstractmethod
    def questions(self, record: EditRecord) -> dict[MetricName, list[list[Question]]]:
        """By metric, for each prompt what it is asked with."""

    @abstractmethod
    def score(self, record: EditRecord, answers: Sequence[RowScore]) -> PromptScore:
        """Of one prompt, from the answers to its questions; where specificity ``remembers``, it is not asked."""


class _Paper(Rules):
    def questions(self, record: EditRecord) -> dict[MetricName, list[list[Question]]]:
        return {metric: [[Question(*pair)] for pair in pairs] for metric, pairs in questions_of(record).items()}

    def score(self, record: EditRecord, answers: Sequence[RowScore]) -> PromptScore:
        hits = answers[0].hits
        return PromptScore(_share(hits) if record.dataset == "zsre" else float(all(hits)))


class _Rome(Rules):
    weighs = True

    def questions(self, record: EditRecord) -> dict[MetricName, list[list[Question]]]:
        if record.target_true is None:
            raise ValueError(
                f"case {record.case_id} ({record.dataset}) has no target_true, which protocol rome compares target_new "
                "with: measure it by paper or easyedit, or leave the case out"
            )
        rivals: dict[MetricName, str] = {"efficacy": record.target_true, "generalization": record.target_true,
                                         "specificity": record.target_new}
        return {metric: [[Question(*pair), Question(pair[0], rivals[metric])] for pair in pairs]
                for metric, pairs in questions_of(record).items()}

    def score(self, record: EditRecord, answers: Sequence[RowScore]) -> PromptScore:
        own, other = map(_mean_log_prob, answers)
        return PromptScore(float(own > other), math.exp(own) - math.exp(other))


class _EasyEdit(Rules):
    remembers = True

    def questions(self, record: EditRecord) -> dict[MetricName, list[list[Question]]]:
        zsre = record.dataset == "zsre"
        return {
            "efficacy": [[Question(record.edit_prompt, record.target_new, plainly=True)]],
            "generalization": [[Question(text, record.target_new, plainly=True)]
                               for text in record.paraphrase_prompts[:1]],
            "specificity": [[Question(prompt.text.removesuffix("?") if zsre else prompt.text, prompt.target,
                                      plainly=True)] for prompt in record.neighborhood_prompts],
        }

    def score(self, record: EditRecord, answers: Sequence[RowScore]) -> PromptScore:
        return PromptScore(_share(answers[0].hits))


RULES: Final[Mapping[Protocol, Rules]] = MappingProxyType({"paper": _Paper(), "rome": _Rome(), "easyedit": _EasyEdit()})


def questions_of(record: EditRecord) -> dict[MetricName, list[tuple[str, str]]]:
    """Prompts of a case with their targets, by what they measure; all of them, as ``paper`` and ``rome`` ask."""
    return {
        "efficacy": [(record.edit_prompt, record.target_new)],
        "generalization": [(text, record.target_new) for text in record.paraphrase_prompts],
        "specificity": [(prompt.text, prompt.target) for prompt in record.neighborhood_prompts],
    }


def agreement(said: Sequence[int], before: Sequence[int]) -> float:
    """Share of places where the same token is said as before."""
    return _share([one == other for one, other in zip(said, before, strict=True)])


def rows_of(tok: PreTrainedTokenizerBase, questions: Mapping[Question, str], context: int | None) -> list[Row]:
    """Questions in tokens, in their order, each fit to be run.

    Args:
        questions: with what names each in an error.
        context: most tokens that the model reads; None for no limit.

    Raises:
        ValueError: a target is blank or has no tokens, a prompt has none to predict from, or both pass the context.
    """
    plain = iter(_plain_rows(tok, [question for question in questions if question.plainly]))
    joined = [question for question in questions if not question.plainly]
    continued = iter(continuation_ids_batch(tok, [question.prompt for question in joined],
                                            [" " + question.target for question in joined]))
    rows = [next(plain) if question.plainly else Row(*next(continued)) for question in questions]
    for row, (question, name) in zip(rows, questions.items(), strict=True):
        where = f"{name} prompt {question.prompt[:80]!r}"
        # A blank target still leaves the token of the space in front of it.
        if not row.target or not question.target.strip():
            raise ValueError(f"{where}: target {question.target!r} has no tokens; give one that the tokenizer knows")
        if not row.prompt:
            raise ValueError(f"{where}: the prompt has no tokens to predict from; give one that is not empty")
        if context is not None and len(row.fed) > context:
            raise ValueError(
                f"{where}: {len(row.fed)} tokens with its target, but the model's context is {context}; "
                "shorten the prompt or leave the case out"
            )
    return rows


def _plain_rows(tok: PreTrainedTokenizerBase, questions: Sequence[Question]) -> Iterator[Row]:
    """The whole text's tokens, cut where EasyEdit cuts them."""
    if not questions:
        return
    prompts = tok([question.prompt for question in questions], verbose=False)["input_ids"]
    wholes = tok([f"{question.prompt} {question.target}" for question in questions], verbose=False)["input_ids"]
    padding = tok.eos_token_id if tok.pad_token_id is None else tok.pad_token_id
    for prompt, whole in zip(prompts, wholes, strict=True):
        start = len(prompt) + whole.count(padding) - prompt.count(padding)
        yield Row(list(whole[:start]), list(whole[start:]))


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits)


def _mean_log_prob(answer: RowScore) -> float:
    assert answer.log_probs is not None  # rows of a protocol that weighs are weighed
    mean = math.fsum(answer.log_probs) / len(answer.log_probs)
    return -math.inf if math.isnan(mean) else mean
