"""The sequential run: batch after batch into one model, measured before and after, written to a run directory."""

from __future__ import annotations

import itertools
import json
import logging
import platform
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import torch
import yaml
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..callbacks import EditCallback, EditEvent, HETracker
from ..editing.session import EditSession
from ..files import replacing
from ..hparams import SPHEREHyperParams
from ..models import EditableModel
from ..wrapper import apply_sphere_to_model, prepare
from .datasets import EditRecord
from .generation import generate_continuations
from .metrics import CaseScores, evaluate_records, summarise

logger = logging.getLogger(__name__)

PROTOCOL: Final = "paper"
_PACKAGES = ("sphere-easyedit", "torch", "transformers", "numpy", "scipy", "safetensors", "tokenizers")

Progress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass(frozen=True)
class RunSettings:
    """What a run is made of, besides the hyperparameters.

    Attributes:
        output: run directory; must be empty or absent.
        batch_size: edits a batch.
        examples: so many cases' greedy continuations are kept from before and after editing.
        described: further entries for ``config.yaml`` (data set, seed, command ...).
    """

    output: Path
    batch_size: int
    examples: int = 0
    described: dict[str, Any] = field(default_factory=dict)


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
        model: changed in place.
        tok: its tokenizer.
        records: in the order of editing.
        hparams: method and settings.
        settings: where to write and how large a batch is.
        callbacks: told of every batch, before it is written down: a batch that one of them undoes leaves no line.
        progress: called with a phase ("before", "editing", "after"), and how much of it is done.

    Raises:
        ValueError: the directory holds files, there is nothing to edit, or a batch fails; all batches before it are
            then in the run directory, and a checkpoint of them.
    """
    if settings.batch_size < 1:
        raise ValueError(f"batch_size is {settings.batch_size}; give at least 1")
    if not records:
        raise ValueError("there are no records to edit")
    if settings.output.exists() and any(settings.output.iterdir()):
        raise ValueError(f"{settings.output} is not empty: give a new directory for the run")
    editable = hparams.editable(model)
    session = EditSession.of(model)
    if session.num_edits:
        raise ValueError(f"the model holds {session.num_edits} edits already: start a run from a model just loaded")
    # All that can be refused is refused, and what takes long is collected, before anything is measured or changed.
    started = time.perf_counter()
    prepare(editable, tok, [record.request() for record in records], hparams, session, settings.batch_size)
    preparation_seconds = time.perf_counter() - started
    settings.output.mkdir(parents=True, exist_ok=True)
    config = _config(model, hparams, settings, records)
    _write_text(settings.output / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    report = progress or (lambda what, done, total: None)
    examples = list(records[: settings.examples])

    started = time.perf_counter()
    pre = _evaluate(model, tok, records, settings, "before", 0, report)
    before = generate_continuations(model, tok, [record.edit_prompt for record in examples])
    evaluation_seconds = time.perf_counter() - started

    tracker = HETracker(settings.output / "energy.csv")
    log = _BatchLog(settings.output / "edits.jsonl", tracker)
    started = time.perf_counter()
    try:
        _edit_all(model, tok, records, hparams, settings, [*callbacks, tracker, log], report)
    finally:
        if session.num_edits:
            _save_checkpoint(editable, session, settings.output / "checkpoints")
    editing_seconds = time.perf_counter() - started

    started = time.perf_counter()
    post = _evaluate(model, tok, records, settings, "after", len(records), report)
    after = generate_continuations(model, tok, [record.edit_prompt for record in examples])
    evaluation_seconds += time.perf_counter() - started

    generations = [(record.edit_prompt, was, is_now)
                   for record, was, is_now in zip(examples, before, after, strict=True)]
    _write_cases(settings.output / "cases.jsonl", records, pre, post, generations)
    summary = {
        "protocol": PROTOCOL,
        "num_edits": len(records),
        "pre": summarise(pre),
        "post": summarise(post),
        "preparation_seconds": preparation_seconds,
        "editing_seconds": editing_seconds,
        "evaluation_seconds": evaluation_seconds,
        "peak_memory_bytes": peak_memory_bytes(model),
    }
    _write_text(settings.output / "summary.json", json.dumps(summary, indent=1))
    return RunResult(summary, tracker, generations)


def _edit_all(model: nn.Module, tok: PreTrainedTokenizerBase, records: Sequence[EditRecord],
              hparams: SPHEREHyperParams, settings: RunSettings, callbacks: Sequence[EditCallback], report: Progress
              ) -> None:
    done = itertools.count(1)

    def advance(count: int) -> None:
        for _ in range(count):
            report("editing", next(done), len(records))

    for first in range(0, len(records), settings.batch_size):
        requests = [record.request() for record in records[first: first + settings.batch_size]]
        apply_sphere_to_model(model, tok, requests, hparams, callbacks=callbacks, progress=advance)


class _BatchLog(EditCallback):
    """Writes ``edits.jsonl``: a line a batch."""

    def __init__(self, path: Path, tracker: HETracker) -> None:
        self._path, self._tracker = path, tracker

    def on_batch_end(self, event: EditEvent) -> None:
        line = {"num_edits": event.num_edits, "case_ids": list(event.case_ids), "seconds": dict(event.seconds),
                "losses": list(event.losses), "update_norms": dict(event.update_norms),
                "energy": self._tracker.records[-1].energy}
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")


def _evaluate(model: nn.Module, tok: PreTrainedTokenizerBase, records: Sequence[EditRecord], settings: RunSettings,
              when: str, num_edits: int, report: Progress) -> list[CaseScores]:
    scores = evaluate_records(model, tok, records, protocol=PROTOCOL,
                              progress=lambda done, total: report(when, done, total))
    line = {"num_edits": num_edits, "when": when, "protocol": PROTOCOL} | dict(summarise(scores))
    with (settings.output / "metrics.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    return scores


def _write_cases(path: Path, records: Sequence[EditRecord], pre: Sequence[CaseScores], post: Sequence[CaseScores],
                 generations: Sequence[tuple[str, str, str]]) -> None:
    lines = []
    for index, (record, was, is_now) in enumerate(zip(records, pre, post, strict=True)):
        line: dict[str, Any] = {"case_id": record.case_id, "prompt": record.edit_prompt, "subject": record.subject,
                                "target_new": record.target_new, "target_true": record.target_true,
                                "pre": _scores(was), "post": _scores(is_now)}
        if index < len(generations):
            _, before, after = generations[index]
            line["generations"] = {"before": before, "after": after}
        lines.append(json.dumps(line))
    _write_text(path, "\n".join(lines) + "\n")


def _scores(scores: CaseScores) -> dict[str, float | None]:
    return {"efficacy": scores.efficacy, "generalization": scores.generalization, "specificity": scores.specificity}


def _save_checkpoint(editable: EditableModel, session: EditSession, folder: Path) -> None:
    """The edited weights by parameter name, and the session, after the last batch."""
    weights = {editable.parameter_name(layer): editable.parameter(layer).detach().cpu().contiguous()
               for layer in editable.layers}
    with replacing(folder / f"weights-{session.num_edits}.safetensors") as temporary:
        save_file(weights, temporary)
    session.save(folder / f"session-{session.num_edits}.safetensors")


def _config(model: nn.Module, hparams: SPHEREHyperParams, settings: RunSettings, records: Sequence[EditRecord]
            ) -> dict[str, Any]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "run": {**settings.described, "num_edits": len(records), "batch_size": settings.batch_size,
                "protocol": PROTOCOL},
        "hparams": hparams.to_dict(),
        "versions": versions,
        "model": {"devices": sorted({str(parameter.device) for parameter in model.parameters()}),
                  "dtypes": sorted({str(parameter.dtype) for parameter in model.parameters()}),
                  "context_templates": EditSession.of(model).contexts},
        "machine": {"platform": platform.platform(), "threads": torch.get_num_threads(),
                    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None},
    }


def peak_memory_bytes(model: nn.Module) -> int:
    """Peak memory of this process: allocated on the GPUs that hold the model, else resident on the host."""
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    if gpus:
        return sum(int(torch.cuda.max_memory_allocated(gpu)) for gpu in gpus)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux


def _write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
