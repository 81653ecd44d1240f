"""Time of a target value: our batched optimiser against a plain loop, in one run, with the same result.

The plain loop is written here, from the same mathematics: one edit at a time, the whole model on all tokens in every
step, logits everywhere. Both run in float32 with the same threads, taking turns: in each turn ours does the whole batch
and the plain loop some of its edits, which over all turns are spread evenly over the batch sorted by length.

    python benchmarks/target_values.py --data ../shared/data/counterfact.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor
from torch.nn import functional as F

from sphere_easyedit import SPHEREHyperParams
from sphere_easyedit.editing.contexts import generate_contexts
from sphere_easyedit.editing.replay import first_output, pad_rows
from sphere_easyedit.editing.requests import TokenizedRequest, parse_requests, tokenize_request
from sphere_easyedit.editing.target_values import optimise_target_values
from sphere_easyedit.evaluation.datasets import load_records
from sphere_easyedit.loading import load_model
from sphere_easyedit.models import EditableModel, frozen


def plain_target_value(editable: EditableModel, request: TokenizedRequest, hparams: SPHEREHyperParams) -> Tensor:
    """z of one edit, ``(hidden_size,)``, by running the whole model in every step."""
    prompts = [request.plain, *request.contexts]
    rows = pad_rows([*(p.ids + request.target_ids[:-1] for p in prompts), request.drift.ids], editable.input_device)
    lookups = torch.tensor([p.lookup for p in (*prompts, request.drift)])
    every = torch.arange(len(lookups))
    delta = torch.zeros(editable.hidden_size, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=hparams.v_lr)
    initial: list[Tensor] = []
    drift_before: list[Tensor] = []

    def add_delta(_module: Any, _args: Any, output: Any) -> Any:
        hidden = first_output(output)
        if not initial:
            initial.append(hidden[0, lookups[0]].detach().clone())
        hidden = hidden.index_put((every, lookups), delta.expand(len(every), -1), accumulate=True)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = editable.block(editable.layers[-1]).register_forward_hook(add_delta)
    try:
        for step in range(hparams.v_num_grad_steps):
            out = editable.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
            log_probs = F.log_softmax(out.logits, dim=-1)
            nll = torch.stack([
                -log_probs[i, len(p.ids) - 1 + torch.arange(len(request.target_ids)), list(request.target_ids)].mean()
                for i, p in enumerate(prompts)]).mean()
            drift = log_probs[-1, request.drift.lookup]
            if not drift_before:
                drift_before.append(drift.detach().clone())
            drifted = F.kl_div(drift_before[0], drift, log_target=True, reduction="sum")
            loss = nll + hparams.kl_factor * drifted + hparams.v_weight_decay * delta.norm() / initial[0].norm() ** 2
            if loss.item() < 0.05 or step == hparams.v_num_grad_steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            limit = hparams.clamp_norm_factor * initial[0].norm()
            with torch.no_grad():
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())
    finally:
        handle.remove()
    return initial[0] + delta.detach()


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
    editable = EditableModel(model, hparams.module_names(model.config), hparams.layers)
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
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads", "torch": torch.__version__,
        "transformers": transformers.__version__, "hparams": args.hparams, "changes": changes, "edits": args.batch,
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
