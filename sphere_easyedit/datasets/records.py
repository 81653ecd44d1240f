"""Edit records: a fact to edit, and the prompts that measure it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

DatasetName = Literal["counterfact", "multi_counterfact", "zsre", "facts", "demo"]
Protocol = Literal["paper", "rome", "easyedit"]  # how edits are measured (see ``evaluation.protocols``)

SLOT: Final = "{}"
_NAMED: Final = 5  # maximum number of cases that an error names


class MissingDatasetError(FileNotFoundError, ValueError):
    """A data set's file does not exist, is not given, or could not be downloaded."""


def fill(template: str, subject: str) -> str:
    """Replace a template's ``{}`` by the subject. Unlike ``str.format``, it keeps all other braces."""
    return template.replace(SLOT, subject, 1)


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt and its correct continuation, without the space between them."""

    text: str
    target: str


@dataclass(frozen=True)
class EditRecord:
    """One fact to edit and the prompts that measure it.

    Attributes:
        case_id: number of the case, unique in a data set; the record's index if the file has none.
        prompt: template with exactly one ``{}`` for the subject.
        subject: as in the prompt.
        target_new: the answer to edit in, without a leading space.
        target_true: the true answer; None if the data set has none (ZsRE, some of users' own facts).
        paraphrase_prompts: paraphrases of the edit prompt, subject filled in; their target is ``target_new``.
        neighborhood_prompts: prompts that the edit should not change, each with its true continuation.
        generation_prompts: beginnings of free text about the subject; may be empty.
        dataset: name of the data set, on which details of the protocols depend.
        target_alt: ZsRE's ``alt``, a made-up answer that EasyEdit's protocol edits in; None elsewhere.
        portability_prompts: prompts whose answer follows from the edit, with that answer. Those of ZsRE follow
            from ``target_alt``, so they are used in EasyEdit's protocol only.

    Raises:
        ValueError: the prompt has not exactly one ``{}``.
    """

    case_id: int
    prompt: str
    subject: str
    target_new: str
    target_true: str | None
    paraphrase_prompts: tuple[str, ...]
    neighborhood_prompts: tuple[EvaluationPrompt, ...]
    generation_prompts: tuple[str, ...]
    dataset: DatasetName
    target_alt: str | None = None
    portability_prompts: tuple[EvaluationPrompt, ...] = ()

    def __post_init__(self) -> None:
        if self.prompt.count(SLOT) != 1:
            raise ValueError(
                f"case {self.case_id}: prompt {self.prompt!r} contains '{{}}' {self.prompt.count(SLOT)} "
                "times: it must occur exactly once, for the subject"
            )

    @property
    def edit_prompt(self) -> str:
        """The prompt with its subject."""
        return fill(self.prompt, self.subject)

    def request(self) -> dict[str, Any]:
        """EasyEdit's edit request: case_id, prompt (the template with ``{}``), subject, target_new."""
        return {
            "case_id": self.case_id,
            "prompt": self.prompt,
            "subject": self.subject,
            "target_new": self.target_new,
        }


def edits_alt(protocol: str) -> bool:
    """Whether a protocol edits in ZsRE's made-up ``target_alt`` rather than the correct answer."""
    return protocol == "easyedit"


def with_protocol_targets(records: Sequence[EditRecord], protocol: str) -> list[EditRecord]:
    """Records with the targets of a protocol.

    ``paper`` and ``rome`` use ``target_new`` as loaded, which for ZsRE is the first correct answer. ``easyedit`` uses
    ZsRE's made-up ``target_alt`` instead, and ``target_new`` becomes ``target_true``. Other records stay the same.

    Raises:
        ValueError: the protocol is unknown, or ``easyedit`` is given a ZsRE record without ``target_alt``.
    """
    if protocol not in get_args(Protocol):
        raise ValueError(f"protocol {protocol!r} is not known: choose one of {', '.join(get_args(Protocol))}")
    if not edits_alt(protocol):
        return list(records)
    without = [record.case_id for record in records if record.dataset == "zsre" and not record.target_alt]
    if without:
        named = ", ".join(map(str, without[:_NAMED])) + (", ..." if len(without) > _NAMED else "")
        raise ValueError(
            f"{len(without)} of {len(records)} ZsRE records have no alt, which protocol easyedit edits in (case_id "
            f"{named}): leave them out before drawing, as EasyEdit's own loader does, or use protocol paper"
        )
    return [_editing_alt(record) for record in records]


def _editing_alt(record: EditRecord) -> EditRecord:
    if record.dataset != "zsre" or record.target_alt is None or record.target_new == record.target_alt:
        return record
    return dataclasses.replace(record, target_new=record.target_alt, target_true=record.target_new)


def records_fingerprint(records: Iterable[EditRecord]) -> str:
    """SHA-256 in hex of every field of every record, in order; equal for runs on the same facts.

    Each record is hashed as a line of JSON with sorted keys, in ASCII, without spaces.
    """
    digest = hashlib.sha256()
    for record in records:
        line = json.dumps(dataclasses.asdict(record), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        digest.update(line.encode("ascii") + b"\n")
    return digest.hexdigest()
