"""``run``: a whole sequential run from Python or a notebook."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..callbacks.progress import LiveLine
from ..datasets.from_python import records_from
from ..datasets.loaders import EditRecord, Protocol, with_protocol_targets
from ..defaults import BATCH_SIZE, CHECKPOINT_EVERY, TEXT_TOKENS
from ..editing.callbacks import EditCallback
from ..evaluation.text_quality import Decoding
from ..hparams import SPHEREHyperParams
from .repair import RepairSettings
from .result import RunResult
from .schedule import MeasureSettings
from .sequential import RunSettings, run_sequential
from .skipping import OnError


def run(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    records: str | os.PathLike[str] | Iterable[EditRecord | Mapping[str, Any]],
    hparams: SPHEREHyperParams | str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = BATCH_SIZE,
    callbacks: Sequence[EditCallback] = (),
    protocol: Protocol | Sequence[Protocol] = "paper",
    eval_before: bool = True,
    eval_every: int | None = None,
    eval_sample: int | None = None,
    eval_cases: int | None = None,
    eval_seed: int = 0,
    text: str | os.PathLike[str] | None = None,
    text_tokens: int | None = TEXT_TOKENS,
    fluency: bool = False,
    examples: int = 3,
    repair_every: int | None = None,
    on_error: OnError = "stop",
    checkpoint_every: int = CHECKPOINT_EVERY,
    resume: bool = False,
    progress: bool = True,
) -> RunResult:
    """Edit facts into a model batch after batch, and measure it before, during and after.

    Does what ``sphere-easyedit edit`` does, and leaves the same run directory. For settings beyond these (general
    abilities, reference texts, kept weights), use ``runs.sequential.run_sequential``.

    Args:
        model: without edits; changed in place.
        tok: its tokenizer.
        records: the facts in the order of editing: a .jsonl or .csv file (see ``datasets.facts``), EasyEdit's request
            dicts, dicts with the fields of such a file, or the records of ``load_records``.
        hparams: method and settings; also a YAML file, or a short name such as ``AlphaEdit/smollm2-135m``.
        output: run directory, new or empty. None for a temporary one, which is deleted with the result.
        batch_size: facts edited at once.
        callbacks: notified of batches, measurements and the end of the run.
        protocol: how metrics are computed (paper, rome, easyedit), or several; the first is the summary's.
        eval_before: measure all facts in the unedited model.
        eval_every: also measure the facts edited so far after every this many edits.
        eval_sample: measure at most this many of them, drawn at random.
        eval_cases: measure at most this many facts before and after, drawn at random.
        eval_seed: of these samples and of confidence intervals.
        text: held-out text (.txt, .jsonl) to measure perplexity on.
        text_tokens: number of tokens of it to use; None for all.
        fluency: measure the fluency of generated text.
        examples: number of facts whose continuations, before and after, the result shows.
        repair_every: after every this many edits, and after the last, find the facts that the model no longer predicts
            and edit them again (see ``runs.repair``).
        on_error: ``stop`` at facts that cannot be edited, or ``skip`` them.
        checkpoint_every: minimum number of edits between checkpoints.
        resume: continue the run in ``output`` from its last checkpoint, with ``model`` as it was before the run.
        progress: print a line per batch and measurement (one line that changes, in a terminal).

    Returns:
        The result, with ``summary``, ``frame()``, ``plot()``, ``generations``, ``tracker`` and ``directory``.

    Raises:
        ValueError: an argument is wrong, the model holds edits already, or a fact can't be edited.
    """
    if resume and output is None:
        raise ValueError("resume is set, but output is None: give the directory of the run to resume")
    protocols: tuple[Protocol, ...] = (protocol,) if isinstance(protocol, str) else tuple(protocol)
    settings = hparams if isinstance(hparams, SPHEREHyperParams) else SPHEREHyperParams.from_hparams(hparams)
    measure = MeasureSettings(
        protocols, eval_before, cases=eval_cases, every=eval_every, sample=eval_sample,
        text=None if text is None else Path(text), text_tokens=text_tokens,
        decoding=Decoding(seed=eval_seed) if fluency else None, seed=eval_seed)
    facts = with_protocol_targets(records_from(records), protocols[0])
    described = {"dataset": ", ".join(sorted({fact.dataset for fact in facts})),
                 "data": os.fspath(records) if isinstance(records, str | os.PathLike) else None}

    def edit(directory: Path) -> RunResult:
        options = RunSettings(directory, batch_size, examples, described, measure, resume, checkpoint_every,
                              repair=None if repair_every is None else RepairSettings(repair_every),
                              on_error=on_error)
        if not progress:
            return run_sequential(model, tok, facts, settings, options, callbacks)
        with LiveLine(_console(), len(facts)) as line:
            return run_sequential(model, tok, facts, settings, options, [*callbacks, line], line.update)

    return _in_temporary_folder(edit) if output is None else edit(Path(output))


def _in_temporary_folder(edit: Callable[[Path], RunResult]) -> RunResult:
    """The result of a run in a folder that is deleted with it, or if the run fails."""
    folder = Path(tempfile.mkdtemp(prefix="sphere-run-"))
    try:
        result = edit(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(result, shutil.rmtree, folder, ignore_errors=True)
    return result


def _console() -> Console:
    """Standard error; in a notebook standard output, since notebooks show standard error as errors."""
    return Console(stderr=not Console().is_jupyter, force_jupyter=False)
