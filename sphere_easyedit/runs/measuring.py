"""When a sequential run is measured, on which facts, and how: each measurement is a line of ``metrics.jsonl``.

=============  =======================================================  ============================================
when           on what                                                  what it shows
=============  =======================================================  ============================================
``before``     all facts (or a seeded sample), in the unedited model    what editing starts from
``during``     all facts edited so far, or a seeded sample of them      forgetting
``last_batch`` the facts of the batch just edited                       what EasyEdit reports
``after``      the same facts, in the model after the last edit         what is left at the end
=============  =======================================================  ============================================

Scores of single cases go to ``scores/<when>-<num_edits>.jsonl``, a chunk at a time, so that a killed run measures again
no more than a chunk.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..datasets.loaders import EditRecord, records_fingerprint
from ..editing.callbacks import change_norms
from ..editing.session import EditSession
from ..evaluation.metrics import CaseScores, Protocol, evaluate_protocols, summarise
from ..evaluation.perplexity import held_out_texts, perplexity
from ..evaluation.references import load_references
from ..evaluation.text_quality import (
    Decoding,
    TextQuality,
    fluency_protocol,
    measure_text_quality,
    summarise_text_quality,
)
from ..models.architecture import EditableModel
from ..models.fingerprint import model_fingerprint
from ..utils.files import atomic_write
from .directory import RunDirectory
from .schema import METRICS, SCORES, TEXTS, AbilityEstimate, Estimate, Measurement, When, read_record

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # (what, done, total)

# Cases whose scores are written at once: minutes of work on two cores, seconds on a GPU.
_CHUNK = 200
_CHUNK_OF_TEXTS = 50
_BEFORE = f"{SCORES}/before-0.jsonl"


@dataclass(frozen=True)
class AbilitySettings:
    """General abilities: which lm-eval tasks, and how (see ``abilities.general_abilities``).

    Attributes:
        tasks: names; none measures none.
        every: also after every so many edits; None for before and after only.
        data: folder of the four tasks' files.
        num_fewshot, limit, max_new_tokens, batch_size: see there.
    """

    tasks: tuple[str, ...] = ()
    every: int | None = None
    data: Path | None = None
    num_fewshot: int = 0
    limit: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 32

    def asked(self) -> dict[str, Any]:
        """How, as ``abilities.general_abilities`` takes it."""
        return {"data": self.data, "num_fewshot": self.num_fewshot, "limit": self.limit,
                "max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}


@dataclass(frozen=True)
class MeasureSettings:
    """What is measured, and when.

    Attributes:
        protocols: by which metrics are computed; the first is the summary's.
        before, after: measure all facts in the unedited model, and after the last edit.
        cases: at most so many facts then, drawn by ``seed``; None for all.
        every: measure the facts edited so far after the first batch with which so many edits have come; None never.
        sample: at most so many facts of those, drawn by ``seed``; None for all.
        last_batch: measure each batch's facts right after it.
        text: held-out text for perplexity, .txt or .jsonl; None for none.
        text_tokens: so many of its tokens, from the beginning; None for all.
        decoding: how text is generated for fluency and consistency; None measures neither.
        references: what consistency compares with (see ``references.load_references``); None measures no consistency.
        abilities: general abilities.
        seed: of the samples and of the bootstrap.
        shared_before: a folder where runs of the same unedited model and facts share what they measured before.
    """

    protocols: tuple[Protocol, ...] = ("paper",)
    before: bool = True
    after: bool = True
    cases: int | None = None
    every: int | None = None
    sample: int | None = None
    last_batch: bool = False
    text: Path | None = None
    text_tokens: int | None = None
    decoding: Decoding | None = None
    references: Path | None = None
    abilities: AbilitySettings = field(default_factory=AbilitySettings)
    seed: int = 0
    shared_before: Path | None = None

    def __post_init__(self) -> None:
        for name, value in (("cases", self.cases), ("every", self.every), ("sample", self.sample),
                            ("text_tokens", self.text_tokens), ("abilities.every", self.abilities.every)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: give 1 or more, or leave it out")
        if not self.protocols or len(set(self.protocols)) < len(self.protocols):
            raise ValueError(f"protocols are {list(self.protocols)}: name at least one, and none twice")
        if self.references is not None and self.decoding is None:
            raise ValueError(f"references {self.references} are given, but no text is to be generated: give decoding")
        if "easyedit" in self.protocols and not self.before:
            raise ValueError("protocol 'easyedit' compares with what the unedited model says: measure before editing")
        if "easyedit" in self.protocols and self.cases is not None and (self.every or self.last_batch):
            raise ValueError(f"cases is {self.cases}, but protocol 'easyedit' compares every fact measured on the way "
                             "with what the unedited model says: leave it out")

    def described(self) -> dict[str, Any]:
        """What decides about the numbers, as plain values for ``config.yaml``."""
        return {
            "protocols": list(self.protocols), "before": self.before, "after": self.after, "cases": self.cases,
            "every": self.every, "sample": self.sample, "last_batch": self.last_batch, "seed": self.seed,
            "text": None if self.text is None else str(self.text), "text_tokens": self.text_tokens,
            "decoding": None if self.decoding is None else self.decoding.described(),
            "references": None if self.references is None else str(self.references),
            "abilities": {"tasks": list(self.abilities.tasks), "every": self.abilities.every,
                          "num_fewshot": self.abilities.num_fewshot, "limit": self.abilities.limit,
                          "max_new_tokens": self.abilities.max_new_tokens},
        }


@dataclass(frozen=True)
class DueMeasurement:
    """A measurement that is to be made.

    Attributes:
        when: before editing, on the way, or after.
        num_edits: edits in the model then.
        cases: indices into the run's records, of the facts that are measured.
    """

    when: When
    num_edits: int
    cases: tuple[int, ...]


def points_after(num_edits: int, batch: int, total: int, settings: MeasureSettings
                 ) -> list[DueMeasurement]:
    """What is due once a batch of so many edits has brought the model to ``num_edits`` of ``total``."""
    if num_edits == 0:
        return [point_at(0, total, settings)] if settings.before else []
    points = []
    if settings.last_batch:
        points.append(DueMeasurement("last_batch", num_edits, tuple(range(num_edits - batch, num_edits))))
    if settings.after if num_edits == total else passed(num_edits, batch, settings.every):
        points.append(point_at(num_edits, total, settings))
    return points


def point_at(num_edits: int, total: int, settings: MeasureSettings) -> DueMeasurement:
    """The measurement of the model after so many edits: on all facts before and after, else on those edited so far."""
    when = when_after(num_edits, total)
    among, wanted = (num_edits, settings.sample) if when == "during" else (total, settings.cases)
    if wanted is None or wanted >= among:
        return DueMeasurement(when, num_edits, tuple(range(among)))
    drawn = np.random.default_rng([settings.seed, among]).choice(among, wanted, replace=False)
    return DueMeasurement(when, num_edits, tuple(np.sort(drawn).tolist()))


def abilities_are_due(num_edits: int, batch: int, total: int, settings: AbilitySettings) -> bool:
    """Whether general abilities are measured once a batch has brought the model to ``num_edits`` of ``total``."""
    return bool(settings.tasks) and (num_edits in (0, total) or passed(num_edits, batch, settings.every))


def passed(num_edits: int, batch: int, every: int | None) -> bool:
    """Whether a batch that ends at ``num_edits`` reached or passed a multiple of ``every``; None has none."""
    return every is not None and num_edits // every > (num_edits - batch) // every


def when_after(num_edits: int, total: int) -> When:
    """How a measurement of the whole model after so many edits is called."""
    return "before" if num_edits == 0 else "after" if num_edits == total else "during"


def measured_at(measurements: Sequence[Measurement], point: DueMeasurement) -> dict[str, Measurement]:
    """The measurements that a point has already, by protocol."""
    return {one.protocol: one for one in measurements
            if not one.abilities and (one.when, one.num_edits) == (point.when, point.num_edits)}


def abilities_at(measurements: Sequence[Measurement], num_edits: int) -> dict[str, AbilityEstimate]:
    """General abilities after so many edits, by task."""
    return {task: estimate for one in measurements if one.num_edits == num_edits
            for task, estimate in one.abilities.items()}


class Measurer:
    """Measures a model at points of its run, and writes down what it finds; what is written is not measured again.

    Args:
        editable: the model.
        tok: its tokenizer.
        records: all facts of the run, in the order of editing.
        settings: what is measured.
        run: where it is written.
        progress: told how far a measurement is.
        on_measured: called with each measurement once it is written.

    Attributes:
        measurements: all of the run so far, those of earlier processes included.

    Raises:
        ImportError: general abilities are to be measured, and lm-eval is missing.
        ValueError: the held-out text can't be read, the protocols edit different facts, or a general ability is not
            known or its data can't be had.
    """

    def __init__(self, editable: EditableModel, tok: PreTrainedTokenizerBase, records: Sequence[EditRecord],
                 settings: MeasureSettings, run: RunDirectory, progress: Progress,
                 on_measured: Callable[[Measurement], None] | None = None) -> None:
        self._editable, self._tok, self._records = editable, tok, records
        self._settings, self._run, self._progress, self._on_measured = settings, run, progress, on_measured
        self._scores: dict[str, dict[tuple[str, int], CaseScores]] = {}  # by file, those of before and the latest
        if len(settings.protocols) > 1 and "easyedit" in settings.protocols and any(
                record.dataset == "zsre" for record in records):
            raise ValueError(f"protocols are {', '.join(settings.protocols)}, but 'easyedit' edits other targets into "
                             "ZsRE (`alt`) than the rest: measure it in a run of its own")
        self._texts = None if settings.text is None else held_out_texts(settings.text)
        self._references = None
        if settings.references is not None:
            self._references = load_references(settings.references, records)
        if settings.abilities.tasks:
            from ..evaluation.abilities.general import (
                check_abilities,  # lm-eval takes seconds to import, and is an extra
            )

            check_abilities(editable.model, tok, settings.abilities.tasks, **settings.abilities.asked())

    @cached_property
    def measurements(self) -> list[Measurement]:
        return self._run.measurements()

    def _add(self, measurement: Measurement) -> None:
        self._run.append(METRICS, measurement.to_dict())
        self.measurements.append(measurement)
        if self._on_measured is not None:
            self._on_measured(measurement)

    def measure(self, point: DueMeasurement) -> None:
        """Measure at a point what is missing: whole measurements, or parts of them (see ``_lacks``)."""
        written = measured_at(self.measurements, point)
        protocols = self._settings.protocols
        missing = [protocol for protocol in protocols if protocol not in written]
        lacking = [written[protocol] for protocol in protocols
                   if protocol in written and self._lacks(written[protocol], point)]
        if not missing and not lacking:
            return
        started = time.perf_counter()
        scores = self.scores(point) if missing else {}
        perplexity, norms = self._perplexity(), self._change_norms()
        quality = self._text_quality(point)
        seconds = time.perf_counter() - started
        if lacking:
            # What is there stays, however it was measured.
            completed = {id(one): replace(one, metrics={**one.metrics, **{name: found for name, found in quality.items()
                                                                          if name not in one.metrics}},
                                          perplexity=perplexity if one.perplexity is None else one.perplexity)
                         for one in lacking}
            self.measurements[:] = [completed.get(id(one), one) for one in self.measurements]
            self._run.write_lines(METRICS, [one.to_dict() for one in self.measurements])
        for protocol in missing:
            found = summarise(scores[protocol], self._settings.seed)
            metrics = {name: read_record(Estimate, one, name) for name, one in found.items()} | quality
            self._add(Measurement(point.num_edits, point.when, protocol, metrics, perplexity, norms, len(point.cases),
                                  seconds=seconds))
            seconds = 0.0  # all protocols were measured at once

    def _lacks(self, found: Measurement, point: DueMeasurement) -> bool:
        """Whether a measurement has no perplexity, fluency or consistency, which is asked for."""
        wanted = set()
        if any(self._records[case].generation_prompts for case in point.cases):
            wanted = ({"fluency"} if self._settings.decoding is not None else set()) | (
                {"consistency"} if self._references is not None else set())
        return not wanted <= found.metrics.keys() or (self._texts is not None and found.perplexity is None)

    def measure_abilities(self, when: When, num_edits: int) -> None:
        """Measure those of the general abilities that are not written down already."""
        settings = self._settings.abilities
        measured = abilities_at(self.measurements, num_edits)
        tasks = [task for task in settings.tasks if task not in measured]
        if not tasks:
            return
        from ..evaluation.abilities.general import general_abilities  # lm-eval takes seconds to import, and is an extra

        started = time.perf_counter()
        found = general_abilities(self._editable.model, self._tok, tasks, **settings.asked(),
                                  progress=lambda task, done, total: self._progress(when, done, total))
        protocols = sorted({score.protocol for score in found.values()})
        self._add(Measurement(
            num_edits, when, "; ".join(protocols), seconds=time.perf_counter() - started,
            abilities={task: read_record(AbilityEstimate, score.to_dict(), task) for task, score in found.items()}))

    def scores(self, point: DueMeasurement) -> dict[Protocol, list[CaseScores]]:
        """Scores of a point's cases by protocol, from its file as far as that goes, and measured from there on."""
        name = f"{SCORES}/{point.when}-{point.num_edits}.jsonl"
        shared = self._shared() if point.when == "before" and not self._run.has(name) else None
        if shared is not None and shared.exists():
            logger.info("the unedited model was measured on these facts before: %s", shared)
            self._run.write_text(name, shared.read_text(encoding="utf-8"))
        protocols, known = self._settings.protocols, self._known_scores(name)
        records = [self._records[case] for case in point.cases]
        unedited = self._unedited(point)
        for start in range(0, len(records), _CHUNK):
            chunk = records[start: start + _CHUNK]
            missing = {(protocol, record.case_id) for protocol in protocols for record in chunk} - known.keys()
            if not missing:
                continue

            def report(part: int, parts: int, start: int = start, count: int = len(chunk)) -> None:
                self._progress(point.when, start + count * part // parts, len(records))

            # A torn chunk is measured whole, for the same bits.
            found = evaluate_protocols(self._editable.model, self._tok, chunk, protocols, unedited, progress=report)
            fresh = {(one.protocol, one.case_id): one for scores in found.values() for one in scores}
            self._run.append_text(name, _lines(one for key, one in fresh.items() if key in missing))
            known.update(fresh)
        if shared is not None and not shared.exists():
            with atomic_write(shared) as temporary:
                temporary.write_bytes((self._run.path / name).read_bytes())
        return {protocol: [known[protocol, record.case_id] for record in records] for protocol in protocols}

    def _text_quality(self, point: DueMeasurement) -> dict[str, Estimate]:
        """Fluency and consistency of a point's cases that have generation prompts, with their protocols."""
        decoding = self._settings.decoding
        records = [self._records[case] for case in point.cases if self._records[case].generation_prompts]
        if decoding is None or not records:
            return {}
        name = f"{TEXTS}/{point.when}-{point.num_edits}.jsonl"
        self._run.keep_whole_lines(name)
        protocols = {"fluency": fluency_protocol(decoding),
                     "consistency": None if self._references is None else self._references.protocol}
        # Texts of other facts, by another decoding or with other references may stand there, too.
        known = {one.case_id: one for one in map(TextQuality.from_dict, self._run.lines(name))
                 if (one.fluency_protocol, one.consistency_protocol) == tuple(protocols.values())}
        missing = [record for record in records if record.case_id not in known]
        for start in range(0, len(missing), _CHUNK_OF_TEXTS):
            found = measure_text_quality(self._editable.model, self._tok, missing[start: start + _CHUNK_OF_TEXTS],
                                         self._references, decoding)
            known |= {one.case_id: one for one in found}
            self._run.append_text(name, _lines(found))
            self._progress(point.when, len(records) - len(missing) + start + len(found), len(records))
        summary = summarise_text_quality([known[record.case_id] for record in records], self._settings.seed)
        return {name: read_record(Estimate, {**one, "protocol": protocols[name]}, name)
                for name, one in summary.items() if one["n"]}

    def _known_scores(self, name: str) -> dict[tuple[str, int], CaseScores]:
        """Scores that are in a file, by protocol and case_id, read once."""
        if name not in self._scores:
            self._run.keep_whole_lines(name)
            self._scores = {kept: found for kept, found in self._scores.items() if _BEFORE in (kept, name)}
            self._scores[name] = {(line["protocol"], line["case_id"]): CaseScores.from_dict(line)
                                  for line in self._run.lines(name)}
        return self._scores[name]

    def _unedited(self, point: DueMeasurement) -> Mapping[int, CaseScores] | None:
        """What the unedited model said, by case_id, where a protocol compares with it."""
        if "easyedit" not in self._settings.protocols or point.when == "before":
            return None
        return {case: found for (protocol, case), found in self._known_scores(_BEFORE).items()
                if protocol == "easyedit"}

    def _perplexity(self) -> float | None:
        if self._texts is None:
            return None
        return perplexity(self._editable.model, self._tok, self._texts, self._settings.text_tokens).perplexity

    def _change_norms(self) -> dict[int, float]:
        return change_norms(self._editable.weights(), EditSession.of(self._editable.model).original)

    def _shared(self) -> Path | None:
        """Where other runs look for what this one measures before editing."""
        if self._settings.shared_before is None:
            return None
        key = {"model": model_fingerprint(self._editable.model), "records": records_fingerprint(self._records),
               "cases": [self._settings.cases, self._settings.seed], "protocols": sorted(self._settings.protocols)}
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
        return self._settings.shared_before / f"before-{digest}.jsonl"


def _lines(found: Iterable[CaseScores | TextQuality]) -> str:
    return "".join(json.dumps(one.to_dict()) + "\n" for one in found)
