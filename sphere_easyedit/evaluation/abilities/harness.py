"""The adapter to lm-evaluation-harness, and the only module that imports it: an in-memory model, tasks, and their run.

Log-likelihoods come from :mod:`.teacher_forcing`, with the same results as the harness's own and faster: no padding,
common prefixes run once, logits only where a choice is predicted.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from typing import Any, Final

import datasets
import lm_eval.api.task  # type: ignore[import-untyped]
import numpy as np
import torch
from lm_eval.api.metrics import acc_all_stderr, mean_stderr, stderr_for_metric  # type: ignore[import-untyped]
from lm_eval.evaluator import evaluate  # type: ignore[import-untyped]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]
from lm_eval.models.utils import normalize_gen_kwargs  # type: ignore[import-untyped]
from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ...models.row_logits import TargetRow
from ..teacher_forcing import score_rows
from .tasks import AbilityTask, Record

# A task, group or tag as the harness loads it: {"tasks": {name: task}, "groups": ..., "group_map": ...}.
Loaded = Mapping[str, Any]
Results = Mapping[str, Any]

VERSION: Final = metadata.version("lm_eval")


class InMemoryLM(HFLM):  # type: ignore[misc]
    """A loaded model as the harness's ``LM``.

    Attributes:
        report: called with (requests done, requests in total) of the current type of request.
        truncated: number of requests so far whose prompt was truncated on the left to fit the model's context.
    """

    def __init__(self, model: nn.Module, tok: PreTrainedTokenizerBase, batch_size: int) -> None:
        # A copy, since the harness sets the tokenizer's padding token and side.
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tok), batch_size=batch_size, backend="causal")
        self.report: Callable[[int, int], None] = lambda done, total: None
        self.truncated = 0
        self._done = self._total = 0

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> Any:
        self._done, self._total = 0, len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = True,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """For each (label, prompt, continuation) the continuation's log-probability, and whether it is greedy."""
        rows = []
        for _, prompt, continuation in requests:
            limit = self.max_length + 1 - len(continuation)  # the last token is predicted and never read
            if limit < 1:
                raise ValueError(f"a continuation has {len(continuation)} tokens, but the model's context is "
                                 f"{self.max_length}: leave the task out")
            self.truncated += len(prompt) > limit
            rows.append(TargetRow(prompt[-limit:], continuation))
        scores = score_rows(self.model, rows, progress=self.report, log_probs_for=range(len(rows)))
        return [(sum(score.log_probs or ()), all(score.hits)) for score in scores]

    def tok_batch_encode(self, strings: Sequence[str], padding_side: str = "left",
                         left_truncate_len: int | None = None, truncation: bool = False) -> tuple[Tensor, Tensor]:
        ids, mask = super().tok_batch_encode(strings, padding_side, None, truncation)
        if left_truncate_len is not None and ids.shape[1] > left_truncate_len:
            self.truncated += int((mask.sum(dim=1) > left_truncate_len).sum())
            ids, mask = ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]
        return ids, mask

    def _model_generate(self, context: Tensor, max_length: int, stop: Sequence[str], **settings: Any) -> Tensor:
        """Continuations ``(rows, at most max_length)`` of padded prompts ``(rows, width)``, prompts included."""
        # Set explicitly, since a max_new_tokens of the model's generation settings would override max_length.
        settings["max_new_tokens"] = max_length - context.shape[1]
        try:
            return super()._model_generate(context, max_length, stop, **settings)  # type: ignore[no-any-return]
        finally:
            self._done += len(context)
            self.report(self._done, self._total)


def local_task(task: AbilityTask, records: Sequence[Record], num_fewshot: int, max_new_tokens: int | None) -> Loaded:
    """One of our tasks over records in memory, under a name that no task of the harness has."""
    dataset = datasets.Dataset.from_list(list(records))
    config: dict[str, Any] = {
        "task": f"sphere_{task.name}",
        "custom_dataset": lambda **_: {"test": dataset},
        "test_split": "test",
        "fewshot_split": "test",  # the harness leaves the record itself out of its examples
        "num_fewshot": num_fewshot,
        "description": task.preamble,
        "fewshot_delimiter": task.between,
        "doc_to_text": task.prompt,
        "doc_to_target": task.answer,
        "metric_list": [{"metric": metric, "aggregation": aggregation, "higher_is_better": True}
                        for metric, aggregation in task.metrics.items()],
    }
    if task.choices:
        config |= {"output_type": "multiple_choice", "doc_to_choice": list(task.choices),
                   "process_results": lambda record, results: task.score(record, [result[0] for result in results])}
    else:
        limit = min(task.max_new_tokens, max_new_tokens or task.max_new_tokens)
        config |= {"output_type": "generate_until",
                   "process_results": lambda record, answers: task.score(record, answers[0]),
                   "generation_kwargs": {"until": list(task.stops), "do_sample": False, "max_gen_toks": limit}}
    return {"tasks": {config["task"]: lm_eval.api.task.ConfigurableTask(config=config)}}


def official_task(manager: TaskManager, name: str, num_fewshot: int, max_new_tokens: int | None) -> Loaded:
    """A task, group or tag of the harness.

    Raises:
        ValueError: it can't be loaded.
    """
    try:
        loaded: Loaded = manager.load(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"lm-eval's task {name!r} can't be loaded ({error}): check that its data is in the cache of "
                         "datasets or can be downloaded") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") != 0:  # a task that sets 0 has its examples in its prompt, or allows none
            task.set_config("num_fewshot", num_fewshot)
        if task.OUTPUT_TYPE == "generate_until":
            own = _max_new_tokens(task)
            task.set_config("generation_kwargs", {"max_gen_toks": min(own, max_new_tokens or own)}, update=True)
    return loaded


def most_new_tokens(loaded: Loaded) -> int:
    """Largest number of new tokens that any of the tasks generates; 0 if none generates text."""
    return max((_max_new_tokens(task) for task in loaded["tasks"].values() if task.OUTPUT_TYPE == "generate_until"),
               default=0)


def _max_new_tokens(task: Any) -> int:
    return int(normalize_gen_kwargs(task.get_config("generation_kwargs") or {})["max_gen_toks"])


def run(lm: InMemoryLM, loaded: Loaded, limit: int | None, seed: int) -> Results:
    """Run the tasks, and return the harness's results."""
    tasks = loaded["tasks"].values()
    for task in tasks:
        task.set_fewshot_seed(seed=seed)
    # Bootstrapped standard errors are left out: the harness starts processes for them, and prints.
    errors = {stderr_for_metric(aggregation, 1) for task in tasks for aggregation in task.aggregation().values()}
    closed_form = errors <= {None, mean_stderr, acc_all_stderr}
    results: Results = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=False,
                                bootstrap_iters=1 if closed_form else 0)
    return results


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and log messages below errors of the harness and the libraries it uses."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [one.level for one in loggers]
    bars, bars_hidden = lm_eval.api.task.tqdm, datasets.are_progress_bars_disabled()
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        lm_eval.api.task.tqdm = partial(bars, disable=True)  # the harness has no option for this bar
        datasets.disable_progress_bars()
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
        lm_eval.api.task.tqdm = bars
        if not bars_hidden:
            datasets.enable_progress_bars()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random number generators within the context, for tasks that sample; restore their states after it."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
