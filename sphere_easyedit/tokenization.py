"""Where a prompt ends and its continuation begins, in tokens, for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# SentencePiece's mark of a space at a word's front; byte-level vocabularies write that space another way.
_METASPACE = "\u2581"


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: JSON and Python let through halves of surrogate pairs, which tokenizers don't."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _bare_ids(tok: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text as it stands, without what the tokenizer puts around it."""
    encoded = tok(texts, add_special_tokens=False)["input_ids"]
    return [list(map(int, ids)) for ids in encoded]


def leading_special_ids(tok: PreTrainedTokenizerBase, text: str = "a") -> list[int]:
    """Special tokens that the tokenizer puts in front of every text: ``[bos]``, or nothing.

    What it appends at the end (EOS) is not among them. They are told from the text's own tokens by tokenising
    it twice, since flags like ``add_bos_token`` exist for some tokenizers only and may not tell the truth.

    Args:
        text: any text that has tokens.

    Raises:
        ValueError: the text has no tokens, or its tokens are others when special tokens are around them.
    """
    bare = _bare_ids(tok, [text])[0]
    full = list(map(int, tok(text)["input_ids"]))
    if not bare:
        raise ValueError(f"text {text!r} has no tokens in {type(tok).__name__}: give a text that has some")
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    raise ValueError(
        f"{type(tok).__name__} tokenises {text!r} as {bare} without special tokens but as {full} with them, "
        "so the special tokens can't be told from the text: load another tokenizer for this model"
    )


def _continuation_alone(tok: PreTrainedTokenizerBase, continuation: str) -> list[int]:
    """Ids of a continuation that can't be read off the whole text."""
    alone = _bare_ids(tok, [continuation])[0]
    # A SentencePiece tokenizer puts a space of its own before any text, so that " Paris" becomes a lone space
    # and "_Paris": the lone one is no part of what a model would say next.
    stripped = _bare_ids(tok, [continuation.lstrip(" ")])[0]
    if len(alone) > 1 and alone[1:] == stripped:
        first = tok.convert_ids_to_tokens(stripped[0])
        if isinstance(first, str) and first.startswith(_METASPACE):
            return stripped
    return alone


def continuation_ids_batch(
    tok: PreTrainedTokenizerBase, prompts: Sequence[str], continuations: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """:func:`continuation_ids` of many pairs, with one call of the tokenizer for all of them.

    Raises:
        ValueError: the two sequences differ in length, or see :func:`leading_special_ids`.
    """
    if len(prompts) != len(continuations):
        raise ValueError(f"{len(prompts)} prompts but {len(continuations)} continuations: give one for each")
    if not prompts:
        return []
    unique_prompts = list(dict.fromkeys(prompts))
    prompt_ids = dict(zip(unique_prompts, _bare_ids(tok, unique_prompts), strict=True))
    whole_ids = _bare_ids(tok, [prompt + rest for prompt, rest in zip(prompts, continuations, strict=True)])
    front = leading_special_ids(tok)
    pairs = []
    for prompt, rest, whole in zip(prompts, continuations, whole_ids, strict=True):
        own = prompt_ids[prompt]
        beyond = whole[len(own) :] if whole[: len(own)] == own else _continuation_alone(tok, rest)
        pairs.append((front + own, beyond))
    return pairs


def continuation_ids(
    tok: PreTrainedTokenizerBase, prompt: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the text that follows it.

    The two strings are joined as they are: to continue with a word, give its leading space (``" Paris"``).
    The continuation's ids are those of the joined text beyond the ids of the prompt. Where a tokenizer merged
    across the seam, so that the prompt's ids are no prefix of the whole, the continuation is tokenised alone.
    Special tokens that the tokenizer appends at the end are in neither part, and BOS only in the prompt.

    Args:
        prompt: may be empty.
        continuation: may be empty; then it has no ids. Refusing that is the caller's, who knows the case.

    Returns:
        ``(prompt ids with the special tokens in front, continuation ids)``.

    Raises:
        ValueError: the tokenizer's special tokens can't be told from the text's.
    """
    return continuation_ids_batch(tok, [prompt], [continuation])[0]
