"""What a batch's solve costs, in time and memory, against the number of edits before it.

Synthetic keys (those of solves.py) stand in for earlier edits; each layer has its own. Timed are the solve of a batch,
the projection of its keys on SPHERE's space, and taking them into the history, over all layers. Not timed: target
values, which need a model, and estimating the principal space. ``--model`` edits a real model instead, with synthetic
keys planted as its history, and gives the whole batch.

    python benchmarks/cost_curves.py --d-in 1536 --output curves
    python benchmarks/cost_curves.py --d-in 4096 --layers 1 --output curves
    python benchmarks/cost_curves.py --model AlphaEdit/smollm2-135m --earlier 500 5000 --batch 10
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solves import L2, SyntheticKeys
from sphere_easyedit import EditSession, PrincipalSpace, SPHEREHyperParams, apply_sphere_to_model
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.methods.solvers import KeyHistory, NullSpace, NullSpaceMetric, adjusted_keys
from sphere_easyedit.models.loading import load_model


class Layer:
    """One layer's synthetic state."""

    def __init__(self, d_in: int, d_out: int, share: float, seed: int) -> None:
        self._source = SyntheticKeys(d_in, seed)
        left_out = d_in - int(share * d_in)
        complement = left_out < d_in / 2
        columns = self._source.directions(*((0, left_out) if complement else (left_out, d_in))).float()
        self.history = KeyHistory.empty(d_in, NullSpaceMetric(NullSpace(columns, complement), L2), columns.device)
        self._space = PrincipalSpace.from_weight(torch.randn(d_out, d_in))

    def grow(self, earlier: int) -> None:
        """Let the history have so many keys."""
        while (missing := earlier - self.history.keys.shape[1]) > 0:
            self.history = self.history.extended(self._source.draw(min(missing, 100)))

    def draw(self, count: int) -> Tensor:
        return self._source.draw(count)

    def batch(self, keys: Tensor) -> tuple[float, float, float]:
        """Seconds for solving, projecting and extending."""
        times = [time.perf_counter()]
        adjusted = adjusted_keys(self.history, keys)
        if adjusted is None:
            raise SystemExit("the factored solve failed")
        times.append(time.perf_counter())
        self._space.suppress_keys(adjusted.float())
        times.append(time.perf_counter())
        self.history.extended(keys)
        times.append(time.perf_counter())
        solve, project, extend = (later - earlier for earlier, later in pairwise(times))
        return solve, project, extend


def curves(d_in: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every number of earlier edits, batch size and number of layers."""
    layers = [Layer(d_in, options.d_out or d_in // 4, options.share, seed) for seed in range(max(options.layers))]
    rows = []
    for earlier in options.earlier:
        for layer in layers:
            layer.grow(earlier)
        for count in options.layers:
            for batch in options.batch:
                keys = [layer.draw(batch) for layer in layers[:count]]
                runs = [[sum(part) for part in zip(*(layer.batch(k) for layer, k in zip(layers, keys, strict=False)),
                                                   strict=True)] for _ in range(options.repeats)]
                totals = [sum(run) for run in runs]
                solve, project, extend = (statistics.median(part) for part in zip(*runs, strict=True))
                rows.append({
                    "d_in": d_in, "layers": count, "batch": batch, "earlier": earlier,
                    "seconds": round(statistics.median(totals), 4), "fastest": round(min(totals), 4),
                    "slowest": round(max(totals), 4), "solve": round(solve, 4), "project": round(project, 4),
                    "extend": round(extend, 4),
                    "state_mb": round(sum(layer.history.nbytes for layer in layers[:count]) / 1e6, 1)})
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
        rows = [row for d_in in options.d_in for row in curves(d_in, options)]
    print("\n" + markdown(rows))
    if options.output is not None:
        options.output.with_suffix(".md").write_text(markdown(rows), encoding="utf-8")
        with options.output.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
