"""What a model says when it is left to go on: greedy or sampled continuations of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..inputs import check_inputs
from ..models import frozen, input_device, max_positions
from ..replicas import Replicas, shared_out
from ..tokenization import continuation_ids_batch
from .teacher_forcing import Progress

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

    Greedy, or drawn from the ``top_k`` likeliest tokens in proportion to their probabilities, as ROME generates. To the
    letter: the model's own generation settings (penalties, temperature) don't count, its end tokens do. Prompts run
    together from the first token on, so nothing is padded, and a prompt's continuation does not depend on the others;
    model and tokenizer stay as they are.

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
                  for part in shared_out([len(ids) + max_new_tokens for ids, _ in distinct], replicas.size)]
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
    with frozen(model), torch.no_grad(), _last_place_alone(model):
        for chunk in _chunks(wanted, max_new_tokens):
            choose = _likeliest if top_k is None else _Drawing(top_k, [seed for _, seed in chunk], max_new_tokens)
            found = _generate(model, [ids for ids, _ in chunk], max_new_tokens, ends, choose)
            new |= dict(zip(chunk, found, strict=True))
            if progress is not None:
                progress(len(new), len(wanted))
    return new


def _chunks(wanted: Sequence[_Wanted], max_new_tokens: int) -> Iterator[list[_Wanted]]:
    """What is wanted in batches of like length; the longest first."""
    chunk: list[_Wanted] = []
    for one in sorted(wanted, key=lambda one: -len(one[0])):
        longest = len(chunk[0][0]) if chunk else 0
        # A batch takes as many steps more as its lengths differ; one of its own would take max_new_tokens.
        if chunk and (longest - len(one[0]) > max_new_tokens // 4
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


def _generate(model: nn.Module, prompts: Sequence[Sequence[int]], max_new_tokens: int, ends: set[int],
              choose: Callable[[Tensor, Tensor], Tensor]) -> list[list[int]]:
    """New token ids of each row of prompt ids, up to its first end token.

    All rows are at the same place: where the shorter go on, the longer still read their prompts.

    Args:
        choose: of float32 logits ``(rows, vocabulary)`` and how many new tokens each row has ``(rows,)``, the next
            token of each ``(rows,)``.
    """
    device = input_device(model)
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    shortest = int(lengths.min())
    new: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(new)
    feed, past = torch.tensor([prompt[:shortest] for prompt in prompts], device=device), None
    mask = torch.ones_like(feed)
    for place in range(shortest, int(lengths.max()) + max_new_tokens):
        out = model(input_ids=feed, attention_mask=mask, past_key_values=past, use_cache=True)
        past = out.past_key_values
        tokens = choose(out.logits[:, -1].float(), place - lengths).tolist()
        for number, prompt in enumerate(prompts):
            if place < len(prompt):
                tokens[number] = prompt[place]
            elif not ended[number]:
                ended[number] = tokens[number] in ends
                new[number] += [] if ended[number] else [tokens[number]]
                ended[number] |= len(new[number]) == max_new_tokens
        if all(ended):
            break
        feed = torch.tensor(tokens, device=device).unsqueeze(1)
        mask = torch.cat([mask, torch.ones_like(feed)], dim=1)
    return new


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
