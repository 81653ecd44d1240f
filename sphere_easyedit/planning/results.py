"""What is asked of a plan and what it says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..evaluation.datasets import DatasetName

Place = Literal["device", "host"]


@dataclass(frozen=True)
class PlanSettings:
    """What is planned, besides the hyperparameters: as ``edit`` takes it.

    Attributes:
        examples: continuations that the run shows, before and after.
        calibrate: measure on this machine, where the model is here.
        gflops: rate in 1e9 FLOP/s for whatever was not measured; None for no time.
        rates: stated rates in 1e9 FLOP/s by kind of work (see ``times.PARTS``), in place of measured ones and
            ``gflops``: a GPU runs half-precision products, float64 solves and eigenproblems at rates far apart.
        processes: that share out each batch's facts, the evaluation and the statistics' text; each has the whole model.
    """

    num_edits: int
    batch_size: int = 100
    dataset: DatasetName = "demo"
    data: Path | None = None
    seed: int | None = None
    dtype: str | None = None
    examples: int = 3
    calibrate: bool = True
    gflops: float | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    processes: int = 1

    def __post_init__(self) -> None:
        for name in ("num_edits", "batch_size", "processes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.gflops is not None and not (math.isfinite(self.gflops) and self.gflops > 0):
            raise ValueError(f"gflops is {self.gflops}: give a rate above 0, in 1e9 FLOP/s")
        for kind, rate in self.rates.items():
            if not (math.isfinite(rate) and rate > 0):
                raise ValueError(f"the rate of {kind} is {rate}: give one above 0, in 1e9 FLOP/s")


@dataclass(frozen=True)
class TimePart:
    """One part of a run; ``seconds`` and ``share`` are None where no rate is known."""

    name: str
    flops: float
    seconds: float | None
    share: float | None
    note: str = ""


@dataclass(frozen=True)
class MemoryItem:
    """Memory that lasts from batch to batch, or that a phase takes for itself (``lasting`` false)."""

    name: str
    place: Place
    bytes: int
    lasting: bool
    note: str = ""


@dataclass(frozen=True)
class DiskItem:
    """Files; ``present`` ones are there already."""

    name: str
    path: str
    bytes: int
    present: bool


@dataclass(frozen=True)
class Download:
    """What has to come over the network; ``bytes`` is None where that can't be said."""

    name: str
    bytes: int | None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """All of it. ``seconds`` and the shares within ``time`` are None where no rate is known.

    With several processes, ``time`` is the busiest one's, and ``memory`` is a process's.
    """

    model: str
    device: str
    num_edits: int
    batch_size: int
    method: str
    seconds: float | None
    time: Sequence[TimePart]
    memory: Sequence[MemoryItem]
    peak_bytes: Mapping[str, int]
    disk: Sequence[DiskItem]
    downloads: Sequence[Download]
    notes: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON takes it."""
        return asdict(self)
