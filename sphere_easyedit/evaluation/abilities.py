"""General abilities of a model, before and after editing, through lm-evaluation-harness (the extra ``eval``)."""

from __future__ import annotations

import importlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..exclusive import exclusive
from ..inputs import check_inputs
from ..messages import nearest
from ..models import frozen, input_device
from .ability_tasks import ABILITY_TASKS, default_folder

logger = logging.getLogger(__name__)

Progress = Callable[[str, int, int], None]  # (task, requests done, requests in all)

# In front of a name that is one of ours, too.
OFFICIAL: Final = "lm_eval:"
_INSTALL: Final = "pip install 'sphere-easyedit[eval]'"
_ALTERNATIVES: Final = 5
# Metrics of lm-eval with a scale of their own, by the beginning or end of their names; all others are shares.
_OWN_SCALE_BEGINNINGS: Final = ("bits_per_byte", "bleu", "chrf", "rouge", "ter")
_OWN_SCALE_ENDS: Final = ("perplexity",)


@dataclass(frozen=True)
class AbilityScore:
    """How a model did on one task.

    Attributes:
        task: its name, as asked for.
        metric: the main metric.
        mean: of that metric over the records, in percent; perplexity, bits per byte, BLEU, chrF, TER and ROUGE on their
            own scale.
        stderr: standard error of the mean on the same scale; None with one record, and where the harness would have to
            bootstrap it.
        n: how many records were asked.
        shots: solved examples in front of each question.
        protocol: by what, how and with how long an answer it was measured; numbers of two protocols don't compare.
        extra: the other metrics, likewise; without those that these records don't define.
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
        """As JSON takes it."""
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
    progress: Progress | None = None,
) -> dict[str, AbilityScore]:
    """Measure a model's general abilities by lm-evaluation-harness.

    The four default tasks are asked of local files, offline, zero-shot unless told otherwise, without a chat template
    (see :mod:`.ability_tasks` for prompts and scores). The SPHERE authors' own harness puts GSM8K's gold rationale
    into the prompt and a passage in front of each Natural Question; here neither is there, so a model has to reason
    and to remember, and the numbers don't compare with the paper's. Any other task, group or tag of lm-eval goes by its
    name, with its data from the hub or the cache of ``datasets``, and is then the harness's own business; to find it
    takes the harness some 20 s. ``lm_eval:gsm8k`` is lm-eval's task where ``gsm8k`` is ours.

    The model is lent to the harness as it is: neither weights, device, dtype, mode, gradients nor generation settings
    change, nor do the tokenizer and the random number generators. The model's own generation settings count as
    everywhere in lm-eval: a repetition penalty does, sampling does not.

    Args:
        model: a causal language model of transformers.
        tok: its tokenizer.
        tasks: names; one given twice counts once.
        data: folder with ``<task>.jsonl`` for each of our tasks; None for ``general/`` in ``SPHERE_DATA``, or else in
            ``shared/data`` beside the checkout.
        num_fewshot: solved examples in front of each question, drawn by the seed from the other records of the same
            file (lm-eval's own tasks: from where they say).
        limit: at most so many records of a task, from its beginning; None for all.
        batch_size: prompts whose answers are written together. It changes time and memory, and results by no more than
            rounding in the model. On a CPU more is faster; choices are compared in batches of their own.
        max_new_tokens: most tokens of a written answer, where a task allows more (GSM8K 256, Natural Questions 32); the
            protocol names it. None for what the tasks allow.
        seed: of the examples, and of lm-eval's tasks that draw.
        progress: called with (task, requests done, requests in all); a request is an answer to write or a choice to
            weigh.

    Returns:
        Scores by task in the order given; a tag, or a group that lm-eval doesn't average, stands as its tasks.

    Raises:
        ImportError: lm-eval is missing.
        TypeError: the model or the tokenizer is not one of transformers.
        ValueError: a number is out of range, there is no task, a task is not known (the nearest are named), its data
            can't be had or is not of its form, or a written answer wouldn't fit the model's context. Nothing has been
            measured then.
    """
    with _lent(model, tok, tasks, data, num_fewshot, limit, batch_size, max_new_tokens, seed) as (harness, lm, loaded):
        scores: dict[str, AbilityScore] = {}
        for name, asked in loaded.items():
            lm.report = (lambda done, total: None) if progress is None else partial(progress, name)
            before, started = lm.truncated, time.perf_counter()
            results = harness.run(lm, asked, limit, seed)
            logger.info("%s: %.1f s", name, time.perf_counter() - started)
            if lm.truncated > before:
                logger.warning("%s: %d requests lost the beginning of their prompt to the model's context of %d tokens",
                               name, lm.truncated - before, lm.max_length)
            scores |= _scores(name, results, _protocol(harness, name, harness.most_new_tokens(asked)))
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
    """Refuse what ``general_abilities`` would refuse, without asking the model anything.

    Args:
        model, tok, tasks, data, num_fewshot, limit, batch_size, max_new_tokens: as there.

    Raises:
        ImportError, ValueError: as there.
    """
    with _lent(model, tok, tasks, data, num_fewshot, limit, batch_size, max_new_tokens, 0):
        pass


@contextmanager
def _lent(model: nn.Module, tok: PreTrainedTokenizerBase, tasks: Sequence[str], data: Path | None, num_fewshot: int,
          limit: int | None, batch_size: int, max_new_tokens: int | None, seed: int
          ) -> Iterator[tuple[ModuleType, Any, dict[str, Any]]]:
    """The harness, the model lent to it, and what it is to run by name, all checked (see ``general_abilities``)."""
    check_inputs(model, tok)
    names = list(dict.fromkeys(tasks))
    if not names:
        raise ValueError(f"there is no task to measure: name some, for instance {', '.join(ABILITY_TASKS)}")
    for what, value, least in (("num_fewshot", num_fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1),
                               ("max_new_tokens", max_new_tokens, 1)):
        if value is not None and value < least:
            raise ValueError(f"{what} is {value}: give {least} or more")
    harness = _harness()
    # The harness draws from the global generators: one thread at a time may have them seeded.
    with exclusive(model), exclusive(harness), harness.quiet(), harness.seeded(seed, input_device(model)), \
            frozen(model):
        loaded = _load(harness, names, data or default_folder(), num_fewshot, max_new_tokens)
        lm = harness.LentModel(model, tok, batch_size)
        for name, asked in loaded.items():
            if (most := harness.most_new_tokens(asked)) >= lm.max_length:
                raise ValueError(f"task {name}: answers of up to {most} tokens leave no room for a question in the "
                                 f"model's context of {lm.max_length}: set max_new_tokens lower")
        yield harness, lm, loaded


def _harness() -> ModuleType:
    """The module that imports lm-eval, which takes seconds and is an extra."""
    try:
        return importlib.import_module(".harness", __package__)
    except ModuleNotFoundError as error:
        raise ImportError(f"general abilities are measured by lm-evaluation-harness, and {error.name} is missing: "
                          f"{_INSTALL}") from error


def _load(harness: ModuleType, names: Sequence[str], folder: Path, num_fewshot: int, max_new_tokens: int | None
          ) -> dict[str, Any]:
    """What the harness runs, by name; ours is told from its own by the name."""
    official = [name for name in names if name not in ABILITY_TASKS]
    manager = harness.TaskManager() if official else None
    for name in official:
        _check_known(name.removeprefix(OFFICIAL), manager.all_tasks)  # type: ignore[union-attr]
    loaded = {}
    for name in names:
        if name in official:
            loaded[name] = harness.named_task(manager, name.removeprefix(OFFICIAL), num_fewshot, max_new_tokens)
            continue
        records = ABILITY_TASKS[name].records(folder)
        if num_fewshot >= len(records):
            raise ValueError(f"num_fewshot is {num_fewshot}, but {name} has {len(records)} records, one of which is "
                             f"asked: give at most {len(records) - 1}")
        loaded[name] = harness.own_task(ABILITY_TASKS[name], records, num_fewshot, max_new_tokens)
    return loaded


def _check_known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        near = nearest(name, [*ABILITY_TASKS, *known], _ALTERNATIVES, cutoff=0.5)
        hint = f"the nearest are {', '.join(near)}" if near else f"ours are {', '.join(ABILITY_TASKS)}"
        raise ValueError(f"there is no task {name!r}, neither ours nor one of lm-eval's {len(known)}: {hint}; "
                         "`lm-eval ls tasks` lists lm-eval's")


def _protocol(harness: ModuleType, name: str, most: int) -> str:
    whose = "sphere-easyedit tasks" if name in ABILITY_TASKS else "its own tasks"
    return f"lm-eval {harness.VERSION}, {whose}" + (f", up to {most} new tokens" if most else "")


def _scores(name: str, results: Mapping[str, Any], protocol: str) -> dict[str, AbilityScore]:
    """The scores of what was asked for: a task's, a group's average, or else those of its tasks."""
    found = results["results"]
    by_task = {name: f"sphere_{name}" if name in ABILITY_TASKS else name.removeprefix(OFFICIAL)}
    if not _metrics(found.get(by_task[name], {})):
        by_task = {task: task for task in results["configs"]}
    return {task: _score(task, found[key], results["n-shot"].get(key, 0), protocol) for task, key in by_task.items()}


def _score(task: str, found: Mapping[str, Any], shots: int, protocol: str) -> AbilityScore:
    metrics = _metrics(found)
    values = {metric: _scale(metric) * float(found[key]) for metric, key in metrics.items()}
    metric, key = next(iter(metrics.items()))
    stderr = found.get(key.replace(",", "_stderr,", 1))
    return AbilityScore(task, metric, values.pop(metric),
                        _scale(metric) * float(stderr) if isinstance(stderr, float) else None,
                        int(found["sample_len"]), int(shots), protocol,
                        {name: value for name, value in values.items() if not math.isnan(value)})


def _metrics(found: Mapping[str, Any]) -> dict[str, str]:
    """Keys of a task's means by the name of the metric, with that of the filter where there is one."""
    keys = [key for key in found if "," in key and not key.partition(",")[0].endswith("_stderr")]
    return {key.removesuffix(",none"): key for key in keys}


def _scale(metric: str) -> float:
    name = metric.partition(",")[0]
    return 1.0 if name.startswith(_OWN_SCALE_BEGINNINGS) or name.endswith(_OWN_SCALE_ENDS) else 100.0
