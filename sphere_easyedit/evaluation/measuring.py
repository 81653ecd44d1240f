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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..editing.session import EditSession
from ..files import atomic_write
from ..fingerprints import model_fingerprint
from ..models import EditableModel
from ..reviewing import change_norms
from .datasets import EditRecord, records_fingerprint
from .metrics import CaseScores, Protocol, evaluate_protocols, summarise
from .perplexity import held_out_texts, perplexity
from .references import load_references
from .run_directory import METRICS, SCORES, TEXTS, RunDirectory, When
from .text_quality import Decoding, TextQuality, fluency_protocol, measure_text_quality, summarise_text_quality

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # (what, done, total)

# What a line of metrics.jsonl may hold as {"mean", "ci95", "n"}.
METRIC_NAMES = ("efficacy", "generalization", "specificity", "fluency", "consistency")

# Cases whose scores are written at once: minutes of work on two cores, seconds on a GPU.
_CHUNK = 200
_CHUNK_OF_TEXTS = 50


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
class Point:
    """One measurement: when, after how many edits, and on which of the run's records."""

    when: When
    num_edits: int
    cases: tuple[int, ...]  # places in the run's records


def points_after(num_edits: int, batch: int, total: int, settings: MeasureSettings) -> list[Point]:
    """What is due once a batch of so many edits has brought the model to ``num_edits`` of ``total``."""
    if num_edits == 0:
        return [point_at(0, total, settings)] if settings.before else []
    points = []
    if settings.last_batch:
        points.append(Point("last_batch", num_edits, tuple(range(num_edits - batch, num_edits))))
    if settings.after if num_edits == total else passed(num_edits, batch, settings.every):
        points.append(point_at(num_edits, total, settings))
    return points


def point_at(num_edits: int, total: int, settings: MeasureSettings) -> Point:
    """The measurement of the model after so many edits: on all facts before and after, else on those edited so far."""
    when = when_after(num_edits, total)
    among, wanted = (num_edits, settings.sample) if when == "during" else (total, settings.cases)
    if wanted is None or wanted >= among:
        return Point(when, num_edits, tuple(range(among)))
    drawn = np.random.default_rng([settings.seed, among]).choice(among, wanted, replace=False)
    return Point(when, num_edits, tuple(np.sort(drawn).tolist()))


def abilities_are_due(num_edits: int, batch: int, total: int, settings: AbilitySettings) -> bool:
    """Whether general abilities are measured once a batch has brought the model to ``num_edits`` of ``total``."""
    return bool(settings.tasks) and (num_edits in (0, total) or passed(num_edits, batch, settings.every))


def passed(num_edits: int, batch: int, every: int | None) -> bool:
    """Whether a batch that ends at ``num_edits`` reached or passed a multiple of ``every``; None has none."""
    return every is not None and num_edits // every > (num_edits - batch) // every


def when_after(num_edits: int, total: int) -> When:
    """How a measurement of the whole model after so many edits is called."""
    return "before" if num_edits == 0 else "after" if num_edits == total else "during"


def lines_at(lines: Sequence[dict[str, Any]], point: Point) -> dict[str, dict[str, Any]]:
    """Those lines of ``metrics.jsonl`` that a point has, by protocol."""
    return {line["protocol"]: line for line in lines if (line["when"], line["num_edits"]) ==
            (point.when, point.num_edits)}


def perplexity_of(line: Mapping[str, Any]) -> float | None:
    """The perplexity that goes with a line of ``metrics.jsonl``; None where none was measured."""
    found: float | None = (line.get("watched") or {}).get("perplexity")
    return found


def abilities_at(lines: Sequence[Mapping[str, Any]], num_edits: int) -> dict[str, dict[str, Any]]:
    """General abilities in ``metrics.jsonl`` after so many edits, by task."""
    return {task: score for line in lines if line["num_edits"] == num_edits
            for task, score in line.get("abilities", {}).items()}


class Measurer:
    """Measures a model at points of its run, and writes down what it finds; what is written is not measured again.

    Args:
        editable: the model.
        tok: its tokenizer.
        records: all facts of the run, in the order of editing.
        settings: what is measured.
        run: where it is written.
        progress: told how far a measurement is.

    Raises:
        ImportError: general abilities are to be measured, and lm-eval is missing.
        ValueError: the held-out text can't be read, the protocols edit different facts, or a general ability is not
            known or its data can't be had.
    """

    def __init__(self, editable: EditableModel, tok: PreTrainedTokenizerBase, records: Sequence[EditRecord],
                 settings: MeasureSettings, run: RunDirectory, progress: Progress) -> None:
        self._editable, self._tok, self._records = editable, tok, records
        self._settings, self._run, self._progress = settings, run, progress
        if len(settings.protocols) > 1 and "easyedit" in settings.protocols and any(
                record.dataset == "zsre" for record in records):
            raise ValueError(f"protocols are {', '.join(settings.protocols)}, but 'easyedit' edits other targets into "
                             "ZsRE (`alt`) than the rest: measure it in a run of its own")
        self._texts = None if settings.text is None else held_out_texts(settings.text)
        self._references = None
        if settings.references is not None:
            self._references = load_references(settings.references, records)
        if settings.abilities.tasks:
            from .abilities import check_abilities  # lm-eval takes seconds to import, and is an extra

            check_abilities(editable.model, tok, settings.abilities.tasks, **settings.abilities.asked())

    def measure(self, point: Point) -> None:
        """Measure at a point what ``metrics.jsonl`` does not have: lines, or what lines lack (see ``_lacking``)."""
        lines = self._run.lines(METRICS)
        written = lines_at(lines, point)
        missing = [protocol for protocol in self._settings.protocols if protocol not in written]
        lacking = [written[protocol] for protocol in self._settings.protocols
                   if protocol in written and self._lacking(written[protocol], point)]
        if not missing and not lacking:
            return
        started = time.perf_counter()
        scores = self.scores(point) if missing else {}
        watched = self._watched()
        quality = self._text_quality(point)
        seconds = time.perf_counter() - started
        if lacking:
            for line in lacking:
                line |= {name: one for name, one in quality.items() if name not in line}
                # One that is there stays, on whatever text it was measured.
                if watched["perplexity"] is not None and perplexity_of(line) is None:
                    line["watched"] = {**(line.get("watched") or {}), "perplexity": watched["perplexity"]}
            self._run.write_lines(METRICS, lines)
        for protocol in missing:
            line = {"num_edits": point.num_edits, "when": point.when, "protocol": protocol, "cases": len(point.cases)}
            self._run.append(METRICS, line | dict(summarise(scores[protocol], self._settings.seed)) | quality
                             | {"watched": watched, "seconds": seconds})
            seconds = 0.0  # all protocols were measured at once

    def _lacking(self, line: Mapping[str, Any], point: Point) -> bool:
        """Whether a line has no perplexity, fluency or consistency, which is asked for."""
        wanted = set()
        if any(self._records[case].generation_prompts for case in point.cases):
            wanted = ({"fluency"} if self._settings.decoding is not None else set()) | (
                {"consistency"} if self._references is not None else set())
        return not wanted <= line.keys() or (self._texts is not None and perplexity_of(line) is None)

    def measure_abilities(self, when: When, num_edits: int) -> None:
        """Measure those of the general abilities that are not written down already."""
        settings = self._settings.abilities
        measured = abilities_at(self._run.lines(METRICS), num_edits)
        tasks = [task for task in settings.tasks if task not in measured]
        if not tasks:
            return
        from .abilities import general_abilities  # lm-eval takes seconds to import, and is an extra

        started = time.perf_counter()
        found = general_abilities(self._editable.model, self._tok, tasks, **settings.asked(),
                                  progress=lambda task, done, total: self._progress(when, done, total))
        protocols = sorted({score.protocol for score in found.values()})
        self._run.append(METRICS, {
            "num_edits": num_edits, "when": when, "protocol": "; ".join(protocols),
            "abilities": {task: score.to_dict() for task, score in found.items()},
            "seconds": time.perf_counter() - started})

    def scores(self, point: Point) -> dict[Protocol, list[CaseScores]]:
        """Scores of a point's cases by protocol, from its file as far as that goes, and measured from there on."""
        name = f"{SCORES}/{point.when}-{point.num_edits}.jsonl"
        shared = self._shared() if point.when == "before" and not self._run.has(name) else None
        if shared is not None and shared.exists():
            logger.info("the unedited model was measured on these facts before: %s", shared)
            self._run.write_text(name, shared.read_text(encoding="utf-8"))
        protocols = self._settings.protocols
        self._run.keep_whole_lines(name)
        known = {(line["protocol"], line["case_id"]): CaseScores.from_dict(line) for line in self._run.lines(name)}
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
            known |= fresh
        if shared is not None and not shared.exists():
            with atomic_write(shared) as temporary:
                temporary.write_bytes((self._run.path / name).read_bytes())
        return {protocol: [known[protocol, record.case_id] for record in records] for protocol in protocols}

    def _text_quality(self, point: Point) -> dict[str, Any]:
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
        return {name: {**one, "protocol": protocols[name]} for name, one in summary.items() if one["n"]}

    def _unedited(self, point: Point) -> Mapping[int, CaseScores] | None:
        """What the unedited model said, by case_id, where a protocol compares with it."""
        if "easyedit" not in self._settings.protocols or point.when == "before":
            return None
        return {line["case_id"]: CaseScores.from_dict(line) for line in self._run.lines(f"{SCORES}/before-0.jsonl")
                if line["protocol"] == "easyedit"}

    def _watched(self) -> dict[str, Any]:
        session = EditSession.of(self._editable.model)
        found: float | None = None
        if self._texts is not None:
            found = perplexity(self._editable.model, self._tok, self._texts, self._settings.text_tokens).perplexity
        norms = change_norms(self._editable.weights(), session.original)
        return {"perplexity": found, "update_norms": {str(layer): norm for layer, norm in norms.items()}}

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
