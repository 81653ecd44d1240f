"""``plan``: what a run will need."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from .common import hide_bars_of_transformers, set_up
from .options import AsJson, DataOptions, MethodOptions, option, with_option_groups

if TYPE_CHECKING:
    from ..planning import Plan


@with_option_groups
def plan(
    method: MethodOptions,
    data: DataOptions,
    num_edits: Annotated[int, option("Data", "Number of facts.")],
    calibrate: Annotated[bool, option("Machine", "Measure the speed of this machine for some seconds, if the model is "
                                                "here.")] = True,
    gflops: Annotated[float | None, option("Machine", "Speed in 1e9 FLOP/s of what is not measured.")] = None,
    rate: Annotated[list[str] | None, option("Machine", "Speed of one kind of work: KIND=GFLOPS, such as "
                                                       "projection=700; repeatable.")] = None,
    processes: Annotated[int, option("Machine", "Number of processes that share the facts, each with the whole model.")
                         ] = 1,
    as_json: AsJson = False,
) -> None:
    """Estimate what a run will need - time, memory, disk, downloads - before anything starts."""
    consoles = set_up()
    from ..planning import PlanSettings, make_plan

    hide_bars_of_transformers()
    settings = PlanSettings(num_edits, data.batch_size, data.dataset, data.data, data.seed, method.dtype,
                            calibrate=calibrate, gflops=gflops, rates=dict(map(_rate, rate or ())),
                            processes=processes)
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
