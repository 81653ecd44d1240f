"""Fluency and consistency against values computed by hand, their properties, and the sources of references."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.metric_records import record_of, tokenizer
from helpers.models import tiny_model
from sphere_easyedit.datasets.loaders import EditRecord, load_records
from sphere_easyedit.evaluation.generation import generate_continuations
from sphere_easyedit.evaluation.references import References, load_references
from sphere_easyedit.evaluation.text_quality import (
    Decoding,
    TextQuality,
    fluency,
    measure_text_quality,
    n_gram_entropy,
    summarise_text_quality,
    words,
)

WORD_LISTS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "."]), max_size=40)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


# --- fluency ------------------------------------------------------------------------------------------------


def test_entropy_by_hand() -> None:
    # Pairs ab, ba, ab: 2/3 and 1/3. Triples aba, bab: a half each.
    h2 = -(2 / 3 * math.log2(2 / 3) + 1 / 3 * math.log2(1 / 3))
    assert n_gram_entropy(list("abab"), 2) == pytest.approx(h2)
    assert n_gram_entropy(list("abab"), 3) == pytest.approx(1.0)
    assert fluency("a b a b") == pytest.approx(100 * (2 / 3 * h2 + 4 / 3) / 2)
    # Nine words, all unlike: eight pairs are 3 bits, seven triples log2 7.
    assert fluency("one two three four five six seven eight nine") == pytest.approx(
        100 * (2 / 3 * 3 + 4 / 3 * math.log2(7)) / 2)
    assert fluency("so so so so so so") == 0.0
    assert fluency("") == fluency("one") == 0.0


@given(WORD_LISTS, st.integers(1, 4))
def test_entropy_is_that_of_a_distribution(tokens: list[str], n: int) -> None:
    found = n_gram_entropy(tokens, n)
    n_grams = [tuple(tokens[start: start + n]) for start in range(len(tokens) - n + 1)]
    assert -1e-12 <= found <= (math.log2(len(set(n_grams))) if n_grams else 0.0) + 1e-9
    assert (found < 1e-9) == (len(set(n_grams)) < 2)
    renamed = [word.upper() * 2 for word in tokens]
    assert n_gram_entropy(renamed, n) == pytest.approx(found)


@pytest.mark.parametrize(("text", "split"), [
    ("Ann's cat, isn't it?", ["Ann", "'s", "cat", ",", "is", "n't", "it", "?"]),
    ("They don\u2019t; we\u2019ll see.", ["They", "do", "n\u2019t", ";", "we", "\u2019ll", "see", "."]),
    ("A well-known 3.5-litre car at 10:30 (of 1,000)...", ["A", "well-known", "3.5-litre", "car", "at", "10:30", "(",
                                                          "of", "1,000", ")", "..."]),
    ('He said: "No -- never!"', ["He", "said", ":", '"', "No", "--", "never", "!", '"']),
    ("\u00c9cole n\u00b0 5\n\n\u6f22\u5b57", ["\u00c9cole", "n", "\u00b0", "5", "\u6f22\u5b57"]),
    ("  \n", []),
])
def test_words(text: str, split: list[str]) -> None:
    assert words(text) == split


@given(st.text(st.characters(codec="utf-8"), max_size=60))
def test_words_lose_nothing_but_space(text: str) -> None:
    assert "".join(words(text)) == "".join(text.split())


# --- measuring ----------------------------------------------------------------------------------------------


def test_records_are_measured_by_their_own_texts(model: Any) -> None:
    tok = tokenizer("bos")
    records = load_records("demo", None, 5)
    records[2] = replace(records[2], generation_prompts=())
    found = measure_text_quality(model, tok, records, decoding=Decoding(12))
    assert [one.case_id for one in found] == [record.case_id for record in records]
    for one, record in zip(found, records, strict=True):
        seeds = [(0, record.case_id, index) for index in range(len(record.generation_prompts))]
        continuations = generate_continuations(model, tok, record.generation_prompts, 12, 5, seeds)
        assert one.texts == tuple(a + b for a, b in zip(record.generation_prompts, continuations, strict=True))
        mean = sum(map(fluency, one.texts)) / len(one.texts) if one.texts else None
        assert one.fluency == (None if mean is None else pytest.approx(mean))
        assert (one.consistency, one.consistency_protocol) == (None, None)
        assert one.fluency_protocol == "top-5 seed 0, 12 new tokens; words by regex-treebank"
        assert TextQuality.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    summary = summarise_text_quality(found)
    values = [one.fluency for one in found if one.fluency is not None]
    assert summary["fluency"]["mean"] == pytest.approx(sum(values) / 4) and summary["fluency"]["n"] == 4
    assert summary["consistency"] == {"mean": None, "ci95": None, "n": 0}


def test_samples_depend_on_case_prompt_and_seed_alone(model: Any) -> None:
    tok = tokenizer("plain")
    twice = replace(load_records("demo", None, 1)[0], generation_prompts=("The mother", "The mother"))
    records = [*load_records("demo", None, 4)[1:], twice]
    found = measure_text_quality(model, tok, records, decoding=Decoding(12))
    assert found[3] == measure_text_quality(model, tok, [twice], decoding=Decoding(12))[0]
    assert found[3].texts[0] != found[3].texts[1]
    assert found[3].fluency_protocol == "top-5 seed 0, 12 new tokens; words by regex-treebank"
    other = measure_text_quality(model, tok, [twice], decoding=Decoding(12, seed=1, prompts=1))[0]
    assert len(other.texts) == 1 and other.texts[0] != found[3].texts[0]
    assert other.fluency_protocol.startswith("top-5 seed 1, 12 new tokens, first 1 prompts;")


def test_text_quality_refuses(model: Any) -> None:
    for arguments, message in (({"max_new_tokens": 0}, "max_new_tokens is 0"),
                               ({"prompts": 0}, "prompts is 0"), ({"seed": -1}, "seed is -1")):
        with pytest.raises(ValueError, match=message):
            Decoding(**arguments)
    with pytest.raises(ValueError, match="there are no texts"):
        summarise_text_quality([])
    one = TextQuality(1, "demo", 500.0, None, "greedy", None, ("a",))
    with pytest.raises(ValueError, match="several protocols"):
        summarise_text_quality([one, replace(one, fluency_protocol="top-5")])
    with pytest.raises(ValueError, match="not written by TextQuality"):
        TextQuality.from_dict({**one.to_dict(), "other": 1})
    with pytest.raises(ValueError, match="not written by TextQuality"):
        TextQuality.from_dict({})


# --- references ---------------------------------------------------------------------------------------------

VOCABULARY = {"honda": 0, "makes": 1, "cars": 2}
IDF = np.array([3.0, 1.0, 2.0])


def fact(case_id: int, subject: str, target: str) -> EditRecord:
    return replace(record_of(" is made by", target, case_id), subject=subject)


def rome_folder(folder: Path) -> Path:
    """A folder of ROME's files for `fact`s about a car and a bike; the third fact's target has no id."""
    rewrites = [("Porsche 911", "Honda", "Q1"), ("Ducati", "Fiat", "Q2"), ("Vespa", "BMW", None)]
    (folder / "counterfact.json").write_text(json.dumps([
        {"case_id": 70 + number,
         "requested_rewrite": {"prompt": "{} is made by", "relation_id": "P176", "subject": subject,
                               "target_new": {"str": target, "id": target_id}}}
        for number, (subject, target, target_id) in enumerate(rewrites)]))
    (folder / "attribute_snippets.json").write_text(json.dumps([
        {"relation_id": "P176", "target_id": "Q1", "samples": [{"name": "Civic", "text": "Honda makes Honda"},
                                                              {"name": "Jazz", "text": "cars"}]},
        {"relation_id": "P17", "target_id": "Q1", "samples": [{"name": "Other", "text": "of another relation"}]},
    ]))
    (folder / "tfidf_vocab.json").write_text(json.dumps(VOCABULARY))
    np.save(folder / "idf.npy", IDF)
    return folder


FACTS = [fact(1, "Porsche 911", "Honda"), fact(2, "Ducati", "Fiat"), fact(3, "Vespa", "BMW")]


def test_consistency_by_hand(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    references = load_references(rome_folder(tmp_path), FACTS)
    assert references.protocol == "rome"
    assert dict(references.texts) == {1: "Honda makes Honda cars"}
    # Counts times weights: the reference is (6, 1, 2), "honda cars" (3, 0, 2).
    cosine = (6 * 3 + 2 * 2) / math.sqrt(36 + 1 + 4) / math.sqrt(9 + 4)
    assert references.consistency(1, "Honda, cars!") == pytest.approx(100 * cosine)
    assert references.consistency(1, "Honda makes Honda cars") == pytest.approx(100.0)
    assert references.consistency(1, "nothing of that") == 0.0
    assert references.consistency(2, "Honda") is None


def test_references_from_a_corpus(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    path = tmp_path / "news.txt"
    path.write_text("Honda makes cars.\nHondas are many.\nFiat and Honda, too.\nThe sea is blue.\n", encoding="utf-8")
    references = load_references(path, FACTS)
    assert references.protocol == "corpus:news"
    assert dict(references.texts) == {1: "Honda makes cars. Fiat and Honda, too.", 2: "Fiat and Honda, too."}
    near, far = (references.consistency(2, text) or 0.0 for text in ("Fiat and Honda", "The sea"))
    assert near > far == 0.0


@pytest.fixture(scope="module")
def vectorizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("sklearn")
    return load_references(rome_folder(tmp_path_factory.mktemp("rome")), FACTS).vectorizer


@settings(deadline=None, max_examples=40)
@given(text=st.lists(st.sampled_from(["honda", "makes", "cars", "sea"]), max_size=8),
       reference=st.lists(st.sampled_from(["honda", "makes", "cars"]), min_size=1, max_size=8))
def test_consistency_is_a_cosine(vectorizer: Any, text: list[str], reference: list[str]) -> None:
    found = References("rome", {1: " ".join(reference)}, vectorizer).consistency(1, " ".join(text))
    back = References("rome", {1: " ".join(text)}, vectorizer).consistency(1, " ".join(reference))
    assert found is not None and 0 <= found <= 100
    assert back == pytest.approx(found)
    own, other = (np.array([drawn.count(word) for word in VOCABULARY]) * IDF for drawn in (text, reference))
    norms = float(np.linalg.norm(own) * np.linalg.norm(other))
    assert found == pytest.approx(100 * float(own @ other) / norms if norms else 0.0)


def test_consistency_of_records(model: Any, tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    records = [replace(record, generation_prompts=("Honda makes", "All the cars")) for record in FACTS]
    references = load_references(rome_folder(tmp_path), records)
    found = measure_text_quality(model, tokenizer("plain"), records, references, Decoding(3))
    assert found[0].consistency == references.consistency(1, " ".join(found[0].texts)) and found[0].consistency
    assert [one.consistency for one in found[1:]] == [None, None]
    assert {one.consistency_protocol for one in found} == {"rome"}
    assert summarise_text_quality(found)["consistency"]["n"] == 1


def test_references_refuse(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    folder = rome_folder(tmp_path)
    with pytest.raises(ValueError, match="reference texts for none of 2 records"):
        load_references(folder, FACTS[1:])
    np.save(folder / "idf.npy", np.ones(2))
    with pytest.raises(ValueError, match=r"shape \(2,\) and .*3 words"):
        load_references(folder, FACTS)
    np.save(folder / "idf.npy", np.array([print, 1, 2], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not an array that NumPy loads without pickle"):
        load_references(folder, FACTS)
    (folder / "attribute_snippets.json").write_text('[{"relation_id": "P1"}]')
    with pytest.raises(ValueError, match="entry 0 has no relation_id, target_id and samples"):
        load_references(folder, FACTS)
    (folder / "attribute_snippets.json").unlink()
    with pytest.raises(ValueError, match=r"attribute_snippets.json does not exist .*ROME's reference texts"):
        load_references(folder, FACTS)
    (folder / "counterfact.json").write_text('[{"case_id": 1}]')
    with pytest.raises(ValueError, match="record 0 is not in CounterFact's format"):
        load_references(folder, FACTS)
    (folder / "counterfact.json").write_text("{}")
    with pytest.raises(ValueError, match="found dict .* expected a list"):
        load_references(folder, FACTS)
    (folder / "signs.txt").write_text("! ? .")
    with pytest.raises(ValueError, match="no vocabulary can be fitted"):
        load_references(folder / "signs.txt", [fact(1, "A", "!")])
