"""What tracking hyperspherical energy costs while editing, and that it changes nothing.

Edits the same facts with and without an ``HETracker``, from the same weights, and times the tracker's two hooks inside
the run: a share of one and the same run, which other work on the machine disturbs little.

    python benchmarks/tracking.py --batch-size 1 --batches 5
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from sphere_easyedit import EditCallback, EditEvent, HETracker, SPHEREHyperParams, apply_sphere_to_model
from sphere_easyedit.evaluation.datasets import load_records
from sphere_easyedit.loading import load_model


class TimedTracker(EditCallback):
    """An ``HETracker`` that adds up the seconds spent in it."""

    def __init__(self) -> None:
        self.tracker, self.seconds = HETracker(), 0.0

    def on_batch_start(self, event: EditEvent) -> None:
        self._timed(self.tracker.on_batch_start, event)

    def on_batch_end(self, event: EditEvent) -> None:
        self._timed(self.tracker.on_batch_end, event)

    def _timed(self, hook: Any, event: EditEvent) -> None:
        started = time.perf_counter()
        hook(event)
        self.seconds += time.perf_counter() - started


def edited(options: argparse.Namespace, callbacks: list[TimedTracker]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Edited weights, and the tracker's share of each batch's time."""
    hparams = SPHEREHyperParams.from_hparams(options.hparams)
    model, tok = load_model(hparams.model_name, hparams.device, "float32")
    requests = [record.request() for record in load_records("demo", None, options.batches * options.batch_size, 0)]
    shares = []
    for first in range(0, len(requests), options.batch_size):
        before = sum(callback.seconds for callback in callbacks)
        started = time.perf_counter()
        apply_sphere_to_model(model, tok, requests[first: first + options.batch_size], hparams, callbacks=callbacks)
        spent = sum(callback.seconds for callback in callbacks) - before
        shares.append(spent / (time.perf_counter() - started))
    names = hparams.module_names(model.config)
    return {f"{layer}": model.get_parameter(f"{names.rewrite_module_tmp.format(layer)}.weight").detach()
            for layer in hparams.layers}, shares[1:]  # the first batch also prepares statistics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hparams", default="AlphaEdit/smollm2-135m")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--batches", type=int, default=6)
    options = parser.parse_args()
    callback = TimedTracker()
    tracked, shares = edited(options, [callback])
    plain, _ = edited(options, [])
    same = all(torch.equal(tracked[name], plain[name]) for name in plain)
    middle, low, high = (100 * share for share in (statistics.median(shares), min(shares), max(shares)))
    print(f"batches of {options.batch_size}: tracking takes {middle:.2f}% of a batch (median of {len(shares)}, "
          f"{low:.2f} to {high:.2f}%); weights {'equal bit for bit' if same else 'DIFFER'}")


if __name__ == "__main__":
    main()
