"""``hparams``: write a first hyperparameter file for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import option


def hparams(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a decoder; only its config is read.")],
    base_alg: Annotated[str, option("Base method; an unknown name lists those there are.")] = "AlphaEdit",
    recommended: Annotated[bool, option("The settings that keep most edits of this model at least harm, if they "
                                        "were measured (docs/RESULTS.md).", "--recommended")] = False,
    output: Annotated[Path | None, option("File to write (standard output if not given).")] = None,
) -> None:
    """Write a starting YAML for a decoder that has none."""
    from ..hparams_files import recommended_file, starting_file
    from ..models.loading import model_source
    from ..models.shipped_configs import planning_config
    from ..utils.files import atomic_write

    text = recommended_file(model) if recommended else starting_file(planning_config(model, model_source(model)), model,
                                                                     base_alg)
    if output is None:
        print(text, end="")
        return
    with atomic_write(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
