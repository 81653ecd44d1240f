"""Perplexity against one window at a time, and held-out text without WikiText's tokenisation."""

from __future__ import annotations

import copy
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.metric_records import AROUND, tokenizer
from helpers.models import tiny_model
from sphere_easyedit.evaluation.perplexity import Perplexity, detokenize_wikitext, held_out_texts, perplexity

TEXTS = ["The mother tongue of Danielle Darrieux is French, and that of many others is, too. " * 3,
         "Who is here?", "a", "The capital of Peru is Lima. It lies by the sea, in a desert."]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def slow(model: Any, tok: Any, front: list[int], texts: list[str], window: int) -> tuple[float, int]:
    """Mean negative log-likelihood and tokens scored: windows cut by hand, one model call each."""
    losses = []
    for text in texts:
        ids = tok(text, add_special_tokens=False).input_ids
        size = window - len(front)
        for start in range(0, len(ids), size):
            tokens = front + ids[start: start + size]
            with torch.no_grad():
                log_probs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
            losses += [-float(log_probs[place - 1, tokens[place]])
                       for place in range(max(1, len(front)), len(tokens))]
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize("kind", ["plain", "both"])
@pytest.mark.parametrize("window", [7, 20])
def test_equals_one_window_at_a_time(model: Any, kind: str, window: int) -> None:
    tok, front = tokenizer(kind), AROUND[kind][0]
    nll, tokens = slow(model, tok, front, TEXTS, window)
    seen: list[tuple[int, int]] = []
    found = perplexity(model, tok, TEXTS, window=window, progress=lambda *done: seen.append(done))
    assert (found.tokens, found.window) == (tokens, window)
    assert found.nll == pytest.approx(nll, abs=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert seen[-1][0] == seen[-1][1] == max(done for done, _ in seen)
    for budget in (1, 200, 8192):
        assert perplexity(model, tok, TEXTS, window=window, token_budget=budget).nll == pytest.approx(nll, abs=1e-5)
    # BOS puts each window's first token among those scored.
    own = [len(tok(text, add_special_tokens=False).input_ids) for text in TEXTS]
    assert tokens == (sum(own) if front else sum(own) - sum(-(-length // window) for length in own))


def test_uniform_predictions_have_the_vocabulary_size_as_perplexity(model: Any) -> None:
    blank = copy.deepcopy(model)
    with torch.no_grad():
        blank.lm_head.weight.zero_()
    found = perplexity(blank, tokenizer("plain"), TEXTS, window=16)
    assert found.perplexity == pytest.approx(1500, rel=1e-5)


def test_max_tokens_reads_the_beginning(model: Any) -> None:
    tok = tokenizer("bos")
    first = len(tok(TEXTS[0], add_special_tokens=False).input_ids)
    assert perplexity(model, tok, TEXTS, max_tokens=first) == perplexity(model, tok, TEXTS[:1])
    assert perplexity(model, tok, TEXTS, max_tokens=first + 2).tokens == first + 2
    assert perplexity(model, tok, TEXTS, max_tokens=10**9) == perplexity(model, tok, TEXTS)


def test_a_window_is_no_longer_than_the_context(model: Any) -> None:
    text = [TEXTS[0] * 6]
    assert perplexity(model, tokenizer("bos"), text).window == model.config.max_position_embeddings == 128


def test_overflow_is_infinite(model: Any) -> None:
    steep = copy.deepcopy(model)
    with torch.no_grad():
        steep.lm_head.weight.mul_(1e4)
    found = perplexity(steep, tokenizer("plain"), TEXTS, window=16)
    assert found.perplexity == math.inf and math.isfinite(found.nll)
    assert found.to_dict() == {"perplexity": None, "nll": found.nll, "tokens": found.tokens, "window": 16}
    with torch.no_grad():
        steep.lm_head.weight.fill_(torch.nan)
    lost = perplexity(steep, tokenizer("plain"), TEXTS, window=16)
    assert math.isnan(lost.nll) and math.isnan(lost.perplexity)
    json.dumps(lost.to_dict(), allow_nan=False)


def test_refused(model: Any) -> None:
    tok = tokenizer("bos")
    for arguments, message in (
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"token_budget": 0}, "token_budget is 0"),
        ({"window": 1}, "window is 1, including 1 special tokens: give at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            perplexity(model, tok, TEXTS, **arguments)
    for texts in ([], [""]):
        with pytest.raises(ValueError, match="no token to score"):
            perplexity(model, tok, texts)
    with pytest.raises(ValueError, match="no token to score"):
        perplexity(model, tokenizer("plain"), ["a"])


# --- held-out text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("written", "original"), [
    (" Robert is a film , television and theatre actor . ", "Robert is a film, television and theatre actor."),
    ("a two @-@ part episode , 1 @,@ 234 @.@ 5 m", "a two-part episode, 1,234.5 m"),
    (' as " Craig " in " Teddy \'s Story " ; he ', 'as "Craig" in "Teddy\'s Story"; he'),
    ("They don 't , we 're ( Wade : x ) , 5 % of $ 3", "They don't, we're (Wade: x), 5% of $3"),
    ("the actors ' roles", "the actors' roles"),
    (" = = Early life = = \n \n He was born .", "Early life\nHe was born."),
])
def test_wikitext_is_detokenized(written: str, original: str) -> None:
    assert detokenize_wikitext(written) == original


def test_articles_of_wikitext(tmp_path: Path) -> None:
    path = tmp_path / "wiki.txt"
    path.write_text(" \n = One = \n \n It has a cut @-@ off of x \n = 1 and y = \n 2 . \n = = Part = = \n \n More . \n"
                    " \n = Two = \n \n Text . \n", encoding="utf-8")
    assert held_out_texts(path) == ["One\nIt has a cut-off of x\n1 and y\n2.\nPart\nMore.", "Two\nText."]
    # Its training text has no empty lines.
    path.write_text(" = One = \n Text @-@ like . \n = Two = \n Text . \n", encoding="utf-8")
    assert held_out_texts(path) == ["One\nText-like.", "Two\nText."]


def test_other_text_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_text(" He said : \" so \" .\n\n = A = \n", encoding="utf-8")
    assert held_out_texts(path) == [" He said : \" so \" .\n\n = A = \n"]
    path = tmp_path / "own.jsonl"
    path.write_text('{"text": "one , two"}\n\n{"text": " "}\n{"text": "three"}\n', encoding="utf-8")
    assert held_out_texts(path) == ["one , two", "three"]


def test_held_out_text_is_refused_by_name(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.csv", b"x", "is not an existing .txt or .jsonl file"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text"),
        ("b.txt", b" \n", "contains no text"),
        ("a.jsonl", b'{"text": "x"}\n{"body": 1}\n', "line 2 is dict .*, expected an object with a string 'text'"),
        ("b.jsonl", b'{"text": 3}\n', "line 1 is dict .*, expected an object"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            held_out_texts(tmp_path / name)
    with pytest.raises(ValueError, match="is not an existing .txt or .jsonl file"):
        held_out_texts(tmp_path / "absent.txt")


def test_real_wikitext(data_dir: Path) -> None:
    texts = held_out_texts(data_dir / "wikitext_test.txt")
    assert len(texts) == 60 and texts[0].startswith("Robert Boulter\nRobert Boulter is an English film, television")
    whole = "\n".join(texts)
    assert not re.search(r" @[-,.]@ | [,.;:!?)](?:\s|$)|\( | = =", whole)
    assert isinstance(perplexity(tiny_model("llama"), tokenizer("plain"), texts, 300), Perplexity)
