"""Records and tokenizers for tests of metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.paths import TESTS
from sphere_easyedit.datasets.loaders import (
    EditRecord,
    load_records,
)

GOLDEN = TESTS / "golden"

FOLDERS = {"llama": GOLDEN / "llama" / "tiny-llama", "gpt2": GOLDEN / "gpt2" / "tiny-gpt2-xl"}

# What a tokenizer puts around a text: kind -> (in front, behind). Token 0 is <|endoftext|>.
AROUND: dict[str, tuple[list[int], list[int]]] = {
    "plain": ([], []),
    "bos": ([0], []),
    "eos": ([], [0]),
    "both": ([0], [0]),
}

def tokenizer(kind: str) -> Any:
    tok = AutoTokenizer.from_pretrained(FOLDERS["llama"])
    front, behind = AROUND[kind]
    if front or behind:
        template = " ".join(["<|endoftext|>"] * len(front) + ["$A"] + ["<|endoftext|>"] * len(behind))
        tok.backend_tokenizer.post_processor = TemplateProcessing(
            single=template, special_tokens=[("<|endoftext|>", 0)]
        )
    ids = tok("The mother", add_special_tokens=False).input_ids
    assert tok("The mother").input_ids == front + ids + behind
    return tok


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDERS[request.param]).train(False)


def next_token(model: Any, ids: list[int]) -> int:
    with torch.no_grad():
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())


def greedy_words(model: Any, tok: Any, front: list[int], prompt: str, most: int = 3) -> str | None:
    """The model's greedy continuation, as long as the tokenizer gives its text the same tokens."""
    ids = tok(prompt, add_special_tokens=False).input_ids
    new: list[int] = []
    words = None
    while len(new) < most:
        new.append(next_token(model, front + ids + new))
        text = tok.decode(new)
        same = tok(prompt + text, add_special_tokens=False).input_ids == ids + new
        if not (text.startswith(" ") and text[1:].strip() == text[1:] != "" and same):
            break
        words = text[1:]
    return words


def first_words(model: Any, tok: Any, front: list[int], prompts: list[str]) -> tuple[str, str | None]:
    """The first prompt that the model continues with words, and the words; None if it does so for no prompt."""
    for prompt in prompts:
        words = greedy_words(model, tok, front, prompt)
        if words:
            return prompt, words
    return prompts[0], None


def mixed_records(model: Any, tok: Any, front: list[int], folder: Path) -> list[EditRecord]:
    """CounterFact and ZsRE records through their loaders; some targets are the model's own predictions."""
    counterfact: list[dict[str, Any]] = []
    zsre: list[dict[str, Any]] = []
    for number, record in enumerate(load_records("demo", None, 12, seed=3)):
        paraphrases = list(record.paraphrase_prompts[:2])
        neighbours = [prompt.text for prompt in record.neighborhood_prompts[:3]]
        hit, wrong = number % 3 > 0, " Otherwise" * (number % 2)
        # The prediction for the edit prompt in some cases, for a paraphrase in others.
        texts = [record.edit_prompt, *paraphrases]
        _, predicted_new = first_words(model, tok, front, texts if number % 2 else texts[::-1])
        _, predicted_true = first_words(model, tok, front, neighbours)
        counterfact.append({
            "case_id": 100 + number,
            "requested_rewrite": {
                "prompt": record.prompt,
                "subject": record.subject,
                "target_new": {"str": (hit and predicted_new) or record.target_new},
                "target_true": {"str": (hit and predicted_true) or record.target_true},
            },
            "paraphrase_prompts": paraphrases if number else [],
            "neighborhood_prompts": neighbours,
        })
        asks = ("Who knows", "Where is", "What is said of", "When was", "In which country is", "Why did",
                "How far is", "Who built", "Which people like", "Do you like", "Name", "What can be")
        question, predicted = first_words(model, tok, front, [f"{ask} {record.subject}?" for ask in asks])
        place, predicted_loc = first_words(model, tok, front, [f"nq question: {ask} {number}?" for ask in asks])
        zsre.append({
            "subject": record.subject,
            "src": question,
            "rephrase": f"{record.subject}, {question}",
            # A wrong word after the predicted ones: only some of the target's tokens are hits.
            "answers": [((hit and predicted) or record.target_new) + wrong],
            "loc": place[:-1],
            "loc_ans": ((hit and predicted_loc) or record.target_new) + wrong,
        })
    paths = []
    for name, raw in (("cf.json", counterfact), ("zsre.json", zsre)):
        paths.append(folder / name)
        paths[-1].write_text(json.dumps(raw), encoding="utf-8")
    return load_records("counterfact", paths[0]) + load_records("zsre", paths[1])


def record_of(prompt: str, target: str, case_id: int = 31) -> EditRecord:
    return EditRecord(case_id, "{}" + prompt, "X", target, None, (), (), (), "demo")

