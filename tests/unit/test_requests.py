"""Edit requests: the subject's last token for every kind of tokenizer, and bad input that leaves the model alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import REQUESTS, tiny_hparams, tiny_model
from helpers.tokenizers import _tokenizer
from sphere_easyedit.editing.requests import (
    TokenizedPrompt,
    TokenizedRequest,
    parse_requests,
    tokenize_prompt,
    tokenize_request,
)

BYTE_LEVEL = ("bytes", "bytes-bos", "bytes-bos-eos", "bytes-prefix-space")
METASPACE = ("unigram-first", "unigram-always", "llama2")
KINDS = (*BYTE_LEVEL, *METASPACE, "wordpiece")


class SlowTokenizer:
    """What a tokenizer written in Python can do: all but offsets."""

    is_fast = False

    def __init__(self, fast: PreTrainedTokenizerBase) -> None:
        self._fast = fast

    def __call__(self, text: Any, add_special_tokens: bool = True, **options: Any) -> dict[str, Any]:
        if options.get("return_offsets_mapping"):
            raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers")
        return {"input_ids": self._fast(text, add_special_tokens=add_special_tokens)["input_ids"]}

    def decode(self, ids: Any, **options: Any) -> str:
        return self._fast.decode(ids, **options)

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        return self._fast.convert_ids_to_tokens(ids)


def _squeezed(text: str) -> str:
    return "".join(text.lower().replace("##", "").split())  # WordPiece forgets case and spaces


def _check_split(tok: PreTrainedTokenizerBase, found: TokenizedPrompt, upto: str, after: str) -> None:
    """The tokens to the lookup spell the text to the subject's end, and the others what follows."""
    def spelt(ids: tuple[int, ...]) -> str:
        return _squeezed(tok.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    end = found.lookup + 1
    assert (spelt(found.ids[:end]), spelt(found.ids[end:])) == (_squeezed(upto), _squeezed(after))


def _front(kind: str) -> int:
    """Number of special tokens in front."""
    return 0 if kind in ("bytes", "bytes-prefix-space") else 1


def _request(prompt: str, subject: str, target: str = "Rome", **fields: Any) -> dict[str, Any]:
    return {"prompt": prompt, "subject": subject, "target_new": target, **fields}


PLACES = [
    ("France has a capital, which is", "France", ""),  # at the start
    ("The capital of France is", "France", "The capital of "),
    ("Paris is the capital of France", "France", "Paris is the capital of "),  # at the end
    ("In France, the language of France is", "France", "In "),  # twice: the first mention
    ("jerome lives in rome, and rome is old", "rome", "jerome lives in "),  # the first mention as a word of its own
    ("romeo and jerome", "rome", ""),  # no mention as a word: the first
    ("{} plays for the team", "John Smith", ""),
    ("The team of {} is", "John Smith", "The team of "),
    ("The team of {}", "John Smith", "The team of "),
    ("In {code} the {set} of France is", "France", "In {code} the {set} of "),  # other braces stay
    ("In {code} the capital of {} is", "France", "In {code} the capital of "),
    ("{} or not {}", "John Smith", ""),
    ("(France), the land of", "France", "("),
    ("The mother tongue of Danielle Darrieux's sister is", "Danielle Darrieux", "The mother tongue of "),
    ("He was in Rome; she was", "Rome", "He was in "),
    ("He was in Rome. She was", "Rome.", "He was in "),
    ("Is it 1984? He said", "1984", "Is it "),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prompt", "subject", "before"), PLACES)
def test_lookup_is_the_subjects_last_token(kind: str, prompt: str, subject: str, before: str) -> None:
    tok = _tokenizer(kind)
    [request] = parse_requests([_request(prompt, subject)])
    text = prompt.replace("{}", subject)
    assert (request.before, request.prompt) == (before, text)
    found = tokenize_request(tok, request, ["He said that. {}", "{} (so he said)"], None)
    after = text[len(before + subject):]
    _check_split(tok, found.plain, before + subject, after)
    _check_split(tok, found.contexts[0], "He said that. " + before + subject, after)
    _check_split(tok, found.contexts[1], before + subject, after + " (so he said)")
    _check_split(tok, found.drift, subject, "")
    for ids in (found.plain.ids, found.contexts[0].ids, found.drift.ids):
        special = [token in tok.all_special_ids for token in ids]
        assert special == [True] * _front(kind) + [False] * (len(ids) - _front(kind))  # BOS is there, EOS is not


@pytest.mark.parametrize("kind", [*BYTE_LEVEL, "llama2"])
@pytest.mark.parametrize("subject", ["Zoë", "Renée Müller", "日本", "日本語の本", "John 😀", "👩‍🚀", "Пушкин", "n̈"])
@pytest.mark.parametrize(("before", "after"), [("", " was"), ("The friend of ", "'s cat"), ("In ", "、"), ("", "")])
def test_subjects_of_several_bytes(kind: str, subject: str, before: str, after: str) -> None:
    """A character may be several tokens: the last of them counts."""
    tok = _tokenizer(kind)
    found = tokenize_prompt(tok, before, subject, after)
    ids = tok(before + subject + after, add_special_tokens=False)["input_ids"]
    assert list(found.ids[_front(kind):]) == ids
    assert found.lookup > _front(kind)  # or the case would not tell the last token from the first
    _check_split(tok, found, before + subject, after)


def test_character_of_several_tokens() -> None:
    found = tokenize_prompt(_tokenizer("bytes"), "In ", "日", " he")
    assert (len(_tokenizer("bytes")("In 日")["input_ids"]), found.lookup) == (len(found.ids) - 1, len(found.ids) - 2)


@pytest.mark.parametrize(("before", "subject", "after"), [
    ("The capital of ", "Fran", "ce is"),  # "ance" holds the subject's end and more
    ("He was in ", "Rom", "e"), ("", "th", "e team"), ("In the ", "U.S", ".. of")])
def test_subject_that_merges_with_what_follows(before: str, subject: str, after: str) -> None:
    tok = _tokenizer("bytes")
    found = tokenize_prompt(tok, before, subject, after)
    upto = [len(tok.decode(list(found.ids[:count]))) for count in range(len(found.ids) + 1)]
    end = len(before + subject)
    assert upto[found.lookup] < end <= upto[found.lookup + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_spaces_around_the_subject(kind: str) -> None:
    tok = _tokenizer(kind)
    for subject in ("France ", " France", "France"):
        found = tokenize_prompt(tok, "The capital of", subject if subject[0] == " " else f" {subject}", "is")
        _check_split(tok, found, "The capital of France", "is")


_CHARACTERS = st.sampled_from("abeilnorstzABFR0189 .,'-()?éëüñ日本語のБи😀🚀")
_TEXTS = st.text(_CHARACTERS, max_size=12)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.parametrize("kind", KINDS)
@given(before=_TEXTS, subject=_TEXTS, after=_TEXTS)
def test_lookup_holds_the_subjects_last_character(kind: str, before: str, subject: str, after: str) -> None:
    assume(subject.strip())
    tok = _tokenizer(kind)
    found = tokenize_prompt(tok, before, subject, after)
    encoding = tok.backend_tokenizer.encode(before + subject + after)
    assert list(found.ids) == encoding.ids[: len(found.ids)]
    assert all(encoding.special_tokens_mask[len(found.ids):])
    last = len(before + subject.rstrip()) - 1  # index of the character
    start, stop = encoding.offsets[found.lookup]
    assert start <= last < stop
    assert not any(start <= last < stop for start, stop in encoding.offsets[found.lookup + 1 : len(found.ids)])


@pytest.mark.parametrize("kind", ["bytes", "bytes-bos", "bytes-bos-eos", "llama2"])
@pytest.mark.parametrize(("prompt", "subject", "before"), PLACES)
def test_slow_tokenizer_finds_the_same(kind: str, prompt: str, subject: str, before: str) -> None:
    fast = _tokenizer(kind)
    slow: Any = SlowTokenizer(fast)
    [request] = parse_requests([_request(prompt, subject)])
    contexts = ["He said that. {}"]
    assert tokenize_request(slow, request, contexts, 99) == tokenize_request(fast, request, contexts, 99)


@pytest.mark.parametrize("kind", KINDS)
def test_target_follows_the_prompt(kind: str) -> None:
    """Prompt and target together are the text's own tokens; neither BOS nor EOS is in the target."""
    tok = _tokenizer(kind)
    [request] = parse_requests([_request("The capital of {} is", "France", "in Rome")])
    found = tokenize_request(tok, request, [], None)
    whole = tok("The capital of France is in Rome", add_special_tokens=False)["input_ids"]
    assert list(found.plain.ids[_front(kind):] + found.target_ids) == whole
    assert _squeezed(tok.decode(list(found.target_ids))) == "inrome"
    [spaced] = parse_requests([_request("The capital of {} is", "France", " in Rome")])
    assert tokenize_request(tok, spaced, [], None).target_ids == found.target_ids


def test_case_ids_and_counterfacts_own_fields() -> None:
    raw = [_request("{} is", "A"), _request("{} is", "B", case_id=70), _request("{} is", "C", case_id="x")]
    raw[0]["target_new"] = {"str": "Rome", "id": "Q220"}
    parsed = parse_requests(raw, first_id=5)
    assert [request.case_id for request in parsed] == [5, 70, "x"]
    assert parsed[0].target == " Rome"


LONG = " ".join(["so"] * 200)
BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "empty batch": ([], "no requests given"),
    "subject not in prompt": ([_request("The capital of France is", "Spain", case_id=7)],
                              r"case_id 7\): subject 'Spain' is not in prompt 'The capital of France is'.*put \{\}"),
    "subject in another case": ([_request("The capital of France is", "france")], "subject 'france' is not in prompt"),
    "target without tokens": ([_request("The capital of France is", "France", "1984", case_id=7)],
                              "case_id 7: target ' 1984' has no tokens"),
    "prompt over the context": ([_request(f"{LONG} France", "France", case_id=7)],
                                r"case_id 7: prompt and target take \d{3,} tokens .* context holds 128; shorten"),
    "prompt over the context behind a template": ([_request("so " * 122 + "France", "France", case_id=7)],
                                                  "case_id 7: prompt and target take 1[34]. tokens"),
    "case_id twice": ([_request("{} is", "A", case_id=7), _request("{} is", "B", case_id=7)], "case_id 7 occurs twice"),
}
for _field in ("prompt", "subject", "target_new"):
    for _value in (None, "", "  ", 5, ["a"]):
        BAD[f"{_field} {_value!r}"] = ([{**_request("The capital of France is", "France", case_id=7), _field: _value}],
                                       rf"request 0 \(case_id 7\): {_field} is .*; a non-empty text is needed")
    BAD[f"{_field} missing"] = (
        [REQUESTS[1], {key: value for key, value in REQUESTS[0].items() if key != _field}],
        rf"request 1 \(case_id 1\): {_field} is None; a non-empty text is needed")


@pytest.fixture(scope="module")
def untouched() -> Callable[[], tuple[torch.nn.Module, bool]]:
    """One model for all bad input, and whether it is still, bit for bit, what it was."""
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    return lambda: (model, all(torch.equal(value, before[name]) for name, value in model.state_dict().items()))


@pytest.fixture(scope="module")
def stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stats")


@pytest.mark.parametrize(("case", "good_first"), [
    (case, good_first) for case, (requests, _) in BAD.items() for good_first in (False, True)
    if not good_first or len(requests) == 1])
def test_bad_input_leaves_the_model_alone(
    case: str, good_first: bool, untouched: Callable[[], tuple[torch.nn.Module, bool]], stats: Path
) -> None:
    requests, message = BAD[case]
    if good_first:
        requests = [REQUESTS[0], *requests]
        message = message.replace("request 0", "request 1")
    model, _ = untouched()
    with pytest.raises(ValueError, match=message):
        sphere.apply_sphere_to_model(model, _tokenizer("bytes-no-digits"), requests, tiny_hparams(stats))
    assert untouched()[1]
    session = sphere.EditSession.of(model)
    assert (session.num_edits, session.num_batches) == (0, 0)


def test_same_settings_edit_good_input(stats: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The counterpart of the refusals above: nothing but the input was at fault."""
    model = tiny_model("llama")
    before = model.model.layers[2].mlp.down_proj.weight.clone()
    with caplog.at_level(logging.WARNING, logger="sphere_easyedit"):
        sphere.apply_sphere_to_model(model, _tokenizer("bytes-no-digits"), REQUESTS, tiny_hparams(stats))
    assert not torch.equal(model.model.layers[2].mlp.down_proj.weight, before)
    assert sphere.EditSession.of(model).num_edits == 3
    assert not [record for record in caplog.records if "afresh" in record.getMessage()]


@pytest.mark.parametrize("contexts", [[], ["He said that. {}"]])
def test_context_limit_is_exact(tok: PreTrainedTokenizerBase, contexts: list[str]) -> None:
    [request] = parse_requests([REQUESTS[0]])
    template = (contexts or ["{}"])[0]
    needed = len(tok(template.format("The capital of France is Rome"))["input_ids"])
    assert isinstance(tokenize_request(tok, request, contexts, needed), TokenizedRequest)
    assert isinstance(tokenize_request(tok, request, contexts, None), TokenizedRequest)
    with pytest.raises(ValueError, match=f"take {needed} tokens .* holds {needed - 1}"):
        tokenize_request(tok, request, contexts, needed - 1)


@pytest.mark.parametrize(("before", "after"), [("", " is"), ("The year ", " is"), ("", "")])
def test_subject_without_tokens(before: str, after: str) -> None:
    """A subject of which the tokenizer leaves nothing has no last token, wherever it stands."""
    with pytest.raises(ValueError, match="subject '1984' has no token"):
        tokenize_prompt(_tokenizer("bytes-no-digits"), before, "1984", after)
