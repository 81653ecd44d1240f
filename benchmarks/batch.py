"""A whole batch of edits: ours, native, against EasyEdit's own function, in one run.

EasyEdit's function is called as it is (`executor: easyedit`, `alpha: 0`, which only sets the stage for it: SmolLM2's
tied embeddings would stop it) on a few edits a turn, spread evenly over the batch sorted by length; ours edits the
whole batch. Seconds are by edit. The same few edits by both give the difference of the updates. Needs EASYEDIT_HOME.

    EASYEDIT_HOME=... python benchmarks/batch.py --data ../shared/data/counterfact.json --base-alg MEMIT
"""

from __future__ import annotations

import argparse
import contextlib
import io
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from sphere_easyedit import EditSession, SPHEREHyperParams, apply_sphere_to_model
from sphere_easyedit.evaluation.datasets import load_records
from sphere_easyedit.loading import load_model

CONTEXTS = ["The first of these was a. {}", "Therefore, the number of days in. {}", "Because of this it is not. {}",
            "I have been a member of the. {}", "You can also use your own to. {}"]
# The optimiser's settings of the paper for Llama-3-8B: larger steps amplify rounding, in either implementation.
PAPER = {"v_lr": 0.1, "v_weight_decay": 0.5, "clamp_norm_factor": 0.75}


def edit(model: nn.Module, tok: Any, requests: list[dict[str, Any]], hparams: SPHEREHyperParams, session: EditSession
         ) -> tuple[float, dict[str, Tensor]]:
    """Seconds of one batch and the weights' changes, taken back afterwards."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):  # EasyEdit prints a line for every step
        _, originals = apply_sphere_to_model(model, tok, requests, hparams, return_orig_weights=True, session=session)
    seconds = time.perf_counter() - started
    changes = {name: model.get_parameter(name).detach() - weight for name, weight in originals.items()}
    with torch.no_grad():
        for name, weight in originals.items():
            model.get_parameter(name).copy_(weight)
    return seconds, changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--base-alg", choices=("MEMIT", "AlphaEdit"), default="MEMIT")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--edits", type=int, default=50)
    parser.add_argument("--theirs", type=int, default=4, help="edits of each turn that EasyEdit does")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    overrides = {key: yaml.safe_load(value) for key, _, value in (change.partition("=") for change in options.set)}
    shipped = SPHEREHyperParams.from_hparams(f"{options.base_alg}/{options.model}").to_dict()
    common = {**shipped, **PAPER, "context_templates": CONTEXTS, "alpha": 0.0, "projection_stage": "update",
              **overrides}
    ours = SPHEREHyperParams.from_dict(common)
    theirs = SPHEREHyperParams.from_dict({**common, "executor": "easyedit", "batched_target_values": False})
    model, tok = load_model(ours.model_name, "cpu", "float32")
    records = load_records("counterfact", options.data, options.edits, 0)
    requests = sorted((record.request() for record in records), key=lambda request: len(request["prompt"]))
    sessions = {"ours": EditSession(), "few": EditSession(), "theirs": EditSession()}
    for session in sessions.values():  # statistics, null spaces and factors are made once a run, not once a batch
        edit(model, tok, requests[:1], theirs if session is sessions["theirs"] else ours, session)

    rows = []
    for turn in range(options.turns):
        step = options.edits / options.theirs
        few = [requests[int(step * i + step * (turn + 0.5) / options.turns)] for i in range(options.theirs)]
        seconds, _ = edit(model, tok, requests, ours, sessions["ours"])
        own, reference = edit(model, tok, few, theirs, sessions["theirs"])
        _, same = edit(model, tok, few, ours, sessions["few"])
        difference = max(float((same[name] - change).norm() / change.norm()) for name, change in reference.items())
        rows.append((seconds / options.edits, own / options.theirs, difference))
        print(f"turn {turn + 1}: ours {rows[-1][0]:.2f} s an edit, EasyEdit {rows[-1][1]:.2f}, ratio "
              f"{rows[-1][1] / rows[-1][0]:.2f}, updates {difference:.1e} apart", flush=True)
    ratios = [theirs_ / ours_ for ours_, theirs_, _ in rows]
    print(f"{options.base_alg}, {options.edits} edits: ratio {statistics.median(ratios):.2f} (median; "
          f"{min(ratios):.2f} to {max(ratios):.2f}), updates at most {max(row[2] for row in rows):.1e} apart, "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB at the peak, "
          f"{torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
