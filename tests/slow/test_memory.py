"""Peak memory of the energy and of stored solver state, measured in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import REPOSITORY

# VmHWM and not ru_maxrss: Linux carries the latter over from the parent process.
ENERGY_PEAK = """
import sys, torch
from sphere_easyedit.core.hyperspherical import hyperspherical_energy
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM"))
dtype = getattr(torch, sys.argv[1])
hyperspherical_energy(torch.randn(300, 200).to(dtype))
weight = torch.empty(4096, 14336, dtype=dtype).normal_()
before = peak()
hyperspherical_energy(weight)
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_at_the_size_of_llama_3_8b(dtype: str) -> None:
    # Blocks that return to the system as they are freed: the peak is then what lives, not what malloc keeps.
    steady = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ENERGY_PEAK, dtype],
        cwd=REPOSITORY,
        env=os.environ | steady,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown = float(done.stdout)
    assert 20 < grown < 400, f"{grown} MB beyond the weight"  # below 20 the measurement itself is broken


# Anonymous memory at its highest, looked at each millisecond: pages of mapped files do not count, the system takes them
# back as it needs them.
STORE_PEAK = """
import sys, threading, time, torch
from pathlib import Path
from sphere_easyedit.methods.tensor_store import TensorStore
from sphere_easyedit.methods.solvers import *
def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon"))
folder, batches = sys.argv[1], int(sys.argv[2])
cpu, width = torch.device("cpu"), 1024
store = TensorStore(0, Path(folder)) if folder else TensorStore()
def keys(count):
    return torch.randn(width, count)
small = NullSpaceMetric(NullSpace(torch.eye(64)[:, :9], True), 1.0)
adjusted_keys(KeyHistory.empty(64, small, cpu), torch.randn(64, 9))  # loads what is loaded once
columns = torch.eye(width)[:, :200].contiguous()
before, peak, running = anonymous(), [0.0], True
def watch():
    while running:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.001)
thread = threading.Thread(target=watch)
thread.start()
space = NullSpace(columns, True).on(cpu, store)
history = KeyHistory.empty(width, NullSpaceMetric(space, 10.0, store), cpu, store)
for _ in range(batches):  # each 1,024 are absorbed
    history = history.extended(keys(256))
assert history._absorbed and adjusted_keys(history, keys(32)) is not None
running = False
thread.join()
print(peak[0] - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_state_in_files_leaves_the_devices_memory_alone(tmp_path: Path) -> None:
    steady = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}

    def grown(folder: Path | str, batches: int) -> float:
        done = subprocess.run([sys.executable, "-c", STORE_PEAK, str(folder), str(batches)], cwd=REPOSITORY,
                              env=os.environ | steady, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return float(done.stdout)

    few, many = grown(tmp_path, 9), grown(tmp_path, 25)  # absorbed twice, and six times
    assert many < few + 4, (few, many)  # 4,096 more keys take 16 MB
    state = (25 * 1024 * 256 * 4 + 1024**2 // 2 * 8) / 2**20  # keys, and half a matrix in float64: 29 MB
    usual = grown("", 25)
    assert usual - many > 0.7 * state, (usual, many)
