"""General abilities through lm-eval, against plain reimplementations on tiny models and a few records."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import random
import re
import socket
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics  # noqa: F401 -- sets environment variables when it is first imported
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedTokenizerBase

from helpers.models import tiny_model
from sphere_easyedit.datasets.records import MissingDatasetError
from sphere_easyedit.evaluation.abilities.general import general_abilities
from sphere_easyedit.evaluation.abilities.tasks import (
    ABILITY_TASKS,
    last_number,
    marked_number,
    squad_normalised,
    word_f1,
)

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'sphere-easyedit[eval]'")
from sphere_easyedit.evaluation.abilities import harness

PLACES = ("Rome", "Paris", "the old town", "Lima", "Oslo", "a small island", "Cairo", "Delhi", "Bern", "Quito", "Kyiv",
          "Accra")
RECORDS: dict[str, list[dict[str, Any]]] = {
    "boolq": [{"question": f"is {place} far", "passage": f"{place} is {number} miles off.", "answer": number % 3 == 0}
              for number, place in enumerate(PLACES)],
    "rte": [{"sentence1": f"He went to {place} {number} times.", "sentence2": f"He knows {place}.",
             "label": "entailment" if number % 4 else "not_entailment"} for number, place in enumerate(PLACES)],
    "gsm8k": [{"question": f"Ann sees {number} cats and 2 dogs in {place}. How many animals?",
               "answer": f"{number}+2=<<{number}+2={number + 2}>>{number + 2}\n#### {number + 2}"}
              for number, place in enumerate(PLACES)],
    "natural_questions": [{"question": f"who founded {place}?", "answer": ["The King", f"people of {place}"]}
                          for place in PLACES],
}
# Tiny models read at most 128 tokens.
SHORT = 12


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Folder of the four tasks' files."""
    folder = tmp_path / "general"
    folder.mkdir()
    for name, records in RECORDS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return folder


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any use of the network fails at once."""
    def refuse(*given: Any, **named: Any) -> Any:
        raise AssertionError(f"reached for the network: {given} {named}")

    for owner, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo"),
                        (socket, "create_connection")):
        monkeypatch.setattr(owner, name, refuse)


def _log_prob(model: nn.Module, tok: PreTrainedTokenizerBase, prompt: str, continuation: str) -> float:
    whole, known = tok(prompt + continuation)["input_ids"], len(tok(prompt)["input_ids"])
    with torch.no_grad():
        log_probs = model(torch.tensor([whole])).logits[0].log_softmax(dim=-1)
    return sum(float(log_probs[at - 1, whole[at]]) for at in range(known, len(whole)))


def _prompts(name: str) -> list[tuple[str, bool]]:
    """Prompts, and whether the second choice is right."""
    if name == "boolq":
        return [(f"{one['passage']}\nQuestion: {one['question']}?\nAnswer:", one["answer"]) for one in RECORDS[name]]
    return [(f"{one['sentence1']}\nQuestion: {one['sentence2']} True or False?\nAnswer:",
             one["label"] == "not_entailment") for one in RECORDS[name]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(("name", "choices"), [("boolq", (" no", " yes")), ("rte", (" True", " False"))])
def test_choices_are_those_of_plain_log_probabilities(
    family: str, name: str, choices: tuple[str, str], tok: PreTrainedTokenizerBase, data: Path
) -> None:
    model = tiny_model(family)
    found = general_abilities(model, tok, [name], data)[name]

    golds, margins = [], []
    for prompt, gold in _prompts(name):
        first, second = (_log_prob(model, tok, prompt, choice) for choice in choices)
        golds.append(gold)
        margins.append(second - first)
    right = [(margin > 0) == gold for gold, margin in zip(golds, margins, strict=True)]
    share = sum(right) / len(right)
    assert 0 < sum(golds) < len(golds)
    assert (found.task, found.metric, found.n, found.shots) == (name, "acc", len(PLACES), 0)
    assert found.mean == pytest.approx(100 * share)
    assert found.stderr == pytest.approx(100 * math.sqrt(share * (1 - share) / (len(right) - 1)))
    pairs = [(gold, margin > 0) for gold, margin in zip(golds, margins, strict=True)]
    assert found.extra == {"f1": pytest.approx(100 * _weighted_f1(pairs))}


def _weighted_f1(pairs: Sequence[tuple[int, int]]) -> float:
    total = 0.0
    for one in (0, 1):
        hits = sum(gold == predicted == one for gold, predicted in pairs)
        golds, positives = sum(gold == one for gold, _ in pairs), sum(predicted == one for _, predicted in pairs)
        precision, recall = hits / positives if positives else 0.0, hits / golds if golds else 0.0
        total += golds / len(pairs) * (2 * precision * recall / (precision + recall) if hits else 0.0)
    return total


def test_answers_do_not_depend_on_the_batch(tok: PreTrainedTokenizerBase, data: Path) -> None:
    model = tiny_model("llama")
    few = general_abilities(model, tok, data=data, limit=3, max_new_tokens=SHORT, batch_size=2)
    assert [score.n for score in few.values()] == [3, 3, 3, 3]
    assert list(few) == ["gsm8k", "rte", "natural_questions", "boolq"]
    assert few == general_abilities(model, tok, data=data, limit=3, max_new_tokens=SHORT, batch_size=32)
    assert few["gsm8k"].protocol.endswith(f"sphere-easyedit tasks, up to {SHORT} new tokens")
    assert few["gsm8k"].protocol.startswith("lm-eval 0.")
    assert json.loads(json.dumps(few["gsm8k"].to_dict()))["extra"] == {}


def _greedy(model: nn.Module, tok: PreTrainedTokenizerBase, prompt: str, most: int) -> list[int]:
    """New tokens, each by a forward pass over all tokens, past the end of an answer."""
    ids = tok(prompt)["input_ids"]
    new: list[int] = []
    while len(new) < most:
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


def _ended(tok: PreTrainedTokenizerBase, new: Sequence[int], stops: Sequence[str], ends: Sequence[int]) -> str:
    """The answer: up to the first end token, and before the first stop sequence."""
    for number in range(1, len(new) + 1):
        text = tok.decode(new[:number])
        if any(stop in text for stop in stops):
            return min((text.split(stop)[0] for stop in stops), key=len)
        if new[number - 1] in ends:
            break
    return text


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "gemma3_text"])
def test_written_answers_are_those_of_plain_greedy_decoding(family: str, tok: PreTrainedTokenizerBase) -> None:
    model = tiny_model(family)
    prompts = [ABILITY_TASKS["gsm8k"].prompt({"question": "so " * number + record["question"]})
               for number, record in enumerate(RECORDS["gsm8k"][:4])]
    free = [_greedy(model, tok, prompt, 36) for prompt in prompts]
    # At least one contains a stop sequence, another an end token.
    stops, ends = ["never", tok.decode(free[0][17:19])], [free[1][28]]
    expected = [_ended(tok, new, stops, ends) for new in free]
    assert len({len(text) for text in expected}) > 1, "answers must end at different times for this test to say much"

    model.generation_config.eos_token_id = ends
    lm = harness.InMemoryLM(model, tok, batch_size=3)
    reported: list[tuple[int, int]] = []
    lm.report = lambda done, total: reported.append((done, total))
    found = lm.generate_until([_Request((prompt, {"until": list(stops), "do_sample": False, "max_gen_toks": 36}))
                               for prompt in prompts])
    assert found == expected
    assert reported == [(3, 4), (4, 4)]


class _Request:
    def __init__(self, args: tuple[str, dict[str, Any]]) -> None:
        self.args = args


@pytest.mark.parametrize(("text", "expected"), [
    ("The answer is 1,360.", "1360"), ("so $18.00", "18"), ("2 + 3 = 5. It is 5, not 6.", "6"), ("$-5", "-5"),
    ("-$5", "-5"), ("it was -3 degrees", "-3"), ("12-6", "6"), (".5 of it", "0.5"), ("1, 2,3", "3"), ("3.", "3"),
    ("1,000,000 people", "1000000"), ("10,5000", "5000"), ("none", None), ("", None),
])
def test_last_number(text: str, expected: str | None) -> None:
    assert last_number(text) == (None if expected is None else Decimal(expected))


@settings(deadline=None)
@given(st.integers(-10**12, 10**12), st.integers(0, 4), st.sampled_from(["", "Ann has 7 cats, so 7 + 1. ", "#1: "]))
def test_a_number_is_found_however_it_is_written(whole: int, places: int, before: str) -> None:
    value = Decimal(whole).scaleb(-places)
    for text in (f"{value:f}", f"{value:,f}", f"${value:f}", f"{value:f}."):
        assert last_number(f"{before}The answer is {text}") == value
        assert marked_number(f"{before}so\n#### {text}\nand 3 more") == value
        assert marked_number(f"{before}The answer is {text}") is None


def test_scores_of_gsm8k_and_natural_questions() -> None:
    score = ABILITY_TASKS["gsm8k"].score
    record = {"answer": "6+6=<<6+6=12>>12\n#### 1,212"}
    assert score(record, " 6+6=12\n#### 1212") == {"exact_match": 1}
    assert score(record, " 12 and 1200, that is $1,212.00.") == {"exact_match": 1}
    assert score(record, "#### 1212\nThat was question 3") == score(record, "") == {"exact_match": 0}
    score = ABILITY_TASKS["natural_questions"].score
    record = {"answers": ["November 2 , 2016", "The Red Other", "A+"]}
    assert score(record, " november 2, 2016.") == {"exact_match": 1, "f1": 1, "contains": 1}
    assert score(record, " It was November 2, 2016") == {"exact_match": 0, "f1": pytest.approx(6 / 8), "contains": 1}
    assert score(record, " another, a red one") == {"exact_match": 0, "f1": pytest.approx(2 / 5), "contains": 0}
    assert score(record, " A+") == {"exact_match": 1, "f1": 1, "contains": 1}
    assert score(record, " 12016") == {"exact_match": 0, "f1": 0, "contains": 0}
    assert score(record, " ") == {"exact_match": 0, "f1": 0, "contains": 0}
    assert squad_normalised(" The  Cat's a-hat, an\nOWL ") == "cats ahat owl"
    assert (squad_normalised("*"), squad_normalised("The"), squad_normalised("")) == ("*", "the", "")


@settings(deadline=None)
@given(st.lists(st.sampled_from("abc")), st.lists(st.sampled_from("abc")))
def test_word_f1_is_symmetric_and_bounded(one: list[str], other: list[str]) -> None:
    first, second = " ".join(one), " ".join(other)
    assert word_f1(first, second) == word_f1(second, first)
    assert 0 <= word_f1(first, second) <= 1
    assert (word_f1(first, second) == 1) == (sorted(one) == sorted(other))


def test_examples_come_from_other_records_and_by_the_seed(
    tok: PreTrainedTokenizerBase, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def spy(model: nn.Module, rows: Sequence[Any], **named: Any) -> Any:
        asked.append([tok.decode(row.prompt) for row in rows])
        return real(model, rows, **named)

    real = harness.score_rows
    monkeypatch.setattr(harness, "score_rows", spy)
    for seed in (0, 0, 1):
        scores = general_abilities(tiny_model("llama", max_position_embeddings=512), tok, ["rte"], data, num_fewshot=3,
                                   seed=seed)
        assert scores["rte"].shots == 3
    assert asked[0] == asked[1] != asked[2]
    solved = {f"{prompt} {'False' if gold else 'True'}": prompt for prompt, gold in _prompts("rte")}
    for text, (own, _) in zip(asked[0][::2], _prompts("rte"), strict=True):
        *examples, question = text.split("\n\n")
        assert question == own
        assert len({solved[example] for example in examples} - {own}) == 3


def _state(model: nn.Module, tok: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "parameters": [(name, parameter.data_ptr(), parameter.dtype, parameter.device, parameter.requires_grad,
                        parameter._version) for name, parameter in model.named_parameters()],
        "modes": [module.training for module in model.modules()],
        "hooks": [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()],
        "generation": model.generation_config.to_dict(),
        "config": model.config.to_dict(),
        "tokenizer": (tok.pad_token, tok.padding_side, tok.truncation_side, len(tok)),
        "random": (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()),
        "levels": [logging.getLogger(name).level for name in ("lm_eval", "datasets", "transformers")],
        "bars": (harness.lm_eval.api.task.tqdm, harness.datasets.are_progress_bars_disabled()),
        "environment": sorted(os.environ.items()),
    }


@pytest.mark.parametrize("tied", [True, False])
def test_nothing_stays_changed_and_nothing_is_printed(
    tied: bool, tok: PreTrainedTokenizerBase, data: Path, offline: None, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = tiny_model("llama", tie_word_embeddings=tied).double().train()
    model.model.layers[1].eval()
    next(model.parameters()).requires_grad_(False)
    model.generation_config.update(temperature=0.3, do_sample=True, top_p=0.5)
    tok.pad_token = None
    tok.padding_side = "right"
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = copy.deepcopy(_state(model, tok))
    done: list[tuple[str, int, int]] = []
    caplog.set_level(logging.DEBUG)
    general_abilities(model, tok, data=data, max_new_tokens=SHORT,
                      progress=lambda task, so_far, total: done.append((task, so_far, total)))
    assert _state(model, tok) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert capfd.readouterr() == ("", "")
    assert {record.name for record in caplog.records} <= {"sphere_easyedit.evaluation.abilities.general"}
    assert [(task, total) for task, so_far, total in done if so_far == total] == [
        ("gsm8k", 12), ("rte", 24), ("natural_questions", 12), ("boolq", 24)]


@pytest.fixture
def official(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness with a few tasks over local files: loading all of its real ones takes 20 s."""
    tasks = data.parent / "tasks"
    tasks.mkdir()
    common = {"dataset_path": "json", "dataset_kwargs": {
        "data_files": {"test": str(data / "rte.jsonl")}, "cache_dir": str(data.parent / "cache")}, "test_split": "test"}
    choice = {"output_type": "multiple_choice", "doc_to_text": "{{sentence1}}", "doc_to_target": "{{0}}",
              "doc_to_choice": ["yes", "no"], "tag": "choosing"}
    metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    configs: list[dict[str, Any]] = [
        {"task": "boolq", **common, **choice, "metric_list": [metric], "num_fewshot": 5},
        {"task": "hellaswag", **common, **choice,
         "metric_list": [metric, {"metric": "f1", "aggregation": "f1", "higher_is_better": True}]},
        {"task": "wording", **common, "output_type": "loglikelihood_rolling", "doc_to_text": "",
         "doc_to_target": "{{sentence1}}", "metric_list": [{"metric": "word_perplexity"}]},
        {"task": "absent", "dataset_path": str(data / "nowhere"), "test_split": "test"},
        {"group": "both", "task": ["boolq", "hellaswag"], "aggregate_metric_list": [{"metric": "acc"}]},
    ]
    for number, config in enumerate(configs):
        (tasks / f"{number}.yaml").write_text(yaml.safe_dump(config))
    real = harness.TaskManager
    monkeypatch.setattr(harness, "TaskManager", lambda: real(include_defaults=False, include_path=str(tasks)))


def test_tasks_of_the_harness_by_name(
    official: None, offline: None, tok: PreTrainedTokenizerBase, data: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model("llama")
    found = general_abilities(model, tok, ["boolq", "lm_eval:boolq", "hellaswag", "wording"], data, limit=8)
    assert list(found) == ["boolq", "lm_eval:boolq", "hellaswag", "wording"]
    assert "sphere-easyedit tasks" in found["boolq"].protocol
    assert all("its own tasks" in found[name].protocol for name in list(found)[1:])
    right = [_log_prob(model, tok, record["sentence1"], " yes") > _log_prob(model, tok, record["sentence1"], " no")
             for record in RECORDS["rte"][:8]]
    for name in ("lm_eval:boolq", "hellaswag"):
        assert (found[name].metric, found[name].n, found[name].shots) == ("acc", 8, 0)
        assert found[name].mean == pytest.approx(100 * sum(right) / 8)
    assert found["lm_eval:boolq"].stderr is not None
    assert found["hellaswag"].stderr is None  # F1's would be bootstrapped
    texts = [record["sentence1"] for record in RECORDS["rte"][:8]]
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    # Without a prompt the first token is predicted from the end token.
    ids = [[tok.eos_token_id, *tok(text)["input_ids"]] for text in texts]
    with torch.no_grad():
        nats = sum(float(model(torch.tensor([one]), labels=torch.tensor([one])).loss) * (len(one) - 1) for one in ids)
    assert found["wording"].mean == pytest.approx(math.exp(nats / words), rel=1e-4)  # not a hundred times that
    assert capfd.readouterr() == ("", "")


def test_a_group_is_averaged_and_a_tag_is_its_tasks(official: None, tok: PreTrainedTokenizerBase, data: Path) -> None:
    model = tiny_model("llama")
    assert set(general_abilities(model, tok, ["choosing"], data)) == {"boolq", "hellaswag"}
    group = general_abilities(model, tok, ["both"], data)
    assert list(group) == ["both"]
    assert (group["both"].metric, group["both"].n) == ("acc", 24)


def test_an_unknown_task_is_refused_with_its_nearest(official: None, tok: PreTrainedTokenizerBase, data: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"no task 'helaswag'.*nearest are hellaswag"):
        general_abilities(model, tok, ["boolq", "helaswag"], data)
    with pytest.raises(ValueError, match=r"no task 'gsm8'.*nearest are gsm8k"):
        general_abilities(model, tok, ["gsm8"], data)
    with pytest.raises(ValueError, match=r"'absent' can't be loaded.*nowhere"):
        general_abilities(model, tok, ["absent"], data)


@pytest.mark.parametrize(("changes", "message"), [
    ({"tasks": ()}, "no task is given"), ({"num_fewshot": -1}, "num_fewshot is -1"), ({"limit": 0}, "limit is 0"),
    ({"batch_size": 0}, "batch_size is 0"), ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"tasks": ("gsm8k",)}, "up to 256 tokens don't fit .* context of 128 .*: set max_new_tokens lower"),
    ({"tasks": ("rte",), "num_fewshot": 12}, "rte has 12 records, .*at most 11"),
])
def test_what_can_not_be_measured_is_refused(
    changes: dict[str, Any], message: str, tok: PreTrainedTokenizerBase, data: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        general_abilities(tiny_model("llama"), tok, data=data, **changes)


@pytest.mark.parametrize(("name", "line", "message"), [
    ("boolq", '{"question": "q", "passage": "p", "answer": "yes"}', "line 13, field 'answer': found str 'yes'"),
    ("rte", '{"sentence1": "a", "sentence2": "b", "label": "0"}', "line 13, field 'label'.*entailment"),
    ("gsm8k", '{"question": "q", "answer": "12"}', "line 13, field 'answer'.*####"),
    ("natural_questions", '{"question": "q", "answer": []}', "line 13, field 'answer'.*at least one"),
    ("rte", '{"sentence1": ', "line 13 is not valid JSON"), ("rte", "[]", "line 13: found list"),
])
def test_a_bad_line_is_named(name: str, line: str, message: str, tok: PreTrainedTokenizerBase, data: Path) -> None:
    with (data / f"{name}.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=message):
        general_abilities(tiny_model("llama"), tok, [name], data, max_new_tokens=SHORT)


def test_missing_data_is_refused(tok: PreTrainedTokenizerBase, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPHERE_DATA", str(data.parent))
    assert general_abilities(tiny_model("llama"), tok, ["rte"])["rte"].n == 12
    (data / "rte.jsonl").unlink()
    with pytest.raises(MissingDatasetError, match=r"rte\.jsonl does not exist"):
        general_abilities(tiny_model("llama"), tok, ["rte"])


def test_truncated_prompts_are_counted(
    tok: PreTrainedTokenizerBase, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"question": "why? " * 60, "passage": "It is so. " * 60, "answer": True}
    with (data / "boolq.jsonl").open("a") as file:
        file.write(json.dumps(long))
    (data / "gsm8k.jsonl").write_text(json.dumps({"question": long["passage"], "answer": "#### 1"}))
    general_abilities(tiny_model("llama"), tok, ["boolq", "gsm8k", "rte"], data, max_new_tokens=SHORT)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [warning.split(" requests")[0] for warning in warnings] == ["boolq: 2", "gsm8k: 1"]


def test_a_missing_harness_is_named(monkeypatch: pytest.MonkeyPatch, tok: PreTrainedTokenizerBase, data: Path) -> None:
    monkeypatch.delitem(sys.modules, harness.__name__)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"lm_eval is missing: pip install 'sphere-easyedit\[eval\]'"):
        general_abilities(tiny_model("llama"), tok, ["rte"], data)


def test_real_files_hold_what_the_tasks_ask_for(data_dir: Path) -> None:
    folder = data_dir / "general"
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    sizes = {"boolq": 500, "rte": 500, "gsm8k": 300, "natural_questions": 800}
    for name, size in sizes.items():
        task = ABILITY_TASKS[name]
        records = task.records(folder)
        assert len(records) == size
        for record in records:
            gold = task.answer(record)
            if isinstance(gold, int):
                found = task.score(record, [-float(choice != gold) for choice in range(2)])
                assert found["acc"] == 1
            else:
                found = task.score(record, f" {gold if isinstance(gold, str) else gold[0]}")
                assert set(found.values()) == {1}
