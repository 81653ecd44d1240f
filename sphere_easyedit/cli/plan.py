"""``plan``: estimate what a run needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from rich.filesize import decimal
from rich.table import Column, Table
from rich.text import Text

from .common import hide_bars_of_transformers, set_up
from .options import AsJson, DataOptions, MethodOptions, option, with_option_groups

if TYPE_CHECKING:
    from ..planning import Plan


@dataclass(frozen=True, kw_only=True)
class PlanData(DataOptions):
    """The facts to plan for."""

    num_edits: Annotated[int, option("Number of facts.")]


@with_option_groups
def plan(
    method: MethodOptions,
    data: PlanData,
    calibrate: Annotated[bool, option("Measure the speed of this machine for some seconds, if the model is here.",
                                      panel="Method")] = True,
    gflops: Annotated[float | None, option("Speed in 1e9 FLOP/s, for a rough time where nothing is measured.",
                                           panel="Method")] = None,
    as_json: AsJson = False,
) -> None:
    """Estimate what a run will need - time, memory, disk, downloads - before anything starts."""
    consoles = set_up()
    from ..planning import PlanSettings, make_plan

    hide_bars_of_transformers()
    settings = PlanSettings(data.num_edits, data.batch_size, data.dataset, data.data, data.seed, method.dtype,
                            calibrate=calibrate, gflops=gflops)
    planned = make_plan(method.load(), settings)
    if as_json:
        print(json.dumps(planned.to_dict(), indent=2))
        return
    consoles.out.print(_table(planned))
    for line in (f"Time: {planned.method}.", *planned.notes):
        consoles.print_line(line)


def _table(plan: Plan) -> Table:
    table = Table("", Column("item", overflow="fold"), Column("need", justify="right"), Column("", justify="right"),
                  Column("", overflow="fold"), title=f"{plan.num_edits} edits in batches of {plan.batch_size}, "
                                                     f"{plan.model} on {plan.device}")
    sections: dict[str, list[tuple[str, ...]]] = {
        "Time": [*((part.name, _duration(part.seconds), "" if part.share is None else f"{part.share:.0%}")
                   for part in plan.time), ("all", _duration(plan.seconds))],
        "Memory": [*((part.name, decimal(part.bytes), part.place,
                      "; ".join(word for word in ("" if part.lasting else "temporary", part.note) if word))
                     for part in plan.memory),
                   *(("at the peak", decimal(size), place) for place, size in plan.peak_bytes.items())],
        "Disk": [(files.name, decimal(files.bytes), "there" if files.present else "new", files.path)
                 for files in plan.disk],
        "Downloads": [(one.name, "?" if one.bytes is None else decimal(one.bytes), "", one.note)
                      for one in plan.downloads] or [("nothing",)],
    }
    for section, rows in sections.items():
        for number, cells in enumerate(rows):
            table.add_row("" if number else section, *map(Text, cells))
        table.add_section()
    return table


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
