"""Records to edit and to measure, by the name of a data set: what is read, and which records are drawn.

CounterFact, MultiCounterFact and ZsRE are read from the files that they were published in and from EasyEdit's flattened
ones; users' own facts from JSONL or CSV; the demo set ships with the package.
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
    fill,
    records_fingerprint,
    with_protocol_targets,
)

__all__ = [
    "DatasetName",
    "EditRecord",
    "EvaluationPrompt",
    "MissingDatasetError",
    "draw_records",
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
        num_edits, seed, order_seed, skip: see ``draw_records``.

    Raises:
        MissingDatasetError: no file there, none named where one is needed, or none that could be downloaded.
        ValueError: the data set's name is unknown, the file is not of its schema, it holds fewer records than are
            asked for, or a number is out of range.
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

    With N records, the drawn order is 0 ... N-1 where ``seed`` is None and ``numpy.random.default_rng(seed)
    .permutation(N)`` where it is a number. Taken are the records at places ``skip`` ... ``skip + num_edits - 1`` of it.
    So with one seed and one file, fewer edits are the beginning of more, and ``skip=2000`` gives records that no run of
    2,000 edits with that seed sees (the same fact under another case_id aside: see ``conflicts.find_conflicts``).

    Args:
        records: all there are, in the file's order.
        num_edits: how many records; None for all from ``skip`` on.
        seed: draws and orders.
        order_seed: puts the same records in another order, ``default_rng(order_seed).permutation(num_edits)`` of the
            drawn one. Fewer edits are then still among more, but no longer their beginning.
        skip: how many records of the drawn order to leave out at its beginning.
        source: what errors call the records.

    Raises:
        ValueError: a number is out of range, or there are fewer records than are asked for.
    """
    _check_draw(num_edits, seed, order_seed, skip)
    left = len(records) - skip
    wanted = left if num_edits is None else num_edits
    if wanted > left or left < 1:
        asked = f"skip is {skip}" if num_edits is None else f"num_edits is {num_edits}"
        asked += f" and skip {skip}" if skip and num_edits is not None else ""
        remedy = f"ask for at most {left} or give a larger file" if left > 0 else f"skip at most {len(records) - 1}"
        raise ValueError(f"{asked}, but {source} holds {len(records)} records: {remedy}")
    places = np.arange(len(records)) if seed is None else np.random.default_rng(seed).permutation(len(records))
    places = places[skip : skip + wanted]
    if order_seed is not None:
        places = places[np.random.default_rng(order_seed).permutation(wanted)]
    return [records[int(place)] for place in places]


def _check_draw(num_edits: int | None, seed: int | None, order_seed: int | None, skip: int) -> None:
    if num_edits is not None and num_edits < 1:
        raise ValueError(f"num_edits is {num_edits}: give 1 or more, or leave it out for all records")
    if seed is not None and seed < 0:
        raise ValueError(f"seed is {seed}: give 0 or more, or leave it out for the file's order")
    if order_seed is not None and order_seed < 0:
        raise ValueError(f"order_seed is {order_seed}: give 0 or more, or leave it out for the drawn order")
    if skip < 0:
        raise ValueError(f"skip is {skip}: give 0 or more")


def _load_all(dataset: DatasetName, path: Path | None) -> list[EditRecord]:
    if dataset == "demo":
        if path is not None:
            raise ValueError(
                f"data set demo ships with the package, but the file {path} was given: leave the file out, "
                "or name the data set that it holds (counterfact, multi_counterfact, zsre, facts)"
            )
        # Only demo runs need the table, so only they pay for reading it.
        from .demo import demo_records

        return demo_records()
    found = dataset_path(dataset, path)
    return load_facts(found) if dataset == "facts" else _load_json(found, dataset)


def _load_json(path: Path, dataset: DatasetName) -> list[EditRecord]:
    """All records of a JSON file, in its order.

    The first record decides whether the file is in the published schema (``published.rome_record``, ``mend_record``) or
    flattened by EasyEdit (``flattened.flattened_record``); all others must be in the same.
    """
    raw = read_list(path, PUBLISHED[dataset].what)
    build: Callable[[RawRecord], EditRecord]
    if isinstance(raw[0], dict) and is_flattened(raw[0]):
        build = partial(flattened_record, dataset=dataset)
    else:
        build = mend_record if dataset == "zsre" else partial(rome_record, dataset=dataset)
    return build_records(numbered(raw), str(path), build)
