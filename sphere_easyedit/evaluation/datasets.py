"""Records to edit and to measure: CounterFact, ZsRE and the set that ships with the package.

Every loader checks every record before any of them is used, so that a bad file fails before hours of editing
and not after them. Errors name the file, the record (its index from 0, and its case_id where it has one), the
field, what was found and what was expected.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import numpy as np

logger = logging.getLogger(__name__)

DatasetName = Literal["counterfact", "zsre", "demo"]

_SLOT = "{}"
_SHOWN = 80  # characters of an offending value in an error message
_ORIGIN = {
    "counterfact": "counterfact.json of the ROME/MEMIT data (a list of records with requested_rewrite)",
    "zsre": "zsre_mend_eval.json of the ROME/MEMIT data (a list of records with src, rephrase, answers, loc)",
}


class MissingDatasetError(FileNotFoundError, ValueError):
    """No data set file where one was named, or none named where one is needed."""


def fill(template: str, subject: str) -> str:
    """Put the subject into a template's single ``{}``; every other brace stays as it is.

    ``str.format`` would read other braces as fields of its own, and a subject may hold braces too.
    """
    return template.replace(_SLOT, subject, 1)


@dataclass(frozen=True)
class EvaluationPrompt:
    """A prompt and its correct continuation, ``target`` without the space that goes between them."""

    text: str
    target: str


@dataclass(frozen=True)
class EditRecord:
    """One fact to edit and the prompts that measure it.

    Attributes:
        case_id: number of the case; unique in a data set. ZsRE's records have none: their index in the file.
        prompt: template with exactly one ``{}`` for the subject.
        subject: as it stands in the prompt.
        target_new: what the edited model shall say; no space in front.
        target_true: what the world says, or None where the data set does not know it (ZsRE).
        paraphrase_prompts: the edit prompt in other words, subject filled in; their target is ``target_new``.
        neighborhood_prompts: prompts that the edit should leave alone, each with its true continuation.
        generation_prompts: beginnings of free text about the subject; empty where the data set has none.
        dataset: which protocol details apply when measured.
        target_alt: ZsRE's ``alt``, a made-up answer that EasyEdit's protocol edits in; None elsewhere.

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

    def __post_init__(self) -> None:
        if self.prompt.count(_SLOT) != 1:
            raise ValueError(
                f"case {self.case_id}: prompt {self.prompt!r} holds {self.prompt.count(_SLOT)} times '{{}}'; "
                "put it exactly once, where the subject goes"
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


def load_records(
    dataset: DatasetName, path: Path | None = None, num_edits: int | None = None, seed: int | None = None
) -> list[EditRecord]:
    """Load a data set and choose the records to edit.

    Args:
        dataset: ``counterfact``, ``zsre`` or ``demo`` (300 facts or more that ship with the package).
        path: the file; None for ``demo`` alone.
        num_edits: how many records; None for all.
        seed: None takes the first ``num_edits`` in the file's order. A number takes the first ``num_edits``
            of ``numpy.random.default_rng(seed).permutation(number of records)``, in that order: with one seed
            and one file, fewer edits are the beginning of more.

    Raises:
        MissingDatasetError: no file there, or none named.
        ValueError: the data set's name is unknown, the file is no valid JSON or not of the schema, it holds
            fewer records than ``num_edits``, or a number is out of range.
    """
    if dataset not in get_args(DatasetName):
        known = ", ".join(get_args(DatasetName))
        raise ValueError(f"data set {dataset!r} is not known: choose one of {known}")
    if num_edits is not None and num_edits < 1:
        raise ValueError(f"num_edits is {num_edits}: give 1 or more, or leave it out for all records")
    if seed is not None and seed < 0:
        raise ValueError(f"seed is {seed}: give 0 or more, or leave it out for the file's order")
    records = _load_all(dataset, path)
    wanted = len(records) if num_edits is None else num_edits
    if wanted > len(records):
        raise ValueError(
            f"num_edits is {wanted}, but {dataset} ({path or 'built in'}) holds {len(records)} records: ask "
            f"for at most {len(records)} or give a larger file"
        )
    if seed is None:
        return records[:wanted]
    order = np.random.default_rng(seed).permutation(len(records))
    return [records[int(index)] for index in order[:wanted]]


def _load_all(dataset: DatasetName, path: Path | None) -> list[EditRecord]:
    if dataset == "demo":
        if path is not None:
            raise ValueError(
                f"data set demo ships with the package, but the file {path} was given: leave the file out, "
                "or name the data set that it holds (counterfact, zsre)"
            )
        # Only demo runs need the table, so only they pay for reading it.
        from .demo import demo_records

        return _checked(demo_records(), "demo", "built-in demo set")
    if path is None:
        raise MissingDatasetError(f"data set {dataset} needs a file: give the path of {_ORIGIN[dataset]}")
    return load_counterfact(path) if dataset == "counterfact" else load_zsre(path)


def load_counterfact(path: Path | str) -> list[EditRecord]:
    """All records of a CounterFact file in ROME's schema, in its order.

    Needed of each record: ``case_id``, ``requested_rewrite`` (``prompt`` with one ``{}``, ``subject``,
    ``target_new.str``, ``target_true.str``), ``paraphrase_prompts`` and ``neighborhood_prompts``;
    ``generation_prompts`` may be absent. Lists may be empty. Whitespace around targets is dropped. Every
    neighbour's target is ``target_true``.

    Raises:
        MissingDatasetError: no file there.
        ValueError: no valid JSON, not of the schema, or a case_id twice.
    """
    return _checked(_read_json(Path(path), "counterfact"), "counterfact", str(path))


def load_zsre(path: Path | str) -> list[EditRecord]:
    """All records of a ZsRE file in MEND's schema, in its order, read as the ROME/MEMIT/SPHERE protocol does.

    Needed of each record: ``subject``, ``src``, ``rephrase``, ``answers`` (the first is the edit's target; ``alt``,
    the target in EasyEdit's protocol, is only kept), ``loc`` and ``loc_ans``. case_id is the record's index. The
    neighbour is ``loc + "?"`` with ``loc_ans``. The prompt is ``src`` with ``{}`` for the subject; where the subject
    stands in it more than once, ``{}`` takes the first place where it stands as a word of its own (the filled prompt
    is the same whichever is taken). A record whose ``src`` does not hold its subject letter by letter is refused:
    nothing could be edited at the subject's last token.

    Raises:
        MissingDatasetError: no file there.
        ValueError: no valid JSON, or not of the schema.
    """
    return _checked(_read_json(Path(path), "zsre"), "zsre", str(path))


def _read_json(path: Path, dataset: str) -> Any:
    """The parsed file, or an error that says where it breaks."""
    if not path.exists():
        raise MissingDatasetError(
            f"data set file {path} does not exist (looked for {path.absolute()}): put {_ORIGIN[dataset]} "
            "there, or give the path where it is"
        )
    if not path.is_file():
        raise ValueError(f"data set path {path} is no file: give the path of {_ORIGIN[dataset]}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): unpack it if it is an "
            "archive, or get it again"
        ) from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno} (character {error.pos} of {len(text)})"
        if not text.strip():
            remedy = "the file is empty: get it again"
        elif error.msg == "Extra data":
            remedy = "more follows the first value; if the file holds one record a line, make them one list"
        elif text.lstrip()[0] == "[" and text.rstrip()[-1] != "]":
            remedy = "the list has no end, so the file was truncated: get it again"
        else:
            remedy = "repair it there or get it again"
        raise ValueError(f"{path} is no valid JSON: {error.msg} at {where}; {remedy}") from error


@dataclass(frozen=True)
class _Record:
    """A raw record with what an error about it must say."""

    raw: dict[str, Any]
    source: str
    index: int

    def refuse(self, field: str, found: str, expected: str) -> NoReturn:
        case_id = self.raw.get("case_id")
        case = "" if case_id is None else f" (case_id {case_id!r})"
        raise ValueError(
            f"{self.source}: record {self.index}{case}, field {field!r}: found {found}, expected {expected}"
        )

    def value(self, field: str, kind: type, expected: str) -> Any:
        """The value at a dotted path, of the given JSON type."""
        here: Any = self.raw
        walked = ""
        for key in field.split("."):
            if not isinstance(here, dict):
                self.refuse(walked, _shown(here), f"an object with a field {key!r}")
            walked = f"{walked}.{key}" if walked else key
            if key not in here:
                present = ", ".join(map(str, here)) or "none"
                self.refuse(walked, f"nothing (the fields there are: {present})", expected)
            here = here[key]
        # JSON's true is a Python int.
        if not isinstance(here, kind) or isinstance(here, bool):
            self.refuse(field, _shown(here), expected)
        return here

    def text(self, field: str, expected: str = "a string that is not blank") -> str:
        found: str = self.value(field, str, expected)
        if not found.strip():
            self.refuse(field, _shown(found), expected)
        return found

    def texts(self, field: str) -> tuple[str, ...]:
        expected = "a list of strings that are not blank"
        found: list[Any] = self.value(field, list, expected)
        for position, item in enumerate(found):
            if not isinstance(item, str) or not item.strip():
                self.refuse(f"{field}[{position}]", _shown(item), "a string that is not blank")
        return tuple(found)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= _SHOWN else text[: _SHOWN - 3] + '...'}"


def _checked(raw: Any, dataset: DatasetName, source: str) -> list[EditRecord]:
    """Records from parsed JSON of the data set's schema."""
    if not isinstance(raw, list):
        raise ValueError(f"{source}: found {_shown(raw)} at the top, expected a list of records")
    if not raw:
        raise ValueError(f"{source}: the list of records is empty; expected at least one record")
    build: Callable[[_Record, DatasetName], EditRecord]
    build = _zsre_record if dataset == "zsre" else _counterfact_record
    records: list[EditRecord] = []
    first_at: dict[int, int] = {}
    for index, item in enumerate(raw):
        if not isinstance(item, dict):
            raise ValueError(f"{source}: record {index}: found {_shown(item)}, expected an object")
        given = _Record(item, source, index)
        record = build(given, dataset)
        if record.case_id in first_at:
            given.refuse("case_id", f"{record.case_id}, which record {first_at[record.case_id]} has too",
                         "a number of its own: results are told apart by it")
        first_at[record.case_id] = index
        records.append(record)
    logger.info("%s: %d records", source, len(records))
    return records


def _counterfact_record(given: _Record, dataset: DatasetName) -> EditRecord:
    prompt = given.text("requested_rewrite.prompt", "a string with one '{}'")
    if prompt.count(_SLOT) != 1:
        given.refuse("requested_rewrite.prompt", f"{prompt.count(_SLOT)} times '{{}}' in {_shown(prompt)}",
                     "exactly one '{}', where the subject goes")
    target_true = given.text("requested_rewrite.target_true.str").strip()
    return EditRecord(
        case_id=given.value("case_id", int, "a whole number"),
        prompt=prompt,
        subject=given.text("requested_rewrite.subject"),
        target_new=given.text("requested_rewrite.target_new.str").strip(),
        target_true=target_true,
        paraphrase_prompts=given.texts("paraphrase_prompts"),
        neighborhood_prompts=tuple(
            EvaluationPrompt(text, target_true) for text in given.texts("neighborhood_prompts")
        ),
        generation_prompts=given.texts("generation_prompts") if "generation_prompts" in given.raw else (),
        dataset=dataset,
    )


def _zsre_record(given: _Record, dataset: DatasetName) -> EditRecord:
    answers = given.texts("answers")
    if not answers:
        given.refuse("answers", "an empty list", "at least one answer, the first being the edit's target")
    subject = given.text("subject")
    return EditRecord(
        case_id=given.index,
        prompt=_question_template(given, subject),
        subject=subject,
        target_new=answers[0].strip(),
        target_true=None,
        paraphrase_prompts=(given.text("rephrase"),),
        neighborhood_prompts=(EvaluationPrompt(given.text("loc") + "?", given.text("loc_ans").strip()),),
        generation_prompts=(),
        dataset=dataset,
        target_alt=given.text("alt").strip() if given.raw.get("alt") else None,  # empty in a few published records
    )


def _question_template(given: _Record, subject: str) -> str:
    """``src`` with one ``{}`` in the subject's place."""
    question = given.text("src")
    expected = f"a question that holds the subject {subject!r} letter by letter"
    if subject not in question:
        other = re.search(re.escape(subject), question, re.IGNORECASE)
        spelled = "" if other is None else f" (it is spelled {other.group()!r} there)"
        given.refuse("src", _shown(question) + spelled, expected)
    # "Ann" also stands in "Annual": a place with no letter around it is the subject's own.
    own = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", question)
    start = question.index(subject) if own is None else own.start()
    template = question[:start] + _SLOT + question[start + len(subject) :]
    if template.count(_SLOT) != 1:
        given.refuse("src", _shown(question), "a question without '{}', which marks the subject's place")
    return template
