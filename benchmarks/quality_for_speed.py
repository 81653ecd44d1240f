"""Quality and seconds an edit of each ``speed`` (exact, balanced, fast), against EasyEdit's own MEMIT.

``quality`` edits CounterFact and ZsRE facts, batch after batch, into the unedited model, and measures them and the
perplexity afterwards; seeds draw the facts. Done runs are kept in the output file and not repeated. ``seconds`` times
batches of several sizes, each side on its turn; EasyEdit's function edits a few facts of the batch, since it takes one
after another anyway::

    python benchmarks/quality_for_speed.py quality --data ../shared/data --output quality.json
    EASYEDIT_HOME=... python benchmarks/quality_for_speed.py seconds --data ../shared/data --output seconds.json
    python benchmarks/quality_for_speed.py table --output quality.json
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

from batch import CONTEXTS, Side
from common import machine, peak_memory, spread
from sphere_easyedit import EditSession, SPHEREHyperParams, apply_sphere_to_model
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.easyedit.discovery import HOME
from sphere_easyedit.evaluation.metrics import evaluate_records, summarise
from sphere_easyedit.evaluation.paired import paired_bootstrap
from sphere_easyedit.evaluation.perplexity import held_out_texts, perplexity
from sphere_easyedit.models.loading import load_model
from sphere_easyedit.speed import SPEEDS

FACTS = {"counterfact": (300, "counterfact.json"), "zsre": (200, "zsre_mend_eval.json")}
METRICS = ("efficacy", "generalization", "specificity")


def settings(given: argparse.Namespace, speed: str, **changes: Any) -> SPHEREHyperParams:
    """The shipped hyperparameters at a speed, with the same context templates for all."""
    shipped = SPHEREHyperParams.from_hparams(f"{given.base_alg}/{given.model}").to_dict()
    return SPHEREHyperParams.from_dict({**shipped, "context_templates": CONTEXTS, "stats_dir": given.stats_dir,
                                        **SPEEDS[speed], **changes})


def measure_quality(given: argparse.Namespace, done: dict[str, Any], model: Any, tok: Any) -> None:
    """Edit and measure what is not in ``done``, which is filled and written after every run."""
    texts = held_out_texts(given.data / "wikitext_test.txt")
    unedited = perplexity(model, tok, texts, given.text_tokens).perplexity
    for seed in given.seeds:
        for dataset, speed in ((dataset, speed) for dataset in FACTS for speed in given.speeds):
            key = f"{dataset}/{seed}/{speed}"
            if key in done:
                continue
            hparams = settings(given, speed)
            records = load_records(dataset, given.data / FACTS[dataset][1], FACTS[dataset][0], seed)
            session, started = EditSession(), time.process_time()
            with hparams.editable(model).restoring(always=True):
                for first in range(0, len(records), given.batch_size):
                    batch = records[first: first + given.batch_size]
                    apply_sphere_to_model(model, tok, [record.request() for record in batch], hparams, session=session)
                seconds = (time.process_time() - started) / len(records)
                scores = evaluate_records(model, tok, records)
                after = perplexity(model, tok, texts, given.text_tokens).perplexity
            done[key] = {
                "cpu_seconds_an_edit": seconds, "perplexity": after, "unedited": unedited, "machine": machine(),
                "cases": {str(one.case_id): {name: 100 * value for name in METRICS
                                             if (value := getattr(one, name)) is not None} for one in scores},
                "summary": {name: found["mean"] for name, found in summarise(scores).items() if name in METRICS}}
            given.output.write_text(json.dumps(done, indent=1), encoding="utf-8")
            print(key, f"{seconds:.2f} CPU s an edit, perplexity {unedited:.2f} -> {after:.2f}", done[key]["summary"],
                  flush=True)


def print_quality(given: argparse.Namespace, done: dict[str, Any]) -> None:
    """Means over all facts and seeds, with paired differences from ``exact``."""
    print("| data | speed | " + " | ".join(f"{name} (less exact, 95%)" for name in METRICS)
          + " | perplexity after / before, by seed |\n" + "| --- " * 6 + "|")
    for dataset in FACTS:
        runs = {speed: {seed: done[key] for seed in given.seeds if (key := f"{dataset}/{seed}/{speed}") in done}
                for speed in given.speeds}
        for speed, of_seed in runs.items():
            cells = []
            for metric in METRICS:
                values = {which: {(seed, case): scores[metric] for seed, run in of_which.items() if seed in of_seed
                                  for case, scores in run["cases"].items() if metric in scores}
                          for which, of_which in ((speed, of_seed), ("exact", runs["exact"]))}
                mean = statistics.fmean(values[speed].values())
                if speed == "exact":
                    cells.append(f"{mean:.1f}")
                    continue
                both = sorted(values[speed].keys() & values["exact"].keys())
                found = paired_bootstrap(*([values[which][key] for key in both] for which in (speed, "exact")))
                low, high = found.ci95 or (math.nan, math.nan)
                cells.append(f"{mean:.1f} ({found.mean:+.1f}, {low:+.1f} to {high:+.1f})")
            rises = ", ".join(f"{run['perplexity'] / run['unedited']:.3f}" for run in of_seed.values())
            print(f"| {dataset} | {speed} | " + " | ".join(cells) + f" | {rises} |")


def time_batches(given: argparse.Namespace, done: dict[str, Any], model: Any, tok: Any) -> None:
    """Seconds an edit by batch size; after a first batch, which makes statistics and tries the model."""
    sides = {speed: Side(model, tok, settings(given, speed, alpha=0.0, projection_stage="update"))
             for speed in given.speeds}
    if os.environ.get(HOME):
        sides["EasyEdit"] = Side(model, tok, settings(given, "exact", alpha=0.0, projection_stage="update",
                                                      executor="easyedit", batched_target_values=False))
    most = max(given.batch_sizes)
    records = load_records("counterfact", given.data / "counterfact.json", most + 3, 0)
    requests = [record.request() for record in records]
    for side in sides.values():
        side.edit(requests[most: most + 1])
    print(f"{given.base_alg} on {given.model}; {machine()}")
    for size in given.batch_sizes:
        taken: dict[str, list[float]] = {name: [] for name in sides}
        for turn in range(given.turns):
            for name, side in sides.items():
                few = given.few if name == "EasyEdit" else size
                # A batch of one is timed on several facts, whose lengths differ.
                parts = [requests[i: i + 1] for i in range(5)] if size == 1 and name != "EasyEdit" else [
                    requests[: size][:: math.ceil(size / few)]]
                taken[name].append(statistics.fmean(side.edit(part)[0] / len(part) for part in parts))
            done[f"{size}"] = taken
            given.output.write_text(json.dumps(done, indent=1), encoding="utf-8")
            print(f"batch {size}, turn {turn + 1}: " + ", ".join(f"{name} {found[-1]:.2f}"
                                                                 for name, found in taken.items()), flush=True)
        for name, found in taken.items():
            ratios = [theirs / own for theirs, own in zip(taken.get("EasyEdit", []), found, strict=False)]
            print(f"| {size} | {name} | {spread(found)} | {spread(ratios, 1) if ratios else ''} |", flush=True)
    print(peak_memory())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("quality", "seconds", "table"))
    parser.add_argument("--data", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--base-alg", default="MEMIT")
    parser.add_argument("--speeds", nargs="+", default=list(SPEEDS), choices=list(SPEEDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 10, 50, 100])
    parser.add_argument("--few", type=int, default=2, help="facts of a batch that EasyEdit edits")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--text-tokens", type=int, default=16384)
    parser.add_argument("--stats-dir", default="./data/stats")
    given = parser.parse_args()
    done = json.loads(given.output.read_text(encoding="utf-8")) if given.output.exists() else {}
    if given.part != "table":
        model, tok = load_model(settings(given, "exact").model_name, "cpu", "float32")
        (measure_quality if given.part == "quality" else time_batches)(given, done, model, tok)
    if given.part != "seconds":
        print_quality(given, done)


if __name__ == "__main__":
    main()
