"""Prompts and metrics of the SPHERE paper's four general abilities: GSM8K, RTE, BoolQ and Natural Questions.

=====================  =============================================  ===============================================
task                   prompt                                         metrics, the main one first
=====================  =============================================  ===============================================
``gsm8k``              ``Question: ...\\nAnswer:``                     ``exact_match``: the answer's last number is
                                                                      the gold one
``rte``                premise, ``Question: hypothesis True or        ``acc``: the more likely of `` True`` and
                       False?\\nAnswer:``                              `` False`` is right; ``f1``
``boolq``              passage, ``Question: ...?\\nAnswer:``           ``acc``: the more likely of `` no`` and
                                                                      `` yes`` is right; ``f1``
``natural_questions``  ``Answer these questions:``, ``Q: ...\\nA:``    ``exact_match`` with any gold answer, ``f1``
                                                                      over words, ``contains``: the answer contains
                                                                      a gold one
=====================  =============================================  ===============================================

The prompts are those of lm-evaluation-harness's tasks of similar names. Generation is greedy and ends at a stop
sequence, at an end token or after a maximum number of new tokens (:class:`AbilityTask`). The authors' harness has other
prompts: GSM8K's contains the gold rationale up to the final number, and Natural Questions' a passage with the answer.
Here the model has to reason and to recall, so scores are not comparable with the paper's.

* **GSM8K.** Answers are compared as numbers (18, 18.00 and $18 are equal), as by lm-eval's flexible-extract.
* **RTE and BoolQ.** F1 is the mean of both classes' F1, weighted by the gold classes' frequencies, as in the authors'
  code. A small model may give nearly all records the same answer, and accuracy then shows only the classes'
  frequencies.
* **Natural Questions** are normalised as in SQuAD: lower case, no punctuation, no articles, single spaces. A model
  that answers in whole sentences has an exact match of nearly 0; ``contains`` (the authors' criterion) still finds a
  correct answer.
"""

from __future__ import annotations

import os
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Literal

from ...datasets.json_records import RawRecord, json_lines, read_text, shown

Record = dict[str, Any]
Aggregation = Callable[[Sequence[Any]], float] | Literal["mean"]

# A hyphen after a digit, a letter or a bracket is an operator or a dash, not a minus sign.
_NUMBER: Final = r"(?:(?<![\w)])-\$?|\$-?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_ANY_NUMBER: Final = re.compile(_NUMBER)
_MARKED_NUMBER: Final = re.compile(rf"####\s*({_NUMBER})")
_ARTICLES: Final = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class AbilityTask:
    """Prompt and metrics of one task.

    Attributes:
        name: of the task, and of its file, ``<name>.jsonl``.
        read: checks a record of that file and returns the fields that the functions below use.
        prompt: the question, without preamble and examples.
        answer: the gold answer, or the index of the right choice; of several answers examples show the first.
        score: one record's scores by metric, from the generated answer or from the log-probability of each choice.
        metrics: how the scores of all records are aggregated, by metric, the main one first.
        choices: the choices, compared by likelihood; () if the model generates an answer.
        preamble: text before examples and question.
        between: text between examples, and between the last one and the question.
        stops: stop sequences; a generated answer ends before the first of them.
        max_new_tokens: maximum length of a generated answer.
    """

    name: str
    read: Callable[[RawRecord], Record]
    prompt: Callable[[Record], str]
    answer: Callable[[Record], int | str | list[str]]
    score: Callable[[Record, Any], dict[str, Any]]
    metrics: Mapping[str, Aggregation]
    choices: tuple[str, ...] = ()
    preamble: str = ""
    between: str = "\n\n"
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 0

    def records(self, folder: Path) -> list[Record]:
        """Read all records of the task's file in a folder.

        Raises:
            MissingDatasetError: the file does not exist.
            ValueError: a line is not valid JSON or not in the task's format, or there is none.
        """
        path = folder / f"{self.name}.jsonl"
        records: list[Record] = []
        for number, raw in json_lines(read_text(path, f"the {self.name} task's records"), str(path)):
            label = f"{path}: line {number}"
            if not isinstance(raw, dict):
                raise ValueError(f"{label}: found {shown(raw)}, expected an object: get the file again")
            records.append(self.read(RawRecord(raw, len(records), label)))
        if not records:
            raise ValueError(f"{path} contains no records: get it again")
        return records


def default_folder() -> Path:
    """Default folder of the files: ``general/`` in ``SPHERE_DATA``, else in ``shared/data`` beside the checkout."""
    return Path(os.environ.get("SPHERE_DATA") or Path(__file__).parents[4] / "shared" / "data") / "general"


def last_number(text: str) -> Decimal | None:
    """The last number in a text; None if there is none."""
    found = _ANY_NUMBER.findall(text)
    return _number(found[-1]) if found else None


def marked_number(text: str) -> Decimal | None:
    """The first number that directly follows ``####``, GSM8K's mark of the final answer; None if there is none."""
    found = _MARKED_NUMBER.search(text)
    return None if found is None else _number(found[1])


def _number(text: str) -> Decimal:
    return Decimal(re.sub(r"[$,\s]", "", text))


def squad_normalised(text: str) -> str:
    """Normalise as SQuAD does: lower case, no punctuation, no articles, single spaces.

    A text of nothing but punctuation and articles ("A+", "*") keeps them.
    """
    lowered = text.lower()
    return " ".join(_ARTICLES.sub(" ", lowered.translate(_NO_PUNCTUATION)).split()) or " ".join(lowered.split())


def word_f1(answer: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the words, with repetition, of two normalised texts."""
    if not answer or not gold:
        return float(answer == gold)
    answer_words, gold_words = answer.split(), gold.split()
    common = (Counter(answer_words) & Counter(gold_words)).total()
    return 2 * common / (len(answer_words) + len(gold_words))


def _score_choice(record: Record, log_probs: Sequence[float]) -> dict[str, Any]:
    gold, chosen = record["choice"], int(log_probs[1] > log_probs[0])
    return {"acc": float(chosen == gold), "f1": (gold, chosen)}


def weighted_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """Mean of both classes' F1, weighted by their frequencies among the gold classes.

    Args:
        pairs: (gold class, predicted class) of each record.
    """
    from sklearn.metrics import f1_score  # type: ignore[import-untyped]  # of the extra `eval`, as lm-eval is

    gold, predicted = zip(*pairs, strict=True)
    return float(f1_score(gold, predicted, average="weighted", zero_division=0))


def _read_gsm8k(given: RawRecord) -> Record:
    answer = given.text("answer")
    if marked_number(answer) is None:
        given.refuse("answer", shown(answer), "a rationale that ends with '#### ' and a number")
    return {"question": given.text("question"), "answer": answer}


def _score_gsm8k(record: Record, answer: str) -> dict[str, float]:
    gold = marked_number(record["answer"])
    return {"exact_match": float(last_number(answer) == gold)}


def _read_rte(given: RawRecord) -> Record:
    labels = {"entailment": 0, "not_entailment": 1}
    label = given.text("label")
    if label not in labels:
        given.refuse("label", shown(label), " or ".join(labels))
    return {"premise": given.text("sentence1"), "hypothesis": given.text("sentence2"), "choice": labels[label]}


def _read_boolq(given: RawRecord) -> Record:
    answer = given.raw.get("answer")
    if not isinstance(answer, bool):
        given.refuse("answer", shown(answer), "true or false")
    return {"passage": given.text("passage"), "question": given.text("question"), "choice": int(answer)}


def _read_natural_question(given: RawRecord) -> Record:
    answers = list(given.texts("answer"))
    if not answers:
        given.refuse("answer", "an empty list", "at least one answer")
    return {"question": given.text("question"), "answers": answers}


def _score_natural_question(record: Record, answer: str) -> dict[str, float]:
    golds, answer = [squad_normalised(gold) for gold in record["answers"]], squad_normalised(answer)
    return {
        "exact_match": float(answer in golds),
        "f1": max(word_f1(answer, gold) for gold in golds),
        "contains": float(any(f" {gold} " in f" {answer} " for gold in golds)),
    }


def _with_question_mark(question: str) -> str:
    return question if question.endswith("?") else f"{question}?"


_CHOICE_METRICS: Final[Mapping[str, Aggregation]] = {"acc": "mean", "f1": weighted_f1}

ABILITY_TASKS: Final[dict[str, AbilityTask]] = {task.name: task for task in (
    AbilityTask(
        "gsm8k", _read_gsm8k,
        prompt=lambda record: f"Question: {record['question']}\nAnswer:",
        answer=lambda record: str(record["answer"]),
        score=_score_gsm8k, metrics={"exact_match": "mean"},
        stops=("Question:", "</s>", "<|im_end|>"), max_new_tokens=256,
    ),
    AbilityTask(
        "rte", _read_rte,
        prompt=lambda record: f"{record['premise']}\nQuestion: {record['hypothesis']} True or False?\nAnswer:",
        answer=lambda record: int(record["choice"]),
        score=_score_choice, metrics=_CHOICE_METRICS, choices=("True", "False"),
    ),
    AbilityTask(
        "natural_questions", _read_natural_question,
        prompt=lambda record: f"Q: {_with_question_mark(record['question'])}\nA:",
        answer=lambda record: list(record["answers"]),
        score=_score_natural_question, metrics={"exact_match": "mean", "f1": "mean", "contains": "mean"},
        preamble="Answer these questions:\n\n", between="\n", stops=("\n",), max_new_tokens=32,
    ),
    AbilityTask(
        "boolq", _read_boolq,
        prompt=lambda record: f"{record['passage']}\nQuestion: {_with_question_mark(record['question'])}\nAnswer:",
        answer=lambda record: int(record["choice"]),
        score=_score_choice, metrics=_CHOICE_METRICS, choices=("no", "yes"),
    ),
)}
