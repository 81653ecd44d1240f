"""The commands that take edited weights out of a run: ``export`` and ``apply``."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Column, Table
from rich.text import Text

if TYPE_CHECKING:
    from .export.card import LayerError


class ExportKind(str, Enum):
    """What can be exported."""

    model = "model"
    deltas = "deltas"
    lora = "lora"


class ExportDtype(str, Enum):
    """What numbers can be stored as."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


_ShardSize = Annotated[str, typer.Option(help="Of each file of weights, such as 200MB or 5GB.")]
_Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more of what is going on.")]


def export(
    run: Annotated[Path, typer.Argument(help="Run directory.")],
    output: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
    kind: Annotated[ExportKind, typer.Option("--as", help="The whole model, what editing changed, or that as a LoRA "
                                             "adapter of PEFT.")] = ExportKind.model,
    at: Annotated[int | None, typer.Option(min=1, help="After so many edits, whose weights were kept; the last ones if "
                                           "not given.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of a LoRA adapter, which needs it, or of deltas, which find "
                                             "their own if not given.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Deltas: relative error of each parameter's change that their "
                                                    "rank keeps to; 1e-4 if not given.")] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Deltas: store edited weights whole; apply then gives them bit "
                                        "for bit.")] = False,
    dtype: Annotated[ExportDtype | None, typer.Option(help="Of the model, or of the factors; as the run had it, or "
                                                      "float32, if not given.")] = None,
    max_shard_size: _ShardSize = "5GB",
    verbose: _Verbose = False,
) -> None:
    """Write a run's edited model, what editing changed, or a LoRA adapter, with a card that says how it was made."""
    from .cli import _set_up, _without_bars_of_transformers

    console = _set_up(verbose).out
    import torch

    from .export.deltas import TOLERANCE
    from .export.edited import ExportableRun
    from .export.exports import export_adapter, export_deltas, export_model
    from .export.folders import check_free
    from .export.whole import check_shard_size
    from .loading import load_model

    given = {"--rank": rank is not None, "--tolerance": tolerance is not None, "--exact": exact}
    meant = {ExportKind.model: (), ExportKind.deltas: tuple(given), ExportKind.lora: ("--rank",)}[kind]
    if out_of_place := [name for name, is_given in given.items() if is_given and name not in meant]:
        raise ValueError(f"{', '.join(out_of_place)} means nothing with --as {kind.value}: leave it out")
    if sum(given.values()) > 1:
        raise ValueError(f"{' and '.join(name for name, is_given in given.items() if is_given)} exclude each other: "
                         "give one")
    if kind is ExportKind.lora and rank is None:
        raise ValueError("--as lora needs --rank: as many as the run has edits lose "
                         "nothing, fewer lose what the card then says")
    wanted: torch.dtype | None = None if dtype is None else getattr(torch, dtype.value)
    check_free(output)
    check_shard_size(max_shard_size)
    _without_bars_of_transformers()
    edited_run = ExportableRun(run, at)
    # On the CPU, whatever the run was on: bits of weights don't depend on it.
    model, tok = load_model(edited_run.hparams.model_name, "cpu", edited_run.dtype)
    edited = edited_run.read(model)
    layers: Sequence[LayerError] = ()
    if kind is ExportKind.model:
        export_model(output, model, tok, edited, wanted, max_shard_size)
    elif kind is ExportKind.deltas:
        layers = export_deltas(output, edited, rank=rank, exact=exact, dtype=wanted,
                               tolerance=TOLERANCE if tolerance is None else tolerance)
    else:
        assert rank is not None
        layers = (export_adapter(output, model, edited, rank) if wanted is None
                  else export_adapter(output, model, edited, rank, wanted))
    if layers:
        console.print(_layer_table(layers))
    console.print(Text(f"{edited_run.num_edits} edits exported to {output}"), soft_wrap=True)


def apply(
    deltas: Annotated[Path, typer.Argument(help="Folder that `export --as deltas` wrote, or its .safetensors file.")],
    model: Annotated[str, typer.Option(help="The base model: hub name or folder. Another one than was edited is "
                                       "refused.")],
    output: Annotated[Path, typer.Option(help="Folder to write, new or empty.")],
    max_shard_size: _ShardSize = "5GB",
    verbose: _Verbose = False,
) -> None:
    """Put deltas on a fresh copy of their base model, and write the edited model."""
    from .cli import _set_up, _without_bars_of_transformers

    console = _set_up(verbose).out
    from .export.deltas import read_deltas
    from .export.exports import export_applied
    from .export.folders import check_free
    from .export.whole import check_shard_size
    from .loading import load_model

    check_free(output)
    check_shard_size(max_shard_size)
    _without_bars_of_transformers()
    found = read_deltas(deltas)
    base, tok = load_model(model, "cpu", found.origin.base_dtype)
    export_applied(output, base, tok, found, max_shard_size)
    console.print(_layer_table(found.layers))
    console.print(Text(f"{found.origin.num_edits} edits applied; the model is in {output}"), soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add both commands to a command line."""
    app.command()(export)
    app.command()(apply)


def _layer_table(layers: Sequence[LayerError]) -> Table:
    table = Table(Column("parameter", overflow="fold"), "stored", Column("rank", justify="right"),
                  Column("relative error", justify="right"), Column("norm of the change", justify="right"))
    for layer in layers:
        table.add_row(Text(layer.name), layer.stored, "-" if layer.rank is None else str(layer.rank),
                      f"{layer.relative_error:.3e}", f"{layer.change_norm:.6g}")
    return table
