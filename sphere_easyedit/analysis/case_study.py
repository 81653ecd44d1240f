"""Compares continuations of one case's prompts by the unedited, edited and rolled-back model (appendix E.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..datasets.records import EditRecord
from ..editing.checkpoints import choose_checkpoint, load_weights
from ..evaluation.generation import generate_continuations
from ..models.fingerprint import weights_checksum
from ..runs.reevaluation import EditedRun
from ..runs.schema import CASES, CaseRecord
from ..utils.messages import nearest

Kind = Literal["edit", "paraphrase", "neighborhood", "generation"]

_SUGGESTED: Final = 3  # cases named in an error
_PARAPHRASES: Final = 2


@dataclass(frozen=True)
class Continuations:
    """Each model's continuation of one prompt.

    ``rolled_back`` is the model with its original weights restored. Where they are the same bits, which is checked, its
    texts are those of the unedited model, and are not generated a second time.
    """

    kind: Kind
    prompt: str
    unedited: str
    edited: str
    rolled_back: str


@dataclass(frozen=True)
class CaseStudy:
    """One case with its continuations and scores.

    Attributes:
        case_id, subject, target_new, target_true: of the record.
        number: position of the case among the run's edits, from 1.
        num_edits: edits in the weights of the edited model.
        total: edits of the run.
        continuations: by prompt.
        scores: ``pre`` and ``post`` of ``cases.jsonl``, each by metric from 0 to 1 or null; None if there are none.
        restored: whether the rolled-back weights equal the unedited ones bit by bit.
    """

    case_id: int | str
    subject: str
    target_new: str
    target_true: str | None
    number: int
    num_edits: int
    total: int
    continuations: tuple[Continuations, ...]
    scores: Mapping[str, Mapping[str, float | None] | None] | None
    restored: bool

    @property
    def is_edited(self) -> bool:
        """Whether the edited model's weights include this edit."""
        return self.number <= self.num_edits

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self) | {"is_edited": self.is_edited}


def choose_case(run: EditedRun, case: str, at: int | None = None) -> tuple[int, int]:
    """Find a case and the kept weights to use; needs no model.

    Args:
        case: its case_id, as text also if it is a number in the data set; or its subject, in any case of letters.
        at: number of edits in the weights; None: the last ones kept.

    Returns:
        The case's index in ``run.records``, and the number of edits.

    Raises:
        ValueError: the run has no such case, several of this subject, kept no weights, or none after ``at`` edits.
    """
    return _index_of(run, case), choose_checkpoint(run.directory.path, at, "there is no edited model to generate with")


def _index_of(run: EditedRun, case: str) -> int:
    """Index of the case with this case_id, or else with this subject."""
    indices = {str(record.case_id): index for index, record in enumerate(run.records)}
    if case in indices:
        return indices[case]
    of_subject = [case_id for case_id, index in indices.items()
                  if run.records[index].subject.casefold() == case.casefold()]
    if len(of_subject) > 1:
        raise ValueError(f"{run.directory.path} has {len(of_subject)} cases of subject {case!r}: give the case_id, one "
                         f"of {', '.join(of_subject)}")
    if not of_subject:
        raise ValueError(f"{run.directory.path} has no case {case}: {_near(case, list(indices))}")
    return indices[of_subject[0]]


def study_case(run: EditedRun, model: nn.Module, tok: PreTrainedTokenizerBase, index: int, num_edits: int,
               max_new_tokens: int = 50) -> CaseStudy:
    """Generate with the unedited weights, those after ``num_edits`` edits, and the restored unedited ones.

    Args:
        model: the unedited model of the run; its weights are restored at the end, even after an error.
        tok: its tokenizer.
        index: of the case in ``run.records``.
        num_edits: edits of weights that were kept.
        max_new_tokens: maximum length of each greedy continuation.

    Raises:
        ValueError: the weights can't be read or are of another model, or a prompt does not fit the model's context.
    """
    record, editable = run.records[index], run.hparams.editable(model)
    prompts = list(_prompts(record))

    def generate() -> list[str]:
        return generate_continuations(model, tok, [prompt for _, prompt in prompts], max_new_tokens)

    original = {layer: editable.parameter(layer).detach().clone() for layer in editable.layers}
    checksum = weights_checksum(editable)
    unedited = generate()
    try:
        load_weights(editable, run.directory.checkpoints, num_edits)
        edited = generate()
    finally:
        with torch.no_grad():
            for layer, weight in original.items():
                editable.parameter(layer).copy_(weight)
    restored = weights_checksum(editable) == checksum
    rolled_back = unedited if restored else generate()
    continuations = tuple(Continuations(kind, prompt, *texts) for (kind, prompt), *texts
                          in zip(prompts, unedited, edited, rolled_back, strict=True))
    found = next((one for one in run.directory.records(CASES, CaseRecord) if one.case_id == record.case_id), None)
    scores = None if found is None else {"pre": found.pre, "post": found.post}
    return CaseStudy(record.case_id, record.subject, record.target_new, record.target_true, index + 1, num_edits,
                     len(run.records), continuations, scores, restored)


def _prompts(record: EditRecord) -> Iterator[tuple[Kind, str]]:
    yield "edit", record.edit_prompt
    for prompt in record.paraphrase_prompts[:_PARAPHRASES]:
        yield "paraphrase", prompt
    for neighbor in record.neighborhood_prompts[:1]:
        yield "neighborhood", neighbor.text
    for prompt in record.generation_prompts[:1]:
        yield "generation", prompt


def _near(case_id: str, known: list[str]) -> str:
    """Text of an error that suggests similar case ids."""
    numbers = sorted(int(one) for one in known if one.isdecimal())
    if case_id.isdecimal() and numbers:
        near = sorted(sorted(numbers, key=lambda one: abs(one - int(case_id)))[:_SUGGESTED])
        return f"nearest are {', '.join(map(str, near))}, of {len(known)} from {numbers[0]} to {numbers[-1]}"
    near_texts = nearest(case_id, known, _SUGGESTED) or known[:_SUGGESTED]
    return f"its {len(known)} cases are such as {', '.join(near_texts)}"
