"""General abilities of a model, measured by lm-evaluation-harness (extra ``eval``)."""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from torch import nn
from transformers import PreTrainedTokenizerBase

from ...models.architecture import frozen, input_device
from ...models.checks import check_inputs
from ...utils.locks import exclusive
from ...utils.messages import nearest
from ...utils.progress import PhaseProgress
from .tasks import ABILITY_TASKS, default_folder

logger = logging.getLogger(__name__)


# Prefix that selects lm-eval's task of a name that one of ours has, too.
OFFICIAL: Final = "lm_eval:"
_INSTALL: Final = "pip install 'sphere-easyedit[eval]'"
_SUGGESTIONS: Final = 5
# Prefixes and suffixes of lm-eval's metrics that are not fractions, and so not converted to percent.
_UNSCALED_PREFIXES: Final = ("bits_per_byte", "bleu", "chrf", "rouge", "ter")
_UNSCALED_SUFFIXES: Final = ("perplexity",)


@dataclass(frozen=True)
class AbilityScore:
    """A model's score on one task.

    Attributes:
        task: its name, as given.
        metric: the main metric.
        mean: of that metric over the records, in percent; perplexity, bits per byte, BLEU, chrF, TER and ROUGE on their
            usual scale.
        stderr: standard error of the mean on the same scale; None for one record, and if the harness would have to
            bootstrap it.
        n: number of records.
        shots: number of solved examples before each question.
        protocol: version of lm-eval, whose task, maximum length of an answer; scores of different protocols are not
            comparable.
        extra: means of the other metrics, without those that are undefined for these records.
    """

    task: str
    metric: str
    mean: float
    stderr: float | None
    n: int
    shots: int
    protocol: str
    extra: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a JSON-serialisable dict."""
        return asdict(self)


def general_abilities(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    tasks: Sequence[str] = ("gsm8k", "rte", "natural_questions", "boolq"),
    data: Path | None = None,
    num_fewshot: int = 0,
    limit: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    seed: int = 0,
    progress: PhaseProgress | None = None,
) -> dict[str, AbilityScore]:
    """Measure a model's general abilities by lm-evaluation-harness.

    The four default tasks read local files and work offline, zero-shot by default, without a chat template (see
    :mod:`.ability_tasks` for prompts and metrics). The SPHERE authors' harness adds GSM8K's gold rationale and, for
    Natural Questions, a passage with the answer to the prompt; ours adds neither, so scores are not comparable with the
    paper's. Any other task, group or tag of lm-eval is selected by its name and takes its data from the hub or the
    cache of ``datasets``; the harness needs some 20 s to find it. ``lm_eval:gsm8k`` selects lm-eval's task instead of
    ours.

    Weights, device, dtype, mode, gradients and generation settings of the model stay as they are, and so do the
    tokenizer and the random number generators. The model's generation settings apply as always in lm-eval: a
    repetition penalty does, sampling does not.

    Args:
        model: a causal language model of transformers.
        tok: its tokenizer.
        tasks: names; duplicates are ignored.
        data: folder with ``<task>.jsonl`` for each of our tasks; None for ``general/`` in ``SPHERE_DATA``, or else in
            ``shared/data`` beside the checkout.
        num_fewshot: number of solved examples before each question, sampled from the other records of the same file
            (for lm-eval's tasks: from the split that they name).
        limit: maximum number of records per task, from its beginning; None for all.
        batch_size: number of prompts to generate answers for at once. It affects time and memory, and results only by
            rounding in the model. Multiple-choice tasks have a batch size of their own.
        max_new_tokens: maximum length of a generated answer, if it is below the task's (GSM8K 256, Natural Questions
            32); part of the protocol. None for the tasks' limits.
        seed: of the examples, and of lm-eval's tasks that sample.
        progress: called with (task, requests done, requests in total); a request is an answer to generate or a choice
            to score.

    Returns:
        Scores by task, in the order given; a tag, or a group that lm-eval doesn't average, is replaced by its tasks.

    Raises:
        ImportError: lm-eval is not installed.
        TypeError: the model or the tokenizer is not one of transformers.
        ValueError: a number is out of range, no task is given, a task is unknown, its data can't be loaded or has the
            wrong format, or a generated answer wouldn't fit the model's context. Nothing has been measured then.
    """
    with _prepared(model, tok, tasks, data, num_fewshot, limit, batch_size, max_new_tokens, seed) as (
            harness, lm, loaded):
        scores: dict[str, AbilityScore] = {}
        for name, task in loaded.items():
            lm.report = (lambda done, total: None) if progress is None else partial(progress, name)
            before, started = lm.truncated, time.perf_counter()
            results = harness.run(lm, task, limit, seed)
            logger.info("%s: %.1f s", name, time.perf_counter() - started)
            if lm.truncated > before:
                logger.warning("%s: %d requests were truncated on the left to the model's context of %d tokens",
                               name, lm.truncated - before, lm.max_length)
            scores |= _scores(name, results, _protocol(harness, name, harness.most_new_tokens(task)))
    return scores


def check_abilities(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    data: Path | None = None,
    num_fewshot: int = 0,
    limit: int | None = None,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
) -> None:
    """Check the arguments of ``general_abilities`` without running the model.

    Raises:
        ImportError, TypeError, ValueError: as ``general_abilities`` does.
    """
    with _prepared(model, tok, tasks, data, num_fewshot, limit, batch_size, max_new_tokens, 0):
        pass


@contextmanager
def _prepared(model: nn.Module, tok: PreTrainedTokenizerBase, tasks: Sequence[str], data: Path | None, num_fewshot: int,
              limit: int | None, batch_size: int, max_new_tokens: int | None, seed: int
              ) -> Iterator[tuple[ModuleType, Any, dict[str, Any]]]:
    """Check everything, and provide the harness module, the model as its ``LM``, and the loaded tasks by name."""
    check_inputs(model, tok)
    names = list(dict.fromkeys(tasks))
    if not names:
        raise ValueError(f"no task is given: name some, for instance {', '.join(ABILITY_TASKS)}")
    for what, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1),
                               ("max_new_tokens", max_new_tokens, 1)):
        if value is not None and value < least:
            raise ValueError(f"{what} is {value}: give {least} or more")
    harness = _harness()
    # The harness uses the global random number generators, so only one thread may run it at a time.
    with exclusive(model), exclusive(harness), harness.quiet(), harness.seeded(seed, input_device(model)), \
            frozen(model):
        loaded = _load(harness, names, data or default_folder(), num_fewshot, max_new_tokens)
        lm = harness.InMemoryLM(model, tok, batch_size)
        for name, task in loaded.items():
            if (most := harness.most_new_tokens(task)) >= lm.max_length:
                raise ValueError(f"task {name}: answers of up to {most} tokens don't fit the model's context of "
                                 f"{lm.max_length} together with a question: set max_new_tokens lower")
        yield harness, lm, loaded


def _harness() -> ModuleType:
    """Import the adapter to lm-eval, which is an extra and takes seconds to import."""
    try:
        return importlib.import_module(".harness", __package__)
    except ModuleNotFoundError as error:
        raise ImportError(f"general abilities need lm-evaluation-harness, and {error.name} is missing: {_INSTALL}"
                          ) from error


def _load(harness: ModuleType, names: Sequence[str], folder: Path, num_fewshot: int, max_new_tokens: int | None
          ) -> dict[str, Any]:
    """Load the tasks by name: ours, or else lm-eval's."""
    official = [name for name in names if name not in ABILITY_TASKS]
    manager = harness.TaskManager() if official else None
    for name in official:
        _check_known(name.removeprefix(OFFICIAL), manager.all_tasks)  # type: ignore[union-attr]
    loaded = {}
    for name in names:
        if name in official:
            loaded[name] = harness.official_task(manager, name.removeprefix(OFFICIAL), num_fewshot, max_new_tokens)
            continue
        records = ABILITY_TASKS[name].records(folder)
        if num_fewshot >= len(records):
            raise ValueError(f"num_fewshot is {num_fewshot}, but {name} has {len(records)} records, of which one is "
                             f"the question: give at most {len(records) - 1}")
        loaded[name] = harness.local_task(ABILITY_TASKS[name], records, num_fewshot, max_new_tokens)
    return loaded


def _check_known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = nearest(name, [*ABILITY_TASKS, *known], _SUGGESTIONS, cutoff=0.5)
        hint = f"the nearest are {', '.join(near)}" if near else f"ours are {', '.join(ABILITY_TASKS)}"
        raise ValueError(f"there is no task {name!r}, neither ours nor one of lm-eval's {len(known)}: {hint}; "
                         "`lm-eval ls tasks` lists lm-eval's")


def _protocol(harness: ModuleType, name: str, most: int) -> str:
    source = "sphere-easyedit tasks" if name in ABILITY_TASKS else "its own tasks"
    return f"lm-eval {harness.VERSION}, {source}" + (f", up to {most} new tokens" if most else "")


def _scores(name: str, results: Mapping[str, Any], protocol: str) -> dict[str, AbilityScore]:
    """The score of a task, a group's average, or else the scores of its tasks."""
    by_key = results["results"]
    keys = {name: f"sphere_{name}" if name in ABILITY_TASKS else name.removeprefix(OFFICIAL)}
    if not _metric_keys(by_key.get(keys[name], {})):
        keys = {task: task for task in results["configs"]}
    return {task: _score(task, by_key[key], results["n-shot"].get(key, 0), protocol) for task, key in keys.items()}


def _score(task: str, result: Mapping[str, Any], shots: int, protocol: str) -> AbilityScore:
    keys = _metric_keys(result)
    values = {metric: _scale(metric) * float(result[key]) for metric, key in keys.items()}
    metric, key = next(iter(keys.items()))
    stderr = result.get(key.replace(",", "_stderr,", 1))
    return AbilityScore(task, metric, values.pop(metric),
                        _scale(metric) * float(stderr) if isinstance(stderr, float) else None,
                        int(result["sample_len"]), int(shots), protocol,
                        {name: value for name, value in values.items() if not math.isnan(value)})


def _metric_keys(result: Mapping[str, Any]) -> dict[str, str]:
    """The keys of a task's means by the metric's name, which includes that of a filter."""
    keys = [key for key in result if "," in key and not key.partition(",")[0].endswith("_stderr")]
    return {key.removesuffix(",none"): key for key in keys}


def _scale(metric: str) -> float:
    name = metric.partition(",")[0]
    return 1.0 if name.startswith(_UNSCALED_PREFIXES) or name.endswith(_UNSCALED_SUFFIXES) else 100.0
