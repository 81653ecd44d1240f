"""Splits a prompt and its continuation into token ids, for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# SentencePiece's marker of a space before a word; byte-level vocabularies use another.
_METASPACE = "\u2581"


def is_unicode(text: str) -> bool:
    """Whether a text is valid Unicode: JSON and Python accept lone surrogates, which tokenizers do not."""
    return text.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in text)


def _plain_ids(tok: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of each text without special tokens."""
    encoded = tok(texts, add_special_tokens=False)["input_ids"]
    return [list(map(int, ids)) for ids in encoded]


def leading_special_ids(tok: PreTrainedTokenizerBase, text: str = "a") -> list[int]:
    """Special tokens that the tokenizer puts before every text: ``[bos]``, or nothing.

    They are found by tokenising a text with and without special tokens, since flags such as ``add_bos_token`` exist for
    some tokenizers only and may be wrong. Special tokens at the end (EOS) are not included.

    Args:
        text: any text that has tokens.

    Raises:
        ValueError: the text has no tokens, or special tokens change how it is tokenised.
    """
    plain = _plain_ids(tok, [text])[0]
    full = list(map(int, tok(text)["input_ids"]))
    if not plain:
        raise ValueError(f"text {text!r} has no tokens in {type(tok).__name__}: give a text that has some")
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start]
    raise ValueError(
        f"{type(tok).__name__} tokenises {text!r} as {plain} without special tokens but as {full} with them, "
        "so its special tokens can't be separated from the text: load another tokenizer for this model"
    )


def _continuation_alone(tok: PreTrainedTokenizerBase, continuation: str) -> list[int]:
    """Ids of a continuation tokenised by itself."""
    alone = _plain_ids(tok, [continuation])[0]
    # SentencePiece tokenizers prepend a space to any text, so that " Paris" becomes a lone space token and "_Paris";
    # after a prompt a model would generate "_Paris" alone.
    stripped = _plain_ids(tok, [continuation.lstrip(" ")])[0]
    if len(alone) > 1 and alone[1:] == stripped:
        first = tok.convert_ids_to_tokens(stripped[0])
        if isinstance(first, str) and first.startswith(_METASPACE):
            return stripped
    return alone


def continuation_ids_batch(
    tok: PreTrainedTokenizerBase, prompts: Sequence[str], continuations: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """:func:`continuation_ids` of many pairs, in batched calls of the tokenizer.

    Raises:
        ValueError: the two sequences differ in length, or see :func:`leading_special_ids`.
    """
    if len(prompts) != len(continuations):
        raise ValueError(f"{len(prompts)} prompts but {len(continuations)} continuations: give one for each prompt")
    if not prompts:
        return []
    unique_prompts = list(dict.fromkeys(prompts))
    prompt_ids = dict(zip(unique_prompts, _plain_ids(tok, unique_prompts), strict=True))
    whole_ids = _plain_ids(tok, [prompt + rest for prompt, rest in zip(prompts, continuations, strict=True)])
    front = leading_special_ids(tok)
    pairs = []
    for prompt, rest, whole in zip(prompts, continuations, whole_ids, strict=True):
        own = prompt_ids[prompt]
        following = whole[len(own) :] if whole[: len(own)] == own else _continuation_alone(tok, rest)
        pairs.append((front + own, following))
    return pairs


def continuation_ids(
    tok: PreTrainedTokenizerBase, prompt: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the text that follows it.

    The two strings are concatenated unchanged: to continue with a word, give its leading space (``" Paris"``). The
    continuation's ids are those of the joined text after the ids of the prompt. If the tokenizer merged across the
    boundary, so that the prompt's ids are not a prefix of the whole, the continuation is tokenised alone. BOS is in the
    prompt only; special tokens at the end are in neither part.

    Args:
        prompt: may be empty.
        continuation: may be empty; then it has no ids.

    Returns:
        ``(prompt ids with the special tokens in front, continuation ids)``.

    Raises:
        ValueError: the tokenizer's special tokens can't be separated from the text's.
    """
    return continuation_ids_batch(tok, [prompt], [continuation])[0]
