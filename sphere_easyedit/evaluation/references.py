"""Reference texts for consistency: what a text about the subject would say if the edit were true.

Consistency is the cosine of TF-IDF vectors. Where reference texts and vocabulary come from is the **protocol**:

``rome``
    ROME's: Wikipedia texts about things that have the edit's new property (``attribute_snippets.json``), with the
    published vocabulary and weights (``tfidf_vocab.json``, ``idf.npy``).
``rome-fitted``
    The same texts, the vocabulary fitted to all of them, as ROME's code does where the two files can't be had.
``corpus:NAME``
    Paragraphs of any text that name the edit's new target, the vocabulary fitted to all paragraphs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .datasets import EditRecord
from .json_records import parse_json
from .perplexity import held_out_texts

_SNIPPETS, _VOCABULARY, _WEIGHTS, _FACTS = "attribute_snippets.json", "tfidf_vocab.json", "idf.npy", "counterfact.json"


@dataclass(frozen=True)
class References:
    """Reference texts of cases.

    Attributes:
        protocol: where texts and vocabulary come from, see the module docstring.
        texts: by case_id; cases without any are left out.
        vectorizer: scikit-learn's ``TfidfVectorizer``, fitted.
    """

    protocol: str
    texts: Mapping[int, str]
    vectorizer: Any

    def consistency(self, case_id: int, text: str) -> float | None:
        """Cosine of a text with the case's references, times 100: 0 to 100; None where the case has none.

        A text without any word of the vocabulary is at 0.
        """
        if case_id not in self.texts:
            return None
        vectors = self.vectorizer.transform([text, self.texts[case_id]])  # (2, vocabulary), of length 1 or 0
        return min(100.0, 100 * float((vectors @ vectors.T).toarray()[0, 1]))


def load_references(path: Path | str, records: Sequence[EditRecord], facts: Path | str | None = None) -> References:
    """References of the records, from a folder of ROME's files or from a .txt or .jsonl corpus.

    Args:
        path: a folder with ``attribute_snippets.json`` and perhaps ``idf.npy`` and ``tfidf_vocab.json``; or a file.
        facts: with a folder, the CounterFact file that tells relation and target ids of the records (matched by
            prompt, subject and new target); None for ``counterfact.json`` in the folder.

    Raises:
        ImportError: scikit-learn is not there.
        ValueError: a file is missing or not of its form, or no record has references.
    """
    path = Path(path)
    if path.is_dir():
        protocol, texts, vectorizer = _from_rome(path, records, path / _FACTS if facts is None else Path(facts))
    else:
        protocol, texts, vectorizer = _from_corpus(path, records)
    if not texts:
        raise ValueError(f"{path} has reference texts of none of {len(records)} records: give other texts, or measure "
                         "no consistency")
    return References(protocol, texts, vectorizer)


def _from_rome(folder: Path, records: Sequence[EditRecord], facts: Path) -> tuple[str, dict[int, str], Any]:
    ids = _ids(facts)
    of_record = {record.case_id: ids.get((record.prompt, record.subject, record.target_new)) for record in records}
    wanted = set(of_record.values())
    found: dict[tuple[str, str], list[str]] = {}
    everything: list[str] = []
    fitted = not (folder / _VOCABULARY).exists() or not (folder / _WEIGHTS).exists()
    for key, texts in _snippets(folder / _SNIPPETS):
        if key in wanted:
            found.setdefault(key, []).extend(texts)
        if fitted:
            everything += texts
    joined = {case_id: " ".join(found[key]) for case_id, key in of_record.items() if key is not None and key in found}
    if fitted:
        return "rome-fitted", joined, _fitted(everything, folder / _SNIPPETS)
    return "rome", joined, _published(folder / _VOCABULARY, folder / _WEIGHTS)


def _ids(facts: Path) -> dict[tuple[str, str, str], tuple[str, str]]:
    """Relation and new target's id, by template, subject and new target."""
    ids = {}
    for number, entry in enumerate(_json(facts, "relation and target ids of the records (facts)")):
        try:
            rewrite = entry["requested_rewrite"]
            key = rewrite["prompt"], rewrite["subject"], rewrite["target_new"]["str"].strip()
            relation, target = rewrite["relation_id"], rewrite["target_new"].get("id")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{facts}: record {number} is not of CounterFact's form ({error!r})") from error
        if relation is not None and target is not None:
            ids[key] = relation, target
    return ids


def _snippets(path: Path) -> Iterator[tuple[tuple[str, str], list[str]]]:
    for number, entry in enumerate(_json(path, "ROME's reference texts")):
        try:
            yield (entry["relation_id"], entry["target_id"]), [str(sample["text"]) for sample in entry["samples"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: entry {number} has no relation_id, target_id and samples with text ({error!r})"
                             ) from error


def _from_corpus(path: Path, records: Sequence[EditRecord]) -> tuple[str, dict[int, str], Any]:
    paragraphs = [line for text in held_out_texts(path) for line in text.splitlines() if line.strip()]
    about = {}
    for target in {record.target_new for record in records}:
        named = re.compile(rf"(?<!\w){re.escape(target)}(?!\w)")
        about[target] = " ".join(text for text in paragraphs if target in text and named.search(text))
    texts = {record.case_id: about[record.target_new] for record in records if about[record.target_new]}
    return f"corpus:{path.stem}", texts, _fitted(paragraphs, path)


def _fitted(texts: Sequence[str], source: Path) -> Any:
    try:
        return _vectorizer_class()().fit(texts)
    except ValueError as error:
        raise ValueError(f"{source} makes no vocabulary ({error}): give texts with words") from error


def _published(vocabulary: Path, weights: Path) -> Any:
    words: Any = _json(vocabulary, "the vocabulary's words and their numbers", dict)
    try:
        idf = np.load(weights, allow_pickle=False)
    except Exception as error:  # NumPy's headers fail in more ways than can be listed
        raise ValueError(f"{weights} is no array that NumPy loads without pickle ({error})") from error
    if idf.shape != (len(words),) or sorted(words.values()) != list(range(len(words))) or not np.isfinite(idf).all():
        raise ValueError(f"{weights} has the shape {idf.shape} and {vocabulary} has {len(words)} words: give the two "
                         "that belong together, a finite weight for each of the numbers from 0 on")
    vectorizer = _vectorizer_class()(vocabulary=words)
    vectorizer.idf_ = idf
    return vectorizer


def _vectorizer_class() -> Any:
    try:
        return importlib.import_module("sklearn.feature_extraction.text").TfidfVectorizer
    except ImportError as error:
        raise ImportError("consistency needs scikit-learn: pip install scikit-learn, or measure no consistency"
                          ) from error


def _json(path: Path, what: str, kind: type = list) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} does not exist; it should hold {what}")
    try:
        found = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no UTF-8
        raise ValueError(f"{path} is no valid JSON ({error})") from error
    if not isinstance(found, kind):
        raise ValueError(f"{path} holds a {type(found).__name__} where a {kind.__name__} is needed")
    return found
