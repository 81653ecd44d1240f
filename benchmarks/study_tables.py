"""Reads a folder of runs and writes the study's tables, as Markdown and as CSV.

    python benchmarks/study_tables.py runs/study --output results
    python benchmarks/study_tables.py runs/study --output results --weights   # also cosines and spectra of weights

`results/tables.md` has all but the curves; each table is in a CSV file of its name, too: there by layer what here is
the mean over layers. `--weights` loads the models of runs that kept checkpoints, their data sets for the keys of first
facts, and statistics of keys: start it where the runs were started. It takes a second for each layer of a checkpoint.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sphere_easyedit.analysis.labels import LabelledRun, labelled_runs
from sphere_easyedit.analysis.tables import Table
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.checkpoints import saved_weights
from sphere_easyedit.hparams import SPHEREHyperParams
from sphere_easyedit.models.architecture import EditableModel
from sphere_easyedit.models.loading import load_model
from sphere_easyedit.runs.records import PAPER, RunRecords
from sphere_easyedit.utils.files import atomic_write
from study.comparisons import abilities_table, differences_table, gains_table, results_table
from study.energy import collapse_table, correlation_table, curves_table, regression_table
from study.runs import find_runs
from study.weights import keys_of_edits, over_layers, weight_tables

logger = logging.getLogger(__name__)

KEYS = 100  # facts whose keys are described


class Models:
    """Unedited models of runs; runs of one model one after the other share it."""

    def __init__(self) -> None:
        self._name: tuple[str, str | None] | None = None
        self._loaded: tuple[nn.Module, PreTrainedTokenizerBase] | None = None

    def editable(self, run: RunRecords) -> tuple[EditableModel, SPHEREHyperParams]:
        """The model with the run's layers, and the run's hyperparameters."""
        hparams = SPHEREHyperParams.from_dict(dict(run.config["hparams"]))
        return hparams.editable(self._model(run, hparams)[0]), hparams

    def keys(self, run: RunRecords) -> dict[int, Tensor]:
        """Keys of the run's first facts, by layer."""
        hparams = SPHEREHyperParams.from_dict(dict(run.config["hparams"]))
        model, tok = self._model(run, hparams)
        told = run.config["run"]
        try:
            records = load_records(told["dataset"], None if told["data"] is None else Path(told["data"]),
                                   told["num_edits"], told["seed"], order_seed=told.get("order_seed"),
                                   skip=told.get("skip", 0))
        except ValueError as error:  # relative paths hold in the folder where the run was started
            logger.warning("%s: no keys of its facts: %s", run.directory, error)
            return {}
        contexts = run.config["model"]["context_templates"] or []
        return keys_of_edits(hparams.editable(model), tok, [record.request() for record in records[:KEYS]], contexts,
                             hparams.token_budget)

    def _model(self, run: RunRecords, hparams: SPHEREHyperParams) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        dtypes = run.config.get("model", {}).get("dtypes", [])
        name = hparams.model_name, str(dtypes[0]).removeprefix("torch.") if len(dtypes) == 1 else None
        if self._loaded is None or name != self._name:
            self._loaded = None
            self._name, self._loaded = name, load_model(name[0], hparams.device, name[1])
        return self._loaded


def tables_of(arms: Sequence[LabelledRun], protocol: str = PAPER, share: float = 0.5, perplexity_factor: float = 10.0,
              seed: int = 0, resamples: int = 10_000) -> list[Table]:
    """All tables that need no weights; the curves come first.

    Args:
        arms: of the study.
        protocol: of the metrics.
        share, perplexity_factor: thresholds of a collapse, see ``collapse_of``.
        seed, resamples: of the bootstrap.
    """
    thresholds = share, perplexity_factor
    return [curves_table(arms, protocol), results_table(arms, protocol),
            differences_table(arms, protocol, seed, resamples), gains_table(arms, protocol, seed, resamples),
            collapse_table(arms, protocol, *thresholds), correlation_table(arms, protocol, *thresholds),
            regression_table(arms, protocol), abilities_table(arms)]


def write_tables(output: Path, command: str, tables: Sequence[Table], by_layer: Sequence[Table] = ()) -> list[Table]:
    """Write each table as CSV, and ``tables.md`` with those that have rows, except the curves.

    Args:
        output: folder to write to.
        command: that made the tables, named in ``tables.md``.
        tables: of ``tables_of``.
        by_layer: of ``weight_tables``; ``tables.md`` has their mean over layers.

    Returns:
        The tables in ``tables.md``.
    """
    readable = [table for table in (*tables[1:], *map(over_layers, by_layer)) if table.rows]
    with atomic_write(output / "tables.md") as temporary:
        temporary.write_text(f"Made by `{command}`.\n\n" + "\n".join(
            table.to_markdown() for table in readable), encoding="utf-8")
    for table in (*tables, *by_layer):
        table.write_csv(output / f"{table.name}.csv")
    return readable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder with run directories, at any depth")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--protocol", default=PAPER, help="of the metrics")
    parser.add_argument("--collapse-share", type=float, default=0.5, help="of efficacy's running maximum")
    parser.add_argument("--collapse-perplexity", type=float, default=10.0, help="times the unedited model's")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")
    parser.add_argument("--resamples", type=int, default=10_000, help="of the bootstrap")
    parser.add_argument("--weights", action="store_true", help="also describe the checkpoints' weights")
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    try:
        arms = labelled_runs(find_runs(given.runs))
    except ValueError as error:
        parser.error(str(error))
    tables = tables_of(arms, given.protocol, given.collapse_share, given.collapse_perplexity, given.seed,
                       given.resamples)
    by_layer = []
    if given.weights:
        models = Models()
        by_layer = weight_tables([arm for arm in arms if saved_weights(arm.run.directory / "checkpoints")],
                                 models.editable, models.keys)
    readable = write_tables(given.output, shlex.join(["python", *sys.argv]), tables, by_layer)
    print(f"{len(arms)} runs, {len(readable)} tables: {given.output / 'tables.md'}")


if __name__ == "__main__":
    main()
