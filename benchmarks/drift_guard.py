"""How early DriftGuard fires, and how often falsely: finished runs told to it again, batch by batch.

    python benchmarks/drift_guard.py $STUDY/runs/* --output docs/results

Runs must have kept their weights after every batch. The guard is given what it would have been given while they ran -
weights, norms, facts - so its records are a live one's, but for the last digits of energies. Writes ``guard.csv``: a
line a run, sign and threshold, with the edits at which the sign first passed it, and those by which the run collapsed
(``evaluation.collapse``); and prints them in sum.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from sphere_easyedit import DriftGuard, EditEvent
from sphere_easyedit.analysis.collapse import collapse_of
from sphere_easyedit.callbacks.drift_guard import GuardRecord
from sphere_easyedit.editing.checkpoints import load_weights, saved_weights
from sphere_easyedit.editing.requests import parse_requests
from sphere_easyedit.models.loading import load_model
from sphere_easyedit.runs.records import RunRecords
from sphere_easyedit.runs.reevaluation import EditedRun
from sphere_easyedit.runs.schema import GUARD
from sphere_easyedit.utils.files import atomic_write

logger = logging.getLogger(__name__)

THRESHOLDS: Mapping[str, tuple[float, ...]] = {
    "energy": (1.5, 2.0, 3.0, 5.0), "norm": (1.1, 1.25, 1.5), "early": (0.9, 0.75, 0.6, 0.5)}

DEFAULTS: Mapping[str, float] = {
    name: inspect.signature(DriftGuard).parameters[name].default for name in THRESHOLDS}


def watched(folder: Path, facts: int) -> list[GuardRecord]:
    """What a guard sees of a run, with so many early facts."""
    run = EditedRun(folder)
    model, tok = load_model(run.hparams.model_name, run.hparams.device, None)
    editable = run.hparams.editable(model)
    guard = DriftGuard("warn", tok, facts=facts, path=folder / GUARD)
    batches = RunRecords.read(folder).batches
    ends = [batch.num_edits for batch in batches]
    kept = saved_weights(run.directory.checkpoints)
    if kept != ends:
        raise ValueError(f"{folder} kept weights after {kept} edits, its batches ended after {ends}: it can't be told "
                         "again")
    for number, ((since, until), batch) in enumerate(zip(pairwise([0, *ends]), batches, strict=True)):
        requests = parse_requests([record.request() for record in run.records[since: until]])
        event = EditEvent(model, editable.weights(), since, number, batch.case_ids, requests=requests)
        guard.on_batch_start(event)
        load_weights(editable, run.directory.checkpoints, until)
        event = replace(event, weights=editable.weights(), num_edits=until, num_batches=number + 1,
                        update_norms=batch.update_norms)
        guard.review(event)
        guard.on_batch_end(event)
    return guard.records


def first_past(records: list[GuardRecord], sign: str, threshold: float, warmup: int = 5) -> int | None:
    """Edits at which a sign first passed a threshold; None if it never did."""
    first, later = records[:warmup], records[warmup:]
    if sign == "early":
        base = first[-1].early_efficacy
        return next((seen.num_edits for seen in later if base is not None and seen.early_efficacy is not None
                     and seen.early_efficacy < threshold * base), None)
    name = {"energy": "energy_step", "norm": "update_norm"}[sign]
    usual = median(getattr(seen, name) for seen in first)
    return next((seen.num_edits for seen in later if getattr(seen, name) > threshold * usual), None)


def first_of_any(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each run, when the first sign was past the guard's own thresholds."""
    merged: dict[str, dict[str, Any]] = {}
    for row in found:
        if DEFAULTS[row["sign"]] == row["threshold"]:
            one = merged.setdefault(row["run"], row | {"sign": "any", "fired_at": None})
            fired = [edits for edits in (one["fired_at"], row["fired_at"]) if edits is not None]
            one["fired_at"] = min(fired, default=None)
    return list(merged.values())


def rows(folders: list[Path], facts: int) -> Iterator[dict[str, Any]]:
    """A line a run, sign and threshold."""
    for folder in folders:
        run = RunRecords.read(folder)
        collapse = collapse_of(run)
        records = watched(folder, facts)
        logger.info("%s: %d batches", folder.name, len(records))
        for sign, thresholds in THRESHOLDS.items():
            for threshold in thresholds:
                yield {"run": folder.name, "sign": sign, "threshold": threshold,
                       "fired_at": first_past(records, sign, threshold),
                       "collapsed_at": None if collapse is None else collapse.num_edits,
                       "last": records[-1].num_edits}


def summary(found: list[dict[str, Any]]) -> str:
    """Per sign and threshold: in how many runs that collapsed it fired before, how early, and how often in others."""
    lines = ["| sign | threshold | fired before a collapse | edits ahead of it | fired without one |",
             "| --- | ---: | ---: | ---: | ---: |"]
    found = found + first_of_any(found)
    for sign, thresholds in (*THRESHOLDS.items(), ("any", ("default",))):
        for threshold in thresholds:
            these = [row for row in found if row["sign"] == sign and threshold in (row["threshold"], "default")]
            broken = [row for row in these if row["collapsed_at"] is not None]
            sound = [row for row in these if row["collapsed_at"] is None]
            ahead = sorted(int(broke) - int(fired) for row in broken
                           if (fired := row["fired_at"]) and (broke := row["collapsed_at"]) and fired < broke)
            early = f"{ahead[0]} to {ahead[-1]}" if ahead else ""
            falsely = sum(row["fired_at"] is not None for row in sound)
            lines.append(f"| {sign} | {threshold} | {len(ahead)} of {len(broken)} | {early} "
                         f"| {falsely} of {len(sound)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, help="none: only sum up guard.csv, which is there already")
    parser.add_argument("--facts", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    table = given.output / "guard.csv"
    if given.runs:
        found = list(rows(given.runs, given.facts))
        with atomic_write(table) as path, path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(found[0]))
            writer.writeheader()
            writer.writerows(found)
    with table.open(newline="", encoding="utf-8") as stream:
        found = [{**row, "threshold": float(row["threshold"]),
                  **{name: int(row[name]) if row[name] else None for name in ("fired_at", "collapsed_at", "last")}}
                 for row in csv.DictReader(stream)]
    sys.stdout.write(summary(found) + "\n")


if __name__ == "__main__":
    main()
