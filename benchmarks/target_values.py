"""Time of a target value: our batched optimiser against a plain loop, in one run, with the same result.

The plain loop (plain.py) is written from the same mathematics: one edit at a time, the whole model on all tokens in
every step, logits everywhere. Both run in float32 with the same threads, taking turns: in each turn ours does the whole
batch and the plain loop some of its edits, which over all turns are spread evenly over the batch sorted by length.

    python benchmarks/target_values.py --data ../shared/data/counterfact.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import yaml

from common import machine, peak_memory
from plain import plain_target_value
from sphere_easyedit import SPHEREHyperParams
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.contexts import generate_contexts
from sphere_easyedit.editing.requests import parse_requests, tokenize_request
from sphere_easyedit.editing.target_values import optimise_target_values
from sphere_easyedit.models.architecture import frozen
from sphere_easyedit.models.loading import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hparams", default="MEMIT/smollm2-135m")
    parser.add_argument("--data", type=Path, required=True, help="CounterFact file")
    parser.add_argument("--batch", type=int, default=50, help="edits that ours optimises at once")
    parser.add_argument("--plain-edits", type=int, default=12, help="of them, edits that the plain loop does")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a hyperparameter")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()

    changes = dict(change.split("=", 1) for change in args.set)
    loaded = SPHEREHyperParams.from_hparams(args.hparams).to_dict()
    hparams = SPHEREHyperParams.from_dict({**loaded, **{k: yaml.safe_load(v) for k, v in changes.items()}})
    model, tok = load_model(hparams.model_name, "cpu", "float32")
    editable = hparams.editable(model)
    records = load_records("counterfact", args.data, args.batch, seed=0)
    ours_seconds, plain_seconds, errors = [], [], []  # seconds of each turn
    with frozen(model):
        contexts = generate_contexts(editable, tok, hparams.seed)
        requests = [tokenize_request(tok, request, contexts, None)
                    for request in parse_requests([record.request() for record in records])]
        by_length = sorted(range(args.batch), key=lambda i: len(requests[i].plain.ids) + len(requests[i].target_ids))
        spread = [by_length[int((k + 0.5) * args.batch / args.plain_edits)] for k in range(args.plain_edits)]
        for share in (spread[turn :: args.turns] for turn in range(args.turns)):
            started = time.perf_counter()
            ours = optimise_target_values(editable, requests, hparams)
            ours_seconds.append(time.perf_counter() - started)
            started = time.perf_counter()
            plain = [plain_target_value(editable, requests[i], hparams) for i in share]
            plain_seconds.append(time.perf_counter() - started)
            errors += [float((ours.values[i] - z).norm() / z.norm()) for i, z in zip(share, plain, strict=True)]
            seconds = ours_seconds[-1] / args.batch, plain_seconds[-1] / len(share)
            print(f"seconds an edit: ours {seconds[0]:.2f}, plain {seconds[1]:.2f} on {len(share)} of {args.batch}; "
                  f"z differs by up to {max(errors):.1e}", flush=True)
    ours_per_edit = [seconds / args.batch for seconds in ours_seconds]
    figures = {
        "machine": machine(), "memory": peak_memory(), "hparams": args.hparams, "changes": changes, "edits": args.batch,
        "contexts": 1 + len(contexts), "steps": hparams.v_num_grad_steps,
        "mean_steps_taken": statistics.mean(ours.steps),
        "ours_seconds_an_edit": [statistics.median(ours_per_edit), min(ours_per_edit), max(ours_per_edit)],
        "plain_edits": args.plain_edits,
        "plain_seconds_an_edit": sum(plain_seconds) / args.plain_edits,
        "ratio": sum(plain_seconds) / args.plain_edits / statistics.median(ours_per_edit),
        "ratio_range": [sum(plain_seconds) / args.plain_edits / extreme(ours_per_edit) for extreme in (max, min)],
        "z_error": {"median": statistics.median(errors), "max": max(errors)},
    }
    print(json.dumps(figures, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
