"""The search: trials that Optuna proposes, from the starting hyperparameters on, until the time is over."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..datasets.loaders import EditRecord, records_fingerprint
from ..defaults import TUNE_BATCH_SIZE, TUNE_LOSS, TUNE_RISE, TUNE_TEXT_TOKENS
from ..evaluation.perplexity import held_out_texts
from ..hparams import SPHEREHyperParams
from ..hparams_files import render_hparams
from ..methods.corpus import GENERATED, GENERATED_LENGTH, token_sequences
from ..methods.covariance import moment_path, statistics_files
from ..models.architecture import EditableModel
from ..utils.files import atomic_write, sha256_of
from ..utils.messages import one_line
from .results import Comparison, described, name_of, scores_of, write_trials
from .space import LAYERS, SearchSpace, searched_names
from .trial import NEIGHBOURS, Limits, Scores, TrialRunner

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

logger = logging.getLogger(__name__)

BEST, TRIALS, STUDY, TEXTS = "best.yaml", "trials.csv", "study.db", "held-out.jsonl"
_TEXTS = 16  # generated texts: about 2,000 tokens
_STARTUP = 5  # trials before Optuna's model of earlier ones chooses, and before any is stopped early
_FAILING = 3  # trials that all fail with an error before the search gives up


@dataclass(frozen=True)
class TuneSettings:
    """Settings of a search; one with the same settings goes on in the same ``output``."""

    output: Path
    budget: float  # wall time in seconds, with statistics and validation, over all calls that go on with the search
    batch_size: int = TUNE_BATCH_SIZE
    seed: int = 0  # of the trials and of generated text
    # For perplexity; None for text that the unedited model writes. On that, the logarithm of the ratio of perplexities
    # estimates the divergence KL(unedited || edited) per token.
    text: Path | None = None
    text_tokens: int = TUNE_TEXT_TOKENS
    max_rise: float = TUNE_RISE  # of perplexity against the unedited model, in percent
    max_loss: float = TUNE_LOSS  # of specificity against the unedited model, in points
    fixed: Sequence[str] = ()  # searched hyperparameters to leave as they are at the start

    def __post_init__(self) -> None:
        for name in ("budget", "batch_size", "text_tokens", "max_rise", "max_loss"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: give more than 0")


class Tuner:
    """Searches hyperparameters for one model, which has the same bits after the search.

    Args:
        start: mapping of the starting hyperparameters, as their file has them.
        tuning: facts that every trial edits.
        validation: facts that only the start and the best trial edit, at the end.
        say: called with each line of progress.
        clock: returns seconds.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: the output folder holds something else, or a setting does not fit.
    """

    def __init__(self, model: nn.Module, tok: PreTrainedTokenizerBase, start: Mapping[str, Any],
                 tuning: Sequence[EditRecord], validation: Sequence[EditRecord], settings: TuneSettings,
                 say: Callable[[str], None] = logger.info, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._optuna = import_optuna()
        self._states = self._optuna.trial.TrialState
        self._model, self._tok, self._say, self._settings = model, tok, say, settings
        self._start, self._hparams = dict(start), SPHEREHyperParams.from_dict(start)
        self._tuning, self._validation = tuning, validation
        if self._hparams.executor != "native":
            raise ValueError(f"executor is {self._hparams.executor}, but tune searches the built-in methods only: say "
                             "`executor: native`")
        known = searched_names(self._hparams)
        if unknown := [name for name in settings.fixed if name not in known]:
            raise ValueError(f"{unknown[0]!r} is not searched for {self._hparams.base_alg}, so it can't be fixed: "
                             f"choose among {', '.join(known)}")
        names = [name for name in known if name not in settings.fixed]
        if not names:
            raise ValueError(f"all of {', '.join(known)} are fixed, so nothing is left to search: fix fewer")
        if settings.text is not None:
            held_out_texts(settings.text)  # refuses what can't be read
        self._editable = self._hparams.editable(model)
        if LAYERS in names:
            self._editable = _with_layers_to_search(self._editable, self._hparams.v_loss_layer)
        self._space = SearchSpace(self._hparams, names, self._editable.layers)
        self._open()

    def _open(self) -> None:
        """Create the study, or continue one with the same settings."""
        optuna, settings, output = self._optuna, self._settings, self._settings.output
        if output.exists() and any(output.iterdir()) and not (output / STUDY).exists():
            raise ValueError(f"{output} is not empty and holds no search: give a new folder")
        wanted = {
            "start": self._start, "names": self._space.names, "tuning facts": records_fingerprint(self._tuning),
            "validation facts": records_fingerprint(self._validation), "batch_size": settings.batch_size,
            "seed": settings.seed, "text_tokens": settings.text_tokens, "max_rise": settings.max_rise,
            "max_loss": settings.max_loss, "text": settings.text and sha256_of(settings.text)}
        wanted = json.loads(json.dumps(wanted))
        output.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self._study = optuna.create_study(
                storage=f"sqlite:///{output / STUDY}", study_name="tune", direction="maximize", load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP))
        except Exception as error:  # SQLAlchemy has many kinds
            raise ValueError(f"{output / STUDY} can't be opened as an Optuna study ({one_line(error)}): give a new "
                             "folder") from error
        stored = self._study.user_attrs.get("settings", wanted)
        for name, value in wanted.items():
            if stored.get(name) != value:
                raise ValueError(f"{output} holds a search with other {name} ({stored.get(name)!r:.60}, not "
                                 f"{value!r:.60}): give a new folder, or the same command")
        self._study.set_user_attr("settings", wanted)
        self._spent_before = float(self._study.user_attrs.get("spent", 0.0))
        for trial in self._study.get_trials(deepcopy=False, states=[self._states.RUNNING]):
            # Of a process that was ended: the same parameters are tried again.
            self._study.tell(trial.number, state=self._states.FAIL)
            self._study.enqueue_trial(trial.params, trial.user_attrs)

    # The search

    def run(self) -> Path:
        """Search until the budget is spent, and compare the best trial with the start on the validation facts.

        Returns the YAML file of the best trial; ValueError if the first trials all fail.
        """
        self._prepare()
        while self._has_time():
            self._try_one()
        return self._validate()

    def _prepare(self) -> None:
        """Collect statistics, write the held-out text, and measure the unedited model."""
        settings, hparams = self._settings, self._hparams
        self._before: set[Path] = set()  # files with statistics
        if hparams.method.needs_statistics(replace(hparams, P_loc=None)):
            statistics_files(self._editable, self._tok, hparams)
            self._before = set(self._statistics_folder().iterdir())
        path = settings.text or settings.output / TEXTS
        if not path.exists():
            other = replace(hparams, mom2_dataset=GENERATED, mom2_n_samples=_TEXTS,
                            seed=hparams.seed + settings.seed + 1)  # not the text of the statistics
            texts = self._tok.batch_decode(token_sequences(self._editable, self._tok, other, GENERATED_LENGTH),
                                           skip_special_tokens=True)
            with atomic_write(path) as temporary:
                temporary.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        self._runner = TrialRunner(self._model, self._tok, settings.batch_size, held_out_texts(path),
                                   settings.text_tokens)
        self._limits = self._limits_from(self._runner.measure(self._tuning, NEIGHBOURS))
        if not self._study.get_trials(deepcopy=False):
            self._study.enqueue_trial(self._space.start_values(), {"is_start": True})

    def _statistics_folder(self) -> Path:
        return moment_path(self._editable, self._hparams, self._editable.layers[0]).parent

    def _limits_from(self, unedited: Scores) -> Limits:
        return Limits(unedited, self._settings.max_rise, self._settings.max_loss)

    def _spent(self) -> float:
        return self._spent_before + self._clock() - self._began

    def _has_time(self) -> bool:
        """Whether another trial and the validation of two settings fit into the budget, or none is completed yet."""
        seconds = [trial.user_attrs["seconds"] for trial in self._finished()]
        validation = 2 * max(seconds, default=0.0) * len(self._validation) / len(self._tuning)
        return self._best() is None or self._spent() + statistics.fmean(seconds) + validation <= self._settings.budget

    def _finished(self) -> list[FrozenTrial]:
        states = [self._states.COMPLETE, self._states.PRUNED]
        found: list[FrozenTrial] = self._study.get_trials(deepcopy=False, states=states)
        return found

    def _try_one(self) -> None:
        """Propose, run and record a trial."""
        optuna, number = self._optuna, len(self._study.get_trials(deepcopy=False))
        # A sampler of its own for every trial, so that a search that was ended goes on like one that was not.
        self._study.sampler = optuna.samplers.TPESampler(n_startup_trials=_STARTUP,
                                                         seed=self._settings.seed * 10_007 + number)
        trial = self._study.ask(self._space.distributions())
        started, value, state = self._clock(), None, self._states.COMPLETE
        try:
            scores = self._run(self._mapping(trial), self._tuning, NEIGHBOURS,
                               lambda edited, half: self._check_half(trial, edited, half))
            trial.set_user_attr("scores", scores.to_dict())
            value = self._limits.value(scores)
        except optuna.TrialPruned:
            state = self._states.PRUNED
        except ValueError as error:
            state = self._states.PRUNED  # counts as worst, where a failed trial would not count at all
            trial.set_user_attr("error", one_line(error))
        trial.set_user_attr("seconds", self._clock() - started)
        finished = self._study.tell(trial, value, state)
        self._study.set_user_attr("spent", self._spent())
        errors = [text for one in self._finished() if (text := one.user_attrs.get("error"))]
        if len(errors) == len(self._finished()) >= _FAILING:
            raise ValueError(f"all {len(errors)} trials failed; the first: {errors[0]}")
        self._write()
        best, left = self._best(), max(0.0, self._settings.budget - self._spent()) / 60
        self._say(f"{name_of(finished)}: {described(finished, self._limits)}"
                  + ("" if best is None else f"; best {best.value:.1f}, {name_of(best)}") + f"; {left:.1f} min left")

    def _check_half(self, trial: Trial, edited: int, scores: Scores) -> None:
        """Stop a trial that after half of its facts is below the median of the others there."""
        trial.report(self._limits.value(scores), edited)
        if trial.should_prune():
            trial.set_user_attr("scores", scores.to_dict())
            raise self._optuna.TrialPruned

    def _mapping(self, trial: FrozenTrial | Trial) -> dict[str, Any]:
        return {**self._start, **({} if trial.user_attrs.get("is_start") else self._space.changes(trial.params))}

    def _run(self, mapping: Mapping[str, Any], records: Sequence[EditRecord], neighbours: int | None = None,
             at_half: Callable[[int, Scores], None] | None = None) -> Scores:
        hparams = SPHEREHyperParams.from_dict({**mapping, **vars(self._editable.names)})
        try:
            return self._runner.run(hparams, records, neighbours, at_half)
        finally:
            for path in self._statistics_folder().glob("*_null_space_*"):
                if path not in self._before:  # one for each share that was tried would fill the disk
                    path.unlink(missing_ok=True)

    # Results

    def _start_trial(self) -> FrozenTrial | None:
        return next((trial for trial in self._finished() if trial.user_attrs.get("is_start")), None)

    def _best(self) -> FrozenTrial | None:
        """The completed trial of the highest value, the earliest of equals."""
        completed = [trial for trial in self._finished() if trial.state == self._states.COMPLETE]
        return max(completed, key=lambda trial: (trial.value, -trial.number), default=None)

    def _write(self, validation: Comparison | None = None) -> None:
        """Write the table of trials, and the best one's hyperparameters if a trial was completed."""
        output, settings, trials, best = self._settings.output, self._settings, self._finished(), self._best()
        write_trials(output / TRIALS, trials, self._limits)
        if best is None:
            return
        mapping = self._mapping(best)
        found = ("nothing better than the start" if best.user_attrs.get("is_start") else
                 ", ".join(f"{name} {mapping[name]}" for name in self._space.names))
        stopped = sum(trial.state == self._states.PRUNED for trial in trials)
        tuned = Comparison(f"{len(self._tuning)} tuning facts", self._limits, scores_of(self._start_trial()),
                           Scores(**best.user_attrs["scores"]))
        header = [
            f"{self._hparams.base_alg}, {self._hparams.model_name}. Written by `sphere-easyedit tune`: {name_of(best)} "
            f"of {len(trials)} ({stopped} stopped early or failed), seed {settings.seed}, "
            f"{self._spent() / 60:.0f} minutes.",
            f"Searched: {', '.join(self._space.names)}. Found: {found}.",
            f"Objective: the mean of efficacy and generalization after editing {len(self._tuning)} facts in batches of "
            f"{settings.batch_size},",
            f"while perplexity on {settings.text or 'text by the unedited model'} rises by at most "
            f"{settings.max_rise:g}% and specificity falls by at most {settings.max_loss:g} points.",
            "The validation facts were edited by no trial.",
            *tuned.lines(), *(["Validation: not measured yet."] if validation is None else validation.lines())]
        with atomic_write(output / BEST) as temporary:
            temporary.write_text(render_hparams(mapping, "\n".join(header)), encoding="utf-8")

    def _validate(self) -> Path:
        """Edit and measure the validation facts with the start and with the best trial, unless that was done."""
        best, start = self._best(), self._start_trial()
        if best is None or start is None:
            raise ValueError("no trial was completed: give more minutes, fewer facts, or another start")
        stored: dict[str, Any] = self._study.user_attrs.get("validation", {})

        def scores(name: str, trial: FrozenTrial | None) -> Scores:
            if name not in stored:
                self._say(f"validation: measuring {len(self._validation)} other facts, {name}")
                found = (self._runner.measure(self._validation) if trial is None else
                         self._run(self._mapping(trial), self._validation))
                stored[name] = found.to_dict()
                self._study.set_user_attr("validation", stored)
                self._study.set_user_attr("spent", self._spent())
            return Scores(**stored[name])

        limits = self._limits_from(scores("unedited", None))
        compared = Comparison(f"{len(self._validation)} validation facts", limits,
                              None if "error" in start.user_attrs else scores(name_of(start), start),
                              scores(name_of(best), best))
        self._write(compared)
        for line in compared.lines():
            self._say(line)
        if compared.start is not None and limits.value(compared.best) < limits.value(compared.start):
            logger.warning("on the validation facts the start does better than what was found: keep the start, or "
                           "search with more facts per trial")
        return self._settings.output / BEST


def _with_layers_to_search(editable: EditableModel, v_loss_layer: int) -> EditableModel:
    """The model with all layers of the same module names, up to two thirds of the depth or its last edited layer.

    All published settings edit layers before that depth.
    """
    modules = dict(editable.model.named_modules(remove_duplicate=False))
    last = min(max(2 * editable.num_blocks // 3, editable.layers[-1]), v_loss_layer)
    return EditableModel(editable.model, editable.names, [
        layer for layer in range(last + 1) if editable.names.rewrite_module_tmp.format(layer) in modules])


def import_optuna() -> Any:
    """The optional library that proposes trials (ImportError with the command that installs it)."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f"tune needs optuna ({one_line(error)}): pip install 'sphere-easyedit[tune]'") from error
    return optuna
