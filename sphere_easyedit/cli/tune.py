"""``tune``: search hyperparameters for a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from ..datasets.records import DatasetName
from ..defaults import TUNE_BATCH_SIZE, TUNE_LOSS, TUNE_RISE, TUNE_TEXT_TOKENS
from ..utils.signals import Interrupted
from .common import load_for, set_up
from .options import Dtype, Quiet, Verbose, option, parse_overrides, with_option_groups

if TYPE_CHECKING:
    from ..datasets.loaders import EditRecord

_FACTS = 50  # of a trial


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """Where the search starts."""

    PANEL: ClassVar = "Method"

    base_alg: Annotated[str, option("Base method: AlphaEdit, MEMIT, RECT, PRUNE or ReplayFT.")] = "AlphaEdit"
    hparams: Annotated[str | None, option("YAML file or short name to start from (the shipped file of the model if "
                                          "not given, else what `hparams MODEL` writes, with generated statistics).")
                       ] = None
    override: Annotated[list[str], option("Override a hyperparameter of the start: NAME=VALUE; repeatable.", "--set")
                        ] = field(default_factory=list)
    fixed: Annotated[list[str], option("Hyperparameter to leave as it is at the start, such as layers; repeatable.",
                                       "--fix")] = field(default_factory=list)
    dtype: Dtype = None

    def mapping(self, model: str) -> dict[str, Any]:
        """The starting hyperparameters of a model, as a file has them."""
        from ..hparams_files import find_hparams, read_mapping, shipped_name, starting_hparams
        from ..models.loading import model_source
        from ..models.shipped_configs import planning_config

        name = self.hparams or shipped_name(model, self.base_alg)
        if name is None:
            found = starting_hparams(planning_config(model, model_source(model)), model, self.base_alg)
            found |= {"mom2_dataset": "generated", "mom2_n_samples": 200}  # needs no download
        else:
            found = read_mapping(find_hparams(name)) | {"model_name": model}
        return found | parse_overrides(self.override)


@dataclass(frozen=True, kw_only=True)
class TuneData:
    """Facts of the trials and of the validation."""

    PANEL: ClassVar = "Data"

    data: Annotated[Path | None, option("File of facts (demo facts if not given).")] = None
    dataset: Annotated[DatasetName | None, option("What the file holds (facts if not given).")] = None
    num_edits: Annotated[int | None, option("Number of facts that a trial edits, and of other facts for the validation "
                                            "(half of the data, at most 50, if not given).", min=1)] = None
    batch_size: Annotated[int, option("Number of facts edited at once; tune with the one that you will use.", min=1)
                          ] = TUNE_BATCH_SIZE
    seed: Annotated[int, option("Seed for splitting the facts, for the trials and for generated text.", min=0)] = 0

    def split(self) -> tuple[list[EditRecord], list[EditRecord]]:
        """Facts for the trials, and as many others for the validation."""
        from ..datasets.loaders import draw_records, load_records

        dataset = self.dataset or ("demo" if self.data is None else "facts")
        records = load_records(dataset, self.data, seed=self.seed)
        number = min(_FACTS, len(records) // 2) if self.num_edits is None else self.num_edits
        tuning, validation = (draw_records(records, number, skip=skip, source=str(self.data or dataset))
                              for skip in (0, number))
        return tuning, validation


@dataclass(frozen=True, kw_only=True)
class LimitOptions:
    """What an edited model may lose."""

    PANEL: ClassVar = "Limits"

    max_perplexity_rise: Annotated[float, option("Highest rise of perplexity against the unedited model, in percent.")
                                   ] = TUNE_RISE
    max_specificity_loss: Annotated[float, option("Largest loss of specificity against the unedited model, in points.")
                                    ] = TUNE_LOSS
    text: Annotated[Path | None, option("Held-out text (.txt, .jsonl) for perplexity (text that the unedited model "
                                        "writes if not given).")] = None
    text_tokens: Annotated[int, option("Number of tokens of that text to use.", min=2)] = TUNE_TEXT_TOKENS


@with_option_groups
def tune(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a decoder.")],
    budget: Annotated[float, option("Wall time in minutes, with statistics and validation; in all, for a search that "
                                    "goes on.")],
    start: StartOptions,
    data: TuneData,
    limits: LimitOptions,
    output: Annotated[Path | None, option("Folder of the search, where the same command goes on (tune-MODEL-BASE if "
                                          "not given).", panel="Output")] = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    r"""Search hyperparameters of a base method for a model.

    Searched: layers; ft_lr and kl_factor (ReplayFT), else v_lr (step_norm_factor with a speed) and clamp_norm_factor,
    with L2 and nullspace_share (AlphaEdit) or mom2_update_weight (MEMIT, RECT, PRUNE).

    Objective: the mean of efficacy and generalization of the edited facts, within limits on perplexity and specificity.

    The first trial is the start, so the result is never worse on these facts. best.yaml also has the numbers on facts
    that no trial edited. Needs Optuna: pip install 'sphere-easyedit\[tune]'.
    """
    consoles = set_up(verbose, quiet)
    from ..hparams import SPHEREHyperParams
    from ..tuning import Tuner, TuneSettings
    from ..tuning.search import import_optuna

    import_optuna()  # before the model is loaded, which takes long
    tuning, validation = data.split()
    folder = output or Path(f"tune-{model.rstrip('/').rpartition('/')[2]}-{start.base_alg}")
    settings = TuneSettings(folder, 60 * budget, data.batch_size, data.seed, limits.text, limits.text_tokens,
                            limits.max_perplexity_rise, limits.max_specificity_loss, tuple(start.fixed))
    mapping = start.mapping(model)
    loaded, tok = load_for(SPHEREHyperParams.from_dict(mapping), start.dtype)
    tuner = Tuner(loaded, tok, mapping, tuning, validation, settings, consoles.print_line)
    try:
        best = tuner.run()
    except Interrupted:
        consoles.print_line(f"{folder} holds all trials so far, and best.yaml of the best; the same command goes on.")
        raise
    consoles.print_line(f"{best}: use it with `sphere-easyedit edit --hparams {best}`")
