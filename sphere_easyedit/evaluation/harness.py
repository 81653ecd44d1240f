"""lm-evaluation-harness: the only file that imports it. A model is lent to it, tasks are made for it, and it is run.

The model goes through the harness faster than by the harness's own class, with the same results: likelihoods come from
:mod:`.teacher_forcing` (no padding, common beginnings once, logits only where a choice is predicted), and a written
answer that has ended costs nothing more, while the harness's own runs every answer of a batch as long as the longest.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from .ability_tasks import AbilityTask, Record
from .teacher_forcing import Row, score_rows

logger = logging.getLogger(__name__)

# What the harness knows a requested name as: {"tasks": {name: task}, "groups": ..., "group_map": ...}.
Loaded = Mapping[str, Any]
Results = Mapping[str, Any]

VERSION: Final = metadata.version("lm_eval")

# Answers that have ended leave the batch after so many tokens. Each time costs about one token's worth of overhead.
_STEP: Final = 16


class LentModel(HFLM):  # type: ignore[misc]
    """A model in memory as the harness's ``LM``.

    Attributes:
        report: called with (requests done, requests in all) of the kind of request under way.
        truncated: requests so far whose prompt lost its beginning, since it did not fit the model's context.
    """

    def __init__(self, model: nn.Module, tok: PreTrainedTokenizerBase, batch_size: int) -> None:
        # A copy, since the harness gives a tokenizer a padding token and side.
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
        """Of each (label, prompt, continuation): the continuation's log-probability, and whether it is greedy."""
        rows = []
        for _, prompt, continuation in requests:
            room = self.max_length + 1 - len(continuation)  # the last token is predicted and never read
            if room < 1:
                raise ValueError(f"a continuation has {len(continuation)} tokens, but the model's context is "
                                 f"{self.max_length}: leave the task out")
            self.truncated += len(prompt) > room
            rows.append(Row(prompt[-room:], continuation))
        scores = score_rows(self.model, rows, progress=self.report, weighed=range(len(rows)))
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
        try:
            if settings.get("do_sample") or (self.model.generation_config.num_beams or 1) > 1:
                return super()._model_generate(context, max_length, stop, **settings)  # type: ignore[no-any-return]
            settings.pop("temperature", None)  # greedy: it says nothing, and transformers warns of it
            return self._greedy(context, settings.pop("attention_mask"), max_length, stop, settings)
        finally:
            self._done += len(context)
            self.report(self._done, self._total)

    def _greedy(self, context: Tensor, mask: Tensor, max_length: int, stop: Sequence[str],
                settings: Mapping[str, Any]) -> Tensor:
        width, padding = context.shape[1], self.tokenizer.pad_token_id
        found = torch.full((len(context), max_length), padding, device=context.device)
        rows = torch.arange(len(context), device=context.device)  # those of ``found`` that still go on
        ids, past = context, None
        ended = _Ended(self.tokenizer, width, stop)
        while True:
            step = self.model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=past, use_cache=True, pad_token_id=padding,
                max_new_tokens=min(_STEP, max_length - ids.shape[1]), stopping_criteria=StoppingCriteriaList([ended]),
                return_dict_in_generate=True, **settings)
            ids, past = step.sequences, step.past_key_values
            found[rows, : ids.shape[1]] = ids
            on = (~(ended.of(ids, ids.shape[1] - width) | self._at_end(ids[:, width:]))).nonzero()[:, 0]
            if not len(on) or ids.shape[1] >= max_length:
                return found
            mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)
            # Rows that have ended can't leave some caches: there they run on, and what they say is not looked at.
            if len(on) < len(ids) and (past is None or hasattr(past, "batch_select_indices")):
                if past is not None:
                    past.batch_select_indices(on)
                ids, mask, rows = ids[on], mask[on], rows[on]

    def _at_end(self, new_ids: Tensor) -> Tensor:
        """For each row, whether an end token of the model's is in it."""
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        return torch.isin(new_ids, new_ids.new_tensor(ends)).any(dim=1)


class _Ended(StoppingCriteria):
    """Ends each row by itself at a stop sequence; the harness's own ends all rows once all have the same one."""

    def __init__(self, tok: PreTrainedTokenizerBase, width: int, stops: Sequence[str]) -> None:
        self._tok, self._width, self._stops = tok, width, [stop for stop in stops if stop]
        # A model may write a stop sequence in other tokens than the tokenizer, and other text around it.
        self._look = 2 + max((len(tok.encode(stop, add_special_tokens=False)) for stop in self._stops), default=0)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return self.of(input_ids, self._look)

    def of(self, ids: Tensor, tokens: int) -> Tensor:
        """For each row, whether a stop sequence is in its last so many new tokens."""
        texts = self._tok.batch_decode(ids[:, self._width:][:, -tokens:])
        return torch.tensor([any(stop in text for stop in self._stops) for text in texts], device=ids.device)


def own_task(task: AbilityTask, records: Sequence[Record], num_fewshot: int, max_new_tokens: int | None) -> Loaded:
    """One of our tasks over records in memory, under a name that none of the harness's has."""
    held = datasets.Dataset.from_list(list(records))
    config: dict[str, Any] = {
        "task": f"sphere_{task.name}",
        "custom_dataset": lambda **_: {"test": held},
        "test_split": "test",
        "fewshot_split": "test",  # the record that is asked is never among its own examples
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
                   "process_results": lambda record, weighed: task.score(record, [log_prob for log_prob, _ in weighed])}
    else:
        most = min(task.max_new_tokens, max_new_tokens or task.max_new_tokens)
        config |= {"output_type": "generate_until",
                   "process_results": lambda record, said: task.score(record, said[0]),
                   "generation_kwargs": {"until": list(task.stops), "do_sample": False, "max_gen_toks": most}}
    return {"tasks": {config["task"]: lm_eval.api.task.ConfigurableTask(config=config)}}


def named_task(manager: TaskManager, name: str, num_fewshot: int, max_new_tokens: int | None) -> Loaded:
    """A task, group or tag of the harness's own.

    Raises:
        ValueError: its data can't be had.
    """
    try:
        loaded: Loaded = manager.load(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"lm-eval's task {name!r} can't be loaded, mostly since its data is neither in the cache of "
                         f"datasets nor within reach: {error}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") != 0:  # a task that says 0 has its examples in its prompt, or can't have any
            task.set_config("num_fewshot", num_fewshot)
        if task.OUTPUT_TYPE == "generate_until":
            own = _max_new_tokens(task)
            task.set_config("generation_kwargs", {"max_gen_toks": min(own, max_new_tokens or own)}, update=True)
    return loaded


def most_new_tokens(loaded: Loaded) -> int:
    """The longest answer that any of the tasks lets a model write; 0 where none is written."""
    return max((_max_new_tokens(task) for task in loaded["tasks"].values() if task.OUTPUT_TYPE == "generate_until"),
               default=0)


def _max_new_tokens(task: Any) -> int:
    return int(normalize_gen_kwargs(task.get_config("generation_kwargs") or {})["max_gen_toks"])


def run(lm: LentModel, loaded: Loaded, limit: int | None, seed: int) -> Results:
    """Ask the model, and have the harness put its answers together."""
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=seed)
    found: Results = evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=False,
                              bootstrap_iters=0 if _bootstraps(loaded["tasks"].values()) else 1)
    return found


def _bootstraps(tasks: Collection[Any]) -> bool:
    """Whether the harness would bootstrap a standard error, which it does in processes of its own, and printing."""
    errors = {stderr_for_metric(aggregation, 1) for task in tasks for aggregation in task.aggregation().values()}
    return not errors <= {None, mean_stderr, acc_all_stderr}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and log lines of the harness and what it uses, but for errors."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers")]
    levels = [one.level for one in loggers]
    bars, bars_hidden = lm_eval.api.task.tqdm, datasets.are_progress_bars_disabled()
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        lm_eval.api.task.tqdm = partial(bars, disable=True)  # the harness has no option for this one
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
    """Random numbers from the seed inside the context, for tasks that draw; the generators as before after it."""
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
