"""Measures a model at points of its run and writes each measurement to the run directory.

Each measurement is a line of ``metrics.jsonl``. Scores of single cases go to ``scores/<when>-<num_edits>.jsonl`` in
chunks, so that a resumed run repeats at most one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Final

from transformers import PreTrainedTokenizerBase

from ..datasets.loaders import EditRecord, edits_alt, records_fingerprint
from ..editing.callbacks import change_norms
from ..editing.session import EditSession
from ..evaluation.metrics import CaseScores, Protocol, evaluate_protocols, summarise
from ..evaluation.perplexity import held_out_texts, perplexity
from ..evaluation.protocols import needing_unedited
from ..evaluation.references import load_references
from ..evaluation.text_quality import TextQuality, fluency_protocol, measure_text_quality, summarise_text_quality
from ..models.architecture import EditableModel
from ..models.fingerprint import model_fingerprint
from ..utils.files import atomic_write
from ..utils.progress import PhaseProgress
from .directory import RunDirectory
from .schedule import DueMeasurement, MeasureSettings
from .schema import METRICS, SCORES, TEXTS, AbilityEstimate, Estimate, Measurement, When, read_record

logger = logging.getLogger(__name__)

_CHUNK: Final = 200  # cases whose scores are written at once: minutes of work on two cores, seconds on a GPU
_TEXT_CHUNK: Final = 50
_BEFORE: Final = f"{SCORES}/before-0.jsonl"


def measured_at(measurements: Sequence[Measurement], point: DueMeasurement) -> dict[str, Measurement]:
    """Existing measurements of facts at a point, by protocol."""
    return {one.protocol: one for one in measurements
            if not one.abilities and (one.when, one.num_edits) == (point.when, point.num_edits)}


def abilities_at(measurements: Sequence[Measurement], num_edits: int) -> dict[str, AbilityEstimate]:
    """Existing measurements of general abilities after ``num_edits``, by task."""
    return {task: estimate for one in measurements if one.num_edits == num_edits
            for task, estimate in one.abilities.items()}


class Measurer:
    """Measures a model and writes the results; what is already written is not measured again.

    Args:
        editable: the model.
        tok: its tokenizer.
        records: all facts of the run, in the order of editing.
        settings: what is measured.
        run: directory of the results.
        progress: called with the phase and the cases done.
        on_measured: called with each new measurement once it is written.

    Attributes:
        measurements: all of the run so far, also those of earlier processes.

    Raises:
        ImportError: general abilities are to be measured, and lm-eval is missing.
        ValueError: the held-out text can't be read, the protocols edit different facts, or a general ability is unknown
            or its data missing.
    """

    def __init__(self, editable: EditableModel, tok: PreTrainedTokenizerBase, records: Sequence[EditRecord],
                 settings: MeasureSettings, run: RunDirectory, progress: PhaseProgress,
                 on_measured: Callable[[Measurement], None] | None = None) -> None:
        self._editable, self._tok, self._records = editable, tok, records
        self._settings, self._run, self._progress, self._on_measured = settings, run, progress, on_measured
        self._scores: dict[str, dict[tuple[str, int], CaseScores]] = {}  # by file: before editing, and the latest
        alt = [protocol for protocol in settings.protocols if edits_alt(protocol)]
        if 0 < len(alt) < len(settings.protocols) and any(record.dataset == "zsre" for record in records):
            raise ValueError(f"protocols are {', '.join(settings.protocols)}, but {alt[0]!r} edits other targets into "
                             "ZsRE (`alt`) than the rest: measure it in a separate run")
        self._texts = None if settings.text is None else held_out_texts(settings.text)
        self._references = None
        if settings.references is not None:
            self._references = load_references(settings.references, records)
        if settings.abilities.tasks:
            from ..evaluation.abilities.general import check_abilities  # an extra; takes seconds to import

            check_abilities(editable.model, tok, settings.abilities.tasks, **settings.abilities.options())

    @cached_property
    def measurements(self) -> list[Measurement]:
        return self._run.measurements()

    def _add(self, measurement: Measurement) -> None:
        self._run.append(METRICS, measurement.to_dict())
        self.measurements.append(measurement)
        if self._on_measured is not None:
            self._on_measured(measurement)

    def measure(self, point: DueMeasurement) -> None:
        """Measure at a point by every protocol, and add perplexity and text quality that older lines lack."""
        existing = measured_at(self.measurements, point)
        missing = [protocol for protocol in self._settings.protocols if protocol not in existing]
        incomplete = [existing[protocol] for protocol in self._settings.protocols
                      if protocol in existing and self._lacks(existing[protocol], point)]
        if not missing and not incomplete:
            return
        started = time.perf_counter()
        scores = self.scores(point) if missing else {}
        perplexity, quality = self._perplexity(), self._text_quality(point)
        norms = change_norms(self._editable.weights(), EditSession.of(self._editable.model).original)
        seconds = time.perf_counter() - started
        if incomplete:
            for index, one in enumerate(self.measurements):
                if any(one is other for other in incomplete):  # existing values stay, whatever the settings were
                    self.measurements[index] = replace(
                        one, metrics={**one.metrics, **{k: v for k, v in quality.items() if k not in one.metrics}},
                        perplexity=perplexity if one.perplexity is None else one.perplexity)
            self._run.write_lines(METRICS, [one.to_dict() for one in self.measurements])
        for protocol in missing:
            metrics = {name: read_record(Estimate, one, name)
                       for name, one in summarise(scores[protocol], self._settings.seed).items()} | quality
            self._add(Measurement(point.num_edits, point.when, protocol, metrics, perplexity, norms, len(point.cases),
                                  seconds=seconds))
            seconds = 0.0  # all protocols were measured at once

    def _lacks(self, measurement: Measurement, point: DueMeasurement) -> bool:
        """Whether a measurement lacks perplexity, fluency or consistency that the settings ask for."""
        required = set()
        if any(self._records[case].generation_prompts for case in point.cases):
            required |= {"fluency"} if self._settings.decoding is not None else set()
            required |= {"consistency"} if self._references is not None else set()
        return not required <= measurement.metrics.keys() or (
            self._texts is not None and measurement.perplexity is None)

    def measure_abilities(self, when: When, num_edits: int) -> None:
        """Measure the general abilities that are not measured yet after ``num_edits``."""
        settings = self._settings.abilities
        measured = abilities_at(self.measurements, num_edits)
        tasks = [task for task in settings.tasks if task not in measured]
        if not tasks:
            return
        from ..evaluation.abilities.general import general_abilities  # an extra; takes seconds to import

        started = time.perf_counter()
        scores = general_abilities(self._editable.model, self._tok, tasks, **settings.options(),
                                   progress=lambda task, done, total: self._progress(when, done, total))
        protocols = sorted({score.protocol for score in scores.values()})
        self._add(Measurement(
            num_edits, when, "; ".join(protocols), seconds=time.perf_counter() - started,
            abilities={task: read_record(AbilityEstimate, score.to_dict(), task) for task, score in scores.items()}))

    def scores(self, point: DueMeasurement) -> dict[Protocol, list[CaseScores]]:
        """Scores of a point's cases by protocol: read from its file as far as it goes, the rest measured and added."""
        name = f"{SCORES}/{point.when}-{point.num_edits}.jsonl"
        shared = self._shared_scores() if point.when == "before" and not self._run.has(name) else None
        if shared is not None and shared.exists():
            logger.info("reusing another run's scores of the unedited model on these facts: %s", shared)
            self._run.write_text(name, shared.read_text(encoding="utf-8"))
        protocols, known = self._settings.protocols, self._known_scores(name)
        records = [self._records[case] for case in point.cases]
        unedited = self._unedited_scores(point)
        for start in range(0, len(records), _CHUNK):
            chunk = records[start: start + _CHUNK]
            missing = {(protocol, record.case_id) for protocol in protocols for record in chunk} - known.keys()
            if not missing:
                continue

            def report(part: int, parts: int, start: int = start, count: int = len(chunk)) -> None:
                self._progress(point.when, start + count * part // parts, len(records))

            # An incomplete chunk is measured as a whole: its padding, and so its bits, depend on all of its cases.
            found = evaluate_protocols(self._editable.model, self._tok, chunk, protocols, unedited, progress=report)
            fresh = {(one.protocol, one.case_id): one for scores in found.values() for one in scores}
            self._run.append_text(name, _json_lines(one for key, one in fresh.items() if key in missing))
            known.update(fresh)
        if shared is not None and not shared.exists():
            with atomic_write(shared) as temporary:
                temporary.write_bytes((self._run.path / name).read_bytes())
        return {protocol: [known[protocol, record.case_id] for record in records] for protocol in protocols}

    def _text_quality(self, point: DueMeasurement) -> dict[str, Estimate]:
        """Fluency and consistency of a point's cases that have generation prompts."""
        decoding = self._settings.decoding
        records = [self._records[case] for case in point.cases if self._records[case].generation_prompts]
        if decoding is None or not records:
            return {}
        name = f"{TEXTS}/{point.when}-{point.num_edits}.jsonl"
        self._run.keep_whole_lines(name)
        protocols = {"fluency": fluency_protocol(decoding),
                     "consistency": None if self._references is None else self._references.protocol}
        # The file may also hold other facts' texts, or texts with another decoding or other references.
        known = {one.case_id: one for one in map(TextQuality.from_dict, self._run.lines(name))
                 if (one.fluency_protocol, one.consistency_protocol) == tuple(protocols.values())}
        missing = [record for record in records if record.case_id not in known]
        for start in range(0, len(missing), _TEXT_CHUNK):
            fresh = measure_text_quality(self._editable.model, self._tok, missing[start: start + _TEXT_CHUNK],
                                         self._references, decoding)
            known |= {one.case_id: one for one in fresh}
            self._run.append_text(name, _json_lines(fresh))
            self._progress(point.when, len(records) - len(missing) + start + len(fresh), len(records))
        summary = summarise_text_quality([known[record.case_id] for record in records], self._settings.seed)
        return {name: read_record(Estimate, {**one, "protocol": protocols[name]}, name)
                for name, one in summary.items() if one["n"]}

    def _known_scores(self, name: str) -> dict[tuple[str, int], CaseScores]:
        """Scores in a file by protocol and case_id, read once."""
        if name not in self._scores:
            self._run.keep_whole_lines(name)
            self._scores = {kept: scores for kept, scores in self._scores.items() if _BEFORE in (kept, name)}
            self._scores[name] = {(line["protocol"], line["case_id"]): CaseScores.from_dict(line)
                                  for line in self._run.lines(name)}
        return self._scores[name]

    def _unedited_scores(self, point: DueMeasurement) -> Mapping[int, CaseScores] | None:
        """Scores of the unedited model by case_id, for protocols that compare with them."""
        comparing = needing_unedited(self._settings.protocols)
        if not comparing or point.when == "before":
            return None
        return {case: scores for (protocol, case), scores in self._known_scores(_BEFORE).items()
                if protocol in comparing}

    def _perplexity(self) -> float | None:
        if self._texts is None:
            return None
        return perplexity(self._editable.model, self._tok, self._texts, self._settings.text_tokens).perplexity

    def _shared_scores(self) -> Path | None:
        """The file in ``shared_before`` for this model, these facts and protocols."""
        if self._settings.shared_before is None:
            return None
        key = {"model": model_fingerprint(self._editable.model), "records": records_fingerprint(self._records),
               "cases": [self._settings.cases, self._settings.seed], "protocols": sorted(self._settings.protocols)}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        return self._settings.shared_before / f"before-{digest}.jsonl"


def _json_lines(records: Iterable[CaseScores | TextQuality]) -> str:
    return "".join(json.dumps(one.to_dict()) + "\n" for one in records)
