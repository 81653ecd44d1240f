"""What 15,000 edits of a large model take on GPUs: estimated from counts and stated rates. Nothing here ran on a GPU.

FLOPs and bytes are those of ``sphere-easyedit plan``, to which the rates below are handed (``--rate``), the lowest and
the highest; the command that prints the same is printed too. Beside them: the target values' FLOPs counted by hand,
from the config and token counts alone, and the time that starting a step's kernels takes, whose number is counted by
running the optimiser on a model of the same depth, 64 wide, on the CPU. Tokens are SmolLM2's tokenizer's.

    python benchmarks/scaling_estimate.py --data ../shared/data/counterfact.json
    python benchmarks/scaling_estimate.py --data ../shared/data/counterfact.json --models llama3-8b --base-alg MEMIT
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from published_models import MODELS, PublishedModel
from sphere_easyedit.planning.batches import micro_batches, total_tokens
from sphere_easyedit.planning.facts import STAND_IN_CONTEXTS, facts_in_tokens, sample
from sphere_easyedit.planning.inventory import find_tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from sphere_easyedit import SPHEREHyperParams
from sphere_easyedit.editing.requests import TokenizedRequest
from sphere_easyedit.editing.target_values import optimise_target_values
from sphere_easyedit.loading import smollm2_folder
from sphere_easyedit.models import frozen
from sphere_easyedit.planning import Plan, PlanSettings, make_plan

EDITS, BATCH = 15000, 100
# H100 SXM5, NVIDIA's data sheet, dense: bfloat16 tensor cores, float32 (torch leaves TF32 off unless told otherwise),
# float64 tensor cores, memory.
BF16, FP32, FP64, BANDWIDTH = 989e12, 67e12, 67e12, 3.35e12
# Of the peak. Llama 3's training reached 38 to 43% of it in bfloat16 (arXiv 2407.21783, Table 4).
SHARE = (0.3, 0.5)
# FLOP/s of a symmetric eigenproblem, counting 2 n^3. At the worst that of rocSOLVER's ssyevd, which took 3.4 s at 8192
# on a card with 512 GB/s (ROCm/rocSOLVER, pull request 1022); at the best faster by the ratio of bandwidths.
EIGEN = (2 * 8192**3 / 3.4, 2 * 8192**3 / 3.4 * BANDWIDTH / 512e9)
LAUNCH = (10e-6, 5e-6)  # seconds that Python and torch take to start an operation


def block_entries(config: Mapping[str, Any]) -> int:
    """Entries of a block's matrices: queries and output, keys and values, three of the feed-forward network."""
    hidden = config["hidden_size"]
    key_value = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    return int(hidden * (2 * hidden + 2 * key_value + 3 * config["intermediate_size"]))


def rates(config: Mapping[str, Any], layers: Sequence[int], end: int) -> dict[str, float]:
    """GFLOP/s by kind of work, at the worst (end 0) or the best (1).

    Second moments mix a pass in bfloat16 with k k^T in float32; projecting a Gram matrix in float32 with an
    eigenproblem.
    """
    d_out, d_in = config["hidden_size"], config["intermediate_size"]
    half, single = SHARE[end] * BF16, SHARE[end] * FP32
    passing, outer = 2.0 * (layers[-1] + 1) * block_entries(config), 2.0 * len(layers) * d_in**2
    gram, eigen = 2.0 * d_out**2 * d_in, 2.0 * d_out**3
    one_row = SHARE[end] * BANDWIDTH  # 2 FLOPs for each parameter of 2 bytes that is read
    found = {"once": half, "steps": half, "keys": half, "scores": half, "contexts": one_row, "continuations": one_row,
             "moments": (passing + outer) / (passing / half + outer / single), "metrics": EIGEN[end],
             "solve": (0.1, 0.3)[end] * FP64, "projection": (gram + eigen) / (gram / single + eigen / EIGEN[end]),
             "energy": (0.1, 0.3)[end] * FP32}
    return {kind: float(f"{rate / 1e9:.3g}") for kind, rate in found.items()}


@dataclass(frozen=True)
class Hand:
    """An edit's target value, counted by hand: tokens and positions of a step, its FLOPs forward, and all FLOPs."""

    tokens: float
    positions: float
    step: float
    total: float


def by_hand(config: Mapping[str, Any], hparams: SPHEREHyperParams, requests: Sequence[TokenizedRequest]) -> Hand:
    """What the optimiser needs at least, besides attention's own products and what is run once.

    A step's tokens are those from the subject's last one to the target's last but one, in every prompt, and those of
    the drift prompt; they meet all matrices of the blocks above the last edited one, and the head where a target is
    predicted.
    """
    tokens = positions = 0
    for request in requests:
        prompts = (request.plain, *request.contexts)
        tokens += sum(len(prompt.ids) - prompt.lookup + len(request.target_ids) - 1 for prompt in prompts)
        tokens += len(request.drift.ids) - request.drift.lookup
        positions += len(prompts) * len(request.target_ids) + 1
    above, count = config["num_hidden_layers"] - 1 - hparams.layers[-1], len(requests)
    step = (2.0 * above * block_entries(config) * tokens + 2.0 * config["vocab_size"] * config["hidden_size"]
            * positions) / count
    return Hand(tokens / count, positions / count, step, (2 * hparams.v_num_grad_steps - 1) * step)


class _Operations(TorchDispatchMode):
    """Counts operations that would start a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def operations(model: PublishedModel, hparams: SPHEREHyperParams, requests: Sequence[TokenizedRequest]) -> float:
    """Operations of one step of all micro-batches of these edits, forward, backward and Adam's."""
    wanted = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**model.config, **wanted, "dtype": "float32"}))
    counts = []
    for steps in (2, 4):
        settings = SPHEREHyperParams.from_dict({**hparams.to_dict(), "v_num_grad_steps": steps, "v_lr": 1e-6})
        with frozen(built), _Operations() as counter:
            optimise_target_values(settings.editable(built), requests, settings)
        counts.append(counter.count)
    return (counts[1] - counts[0]) / 2


def time_of(plan: Plan, *names: str) -> float:
    """Seconds of parts of a plan."""
    return sum(part.seconds or 0.0 for part in plan.time if part.name in names)


def span(low: float, high: float) -> str:
    """Two numbers of seconds in one unit."""
    unit, size = next((unit, size) for unit, size in (("h", 3600.0), ("min", 60.0), ("s", 1.0))
                      if high >= 1.5 * size or unit == "s")
    return f"{low / size:.2g} to {high / size:.2g} {unit}"


def estimate(name: str, base_alg: str, processes: Sequence[int], token_budget: int | None, data: Path, folder: Path
             ) -> list[str]:
    """Rows of the table for one model, after what is behind them."""
    model = MODELS[name]
    changes: dict[str, Any] = {"nullspace_share": 0.9} if base_alg == "AlphaEdit" else {}
    if token_budget is not None:
        changes["token_budget"] = token_budget
    hparams = model.settings(base_alg, model_name=str(folder), device="cuda", stats_dir=str(folder / "stats"),
                             **changes)
    ends = [rates(model.config, hparams.layers, end) for end in (0, 1)]
    settings = PlanSettings(EDITS, BATCH, "counterfact", data, calibrate=False)
    facts = facts_in_tokens(sample(settings), find_tokenizer(str(folder)), STAND_IN_CONTEXTS, None)
    hand = by_hand(model.config, hparams, facts.requests)
    print(f"\n{name}: by hand {hand.tokens:.1f} tokens and {hand.positions:.1f} positions a step and edit, "
          f"{hand.step:.3g} FLOP forward, {hand.total:.3g} in all; a run {EDITS * hand.total:.3g}")
    print("rates, GFLOP/s: " + "; ".join(f"{kind} {low:g} to {high:g}" for (kind, low), high
                                        in zip(ends[0].items(), ends[1].values(), strict=True)))
    changed = {"model_name": str(folder), "device": "cuda", **model.changes, **changes}
    print(" ".join(["sphere-easyedit plan --hparams", f"{base_alg}/{model.hparams} --num-edits {EDITS} --batch-size",
                    f"{BATCH} --dataset counterfact --data {data} --no-calibrate",
                    *(f"--set {key}={value}" for key, value in changed.items()),
                    *(f"--rate {kind}={rate:g}" for kind, rate in ends[0].items())]))
    rows = []
    for count in processes:
        worst, best = (make_plan(hparams, replace(settings, rates=end, processes=count)) for end in ends)
        share = max(facts.shares(BATCH, count)[0], key=lambda edits: sum(len(edit.plain.ids) for edit in edits))
        groups = micro_batches(share, hparams.token_budget, "packed")
        started = operations(model, hparams, share) * hparams.v_num_grad_steps * math.ceil(EDITS / BATCH)
        values = [max(time_of(plan, "target values"), started * launch)
                  for plan, launch in ((best, LAUNCH[1]), (worst, LAUNCH[0]))]
        print(f"{count} process(es): {started / EDITS:.0f} operations an edit of the run, {len(groups)} micro-batches "
              f"of {sum(total_tokens(group.stepped) for group in groups) / len(groups):.0f} tokens; target values "
              f"{span(time_of(best, 'target values'), time_of(worst, 'target values'))} by arithmetic, "
              f"{span(started * LAUNCH[1], started * LAUNCH[0])} by starting kernels; plan's FLOPs "
              f"{next(part.flops for part in worst.time if part.name == 'target values'):.3g}; peaks "
              + ", ".join(f"{place} {size / 1e9:.1f} GB" for place, size in worst.peak_bytes.items()))
        others = [[time_of(plan, *names) for plan in (best, worst)] for names in (
            ("keys and solve",), ("projection and energy",), ("evaluation before", "evaluation after"))]
        total = [values[end] + sum(other[end] for other in others) for end in (0, 1)]
        once = [time_of(plan, "statistics", "preparation") for plan in (best, worst)]
        rows.append(f"| {name} | {count} | " + " | ".join(span(*pair) for pair in (values, *others, total, once))
                    + f" | {worst.peak_bytes['device'] / 1e9:.0f} GB |")
    return rows


def many_records(data: Path, folder: Path) -> Path:
    """A CounterFact file of as many records as are to be planned, the given ones over and over."""
    records = json.loads(data.read_text(encoding="utf-8"))
    found = [{**records[i % len(records)], "case_id": i} for i in range(EDITS)]
    path = folder / "counterfact.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CounterFact file")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--base-alg", choices=("AlphaEdit", "MEMIT"), default="AlphaEdit")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--token-budget", type=int, help="tokens optimised at once; the settings' own if not given")
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/sphere-scaling"), help="for configs and the facts")
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    data = many_records(options.data, options.work_dir)
    rows = []
    for name in options.models:
        folder = MODELS[name].write_folder(options.work_dir, smollm2_folder())
        rows += estimate(name, options.base_alg, options.processes, options.token_budget, data, folder)
    columns = ("model", "processes", "target values", "keys and solve", "projection and HE", "evaluation, twice",
               f"{EDITS:,} edits in all", "before, once a model", "device at the peak")
    print("\n| " + " | ".join(columns) + " |\n| --- " + "| ---: " * (len(columns) - 1) + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
