"""Reads and checks files of records.

All records are checked before any is used. Errors name the file, the record (its index from 0 or its line from 1, and
its case_id if it has one), the field, the value found and the value expected.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, NoReturn

from ..models.tokenization import is_unicode
from .records import SLOT, EditRecord, MissingDatasetError

logger = logging.getLogger(__name__)

_SHOWN: Final = 80  # characters of an offending value in an error message


def shown(value: Any) -> str:
    """A value for an error message: its type and its beginning."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= _SHOWN else text[: _SHOWN - 3] + '...'}"


@dataclass(frozen=True)
class RawRecord:
    """An object from a file, with its position for errors.

    Attributes:
        raw: the object as parsed.
        index: index of its record in the file, from 0.
        label: file, record and case_id.
        inside: path of fields from the record to the object; empty for the record itself.
    """

    raw: dict[str, Any]
    index: int
    label: str
    inside: str = ""

    def refuse(self, field: str, found: str, expected: str) -> NoReturn:
        path = f"{self.inside}.{field}" if self.inside and field else self.inside or field
        raise ValueError(f"{self.label}, field {path!r}: found {found}, expected {expected}")

    def part(self, name: str, value: Any, expected: str) -> RawRecord:
        """A nested object at the path ``name``."""
        if not isinstance(value, dict):
            self.refuse(name, shown(value), expected)
        return replace(self, raw=value, inside=f"{self.inside}.{name}" if self.inside else name)

    def has(self, field: str) -> bool:
        """Whether the field has a value that is not null."""
        return self.raw.get(field) is not None

    def value(self, field: str, kind: type, expected: str) -> Any:
        """The value at a dotted path; it must have the given type."""
        value: Any = self.raw
        path = ""
        for key in field.split("."):
            if not isinstance(value, dict):
                self.refuse(path, shown(value), f"an object with a field {key!r}")
            path = f"{path}.{key}" if path else key
            if key not in value:
                present = ", ".join(map(str, value)) or "none"
                self.refuse(path, f"nothing (the fields there are: {present})", expected)
            value = value[key]
        if not isinstance(value, kind) or isinstance(value, bool):  # JSON's true is a Python int
            self.refuse(field, shown(value), expected)
        return value

    def text(self, field: str, expected: str = "a string that is not blank") -> str:
        found: str = self.value(field, str, expected)
        self._check_text(field, found, expected)
        return found

    def _check_text(self, field: str, found: str, expected: str) -> None:
        if not found.strip():
            self.refuse(field, shown(found), expected)
        if not is_unicode(found):
            self.refuse(field, shown(found), "text without half a surrogate pair")

    def texts(self, field: str) -> tuple[str, ...]:
        found: list[Any] = self.value(field, list, "a list of strings that are not blank")
        for position, item in enumerate(found):
            if not isinstance(item, str):
                self.refuse(f"{field}[{position}]", shown(item), "a string that is not blank")
            self._check_text(f"{field}[{position}]", item, "a string that is not blank")
        return tuple(found)

    def case_id(self) -> int:
        """The record's own case_id, or else its index."""
        found: int = self.value("case_id", int, "a whole number") if self.has("case_id") else self.index
        return found

    def template(self, field: str) -> str:
        """A prompt with one ``{}`` for the subject."""
        found = self.text(field, "a string with one '{}'")
        if found.count(SLOT) != 1:
            self.refuse(field, f"{found.count(SLOT)} times '{{}}' in {shown(found)}",
                        "exactly one '{}', where the subject goes")
        return found

    def template_around(self, field: str, subject: str) -> str:
        """A prompt that contains its subject, with ``{}`` in place of the subject.

        Of several occurrences, the first that is a whole word is replaced (the filled prompt is the same for all).
        """
        found = self.text(field)
        if subject not in found:
            other = re.search(re.escape(subject), found, re.IGNORECASE)
            spelled = "" if other is None else f" (it is spelled {other.group()!r} there)"
            self.refuse(field, shown(found) + spelled, f"text that contains the subject {subject!r} verbatim")
        start = found.index(subject)
        if found.count(subject) > 1:
            # "Ann" also occurs in "Annual".
            own = re.search(rf"(?<!\w){re.escape(subject)}(?!\w)", found)
            start = start if own is None else own.start()
        template = found[:start] + SLOT + found[start + len(subject) :]
        if template.count(SLOT) != 1:
            self.refuse(field, shown(found), "text without '{}', which stands for the subject")
        return template

    def template_or_around(self, field: str, subject: str) -> str:
        """A prompt of either kind; ``{}`` has precedence over the subject."""
        return self.template(field) if SLOT in self.text(field) else self.template_around(field, subject)


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is not JSON (``json.JSONDecodeError``), nested too deeply, or contains too long a number.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its lists and objects are nested too deeply") from error


def json_lines(text: str, source: str) -> Iterator[tuple[int, Any]]:
    """Values of JSON lines with their line numbers, from 1; blank lines are skipped.

    Raises:
        ValueError: a line is not valid JSON.
    """
    lines = text.split("\n")  # JSON strings may contain characters that str.splitlines takes for line ends
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield number, parse_json(line)
        except json.JSONDecodeError as error:
            truncated = number == len(lines)  # no line end
            remedy = ("the file ends within the line: complete the line or remove it" if truncated else
                      "repair the line; a record takes exactly one line")
            raise ValueError(f"{source}: line {number} is not valid JSON: {error.msg} at column {error.colno}; {remedy}"
                             ) from error
        except ValueError as error:
            raise ValueError(f"{source}: line {number} can't be read: {error}") from error


def existing(path: Path, expected: str) -> Path:
    """Return the path if it is a file; ``expected`` describes the file for errors.

    Raises:
        MissingDatasetError: nothing there.
        ValueError: not a file.
    """
    if not path.exists():
        raise MissingDatasetError(
            f"data set file {path} does not exist (looked for {path.absolute()}): put {expected} "
            "there, or give its path"
        )
    if not path.is_file():
        raise ValueError(f"data set path {path} is not a file: give the path of {expected}")
    return path


def read_text(path: Path, expected: str) -> str:
    """A whole file as text, with its line ends.

    Raises:
        MissingDatasetError: no file there.
        ValueError: not a file, or not UTF-8.
    """
    try:
        return existing(path, expected).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): unpack it if it is an "
            "archive, or get it again"
        ) from error


def read_list(path: Path, expected: str) -> list[Any]:
    """Read a list from a JSON file; errors name the position.

    Raises:
        MissingDatasetError: no file there.
        ValueError: it is not valid JSON, or not a non-empty list.
    """
    text = read_text(path, expected)
    try:
        raw = parse_json(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno} (character {error.pos} of {len(text)})"
        if not text.strip():
            remedy = "the file is empty: get it again"
        elif error.msg == "Extra data":
            remedy = "more follows the first value; if the file has one record per line, make them one list"
        elif text.lstrip()[0] == "[" and text.rstrip()[-1] != "]":
            remedy = "the list does not end, so the file was truncated: get it again"
        else:
            remedy = "repair it there or get it again"
        raise ValueError(f"{path} is not valid JSON: {error.msg} at {where}; {remedy}") from error
    except ValueError as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(raw, list):
        raise ValueError(f"{path}: found {shown(raw)} at the top, expected a list of records")
    if not raw:
        raise ValueError(f"{path}: the list of records is empty; expected at least one record")
    return raw


def build_records(
    items: Iterable[tuple[str, Any]], source: str, build: Callable[[RawRecord], EditRecord]
) -> list[EditRecord]:
    """Build records from parsed objects, each with its position for errors (``record 3``, ``line 4``).

    Raises:
        ValueError: one is not an object, is refused by ``build``, or has the case_id of another.
    """
    records: list[EditRecord] = []
    first_at: dict[int, str] = {}
    for index, (where, item) in enumerate(items):
        if not isinstance(item, dict):
            raise ValueError(f"{source}: {where}: found {shown(item)}, expected an object")
        case = f" (case_id {item['case_id']!r})" if item.get("case_id") is not None else ""
        given = RawRecord(item, index, f"{source}: {where}{case}")
        record = build(given)
        if record.case_id in first_at:
            given.refuse("case_id", f"{record.case_id}, which {first_at[record.case_id]} has too",
                         "a unique number, which identifies its results")
        first_at[record.case_id] = where
        records.append(record)
    logger.info("%s: %d records", source, len(records))
    return records


def numbered(raw: Iterable[Any]) -> Iterable[tuple[str, Any]]:
    """Items with their index from 0, as ``build_records`` takes them."""
    return ((f"record {index}", item) for index, item in enumerate(raw))
