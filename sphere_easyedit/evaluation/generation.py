"""Greedy or sampled continuations of prompts, in batches without padding."""

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

from ..models.architecture import frozen, input_device, logits_at, max_positions
from ..models.batching import length_class
from ..models.checks import check_inputs
from ..models.distributed import Replicas, split_balanced
from ..models.packing import same_states
from ..models.tokenization import continuation_ids_batch
from ..utils.messages import kind_and_text
from ..utils.progress import Progress

logger = logging.getLogger(__name__)

_BATCH_TOKENS = 1024  # prompt tokens in a batch
_BATCH_ROWS = 64  # each row keeps its keys and values, 13 MB for 100 tokens of Llama 3

_Prompt = tuple[tuple[int, ...], tuple[int, ...]]  # token ids and seed


def generate_continuations(
    model: nn.Module,
    tok: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int = 20,
    top_k: int | None = None,
    seeds: Sequence[Sequence[int]] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Generate a continuation of each prompt; return the new text only, without special tokens.

    Decoding is greedy, or samples from the ``top_k`` most likely tokens by their probabilities, as ROME does. Of the
    model's generation settings only its end tokens apply, not its penalties or temperature. Prompts of a batch are
    aligned at their first token, so nothing is padded and a continuation does not depend on the other prompts. Model
    and tokenizer stay as they are. Results are those of plain forward passes over the prompt and its new tokens: the
    model's cache is used only if it gives the same logits, and not for a row that outgrows a limit at which its earlier
    tokens get other rotary frequencies (see ``batching.length_class``).

    Args:
        top_k: None for greedy decoding.
        seeds: with ``top_k``, the seed of each prompt, a sequence of integers.
        progress: called with (prompts done, prompts in total) after each batch; equal prompts count once.

    Raises:
        TypeError: the model or the tokenizer is not one of transformers.
        ValueError: max_new_tokens or top_k is below 1, the numbers of seeds and prompts differ, a prompt has no tokens,
            or exceeds the model's context together with ``max_new_tokens``.
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
        # The last new token is never read.
        if context is not None and len(ids) + max_new_tokens - 1 > context:
            raise ValueError(
                f"prompt {index} ({prompts[index][:80]!r}) has {len(ids)} tokens: with max_new_tokens "
                f"{max_new_tokens} it exceeds the model's context of {context}; shorten it or lower max_new_tokens"
            )
    end_ids = _end_ids(model, tok)
    seeded = [(tuple(ids), () if seeds is None else tuple(seeds[index])) for index, ids in enumerate(prompt_ids)]
    distinct = list(dict.fromkeys(seeded))
    replicas = Replicas.of(model)
    if replicas is None:
        new = _generate(model, distinct, max_new_tokens, top_k, end_ids, progress)
    else:
        shares = [([distinct[index] for index in part], max_new_tokens, top_k, end_ids)
                  for part in split_balanced([len(ids) + max_new_tokens for ids, _ in distinct], replicas.world_size)]
        new = {one: ids for found in replicas.run(_generate_share, shares, progress) for one, ids in found.items()}
    texts = {one: _new_text(tok, list(one[0]), ids) for one, ids in new.items()}
    return [texts[one] for one in seeded]


def _generate_share(replicas: Replicas, prompts: Sequence[_Prompt], max_new_tokens: int, top_k: int | None,
                    end_ids: set[int]) -> dict[_Prompt, list[int]]:
    return _generate(replicas.editable.model, prompts, max_new_tokens, top_k, end_ids, replicas.progress)


def _generate(model: nn.Module, prompts: Sequence[_Prompt], max_new_tokens: int, top_k: int | None, end_ids: set[int],
              progress: Progress | None) -> dict[_Prompt, list[int]]:
    """New token ids of each distinct prompt."""
    new: dict[_Prompt, list[int]] = {}
    kind = length_class(model.config)  # type: ignore[arg-type]

    def kinds(prompt: _Prompt) -> tuple[int, int]:
        """Kinds of length (see ``kind_by_length``) at the beginning and at the end."""
        return kind(len(prompt[0])), kind(len(prompt[0]) + max_new_tokens - 1)  # the last new token is never read

    batches = list(_batches(prompts, max_new_tokens, kinds))
    # A cache keeps keys from when the row was of a smaller kind; a plain forward pass computes all of them again.
    cacheable = [number for number, batch in enumerate(batches) if len(set(kinds(batch[0]))) == 1]
    # A cache may fail only for several rows, or only after short prompts: check the longest and the shortest first.
    checked = {of_size[end] for several in (True, False) for end in (0, -1)
               if (of_size := [number for number in cacheable if (len(batches[number]) > 1) == several])}
    use_cache = True
    with frozen(model), torch.no_grad():
        for number in sorted(range(len(batches)), key=lambda number: (number not in checked, number)):
            batch = batches[number]
            choose = _argmax if top_k is None else _TopKSampler(top_k, [seed for _, seed in batch], max_new_tokens)
            decoder = partial(_BatchDecoder, [ids for ids, _ in batch], max_new_tokens, end_ids, choose)
            found = None
            if use_cache and number in cacheable:
                found = _with_cache(model, decoder(), check=number in checked)
                use_cache = found is not None
            if found is None:
                found = _without_cache(model, decoder())
            new |= dict(zip(batch, found, strict=True))
            if progress is not None:
                progress(len(new), len(prompts))
    return new


def _batches(prompts: Sequence[_Prompt], max_new_tokens: int, kinds: Callable[[_Prompt], tuple[int, int]]
             ) -> Iterator[list[_Prompt]]:
    """Batches of prompts of similar length and equal ``kinds``, the longest first."""
    batch: list[_Prompt] = []
    for prompt in sorted(prompts, key=lambda prompt: -len(prompt[0])):
        longest = len(batch[0][0]) if batch else 0
        # Each token that a prompt is shorter costs the batch a step; a separate batch would cost max_new_tokens steps.
        if batch and (longest - len(prompt[0]) > max_new_tokens // 4 or kinds(prompt) != kinds(batch[0])
                      or len(batch) == max(1, min(_BATCH_ROWS, _BATCH_TOKENS // longest))):
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch


@contextmanager
def _last_logits_only(model: nn.Module) -> Iterator[None]:
    """Compute logits for the last token of each row only, not for a whole prompt."""
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    handle = head.register_forward_pre_hook(lambda _module, args: (args[0][:, -1:], *args[1:]))
    try:
        yield
    finally:
        handle.remove()


def _end_ids(model: nn.Module, tok: PreTrainedTokenizerBase) -> set[int]:
    settings = getattr(model, "generation_config", None)
    configured = getattr(settings, "eos_token_id", None)
    end_ids = set(configured if isinstance(configured, list) else [configured]) | {tok.eos_token_id}
    return {int(end_id) for end_id in end_ids if end_id is not None}


class _BatchDecoder(LogitsProcessor):
    """Chooses the next token of each row of a batch, beginning at the end of the shortest prompt.

    All rows are at the same position: while shorter rows generate, longer ones still read their prompts. As a logits
    processor it makes ``generate`` take the chosen tokens.

    Args:
        choose: takes float32 logits ``(rows, vocabulary)`` and the number of new tokens of each row ``(rows,)``;
            returns the next token of each row ``(rows,)``.

    Attributes:
        first: ``(rows, shortest)``, the tokens to begin with.
        max_length: maximum number of tokens in a row.
        new: new tokens of each row, before its first end token.
        checked_ids, checked_logits: the first and the last row's tokens, and their logits at each position.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, end_ids: set[int],
                 choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._prompts, self._max_new_tokens, self._end_ids, self._choose = prompts, max_new_tokens, end_ids, choose
        self._lengths = torch.tensor([len(prompt) for prompt in prompts])
        self.first = torch.tensor([prompt[: int(self._lengths.min())] for prompt in prompts])
        self.max_length = int(self._lengths.max()) + max_new_tokens
        self.new: list[list[int]] = [[] for _ in prompts]
        self._ended = [False] * len(prompts)
        self.checked_ids, self.checked_logits = self.first[[0, -1]], list[Tensor]()

    def next(self, position: int, logits: Tensor) -> list[int]:
        """Each row's token at a position, from the logits ``(rows, vocabulary)`` that predict it."""
        tokens: list[int] = self._choose(logits, position - self._lengths).tolist()
        for number, prompt in enumerate(self._prompts):
            if position < len(prompt):
                tokens[number] = prompt[position]
            elif not self._ended[number]:
                self._ended[number] = tokens[number] in self._end_ids
                self.new[number] += [] if self._ended[number] else [tokens[number]]
                self._ended[number] |= len(self.new[number]) == self._max_new_tokens
        return tokens

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.checked_ids = input_ids[[0, -1]]
        self.checked_logits.append(scores[[0, -1]])
        tokens = torch.tensor(self.next(input_ids.shape[1], scores), device=scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)

    def stopping_criterion(self, input_ids: Tensor, _scores: Any, **_others: Any) -> Tensor:
        """Whether ``generate`` may stop, for each row."""
        return torch.full((len(input_ids),), self.all_ended, device=input_ids.device)

    @property
    def all_ended(self) -> bool:
        """Whether every row has ended."""
        return all(self._ended)


def _with_cache(model: Any, decoder: _BatchDecoder, check: bool) -> list[list[int]] | None:
    """New token ids of each row, generated by transformers' ``generate``, which knows every model's type of cache.

    Args:
        check: compare logits of the first and the last row with those of a plain forward pass over all their tokens.

    Returns:
        None if the model can't generate with a cache, or gives other logits with it.
    """
    first = decoder.first.to(input_device(model))
    settings = GenerationConfig(max_new_tokens=decoder.max_length - first.shape[1],  # type: ignore[no-untyped-call]
                                do_sample=False, use_cache=True)
    try:
        with _default_generation_config(model), _last_logits_only(model):
            model.generate(input_ids=first, attention_mask=torch.ones_like(first), generation_config=settings,
                           logits_processor=LogitsProcessorList([decoder]),
                           stopping_criteria=StoppingCriteriaList([decoder.stopping_criterion]))
    except (TypeError, KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        if not check:
            raise
        logger.warning("%s can't generate with a cache (%s): generating without one",
                       type(model).__name__, kind_and_text(error))
        return None
    if check:
        ids, logits = decoder.checked_ids, decoder.checked_logits
        positions = torch.arange(first.shape[1] - 1, ids.shape[1]).repeat(2)
        expected = logits_at(model, ids, torch.ones_like(ids), torch.tensor([0, 1]).repeat_interleave(len(logits)),
                             positions)
        if not same_states(model, "a cache", torch.stack(logits, dim=1).flatten(0, 1), expected):
            return None
    return decoder.new


def _without_cache(model: nn.Module, decoder: _BatchDecoder) -> list[list[int]]:
    """New token ids of each row, each from a plain forward pass over all earlier tokens."""
    ids = decoder.first.to(input_device(model))
    with _last_logits_only(model):
        while not decoder.all_ended:
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[:, -1].float()
            ids = torch.cat([ids, torch.tensor(decoder.next(ids.shape[1], logits)).to(ids)[:, None]], dim=1)
    return decoder.new


@contextmanager
def _default_generation_config(model: nn.Module) -> Iterator[None]:
    """Replace the model's generation settings (penalties, beams) by the defaults within the context."""
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


def _argmax(logits: Tensor, _steps: Tensor) -> Tensor:
    return logits.argmax(dim=-1)


class _TopKSampler:
    """Samples from each row's ``top_k`` most likely tokens, by inverting their cumulative distribution."""

    def __init__(self, top_k: int, seeds: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        self._top_k = top_k
        self._draws = torch.tensor(np.stack([np.random.default_rng(seed).random(max_new_tokens) for seed in seeds]))

    def __call__(self, logits: Tensor, steps: Tensor) -> Tensor:
        values, tokens = (found.cpu() for found in logits.topk(min(self._top_k, logits.shape[-1]), dim=-1))  # (rows, k)
        draws = self._draws.gather(1, steps.clamp(0, self._draws.shape[1] - 1)[:, None])
        passed = values.double().softmax(dim=-1).cumsum(dim=-1) > draws
        # Nothing passes if logits are NaN, or if rounding leaves the sum below the draw.
        passed[:, -1] = True
        return tokens.gather(1, passed.int().argmax(dim=-1, keepdim=True))[:, 0]


def _new_text(tok: PreTrainedTokenizerBase, prompt_ids: list[int], new_ids: list[int]) -> str:
    """Decode the new tokens, with the leading space that some tokenizers drop at the beginning of a text."""

    def decode(ids: list[int]) -> str:
        return str(tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    prompt, whole = decode(prompt_ids), decode(prompt_ids + new_ids)
    return whole[len(prompt) :] if whole.startswith(prompt) else decode(new_ids)
