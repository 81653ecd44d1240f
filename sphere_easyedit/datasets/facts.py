"""Reads users' own facts from JSONL (one record per line) or CSV (with a header).

====================  ================================================================  ================================
field                 JSONL                                                             CSV
====================  ================================================================  ================================
prompt                with ``{}`` for the subject, or with the subject verbatim         the same
subject               text                                                              the same
target_new            the answer to edit in                                             the same
target_true           optional: the true answer                                         the same
case_id               optional: a whole number, in every record or in none              the same
paraphrases           optional: list of prompts, subject filled in                      ``a | b``
generation_prompts    optional: list of beginnings of free text                         ``a | b``
neighbours            optional: list of ``{"prompt": ..., "target": ...}``; a prompt    ``a => answer | b => answer``;
                      alone has the target ``target_true``                              ``a`` alone
====================  ================================================================  ================================

Whitespace around texts is dropped. A null or an empty cell counts as a missing field. Unknown fields are refused, so
that a misspelt name is noticed.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from .json_records import RawRecord, build_records, json_lines, read_text, shown
from .records import EditRecord, EvaluationPrompt

FACTS_FILE: Final = ("a .jsonl (one record per line) or .csv (with a header) file of facts with prompt, subject and "
                     "target_new")

_NEEDED: Final = ("prompt", "subject", "target_new")
_LISTS: Final = ("paraphrases", "neighbours", "generation_prompts")
OWN_FIELDS: Final = ("target_true", *_LISTS)  # that EasyEdit's requests do not have
FIELDS: Final = (*_NEEDED, "target_true", "case_id", *_LISTS)


def load_facts(path: Path | str) -> list[EditRecord]:
    """All facts of a ``.jsonl`` or ``.csv`` file, in its order; see the module docstring for the fields.

    Raises:
        MissingDatasetError: no file there.
        ValueError: another file extension, an unreadable line (with its number, from 1), or a wrong record.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in (".jsonl", ".csv"):
        raise ValueError(f"facts file {path} ends in {ending or 'nothing'!r}: give {FACTS_FILE}")
    text = read_text(path, FACTS_FILE)
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; expected at least one record")
    items = list(_json_items(text, str(path)) if ending == ".jsonl" else _csv_rows(text, str(path)))
    if not items:
        raise ValueError(f"{path}: there is a header and nothing else; expected at least one record")
    records = build_records(items, str(path), fact_record)
    numbered = sum("case_id" in item for _, item in items)
    if 0 < numbered < len(items):
        raise ValueError(f"{path}: {numbered} of {len(items)} records have a case_id; give one to each or to none")
    return records


def _json_items(text: str, source: str) -> Iterator[tuple[str, Any]]:
    for number, item in json_lines(text, source):
        yield f"line {number}", _without_nulls(item)


def _without_nulls(item: Any) -> Any:
    return {key: value for key, value in item.items() if value is not None} if isinstance(item, dict) else item


def _csv_rows(text: str, source: str) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    header: list[str] | None = None
    start = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise ValueError(f"{source}: the record that begins in line {start} is not valid CSV: {error}; repair it, "
                             "or complete it if the file was truncated there") from error
        if row is None:
            return
        where, start = f"line {start}", reader.line_num + 1
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if header is None:
            header = cells
            _check_header(header, source)
        elif len(cells) != len(header):
            raise ValueError(f"{source}: {where}: found {len(cells)} cells, expected {len(header)} as in the header; "
                             'put text that holds a comma in quotes ("")')
        else:
            yield where, {name: _cell(name, cell, f"{source}: {where}")
                          for name, cell in zip(header, cells, strict=True) if cell}


def _check_header(header: Sequence[str], source: str) -> None:
    missing = [name for name in _NEEDED if name not in header]
    unknown = [name for name in header if name not in FIELDS]
    twice = sorted({name for name in header if header.count(name) > 1})
    if missing or unknown or twice:
        wrong = {"lacks": missing, "has the unknown": unknown, "has twice": twice}
        found = "; ".join(f"{what} {', '.join(map(repr, names))}" for what, names in wrong.items() if names)
        raise ValueError(f"{source}: the header {found}: name the columns {', '.join(_NEEDED)} and any of "
                         f"{', '.join(FIELDS[len(_NEEDED):])}, with commas between them")


def _cell(name: str, cell: str, label: str) -> Any:
    """The value of a non-empty cell, as in JSONL."""
    if name == "case_id":
        return int(cell) if re.fullmatch(r"[+-]?[0-9]+", cell) else cell
    if name not in _LISTS:
        return cell
    if cell.startswith("["):
        raise ValueError(f"{label}, field {name!r}: found {shown(cell)}, expected texts with | between them; "
                         "lists in JSON belong into a .jsonl file")
    items = [item.strip() for item in cell.split("|") if item.strip()]
    return [_neighbour_item(item) for item in items] if name == "neighbours" else items


def _neighbour_item(item: str) -> str | dict[str, str]:
    prompt, arrow, target = item.rpartition("=>")
    return {"prompt": prompt.strip(), "target": target.strip()} if arrow else item


def fact_record(given: RawRecord) -> EditRecord:
    """A record with the fields of such a file.

    Raises:
        ValueError: a field is missing, unknown or wrong.
    """
    unknown = [name for name in given.raw if name not in FIELDS]
    if unknown:
        given.refuse(unknown[0], shown(given.raw[unknown[0]]), f"no other fields than {', '.join(FIELDS)}")
    subject = given.text("subject").strip()
    target_true = given.text("target_true").strip() if given.has("target_true") else None
    return EditRecord(
        case_id=given.case_id(),
        prompt=given.template_or_around("prompt", subject).strip(),
        subject=subject,
        target_new=given.text("target_new").strip(),
        target_true=target_true,
        paraphrase_prompts=_list(given, "paraphrases"),
        neighborhood_prompts=_neighbours(given, target_true),
        generation_prompts=_list(given, "generation_prompts"),
        dataset="facts",
    )


def _list(given: RawRecord, field: str) -> tuple[str, ...]:
    return tuple(text.strip() for text in given.texts(field)) if given.has(field) else ()


def _neighbours(given: RawRecord, target_true: str | None) -> tuple[EvaluationPrompt, ...]:
    if not given.has("neighbours"):
        return ()
    items: list[Any] = given.value("neighbours", list, "a list of prompts with their targets")
    return tuple(_neighbour(given, f"neighbours[{i}]", item, target_true) for i, item in enumerate(items))


def _neighbour(given: RawRecord, name: str, item: Any, target_true: str | None) -> EvaluationPrompt:
    if isinstance(item, str) and item.strip():
        if target_true is None:
            given.refuse(name, shown(item), "an answer with it, since the record has no target_true")
        return EvaluationPrompt(item.strip(), target_true)
    pair = given.part(name, item, "a prompt, or an object with prompt and target")
    return EvaluationPrompt(pair.text("prompt").strip(), pair.text("target").strip())
