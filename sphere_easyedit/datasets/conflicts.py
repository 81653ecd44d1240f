"""Finds facts that are edited twice, edited to two targets, or about the same subject; they are only reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..editing.contradictions import contradictions, groups_of_equals, normalised
from .records import EditRecord


@dataclass(frozen=True)
class Conflict:
    """Records that share a text.

    Attributes:
        text: the shared text as the first of them spells it.
        positions: their indices in the list that was searched, ascending; so also the order of editing.
        case_ids: of the same records.
        targets: their ``target_new``.
    """

    text: str
    positions: tuple[int, ...]
    case_ids: tuple[int, ...]
    targets: tuple[str, ...]


@dataclass(frozen=True)
class ConflictReport:
    """The result of ``find_conflicts``; groups are in the order of their first record.

    Attributes:
        records: number of records searched.
        duplicates: the same prompt edited to the same target; ``text`` is the prompt with its subject.
        contradictions: the same prompt edited to different targets, of which at most one can remain; ``text`` is the
            prompt with its subject.
        repeated_subjects: one subject edited more than once, in any prompts; ``text`` is the subject. Keys at the
            subject's last token are then similar.
    """

    records: int
    duplicates: tuple[Conflict, ...]
    contradictions: tuple[Conflict, ...]
    repeated_subjects: tuple[Conflict, ...]

    def __bool__(self) -> bool:
        """Whether anything was found."""
        return bool(self.duplicates or self.contradictions or self.repeated_subjects)

    def summary(self) -> str:
        """One line that counts the groups."""
        return (f"{self.records} records: {len(self.duplicates)} facts edited more than once, "
                f"{len(self.contradictions)} prompts edited to different targets, "
                f"{len(self.repeated_subjects)} subjects edited more than once")

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-serialisable values, with its summary."""
        return {"summary": self.summary(), **asdict(self)}


def find_conflicts(records: Sequence[EditRecord]) -> ConflictReport:
    """Search records for facts edited twice, contradictions and subjects edited more than once.

    Prompts (with their subject filled in), subjects and targets are compared as ``normalised`` makes them.
    """
    prompts = [normalised(record.edit_prompt) for record in records]
    targets = [normalised(record.target_new) for record in records]
    facts = groups_of_equals(zip(prompts, targets, strict=True))
    contradicting = contradictions(prompts, targets)
    subjects = groups_of_equals(normalised(record.subject) for record in records)
    return ConflictReport(
        records=len(records),
        duplicates=tuple(_conflict(records, group, records[group[0]].edit_prompt) for group in facts),
        contradictions=tuple(_conflict(records, group, records[group[0]].edit_prompt) for group in contradicting),
        repeated_subjects=tuple(_conflict(records, group, records[group[0]].subject) for group in subjects),
    )


def _conflict(records: Sequence[EditRecord], positions: list[int], text: str) -> Conflict:
    group = [records[position] for position in positions]
    return Conflict(text, tuple(positions), tuple(record.case_id for record in group),
                    tuple(record.target_new for record in group))
