"""``remove``: remove single facts from a run's edited weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Column, Table
from rich.text import Text

from .common import load, set_up
from .options import NewFolder, RunFolder, Verbose, option

if TYPE_CHECKING:
    from ..export import EditedWeights
    from ..removal import Removal


def remove(run: RunFolder, case: Annotated[list[str], option("case_id of a fact to remove; repeatable.")],
           output: NewFolder, verbose: Verbose = False) -> None:
    """Remove single facts from the edited weights of an `edit --keep-factors` run.

    Writes deltas for `apply`, and shows how much of the removed facts is left, and how far others are moved.
    """
    consoles = set_up(verbose)
    from ..export import ExportableRun, export_deltas
    from ..export.folders import check_free

    check_free(output)
    edited_run = ExportableRun(run)
    # On the CPU, since the device does not change the weights' bits.
    model, _ = load(edited_run.hparams.model_name, "cpu", edited_run.dtype)
    edited, done = _without(edited_run.read(model), edited_run.hparams.layers, run, case)
    export_deltas(output, edited, exact=True)
    consoles.out.print(_table(done))
    consoles.print_line(f"{len(done.facts)} facts removed, {len(done.staying)} stay; deltas in {output}")


def _without(edited: EditedWeights, layers: list[int], run: Path, cases: list[str]) -> tuple[EditedWeights, Removal]:
    from ..removal.factors import FACTORS, read_batches, read_removals, still_valid
    from ..removal.removing import weights_without
    from ..runs.directory import RunDirectory

    changes = dict(zip(layers, edited.changes, strict=True))
    originals, weights = ({layer: getattr(change, name).T if change.transposed else getattr(change, name)
                           for layer, change in changes.items()} for name in ("before", "after"))
    origin, folder = edited.provenance, RunDirectory(run).path_of(FACTORS)
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
