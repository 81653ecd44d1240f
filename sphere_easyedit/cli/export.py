"""``export``: write a run's edited model or its changes; ``apply``: apply exported changes to the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import typer
from rich.table import Column, Table
from rich.text import Text

from .common import load, set_up
from .options import At, DtypeName, NewFolder, RunFolder, Verbose, option, with_option_groups

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from ..export import EditedWeights
    from ..export.card import LayerError

ShardSize = Annotated[str, option("Maximum size of each file of weights, such as 200MB or 5GB.")]


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to write, and how.

    Raises:
        ValueError: options that do not go together.
    """

    PANEL: ClassVar = "Output"

    output: NewFolder
    kind: Annotated[Literal["model", "deltas", "lora"], option(
        "Export the whole model, the changes made by editing, or these as a LoRA adapter for PEFT.", "--as")] = "model"
    rank: Annotated[int | None, option("Rank of a LoRA adapter (required).", min=1)] = None
    tolerance: Annotated[float | None, option("For deltas: maximum relative error of each parameter's change (1e-4 if "
                                              "not given).")] = None
    exact: Annotated[bool, option("For deltas: store the edited weights in full, so that apply restores them bit for "
                                  "bit.", "--exact")] = False
    dtype: Annotated[DtypeName | None, option("Type of the exported numbers (if not given: the run's for a model, "
                                              "float32 for factors).")] = None
    max_shard_size: ShardSize = "5GB"

    def __post_init__(self) -> None:
        options = {"--rank": (self.rank is not None, "lora"), "--tolerance": (self.tolerance is not None, "deltas"),
                   "--exact": (self.exact, "deltas")}
        for name, (is_given, kind) in options.items():
            if is_given and kind != self.kind:
                raise ValueError(f"{name} has no effect with --as {self.kind}: leave it out")
        if self.exact and self.tolerance is not None:
            raise ValueError("--tolerance and --exact exclude each other: give one")
        if self.kind == "lora" and self.rank is None:
            raise ValueError("--as lora needs --rank: the run's number of edits gives an exact adapter, a lower "
                             "rank an error that the card states")

    def write(self, model: nn.Module, tok: PreTrainedTokenizerBase, edited: EditedWeights) -> Sequence[LayerError]:
        """Write the export, and return the error of each layer's change, except for whole models."""
        import torch

        from ..export.deltas import TOLERANCE
        from ..export.exports import export_adapter, export_deltas, export_model

        dtype: torch.dtype | None = None if self.dtype is None else getattr(torch, self.dtype)
        if self.kind == "model":
            export_model(self.output, model, tok, edited, dtype, self.max_shard_size)
            return ()
        if self.kind == "deltas":
            return export_deltas(self.output, edited, exact=self.exact, dtype=dtype,
                                 tolerance=TOLERANCE if self.tolerance is None else self.tolerance)
        assert self.rank is not None
        given = () if dtype is None else (dtype,)
        return export_adapter(self.output, model, edited, self.rank, *given)


@with_option_groups
def export(run: RunFolder, options: ExportOptions, at: At = None, verbose: Verbose = False) -> None:
    """Write a run's edited model, what editing changed, or a LoRA adapter, with a card that says how it was made."""
    consoles = set_up(verbose)
    from ..export import ExportableRun
    from ..export.folders import check_free

    check_free(options.output)
    edited_run = ExportableRun(run, at)
    # On the CPU, since the device does not change the weights' bits.
    model, tok = load(edited_run.hparams.model_name, "cpu", edited_run.dtype)
    if layers := options.write(model, tok, edited_run.read(model)):
        consoles.out.print(_layer_table(layers))
    consoles.print_line(f"{edited_run.num_edits} edits exported to {options.output}")


def apply(
    deltas: Annotated[Path, typer.Argument(help="Folder written by `export --as deltas`, or its .safetensors file.")],
    model: Annotated[str, option("Hub name or folder of the base model; any but the one that was edited is "
                                 "refused.")],
    output: NewFolder,
    max_shard_size: ShardSize = "5GB",
    verbose: Verbose = False,
) -> None:
    """Apply deltas to a fresh copy of their base model, and write the edited model."""
    consoles = set_up(verbose)
    from ..export.deltas import read_deltas
    from ..export.exports import export_applied
    from ..export.folders import check_free

    check_free(output)
    changes = read_deltas(deltas)
    base, tok = load(model, "cpu", changes.origin.base_dtype)
    export_applied(output, base, tok, changes, max_shard_size)
    consoles.out.print(_layer_table(changes.layers))
    consoles.print_line(f"{changes.origin.num_edits} edits applied; the model is in {output}")


def _layer_table(layers: Sequence[LayerError]) -> Table:
    """How each parameter is stored, and the error of its change."""
    table = Table(Column("parameter", overflow="fold"), "stored", Column("rank", justify="right"),
                  Column("relative error", justify="right"), Column("norm of the change", justify="right"))
    for layer in layers:
        table.add_row(Text(layer.name), layer.stored, "-" if layer.rank is None else str(layer.rank),
                      f"{layer.relative_error:.3e}", f"{layer.change_norm:.6g}")
    return table
