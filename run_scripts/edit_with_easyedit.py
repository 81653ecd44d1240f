"""Edit CounterFact or ZsRE through EasyEdit itself, batch after batch, with hyperspherical energy tracked.

The counterpart of EasyEdit's own examples: its ``BaseEditor`` edits and evaluates, SPHERE is registered with it. Writes
``metrics.json`` (EasyEdit's format, with energy joined to each case), ``energy.csv`` and ``correlation.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import yaml

import sphere_easyedit as sphere
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.easyedit.editor import edit_arguments, make_editor, read_hparams

METHODS = ("AlphaEdit", "MEMIT", "RECT", "PRUNE", "FT", "ROME")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="AlphaEdit", help="base method")
    parser.add_argument("--hparams", help="instead: a YAML file of ours, or of EasyEdit's for one of its own methods")
    parser.add_argument("--model", default="smollm2-135m", help="file name below hparams/SPHERE/<method>/")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a hyperparameter")
    parser.add_argument("--without-sphere", action="store_true", help="the base method by itself: alpha 0")
    parser.add_argument("--dataset", choices=("counterfact", "zsre"), default="counterfact")
    parser.add_argument("--data", type=Path, required=True, help="counterfact.json or zsre_mend_eval.json")
    parser.add_argument("--num-edits", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=1, help="1 goes through edit(), more through batch_edit()")
    parser.add_argument("--seed", type=int, help="draws and orders the records; the file's order if not given")
    parser.add_argument("--single", action="store_true", help="restore the weights after every batch")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    return parser.parse_args()


def run(options: argparse.Namespace) -> None:
    name = options.hparams or f"{options.method}/{options.model}"
    changes: dict[str, Any] = {}
    if options.without_sphere:
        changes["alpha"] = 0.0
    for change in options.set:
        key, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"--set {change!r} has no '=': write NAME=VALUE")
        changes[key] = yaml.safe_load(value)
    records = load_records(options.dataset, options.data, options.num_edits, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)

    sphere.register()
    hparams = read_hparams(name, changes)
    if hasattr(hparams, "batch_size"):  # EasyEdit's ROME has none
        hparams.batch_size = options.batch_size
    editor = make_editor(hparams)
    tracker = sphere.HETracker(options.output / "energy.csv")
    edit = editor.edit if options.batch_size == 1 else editor.batch_edit
    with sphere.track(editor, callbacks=[tracker]):
        metrics, _, _ = edit(**edit_arguments(records), sequential_edit=not options.single, verbose=False)
    tracker.join(metrics)
    write(options.output / "metrics.json", metrics)
    correlation = tracker.correlation(metrics)
    write(options.output / "correlation.json", {key: finite(dataclasses.asdict(value))
                                                for key, value in correlation.items()})
    for key, value in correlation.items():
        print(f"{key}: Spearman's rho with HE {value.energy.rho:+.3f}, p {value.energy.p:.2g}, n {value.energy.n}")
    print(f"results in {options.output}")


def finite(value: Any) -> Any:
    """JSON has no nan: where there is no correlation, null."""
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2, default=float), encoding="utf-8")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run(arguments())
