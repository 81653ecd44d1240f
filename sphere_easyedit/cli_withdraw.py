"""The command that takes single facts out of a run's edited weights: ``withdraw``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from .export import EditedWeights
    from .withdrawal import Withdrawal


def withdraw(
    run: Annotated[Path, typer.Argument(help="Run directory, of `edit --keep-factors`; left as it is.")],
    case: Annotated[list[str], typer.Option(help="case_id of a fact to withdraw; repeatable.")],
    output: Annotated[Path, typer.Option(help="Folder to write, new or empty: deltas with the edited weights without "
                                         "these facts, for `apply`.")],
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more of what is going on.")] = False,
) -> None:
    """Write a run's edited weights without some of its facts, and say what that leaves of them and does to others."""
    from .cli.common import load, set_up

    console = set_up(verbose).out
    from .export import ExportableRun, export_deltas
    from .export.folders import check_free

    check_free(output)
    edited_run = ExportableRun(run)
    # On the CPU, whatever the run was on: bits of weights don't depend on it.
    model, _ = load(edited_run.hparams.model_name, "cpu", edited_run.dtype)
    edited, done = _without(edited_run.read(model), edited_run.hparams.layers, run, case)
    export_deltas(output, edited, exact=True)
    console.print(_statement(done))
    console.print(Text(f"{len(done.facts)} facts withdrawn, {len(done.staying)} stay; deltas in {output}"),
                  soft_wrap=True)


def _without(edited: EditedWeights, layers: list[int], run: Path, cases: list[str]
             ) -> tuple[EditedWeights, Withdrawal]:
    """The edited weights without these cases, described as such."""
    from .evaluation.run_directory import RunDirectory
    from .withdrawal.factors import FACTORS, read_batches
    from .withdrawal.facts import read_past, still_true
    from .withdrawal.withdrawing import weights_without

    changes = dict(zip(layers, edited.changes, strict=True))
    originals = {layer: change.before.T if change.transposed else change.before for layer, change in changes.items()}
    weights = {layer: change.after.T if change.transposed else change.after for layer, change in changes.items()}
    origin, folder = edited.provenance, RunDirectory(run).place(FACTORS)
    batches = read_batches(folder, origin.num_edits, layers)
    past = still_true(read_past(folder), origin.num_edits, weights)
    known = {str(case_id): case_id for batch in batches for case_id in batch.case_ids}
    left, done = weights_without(originals, weights, batches, past, [known.get(case, case) for case in cases])
    after = {layer: left[layer].T if change.transposed else left[layer] for layer, change in changes.items()}
    names = ", ".join(str(fact.case_id) for fact in done.facts)
    origin = replace(origin, num_edits=len(done.staying), results=None,  # which were of the run's own weights
                     method=f"{origin.method}; withdrawn afterwards: case_id {names}")
    return replace(edited, provenance=origin, changes=tuple(
        replace(change, after=after[layer].contiguous()) for layer, change in changes.items())), done


def _statement(done: Withdrawal) -> Table:
    table = Table(Column("layer", justify="right"), "case_id", *(Column(name, justify="right") for name in (
        "left at its key", "others: median", "others: largest", "at case_id", "taken", "rounding")))
    for layer in done.layers:
        worst = "-" if layer.largest_at is None else str(done.staying[layer.largest_at].case_id)
        for row, (fact, residual) in enumerate(zip(done.facts, layer.residuals, strict=True)):
            of_layer = (f"{layer.median:.2g}", f"{layer.largest:.2g}", worst, f"{layer.taken:.4f}",
                        f"{layer.rounding:.1e}") if row == 0 else ()
            table.add_row(str(layer.layer) if row == 0 else "", Text(str(fact.case_id)), f"{residual:.2g}",
                          *map(Text, of_layer))
    return table
