"""What a batch costs besides its target values, in time and memory, against the number of edits before it.

Synthetic keys (those of solves.py) stand in for earlier edits; each layer has its own. Timed, over all layers: the
solve of a batch; SPHERE, which is the principal space of the current weight, the projection and the Gram matrix after
it; hyperspherical energy; taking the keys into the history; and a checkpoint of the session, which a run makes after
every batch of 10 edits or more. Not timed: target values and keys, which need a model and do not depend on earlier
edits. ``--model`` edits a real model instead, with synthetic keys planted as its history, and gives the whole batch.

    python benchmarks/cost_curves.py --d-in 1536 --d-out 576 --earlier 1000 5000 20000 --batch 100 --layers 5
    python benchmarks/cost_curves.py --d-in 4096 --layers 1 --output curves
    python benchmarks/cost_curves.py --model AlphaEdit/smollm2-135m --earlier 500 5000 --batch 10
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import machine, peak_memory
from solves import L2, LAMBDA, SyntheticKeys
from sphere_easyedit import EditSession, PrincipalSpace, SPHEREHyperParams, apply_sphere_to_model
from sphere_easyedit.core.hyperspherical import energy_from_gram
from sphere_easyedit.core.updates import LowRankUpdate
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.gram_matrices import GramMatrix
from sphere_easyedit.methods.solvers import (
    CholeskyFactor,
    CovarianceMetric,
    KeyHistory,
    KeyMetric,
    NullSpace,
    NullSpaceMetric,
    adjusted_keys,
)
from sphere_easyedit.models.loading import load_model
from sphere_easyedit.utils.files import record_checksum, sha256_of

METHODS = ("MEMIT", "MEMIT with earlier keys", "AlphaEdit")
PARTS = ("solve", "sphere", "energy", "extend", "checkpoint")


class Layer:
    """One layer's synthetic state."""

    def __init__(self, method: str, d_in: int, d_out: int, share: float, seed: int) -> None:
        self._source = SyntheticKeys(d_in, seed)
        self._keeps_keys = method != "MEMIT"
        metric = self._null_space(d_in, share) if method == "AlphaEdit" else CovarianceMetric(
            CholeskyFactor.of(self._source.moment()), LAMBDA)
        self.history = KeyHistory.empty(d_in, metric, torch.device("cpu"))
        self.weight = 0.02 * torch.randn(d_out, d_in)
        self._gram, self._rank = GramMatrix.of(self.weight), None

    def _null_space(self, d_in: int, share: float) -> KeyMetric:
        left_out = d_in - int(share * d_in)
        complement = left_out < d_in / 2
        columns = self._source.directions(*((0, left_out) if complement else (left_out, d_in))).float()
        return NullSpaceMetric(NullSpace(columns, complement), L2)

    def grow(self, earlier: int, batch: int = 100) -> None:
        """Let the history have this number of keys, if the method keeps any."""
        while self._keeps_keys and (missing := earlier - self.history.num_keys) > 0:
            self.history = self.history.extended(self._source.draw(min(missing, batch)))

    def draw(self, count: int) -> Tensor:
        return self._source.draw(count)

    def batch(self, keys: Tensor, seconds: dict[str, float]) -> KeyHistory:
        """The history after a batch of keys; adds to the seconds of each part."""
        values = torch.randn(len(self.weight), keys.shape[1])
        started = time.perf_counter()
        adjusted = adjusted_keys(self.history, keys)
        if adjusted is None:
            raise SystemExit("the factored solve failed")
        solved = time.perf_counter()
        space = PrincipalSpace.from_gram(self.weight, self._gram.matrix, likely_rank=self._rank)
        self._rank = space.rank
        update = LowRankUpdate(values, space.suppress_keys(adjusted.float()))
        gram = self._gram.after(self.weight, update) or GramMatrix.of(self.weight + update.dense())
        projected = time.perf_counter()
        energy_from_gram(gram.matrix, weight=self.weight)
        measured = time.perf_counter()
        history = self.history.extended(keys) if self._keeps_keys else self.history
        times = (solved - started, projected - solved, measured - projected, time.perf_counter() - measured)
        for part, took in zip(PARTS, times, strict=False):
            seconds[part] += took
        return history


def checkpoint(layers: Sequence[Layer], before: Sequence[KeyHistory], after: Sequence[KeyHistory]
               ) -> tuple[float, float]:
    """Seconds that a batch's checkpoint takes where the batch before it had one, and MB that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        session = EditSession()
        session._key = "a benchmark's"
        session.original = {number: layer.weight for number, layer in enumerate(layers)}
        session.history = dict(enumerate(before))
        session.save(Path(folder, "before.safetensors"), share_keys=True)
        there = set(Path(folder).iterdir())
        session.history = dict(enumerate(after))
        started = time.perf_counter()
        path = Path(folder, "after.safetensors")
        session.save(path, share_keys=True)
        record_checksum(path, sha256_of(path))
        seconds = time.perf_counter() - started
        return seconds, sum(path.stat().st_size for path in Path(folder).iterdir() if path not in there) / 1e6


def curves(method: str, d_in: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every number of earlier edits, batch size and number of layers."""
    layers = [Layer(method, d_in, options.d_out or d_in // 4, options.share, seed)
              for seed in range(max(options.layers))]
    rows = []
    for earlier in options.earlier:
        for layer in layers:
            layer.grow(earlier)
        for count in options.layers:
            for batch in options.batch:
                chosen = layers[:count]
                keys = [layer.draw(batch) for layer in chosen]
                runs = []
                for _ in range(options.repeats):
                    seconds = dict.fromkeys(PARTS, 0.0)
                    after = [layer.batch(k, seconds) for layer, k in zip(chosen, keys, strict=True)]
                    seconds["checkpoint"], written = checkpoint(chosen, [one.history for one in chosen], after)
                    runs.append(seconds)
                totals = [sum(run.values()) for run in runs]
                rows.append({
                    "method": method, "d_in": d_in, "layers": count, "batch": batch, "earlier": earlier,
                    "seconds": round(statistics.median(totals), 3), "fastest": round(min(totals), 3),
                    "slowest": round(max(totals), 3),
                    **{part: round(statistics.median(run[part] for run in runs), 3) for part in PARTS},
                    "state_mb": round(sum(layer.history.nbytes for layer in chosen) / 1e6, 1),
                    "written_mb": round(written, 1)})
                print(rows[-1], flush=True)
    return rows


def whole_batches(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Whole batches on a real model whose history was planted, each repeat on the unedited weights."""
    hparams = SPHEREHyperParams.from_hparams(options.model)
    if options.stats_dir is not None:
        hparams.stats_dir = str(options.stats_dir)
    model, tok = load_model(hparams.model_name, "cpu", "float32")
    editable = hparams.editable(model)
    records = load_records("demo", None, 2 * max(options.batch), 0)
    requests = [record.request() for record in records]
    original = {layer: editable.weight(layer).clone() for layer in editable.layers}
    first = EditSession.of(model)
    apply_sphere_to_model(model, tok, requests[:1], hparams)  # statistics, templates, threads
    rows = []
    for _ in range(options.repeats):
        for batch in options.batch:
            for earlier in options.earlier:  # taking turns, so that a slow minute does not fall on one of them
                for layer, weight in original.items():
                    editable.set_weight(layer, weight)
                session = EditSession()
                session.contexts, session.metrics = first.contexts, first.metrics
                session.history = {layer: KeyHistory(SyntheticKeys(editable.d_in(layer), layer).draw(earlier),
                                                     first.metrics[layer]) for layer in editable.layers}
                started = time.perf_counter()
                apply_sphere_to_model(model, tok, requests[:batch], hparams, session=session)
                rows.append({"batch": batch, "earlier": earlier,
                             "seconds": round(time.perf_counter() - started, 3),
                             "state_mb": round(sum(h.nbytes for h in session.history.values()) / 1e6, 1)})
                print(rows[-1], flush=True)
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "| --- " * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row.values())) + " |" for row in rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--d-in", type=int, nargs="+", default=[1536])
    parser.add_argument("--d-out", type=int, help="rows of the weight; a quarter of d_in by default")
    parser.add_argument("--earlier", type=int, nargs="+", default=[100, 200, 500, 1000, 2000, 5000, 10000])
    parser.add_argument("--batch", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--share", type=float, default=0.9, help="of the dimensions, in the null space")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", metavar="HPARAMS", help="edit this model, in place of synthetic layers")
    parser.add_argument("--stats-dir", type=Path, help="where its statistics are")
    parser.add_argument("--output", type=Path, help="write OUTPUT.csv and OUTPUT.md")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.model is not None:
        rows = whole_batches(options)
    else:
        rows = [row for method in options.method for d_in in options.d_in for row in curves(method, d_in, options)]
    print(f"\n{machine()}, {peak_memory()}\n\n{markdown(rows)}")
    if options.output is not None:
        options.output.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
        with options.output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
