"""Thousands of edits with a fault every few batches, against the same edits left alone: same bits.

    python benchmarks/soak.py --edits 3000 --method AlphaEdit --output soak
    python benchmarks/soak.py --edits 20000 --without-faults --output long    # only what a batch costs along the run

A tiny model (4 blocks, 48 wide) edits made-up facts in batches of ten, twice. The second time, in about every other
batch a fault is drawn and made to happen: the solve fails, a target value turns nan, a callback fails, an interrupt
comes in mid-batch, the disk is full while the checkpoint is written, or the checkpoint's file is cut off after it was
written. Each ends the process's run, as it would; a new model is loaded and the run resumed. Prints a line of JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import gc
import json
import logging
import random
import re
import resource
import statistics
import sys
import time
from collections import Counter
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from sphere_easyedit import EditCallback, EditEvent, SPHEREHyperParams
from sphere_easyedit.datasets.records import EditRecord
from sphere_easyedit.editing import checkpoints, engines
from sphere_easyedit.runs import sequential
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.sequential import RunSettings, run_sequential

TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "llama" / "tiny-llama"
BATCH = 10
KINDS = ("solve fails", "nan", "callback fails", "interrupt", "disk full", "checkpoint cut off")


def facts(count: int) -> list[EditRecord]:
    """Made-up facts, no two alike."""
    drawn = random.Random(0)
    cities = ("Rome", "Paris", "London", "Berlin", "Madrid", "Vienna")
    return [EditRecord(number, "{} was born in", f"Person {number} {drawn.choice('ABCDEFG')}", drawn.choice(cities),
                       None, (), (), (), "facts") for number in range(count)]


def model() -> nn.Module:
    """The tiny model, always the same."""
    config = AutoConfig.for_model("llama", vocab_size=1500, hidden_size=48, intermediate_size=80, num_hidden_layers=4,
                                  num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
                                  bos_token_id=0, eos_token_id=0, initializer_range=0.15)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()  # type: ignore[no-any-return]


class Fault(EditCallback):
    """Makes a fault of one kind happen in the batch that is so many batches away, and watches memory."""

    def __init__(self, kind: str, batches: int, folder: Path, memory: dict[int, float]) -> None:
        self.kind, self.left, self.folder, self.memory = kind, batches, folder, memory
        self.ended: list[float] = []  # CPU seconds of the process when each batch ended
        self.stack = ExitStack()

    def on_batch_start(self, event: EditEvent) -> None:
        self.left -= 1
        if self.left == 0:
            self._arrange()

    def on_batch_end(self, event: EditEvent) -> None:
        self.memory[event.num_edits] = resident_megabytes()
        self.ended.append(time.process_time())
        if self.left == 0 and self.kind == "callback fails":
            raise RuntimeError("a callback's own trouble")
        if self.left == 0 and self.kind == "interrupt":
            raise KeyboardInterrupt

    def _arrange(self) -> None:
        whole, save = engines.solve_batch, sequential.save_checkpoint

        def spoilt(*given: Any) -> Any:
            found = whole(*given)
            for update in found.updates.values():
                (update if isinstance(update, torch.Tensor) else update.values).fill_(float("nan"))
            return found

        def torn(*given: Any) -> None:
            save(*given)
            numbers = checkpoints.resumable(self.folder / "checkpoints")
            newest = checkpoints.weights_path(self.folder / "checkpoints", numbers[-1])
            newest.write_bytes(newest.read_bytes()[:-7])
            raise KeyboardInterrupt

        faults: dict[str, Any] = {
            "solve fails": (engines, "solve_batch", mock.Mock(side_effect=RuntimeError("singular"))),
            "nan": (engines, "solve_batch", spoilt),
            "disk full": (checkpoints, "save_file", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left"))),
            "checkpoint cut off": (sequential, "save_checkpoint", torn)}
        if self.kind in faults:
            self.stack.enter_context(mock.patch.object(*faults[self.kind]))


def resident_megabytes() -> float:
    """Memory of this process that is in RAM now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def held_megabytes() -> float:
    """``resident_megabytes`` without what nothing holds any more (glibc keeps what was freed)."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return resident_megabytes()


def mean(numbers: list[float]) -> float:
    return round(sum(numbers) / len(numbers), 1)


def edit(folder: Path, records: list[EditRecord], hparams: SPHEREHyperParams, tok: PreTrainedTokenizerBase,
         fault: Fault) -> dict[str, Any]:
    """One process's part of a run: to its end, or to its fault."""
    settings = RunSettings(folder, BATCH, measure=MeasureSettings(before=False, after=False), resume=True,
                           keep_checkpoints=2)
    with fault.stack:
        return run_sequential(model(), tok, records, hparams, settings, [fault]).summary


def mend(folder: Path, error: ValueError) -> None:
    """Do what the message of a damaged checkpoint says."""
    found = re.match(r"(\S+) is damaged", str(error))
    if found is None:
        raise error
    Path(found[1]).unlink()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--edits", type=int, default=3000)
    parser.add_argument("--method", default="AlphaEdit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-faults", action="store_true", help="leave out the second, faulty run")
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    records, tok = facts(given.edits), AutoTokenizer.from_pretrained(TOKENIZER)
    hparams = SPHEREHyperParams.from_dict({
        "model_name": "tiny", "base_alg": given.method, "layers": [1, 2], "v_num_grad_steps": 3, "v_lr": 0.5,
        "v_loss_layer": 3, "v_weight_decay": 0.001, "clamp_norm_factor": 4.0, "kl_factor": 0.0625, "L2": 0.1,
        "mom2_update_weight": 20.0, "nullspace_share": 0.6, "mom2_dataset": "generated", "mom2_n_samples": 12,
        "stats_dir": str(given.output / "stats"), "context_templates": ["{}"]})
    drawn, started = random.Random(given.seed), time.monotonic()
    left_alone: dict[int, float] = {}
    no_fault = Fault("none", 0, given.output / "whole", left_alone)
    whole = edit(given.output / "whole", records, hparams, tok, no_fault)
    seconds = time.monotonic() - started
    if given.without_faults:
        took = [later - earlier for earlier, later in pairwise(no_fault.ended)]  # checkpoints and logs included
        resident = list(left_alone.values())
        for part in range(10):
            chosen = slice(part * len(took) // 10, (part + 1) * len(took) // 10)
            print(json.dumps({"edits": (chosen.stop + 1) * BATCH, "resident_mb": mean(resident[chosen]),
                              "cpu_seconds_a_batch": round(statistics.median(took[chosen]), 3),
                              "slowest": round(max(took[chosen]), 3)}), flush=True)
        return

    folder, happened, memory = given.output / "faulty", Counter[str](), dict[int, float]()
    held: list[float] = []
    summary = None
    while summary is None:
        held.append(held_megabytes())
        kind = drawn.choice(KINDS)
        fault = Fault(kind, drawn.randint(1, 5), folder, memory)
        try:
            summary = edit(folder, records, hparams, tok, fault)
        except (ValueError, RuntimeError, OSError, KeyboardInterrupt) as error:
            if fault.left > 0:  # none was due yet: the run could not be taken up
                if not isinstance(error, ValueError):
                    raise
                mend(folder, error)
                happened["mended checkpoints"] += 1
            else:
                happened[kind] += 1
    files = ("edits.jsonl", "energy.csv", "spaces.csv", "neurons.safetensors")
    by_batch = [memory[edits] for edits in sorted(memory)]
    print(json.dumps({
        "method": given.method, "edits": summary["num_edits"], "faults": dict(happened),
        "same_weights": summary["weights_sha256"] == whole["weights_sha256"],
        "same_files": {name: same(given.output, name) for name in files},
        "resident_mb_early": mean(by_batch[10:30]), "resident_mb_late": mean(by_batch[-20:]),
        "resumptions": len(held) - 1, "held_mb_early": mean(held[5:15]), "held_mb_late": mean(held[-10:]),
        "seconds_left_alone": round(seconds), "seconds_in_all": round(time.monotonic() - started)}))
    sys.exit(0 if summary["weights_sha256"] == whole["weights_sha256"] else 1)


def same(folder: Path, name: str) -> bool:
    """Whether a file of both runs is the same, but for times."""
    one, other = ((folder / run / name).read_bytes() for run in ("whole", "faulty"))
    if name != "edits.jsonl":
        return one == other

    def timeless(text: bytes) -> list[Any]:
        return [json.loads(line) | {"seconds": 0, "wall_seconds": 0} for line in text.splitlines()]

    return timeless(one) == timeless(other)


if __name__ == "__main__":
    main()
