"""One case of a run seen closely: what the unedited, the edited and the rolled-back model say (appendix E.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..fingerprints import weights_checksum
from ..messages import nearest
from .checkpoints import choose_kept, put_weights
from .generation import generate_continuations
from .records import EditRecord
from .revisiting import EditedRun
from .run_directory import CASES

Kind = Literal["edit", "paraphrase", "neighborhood", "generation"]

_NAMED: Final = 3  # near cases that an error names
_PARAPHRASES: Final = 2


@dataclass(frozen=True)
class Continuations:
    """What each of the three models says after one prompt; ``rolled_back`` has the original weights put back."""

    kind: Kind
    prompt: str
    unedited: str
    edited: str
    rolled_back: str


@dataclass(frozen=True)
class CaseStudy:
    """One case, and what is said about it.

    Attributes:
        case_id, subject, target_new, target_true: of the record.
        number: the case was the run's so-manieth edit, from 1.
        num_edits: edits in the weights that spoke as the edited model.
        total: edits of the run.
        continuations: by prompt.
        scores: ``pre`` and ``post`` of ``cases.jsonl``, each by metric from 0 to 1 or null; None where the run has none
            of this case.
        restored: whether the rolled-back weights have the unedited ones' bits.
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
        """Whether the fact is in the weights that spoke as the edited model."""
        return self.number <= self.num_edits

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self) | {"is_edited": self.is_edited}


def choose_case(run: EditedRun, case_id: str, at: int | None = None) -> tuple[int, int]:
    """Look up what is to be studied, without a model.

    Args:
        case_id: as a text, whatever it is in the data set.
        at: number of edits whose weights speak; the last ones kept if None.

    Returns:
        The case's place in ``run.records``, and the number of edits.

    Raises:
        ValueError: the run has no such case, kept no weights, or none after ``at`` edits.
    """
    places = {str(record.case_id): place for place, record in enumerate(run.records)}
    if case_id not in places:
        raise ValueError(f"{run.directory.path} has no case {case_id}: {_near(case_id, list(places))}")
    return places[case_id], choose_kept(run.directory, at, "no edited model can speak")


def study_case(run: EditedRun, model: nn.Module, tok: PreTrainedTokenizerBase, place: int, num_edits: int,
               max_new_tokens: int = 50) -> CaseStudy:
    """Let the model speak unedited, with the weights after ``num_edits`` edits, and with its own weights put back.

    Args:
        model: the model that the run edited, just loaded; has its own weights at the end, on an error too.
        tok: its tokenizer.
        place: of the case in ``run.records``.
        num_edits: edits of weights that were kept.
        max_new_tokens: of each greedy continuation, at most.

    Raises:
        ValueError: the weights can't be read or are of another model, or a prompt does not fit the model's context.
    """
    record, editable = run.records[place], run.hparams.editable(model)
    prompts = list(_prompts(record))

    def said() -> list[str]:
        return generate_continuations(model, tok, [prompt for _, prompt in prompts], max_new_tokens)

    original = {layer: editable.parameter(layer).detach().clone() for layer in editable.layers}
    checksum = weights_checksum(editable)
    unedited = said()
    try:
        put_weights(editable, run.directory.checkpoints, num_edits)
        edited = said()
    finally:
        with torch.no_grad():
            for layer, weight in original.items():
                editable.parameter(layer).copy_(weight)
    restored = weights_checksum(editable) == checksum
    rolled_back = said()
    continuations = tuple(Continuations(kind, prompt, *texts) for (kind, prompt), *texts
                          in zip(prompts, unedited, edited, rolled_back, strict=True))
    line = next((line for line in run.directory.lines(CASES) if line.get("case_id") == record.case_id), None)
    scores = None if line is None else {when: line.get(when) for when in ("pre", "post")}
    return CaseStudy(record.case_id, record.subject, record.target_new, record.target_true, place + 1, num_edits,
                     len(run.records), continuations, scores, restored)


def dtype_of_run(run: EditedRun) -> str | None:
    """The one dtype in which the run's model was loaded, for ``load_model``; None where there were several."""
    named = (run.directory.read_config().get("model") or {}).get("dtypes") or []
    return str(named[0]).removeprefix("torch.") if len(named) == 1 else None


def _prompts(record: EditRecord) -> Iterator[tuple[Kind, str]]:
    yield "edit", record.edit_prompt
    for prompt in record.paraphrase_prompts[:_PARAPHRASES]:
        yield "paraphrase", prompt
    for neighbor in record.neighborhood_prompts[:1]:
        yield "neighborhood", neighbor.text
    for prompt in record.generation_prompts[:1]:
        yield "generation", prompt


def _near(case_id: str, known: list[str]) -> str:
    """Which cases may have been meant."""
    numbers = sorted(int(one) for one in known if one.isdecimal())
    if case_id.isdecimal() and numbers:
        near = sorted(sorted(numbers, key=lambda one: abs(one - int(case_id)))[:_NAMED])
        return f"nearest are {', '.join(map(str, near))}, of {len(known)} from {numbers[0]} to {numbers[-1]}"
    near_texts = nearest(case_id, known, _NAMED) or known[:_NAMED]
    return f"its {len(known)} cases are such as {', '.join(near_texts)}"
