"""Settings of a plan and its results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..datasets.loaders import DatasetName
from ..defaults import BATCH_SIZE


@dataclass(frozen=True)
class PlanSettings:
    """The run to plan, besides its hyperparameters.

    ``calibrate`` measures on this machine, if the model is here; ``gflops`` (1e9 FLOP/s) gives a rough time otherwise.
    """

    num_edits: int
    batch_size: int = BATCH_SIZE
    dataset: DatasetName = "demo"
    data: Path | None = None
    seed: int | None = None
    dtype: str | None = None
    calibrate: bool = True
    gflops: float | None = None

    def __post_init__(self) -> None:
        for name in ("num_edits", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.gflops is not None and not (math.isfinite(self.gflops) and self.gflops > 0):
            raise ValueError(f"gflops is {self.gflops}: give a rate above 0, in 1e9 FLOP/s")


@dataclass(frozen=True)
class TimePart:
    """A part of a run. None: unknown."""

    name: str
    seconds: float | None
    share: float | None


@dataclass(frozen=True)
class MemoryItem:
    """Memory held during the whole run (``lasting``), or by one phase alone."""

    name: str
    place: Literal["device", "host"]
    bytes: int
    lasting: bool
    note: str = ""


@dataclass(frozen=True)
class DiskItem:
    """Files; ``present`` ones are on the disk already."""

    name: str
    path: str
    bytes: int
    present: bool


@dataclass(frozen=True)
class Download:
    """A download. None: unknown."""

    name: str
    bytes: int | None
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """The needs of a run. None: unknown."""

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
        """The plan as plain data for JSON."""
        return asdict(self)
