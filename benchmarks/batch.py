"""A whole batch of edits: ours, native, against a plain reference and against EasyEdit's own function, in one run.

The reference (plain.py) and EasyEdit's function, which is called as it is (`executor: easyedit`, `alpha: 0`, which only
sets the stage for it: SmolLM2's tied embeddings would stop it), edit a few facts a turn, spread evenly over the batch
sorted by length; ours edits the whole batch. Seconds are by edit. The same few edits by all give the difference of the
updates and the arithmetic done. EasyEdit takes part where EASYEDIT_HOME says where it is.

    EASYEDIT_HOME=... python benchmarks/batch.py --data ../shared/data/counterfact.json --base-alg MEMIT
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from common import machine, peak_memory, spread
from plain import plain_batch, plain_metrics
from sphere_easyedit import EditSession, SPHEREHyperParams, apply_sphere_to_model
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.easyedit.discovery import HOME
from sphere_easyedit.editing.delta_forward import rows_of
from sphere_easyedit.editing.requests import parse_requests, tokenize_request
from sphere_easyedit.models.architecture import EditableModel
from sphere_easyedit.models.loading import load_model

CONTEXTS = ["The first of these was a. {}", "Therefore, the number of days in. {}", "Because of this it is not. {}",
            "I have been a member of the. {}", "You can also use your own to. {}"]
# The optimiser's settings of the paper for Llama-3-8B: larger steps amplify rounding, in either implementation.
PAPER = {"v_lr": 0.1, "v_weight_decay": 0.5, "clamp_norm_factor": 0.75}
Requests = list[dict[str, Any]]


class Side:
    """One way of editing, with its own session; edits are taken back."""

    def __init__(self, model: nn.Module, tok: Any, hparams: SPHEREHyperParams, executor: Any = None) -> None:
        self._model, self._tok, self._hparams, self._executor = model, tok, hparams, executor
        self._session = EditSession()

    def edit(self, requests: Requests) -> tuple[float, dict[str, Tensor]]:
        """Seconds of one batch, and the changes of the weights."""
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # EasyEdit prints a line for every step
            _, originals = apply_sphere_to_model(self._model, self._tok, requests, self._hparams,
                                                 return_orig_weights=True, session=self._session,
                                                 executor=self._executor)
        seconds = time.perf_counter() - started
        changes = {name: self._model.get_parameter(name).detach() - weight for name, weight in originals.items()}
        with torch.no_grad():
            for name, weight in originals.items():
                self._model.get_parameter(name).copy_(weight)
        return seconds, changes

    def gigaflops(self, requests: Requests) -> float:
        """Arithmetic in matrix products and attention, by edit."""
        with FlopCounterMode(display=False) as counter:
            self.edit(requests)
        return float(counter.get_total_flops()) / len(requests) / 1e9


def needed_gigaflops(editable: EditableModel, tok: Any, requests: Requests, hparams: SPHEREHyperParams) -> float:
    """Arithmetic of an edit's target value that can't be left out if every step is taken, attention not counted.

    Each step needs the tokens from the subject's last one on in the blocks above the edited one and the head where a
    token is predicted, forward and (but for the last step) backward; once, all tokens in all blocks.
    """
    entries = [sum(p.numel() for p in editable.block(i).parameters() if p.dim() == 2)
               for i in range(editable.num_blocks)]
    above = sum(entries[editable.layers[-1] + 1:])
    head = editable.lm_head.weight.numel()  # type: ignore[operator]
    total = 0
    for request in parse_requests(requests):
        rows = rows_of(0, tokenize_request(tok, request, CONTEXTS, None))
        behind = sum(len(row.ids) - row.lookup for row in rows)
        predictions = sum(max(1, len(row.targets)) for row in rows)
        total += (2 * hparams.v_num_grad_steps - 1) * 2 * (behind * above + predictions * head)
        total += 2 * sum(len(row.ids) for row in rows) * sum(entries)
    return total / len(requests) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base-alg", choices=("MEMIT", "AlphaEdit"), default="MEMIT")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--few", type=int, default=3, help="edits of each turn that the other sides do")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--without-plain", action="store_true", help="EasyEdit alone against ours")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    overrides = {key: yaml.safe_load(value) for key, _, value in (change.partition("=") for change in options.set)}
    shipped = SPHEREHyperParams.from_hparams(f"{options.base_alg}/{options.model}").to_dict()
    common = {**shipped, **PAPER, "context_templates": CONTEXTS, "alpha": 0.0, "projection_stage": "update",
              **overrides}
    hparams = SPHEREHyperParams.from_dict(common)
    model, tok = load_model(hparams.model_name, "cpu", "float32")
    editable = hparams.editable(model)
    records = load_records("counterfact", options.data, options.edits, 0)
    requests = sorted((record.request() for record in records), key=lambda request: len(request["prompt"]))

    ours, same = Side(model, tok, hparams), Side(model, tok, hparams)
    for side in (ours, same):  # statistics, null spaces and factors are made once a run, not once a batch
        side.edit(requests[:1])
    others: dict[str, Side] = {}
    if not options.without_plain:
        others["plain"] = Side(model, tok, hparams, partial(plain_batch, metrics=plain_metrics(editable, hparams)))
    if os.environ.get(HOME):
        theirs = SPHEREHyperParams.from_dict({**common, "executor": "easyedit", "batched_target_values": False})
        others["EasyEdit"] = Side(model, tok, theirs)
    for side in others.values():
        side.edit(requests[:1])

    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *others)}
    differences: dict[str, list[float]] = {name: [] for name in others}
    few: Requests = []
    step = options.edits / options.few
    for turn in range(options.turns):
        few = [requests[int(step * i + step * (turn + 0.5) / options.turns)] for i in range(options.few)]
        seconds["ours"].append(ours.edit(requests)[0] / options.edits)
        expected = same.edit(few)[1]
        for name, side in others.items():
            taken, changes = side.edit(few)
            seconds[name].append(taken / options.few)
            differences[name].append(max(float((expected[weight] - change).norm() / change.norm())
                                         for weight, change in changes.items()))
        print(f"turn {turn + 1}: seconds an edit: " + ", ".join(f"{name} {found[-1]:.2f}"
                                                                for name, found in seconds.items()), flush=True)
    print(f"\n{options.base_alg} on {options.model}, {options.edits} edits, {1 + len(CONTEXTS)} contexts, "
          f"{hparams.v_num_grad_steps} steps; {machine()}; {peak_memory()}. An edit's target value needs at least "
          f"{needed_gigaflops(editable, tok, few, hparams):.0f} GFLOP.\n")
    print("| side | seconds an edit, median (range) | times ours | updates differ by | GFLOP an edit | GFLOP/s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, side in {"ours": same, **others}.items():
        work = side.gigaflops(few)
        ratios = [theirs / own for theirs, own in zip(seconds[name], seconds["ours"], strict=True)]
        apart = f"{max(differences[name]):.1e}" if name in differences else ""
        print(f"| {name} | {spread(seconds[name])} | {spread(ratios)} | {apart} | {work:.0f} | "
              f"{work / statistics.median(seconds[name]):.0f} |", flush=True)


if __name__ == "__main__":
    main()
