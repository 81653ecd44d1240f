"""Work of each process where several edit one model, counted in FLOPs: it should fall as one over their number.

    python benchmarks/processes.py --data counterfact.json --text wikitext.txt --output docs/results/processes.json
    python benchmarks/processes.py --table docs/results/processes.json

Real records and a real model; the processes are torchrun's, by gloo on a CPU. Counted are matrix products and attention
(torch's FlopCounterMode) of what is shared out (target values, keys, scores) and of what the leader does alone (solves,
projection, energies). Time is not measured: two cores can't show it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from common import machine
from sphere_easyedit import SPHEREHyperParams
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.models.distributed import ProcessInfo, Replicas
from sphere_easyedit.models.loading import load_model
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.sequential import RunSettings, run_sequential
from sphere_easyedit.utils.files import atomic_write

ALONE = "alone"
KINDS = {"_optimise": "target values", "_open": "keys", "_read": "keys", "_advance": "keys", "_read_all": "keys",
         "_score_share": "scores"}


def main() -> None:
    """Count, for each number of processes, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hparams", default="AlphaEdit/smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--text", type=Path, help="what statistics are collected from")
    parser.add_argument("--stats-dir", type=Path, default=Path("data/stats"))
    parser.add_argument("--num-edits", type=int, default=32)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, help="print what such a file holds")
    arguments = parser.parse_args()
    if arguments.table is not None:
        sys.stdout.write(table(json.loads(arguments.table.read_text(encoding="utf-8"))))
    elif "RANK" in os.environ:
        count(arguments)
    else:
        found: dict[str, Any] = {"machine": machine(), "command": " ".join(sys.argv), "processes": {}}
        for size in arguments.processes:
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                                str(size), *sys.argv, "--output", folder], check=True)
                found["processes"][size] = [json.loads((Path(folder) / f"{index}.json").read_text())
                                            for index in range(size)]
        with atomic_write(arguments.output) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def count(arguments: argparse.Namespace) -> None:
    """This process's share of a run, in FLOPs by kind of work, as a file in the folder ``output``."""
    hparams = SPHEREHyperParams.from_dict({
        **SPHEREHyperParams.from_hparams(arguments.hparams).to_dict(), "device": "cpu", "context_templates": [],
        "v_num_grad_steps": 10, "v_lr": 1.0, "mom2_dataset": str(arguments.text), "mom2_n_samples": 1000,
        "stats_dir": str(arguments.stats_dir)})
    model, tok = load_model(hparams.model_name, "cpu", "float32")
    process = ProcessInfo.join("cpu")
    replicas = Counted(hparams.editable(model), process)
    if process.rank:
        replicas.follow()
    else:
        with replicas.leading(), tempfile.TemporaryDirectory() as folder, FlopCounterMode(display=False) as counter:
            records = load_records("counterfact", arguments.data, arguments.num_edits, 0)
            run_sequential(model, tok, records, hparams, RunSettings(
                Path(folder) / "run", arguments.num_edits, measure=MeasureSettings(before=False)))
        # Jobs are counted within, by counters of their own, and by this one too.
        replicas.flops[ALONE] = counter.get_total_flops() - replicas.flops.total()
    (arguments.output / f"{process.rank}.json").write_text(json.dumps(replicas.flops))


class Counted(Replicas):
    """Replicas that count the work of this process's jobs."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.flops: Counter[str] = Counter()

    def _attempt(self, job: Any, share: tuple[Any, ...]) -> Any:
        with FlopCounterMode(display=False) as counter:
            found = super()._attempt(job, share)
        self.flops[KINDS.get(job.__name__, job.__name__)] += counter.get_total_flops()
        return found


def table(found: dict[str, Any]) -> str:
    """Markdown: of each kind of work, what the busiest process does as a share of what one process does."""
    by_size = {int(size): ones for size, ones in found["processes"].items()}
    kinds = [*dict.fromkeys(kind for kind in KINDS.values()), ALONE]
    lines = ["| processes | " + " | ".join(kinds) + " |", "| ---: |" + " ---: |" * len(kinds)]
    whole = {kind: sum(one.get(kind, 0) for one in by_size[1]) for kind in kinds}
    for size, ones in by_size.items():
        cells = []
        for kind in kinds:
            most = max(one.get(kind, 0) for one in ones)
            cells.append(f"{most / 1e9:,.0f} ({most / whole[kind]:.1%})")
        lines.append(f"| {size} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
