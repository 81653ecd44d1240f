"""The command ``remove``: single facts out of a run's edited weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from .export import EditedWeights
    from .removal import Removal


def remove(
    run: Annotated[Path, typer.Argument(help="Run directory of `edit --keep-factors`; left as it is.")],
    case: Annotated[list[str], typer.Option(help="case_id of a fact to remove; repeatable.")],
    output: Annotated[Path, typer.Option(help="New or empty folder for the edited weights without these facts, as "
                                              "deltas for `apply`.")],
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more of what is going on.")] = False,
) -> None:
    """Write a run's edited weights without some of its facts, and say what that leaves of them and does to others."""
    from .cli import _set_up, _without_bars_of_transformers

    console = _set_up(verbose).out
    from .export import ExportableRun, export_deltas
    from .export.folders import check_free
    from .loading import load_model

    check_free(output)
    _without_bars_of_transformers()
    edited_run = ExportableRun(run)
    # On the CPU, whatever the run was on: bits of weights don't depend on it.
    model, _ = load_model(edited_run.hparams.model_name, "cpu", edited_run.dtype)
    edited, done = _without(edited_run.read(model), edited_run.hparams.layers, run, case)
    export_deltas(output, edited, exact=True)
    console.print(_table(done))
    console.print(Text(f"{len(done.facts)} facts removed, {len(done.staying)} stay; deltas in {output}"),
                  soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the command to a command line, and its former name."""
    app.command()(remove)
    app.command("withdraw", hidden=True, deprecated=True)(remove)


def _without(edited: EditedWeights, layers: list[int], run: Path, cases: list[str]) -> tuple[EditedWeights, Removal]:
    from .evaluation.run_directory import RunDirectory
    from .removal.factors import FACTORS, read_batches, read_removals, still_valid
    from .removal.removing import weights_without

    changes = dict(zip(layers, edited.changes, strict=True))
    originals, weights = ({layer: getattr(change, name).T if change.transposed else getattr(change, name)
                           for layer, change in changes.items()} for name in ("before", "after"))
    origin, folder = edited.provenance, RunDirectory(run).place(FACTORS)
    past = still_valid(read_removals(folder), origin.num_edits, weights)
    known = {str(case_id): case_id for batch in read_batches(folder, origin.num_edits, layers)
             for case_id in batch.case_ids}
    left, done = weights_without(originals, weights, folder, origin.num_edits, past,
                                 [known.get(case, case) for case in cases])
    names = ", ".join(str(fact.case_id) for fact in done.facts)
    origin = replace(origin, num_edits=len(done.staying), results=None,  # which were of the run's own weights
                     method=f"{origin.method}; removed afterwards: case_id {names}")
    return replace(edited, provenance=origin, changes=tuple(
        replace(change, after=(left[layer].T if change.transposed else left[layer]).contiguous())
        for layer, change in changes.items())), done


def _table(done: Removal) -> Table:
    table = Table(Column("layer", justify="right"), "case_id", *(Column(name, justify="right") for name in (
        "left at its key", "others: median", "others: largest", "taken", "rounding")))
    for layer in done.layers:
        of_layer = (f"{layer.median:.2g}", f"{layer.largest:.2g}", f"{layer.taken:.4f}", f"{layer.rounding:.1e}")
        for row, (fact, residual) in enumerate(zip(done.facts, layer.residuals, strict=True)):
            table.add_row("" if row else str(layer.layer), Text(str(fact.case_id)), f"{residual:.2g}",
                          *(() if row else of_layer))
    return table
