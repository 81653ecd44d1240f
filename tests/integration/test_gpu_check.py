"""``benchmarks/gpu_check.py``, which people with a GPU run first: on the CPU, at small sizes."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers.paths import REPOSITORY

ROOT = REPOSITORY
SCRIPT = ROOT / "benchmarks" / "gpu_check.py"


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The script as a module, with the others beside it."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    names = ("gpu_check", "gpu_rows", "gpu_parity", "gpu_speed", "gpu_processes", "solves", "common",
             "published_models")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    yield importlib.import_module("gpu_check")
    for name in names:
        sys.modules.pop(name, None)


def test_everything_on_the_cpu(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, str(SCRIPT), "--device", "cpu", "--output", str(tmp_path / "table.md")],
                          env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table.strip() == done.stdout.strip()
    assert "no figure here says anything of a GPU" in table
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")][1:]
    assert {row[0] for row in rows if row[0] != "---"} == {"parity", "speed", "memory", "processes"}
    for what in ("HE, 96x320", "rank of the principal space", "MEMIT + SPHERE on a tiny Llama", "golden llama, memit",
                 "golden gpt2, alphaedit", "target values, 4 blocks"):
        assert what in table
    assert "FAILED |" not in table
    assert "0 FAILED" in table


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_to_do(check: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit) as ended:
        check.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "nvidia-smi" in said
    assert "--device cpu" in said


def test_what_fails_shows_and_the_rest_goes_on(check: ModuleType, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(*_: object) -> Iterator[object]:
        yield check.TargetRow("parity", "HE", "1.0e-01", "at most 1e-06", "FAILED")

    def broken(*_: object) -> Iterator[object]:
        raise RuntimeError("CUDA error: out of |memory|")
        yield

    monkeypatch.setattr(check, "parity", wrong)
    monkeypatch.setattr(check, "speed", broken)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--parts", "parity", "speed", "processes"])
    assert check.main() == 1
    table = capsys.readouterr().out
    assert "3 rows, 2 FAILED" in table
    assert "| speed | RuntimeError | CUDA error: out of /memory/ |  | FAILED |" in table
    assert "not asked for" in table


def test_differences_are_held_to_what_is_allowed(check: ModuleType) -> None:
    rows = importlib.import_module("gpu_rows")
    assert rows.compared("p", "w", 1e-5, 1e-5).status == "ok"
    assert rows.compared("p", "w", 2e-5, 1e-5).status == "FAILED"
    assert rows.compared("p", "w", float("nan"), 1e-5).status == "FAILED"
