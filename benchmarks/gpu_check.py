"""What to run first on a machine with a GPU: parity, speed, memory and several processes, in one table to send back.

    run_scripts/gpu_check.sh                                          # makes .venv, checks all, some minutes
    python benchmarks/gpu_check.py --output gpu.md                    # the same where the package is installed
    python benchmarks/gpu_check.py --device cpu                       # small: the check itself, on any machine

Exit status 1 where a row FAILED. Nothing is downloaded: models have random weights, and the golden ones are in tests/.
See docs/GPU.md.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported

import torch
import transformers

from gpu_parity import parity
from gpu_processes import processes
from gpu_rows import FULL, ROOT, SMALL, Row
from gpu_speed import models, speed
from sphere_easyedit.utils.files import atomic_write

PARTS = ("parity", "speed", "models", "processes")


def machine(device: torch.device) -> list[tuple[str, str]]:
    """What the figures belong to."""
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True,
                            check=False).stdout.strip()
    found = [("commit", commit or "not a git checkout"), ("date", date.today().isoformat()),
             ("torch", torch.__version__), ("transformers", transformers.__version__),
             ("Python", platform.python_version()), ("system", f"{platform.system()} {platform.machine()}, "
                                                     f"{os.cpu_count()} CPUs, {torch.get_num_threads()} threads")]
    if device.type != "cuda":
        return [("device", "cpu: no figure here says anything of a GPU"), *found]
    about = torch.cuda.get_device_properties(device)
    return [("GPU", f"{torch.cuda.device_count()} x {about.name}, {about.total_memory / 1e9:.0f} GB, compute "
                    f"capability {about.major}.{about.minor}"),
            ("CUDA", f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"),
            ("float32 products", torch.get_float32_matmul_precision()), *found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cuda, cuda:1 or cpu; the GPU if not given")
    parser.add_argument("--size", choices=("small", "full"), help="full on a GPU, small on the CPU if not given")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--processes", type=int, help="as many as there are GPUs if not given; on the CPU none")
    parser.add_argument("--output", type=Path, help="file for the table, which is printed in any case")
    options = parser.parse_args()
    if options.device is None and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU here. Is the driver there (nvidia-smi), and was torch "
                     f"built for CUDA (this one: {torch.version.cuda})? To try the check itself: --device cpu")
    device = torch.device(options.device or "cuda")
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    sizes = {"small": SMALL, "full": FULL}[options.size or ("full" if device.type == "cuda" else "small")]
    count = options.processes
    if count is None:
        count = torch.cuda.device_count() if device.type == "cuda" else 1
    transformers.utils.logging.disable_progress_bar()
    checks: dict[str, Callable[[], Iterator[Row]]] = {
        "parity": lambda: parity(device, sizes), "speed": lambda: speed(device, sizes),
        "models": lambda: models(device, sizes), "processes": lambda: processes(device, count)}
    rows = []
    for part in options.parts:
        try:
            for row in checks[part]():
                rows.append(row)
                print(f"{row.status:>9}  {row.what}: {row.found}", file=sys.stderr, flush=True)
        except Exception as error:  # the other parts are worth having all the same
            traceback.print_exc()
            said = " ".join(str(error).split())[:200].replace("|", "/")
            rows.append(Row(part, type(error).__name__, said, "", "FAILED"))
    failed = sum(row.status == "FAILED" for row in rows)
    table = "\n".join([
        "## GPU check of sphere-easyedit", "", *(f"- {name}: {value}" for name, value in machine(device)),
        f"- command: gpu_check.py {' '.join(sys.argv[1:])}", f"- {len(rows)} rows, {failed} FAILED", "",
        "| part | what | found | held against | |", "| --- | --- | ---: | --- | --- |",
        *(row.markdown() for row in rows), ""])
    print(table)
    if options.output is not None:
        with atomic_write(options.output) as temporary:
            temporary.write_text(table, encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
