"""Measuring a run again from weights that it kept: other protocols, other facts, general abilities, its weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..callbacks.neurons import NeuronRecord, NeuronWatch
from ..callbacks.spaces import SpaceTracker, covers, read_spaces_csv
from ..datasets.loaders import EditRecord, load_records, records_fingerprint, with_protocol_targets
from ..editing.callbacks import EditCallback, EditEvent, MeasureEvent, RunState
from ..editing.checkpoints import load_weights, saved_weights
from ..editing.session import EditSession
from ..hparams import SPHEREHyperParams
from . import schema
from .directory import RunDirectory
from .measuring import (
    AbilitySettings,
    DueMeasurement,
    Measurer,
    MeasureSettings,
    Progress,
    abilities_at,
    measured_at,
    point_at,
    when_after,
)
from .schema import Measurement, Skipped, Summary, read_record

logger = logging.getLogger(__name__)


class EditedRun:
    """A run's facts and hyperparameters, read from its directory.

    Args:
        path: the run directory.

    Attributes:
        hparams: as the run resolved them.
        records: its facts, in the order of editing, but for those that it left out.
        last: number of edits that it ended with; that it is to end with while it has not.

    Raises:
        ValueError: the directory holds no run or a damaged one, or its data set has changed since.
    """

    def __init__(self, path: Path) -> None:
        self.directory = RunDirectory(path)
        config = self.directory.read_config()
        try:
            self.hparams = SPHEREHyperParams.from_dict(config["hparams"])
            records = _records(config["run"])
            fingerprint = config["run"]["records"]
            self._seed = int(config["run"].get("measure", {}).get("seed", 0))
        except KeyError as error:
            raise ValueError(f"{path} holds no run that can be measured again: config.yaml lacks {error}") from error
        if records_fingerprint(records) != fingerprint:
            raise ValueError(f"the facts of {path} are not in its data set any more: {config['run']['data']} has "
                             "changed since")
        # Refused before editing or left out at it; the summary has both, but only once the run has ended.
        skipped = {one.case_id for one in self.directory.records(schema.SKIPPED, Skipped)}
        summary = self._summary()
        if summary is not None:
            skipped |= {one.case_id for one in summary.skipped}
        self.records = [record for record in records if record.case_id not in skipped]
        self.last = len(self.records) if summary is None else summary.num_edits

    def measure(self, model: nn.Module, tok: PreTrainedTokenizerBase, at: Sequence[int], settings: MeasureSettings,
                progress: Progress | None = None, callbacks: Sequence[EditCallback] = ()) -> list[Measurement]:
        """Measure the model after so many edits, and add what is not there to ``metrics.jsonl``.

        What is there stays, and a warning says where it may be something else than what is asked for now.

        Args:
            model: the model that the run edited, just loaded; left with the weights of the last measurement.
            tok: its tokenizer.
            at: numbers of edits whose weights were kept, in any order, or 0 for the unedited model.
            settings: what to measure. With ``before`` and ``after`` off facts are left alone, and general abilities
                measured alone.
            progress: told how far a measurement is.
            callbacks: told of each measurement (``on_measured``).

        Returns:
            The measurements at these numbers of edits, those included that were there before. Protocol ``easyedit``
            measures the unedited model too, if that was not done.

        Raises:
            ValueError: weights were not kept, or are of another model, or what was measured before is damaged.
        """
        editable = self.hparams.editable(model)
        EditSession.of(model).bind(editable, self.hparams)  # takes note of the original weights
        config = self.directory.read_config()

        def tell(measurement: Measurement) -> None:
            run = RunState(self.directory.path, config, measurements=measurer.measurements)
            for callback in callbacks:
                callback.on_measured(MeasureEvent(run, measurement=measurement))

        measurer = Measurer(editable, tok, self.records, settings, self.directory, progress or (lambda *_: None), tell)
        # The unedited model's scores are what protocol easyedit compares with.
        numbers = sorted({*at, *([0] if "easyedit" in settings.protocols else [])})
        with self.directory.locked():
            for num_edits in numbers:
                if num_edits:
                    load_weights(editable, self.directory.checkpoints, num_edits)
                if settings.before or settings.after:
                    point = self._point(num_edits, settings)
                    self._warn_of_facts(point, settings, measurer.measurements)
                    measurer.measure(point)
                if settings.abilities.tasks:
                    self._warn_of_abilities(num_edits, settings.abilities, measurer.measurements)
                    measurer.measure_abilities(when_after(num_edits, self.last), num_edits)
        return [one for one in measurer.measurements if one.num_edits in numbers]

    def _summary(self) -> Summary | None:
        if not self.directory.has(schema.SUMMARY):
            return None
        where = f"{self.directory.path / schema.SUMMARY} is no summary of a run"
        summary = read_record(Summary, self.directory.read_json(schema.SUMMARY), where)
        if summary.num_edits < 1:
            raise ValueError(f"{where}: num_edits is {summary.num_edits}: it was changed by hand or damaged")
        return summary

    def _point(self, num_edits: int, settings: MeasureSettings) -> DueMeasurement:
        if num_edits:
            return point_at(num_edits, self.last, settings)
        # Whatever facts another point is measured on, protocol easyedit compares them with what is said here.
        every = replace(settings, cases=None) if "easyedit" in settings.protocols else settings
        return point_at(0, len(self.records), every)

    def _warn_of_facts(self, point: DueMeasurement, settings: MeasureSettings, measurements: Sequence[Measurement]
                       ) -> None:
        """Warn of what a point's measurements keep to, though it is asked for otherwise or can't be told."""
        scores = self.directory.lines(f"{schema.SCORES}/{point.when}-{point.num_edits}.jsonl")
        asked = {self.records[case].case_id for case in point.cases}
        whole = len(asked) == (point.num_edits or len(self.records))
        for protocol, found in measured_at(measurements, point).items():
            if protocol not in settings.protocols:
                continue
            known = {one.get("case_id") for one in scores if one.get("protocol") == protocol}
            cases = len(asked) if found.cases is None else found.cases
            if (cases != len(asked) and not (whole and cases > len(asked))) or (known and not asked <= known):
                self._warn(f"{protocol} after {point.num_edits} edits", f"on {cases} facts, which are not the "
                           f"{len(asked)} asked for")
            if settings.text is not None and found.perplexity is not None:
                self._warn(f"perplexity after {point.num_edits} edits", "on whatever text it was measured")
            asked_of_texts = {"fluency": settings.decoding, "consistency": settings.references}
            for quality, how in asked_of_texts.items():
                if how is not None and quality in found.metrics:
                    self._warn(f"{quality} after {point.num_edits} edits", f"by {found.metrics[quality].protocol}")

    def _warn_of_abilities(self, num_edits: int, settings: AbilitySettings, measurements: Sequence[Measurement]
                           ) -> None:
        for task, found in abilities_at(measurements, num_edits).items():
            if task in settings.tasks:
                self._warn(f"{task} after {num_edits} edits", f"on {found.n} records, {found.shots} examples, by "
                           f"{found.protocol}")

    def _warn(self, what: str, how: str) -> None:
        logger.warning("%s has %s already, %s: it stays. Remove its line to have it measured anew",
                       self.directory.path / schema.METRICS, what, how)

    def describe_weights(self, model: nn.Module, progress: Progress | None = None) -> None:
        """Write ``neurons.safetensors`` of the latest kept weights, and ``spaces.csv`` of the changes between them.

        For runs made before they wrote these themselves. Where weights were kept after every batch, it is what the run
        would have written (shares to their last digit); where less often, a line of ``spaces.csv`` tells of several
        batches.
        Neurons of no fewer edits, and spaces that tell of every change, stay as they are.

        Args:
            model: the model that the run edited, just loaded, or measured since; left unedited.
            progress: told ("weights", how many of the kept weights are done, and of how many).

        Raises:
            ValueError: no weights were kept, they are damaged or of another model, or one of the two files is damaged.
        """
        editable = self.hparams.editable(model)
        session = EditSession.of(model)
        session.bind(editable, self.hparams)
        folder, report = self.directory.checkpoints, progress or (lambda *_: None)
        kept = saved_weights(folder)
        if not kept:
            raise ValueError(f"{folder} holds no weights: nothing can be told of them any more")

        def put(num_edits: int) -> None:
            if num_edits:
                load_weights(editable, folder, num_edits)
            else:
                for layer, weight in session.original.items():
                    editable.set_weight(layer, weight)

        def event(num_edits: int) -> EditEvent:
            return EditEvent(model, editable.weights(), num_edits, 0, ())

        with self.directory.locked():
            spaces = self.directory.place(schema.SPACES)
            told = spaces.is_file() and covers(read_spaces_csv(spaces), kept[-1])
            path = self.directory.place(schema.NEURONS)
            seen = path.is_file() and NeuronRecord.read(path).num_edits >= kept[-1]
            if told and seen:
                return
            try:
                put(0)
                neurons = None if seen else NeuronWatch(event(0).weights, self.hparams.gamma, self._seed)
                tracker = SpaceTracker(spaces, self.hparams.gamma, self.hparams.principal_space == "pretrained")
                for done, (since, num_edits) in enumerate(pairwise([0, *kept]), start=1):
                    if not told:
                        tracker.on_batch_start(event(since))
                    put(num_edits)
                    if not told:
                        tracker.on_batch_end(event(num_edits))
                    report("weights", done, len(kept))
                if neurons is not None:
                    neurons.write(path, event(kept[-1]).weights, kept[-1])
            finally:
                put(0)


def _records(run: dict[str, Any]) -> list[EditRecord]:
    data = None if run["data"] is None else Path(run["data"])
    drawn = load_records(run["dataset"], data, run["num_edits"], run["seed"], order_seed=run.get("order_seed"),
                         skip=run.get("skip", 0))
    return with_protocol_targets(drawn, run["protocol"])
