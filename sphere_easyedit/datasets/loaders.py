"""Loads the records of a data set, and draws those to edit.

CounterFact, MultiCounterFact and ZsRE are read from their published files and from EasyEdit's flattened ones; users'
own facts from JSONL or CSV; the demo set ships with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np

from .downloads import PUBLISHED, dataset_path
from .facts import load_facts
from .flattened import flattened_record, is_flattened
from .json_records import RawRecord, build_records, numbered, read_list
from .published import mend_record, rome_record
from .records import (
    DatasetName,
    EditRecord,
    EvaluationPrompt,
    MissingDatasetError,
    Protocol,
    edits_alt,
    fill,
    records_fingerprint,
    with_protocol_targets,
)

__all__ = [
    "DatasetName",
    "EditRecord",
    "EvaluationPrompt",
    "MissingDatasetError",
    "Protocol",
    "draw_records",
    "edits_alt",
    "fill",
    "load_facts",
    "load_records",
    "records_fingerprint",
    "with_protocol_targets",
]


def load_records(
    dataset: DatasetName,
    path: Path | None = None,
    num_edits: int | None = None,
    seed: int | None = None,
    *,
    order_seed: int | None = None,
    skip: int = 0,
) -> list[EditRecord]:
    """Load a data set and draw the records to edit.

    Args:
        dataset: ``counterfact``, ``multi_counterfact``, ``zsre``, ``facts`` (users' own) or ``demo`` (300 facts or more
            that ship with the package).
        path: the file. None finds or downloads the published one (see ``downloads.dataset_path``); ``facts`` needs
            it, ``demo`` has none.
        num_edits: number of records to draw; None for all.
        seed: of the draw and its order; None for the file's order.
        order_seed: of another order of the same records.
        skip: number of drawn records to leave out, from the first.

    Raises:
        MissingDatasetError: the file does not exist, is not given, or could not be downloaded.
        ValueError: the data set is unknown, the file has another schema or too few records, or a number is out of
            range.
    """
    if dataset not in get_args(DatasetName):
        known = ", ".join(get_args(DatasetName))
        raise ValueError(f"data set {dataset!r} is not known: choose one of {known}")
    _check_draw(num_edits, seed, order_seed, skip)
    records = _load_all(dataset, path)
    return draw_records(records, num_edits, seed, order_seed=order_seed, skip=skip,
                        source=f"{dataset} ({path or ('built in' if dataset == 'demo' else 'published')})")


def draw_records(
    records: Sequence[EditRecord],
    num_edits: int | None = None,
    seed: int | None = None,
    *,
    order_seed: int | None = None,
    skip: int = 0,
    source: str = "the list",
) -> list[EditRecord]:
    """Draw records to edit.

    With N records, the drawn order is 0 ... N-1 if ``seed`` is None, else ``numpy.random.default_rng(seed)
    .permutation(N)``. The records at ``skip`` ... ``skip + num_edits - 1`` of it are returned. So with the same seed
    and file, fewer edits are the beginning of more, and ``skip=2000`` gives records that no run of 2,000 edits with
    that seed uses (except the same fact under another case_id, see ``conflicts.find_conflicts``).

    Args:
        records: all records, in the file's order.
        num_edits: number of records; None for all from ``skip`` on.
        seed: for drawing and ordering.
        order_seed: reorders the drawn records by ``default_rng(order_seed).permutation(num_edits)``. Fewer edits are
            then still a subset of more, but no longer their beginning.
        skip: number of records to leave out at the beginning of the drawn order.
        source: name of the records in errors.

    Raises:
        ValueError: a number is out of range, or there are too few records.
    """
    _check_draw(num_edits, seed, order_seed, skip)
    available = len(records) - skip
    count = available if num_edits is None else num_edits
    if count > available or available < 1:
        given = f"skip is {skip}" if num_edits is None else f"num_edits is {num_edits}"
        given += f" and skip {skip}" if skip and num_edits is not None else ""
        remedy = (f"give at most {available}, or a larger file" if available > 0 else
                  f"skip at most {len(records) - 1}")
        raise ValueError(f"{given}, but {source} has {len(records)} records: {remedy}")
    order = np.arange(len(records)) if seed is None else np.random.default_rng(seed).permutation(len(records))
    drawn = order[skip : skip + count]
    if order_seed is not None:
        drawn = drawn[np.random.default_rng(order_seed).permutation(count)]
    return [records[int(index)] for index in drawn]


def _check_draw(num_edits: int | None, seed: int | None, order_seed: int | None, skip: int) -> None:
    for name, value, smallest, default in (("num_edits", num_edits, 1, "all records"),
                                           ("seed", seed, 0, "the file's order"),
                                           ("order_seed", order_seed, 0, "the drawn order"),
                                           ("skip", skip, 0, "the first records")):
        if value is not None and value < smallest:
            raise ValueError(f"{name} is {value}: give {smallest} or more, or leave it out for {default}")


def _load_all(dataset: DatasetName, path: Path | None) -> list[EditRecord]:
    if dataset == "demo":
        if path is not None:
            raise ValueError(
                f"data set demo ships with the package, but the file {path} was given: leave the file out, "
                f"or name its data set ({', '.join(name for name in get_args(DatasetName) if name != 'demo')})"
            )
        from .demo import demo_records

        return demo_records()
    found = dataset_path(dataset, path)
    return load_facts(found) if dataset == "facts" else _load_json(found, dataset)


def _load_json(path: Path, dataset: DatasetName) -> list[EditRecord]:
    """All records of a JSON file, in its order.

    The first record shows whether the file has the published schema (``published.rome_record``, ``mend_record``) or
    EasyEdit's flattened one (``flattened.flattened_record``); all others must have the same.
    """
    raw = read_list(path, PUBLISHED[dataset].what)
    build: Callable[[RawRecord], EditRecord]
    if isinstance(raw[0], dict) and is_flattened(raw[0]):
        build = partial(flattened_record, dataset=dataset)
    else:
        build = mend_record if dataset == "zsre" else partial(rome_record, dataset=dataset)
    return build_records(numbered(raw), str(path), build)
