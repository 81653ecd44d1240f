"""The four general abilities of the SPHERE paper: how each is asked and how an answer is scored.

=====================  =============================================  ===============================================
task                   prompt                                         scores, the main one first
=====================  =============================================  ===============================================
``gsm8k``              ``Question: ...\\nAnswer:``                     ``exact_match``: the last number of what the
                                                                      model says is the gold one; ``strict``: the
                                                                      number behind ``####`` is
``rte``                premise, ``Question: hypothesis True or        ``acc``: the likelier of `` True`` and
                       False?\\nAnswer:``                              `` False`` is right; ``f1``, ``auc``
``boolq``              passage, ``Question: ...?\\nAnswer:``           ``acc``: the likelier of `` no`` and `` yes``
                                                                      is right; ``f1``, ``auc``
``natural_questions``  ``Answer these questions:``, ``Q: ...\\nA:``    ``exact_match`` with any gold answer, ``f1``
                                                                      over words, ``contains``: a gold answer stands
                                                                      in what the model says
=====================  =============================================  ===============================================

Worded as lm-evaluation-harness words its tasks of (nearly) these names. Generation is greedy and ends at a stop
sequence, at an end token or after so many new tokens (:class:`AbilityTask`). The authors' own harness asks other
things: its GSM8K prompt holds the gold rationale up to the final number, and its Natural Questions come behind a
passage with the answer. Here the model has to reason and to remember, so the numbers don't compare with the paper's.

* **GSM8K.** Numbers are compared as numbers (18, 18.00 and $18 are one). In a zero-shot prompt nothing tells the model
  of ``####``, so ``strict`` asks for a format it has never seen, and the last number is the main score; lm-eval calls
  the two flexible-extract and strict-match.
* **RTE and BoolQ.** F1 is the mean of both classes' F1, weighted by how often each is right, as in the authors' code.
  A small model may give nearly all records the same answer, so that accuracy tells its bias and the classes' shares;
  ``auc`` (the area under the ROC curve of the difference of both log-probabilities; 50% is chance) does not
  depend on that bias. It is left out where all records are of one class.
* **Natural Questions** are normalised as SQuAD's are: lower case, no punctuation, no articles, single spaces. A model
  that answers in whole sentences has an exact match of nearly 0; ``contains`` (the criterion of the authors' code) sees
  what it knows.
"""

from __future__ import annotations

import json
import math
import os
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, Literal

from .json_records import RawRecord, read_text, shown

Record = dict[str, Any]
Aggregation = Callable[[Sequence[Any]], float] | Literal["mean"]

# A hyphen behind a digit, a letter or a bracket is a sign of operation or a dash, and no number's own.
_NUMBER: Final = r"(?:(?<![\w)])-\$?|\$-?)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_ANY_NUMBER: Final = re.compile(_NUMBER)
_MARKED_NUMBER: Final = re.compile(rf"####\s*({_NUMBER})")
_ARTICLES: Final = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class AbilityTask:
    """How one ability is asked and scored.

    Attributes:
        name: of the task, and of its file, ``<name>.jsonl``.
        read: a record of that file, checked, with the fields that the functions below read.
        prompt: the question, without what goes in front of it.
        answer: the gold answer, or the number of the right choice; of several answers the first stands in examples.
        score: of one record, by metric, from what the model wrote, or from the log-probability of each choice.
        metrics: what is made of the scores of all records, by metric, the main one first.
        choices: what is compared by likelihood, in the order of their numbers; () where the model writes an answer.
        preamble: in front of examples and question.
        between: between examples, and between the last one and the question.
        stops: a written answer ends in front of the first of them.
        max_new_tokens: most tokens of a written answer.
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
        """All records of the task's file in that folder, in its order.

        Raises:
            MissingDatasetError: there is no such file.
            ValueError: a line is no valid JSON or not of the task's form, or there is none.
        """
        path = folder / f"{self.name}.jsonl"
        records: list[Record] = []
        # JSON strings may hold what str.splitlines takes for a line's end.
        for number, line in enumerate(read_text(path, f"the {self.name} task's records").split("\n"), start=1):
            if line.strip():
                label = f"{path}: line {number}"
                try:
                    raw = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{label} is no valid JSON ({error}): repair it or get the file again") from error
                if not isinstance(raw, dict):
                    raise ValueError(f"{label}: found {shown(raw)}, expected an object")
                records.append(self.read(RawRecord(raw, len(records), label)))
        if not records:
            raise ValueError(f"{path} holds no record: get it again")
        return records


def default_folder() -> Path:
    """Where the four files are looked for: ``general/`` in ``SPHERE_DATA``, else in ``shared/data`` by the checkout."""
    return Path(os.environ.get("SPHERE_DATA") or Path(__file__).parents[3] / "shared" / "data") / "general"


def last_number(text: str) -> Decimal | None:
    """The last number in a text; None where there is none."""
    found = _ANY_NUMBER.findall(text)
    return _number(found[-1]) if found else None


def marked_number(text: str) -> Decimal | None:
    """The first number right behind ``####``, GSM8K's mark of the final answer; None where there is none."""
    found = _MARKED_NUMBER.search(text)
    return None if found is None else _number(found[1])


def _number(text: str) -> Decimal:
    return Decimal(re.sub(r"[$,\s]", "", text))


def normalised(text: str) -> str:
    """A text as SQuAD compares it: lower case, without punctuation and articles, words one space apart.

    Of a text that is nothing else ("A+", "*") all is kept.
    """
    lowered = text.lower()
    return " ".join(_ARTICLES.sub(" ", lowered.translate(_NO_PUNCTUATION)).split()) or " ".join(lowered.split())


def word_f1(said: str, gold: str) -> float:
    """Harmonic mean of precision and recall over the words, with repetition, of two normalised texts."""
    if not said or not gold:
        return float(said == gold)
    said_words, gold_words = said.split(), gold.split()
    common = (Counter(said_words) & Counter(gold_words)).total()
    return 2 * common / (len(said_words) + len(gold_words))


def _score_choice(record: Record, log_probs: Sequence[float]) -> dict[str, Any]:
    gold, said = record["choice"], int(log_probs[1] > log_probs[0])
    return {"acc": float(said == gold), "f1": (gold, said), "auc": (gold, log_probs[1] - log_probs[0])}


def weighted_f1(pairs: Sequence[tuple[int, int]]) -> float:
    """F1 of each class, averaged with the share of each among the gold ones as its weight.

    Args:
        pairs: (gold class, predicted class) of each record.
    """
    from sklearn.metrics import f1_score  # type: ignore[import-untyped]  # of the extra that lm-eval comes with

    gold, said = zip(*pairs, strict=True)
    return float(f1_score(gold, said, average="weighted", zero_division=0))


def roc_auc(pairs: Sequence[tuple[int, float]]) -> float:
    """How likely a record of class 1 has a higher score than one of class 0; NaN where a class or a score is missing.

    Args:
        pairs: (gold class, score) of each record.
    """
    from sklearn.metrics import roc_auc_score

    gold, scores = zip(*pairs, strict=True)
    if len(set(gold)) < 2 or not all(map(math.isfinite, scores)):
        return math.nan
    return float(roc_auc_score(gold, scores))


def _read_gsm8k(given: RawRecord) -> Record:
    answer = given.text("answer")
    if marked_number(answer) is None:
        given.refuse("answer", shown(answer), "a rationale that ends with '#### ' and a number")
    return {"question": given.text("question"), "answer": answer}


def _score_gsm8k(record: Record, said: str) -> dict[str, float]:
    gold = marked_number(record["answer"])
    return {"exact_match": float(last_number(said) == gold), "strict": float(marked_number(said) == gold)}


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


def _score_natural_question(record: Record, said: str) -> dict[str, float]:
    golds, said = [normalised(gold) for gold in record["answers"]], normalised(said)
    return {
        "exact_match": float(said in golds),
        "f1": max(word_f1(said, gold) for gold in golds),
        "contains": float(any(f" {gold} " in f" {said} " for gold in golds)),
    }


def _asked(question: str) -> str:
    return question if question.endswith("?") else f"{question}?"


_OF_CHOICES: Final[Mapping[str, Aggregation]] = {"acc": "mean", "f1": weighted_f1, "auc": roc_auc}

ABILITY_TASKS: Final[dict[str, AbilityTask]] = {task.name: task for task in (
    AbilityTask(
        "gsm8k", _read_gsm8k,
        prompt=lambda record: f"Question: {record['question']}\nAnswer:",
        answer=lambda record: str(record["answer"]),
        score=_score_gsm8k, metrics={"exact_match": "mean", "strict": "mean"},
        stops=("Question:", "</s>", "<|im_end|>"), max_new_tokens=256,
    ),
    AbilityTask(
        "rte", _read_rte,
        prompt=lambda record: f"{record['premise']}\nQuestion: {record['hypothesis']} True or False?\nAnswer:",
        answer=lambda record: int(record["choice"]),
        score=_score_choice, metrics=_OF_CHOICES, choices=("True", "False"),
    ),
    AbilityTask(
        "natural_questions", _read_natural_question,
        prompt=lambda record: f"Q: {_asked(record['question'])}\nA:",
        answer=lambda record: list(record["answers"]),
        score=_score_natural_question, metrics={"exact_match": "mean", "f1": "mean", "contains": "mean"},
        preamble="Answer these questions:\n\n", between="\n", stops=("\n",), max_new_tokens=32,
    ),
    AbilityTask(
        "boolq", _read_boolq,
        prompt=lambda record: f"{record['passage']}\nQuestion: {_asked(record['question'])}\nAnswer:",
        answer=lambda record: int(record["choice"]),
        score=_score_choice, metrics=_OF_CHOICES, choices=("no", "yes"),
    ),
)}
