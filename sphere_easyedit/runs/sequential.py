"""Runs sequential editing: batch after batch, with measurements, into a run directory that can be resumed.

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
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import torch
import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..callbacks.he_tracker import HETracker, read_energy_csv
from ..callbacks.neurons import NeuronWatch
from ..callbacks.spaces import SpaceTracker, read_spaces_csv
from ..datasets.conflicts import find_conflicts
from ..datasets.loaders import EditRecord, records_fingerprint
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
from . import schema
from .config import check_same_run, run_config
from .directory import RunDirectory
from .faults import OnError, Skips, edit_around_faults, enough_tries
from .measuring import (
    DueMeasurement,
    Measurer,
    MeasureSettings,
    Progress,
    abilities_are_due,
    passed,
    point_at,
    points_after,
    when_after,
)
from .records import read_state
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

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """What a run is made of, besides the hyperparameters.

    Attributes:
        output: run directory; must be empty or absent, unless ``resume``.
        batch_size: edits per batch.
        examples: number of cases whose greedy continuations are kept from before and after editing.
        described: further entries for ``config.yaml`` (data set, seed, command ...).
        measure: what is measured, and when.
        resume: go on from the directory's last checkpoint; a directory without one begins from the start.
        checkpoint_every: least number of edits between two checkpoints. A killed run repeats what it edited since the
            last one.
        keep_checkpoints: number of recent checkpoints to keep (0 = all).
        keep_weights_every: keep the weights (without the session) for good at this interval, in edits; None keeps the
            last ones only. ``evaluate --at`` and exports start from them.
        on_error: ``skip`` leaves out edits that can't be made, and lists them in ``summary.json``; ``stop`` ends the
            run, naming them. Either looks for them by bisection.
    """

    output: Path
    batch_size: int
    examples: int = 0
    described: dict[str, Any] = field(default_factory=dict)
    measure: MeasureSettings = field(default_factory=MeasureSettings)
    resume: bool = False
    checkpoint_every: int = 10
    keep_checkpoints: int = 1
    keep_weights_every: int | None = None
    on_error: OnError = "stop"

    def __post_init__(self) -> None:
        for name, value, least in (("batch_size", self.batch_size, 1), ("checkpoint_every", self.checkpoint_every, 1),
                                   ("keep_checkpoints", self.keep_checkpoints, 0), ("examples", self.examples, 0),
                                   ("keep_weights_every", self.keep_weights_every or 1, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}; give at least {least}")
        if self.on_error not in get_args(OnError):
            raise ValueError(f"on_error is {self.on_error!r}: give stop or skip")


@dataclass(frozen=True)
class RunResult:
    """What a run found: ``summary.json``'s content, energy records, and the examples' continuations."""

    summary: dict[str, Any]
    tracker: HETracker
    generations: list[tuple[str, str, str]]  # prompt, before, after


@default_torch_settings()
def run_sequential(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    records: Sequence[EditRecord],
    hparams: SPHEREHyperParams,
    settings: RunSettings,
    callbacks: Sequence[EditCallback] = (),
    progress: Progress | None = None,
) -> RunResult:
    """Edit all records into the model in batches and write the run directory (see DESIGN.md, section 4).

    Args:
        model: just loaded, without edits; changed in place.
        tok: its tokenizer.
        records: in the order of editing.
        hparams: method and settings.
        settings: where to write, how large a batch is, what to measure.
        callbacks: told of every batch, before it is written down (a batch that one of them undoes leaves no line), of
            what was measured, and of the run's end.
        progress: called with a phase ("before", "editing", "during" ...), and how much of it is done.

    Raises:
        ValueError: the directory holds files (and ``resume`` was not asked for) or another run than this one, there is
            nothing to edit, or a batch fails (see ``RunSettings.on_error``); all batches up to the last checkpoint are
            then in the run directory. ``StopEditing`` of a callback is no failure: the run ends there and is summed
            up, on the facts edited so far.
    """
    check_hparams(hparams)
    check_tokenizer(tok)
    if not records:
        raise ValueError("there are no records to edit")
    run = RunDirectory(settings.output)
    run.check_places()
    goes_on = settings.resume and run.has(schema.CONFIG)
    if not goes_on and settings.output.exists() and any(settings.output.iterdir()):
        raise ValueError(f"{settings.output} is not empty: give a new directory for the run"
                         + (", this one holds no run to resume" if settings.resume else ", or resume it"))
    editable = hparams.editable(model)
    check_parameters(model)
    session = EditSession.of(model)
    if session.num_edits:
        raise ValueError(f"the model holds {session.num_edits} edits already: start a run from a model just loaded")
    # All that can be refused is refused, and what takes long is collected, before anything is measured or changed.
    started = time.perf_counter()
    work = _Run(editable, tok, records, hparams, settings, run, callbacks, progress or (lambda what, done, total: None))
    work.prepare()
    preparation_seconds = time.perf_counter() - started
    described = {**settings.described, "num_edits": len(records), "batch_size": settings.batch_size,
                 "protocol": settings.measure.protocols[0], "records": records_fingerprint(records),
                 "checkpoint_every": settings.checkpoint_every,
                 "on_error": settings.on_error,
                 "callbacks": [dict(found) for one in callbacks if (found := one.resume_settings()) is not None],
                 "measure": settings.measure.described()}
    config = run_config(model, hparams, described)
    if goes_on:
        same_versions = check_same_run(run, config)
        if run.has(schema.SUMMARY):
            logger.info("%s is finished: nothing is left to do", settings.output)
            return _finished(run, callbacks, [record.edit_prompt for record in records[: settings.examples]])
    with run.locked():
        if goes_on:
            _go_back_to_checkpoint(run, editable, same_versions)
            config = run.read_config()
        else:
            run.write_text(schema.CONFIG, yaml.safe_dump(config, sort_keys=False))
            if conflicts := find_conflicts(records):
                logger.warning("%s", conflicts.summary())
                run.write_json(schema.CONFLICTS, conflicts.to_dict())
        return work.complete(config, preparation_seconds)


def _go_back_to_checkpoint(run: RunDirectory, editable: EditableModel, same_versions: bool) -> None:
    """Bring the model to the last checkpoint, and drop what was written of later batches and will be written again.

    Measurements of later batches stand: the batches end in the same bits again, unless other versions compute them.
    """
    numbers = resumable(run.checkpoints)
    num_edits = numbers[-1] if numbers else 0
    if numbers:
        resume_from(editable, run.checkpoints, num_edits)
    run.keep_until(schema.EDITS, num_edits)
    run.keep_until(schema.SKIPPED, num_edits - 1)  # with as many edits in the model, the batch after it was tried
    run.keep_whole_lines(schema.METRICS)
    if not same_versions:
        run.keep_until(schema.METRICS, num_edits)
        run.place(schema.NEURONS).unlink(missing_ok=True)  # the next measurement makes it anew
        for path in [*run.place(schema.SCORES).glob("*.jsonl"), *run.place(schema.TEXTS).glob("*.jsonl")]:
            edits = path.stem.rpartition("-")[2]
            if edits.isdecimal() and int(edits) > num_edits:
                path.unlink()
    logger.info("resuming %s after %d edits", run.path, num_edits)


class _Run:
    """The batches and measurements of one run that are still to be done."""

    def __init__(self, editable: EditableModel, tok: PreTrainedTokenizerBase, records: Sequence[EditRecord],
                 hparams: SPHEREHyperParams, settings: RunSettings, run: RunDirectory,
                 callbacks: Sequence[EditCallback], progress: Progress) -> None:
        self._editable, self._tok, self._records, self._hparams = editable, tok, records, hparams
        self._settings, self._run, self._observers, self._progress = settings, run, callbacks, progress
        self._session = EditSession.of(editable.model)
        self._measurer = Measurer(editable, tok, records, settings.measure, run, progress, self._on_measured)
        self._tracker = HETracker(run.place(schema.ENERGY))
        self._spaces = SpaceTracker(run.place(schema.SPACES), hparams.gamma, hparams.principal_space == "pretrained")
        self._log = _BatchLog(run, self._tracker, self._spaces, self._efficacy)
        self._callbacks = [*callbacks, self._tracker, self._log]
        self._told = 0  # batches of the log that observers were told of
        self._batch: Sequence[EditRecord] = ()
        self._examples = [record.edit_prompt for record in records[: settings.examples]]
        total = len(records)
        self._sizes = [min(settings.batch_size, total - first) for first in range(0, total, settings.batch_size)]
        self._checkpoints = _checkpoints(self._sizes, settings.checkpoint_every)
        self._ends = list(itertools.accumulate(self._sizes))
        self._kept_for_good = {end for end, size in zip(self._ends, self._sizes, strict=True)
                               if end == total or passed(end, size, settings.keep_weights_every)}
        self._refused: set[int] = set()
        self._skips = Skips()
        self._stopped: str | None = None
        # The model is the unedited one still: no checkpoint has been put in.
        self._neurons = NeuronWatch(editable.weights(), hparams.gamma, settings.measure.seed)

    def prepare(self) -> None:
        """Prepare the session, and find the facts that can't be edited as they stand: refused, or left out.

        An error that does not depend on the facts is raised as it is.
        """
        editable, tok, session = self._editable, self._tok, self._session
        session.bind(editable, self._hparams)

        def read(some: Sequence[EditRecord]) -> list[EditRequest]:
            return read_requests(editable, tok, [record.request() for record in some], session)

        self._refuse(read)  # before statistics are collected, which takes long
        engine = engine_of(self._hparams, session)
        engine.prepare_run(editable, tok, self._hparams, session, self._settings.batch_size)
        self._refuse(lambda some: engine.check_requests(editable, tok, read(some), session))
        self._refused = {one.index for one in self._skips.in_order()}

    def _refuse(self, check: Callable[[Sequence[EditRecord]], object]) -> None:
        """Leave out the facts that a check refuses; raise what it says where one is at fault and none is left out."""
        indices = [index for index in range(len(self._records)) if index not in self._skips]
        try:
            check([self._records[index] for index in indices])
        except ValueError:
            if self._settings.on_error == "stop":
                raise
            for index in indices:
                try:
                    check([self._records[index]])
                except ValueError as error:
                    self._skips.add([Skipped(index, self._records[index].case_id, 0, kind_and_text(error))])
            if self._skips.edited(len(self._records)) == 0:
                raise

    def complete(self, config: Mapping[str, Any], preparation_seconds: float) -> RunResult:
        """Do what is left, and sum up."""
        # Going back to a checkpoint exchanged the session.
        session = self._session = EditSession.of(self._editable.model)
        run, total = self._run, len(self._records)
        if session.num_edits == 0 and not run.has(schema.EXAMPLES):
            self._said_before = self._continuations()
            run.write_json(schema.EXAMPLES, {"before": self._said_before})
        else:
            self._said_before = _examples(run)["before"]
        self._config = config
        if session.num_edits:
            self._tracker.records = read_energy_csv(run.place(schema.ENERGY))
            self._spaces.records = read_spaces_csv(run.place(schema.SPACES)) if run.has(schema.SPACES) else []
            self._log.batches = run.records(schema.EDITS, BatchRecord)
            self._told = len(self._log.batches)
        self._skips.add(run.records(schema.SKIPPED, Skipped))
        begun = self._skips.tried(session.num_edits, self._ends)
        tried = 0
        for size in (0, *self._sizes):  # the model as it was loaded comes before the first batch
            if tried + size < begun:  # measured before the checkpoint that the run goes on from
                tried += size
                continue
            if tried + size > begun:
                try:
                    self._edit(tried, size)
                except StopEditing as stop:
                    self._stopped = str(stop)
                    logger.warning("stopped after %d edits: %s", session.num_edits, stop)
                self._tell_batches()
                if self._stopped is not None:
                    while self._skips.edited(tried) < session.num_edits:  # halves of a batch that is too large
                        tried += 1
                    break
                self._keep(session, tried + size)
            tried += size
            self._measure(tried, size, total)
        if self._stopped is not None:
            self._end_early(tried)
        return self._sum_up(preparation_seconds, tried)

    def _state(self, summary: Summary | None = None) -> RunState:
        return RunState(self._run.path, self._config, self._log.batches, self._measurer.measurements,
                        self._tracker.records, self._spaces.records, summary)

    def _tell_batches(self) -> None:
        """Tell observers of the batches that ended since the last call, which by now can't be undone any more."""
        new, self._told = self._log.batches[self._told:], len(self._log.batches)
        for batch in new:
            for observer in self._observers:
                observer.on_measured(MeasureEvent(self._state(), batch=batch))

    def _on_measured(self, measurement: Measurement) -> None:
        for observer in self._observers:
            observer.on_measured(MeasureEvent(self._state(), measurement=measurement))

    def _measure(self, tried: int, size: int, total: int) -> None:
        """Measure what is due after a batch of so many facts, ``tried`` of ``total`` in all."""
        measure = self._settings.measure
        points = points_after(tried, size, total, measure)
        for point in points:
            self._measurer.measure(self._of_the_edited(point, tried))
        if tried == total or any(point.when == "during" for point in points):
            self._neurons.write(self._run.place(schema.NEURONS), self._editable.weights(), self._skips.edited(tried))
        if abilities_are_due(tried, size, total, measure.abilities):
            self._measurer.measure_abilities(when_after(tried, total), self._skips.edited(tried))

    def _end_early(self, tried: int) -> None:
        """Keep the weights that a callback stopped at, and measure as after the last batch."""
        num_edits, measure = self._skips.edited(tried), self._settings.measure
        if num_edits == 0:
            raise ValueError(f"the run was stopped before any edit was in the model: {self._stopped}")
        save_weights(self._editable, self._run.checkpoints, num_edits)
        if measure.after:
            self._measurer.measure(self._last_point(tried))
        self._neurons.write(self._run.place(schema.NEURONS), self._editable.weights(), num_edits)
        if measure.abilities.tasks:
            self._measurer.measure_abilities("after", num_edits)

    def _last_point(self, tried: int) -> DueMeasurement:
        """The measurement after the last batch: on those of the facts measured before that are in the model."""
        total = len(self._records)
        return self._of_the_edited(point_at(total, total, self._settings.measure), tried)

    def _of_the_edited(self, point: DueMeasurement, tried: int) -> DueMeasurement:
        """A point on those of its facts that are in the model once so many were tried; before, on all but refused."""
        if point.when == "before":
            return replace(point, cases=tuple(case for case in point.cases if case not in self._refused))
        return DueMeasurement(point.when, self._skips.edited(tried),
                              tuple(case for case in point.cases if case < tried and case not in self._skips))

    def _efficacy(self) -> float | None:
        """Percent of the batch's facts that the model says as it stands, by the first protocol."""
        try:
            return edit_efficacy(self._editable.model, self._tok, self._batch, self._settings.measure.protocols[0])
        except ValueError as error:  # the protocol does not fit the facts
            logger.debug("no efficacy of this batch: %s", error)
            return None

    def _edit(self, first: int, size: int) -> None:
        """Edit the facts from ``first`` on, but for those that were refused; leave out what is at fault, if wanted."""
        indices = [index for index in range(first, first + size) if index not in self._skips]
        num_edits = self._session.num_edits
        faults = edit_around_faults([_Fact(index, self._records[index].case_id) for index in indices],
                                    lambda some: self._edit_batch(some, first), self._failure, self._settings.on_error)
        skipped = [Skipped(fact.index, fact.case_id, num_edits, kind_and_text(error)) for fact, error in faults]
        for one in skipped:
            logger.warning("case_id %s was left out: %s", one.case_id, one.error)
            self._run.append(schema.SKIPPED, one.to_dict())
        self._skips.add(skipped)
        self._check_edited(first + size)

    def _check_edited(self, tried: int) -> None:
        """End a run that has left out every fact so far: all there are, or several with one error.

        Batches of one edit have no others to compare with, so what their facts share shows here.
        """
        errors = [one.error for one in self._skips.in_order() if one.index not in self._refused]
        if not errors or self._session.num_edits:
            return
        total = len(self._records)
        if tried == total or (len(set(errors)) == 1 and len(errors) >= enough_tries(total)):
            raise ValueError(f"{errors[0]} (so far none of {tried} facts could be edited, of {total}: the run ends)")

    def _edit_batch(self, facts: Sequence[_Fact], first: int) -> None:
        done = itertools.count(first + 1)

        def advance(count: int) -> None:
            for _ in range(count):
                self._progress("editing", next(done), len(self._records))

        self._batch = [self._records[fact.index] for fact in facts]
        apply_sphere_to_model(self._editable.model, self._tok, [record.request() for record in self._batch],
                              self._hparams, callbacks=self._callbacks, progress=advance)

    def _failure(self, facts: Sequence[_Fact]) -> Exception | None:
        """What these edits alone raise, tried and undone without anybody watching."""
        requests = [self._records[fact.index].request() for fact in facts]
        try:
            apply_sphere_to_model(self._editable.model, self._tok, requests, self._hparams, callbacks=[_Undo()])
        except _Undone:
            return None
        except Exception as error:  # whatever it is, it is their fault
            return error
        raise AssertionError("_Undo raises after every batch")

    def _keep(self, session: EditSession, tried: int) -> None:
        """Write what is to be kept of the model as it stands."""
        folder = self._run.checkpoints
        if tried in self._checkpoints:
            session.drop_derived()
            save_checkpoint(self._editable, session, folder)
            remove_old_checkpoints(folder, self._settings.keep_checkpoints,
                                   {self._skips.edited(end) for end in self._kept_for_good if end <= tried})
        elif tried in self._kept_for_good:
            save_weights(self._editable, folder, session.num_edits)

    def _continuations(self) -> list[str]:
        return generate_continuations(self._editable.model, self._tok, self._examples)

    def _sum_up(self, preparation_seconds: float, tried: int) -> RunResult:
        run, measure, num_edits = self._run, self._settings.measure, self._skips.edited(tried)
        after = self._continuations()
        generations = list(zip(self._examples, self._said_before, after, strict=True))
        if measure.after:
            self._write_cases(generations, tried)
        by_protocol = {protocol: (self._measured("before", 0, protocol), self._measured("after", num_edits, protocol))
                       for protocol in measure.protocols}
        first = by_protocol[measure.protocols[0]]
        summary = Summary(
            num_edits, measure.protocols[0], len(self._records),
            tuple(SkippedCase(one.case_id, one.error) for one in self._skips.in_order() if one.index < tried),
            self._stopped, pre=None if first[0] is None else first[0].main_metrics(),
            post=None if first[1] is None else first[1].main_metrics(),
            protocols={protocol: {name: None if one is None else estimates_to_dict(one.main_metrics())
                                  for name, one in zip(("pre", "post"), found, strict=True)}
                       for protocol, found in by_protocol.items()},
            watched={name: None if one is None else one.watched()
                     for name, one in zip(("pre", "post"), first, strict=True)},
            preparation_seconds=preparation_seconds,
            editing_seconds=sum(batch.wall_seconds for batch in self._log.batches),
            evaluation_seconds=sum(one.seconds for one in self._measurer.measurements),
            peak_memory_bytes=peak_memory_bytes(self._editable.model),
            weights_sha256=weights_checksum(self._editable))
        run.write_json(schema.EXAMPLES, {"before": self._said_before, "after": after})
        run.write_json(schema.SUMMARY, summary.to_dict())
        for observer in self._observers:
            observer.on_run_end(self._state(summary))
        return RunResult(summary.to_dict(), self._tracker, generations)

    def _measured(self, when: When, num_edits: int, protocol: str) -> Measurement | None:
        return next((one for one in self._measurer.measurements if not one.abilities
                     and (one.when, one.num_edits, one.protocol) == (when, num_edits, protocol)), None)

    def _write_cases(self, generations: Sequence[tuple[str, str, str]], tried: int) -> None:
        measure, total = self._settings.measure, len(self._records)
        protocol = measure.protocols[0]
        after = self._last_point(tried)
        post = self._measurer.scores(after)[protocol]
        before: dict[int, CaseScores] = {}
        if measure.before:
            point = self._of_the_edited(point_at(0, total, measure), 0)
            before = dict(zip(point.cases, self._measurer.scores(point)[protocol], strict=True))
        lines = []
        for case, is_now in zip(after.cases, post, strict=True):
            record, was = self._records[case], before.get(case)
            said = generations[case][1:] if case < len(generations) else None
            lines.append(CaseRecord(
                record.case_id, record.edit_prompt, record.subject, record.target_new, record.target_true,
                None if was is None else _scores(was), _scores(is_now),
                None if said is None else {"before": said[0], "after": said[1]}).to_dict())
        self._run.write_lines(schema.CASES, lines)


def _checkpoints(sizes: Sequence[int], every: int) -> set[int]:
    """After how many edits a checkpoint is made: a function of the batches alone, since it decides about bits."""
    found, done = [0], 0
    for size in sizes:
        done += size
        if done - found[-1] >= every:
            found.append(done)
    return {*found[1:], done}


def _finished(run: RunDirectory, callbacks: Sequence[EditCallback], examples: Sequence[str]) -> RunResult:
    state = read_state(run)
    tracker = HETracker()
    tracker.records = list(state.energy)
    for callback in callbacks:
        callback.on_run_end(state)
    said = _examples(run)
    return RunResult(run.read_json(schema.SUMMARY), tracker,
                     list(zip(examples, said["before"], said["after"], strict=False)))


def _examples(run: RunDirectory) -> dict[str, list[str]]:
    return read_record(dict[str, list[str]], run.read_json(schema.EXAMPLES), str(run.path / schema.EXAMPLES))


class _BatchLog(EditCallback):
    """Writes ``edits.jsonl``, a line a batch, and lets the batch be watched by what must not count as editing.

    Args:
        run, tracker: where to write, and whose energy.
        spaces: watches the batch.
        efficacy: gives percent of the batch's facts that the model says.

    Attributes:
        batches: of the run so far.
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


@dataclass(frozen=True)
class _Fact:
    """A fact of the run, as errors name it."""

    index: int
    case_id: int | str

    def __str__(self) -> str:
        return f"case_id {self.case_id}"


class _Undone(Exception):
    """A batch that was made to be undone."""


class _Undo(EditCallback):
    """Has every batch undone."""

    def on_batch_end(self, event: EditEvent) -> None:
        raise _Undone


def _scores(scores: CaseScores) -> dict[str, float | None]:
    return {metric: getattr(scores, metric) for metric in schema.FACT_METRICS}


def peak_memory_bytes(model: nn.Module) -> int:
    """Peak memory of this process: allocated on the GPUs that hold the model, else resident on the host."""
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    if gpus:
        return sum(int(torch.cuda.max_memory_allocated(gpu)) for gpu in gpus)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
