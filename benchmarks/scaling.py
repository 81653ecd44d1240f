"""What a batch of 100 edits costs at a large model's shape besides target values, which need the model: measured.

The model is built on the meta device from its published config, and the down-projection of its first edited layer is
materialised with random weights (see published_models.py). Keys are random too, with the spectrum of solves.py;
AlphaEdit's null space leaves out a tenth of the dimensions, those of C's largest eigenvalues. Every measurement runs in
a process of its own and is filed at once, so that a command that was cut short goes on where it stopped.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py measure --minutes 9     # again until it says that nothing is missing
    python benchmarks/scaling.py table
    python benchmarks/scaling.py one --model llama3-8b --part "weight, float32" --work-dir /tmp/scaling

Peaks are the growth of the process's high-water mark (VmHWM, reset in front of each step) over what was resident then,
with malloc's thresholds fixed, as in tests/unit/test_hyperspherical.py; on Linux alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common import machine
from projection import resident_bytes
from published_models import MODELS, PublishedModel, with_one_weight
from solves import L2, LAMBDA, SyntheticKeys
from sphere_easyedit import PrincipalSpace, hyperspherical_energy
from sphere_easyedit.core.hyperspherical import energy_from_gram
from sphere_easyedit.core.updates import LowRankUpdate
from sphere_easyedit.editing.gram_matrices import GramMatrix
from sphere_easyedit.editing.solve import add_update
from sphere_easyedit.methods.solvers import (
    CholeskyFactor,
    CovarianceMetric,
    KeyHistory,
    NullSpace,
    NullSpaceMetric,
    adjusted_keys,
)
from sphere_easyedit.utils.files import atomic_write

Result = TypeVar("Result")
BATCH: Final = 100
SHARE: Final = 0.9  # of the dimensions, in the null space
GAMMA, ALPHA = 0.5, 0.5
MEASURED: Final = ("llama3-8b", "qwen2.5-7b")
TURNS: Final = 3
# Processes by part: those that take long to get to their solve do that several times in one.
PARTS: Final = {"weight, float32": TURNS, "weight, bfloat16": TURNS, "factor of C": 1, "MEMIT": 1,
                "AlphaEdit after 1000": 1, "AlphaEdit after 10000": 1}
OUTPUT: Final = Path(__file__).parents[1] / "docs" / "results" / "scaling.json"
_STEADY: Final = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "1"}


class Meter:
    """Seconds and peak memory of steps by name, of each time that one was done."""

    def __init__(self) -> None:
        self.figures: dict[str, list[dict[str, float]]] = {}

    def __call__(self, name: str, work: Callable[..., Result], *args: Any) -> Result:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the high-water mark
        before = resident_bytes("VmRSS")
        started, used = time.perf_counter(), time.process_time()
        result = work(*args)
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
        peak = resident_bytes("VmHWM")
        self.figures.setdefault(name, []).append({"seconds": round(seconds, 3), "cpu_seconds": round(cpu, 3),
                                                  "peak_bytes": peak - before, "process_bytes": peak})
        return result

    def often(self, name: str, work: Callable[..., object], *args: Any) -> None:
        """The same several times, where getting there takes long."""
        for _ in range(TURNS):
            self(name, work, *args)


# --- parts --------------------------------------------------------------------------------------------------

def weight_part(model: PublishedModel, dtype: torch.dtype, meter: Meter) -> dict[str, Any]:
    """All that SPHERE does with one edited weight: the first batch, what later ones do otherwise, and HE."""
    editable = with_one_weight(model, dtype)
    layer = editable.layers[0]
    weight = editable.weight(layer)
    synthetic = SyntheticKeys(editable.d_in(layer))
    keys, values = synthetic.draw(BATCH), torch.randn(weight.shape[0], BATCH)
    values *= 3e-3 * float(weight.float().norm()) / float((values @ keys.T).norm())
    torch.mm(keys.T, keys)  # the first product sets up threads
    meter("HE from the weight", hyperspherical_energy, weight)
    gram = meter("Gram matrix from the weight", GramMatrix.of, weight)
    meter("HE from the Gram matrix", lambda: energy_from_gram(gram.matrix, weight=weight))
    space = meter("principal space, first batch", PrincipalSpace.from_gram, weight, gram.matrix, GAMMA)
    space = meter("principal space, later batch", PrincipalSpace.from_gram, weight, gram.matrix, GAMMA, space.rank)
    projected = LowRankUpdate(values, meter("projecting the keys", space.suppress_keys, keys, ALPHA))
    after = meter("Gram matrix carried", gram.after, weight, projected)
    if after is None:  # half precision: rounding changes the weight as much as the update does, so it is computed anew
        del meter.figures["Gram matrix carried"]
    meter("writing the update", add_update, editable, layer, projected)
    return {"shape": list(weight.shape), "rank": space.rank, "gram_carried": after is not None}


def factor_part(d_in: int, work: Path, meter: Meter) -> dict[str, Any]:
    """C's Cholesky factor, once a session; kept for the MEMIT part."""
    moment = SyntheticKeys(d_in).moment()
    factor = meter("factor of C, once", CholeskyFactor.of, moment)
    save_file({str(i): row.contiguous() for i, row in enumerate(factor.rows)}, _factor_file(work, d_in))
    return {"d_in": d_in, "kept_bytes": factor.nbytes}


def memit_part(d_in: int, d_out: int, work: Path, meter: Meter) -> dict[str, Any]:
    """A batch's solve without earlier keys in the bracket, as the paper's MEMIT has it."""
    rows = load_file(_factor_file(work, d_in))  # mapped, not read: a solve would be charged for it
    metric = CovarianceMetric(CholeskyFactor([rows[str(i)].clone() for i in range(len(rows))]), LAMBDA)
    del rows
    history = KeyHistory.empty(d_in, metric, torch.device("cpu"))
    keys, residuals = SyntheticKeys(d_in, 1).draw(BATCH), torch.randn(d_out, BATCH)
    meter.often("MEMIT solve", _solve, history, keys, residuals)
    return {"d_in": d_in, "kept_bytes": history.nbytes}


def alphaedit_part(d_in: int, d_out: int, earlier: int, meter: Meter) -> dict[str, Any]:
    """A batch's solve after so many earlier keys, and taking its own in; rebuilding it all is what a resume does."""
    synthetic = SyntheticKeys(d_in)
    left_out = d_in - int(SHARE * d_in)
    metric = NullSpaceMetric(NullSpace(synthetic.directions(0, left_out).float(), complement=True), L2)
    old = synthetic.draw(earlier)
    history = meter(f"rebuilding {earlier:,} keys' factor", KeyHistory, old, metric)
    del old
    keys, residuals = synthetic.draw(BATCH), torch.randn(d_out, BATCH)
    meter.often(f"AlphaEdit solve after {earlier:,}", _solve, history, keys, residuals)
    meter.often(f"taking {BATCH} keys in after {earlier:,}", history.extended, keys)
    return {"d_in": d_in, "null_space_rank": d_in - left_out, "kept_bytes": history.nbytes}


def _solve(history: KeyHistory, keys: Tensor, residuals: Tensor) -> LowRankUpdate:
    adjusted = adjusted_keys(history, keys)
    if adjusted is None:
        raise SystemExit("the factored solve failed")
    return LowRankUpdate(residuals, adjusted.float())


def _factor_file(work: Path, d_in: int) -> Path:
    return work / f"factor-{d_in}.safetensors"


def run_part(name: str, part: str, work: Path) -> dict[str, Any]:
    """One measurement, in this process."""
    model, meter = MODELS[name], Meter()
    d_out, d_in = model.config["hidden_size"], model.config["intermediate_size"]
    torch.manual_seed(0)
    kind, _, rest = part.partition(", ")
    with torch.no_grad():
        if kind == "weight":
            facts = weight_part(model, getattr(torch, rest), meter)
        elif part == "factor of C":
            facts = factor_part(d_in, work, meter)
        elif part == "MEMIT":
            facts = memit_part(d_in, d_out, work, meter)
        else:
            facts = alphaedit_part(d_in, d_out, int(part.rsplit(" ", maxsplit=1)[1]), meter)
    load = round(os.getloadavg()[0], 1)
    return {"model": name, "part": part, "threads": torch.get_num_threads(), "load": load,
            "when": datetime.now(timezone.utc).isoformat(timespec="minutes"), **facts, "figures": meter.figures}


# --- many of them -------------------------------------------------------------------------------------------

def read_filed(path: Path) -> dict[str, Any]:
    """What was measured before; an empty record where nothing was."""
    if not path.exists():
        return {"machine": machine(), "measurements": []}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _missing(filed: dict[str, Any], models: list[str], parts: list[str]) -> Iterator[tuple[str, str]]:
    """Parts still to be measured, round by round, so that a slow hour does not fall on one of them."""
    done = [(one["model"], one["part"]) for one in filed["measurements"]]
    for turn in range(TURNS):
        for name in models:
            yield from ((name, part) for part in parts if done.count((name, part)) <= turn < PARTS[part])


def measure(options: argparse.Namespace) -> None:
    """Measure what is missing until the minutes are over."""
    stop = time.monotonic() + 60 * options.minutes
    options.work_dir.mkdir(parents=True, exist_ok=True)
    filed = read_filed(options.output)
    todo = list(_missing(filed, options.models, options.parts))
    for position, (name, part) in enumerate(todo):
        if time.monotonic() > stop:
            print(f"{len(todo) - position} of {len(todo)} measurements are missing: run this again")
            return
        d_in = MODELS[name].config["intermediate_size"]
        if part == "MEMIT" and not _factor_file(options.work_dir, d_in).exists():
            raise SystemExit(f"{_factor_file(options.work_dir, d_in)} is missing: measure 'factor of C' first")
        done = subprocess.run([sys.executable, __file__, "one", "--model", name, "--part", part, "--work-dir",
                               str(options.work_dir)], env=os.environ | _STEADY, capture_output=True, text=True,
                              check=False)
        if done.returncode:
            raise SystemExit(f"{name}, {part} failed:\n{done.stderr}")
        found = json.loads(done.stdout)
        filed["measurements"].append(found)
        with atomic_write(options.output) as temporary:
            temporary.write_text(json.dumps(filed, indent=1) + "\n", encoding="utf-8")
        said = (f"{step} {runs[-1]['seconds']:.2f} s {runs[-1]['peak_bytes'] / 1e6:.0f} MB"
                for step, runs in found["figures"].items())
        print(f"{name}, {part}: {', '.join(said)}", flush=True)
    print("nothing is missing")


def _spread(seconds: list[float]) -> str:
    once = f"{statistics.median(seconds):.3g}"
    return once if len(seconds) == 1 else f"{once} ({min(seconds):.3g} to {max(seconds):.3g})"


def _by_model(filed: dict[str, Any]) -> dict[str, dict[str, list[dict[str, float]]]]:
    """All runs of a step, by model and step."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for one in filed["measurements"]:
        suffix = f" ({one['part'].partition(', ')[2]})" if one["part"].startswith("weight") else ""
        for step, runs in one["figures"].items():
            found.setdefault(one["model"], {}).setdefault(step + suffix, []).extend(runs)
    return found


def markdown(filed: dict[str, Any]) -> str:
    """A row for each step; for each model seconds of a core, of the clock on this shared machine, and memory."""
    by_model = _by_model(filed)
    names = list(by_model)
    titles = " | ".join(f"{name}, core s | clock s | MB more" for name in names)
    lines = [f"| one layer, a batch of {BATCH} | {titles} |", "| --- |" + " ---: | ---: | ---: |" * len(names)]
    for step in dict.fromkeys(step for steps in by_model.values() for step in steps):
        cells = []
        for name in names:
            runs = by_model[name].get(step, [])
            seconds, used, peaks = ([run[what] for run in runs] for what in ("seconds", "cpu_seconds", "peak_bytes"))
            cells += [_spread(used), f"{statistics.median(seconds):.3g}",
                      f"{statistics.median(peaks) / 1e6:,.0f}"] if runs else [""] * 3
        lines.append(f"| {step} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    several = commands.add_parser("measure", help="what is missing")
    several.add_argument("--models", nargs="+", choices=MODELS, default=list(MEASURED))
    several.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    several.add_argument("--minutes", type=float, default=9.0, help="after which no further one is started")
    single = commands.add_parser("one", help="one measurement, printed as JSON")
    single.add_argument("--model", choices=MODELS, required=True)
    single.add_argument("--part", choices=PARTS, required=True)
    table = commands.add_parser("table", help="what was measured, in Markdown")
    for command in (several, single):
        command.add_argument("--work-dir", type=Path, default=Path("/tmp/sphere-scaling"), help="keeps C's factors")
    for command in (several, table):
        command.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.command == "measure":
        measure(options)
    elif options.command == "one":
        print(json.dumps(run_part(options.model, options.part, options.work_dir)))
    else:
        filed = read_filed(options.output)
        print(markdown(filed))


if __name__ == "__main__":
    main()
