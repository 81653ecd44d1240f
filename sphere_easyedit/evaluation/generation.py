"""What a model says when it is left to go on: greedy continuations of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..models import frozen, input_device, max_positions
from ..tokenization import continuation_ids_batch

# Tokens in one batch of prompts, whose first step makes logits for all of them.
_BATCH_TOKENS = 512


def generate_continuations(
    model: nn.Module, tok: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int = 20
) -> list[str]:
    """What the model says after each prompt, greedily: the continuations alone, without special tokens.

    Greedy to the letter: the model's own generation settings (penalties, temperature) don't count, its end
    tokens do. Prompts of equal length run together, so nothing is padded, and a prompt's continuation does
    not depend on the others; model and tokenizer stay as they are.

    Raises:
        ValueError: max_new_tokens is below 1, a prompt has no tokens, or with ``max_new_tokens`` it passes
            the model's context.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}: give 1 or more")
    context = max_positions(model.config)  # type: ignore[arg-type]
    prompt_ids = [ids for ids, _ in continuation_ids_batch(tok, prompts, [""] * len(prompts))]
    by_length: dict[int, list[int]] = {}
    for index, ids in enumerate(prompt_ids):
        if not ids:
            raise ValueError(f"prompt {index} ({prompts[index]!r}) has no tokens: give one that is not empty")
        # The last new token is not read any more.
        if context is not None and len(ids) + max_new_tokens - 1 > context:
            raise ValueError(
                f"prompt {index} ({prompts[index][:80]!r}) has {len(ids)} tokens: with max_new_tokens "
                f"{max_new_tokens} it passes the model's context of {context}; shorten it or ask for fewer"
            )
        by_length.setdefault(len(ids), []).append(index)
    device = input_device(model)
    ends = _end_ids(model, tok)
    texts = [""] * len(prompts)
    with frozen(model), torch.no_grad():
        for length, group in by_length.items():
            size = max(1, _BATCH_TOKENS // length)
            for start in range(0, len(group), size):
                chunk = group[start : start + size]
                input_ids = torch.tensor([prompt_ids[index] for index in chunk], device=device)
                found = _greedy(model, input_ids, max_new_tokens, ends)
                for index, new_ids in zip(chunk, found, strict=True):
                    texts[index] = _new_text(tok, prompt_ids[index], new_ids)
    return texts


def _end_ids(model: nn.Module, tok: PreTrainedTokenizerBase) -> set[int]:
    settings = getattr(model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    ends = set(named if isinstance(named, list) else [named]) | {tok.eos_token_id}
    return {int(end) for end in ends if end is not None}


def _greedy(model: nn.Module, input_ids: Tensor, max_new_tokens: int, ends: set[int]) -> list[list[int]]:
    """New token ids of each row of ``input_ids`` ``(rows, tokens)``, up to its first end token."""
    new: list[list[int]] = [[] for _ in range(len(input_ids))]
    ended = [False] * len(new)
    mask = torch.ones_like(input_ids)
    feed, past = input_ids, None
    for _ in range(max_new_tokens):
        out = model(input_ids=feed, attention_mask=mask, past_key_values=past, use_cache=True)
        past = out.past_key_values
        chosen = out.logits[:, -1].float().argmax(dim=-1)  # (rows,)
        for number, token in enumerate(chosen.tolist()):
            ended[number] = ended[number] or token in ends
            if not ended[number]:
                new[number].append(token)
        if all(ended):
            break
        feed = chosen.to(input_ids.device).unsqueeze(1)
        mask = torch.cat([mask, torch.ones_like(feed)], dim=1)
    return new


def _new_text(tok: PreTrainedTokenizerBase, prompt_ids: list[int], new_ids: list[int]) -> str:
    """The new tokens as text, with the space at the seam, which some tokenizers drop where a text starts."""

    def decode(ids: list[int]) -> str:
        return str(tok.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    head, whole = decode(prompt_ids), decode(prompt_ids + new_ids)
    return whole[len(head) :] if whole.startswith(head) else decode(new_ids)
