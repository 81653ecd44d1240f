"""Edit records from what Python code passes: records, dicts, or the path of a file of facts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .facts import FIELDS, OWN_FIELDS, fact_record, load_facts
from .flattened import flattened_record
from .json_records import RawRecord, build_records, numbered
from .records import EditRecord

_EXPECTED = "EditRecords, dicts with prompt, subject and target_new, or the path of a .jsonl or .csv file"


def records_from(given: str | os.PathLike[str] | Iterable[EditRecord | Mapping[str, Any]]) -> list[EditRecord]:
    """Edit records from a file of facts, from records, or from dicts.

    Dicts have the fields of a file of facts (see ``datasets.facts``), or those of EasyEdit's requests (see
    ``datasets.flattened``).

    Raises:
        ValueError: it is none of these, is empty, a record is wrong, or a case_id occurs twice.
    """
    if isinstance(given, str | os.PathLike):
        return load_facts(Path(given))
    if isinstance(given, Mapping | EditRecord):
        raise ValueError(f"records is a single {type(given).__name__}: put it in a list")
    if not isinstance(given, Iterable):
        raise ValueError(f"records is of type {type(given).__name__}: give {_EXPECTED}")
    items = list(given)
    if not items:
        raise ValueError(f"records is empty: give {_EXPECTED}")
    ready = [item for item in items if isinstance(item, EditRecord)]
    if not ready:
        dicts = [dict(item) if isinstance(item, Mapping) else item for item in items]
        return build_records(numbered(dicts), "records", _record)
    if len(ready) < len(items):
        raise ValueError(f"records mixes {len(ready)} EditRecords with {len(items) - len(ready)} others: give only one "
                         "kind")
    seen: set[int] = set()
    for record in ready:
        if record.case_id in seen:
            raise ValueError(f"records has case_id {record.case_id} twice: number the records anew, with "
                             "dataclasses.replace(record, case_id=...)")
        seen.add(record.case_id)
    return ready


def _record(given: RawRecord) -> EditRecord:
    """A record by the fields that the dict has: those of both kinds are read alike."""
    is_fact = given.raw.keys() <= {*FIELDS} or any(name in given.raw for name in OWN_FIELDS)
    return fact_record(given) if is_fact else flattened_record(given, "facts")
