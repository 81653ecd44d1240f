"""``sweep``: run the experiments of one file."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from .common import Consoles, set_up
from .options import Quiet, option, with_option_groups

if TYPE_CHECKING:
    from ..runs.sweep import RunOutcome, Sweep


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Launcher and output of a sweep."""

    PANEL: ClassVar = "Output"

    output: Annotated[Path, option("Folder of the sweep's runs; a sweep that was begun there is continued.")]
    jobs: Annotated[int | None, option("Number of runs at a time on this machine, each in its own process (1 if not "
                                       "given).", min=1, panel="Machine")] = None
    launcher: Annotated[Literal["local", "slurm"], option("local: run on this machine. slurm: submit the runs as jobs "
                                                          "and return.", panel="Machine")] = "local"
    slurm: Annotated[list[str], option("Resource of each job, added to the file's `slurm`: NAME=VALUE, by sbatch's "
                                       "names; repeatable.", panel="Machine")] = field(default_factory=list)
    collect_only: Annotated[bool, option("Start nothing; only write the tables of the runs that are there.",
                                         "--collect-only")] = False
    quiet: Quiet = False

    def __post_init__(self) -> None:
        on_slurm = self.launcher == "slurm"
        if self.slurm and not on_slurm:
            raise ValueError("--slurm sets resources of SLURM jobs: give --launcher slurm, too")
        if self.jobs is not None and on_slurm:
            raise ValueError("--jobs applies to --launcher local: for SLURM give --slurm array_parallelism=NUMBER")


@with_option_groups
def sweep(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="YAML file: methods, SPHERE or not, seeds, gamma, alpha and so on.")],
    options: SweepOptions,
) -> None:
    """Run the experiments of a YAML file, and collect them into one table with paired differences."""
    consoles = set_up(quiet=options.quiet)
    from ..analysis.sweep_table import collect
    from ..runs.sweep import load_sweep

    planned = load_sweep(file, _options_of_edit(context))
    failed = () if options.collect_only else _run(planned, options, consoles)
    for path in collect(options.output).write(options.output):
        consoles.print_line(str(path))
    for outcome in failed:
        consoles.print_line(f"\n{outcome.name} failed ({outcome.log}):\n{outcome.tail}", style="red")
    if failed:
        raise typer.Exit(1)


def _run(planned: Sweep, options: SweepOptions, consoles: Consoles) -> tuple[RunOutcome, ...]:
    """Run or submit the sweep, and return the runs that failed."""
    from ..runs.sweep import parse_slurm, run_sweep, submit_sweep

    def report(name: str, what: str, settled: int, count: int) -> None:
        if not options.quiet:
            consoles.print_line(f"{settled}/{count} {name}: {what}")

    if options.launcher == "local":
        return run_sweep(planned, options.output, options.jobs or 1, report).failed
    submissions = submit_sweep(planned, options.output, {**planned.slurm, **parse_slurm(options.slurm)})
    for number, one in enumerate(submissions, 1):
        status = one.status if one.job is None else f"{one.status} (job {one.job})"
        report(one.name, status, number, len(submissions))
    return ()


def _options_of_edit(context: typer.Context) -> set[str]:
    """Names of the options of ``edit``, which a sweep's file may set."""
    parameters: list[Any] = context.find_root().command.commands["edit"].params  # type: ignore[attr-defined]
    return {name.removeprefix("--") for parameter in parameters
            for name in (*parameter.opts, *parameter.secondary_opts)}
