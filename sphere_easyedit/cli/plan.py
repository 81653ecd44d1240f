"""``plan``: what a run will need."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from .common import hide_bars_of_transformers, set_up
from .options import AsJson, DataOptions, MethodOptions, option, with_option_groups

if TYPE_CHECKING:
    from ..planning import Plan


@dataclass(frozen=True, kw_only=True)
class PlanData(DataOptions):
    """Which facts are planned for."""

    num_edits: Annotated[int, option("Number of facts.")]


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """How fast the work goes."""

    PANEL: ClassVar = "Speed"

    calibrate: Annotated[bool, option("Measure this machine for some seconds, if the model is here.")] = True
    gflops: Annotated[float | None, option("Speed in 1e9 FLOP/s of what is not measured.")] = None
    rate: Annotated[list[str], option("Speed of one kind of work: KIND=GFLOPS, such as projection=700; repeatable.")
                    ] = field(default_factory=list)
    processes: Annotated[int, option("Number of processes that share the facts, each with the whole model.")] = 1


@with_option_groups
def plan(method: MethodOptions, data: PlanData, speed: SpeedOptions, as_json: AsJson = False) -> None:
    """Estimate what a run will need - time, memory, disk, downloads - before anything starts."""
    consoles = set_up()
    from ..planning import PlanSettings, make_plan

    hide_bars_of_transformers()
    settings = PlanSettings(data.num_edits, data.batch_size, data.dataset, data.data, data.seed, method.dtype,
                            calibrate=speed.calibrate, gflops=speed.gflops, rates=dict(map(_rate, speed.rate)),
                            processes=speed.processes)
    planned = make_plan(method.load(), settings)
    if as_json:
        print(json.dumps(planned.to_dict(), indent=2))
        return
    consoles.out.print(_table(planned))
    for line in (f"Time: {planned.method}.", *planned.notes):
        consoles.print_line(line)


def _rate(text: str) -> tuple[str, float]:
    kind, _, number = text.partition("=")
    try:
        return kind.strip(), float(number)
    except ValueError:
        raise ValueError(f"--rate {text!r} is no rate: write KIND=GFLOPS, such as projection=700") from None


def _table(plan: Plan) -> Table:
    table = Table("", Column("item", overflow="fold"), Column("need", justify="right"), Column("", justify="right"),
                  Column("", overflow="fold"), title=f"{plan.num_edits} edits in batches of {plan.batch_size}, "
                                                     f"{plan.model} on {plan.device}")
    first = True

    def add(section: str, item: str, *cells: str) -> None:
        nonlocal first
        table.add_row(section if first else "", *(Text(cell) for cell in (item, *cells)))
        first = False

    for part in plan.time:
        add("Time", part.name, _duration(part.seconds), "" if part.share is None else f"{part.share:.0%}",
            f"{part.flops:.1e} FLOP")
    add("Time", "all", _duration(plan.seconds), "", f"{sum(part.flops for part in plan.time):.1e} FLOP")
    table.add_section()
    first = True
    for memory in plan.memory:
        add("Memory", memory.name, decimal(memory.bytes), memory.place,
            "; ".join(word for word in ("" if memory.lasting else "for a while", memory.note) if word))
    for place, size in plan.peak_bytes.items():
        add("Memory", "at the peak", decimal(size), place, "")
    table.add_section()
    first = True
    for files in plan.disk:
        add("Disk", files.name, decimal(files.bytes), "there" if files.present else "new", files.path)
    table.add_section()
    first = True
    for download in plan.downloads:
        add("Downloads", download.name, "?" if download.bytes is None else decimal(download.bytes), "", download.note)
    if not plan.downloads:
        add("Downloads", "nothing", "", "", "")
    return table


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
