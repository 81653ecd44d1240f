"""Parses, checks and tokenizes edit requests."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from numbers import Number
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..models.tokenization import continuation_ids, is_unicode

_EXPECTED = "dicts (or dataclass instances) with prompt, subject and target_new"
_ESSENCE_SUFFIX = " is a"  # ROME's drift prompt "{subject} is a", whose next-token distribution the KL term preserves


@dataclass(frozen=True)
class EditRequest:
    """A fact to edit: the prompt, split at the subject, and the target, which begins with a space as in EasyEdit."""

    case_id: int | str
    before: str
    subject: str
    after: str
    target: str

    @property
    def prompt(self) -> str:
        """The prompt with the subject filled in."""
        return self.before + self.subject + self.after


@dataclass(frozen=True)
class TokenizedPrompt:
    """Token ids of a prompt and the index of the subject's last token among them."""

    ids: tuple[int, ...]
    lookup: int


@dataclass(frozen=True)
class TokenizedRequest:
    """An edit request in tokens.

    Attributes:
        request: the parsed request.
        plain: the prompt without context.
        contexts: the prompt in each context template.
        drift: "{subject} is a" up to the subject's last token, since later tokens can't affect that position.
        target_ids: tokens of the target after the plain prompt.
    """

    request: EditRequest
    plain: TokenizedPrompt
    contexts: tuple[TokenizedPrompt, ...]
    drift: TokenizedPrompt
    target_ids: tuple[int, ...]


def request_dicts(requests: object) -> list[dict[str, Any]]:
    """Edit requests as EasyEdit's dicts.

    Args:
        requests: any iterable, read once, of mappings or dataclass instances.

    Returns:
        A dict for each request, with all of its fields. A ``case_id`` is an int, a str or None.

    Raises:
        ValueError: it is not such an iterable, is empty, or a case_id is neither an integer nor a string.
    """
    if isinstance(requests, Mapping) or _is_record(requests):
        raise ValueError(f"requests is a single {type(requests).__name__}: wrap it in a list")
    if isinstance(requests, str | bytes) or not isinstance(requests, Iterable):
        raise ValueError(f"requests must be a list of {_EXPECTED}, not {type(requests).__name__}")
    dicts = [_request_dict(raw, position) for position, raw in enumerate(requests)]
    if not dicts:
        raise ValueError(f"no requests given: pass a list of {_EXPECTED}, one at least")
    return dicts


def _is_record(raw: object) -> bool:
    return is_dataclass(raw) and not isinstance(raw, type)


def _request_dict(raw: object, position: int) -> dict[str, Any]:
    if isinstance(raw, Mapping):
        request = dict(raw)
    elif _is_record(raw):
        request = {field.name: getattr(raw, field.name) for field in fields(raw)}  # type: ignore[arg-type]
    else:
        raise ValueError(f"requests must be a list of {_EXPECTED}, but request {position} is "
                         f"{textwrap.shorten(repr(raw), 80)} of type {type(raw).__name__}")
    if request.get("case_id") is not None:
        request["case_id"] = _case_id(request["case_id"], position)
    return request


def _case_id(given: object, position: int) -> int | str:
    """A case_id as an int or a str, from a string or an integer of any type (also a NumPy or torch scalar)."""
    value = given.item() if hasattr(given, "item") and getattr(given, "ndim", None) == 0 else given
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Number) and not isinstance(value, bool | complex):
        with suppress(ValueError, OverflowError, TypeError):  # NaN, infinity, complex types
            whole = int(value)  # type: ignore[call-overload]
            if whole == value:
                return int(whole)
    raise ValueError(f"request {position}: case_id {given!r} of type {type(given).__name__} is neither a whole number "
                     "nor a text")


def parse_requests(requests: Iterable[Any], first_id: int = 0) -> list[EditRequest]:
    """Check EasyEdit's request dicts.

    Args:
        requests: mappings or dataclass instances with ``prompt`` (holding the subject, or ``{}`` in its place),
            ``subject``, ``target_new`` and optionally ``case_id``.
        first_id: requests without a ``case_id`` are numbered from here.

    Raises:
        ValueError: a field is missing or empty, the subject is not in the prompt, or a case_id occurs twice; see also
            ``request_dicts``.
    """
    dicts = request_dicts(requests)
    given = [raw.get("case_id") for raw in dicts]
    taken = set(given)
    free = (number for number in itertools.count(first_id) if number not in taken)
    parsed = [_parse_request(raw, position, next(free) if case_id is None else case_id)
              for position, (raw, case_id) in enumerate(zip(dicts, given, strict=True))]
    seen: set[int | str] = set()
    for request in parsed:
        if request.case_id in seen:
            raise ValueError(f"case_id {request.case_id!r} occurs twice in one batch: give each edit its own")
        seen.add(request.case_id)
    return parsed


def _parse_request(raw: Mapping[str, Any], position: int, case_id: int | str) -> EditRequest:
    where = f"request {position} (case_id {case_id!r})"
    texts = {}
    for field in ("prompt", "subject", "target_new"):
        value = raw.get(field)
        if isinstance(value, Mapping):  # CounterFact's own records hold {"str": ..., "id": ...}
            value = value.get("str")
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: {field} is {value!r}; a non-empty text is needed")
        if not is_unicode(value):
            raise ValueError(f"{where}: {field} is {value!r}, which holds half a surrogate pair and so is not text: "
                             "write the whole character")
        texts[field] = str(value)
    before, after = _split_at_subject(texts["prompt"], texts["subject"], where)
    target = texts["target_new"]
    return EditRequest(case_id, before, texts["subject"], after, target if target[0] == " " else f" {target}")


def _split_at_subject(prompt: str, subject: str, where: str) -> tuple[str, str]:
    """Text before and after the subject: its first occurrence as a whole word, else its first occurrence."""
    if "{}" in prompt:
        before, _, after = prompt.partition("{}")
        return before, after.replace("{}", subject)
    starts = [i for i in range(len(prompt)) if prompt.startswith(subject, i)]
    if not starts:
        raise ValueError(f"{where}: subject {subject!r} is not in prompt {prompt!r}; write it there literally, "
                         "or put {} there instead")
    # "Rome" in "Jerome" counts only if there is no whole word.
    whole = [i for i in starts if _is_whole_word(prompt, i, i + len(subject))]
    start = (whole or starts)[0]
    return prompt[:start], prompt[start + len(subject):]


def _is_whole_word(text: str, start: int, end: int) -> bool:
    glued_left = start > 0 and text[start - 1].isalnum() and text[start].isalnum()
    glued_right = end < len(text) and text[end].isalnum() and text[end - 1].isalnum()
    return not (glued_left or glued_right)


def tokenize_prompt(tok: PreTrainedTokenizerBase, before: str, subject: str, after: str) -> TokenizedPrompt:
    """Tokenize ``before + subject + after`` (with BOS if the tokenizer adds one) and find the subject's last token.

    The lookup is the last token that contains a part of the subject, by the tokenizer's character offsets: correct with
    and without BOS or prefix spaces, and where one token contains the subject's end and what follows.
    """
    text = before + subject + after
    end = len(before) + len(subject.rstrip())
    if tok.is_fast:
        encoded = tok(text, return_offsets_mapping=True, return_special_tokens_mask=True)
        ids, special = list(encoded["input_ids"]), list(encoded["special_tokens_mask"])
        while ids and special[len(ids) - 1]:  # an appended EOS would separate the prompt from its target
            ids.pop()
        covering = [i for i, (start, stop) in enumerate(encoded["offset_mapping"][: len(ids)])
                    if start < end and stop > max(start, len(before)) and not special[i]]
    else:  # without offsets: the number of tokens of the text up to the subject's end
        ids, _ = continuation_ids(tok, text, "")
        upto, _ = continuation_ids(tok, text[:end], "")
        covering = [min(len(upto), len(ids)) - 1] if upto and ids else []
    if not covering or covering[-1] < 0:
        raise ValueError(f"subject {subject!r} has no token in {text!r} with this tokenizer: give another subject")
    return TokenizedPrompt(tuple(ids), covering[-1])


def tokenize_request(
    tok: PreTrainedTokenizerBase, request: EditRequest, contexts: Sequence[str], max_positions: int | None
) -> TokenizedRequest:
    """Tokenize a request with its context templates.

    Args:
        tok: the model's tokenizer.
        request: the edit.
        contexts: templates with one ``{}`` for the prompt.
        max_positions: the model's context length, None for unlimited.

    Raises:
        ValueError: the target has no tokens, or a prompt with its target exceeds the model's context.
    """
    where = f"case_id {request.case_id!r}"
    _, target_ids = continuation_ids(tok, request.prompt, request.target)
    if not target_ids or not str(tok.decode(target_ids)).strip():
        raise ValueError(f"{where}: target {request.target!r} has no tokens after {request.prompt!r}: give another "
                         "target")
    plain = tokenize_prompt(tok, request.before, request.subject, request.after)
    filled = []
    for template in contexts:
        left, _, right = template.partition("{}")
        filled.append(tokenize_prompt(tok, left + request.before, request.subject, request.after + right))
    drift = tokenize_prompt(tok, "", request.subject, _ESSENCE_SUFFIX)
    longest = max(len(prompt.ids) for prompt in (plain, *filled)) + len(target_ids)
    if max_positions is not None and longest > max_positions:
        raise ValueError(f"{where}: prompt and target take {longest} tokens with the longest context template, "
                         f"the model's context holds {max_positions}; shorten the prompt")
    return TokenizedRequest(
        request, plain, tuple(filled), TokenizedPrompt(drift.ids[: drift.lookup + 1], drift.lookup), tuple(target_ids)
    )
