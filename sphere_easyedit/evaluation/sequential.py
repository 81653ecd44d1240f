"""The sequential run: batch after batch into one model, measured on the way, in a directory that can be resumed.

A killed run goes on from its last checkpoint and ends with the bits of an undisturbed one. For that an undisturbed run,
too, forgets at each checkpoint what a checkpoint does not hold (``EditSession.settle``), and nothing that decides about
bits depends on when the process was started.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..callbacks import EditCallback, EditEvent, HETracker, read_energy_csv
from ..editing.session import EditSession
from ..hparams import SPHEREHyperParams
from ..models import EditableModel
from ..wrapper import Executor, apply_sphere_to_model, prepare
from .checkpoints import resumable, resume_from, save_checkpoint, save_weights, thin_out
from .conflicts import find_conflicts
from .datasets import EditRecord, records_fingerprint
from .following import FollowedWeights
from .generation import generate_continuations
from .measuring import (
    METRIC_NAMES,
    Measurer,
    MeasureSettings,
    Progress,
    abilities_are_due,
    passed,
    point_at,
    points_after,
    when_after,
)
from .metrics import CaseScores, Protocol, evaluate_records
from .neurons import NeuronWatch
from .run_config import check_same_run, run_config
from .run_directory import (
    CASES,
    CONFIG,
    EDITS,
    ENERGY,
    EXAMPLES,
    METRICS,
    NEURONS,
    SPACES,
    SUMMARY,
    RunDirectory,
    When,
)
from .spaces import SpaceTracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunSettings:
    """What a run is made of, besides the hyperparameters.

    Attributes:
        output: run directory; must be empty or absent, unless ``resume``.
        batch_size: edits a batch.
        examples: so many cases' greedy continuations are kept from before and after editing.
        described: further entries for ``config.yaml`` (data set, seed, command ...).
        measure: what is measured, and when.
        resume: go on from the directory's last checkpoint; a directory without one begins from the start.
        checkpoint_every: a checkpoint is written after the first batch with which so many edits have come since the
            last one. What was edited since then is what a killed run does again.
        keep_checkpoints: so many of the newest are kept; 0 keeps all.
        keep_weights_every: weights (not sessions) are kept for good after every so many edits; None for none but the
            last. They are what ``evaluate --at`` and exports start from.
        follows: directory of a finished run of MEMIT with the same facts and batches, all of whose weights were kept:
            PRUNE restrains that run's weights in place of editing anew. It edits as MEMIT does.
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
    follows: Path | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("batch_size", self.batch_size, 1), ("checkpoint_every", self.checkpoint_every, 1),
                                   ("keep_checkpoints", self.keep_checkpoints, 0), ("examples", self.examples, 0),
                                   ("keep_weights_every", self.keep_weights_every or 1, 1)):
            if value < least:
                raise ValueError(f"{name} is {value}; give at least {least}")


@dataclass(frozen=True)
class RunResult:
    """What a run found: ``summary.json``'s content, energy records, and the examples' continuations."""

    summary: dict[str, Any]
    tracker: HETracker
    generations: list[tuple[str, str, str]]  # prompt, before, after


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
        callbacks: told of every batch, before it is written down: a batch that one of them undoes leaves no line.
        progress: called with a phase ("before", "editing", "during" ...), and how much of it is done.

    Raises:
        ValueError: the directory holds files (and ``resume`` was not asked for) or another run than this one, there is
            nothing to edit, or a batch fails; all batches up to the last checkpoint are then in the run directory.
    """
    if not records:
        raise ValueError("there are no records to edit")
    run = RunDirectory(settings.output)
    goes_on = settings.resume and run.has(CONFIG)
    if not goes_on and settings.output.exists() and any(settings.output.iterdir()):
        raise ValueError(f"{settings.output} is not empty: give a new directory for the run"
                         + (", this one holds no run to resume" if settings.resume else ", or resume it"))
    editable = hparams.editable(model)
    session = EditSession.of(model)
    if session.num_edits:
        raise ValueError(f"the model holds {session.num_edits} edits already: start a run from a model just loaded")
    # All that can be refused is refused, and what takes long is collected, before anything is measured or changed.
    started = time.perf_counter()
    prepare(editable, tok, [record.request() for record in records], hparams, session, settings.batch_size)
    report = progress or (lambda what, done, total: None)
    measurer = Measurer(editable, tok, records, settings.measure, run, report)
    preparation_seconds = time.perf_counter() - started
    described = {**settings.described, "num_edits": len(records), "batch_size": settings.batch_size,
                 "protocol": settings.measure.protocols[0], "records": records_fingerprint(records),
                 "checkpoint_every": settings.checkpoint_every,
                 "follows": None if settings.follows is None else str(settings.follows),
                 "measure": settings.measure.described()}
    config = run_config(model, hparams, described)
    if goes_on:
        same_versions = check_same_run(run, config)
        if run.has(SUMMARY):
            logger.info("%s is finished: nothing is left to do", settings.output)
            return _finished(run, [record.edit_prompt for record in records[: settings.examples]])
    work = _Run(editable, tok, records, hparams, settings, run, measurer, callbacks, report)
    with run.locked():
        if goes_on:
            _go_back_to_checkpoint(run, editable, same_versions)
        else:
            run.write_text(CONFIG, yaml.safe_dump(config, sort_keys=False))
            if conflicts := find_conflicts(records):
                logger.warning("%s", conflicts.summary())
                run.write_json("conflicts.json", conflicts.to_dict())
        return work.complete(preparation_seconds)


def _go_back_to_checkpoint(run: RunDirectory, editable: EditableModel, same_versions: bool) -> None:
    """Bring the model to the last checkpoint, and drop what was written of later batches and will be written again.

    Measurements of later batches stand: the batches end in the same bits again, unless other versions compute them.
    """
    numbers = resumable(run.checkpoints)
    num_edits = numbers[-1] if numbers else 0
    if numbers:
        resume_from(editable, run.checkpoints, num_edits)
    run.keep_until(EDITS, num_edits)
    run.keep_whole_lines(METRICS)
    if not same_versions:
        run.keep_until(METRICS, num_edits)
        (run.path / NEURONS).unlink(missing_ok=True)  # the next measurement makes it anew
        for path in itertools.chain.from_iterable((run.path / part).glob("*.jsonl") for part in ("scores", "texts")):
            if int(path.stem.rpartition("-")[2]) > num_edits:
                path.unlink()
    logger.info("resuming %s after %d edits", run.path, num_edits)


class _Run:
    """The batches and measurements of one run that are still to be done."""

    def __init__(self, editable: EditableModel, tok: PreTrainedTokenizerBase, records: Sequence[EditRecord],
                 hparams: SPHEREHyperParams, settings: RunSettings, run: RunDirectory, measurer: Measurer,
                 callbacks: Sequence[EditCallback], report: Progress) -> None:
        self._editable, self._tok, self._records, self._hparams = editable, tok, records, hparams
        self._settings, self._run, self._measurer, self._report = settings, run, measurer, report
        self._tracker = HETracker(run.path / ENERGY)
        spaces = SpaceTracker(run.path / SPACES, hparams.gamma, hparams.principal_space == "pretrained")
        self._callbacks = [*callbacks, self._tracker, _BatchLog(run, self._tracker, spaces, self._efficacy, records)]
        self._examples = [record.edit_prompt for record in records[: settings.examples]]
        total = len(records)
        self._sizes = [min(settings.batch_size, total - first) for first in range(0, total, settings.batch_size)]
        self._checkpoints = _checkpoints(self._sizes, settings.checkpoint_every)
        ends = list(itertools.accumulate(self._sizes))
        self._kept_for_good = {end for end, size in zip(ends, self._sizes, strict=True)
                               if end == total or passed(end, size, settings.keep_weights_every)}
        self._executor: Executor | None = None
        if settings.follows is not None:
            self._executor = FollowedWeights(settings.follows, editable, hparams, ends)
        # The model is the unedited one still: no checkpoint has been put in.
        self._neurons = NeuronWatch(self._weights(), hparams.gamma, settings.measure.seed)

    def complete(self, preparation_seconds: float) -> RunResult:
        """Do what is left, and sum up."""
        session, total = EditSession.of(self._editable.model), len(self._records)
        measure = self._settings.measure
        if session.num_edits == 0 and not self._run.has(EXAMPLES):
            self._run.write_json(EXAMPLES, {"before": self._continuations()})
        done = 0
        for size in (0, *self._sizes):  # the model as it was loaded comes before the first batch
            done += size
            if done < session.num_edits:  # measured before the checkpoint that the run goes on from
                continue
            if done > session.num_edits:
                self._edit(done - size, size)
                self._keep(session)
            points = points_after(done, size, total, measure)
            for point in points:
                self._measurer.measure(point)
            if done == total or any(point.when == "during" for point in points):
                self._neurons.write(self._run.path / NEURONS, self._weights(), done)
            if abilities_are_due(done, size, total, measure.abilities):
                self._measurer.measure_abilities(when_after(done, total), done)
        return self._sum_up(preparation_seconds)

    def _weights(self) -> dict[int, Tensor]:
        return {layer: self._editable.weight(layer) for layer in self._editable.layers}

    def _efficacy(self, batch: Sequence[EditRecord]) -> float | None:
        """Percent of facts that the model says as it stands, by the first protocol and the edit prompts alone."""
        asked = [replace(record, paraphrase_prompts=(), neighborhood_prompts=(), generation_prompts=(),
                         portability_prompts=()) for record in batch]
        try:
            scores = evaluate_records(self._editable.model, self._tok, asked, self._settings.measure.protocols[0])
        except ValueError as error:  # the protocol does not fit the facts
            logger.debug("no efficacy of this batch: %s", error)
            return None
        found = [score.efficacy for score in scores if score.efficacy is not None]
        return 100.0 * sum(found) / len(found) if found else None

    def _edit(self, first: int, size: int) -> None:
        done = itertools.count(first + 1)

        def advance(count: int) -> None:
            for _ in range(count):
                self._report("editing", next(done), len(self._records))

        requests = [record.request() for record in self._records[first: first + size]]
        apply_sphere_to_model(self._editable.model, self._tok, requests, self._hparams, callbacks=self._callbacks,
                              progress=advance, executor=self._executor)

    def _keep(self, session: EditSession) -> None:
        """Write what is to be kept of the model as it stands."""
        folder = self._run.checkpoints
        if session.num_edits in self._checkpoints:
            session.settle()
            save_checkpoint(self._editable, session, folder)
            thin_out(folder, self._settings.keep_checkpoints, self._kept_for_good)
        elif session.num_edits in self._kept_for_good:
            save_weights(self._editable, folder, session.num_edits)

    def _continuations(self) -> list[str]:
        return generate_continuations(self._editable.model, self._tok, self._examples)

    def _sum_up(self, preparation_seconds: float) -> RunResult:
        run, total, measure = self._run, len(self._records), self._settings.measure
        lines = run.lines(METRICS)
        before, after = self._continuations_before(), self._continuations()
        generations = list(zip(self._examples, before, after, strict=True))
        if measure.after:
            self._write_cases(generations)
        by_protocol = {protocol: {"pre": _summary_line(lines, "before", protocol),
                                  "post": _summary_line(lines, "after", protocol)} for protocol in measure.protocols}
        summary = {
            "protocol": measure.protocols[0],
            "num_edits": total,
            **by_protocol[measure.protocols[0]],
            "protocols": by_protocol,
            "watched": {"pre": _watched(lines, "before"), "post": _watched(lines, "after")},
            "preparation_seconds": preparation_seconds,
            "editing_seconds": sum(line["wall_seconds"] for line in run.lines(EDITS)),
            "evaluation_seconds": sum(line["seconds"] for line in lines),
            "peak_memory_bytes": peak_memory_bytes(self._editable.model),
            "weights_sha256": weights_checksum(self._editable),
        }
        # One batch at least is in the model, so the tracker has read or written its records.
        tracker = self._tracker
        if not tracker.records:
            tracker.records = read_energy_csv(run.path / ENERGY)
        run.write_json(EXAMPLES, {"before": before, "after": after})
        run.write_json(SUMMARY, summary)
        return RunResult(summary, tracker, generations)

    def _write_cases(self, generations: Sequence[tuple[str, str, str]]) -> None:
        measure, total = self._settings.measure, len(self._records)
        after = point_at(total, total, measure)
        post = self._measurer.scores(after)[measure.protocols[0]]
        pre: Sequence[CaseScores | None] = [None] * len(post)
        if measure.before:
            pre = self._measurer.scores(point_at(0, total, measure))[measure.protocols[0]]
        lines = []
        for case, was, is_now in zip(after.cases, pre, post, strict=True):
            record = self._records[case]
            line: dict[str, Any] = {"case_id": record.case_id, "prompt": record.edit_prompt, "subject": record.subject,
                                    "target_new": record.target_new, "target_true": record.target_true,
                                    "pre": None if was is None else _scores(was), "post": _scores(is_now)}
            if case < len(generations):
                _, said, says = generations[case]
                line["generations"] = {"before": said, "after": says}
            lines.append(json.dumps(line))
        self._run.write_text(CASES, "\n".join(lines) + "\n")

    def _continuations_before(self) -> list[str]:
        found: list[str] = self._run.read_json(EXAMPLES)["before"]
        return found


def _checkpoints(sizes: Sequence[int], every: int) -> set[int]:
    """After how many edits a checkpoint is made: a function of the batches alone, since it decides about bits."""
    found, done = [0], 0
    for size in sizes:
        done += size
        if done - found[-1] >= every:
            found.append(done)
    return {*found[1:], done}


def _finished(run: RunDirectory, examples: Sequence[str]) -> RunResult:
    tracker = HETracker()
    tracker.records = read_energy_csv(run.path / ENERGY)
    said = run.read_json(EXAMPLES)
    generations = list(zip(examples, said["before"], said["after"], strict=False))
    return RunResult(run.read_json(SUMMARY), tracker, generations)


class _BatchLog(EditCallback):
    """Writes ``edits.jsonl``, a line a batch, and lets the batch be watched by what must not count as editing.

    Args:
        run, tracker: where to write, and whose energy.
        spaces: watches the batch.
        efficacy: gives percent of the batch's facts that the model says.
        records: all facts of the run, in the order of editing.
    """

    def __init__(self, run: RunDirectory, tracker: HETracker, spaces: SpaceTracker,
                 efficacy: Callable[[Sequence[EditRecord]], float | None], records: Sequence[EditRecord]) -> None:
        self._run, self._tracker, self._spaces = run, tracker, spaces
        self._efficacy, self._records = efficacy, records
        self._started = 0.0

    def on_batch_start(self, event: EditEvent) -> None:
        self._spaces.on_batch_start(event)
        self._started = time.perf_counter()

    def on_batch_end(self, event: EditEvent) -> None:
        wall_seconds = time.perf_counter() - self._started + event.seconds.get("preparation", 0.0)
        self._spaces.on_batch_end(event)
        efficacy = self._efficacy(self._records[event.num_edits - len(event.case_ids): event.num_edits])
        self._run.append(EDITS, {
            "num_edits": event.num_edits, "case_ids": list(event.case_ids), "seconds": dict(event.seconds),
            "wall_seconds": wall_seconds, "losses": list(event.losses), "update_norms": dict(event.update_norms),
            "energy": self._tracker.records[-1].energy, "efficacy": efficacy})


def _summary_line(lines: Sequence[Mapping[str, Any]], when: When, protocol: Protocol) -> dict[str, Any] | None:
    """The metrics of a line, as ``summary.json`` holds them."""
    for line in lines:
        if line["when"] == when and line["protocol"] == protocol:
            return {name: line[name] for name in METRIC_NAMES if name in line}
    return None


def _watched(lines: Sequence[Mapping[str, Any]], when: When) -> dict[str, Any] | None:
    return next((line["watched"] for line in lines if line["when"] == when and "watched" in line), None)


def _scores(scores: CaseScores) -> dict[str, float | None]:
    return {"efficacy": scores.efficacy, "generalization": scores.generalization, "specificity": scores.specificity}


def weights_checksum(editable: EditableModel) -> str:
    """SHA-256 of the edited weights' bytes, in the layers' order."""
    digest = hashlib.sha256()
    for layer in editable.layers:
        stored = editable.parameter(layer).detach().cpu().contiguous()
        digest.update(stored.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def peak_memory_bytes(model: nn.Module) -> int:
    """Peak memory of this process: allocated on the GPUs that hold the model, else resident on the host."""
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    if gpus:
        return sum(int(torch.cuda.max_memory_allocated(gpu)) for gpu in gpus)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux
