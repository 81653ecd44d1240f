"""``apply``: exported changes on a fresh copy of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import load, set_up
from .export import ShardSize, layer_table
from .options import NewFolder, Verbose, option


def apply(
    deltas: Annotated[Path, typer.Argument(help="Folder written by `export --as deltas`, or its .safetensors file.")],
    model: Annotated[str, option("Hub name or folder of the base model; any but the one that was edited is "
                                 "refused.")],
    output: NewFolder,
    max_shard_size: ShardSize = "5GB",
    verbose: Verbose = False,
) -> None:
    """Put deltas on a fresh copy of their base model, and write the edited model."""
    consoles = set_up(verbose)
    from ..export.deltas import read_deltas
    from ..export.exports import export_applied
    from ..export.folders import check_free
    from ..export.whole import check_shard_size

    check_free(output)
    check_shard_size(max_shard_size)
    found = read_deltas(deltas)
    base, tok = load(model, "cpu", found.origin.base_dtype)
    export_applied(output, base, tok, found, max_shard_size)
    consoles.out.print(layer_table(found.layers))
    consoles.print_line(f"{found.origin.num_edits} edits applied; the model is in {output}")
