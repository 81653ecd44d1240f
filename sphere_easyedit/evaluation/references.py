"""Reference texts for consistency: texts about things that have the property which an edit gives its subject.

Consistency is the cosine of TF-IDF vectors. The **protocol** names the source of reference texts and vocabulary:

``rome``
    ROME's: Wikipedia texts about things with the edit's new property (``attribute_snippets.json``), with the published
    vocabulary and weights (``tfidf_vocab.json``, ``idf.npy``).
``corpus:NAME``
    Paragraphs of any text that contain the edit's new target, with a vocabulary fitted to all paragraphs.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.json_records import parse_json, read_list, read_text, shown
from ..datasets.loaders import EditRecord
from .perplexity import held_out_texts

_SNIPPETS, _VOCABULARY, _WEIGHTS, _FACTS = "attribute_snippets.json", "tfidf_vocab.json", "idf.npy", "counterfact.json"


@dataclass(frozen=True)
class References:
    """Reference texts of cases.

    Attributes:
        protocol: the source of texts and vocabulary, see the module's docstring.
        texts: by case_id, for cases that have any.
        vectorizer: a fitted ``TfidfVectorizer`` of scikit-learn.
    """

    protocol: str
    texts: Mapping[int, str]
    vectorizer: Any

    def consistency(self, case_id: int, text: str) -> float | None:
        """Cosine of a text with the case's references, 0 to 100; None if the case has none.

        A text without any word of the vocabulary scores 0.
        """
        if case_id not in self.texts:
            return None
        vectors = self.vectorizer.transform([text, self.texts[case_id]])  # (2, vocabulary), of length 1 or 0
        return min(100.0, 100 * float((vectors @ vectors.T).toarray()[0, 1]))


def load_references(path: Path | str, records: Sequence[EditRecord]) -> References:
    """Load references for the records, from a folder of ROME's files or from a .txt or .jsonl corpus.

    Args:
        path: a file; or a folder with ``attribute_snippets.json``, ``counterfact.json`` (relation and target ids of the
            records, matched by prompt, subject and new target), ``idf.npy`` and ``tfidf_vocab.json``.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: a file is missing or has the wrong format, or no record has references.
    """
    path = Path(path)
    if path.is_dir():
        protocol, texts, vectorizer = "rome", *_from_rome(path, records)
    else:
        protocol, texts, vectorizer = _from_corpus(path, records)
    if not texts:
        raise ValueError(f"{path} has reference texts for none of {len(records)} records: give other texts, or leave "
                         "consistency out")
    return References(protocol, texts, vectorizer)


def _from_rome(folder: Path, records: Sequence[EditRecord]) -> tuple[dict[int, str], Any]:
    ids = _ids(folder / _FACTS)
    of_record = {record.case_id: ids.get((record.prompt, record.subject, record.target_new)) for record in records}
    wanted = set(of_record.values())
    found: dict[tuple[str, str], list[str]] = {}
    for key, texts in _snippets(folder / _SNIPPETS):
        if key in wanted:
            found.setdefault(key, []).extend(texts)
    joined = {case_id: " ".join(found[key]) for case_id, key in of_record.items() if key is not None and key in found}
    return joined, _published(folder / _VOCABULARY, folder / _WEIGHTS)


def _ids(facts: Path) -> dict[tuple[str, str, str], tuple[str, str]]:
    """Relation id and target id, by prompt, subject and new target."""
    ids = {}
    for number, entry in enumerate(read_list(facts, "the records' relation and target ids")):
        try:
            rewrite = entry["requested_rewrite"]
            key = rewrite["prompt"], rewrite["subject"], rewrite["target_new"]["str"].strip()
            relation, target = rewrite["relation_id"], rewrite["target_new"].get("id")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{facts}: record {number} is not in CounterFact's format ({error!r}): get the file again"
                             ) from error
        if relation is not None and target is not None:
            ids[key] = relation, target
    return ids


def _snippets(path: Path) -> Iterator[tuple[tuple[str, str], list[str]]]:
    for number, entry in enumerate(read_list(path, "ROME's reference texts")):
        try:
            yield (entry["relation_id"], entry["target_id"]), [str(sample["text"]) for sample in entry["samples"]]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: entry {number} has no relation_id, target_id and samples with text ({error!r}): "
                             "get the file again") from error


def _from_corpus(path: Path, records: Sequence[EditRecord]) -> tuple[str, dict[int, str], Any]:
    paragraphs = [line for text in held_out_texts(path) for line in text.splitlines() if line.strip()]
    by_target = {}
    for target in {record.target_new for record in records}:
        mention = re.compile(rf"(?<!\w){re.escape(target)}(?!\w)")
        by_target[target] = " ".join(text for text in paragraphs if target in text and mention.search(text))
    texts = {record.case_id: by_target[record.target_new] for record in records if by_target[record.target_new]}
    return f"corpus:{path.stem}", texts, _fitted(paragraphs, path)


def _fitted(texts: Sequence[str], source: Path) -> Any:
    try:
        return _vectorizer_class()().fit(texts)
    except ValueError as error:
        raise ValueError(f"no vocabulary can be fitted to {source} ({error}): give texts with words") from error


def _published(vocabulary: Path, weights: Path) -> Any:
    text = read_text(vocabulary, "the vocabulary")
    try:
        words = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{vocabulary} is not valid JSON ({error}): get the file again") from error
    if not isinstance(words, dict):
        raise ValueError(f"{vocabulary}: found {shown(words)}, expected an object with each word's index")
    try:
        idf = np.load(weights, allow_pickle=False)
    except Exception as error:  # a damaged header raises errors of many types
        raise ValueError(f"{weights} is not an array that NumPy loads without pickle ({error}): get the file again"
                         ) from error
    if idf.shape != (len(words),) or sorted(words.values()) != list(range(len(words))) or not np.isfinite(idf).all():
        raise ValueError(f"{weights} has the shape {idf.shape} and {vocabulary} has {len(words)} words: give two files "
                         "that match, with a finite weight for each index from 0")
    vectorizer = _vectorizer_class()(vocabulary=words)
    vectorizer.idf_ = idf
    return vectorizer


def _vectorizer_class() -> Any:
    try:
        return importlib.import_module("sklearn.feature_extraction.text").TfidfVectorizer
    except ImportError as error:
        raise ImportError("consistency needs scikit-learn: pip install scikit-learn, or leave consistency out"
                          ) from error
