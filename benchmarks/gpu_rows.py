"""Rows of the GPU check's table, and the sizes at which it runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"

Status = Literal["ok", "FAILED", "measured", "left out"]


@dataclass(frozen=True)
class Row:
    """One line: what was looked at, what was found, what it is held against."""

    part: str
    what: str
    found: str
    against: str
    status: Status

    def markdown(self) -> str:
        return "| " + " | ".join((self.part, self.what, self.found, self.against, self.status)) + " |"


@dataclass(frozen=True)
class Sizes:
    """At which tensors are made.

    Attributes:
        weight: rows and columns of an edited weight.
        solve: width of keys in the comparison with a dense solve.
        earlier, batch: keys.
        edits: of the language model whose target values are timed.
        depth, hidden, inner, vocabulary, dtypes: of it.
        steps: of its target values.
        repeats: of what is timed.
    """

    weight: tuple[int, int]
    solve: int
    earlier: int
    batch: int
    edits: int
    depth: int
    hidden: int
    inner: int
    vocabulary: int
    dtypes: tuple[torch.dtype, ...]
    steps: int
    repeats: int


SMALL = Sizes((96, 320), 192, 60, 10, 4, 4, 48, 96, 1500, (torch.float32,), 3, 2)
# Llama-3-8B's down-projection, and a language model of SmolLM2-135M's shape.
FULL = Sizes((4096, 14336), 2048, 1000, 100, 50, 30, 576, 1536, 49152, (torch.float32, torch.bfloat16), 25, 5)


def compared(part: str, what: str, found: float, allowed: float) -> Row:
    """A difference and what it may be."""
    return Row(part, what, f"{found:.1e}", f"at most {allowed:.0e}", "ok" if found <= allowed else "FAILED")


def measured(part: str, what: str, found: str, against: str = "") -> Row:
    """A figure that nothing is demanded of."""
    return Row(part, what, found, against, "measured")


def left_out(part: str, what: str, why: str) -> Row:
    """What this machine has no means for."""
    return Row(part, what, "", why, "left out")


def difference(found: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference, in float64 on the CPU."""
    found, reference = found.detach().cpu().double(), reference.detach().cpu().double()
    return float((found - reference).norm() / reference.norm())


def wait(device: torch.device) -> None:
    """For all that was started on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
