"""Measures a run again from the weights that it kept: by other protocols, on other facts, general abilities."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..datasets.loaders import EditRecord, load_records, records_fingerprint, with_protocol_targets
from ..editing.callbacks import EditCallback, MeasureEvent, RunState
from ..editing.checkpoints import load_weights
from ..editing.session import EditSession
from ..evaluation.protocols import needing_unedited
from ..hparams import SPHEREHyperParams
from ..utils.progress import PhaseProgress
from . import schema
from .directory import RunDirectory
from .measuring import Measurer, abilities_at, measured_at
from .schedule import DueMeasurement, MeasureSettings, measurement_at, phase_at
from .schema import Measurement, Skipped, Summary, read_record

logger = logging.getLogger(__name__)


class EditedRun:
    """A run's facts and hyperparameters, read from its directory.

    Args:
        path: the run directory.

    Attributes:
        hparams: as the run resolved them.
        records: its facts without skipped ones, in the order of editing.
        last: number of edits at the end; of an unfinished run, the expected number.

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
        except KeyError as error:
            raise ValueError(f"{path} holds no run that can be measured again: config.yaml lacks {error}") from error
        if records_fingerprint(records) != fingerprint:
            raise ValueError(f"the facts of {path} are not in its data set any more: {config['run']['data']} has "
                             "changed since")
        # skipped.jsonl lacks facts refused before editing; the summary lists both, but only once the run has ended.
        skipped = {one.case_id for one in self.directory.records(schema.SKIPPED, Skipped)}
        summary = self._summary()
        if summary is not None:
            skipped |= {one.case_id for one in summary.skipped}
        self.records = [record for record in records if record.case_id not in skipped]
        self.last = len(self.records) if summary is None else summary.num_edits

    def measure(self, model: nn.Module, tok: PreTrainedTokenizerBase, at: Sequence[int], settings: MeasureSettings,
                progress: PhaseProgress | None = None, callbacks: Sequence[EditCallback] = ()) -> list[Measurement]:
        """Measure the model at these numbers of edits, and add new measurements to ``metrics.jsonl``.

        Existing measurements stay, with a warning, since their settings may have been others.

        Args:
            model: the model that the run edited, just loaded; ends with the weights of the last measurement.
            tok: its tokenizer.
            at: numbers of edits whose weights were kept, in any order; 0 is the unedited model.
            settings: what to measure. With ``before`` and ``after`` off, only general abilities are measured.
            progress: called with the phase and the cases done.
            callbacks: notified of each measurement (``on_measured``).

        Returns:
            All measurements at these numbers of edits, new and existing. Protocol ``easyedit`` also measures the
            unedited model, if that is missing.

        Raises:
            ValueError: weights were not kept, or are of another model, or existing measurements are damaged.
        """
        editable = self.hparams.editable(model)
        EditSession.of(model).bind(editable, self.hparams)  # stores the original weights
        config = self.directory.read_config()

        def notify(measurement: Measurement) -> None:
            run = RunState(self.directory.path, config, measurements=measurer.measurements)
            for callback in callbacks:
                callback.on_measured(MeasureEvent(run, measurement=measurement))

        measurer = Measurer(editable, tok, self.records, settings, self.directory, progress or (lambda *_: None),
                            notify)
        # Some protocols compare with the unedited model's scores.
        numbers = sorted({*at, *([0] if needing_unedited(settings.protocols) else [])})
        with self.directory.locked():
            for num_edits in numbers:
                if num_edits:
                    load_weights(editable, self.directory.checkpoints, num_edits)
                if settings.before or settings.after:
                    point = self._point(num_edits, settings)
                    existing = measured_at(measurer.measurements, point)
                    self._warn(num_edits, [name for name in existing if name in settings.protocols])
                    measurer.measure(point)
                if settings.abilities.tasks:
                    known = abilities_at(measurer.measurements, num_edits)
                    self._warn(num_edits, [name for name in known if name in settings.abilities.tasks])
                    measurer.measure_abilities(phase_at(num_edits, self.last), num_edits)
        return [one for one in measurer.measurements if one.num_edits in numbers]

    def _summary(self) -> Summary | None:
        if not self.directory.has(schema.SUMMARY):
            return None
        where = f"{self.directory.path / schema.SUMMARY} is not a summary of a run"
        summary = read_record(Summary, self.directory.read_json(schema.SUMMARY), where)
        if summary.num_edits < 1:
            raise ValueError(f"{where}: num_edits is {summary.num_edits}: it was changed by hand or damaged")
        return summary

    def _point(self, num_edits: int, settings: MeasureSettings) -> DueMeasurement:
        if num_edits:
            return measurement_at(num_edits, self.last, settings)
        # Such protocols compare any facts measured later with these scores, so they need all of them.
        every = replace(settings, cases=None) if needing_unedited(settings.protocols) else settings
        return measurement_at(0, len(self.records), every)

    def _warn(self, num_edits: int, existing: Sequence[str]) -> None:
        if existing:
            logger.warning("%s has %s after %d edits already, which stays, whatever its settings were. Remove its line "
                           "to have it measured anew", self.directory.path / schema.METRICS, ", ".join(existing),
                           num_edits)


def _records(run: dict[str, Any]) -> list[EditRecord]:
    data = None if run["data"] is None else Path(run["data"])
    drawn = load_records(run["dataset"], data, run["num_edits"], run["seed"], order_seed=run.get("order_seed"),
                         skip=run.get("skip", 0))
    return with_protocol_targets(drawn, run["protocol"])
