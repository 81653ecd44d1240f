"""The search: trials proposed by Optuna, from the starting hyperparameters on, until the time is over."""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..datasets.loaders import EditRecord, records_fingerprint
from ..evaluation.perplexity import held_out_texts
from ..hparams import SPHEREHyperParams
from ..methods.corpus import GENERATED, GENERATED_LENGTH, token_sequences
from ..methods.covariance import moment_path, null_space, second_moments, statistics_files
from ..models.architecture import EditableModel
from ..utils.files import atomic_write
from ..utils.messages import one_line
from .results import Comparison, scores_of, write_trials, write_yaml
from .space import LAYERS, SearchSpace, searched_names
from .trial import NEIGHBOURS, Limits, Scores, TrialRunner

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial, Trial

logger = logging.getLogger(__name__)

BEST, TRIALS, STUDY, TEXTS = "best.yaml", "trials.csv", "study.db", "held-out.jsonl"
_NAME = "tune"
_TEXTS = 24  # generated texts: about 3,000 tokens
_STARTUP = 8  # trials before Optuna's model of earlier ones chooses, and before any is stopped early
_FAILING = 3  # trials that all fail with an error before the search gives up


@dataclass(frozen=True)
class TuneSettings:
    """Settings of a search.

    Attributes:
        output: folder of the search; a search with the same settings goes on there.
        budget: wall time in seconds, with statistics and validation, over all calls that go on with this search.
        batch_size: edits per batch.
        seed: of the proposals and of generated held-out text.
        text: held-out text for perplexity; None for text that the unedited model writes. On that, the logarithm of
            the ratio of perplexities estimates the divergence KL(unedited || edited) for a token.
        text_tokens: number of its tokens to read.
        max_rise: highest rise of perplexity against the unedited model, in percent.
        max_loss: largest loss of specificity against the unedited model, in points.
        fixed: searched hyperparameters to leave as they are at the start.
        dtype: of the model's weights, as described in the settings.
    """

    output: Path
    budget: float
    batch_size: int = 10
    seed: int = 0
    text: Path | None = None
    text_tokens: int = 2048
    max_rise: float = 5.0
    max_loss: float = 3.0
    fixed: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name, value in (("budget", self.budget), ("batch_size", self.batch_size),
                            ("text_tokens", self.text_tokens), ("max_rise", self.max_rise),
                            ("max_loss", self.max_loss)):
            if not value > 0:
                raise ValueError(f"{name} is {value}: give more than 0")


@dataclass
class Tuner:
    """Searches hyperparameters for one model; ``run`` does it all.

    Args:
        model: just loaded, without edits; the same bits after the search.
        tok: its tokenizer.
        start: mapping of the starting hyperparameters, as their file has them.
        tuning: facts that every trial edits.
        validation: facts that only the start and the best trial edit, at the end.
        settings: the rest.
        say: called with each line of progress.

    Raises:
        ImportError: Optuna is not installed.
        ValueError: the output folder holds something else, or a setting does not fit.
    """

    model: nn.Module
    tok: PreTrainedTokenizerBase
    start: Mapping[str, Any]
    tuning: Sequence[EditRecord]
    validation: Sequence[EditRecord]
    settings: TuneSettings
    say: Callable[[str], None] = field(default=logger.info)

    def __post_init__(self) -> None:
        self._began = time.monotonic()
        self._optuna = import_optuna()
        self._hparams = SPHEREHyperParams.from_dict(self.start)
        if self._hparams.executor != "native":
            raise ValueError(f"executor is {self._hparams.executor}, but tune searches the built-in methods only: say "
                             "`executor: native`")
        known = searched_names(self._hparams)
        if unknown := [name for name in self.settings.fixed if name not in known]:
            raise ValueError(f"{unknown[0]!r} is not searched for {self._hparams.base_alg}, so it can't be fixed: "
                             f"choose among {', '.join(known)}")
        self._names = [name for name in known if name not in self.settings.fixed]
        if not self._names:
            raise ValueError("every hyperparameter is fixed, so nothing is left to search: fix fewer")
        self._editable = self._searched_model()
        self._open()

    # Opening and going on

    def _searched_model(self) -> EditableModel:
        """The model with all layers that the search may edit: those with the start's module names, up to two thirds
        of the depth, below which all published settings lie, or up to the start's last layer."""
        editable = self._hparams.editable(self.model)
        if LAYERS not in self._names:
            return editable
        modules = dict(self.model.named_modules(remove_duplicate=False))
        last = max(2 * editable.num_blocks // 3, editable.layers[-1])
        layers = [layer for layer in range(min(last, self._hparams.v_loss_layer) + 1)
                  if editable.names.rewrite_module_tmp.format(layer) in modules]
        return EditableModel(self.model, editable.names, layers)

    def _open(self) -> None:
        """Create the study, or continue one with the same settings."""
        optuna, output = self._optuna, self.settings.output
        if output.exists() and any(output.iterdir()) and not (output / STUDY).exists():
            raise ValueError(f"{output} is not empty and holds no search: give a new folder")
        described = {
            "start": dict(self.start), "names": self._names, "tuning": records_fingerprint(self.tuning),
            "validation": records_fingerprint(self.validation), "batch_size": self.settings.batch_size,
            "seed": self.settings.seed, "text_tokens": self.settings.text_tokens,
            "text": None if self.settings.text is None else
            hashlib.sha256("\n".join(held_out_texts(self.settings.text)).encode()).hexdigest(),
            "max_rise": self.settings.max_rise, "max_loss": self.settings.max_loss}
        output.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self._study = optuna.create_study(
                storage=f"sqlite:///{output / STUDY}", study_name=_NAME, direction="maximize", load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP))
        except Exception as error:  # SQLAlchemy has many kinds
            raise ValueError(f"{output / STUDY} can't be opened as an Optuna study ({one_line(error)}): give a new "
                             "folder") from error
        stored = self._study.user_attrs.get("settings")
        described = json.loads(json.dumps(described))
        if stored is None:
            self._study.set_user_attr("settings", described)
        elif differing := [name for name in described if stored.get(name) != described[name]]:
            raise ValueError(f"{output} holds a search with another {differing[0]} ({stored.get(differing[0])!r:.80} "
                             f"instead of {described[differing[0]]!r:.80}): give a new folder, or the same command")
        self._spent_before = float(self._study.user_attrs.get("spent", 0.0))
        for trial in self._study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.RUNNING]):
            # Of a process that was ended: the same parameters are tried again.
            self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            self._study.enqueue_trial(trial.params, user_attrs={"is_start": bool(trial.user_attrs.get("is_start"))})

    # The search

    def run(self) -> Path:
        """Search until the budget is spent, and compare the best trial with the start on the validation facts.

        Returns:
            The YAML file with the best trial's hyperparameters.

        Raises:
            ValueError: the first trials all fail.
        """
        self._prepare()
        while self._has_time():
            self._try_one()
        return self._validate()

    def _prepare(self) -> None:
        """Collect statistics, make the held-out text, and measure the unedited model."""
        settings, hparams = self.settings, self._hparams
        share = None
        if hparams.method.needs_statistics(replace(hparams, P_loc=None)):
            files = statistics_files(self._editable, self.tok, hparams)
            self._known = set(next(iter(files.values())).path.parent.iterdir())
            if "nullspace_share" in self._names:
                share = hparams.nullspace_share or self._share_of_threshold()
        path = settings.text or settings.output / TEXTS
        if settings.text is None and not path.exists():
            generated = replace(hparams, mom2_dataset=GENERATED, mom2_n_samples=_TEXTS,
                                seed=hparams.seed + settings.seed + 1)  # not the statistics' text
            texts = self.tok.batch_decode(
                token_sequences(self._editable, self.tok, generated, GENERATED_LENGTH), skip_special_tokens=True)
            with atomic_write(path) as temporary:
                temporary.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        self._runner = TrialRunner(self.model, self.tok, settings.batch_size, held_out_texts(path),
                                   settings.text_tokens)
        self._limits = self._limits_on(self.tuning, NEIGHBOURS)
        self._space = SearchSpace(hparams, self._names, self._editable.layers, share)
        if not self._study.get_trials(deepcopy=False):
            self._study.enqueue_trial(self._space.start_values(), user_attrs={"is_start": True})

    def _share_of_threshold(self) -> float:
        """Mean share of the dimensions in the start's null spaces; small if its threshold leaves none."""
        editable, shares = self._hparams.editable(self.model), []
        for layer, moment in second_moments(editable, self.tok, self._hparams).items():
            try:
                space = null_space(moment, self._hparams.nullspace_threshold)
                shares.append(space.dimensions / editable.d_in(layer))
            except ValueError:  # it is empty
                shares.append(0.0)
        return max(0.01, statistics.fmean(shares))

    def _limits_on(self, records: Sequence[EditRecord], neighbours: int | None) -> Limits:
        return Limits(self._runner.measure(records, neighbours), self.settings.max_rise, self.settings.max_loss)

    def _spent(self) -> float:
        return self._spent_before + time.monotonic() - self._began

    def _has_time(self) -> bool:
        """Whether another trial and the validation of two settings fit into the budget; the first always does."""
        seconds = [trial.user_attrs["seconds"] for trial in self._finished() if "scores" in trial.user_attrs]
        if not seconds:
            return True
        validation = 2 * self._full_seconds() * len(self.validation) / len(self.tuning)
        return self._spent() + statistics.fmean(seconds) + validation <= self.settings.budget

    def _full_seconds(self) -> float:
        """Seconds of a trial that was not stopped early."""
        return max(float(trial.user_attrs["seconds"]) for trial in self._finished())

    def _finished(self) -> list[FrozenTrial]:
        states = self._optuna.trial.TrialState
        found: list[FrozenTrial] = self._study.get_trials(deepcopy=False, states=[states.COMPLETE, states.PRUNED])
        return found

    def _start_trial(self) -> FrozenTrial | None:
        return next((trial for trial in self._finished() if trial.user_attrs.get("is_start")), None)

    def _best(self) -> FrozenTrial | None:
        """The completed trial of the highest value, the earliest of equals."""
        completed = [trial for trial in self._finished() if trial.value is not None and "scores" in trial.user_attrs]
        return max(completed, key=lambda trial: (trial.value, -trial.number), default=None)

    def _mapping(self, trial: FrozenTrial | Trial) -> dict[str, Any]:
        changes = {} if trial.user_attrs.get("is_start") else self._space.changes(trial.params)
        return {**self.start, **changes}

    def _try_one(self) -> None:
        """Propose, run and record a trial."""
        optuna, number = self._optuna, len(self._study.get_trials(deepcopy=False))
        # A sampler of its own for every trial, so that a search that was ended proposes the same as one that was not.
        self._study.sampler = optuna.samplers.TPESampler(n_startup_trials=_STARTUP,
                                                         seed=self.settings.seed * 10_007 + number)
        trial = self._study.ask(self._space.distributions())
        started = time.monotonic()
        value: float | None = None
        state = optuna.trial.TrialState.COMPLETE
        try:
            scores = self._run(self._mapping(trial), self.tuning, NEIGHBOURS, lambda *at: self._check_half(trial, *at))
            value = self._limits.value(scores)
            trial.set_user_attr("scores", scores.to_dict())
        except optuna.TrialPruned:
            state = optuna.trial.TrialState.PRUNED
        except ValueError as error:
            state = optuna.trial.TrialState.PRUNED  # counts as worst, where a failed trial would not count at all
            trial.set_user_attr("error", one_line(error))
        trial.set_user_attr("seconds", time.monotonic() - started)
        finished = self._study.tell(trial, value, state)
        self._study.set_user_attr("spent", self._spent())
        self._report(finished)
        self._write()
        errors = [text for one in self._finished() if (text := one.user_attrs.get("error"))]
        if len(errors) == len(self._finished()) >= _FAILING:
            raise ValueError(f"all {len(errors)} trials failed; the first: {errors[0]}")

    def _check_half(self, trial: Trial, edited: int, scores: Scores) -> None:
        """Stop a trial that after half of its facts is below the median of the others there."""
        trial.report(self._limits.value(scores), edited)
        if trial.should_prune():
            trial.set_user_attr("scores", scores.to_dict())
            raise self._optuna.TrialPruned

    def _run(self, mapping: Mapping[str, Any], records: Sequence[EditRecord], neighbours: int | None,
             at_half: Callable[[int, Scores], None] | None = None) -> Scores:
        hparams = SPHEREHyperParams.from_dict({**mapping, **vars(self._editable.names)})
        try:
            return self._runner.run(hparams, records, neighbours, at_half)
        finally:
            folder = moment_path(self._editable, hparams, self._editable.layers[0]).parent
            for path in set(folder.iterdir()) - self._known if folder.is_dir() else ():
                if "_null_space_" in path.name:  # one for each share that was tried would fill the disk
                    path.unlink(missing_ok=True)

    # Results

    def _report(self, trial: FrozenTrial) -> None:
        scores, best = scores_of(trial), self._best()
        left = max(0.0, self.settings.budget - self._spent()) / 60
        if scores is None:
            what = f"failed: {trial.user_attrs.get('error')}"
        else:
            cells = (("efficacy", scores.efficacy), ("generalization", scores.generalization),
                     ("specificity", scores.specificity))
            what = ", ".join(f"{name} {found:.1f}" for name, found in cells if found is not None)
            what += f", perplexity {self._limits.rise(scores):+.1f}%"
            what += (" (stopped at half)" if trial.value is None else f", value {trial.value:.1f}")
        so_far = "" if best is None else f"; best {best.value:.1f} (trial {best.number})"
        name = f"trial {trial.number}" + (" (start)" if trial.user_attrs.get("is_start") else "")
        self.say(f"{name}: {what}{so_far}; {left:.1f} min left")

    def _write(self, validation: Comparison | None = None) -> None:
        """Write the table of trials, and the best one's hyperparameters."""
        output, best, start = self.settings.output, self._best(), self._start_trial()
        write_trials(output / TRIALS, self._finished(), self._limits)
        if best is None:
            return
        tuned = Comparison(f"{len(self.tuning)} tuning facts", self._limits,
                           None if start is None else scores_of(start), scores_of(best))
        states = [trial.state.name for trial in self._finished()]
        text = "text that the model wrote" if self.settings.text is None else self.settings.text.name
        changed = self._space.changes(best.params)
        header = [
            f"{self._hparams.base_alg}, {self._hparams.model_name}. Written by `sphere-easyedit tune`: trial "
            f"{best.number} of {len(states)} ({states.count('PRUNED')} stopped early), seed {self.settings.seed}, "
            f"{self._spent() / 60:.0f} minutes.",
            f"Searched: {', '.join(self._names)}. Found: "
            + ("nothing better than the start." if best.user_attrs.get("is_start") else
               ", ".join(f"{name} {changed[name]}" for name in self._names) + "."),
            f"Objective: mean of efficacy and generalization (percent) after editing {len(self.tuning)} facts in "
            f"batches of {self.settings.batch_size},",
            f"while perplexity on {text} rises by at most {self.settings.max_rise:g}% and specificity falls by at most "
            f"{self.settings.max_loss:g} points.",
            "The validation facts were edited by no trial.", "", *tuned.lines(), "",
            *(["Validation: not measured yet."] if validation is None else validation.lines())]
        write_yaml(output / BEST, self._mapping(best), header)

    def _validate(self) -> Path:
        """Edit and measure the validation facts with the start and with the best trial."""
        best = self._best()
        if best is None:
            raise ValueError("no trial was completed within the budget: give more minutes or fewer facts")
        stored: dict[str, Any] = self._study.user_attrs.get("validation", {})
        if "unedited" not in stored:
            stored["unedited"] = self._runner.measure(self.validation).to_dict()
        trials = {"start": self._start_trial(), str(best.number): best}
        for name, trial in trials.items():
            if trial is not None and "scores" in trial.user_attrs and name not in stored:
                same = best.user_attrs.get("is_start") and name != "start"
                self.say(f"validation: editing {len(self.validation)} other facts with "
                         + ("the start" if name == "start" else f"trial {name}")) if not same else None
                stored[name] = stored["start"] if same else self._run(
                    self._mapping(trial), self.validation, None).to_dict()
                self._study.set_user_attr("validation", stored)
                self._study.set_user_attr("spent", self._spent())
        limits = Limits(Scores(**stored["unedited"]), self.settings.max_rise, self.settings.max_loss)
        sides = [Scores(**stored[name]) if name in stored else None for name in trials]
        compared = Comparison(f"{len(self.validation)} validation facts", limits, *sides)
        self._write(compared)
        for line in compared.lines():
            self.say(line)
        start, found = sides
        if start is not None and found is not None and limits.value(found) < limits.value(start):
            logger.warning("on the validation facts the start does better than what was found: keep the start, or "
                           "search with more facts for a trial")
        return self.settings.output / BEST


def import_optuna() -> Any:
    """The optional library that proposes trials (ImportError with the command that installs it)."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f"tune needs optuna ({one_line(error)}): pip install 'sphere-easyedit[tune]'") from error
    return optuna
