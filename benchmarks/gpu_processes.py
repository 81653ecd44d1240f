"""The GPU check's last part: several processes, each with a device of its own, edit to one process's weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from gpu_parity import golden_tokenizer, tiny_model, tiny_settings
from gpu_rows import ROOT, Row, compared, difference, left_out

PART = "processes"
_EDITS, _BATCH = 8, 4
_PATIENCE = 480  # seconds


def processes(device: torch.device, count: int) -> Iterator[Row]:
    """So many processes against one: ``accelerate launch`` and nccl on GPUs; gloo on the CPU.

    On one machine's CPU accelerate launches one process whatever is asked for, so torch's own launcher does it there.
    """
    what = f"AlphaEdit + SPHERE on a tiny Llama by {'accelerate launch' if device.type == 'cuda' else 'torchrun'}"
    if count < 2:
        why = f"{torch.cuda.device_count()} GPUs" if device.type == "cuda" else "not asked for: --processes 2"
        yield left_out(PART, what, why)
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model().save_pretrained(folder / "tiny")
        golden_tokenizer().save_pretrained(folder / "tiny")
        settings = tiny_settings(folder, model_name=str(folder / "tiny"), base_alg="AlphaEdit",
                                 device="cpu" if device.type == "cpu" else None)
        (folder / "tiny.yaml").write_text(yaml.safe_dump(settings.to_dict()), encoding="utf-8")
        alone = _edited(folder, "alone", [sys.executable], "")
        if device.type == "cuda":
            launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1",
                        "--mixed_precision", "no", "--dynamo_backend", "no", "--num_processes", str(count)]
        else:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        together = _edited(folder, "together", launcher, f"{count} processes hold the same weights")
    if isinstance(alone, str) or isinstance(together, str):
        said = alone if isinstance(alone, str) else together
        yield Row(PART, f"{what}, {count}", str(said), "a finished run", "FAILED")
        return
    worst = max(difference(together[name], weight) for name, weight in alone.items())
    yield compared(PART, f"{what}: weights of {count} processes against one's", worst, 1e-5)


def _edited(folder: Path, run: str, launcher: list[str], says: str) -> dict[str, Tensor] | str:
    """The edited weights that a run left, or why it is not to be trusted.

    Args:
        says: what it must have logged.
    """
    command = [*launcher, "-m", "sphere_easyedit", "edit", "--hparams", str(folder / "tiny.yaml"), "--dataset", "demo",
               "--num-edits", str(_EDITS), "--batch-size", str(_BATCH), "--seed", "0", "--output", str(folder / run)]
    try:
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                              text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return f"not finished after {_PATIENCE} s"
    found = folder / run / "checkpoints" / f"weights-{_EDITS}.safetensors"
    if done.returncode or not found.exists():
        return (done.stderr.strip().splitlines() or ["nothing said"])[-1].replace("|", "/")
    if says not in " ".join(done.stderr.split()):  # lines are broken at the terminal's width
        return f"the run did not say that {says}"
    return load_file(found)
