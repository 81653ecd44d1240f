"""What a model says when it is left to go on: greedy or sampled continuations of prompts."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from ..batching import length_class
from ..editing.packing import same_states
from ..inputs import check_inputs
from ..messages import kind_and_text
from ..models import frozen, input_device, logits_at, max_positions
from ..replicas import Replicas, split_balanced
from ..tokenization import continuation_ids_batch
from .teacher_forcing import Progress

logger = logging.getLogger(__name__)

_BATCH_TOKENS = 1024  # of the prompts in a batch
_MOST_ROWS = 64  # of a batch: each keeps its keys and values, 13 MB for 100 tokens of Llama 3

_Wanted = tuple[tuple[int, ...], tuple[int, ...]]  # a prompt's tokens, and its seed


def generate_continuations(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 20,
    top_k: int | None = None,
    seeds: Sequence[Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """What the model says after each prompt: the continuations alone, without special tokens.

    Greedy, or drawn from the ``top_k`` likeliest tokens in proportion to their probabilities, as ROME generates. Of the
    model's own generation settings only its end tokens count, not its penalties or temperature. Prompts run
    together from the first token on, so nothing is padded, and a prompt's continuation does not depend on the others;
    model and tokenizer stay as they are. A continuation is what plain forward passes over the prompt alone and each new
    token give. The model's cache is used only where it gives the same; so it isn't where a row grows past a limit from
    which its earlier tokens get other rotary frequencies (see ``batching.length_class``).

    Args:
        top_k: None for greedy.
        seeds: with ``top_k``, numbers from which each prompt's own draws come; one list of them a prompt.
        progress: called with (prompts done, prompts in all) after each batch, equal ones counted once.

    Raises:
        TypeError: the model or the tokenizer is not one of transformers.
        ValueError: max_new_tokens or top_k is below 1, there are not as many seeds as prompts, a prompt has no tokens,
            or with ``max_new_tokens`` it passes the model's context.
    """
    check_inputs(model, tok)
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: give 1 or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}: give 1 or more, or None for greedy")
    if (top_k is None) != (seeds is None) or (seeds is not None and len(seeds) != len(prompts)):
        raise ValueError(f"top_k is {top_k}, with {'no' if seeds is None else len(seeds)} seeds for {len(prompts)} "
                         "prompts: give as many seeds as prompts with top_k, and none without")
    context = max_positions(model.config)  # type: ignore[arg-type]
    prompt_ids = [ids for ids, _ in continuation_ids_batch(tok, prompts, [""] * len(prompts))]
    for index, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"prompt {index} ({prompts[index]!r}) has no tokens: give one that is not empty")
        # The last new token is not read any more.
        if context is not None and len(ids) + max_new_tokens - 1 > context:
            raise ValueError(
                f"prompt {index} ({prompts[index][:80]!r}) has {len(ids)} tokens: with max_new_tokens "
                f"{max_new_tokens} it passes the model's context of {context}; shorten it or ask for fewer"
            )
    ends = _end_ids(model, tok)
    wanted = [(tuple(ids), () if seeds is None else tuple(seeds[index])) for index, ids in enumerate(prompt_ids)]
    distinct = list(dict.fromkeys(wanted))
    replicas = Replicas.of(model)
    if replicas is None:
        new = _generate_all(model, distinct, max_new_tokens, top_k, ends, progress)
    else:
        shares = [([distinct[place] for place in part], max_new_tokens, top_k, ends)
                  for part in split_balanced([len(ids) + max_new_tokens for ids, _ in distinct], replicas.world_size)]
        new = {one: ids for found in replicas.run(_generate_share, shares, progress) for one, ids in found.items()}
    texts = {one: _new_text(tok, list(one[0]), ids) for one, ids in new.items()}
    return [texts[one] for one in wanted]


def _generate_share(here: Replicas, wanted: Sequence[_Wanted], max_new_tokens: int, top_k: int | None, ends: set[int]
                    ) -> dict[_Wanted, list[int]]:
    return _generate_all(here.editable.model, wanted, max_new_tokens, top_k, ends, here.progress)


def _generate_all(model: nn.Module, wanted: Sequence[_Wanted], max_new_tokens: int, top_k: int | None, ends: set[int],
                  progress: Progress | None) -> dict[_Wanted, list[int]]:
    """New token ids of what is wanted, once each."""
    new: dict[_Wanted, list[int]] = {}
    kind = length_class(model.config)  # type: ignore[arg-type]

    def kinds(one: _Wanted) -> tuple[int, int]:
        return kind(len(one[0])), kind(len(one[0]) + max_new_tokens - 1)  # the last new token is not read any more

    chunks = list(_chunks(wanted, max_new_tokens, kinds))
    # A cache keeps keys made while the row was of a smaller kind; a plain forward pass makes all of them anew.
    steady = [number for number, chunk in enumerate(chunks) if len(set(kinds(chunk[0]))) == 1]
    # A cache may fail on several rows only, or behind few tokens: it is tried on the longest and on the shortest first.
    tried = {of_size[end] for several in (True, False) for end in (0, -1)
             if (of_size := [number for number in steady if (len(chunks[number]) > 1) == several])}
    cached = True
    with frozen(model), torch.no_grad():
        for number in sorted(range(len(chunks)), key=lambda number: (number not in tried, number)):
            chunk = chunks[number]
            choose = _likeliest if top_k is None else _Drawing(top_k, [seed for _, seed in chunk], max_new_tokens)
            rows = partial(_Rows, [ids for ids, _ in chunk], max_new_tokens, ends, choose)
            found = None
            if cached and number in steady:
                found = _with_cache(model, rows(), check=number in tried)
                cached = found is not None
            if found is None:
                found = _without_cache(model, rows())
            new |= dict(zip(chunk, found, strict=True))
            if progress is not None:
                progress(len(new), len(wanted))
    return new


def _chunks(wanted: Sequence[_Wanted], max_new_tokens: int, kinds: Callable[[_Wanted], tuple[int, int]]
            ) -> Iterator[list[_Wanted]]:
    """What is wanted in batches of like length and equal ``kinds``; the longest first."""
    chunk: list[_Wanted] = []
    for one in sorted(wanted, key=lambda one: -len(one[0])):
        longest = len(chunk[0][0]) if chunk else 0
        # A batch takes as many steps more as its lengths differ; one of its own would take max_new_tokens.
        if chunk and (longest - len(one[0]) > max_new_tokens // 4 or kinds(one) != kinds(chunk[0])
                      or len(chunk) == max(1, min(_MOST_ROWS, _BATCH_TOKENS // longest))):
            yield chunk
            chunk = []
        chunk.append(one)
    if chunk:
        yield chunk


@contextmanager
def _last_place_alone(model: nn.Module) -> Iterator[None]:
    """Logits for the last token of each row only: those of a whole prompt are a vocabulary for each of its tokens."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _module, args: (args[0][:, -1:], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def _end_ids(model: nn.Module, tok: PreTrainedTokenizerBase) -> set[int]:
    settings = getattr(model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    ends = set(named if isinstance(named, list) else [named]) | {tok.eos_token_id}
    return {int(end) for end in ends if end is not None}


class _Rows(LogitsProcessor):
    """Rows of prompt ids that go on together, a token at a time, from the shortest prompt on.

    All rows are at the same place: where the shorter go on, the longer still read their prompts. As a processor of
    logits it makes ``generate`` take the tokens that are wanted here.

    Args:
        choose: of float32 logits ``(rows, vocabulary)`` and how many new tokens each row has ``(rows,)``, the next
            token of each ``(rows,)``.

    Attributes:
        first: ``(rows, shortest)``, the tokens to begin with.
        places: how many tokens a row has at most.
        new: new tokens of each row, up to its first end token.
        read, said: what the first row and the last consist of, and the logits behind them at each place.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: set[int],
                 choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._prompts, self._max_new_tokens, self._ends, self._choose = prompts, max_new_tokens, ends, choose
        self._lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.first = torch.tensor([prompt[: int(self._lengths.min())] for prompt in prompts])
        self.places = int(self._lengths.max()) + max_new_tokens
        self.new: list[list[int]] = [[] for _ in prompts]
        self._ended = [False] * len(prompts)
        self.read, self.said = self.first[[0, -1]], list[Tensor]()

    def next(self, place: int, logits: Tensor) -> list[int]:
        """Each row's token at a place, by the logits ``(rows, vocabulary)`` in front of it."""
        tokens: list[int] = self._choose(logits, place - self._lengths).tolist()
        for number, prompt in enumerate(self._prompts):
            if place < len(prompt):
                tokens[number] = prompt[place]
            elif not self._ended[number]:
                self._ended[number] = tokens[number] in self._ends
                self.new[number] += [] if self._ended[number] else [tokens[number]]
                self._ended[number] |= len(self.new[number]) == self._max_new_tokens
        return tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.read = input_ids[[0, -1]]
        self.said.append(scores[[0, -1]])
        tokens = torch.tensor(self.next(input_ids.shape[1], scores), device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)

    def ended(self, input_ids: Tensor, _scores: Any, **_others: Any) -> Tensor:
        """Whether ``generate`` may stop, for each row."""
        return torch.full((len(input_ids),), self.all_ended, device=input_ids.device)

    @property
    def all_ended(self) -> bool:
        """Whether every row has its new tokens."""
        return all(self._ended)


def _with_cache(model: Any, rows: _Rows, check: bool) -> list[list[int]] | None:
    """New token ids of each row, by transformers' own ``generate``, which knows every model's kind of cache.

    Args:
        check: compare logits of the first row and the last with those of a plain forward pass over all their tokens.

    Returns:
        None where the model can't generate with a cache, or says something else with it.
    """
    first = rows.first.to(input_device(model))
    settings = GenerationConfig(max_new_tokens=rows.places - first.shape[1], do_sample=False,  # type: ignore[no-untyped-call]
                                use_cache=True)
    try:
        with _default_generation(model), _last_place_alone(model):
            model.generate(input_ids=first, attention_mask=torch.ones_like(first), generation_config=settings,
                           logits_processor=LogitsProcessorList([rows]),
                           stopping_criteria=StoppingCriteriaList([rows.ended]))
    except (TypeError, KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        if not check:
            raise
        logger.warning("%s does not generate with a cache (%s): every token is made without one",
                       type(model).__name__, kind_and_text(error))
        return None
    if check:
        read = rows.read
        places = torch.arange(first.shape[1] - 1, read.shape[1]).repeat(2)
        expected = logits_at(model, read, torch.ones_like(read), torch.tensor([0, 1]).repeat_interleave(len(rows.said)),
                             places)
        if not same_states(model, "a cache", torch.stack(rows.said, dim=1).flatten(0, 1), expected):
            return None
    return rows.new


def _without_cache(model: nn.Module, rows: _Rows) -> list[list[int]]:
    """New token ids of each row, each from a plain forward pass over all tokens in front of it."""
    ids = rows.first.to(input_device(model))
    with _last_place_alone(model):
        while not rows.all_ended:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1].float()
            ids = torch.cat([ids, torch.tensor(rows.next(ids.shape[1], logits)).to(ids)[:, None]], dim=1)
    return rows.new


@contextmanager
def _default_generation(model: nn.Module) -> Iterator[None]:
    """The model's own generation settings (penalties, beams) do not count inside the context."""
    holders = [module for module in model.modules() if isinstance(vars(module).get("generation_config"),
                                                                  GenerationConfig)]
    before = [module.generation_config for module in holders]
    try:
        for module in holders:
            module.generation_config = GenerationConfig()  # type: ignore[assignment,no-untyped-call]
        yield
    finally:
        for module, settings in zip(holders, before, strict=True):
            module.generation_config = settings


def _likeliest(logits: Tensor, _steps: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


class _Drawing:
    """Of each row's ``top_k`` likeliest tokens the one where their summed probabilities first pass the row's draw."""

    def __init__(self, top_k: int, seeds: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self._top_k = top_k
        self._draws = torch.tensor(np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds]))

    def __call__(self, logits: Tensor, steps: Tensor) -> Tensor:
        values, tokens = (found.cpu() for found in logits.topk(min(self._top_k, logits.shape[-1]), dim=-1))  # (rows, k)
        draws = self._draws.gather(1, steps.clamp(0, self._draws.shape[1] - 1)[:, None])
        passed = values.double().softmax(dim=-1).cumsum(dim=-1) > draws
        # No place passes where logits are no numbers, or rounding leaves the sum below the draw.
        passed[:, -1] = True
        return tokens.gather(1, passed.int().argmax(dim=-1, keepdim=True))[:, 0]


def _new_text(tok: PreTrainedTokenizerBase, prompt_ids: list[int], new_ids: list[int]) -> str:
    """The new tokens as text, with the space at the seam, which some tokenizers drop where a text starts."""

    def decode(ids: list[int]) -> str:
        return str(tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    head, whole = decode(prompt_ids), decode(prompt_ids + new_ids)
    return whole[len(head) :] if whole.startswith(head) else decode(new_ids)
