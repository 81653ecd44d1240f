"""What SPHERE and tracking hyperspherical energy cost while editing, and that tracking changes nothing.

Edits the same facts with and without an ``HETracker``, from the same weights, and times the tracker's hooks, the
projection and what carries the Gram matrices inside the run: shares of one and the same run, which other work on the
machine disturbs little.

    python benchmarks/tracking.py --batch-size 50 --batches 3
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
import yaml

from common import machine, spread
from sphere_easyedit import EditCallback, HETracker, SPHEREHyperParams, apply_sphere_to_model
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.gram_matrices import GramMatrices
from sphere_easyedit.editing.update_writer import UpdateWriter
from sphere_easyedit.models.loading import load_model

# Where SPHERE and the tracker spend their time; none of them calls another.
PARTS: tuple[tuple[type, str, str], ...] = (
    (UpdateWriter, "restrain_and_project", "projecting"), (GramMatrices, "advance", "carrying"),
    (HETracker, "on_batch_start", "tracking"), (HETracker, "on_batch_end", "tracking"))


@contextmanager
def timed() -> Iterator[dict[str, float]]:
    """Seconds spent in each of the parts inside the context."""
    seconds = {name: 0.0 for _, _, name in PARTS}

    def watched(method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*args)
            finally:
                seconds[name] += time.perf_counter() - started

        return run

    patches = [patch.object(owner, method, watched(getattr(owner, method), name)) for owner, method, name in PARTS]
    for each in patches:
        each.start()
    try:
        yield seconds
    finally:
        for each in patches:
            each.stop()


def edited(options: argparse.Namespace, callbacks: list[EditCallback]
           ) -> tuple[dict[str, torch.Tensor], dict[str, list[float]]]:
    """Edited weights, and each part's share of each batch's time in percent."""
    changes = {key: yaml.safe_load(value) for key, _, value in (change.partition("=") for change in options.set)}
    hparams = SPHEREHyperParams.from_dict({**SPHEREHyperParams.from_hparams(options.hparams).to_dict(), **changes})
    model, tok = load_model(hparams.model_name, hparams.device, "float32")
    requests = [record.request() for record in load_records("demo", None, options.batches * options.batch_size, 0)]
    shares: dict[str, list[float]] = {name: [] for name in ("projecting", "carrying", "tracking", "together")}
    for first in range(0, len(requests), options.batch_size):
        with timed() as seconds:
            started = time.perf_counter()
            apply_sphere_to_model(model, tok, requests[first: first + options.batch_size], hparams, callbacks=callbacks)
            whole = time.perf_counter() - started
        for name, spent in {**seconds, "together": sum(seconds.values())}.items():
            shares[name].append(100 * spent / whole)
    editable = hparams.editable(model)
    weights = {f"{layer}": editable.weight(layer) for layer in hparams.layers}
    return weights, {name: found[1:] for name, found in shares.items()}  # the first batch also prepares statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hparams", default="AlphaEdit/smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--batches", type=int, default=6)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    tracked, shares = edited(options, [HETracker()])
    plain, _ = edited(options, [])
    same = all(torch.equal(tracked[name], plain[name]) for name in plain)
    print(f"{options.hparams}, batches of {options.batch_size}, {options.batches - 1} of them measured; {machine()}; "
          f"with and without tracking the weights are {'equal bit for bit' if same else 'NOT EQUAL'}\n")
    print("| part | percent of a batch, median (range) |\n| --- | --- |")
    for name, found in shares.items():
        print(f"| {name} | {spread(found)} |")


if __name__ == "__main__":
    main()
