"""Runs sequential editing: batch after batch into one model, measured along the way, into a run directory.

A killed run resumes from its last checkpoint and gives the same results, to the bit, as an uninterrupted one. To that
end each checkpoint also drops, in the running process, what is not saved (``EditSession.drop_derived``), and no result
depends on when the process was started.
"""

from __future__ import annotations

import itertools
import logging
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..callbacks.he_tracker import HETracker, read_energy_csv
from ..callbacks.neurons import NeuronTracker
from ..callbacks.spaces import SpaceTracker, read_spaces_csv
from ..datasets.conflicts import find_conflicts
from ..datasets.loaders import EditRecord, records_fingerprint
from ..defaults import CHECKPOINT_EVERY, KEEP_CHECKPOINTS
from ..editing.callbacks import (
    EditCallback,
    EditEvent,
    MeasureEvent,
    RunState,
    StopEditing,
)
from ..editing.checkpoints import remove_old_checkpoints, resumable, save_checkpoint, save_weights
from ..editing.engines import engine_of
from ..editing.pipeline import apply_sphere_to_model, read_requests
from ..editing.requests import EditRequest
from ..editing.session import EditSession, resume_from
from ..evaluation.generation import generate_continuations
from ..evaluation.metrics import CaseScores, edit_efficacy
from ..hparams import SPHEREHyperParams, check_hparams
from ..models.architecture import EditableModel
from ..models.checks import check_parameters, check_tokenizer, default_torch_settings
from ..models.fingerprint import weights_checksum
from ..utils.messages import kind_and_text
from ..utils.progress import PhaseProgress
from . import schema
from .config import check_same_run, run_config
from .directory import RunDirectory
from .measuring import Measurer
from .records import RunRecords, read_state
from .repair import Repairer, RepairSettings
from .result import RunResult
from .schedule import (
    DueMeasurement,
    MeasureSettings,
    abilities_due,
    checkpoint_ends,
    due_measurements,
    interval_ended,
    measurement_at,
    phase_at,
)
from .schema import (
    BatchRecord,
    CaseRecord,
    Measurement,
    Skipped,
    SkippedCase,
    Summary,
    When,
    estimates_to_dict,
    read_record,
)
from .skipping import OnError, SkippedFacts, edit_by_bisection, tries_needed

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """Settings of a run besides the hyperparameters.

    Attributes:
        output: run directory; must be empty or absent, unless ``resume``.
        batch_size: edits per batch.
        examples: number of cases whose greedy continuations before and after editing are kept.
        described: further entries for ``config.yaml`` (data set, seed, command ...).
        measure: what is measured, and when.
        resume: continue from the directory's last checkpoint; without one, start from the beginning.
        checkpoint_every: minimum number of edits between two checkpoints. A killed run repeats the edits since its
            last one.
        keep_checkpoints: number of recent checkpoints to keep (0 = all).
        keep_weights_every: keep the weights (without the session) permanently at this interval, in edits, for
            ``evaluate --at`` and exports; None keeps only the last ones.
        repair: when facts that the model no longer predicts are edited again; None: never.
        on_error: ``skip`` skips edits that can't be made, and lists them in ``summary.json``; ``stop`` ends the run
            and names them. Both find them by bisection.
    """

    output: Path
    batch_size: int
    examples: int = 0
    described: dict[str, Any] = field(default_factory=dict)
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    resume: bool = False
    checkpoint_every: int = CHECKPOINT_EVERY
    keep_checkpoints: int = KEEP_CHECKPOINTS
    keep_weights_every: int | None = None
    repair: RepairSettings | None = None
    on_error: OnError = "stop"

    def __post_init__(self) -> None:
        for name, value, least in (("batch_size", self.batch_size, 1), ("checkpoint_every", self.checkpoint_every, 1),
                                   ("keep_checkpoints", self.keep_checkpoints, 0), ("examples", self.examples, 0),
                                   ("keep_weights_every", self.keep_weights_every or 1, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}; give a whole number, at least {least}")
        if self.on_error not in get_args(OnError):
            raise ValueError(f"on_error is {self.on_error!r}: give stop or skip")


@default_torch_settings()
def run_sequential(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    hparams: SPHEREHyperParams,
    settings: RunSettings,
    callbacks: Sequence[EditCallback] = (),
    progress: PhaseProgress | None = None,
) -> RunResult:
    """Edit all records into the model in batches and write the run directory (files: see ``runs.schema``).

    Args:
        model: just loaded, without edits; changed in place.
        tok: its tokenizer.
        records: in the order of editing.
        hparams: method and settings.
        settings: run directory, batch size, and what is measured.
        callbacks: notified of every batch before it is written (a batch that one of them undoes is not written), of
            measurements, and of the end of the run. If one raises ``StopEditing``, the run ends cleanly,
            with measurements and summary of the facts edited so far.
        progress: called with the phase ("before", "editing", "during" ...) and the units done and in total.

    Raises:
        ValueError: the directory holds files (and ``resume`` is off) or a different run, there is nothing to edit, or a
            batch fails (see ``RunSettings.on_error``); batches up to the last checkpoint are then in the directory.
    """
    check_hparams(hparams)
    check_tokenizer(tok)
    if not records:
        raise ValueError("there are no records to edit")
    run = RunDirectory(settings.output)
    run.check_paths()
    resumes = settings.resume and run.has(schema.CONFIG)
    if not resumes and settings.output.exists() and any(settings.output.iterdir()):
        raise ValueError(f"{settings.output} is not empty: give a new directory for the run"
                         + (", this one holds no run to resume" if settings.resume else ", or resume it"))
    if settings.repair is not None:
        _check_repairable(hparams, callbacks)
    editable = hparams.editable(model)
    check_parameters(model)
    if EditSession.of(model).num_edits:
        raise ValueError(f"the model holds {EditSession.of(model).num_edits} edits already: load it again, or "
                         "undo them with EditSession.of(model).rollback(0)")
    # Everything is checked, and statistics are collected, before anything is measured or changed.
    started = time.perf_counter()
    work = _Run(editable, tok, records, hparams, settings, run, callbacks, progress or (lambda *_: None))
    work.prepare()
    preparation_seconds = time.perf_counter() - started
    described = {**settings.described, "num_edits": len(records), "batch_size": settings.batch_size,
                 "protocol": settings.measure.protocols[0], "records": records_fingerprint(records),
                 "checkpoint_every": settings.checkpoint_every,
                 "on_error": settings.on_error,
                 "repair": None if settings.repair is None else asdict(settings.repair),
                 "callbacks": [dict(found) for one in callbacks if (found := one.resume_settings()) is not None],
                 "measure": settings.measure.to_dict()}
    config = run_config(model, hparams, described)
    if resumes:
        same_versions = check_same_run(run, config)
        if run.has(schema.SUMMARY):
            logger.info("%s is finished: nothing is left to do", settings.output)
            return _finished(run, callbacks, [record.edit_prompt for record in records[: settings.examples]])
    with run.locked():
        if resumes:
            _restore_checkpoint(run, editable, same_versions)
            config = run.read_config()
        else:
            run.write_text(schema.CONFIG, yaml.safe_dump(config, sort_keys=False))
            if conflicts := find_conflicts(records):
                logger.warning("%s", conflicts.summary())
                run.write_json(schema.CONFLICTS, conflicts.to_dict())
        return work.complete(config, preparation_seconds)


def _check_repairable(hparams: SPHEREHyperParams, callbacks: Sequence[EditCallback]) -> None:
    """Refuse methods and callbacks that can't tell an edit made anew from a new one (ValueError)."""
    if hparams.executor != "native":
        raise ValueError(f"repair is set, but executor {hparams.executor} can't edit a fact again without what it "
                         "stored of it: set executor to 'native', or repair nothing")
    if barred := [type(callback).__name__ for callback in callbacks if not callback.allows_repair]:
        raise ValueError(f"repair is set, but {barred[0]} needs each fact to be edited once: leave one of them out")


def _restore_checkpoint(run: RunDirectory, editable: EditableModel, same_versions: bool) -> None:
    """Restore the model of the last checkpoint, and drop records of later batches, which are written again.

    Measurements of later batches are kept, since those batches end with the same bits again, unless versions changed.
    """
    numbers = resumable(run.checkpoints)
    num_edits = numbers[-1] if numbers else 0
    if numbers:
        resume_from(editable, run.checkpoints, num_edits)
    run.keep_until(schema.EDITS, num_edits)
    run.keep_until(schema.REPAIRS, num_edits)
    run.keep_until(schema.SKIPPED, num_edits - 1)  # facts skipped at num_edits belong to the next batch
    run.keep_whole_lines(schema.METRICS)
    if not same_versions:
        run.keep_until(schema.METRICS, num_edits)
        run.path_of(schema.NEURONS).unlink(missing_ok=True)  # the next measurement writes it again
        for path in [*run.path_of(schema.SCORES).glob("*.jsonl"), *run.path_of(schema.TEXTS).glob("*.jsonl")]:
            edits = path.stem.rpartition("-")[2]
            if edits.isdecimal() and int(edits) > num_edits:
                path.unlink()
    logger.info("resuming %s after %d edits", run.path, num_edits)


class _Run:
    """The remaining batches and measurements of a run. Counts of facts include skipped ones; counts of edits do not."""

    def __init__(self, editable: EditableModel, tok: PreTrainedTokenizerBase, records: Sequence[EditRecord],
                 hparams: SPHEREHyperParams, settings: RunSettings, run: RunDirectory,
                 callbacks: Sequence[EditCallback], progress: PhaseProgress) -> None:
        self._editable, self._tok, self._records, self._hparams = editable, tok, records, hparams
        self._settings, self._run, self._observers, self._progress = settings, run, callbacks, progress
        self._measurer = Measurer(editable, tok, records, settings.measure, run, progress, self._on_measured)
        self._tracker = HETracker(run.path_of(schema.ENERGY))
        self._spaces = SpaceTracker(run.path_of(schema.SPACES), hparams.gamma, hparams.principal_space == "pretrained")
        self._log = _BatchLog(run, self._tracker, self._spaces, self._efficacy)
        self._callbacks = [*callbacks, self._tracker, self._log]
        self._notified = 0  # batches of the log that observers were notified of
        self._batch: Sequence[EditRecord] = ()
        self._repairer = None if settings.repair is None else Repairer(
            editable, tok, records, hparams, settings.repair, settings.batch_size, settings.measure.protocols[0], run,
            [self._tracker], lambda done, count: progress("repairing", done, count))
        self._examples = [record.edit_prompt for record in records[: settings.examples]]
        total, size = len(records), settings.batch_size
        self._batches = [(first, min(first + size, total)) for first in range(0, total, size)]
        ends = [end for _, end in self._batches]
        self._checkpoints = checkpoint_ends(ends, settings.checkpoint_every)
        self._kept_for_good = {end for first, end in self._batches
                               if end == total or interval_ended(end, end - first, settings.keep_weights_every)}
        self._skipped = SkippedFacts()
        self._refused: set[int] = set()  # skipped before the first batch
        self._stopped: str | None = None  # why a callback stopped the run
        # Built now, while the weights are the unedited ones: no checkpoint is restored yet.
        self._neurons = NeuronTracker(editable.weights(), hparams.gamma, settings.measure.seed)

    @property
    def _session(self) -> EditSession:
        return EditSession.of(self._editable.model)

    def prepare(self) -> None:
        """Prepare the session, and find facts that can't be edited: refuse or skip them.

        An error that does not depend on the facts is raised as it is.
        """
        editable, tok, session = self._editable, self._tok, self._session
        session.bind(editable, self._hparams)

        def read(some: Sequence[EditRecord]) -> list[EditRequest]:
            return read_requests(editable, tok, [record.request() for record in some], session)

        self._check_facts(read)  # before statistics are collected, which takes long
        engine = engine_of(self._hparams, session)
        engine.prepare_run(editable, tok, self._hparams, session, self._settings.batch_size)
        self._check_facts(lambda some: engine.check_requests(editable, tok, read(some), session))
        self._refused = {one.index for one in self._skipped.in_order()}

    def _check_facts(self, check: Callable[[Sequence[EditRecord]], object]) -> None:
        """Skip the facts that a check refuses; raise its error if ``on_error`` is ``stop`` or no fact is left."""
        indices = [index for index in range(len(self._records)) if index not in self._skipped]
        try:
            check([self._records[index] for index in indices])
        except ValueError:
            if self._settings.on_error == "stop":
                raise
            for index in indices:
                try:
                    check([self._records[index]])
                except ValueError as error:
                    self._skipped.add([Skipped(index, self._records[index].case_id, 0, kind_and_text(error))])
            if self._skipped.edited(len(self._records)) == 0:
                raise

    def complete(self, config: Mapping[str, Any], preparation_seconds: float) -> RunResult:
        """Edit and measure what is left, and write the summary."""
        run, self._config = self._run, config
        if self._session.num_edits == 0 and not run.has(schema.EXAMPLES):
            self._before = self._continuations()
            run.write_json(schema.EXAMPLES, {"before": self._before})
        else:
            self._before = _examples(run)["before"]
        if self._session.num_edits:
            self._tracker.records = read_energy_csv(run.path_of(schema.ENERGY))
            self._spaces.records = read_spaces_csv(run.path_of(schema.SPACES)) if run.has(schema.SPACES) else []
            self._log.batches = run.records(schema.EDITS, BatchRecord)
            self._notified = len(self._log.batches)
        self._skipped.add(run.records(schema.SKIPPED, Skipped))
        if self._repairer is not None:
            self._repairer.resume()
        resumed_at = self._skipped.tried(self._session.num_edits, [end for _, end in self._batches])
        tried = 0
        for first, end in [(0, 0), *self._batches]:  # (0, 0): the unedited model
            if end < resumed_at:  # edited and measured before the checkpoint
                continue
            if end > resumed_at:
                self._edit_or_stop(first, end)
                if self._stopped is not None:
                    tried = self._end_early(first)
                    break
                self._repair(first, end)
                self._save(end)
            self._measure(first, end)
            tried = end
        return self._summarise(preparation_seconds, tried)

    # Editing

    def _edit_or_stop(self, first: int, end: int) -> None:
        """Edit a batch and notify observers; note the reason if a callback stops the run."""
        try:
            self._edit(first, end)
        except StopEditing as stop:
            self._stopped = str(stop)
            logger.warning("stopped after %d edits: %s", self._session.num_edits, stop)
        new, self._notified = self._log.batches[self._notified:], len(self._log.batches)
        for batch in new:  # only now, when they can't be undone any more
            for observer in self._observers:
                observer.on_measured(MeasureEvent(self._state(), batch=batch))

    def _edit(self, first: int, end: int) -> None:
        """Edit the facts from ``first`` to ``end`` that were not refused, and skip those that fail alone."""
        num_edits = self._session.num_edits
        failing = edit_by_bisection([index for index in range(first, end) if index not in self._skipped],
                                    lambda some: self._edit_batch(some, first), self._failure, self._settings.on_error,
                                    lambda index: f"case_id {self._records[index].case_id}")
        skipped = [Skipped(index, self._records[index].case_id, num_edits, kind_and_text(error))
                   for index, error in failing]
        for one in skipped:
            logger.warning("case_id %s was left out: %s", one.case_id, one.error)
            self._run.append(schema.SKIPPED, one.to_dict())
        self._skipped.add(skipped)
        self._check_edited(end)

    def _check_edited(self, tried: int) -> None:
        """Raise if every fact so far was skipped: all facts of the run, or several with the same error.

        With batches of one edit, this is where an error that all facts share is noticed.
        """
        errors = [one.error for one in self._skipped.in_order() if one.index not in self._refused]
        if not errors or self._session.num_edits:
            return
        total = len(self._records)
        if tried == total or (len(set(errors)) == 1 and len(errors) >= tries_needed(total)):
            raise ValueError(f"{errors[0]} (so far none of {tried} facts could be edited, of {total}: the run ends)")

    def _repair(self, first: int, end: int) -> None:
        """Repair the model after the batch of facts from ``first`` to ``end``, if that is due."""
        if self._repairer is None or self._settings.repair is None:
            return
        due = end == len(self._records) or interval_ended(end, end - first, self._settings.repair.every)
        if due and (facts := self._in_model(end)):
            self._repairer.repair(facts)

    def _in_model(self, tried: int) -> list[int]:
        """Indices of the facts in the model once the first ``tried`` have been tried."""
        return [index for index in range(tried) if index not in self._skipped]

    def _edit_batch(self, indices: Sequence[int], first: int) -> None:
        done = itertools.count(first + 1)

        def advance(count: int) -> None:
            for _ in range(count):
                self._progress("editing", next(done), len(self._records))

        self._batch = [self._records[index] for index in indices]
        apply_sphere_to_model(self._editable.model, self._tok, [record.request() for record in self._batch],
                              self._hparams, callbacks=self._callbacks, progress=advance)

    def _failure(self, indices: Sequence[int]) -> Exception | None:
        """The error of these edits alone, tried and undone without callbacks."""
        requests = [self._records[index].request() for index in indices]
        try:
            apply_sphere_to_model(self._editable.model, self._tok, requests, self._hparams, callbacks=[_Undo()])
        except _Undone:
            return None
        except Exception as error:  # any error counts
            return error
        raise AssertionError("_Undo raises after every batch")

    def _save(self, tried: int) -> None:
        """Save a checkpoint, or weights to keep, if one is due."""
        folder, session = self._run.checkpoints, self._session
        if tried in self._checkpoints:
            session.drop_derived()
            save_checkpoint(self._editable, session, folder)
            remove_old_checkpoints(folder, self._settings.keep_checkpoints,
                                   {self._skipped.edited(end) for end in self._kept_for_good if end <= tried})
        elif tried in self._kept_for_good:
            save_weights(self._editable, folder, session.num_edits)

    def _end_early(self, first: int) -> int:
        """After a callback stopped the run in the batch from ``first``: save, and measure as after the last batch.

        Returns:
            Number of facts tried.
        """
        tried, num_edits, measure = first, self._session.num_edits, self._settings.measure
        while self._skipped.edited(tried) < num_edits:  # some of the batch stay if it was edited in halves
            tried += 1
        if num_edits == 0:
            raise ValueError(f"the run was stopped before any edit was in the model: {self._stopped}")
        save_weights(self._editable, self._run.checkpoints, num_edits)
        if measure.after:
            self._measurer.measure(self._last_point(tried))
        self._neurons.write(self._run.path_of(schema.NEURONS), self._editable.weights(), num_edits)
        if measure.abilities.tasks:
            self._measurer.measure_abilities("after", num_edits)
        return tried

    # Measuring

    def _measure(self, first: int, end: int) -> None:
        """Measure what is due after the batch of facts from ``first`` to ``end``."""
        measure, total, num_edits = self._settings.measure, len(self._records), self._skipped.edited(end)
        points = due_measurements(end, end - first, total, measure)
        for point in points:
            self._measurer.measure(self._without_skipped(point, end))
        if end == total or any(point.when == "during" for point in points):
            self._neurons.write(self._run.path_of(schema.NEURONS), self._editable.weights(), num_edits)
        if abilities_due(end, end - first, total, measure.abilities):
            self._measurer.measure_abilities(phase_at(end, total), num_edits)

    def _last_point(self, tried: int) -> DueMeasurement:
        """The measurement after the last batch, of those facts measured before that are in the model."""
        total = len(self._records)
        return self._without_skipped(measurement_at(total, total, self._settings.measure), tried)

    def _without_skipped(self, point: DueMeasurement, tried: int) -> DueMeasurement:
        """A point without skipped facts; before editing, without refused ones."""
        if point.when == "before":
            return replace(point, cases=tuple(case for case in point.cases if case not in self._refused))
        return DueMeasurement(point.when, self._skipped.edited(tried),
                              tuple(case for case in point.cases if case < tried and case not in self._skipped))

    def _efficacy(self) -> float | None:
        """Percent of the current batch's facts that the model predicts, by the first protocol; None if undefined."""
        try:
            return edit_efficacy(self._editable.model, self._tok, self._batch, self._settings.measure.protocols[0])
        except ValueError as error:  # the protocol does not fit the facts
            logger.debug("no efficacy of this batch: %s", error)
            return None

    def _on_measured(self, measurement: Measurement) -> None:
        for observer in self._observers:
            observer.on_measured(MeasureEvent(self._state(), measurement=measurement))

    def _continuations(self) -> list[str]:
        return generate_continuations(self._editable.model, self._tok, self._examples)

    # Summary

    def _state(self, summary: Summary | None = None) -> RunState:
        return RunState(self._run.path, self._config, self._log.batches, self._measurer.measurements,
                        self._tracker.records, self._spaces.records, summary)

    def _summarise(self, preparation_seconds: float, tried: int) -> RunResult:
        """Write ``examples.json``, ``cases.jsonl`` and ``summary.json``."""
        run, measure, num_edits = self._run, self._settings.measure, self._skipped.edited(tried)
        after = self._continuations()
        generations = list(zip(self._examples, self._before, after, strict=True))
        if measure.after:
            self._write_cases(generations, tried)
        by_protocol = {protocol: {"pre": self._measured("before", 0, protocol),
                                  "post": self._measured("after", num_edits, protocol)}
                       for protocol in measure.protocols}
        metrics = {protocol: {name: None if one is None else one.main_metrics() for name, one in found.items()}
                   for protocol, found in by_protocol.items()}
        first = measure.protocols[0]
        repairer = self._repairer
        lost = [] if repairer is None else repairer.failing(self._in_model(tried))
        summary = Summary(
            num_edits, first, len(self._records),
            tuple(SkippedCase(one.case_id, one.error) for one in self._skipped.in_order() if one.index < tried),
            None if repairer is None else sum(len(one.places) for one in repairer.repairs),
            tuple(self._records[index].case_id for index in lost),
            self._stopped, metrics[first]["pre"], metrics[first]["post"],
            protocols={protocol: {name: None if one is None else estimates_to_dict(one) for name, one in found.items()}
                       for protocol, found in metrics.items()},
            watched={name: None if one is None else one.watched() for name, one in by_protocol[first].items()},
            preparation_seconds=preparation_seconds,
            editing_seconds=sum(batch.wall_seconds for batch in self._log.batches)
            + sum(one.seconds for one in (() if repairer is None else repairer.repairs)),
            evaluation_seconds=sum(one.seconds for one in self._measurer.measurements),
            peak_memory_bytes=peak_memory_bytes(self._editable.model),
            weights_sha256=weights_checksum(self._editable))
        run.write_json(schema.EXAMPLES, {"before": self._before, "after": after})
        run.write_json(schema.SUMMARY, summary.to_dict())
        state = self._state(summary)
        for observer in self._observers:
            observer.on_run_end(state)
        return RunResult(summary.to_dict(), self._tracker, generations, RunRecords.of(state))

    def _measured(self, when: When, num_edits: int, protocol: str) -> Measurement | None:
        return next((one for one in self._measurer.measurements if not one.abilities
                     and (one.when, one.num_edits, one.protocol) == (when, num_edits, protocol)), None)

    def _write_cases(self, generations: Sequence[tuple[str, str, str]], tried: int) -> None:
        measure = self._settings.measure
        protocol = measure.protocols[0]
        before: dict[int, CaseScores] = {}
        if measure.before:
            point = self._without_skipped(measurement_at(0, len(self._records), measure), 0)
            before = dict(zip(point.cases, self._measurer.scores(point)[protocol], strict=True))
        last = self._last_point(tried)
        lines = []
        for case, after in zip(last.cases, self._measurer.scores(last)[protocol], strict=True):
            record = self._records[case]
            texts: dict[str, str | None] | None = None
            if case < len(generations):
                _, text_before, text_after = generations[case]
                texts = {"before": text_before, "after": text_after}
            lines.append(CaseRecord(
                record.case_id, record.edit_prompt, record.subject, record.target_new, record.target_true,
                _fact_metrics(before[case]) if case in before else None, _fact_metrics(after), texts).to_dict())
        self._run.write_lines(schema.CASES, lines)


def _fact_metrics(scores: CaseScores) -> dict[str, float | None]:
    return {metric: getattr(scores, metric) for metric in schema.FACT_METRICS}


def _finished(run: RunDirectory, callbacks: Sequence[EditCallback], examples: Sequence[str]) -> RunResult:
    """The result of a run that has ended, read from its directory."""
    state = read_state(run)
    tracker = HETracker()
    tracker.records = list(state.energy)
    for callback in callbacks:
        callback.on_run_end(state)
    texts = _examples(run)
    return RunResult(run.read_json(schema.SUMMARY), tracker,
                     list(zip(examples, texts["before"], texts["after"], strict=False)), RunRecords.of(state))


def _examples(run: RunDirectory) -> dict[str, list[str]]:
    return read_record(dict[str, list[str]], run.read_json(schema.EXAMPLES), str(run.path / schema.EXAMPLES))


class _BatchLog(EditCallback):
    """Writes ``edits.jsonl``, a line per batch, and runs the space tracker outside the timed part.

    Args:
        run: run directory.
        tracker: source of the energies.
        spaces: runs before and after each batch.
        efficacy: returns the percent of the batch's facts that the model predicts.

    Attributes:
        batches: all of the run so far.
    """

    def __init__(self, run: RunDirectory, tracker: HETracker, spaces: SpaceTracker,
                 efficacy: Callable[[], float | None]) -> None:
        self._run, self._tracker, self._spaces, self._efficacy = run, tracker, spaces, efficacy
        self._started = 0.0
        self.batches: list[BatchRecord] = []

    def on_batch_start(self, event: EditEvent) -> None:
        self._spaces.on_batch_start(event)
        self._started = time.perf_counter()

    def on_batch_end(self, event: EditEvent) -> None:
        wall_seconds = time.perf_counter() - self._started + event.seconds.get("preparation", 0.0)
        self._spaces.on_batch_end(event)
        batch = BatchRecord(
            event.num_edits, tuple(event.case_ids), dict(event.seconds), wall_seconds, tuple(event.losses),
            dict(event.update_norms), self._tracker.records[-1].energy, self._efficacy(), event.strength)
        self._run.append(schema.EDITS, batch.to_dict())
        self.batches.append(batch)


class _Undone(Exception):
    """Raised to undo a batch that was only tried."""


class _Undo(EditCallback):
    """Undoes every batch."""

    def on_batch_end(self, event: EditEvent) -> None:
        raise _Undone


def peak_memory_bytes(model: nn.Module) -> int:
    """Peak memory of this process: allocated on the GPUs that hold the model, else resident on the host."""
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    if gpus:
        return sum(int(torch.cuda.max_memory_allocated(gpu)) for gpu in gpus)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
