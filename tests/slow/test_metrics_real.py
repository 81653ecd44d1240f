"""Protocols `paper` and `rome` on real records and a real model, against one plain model call a prompt."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.evaluation.metrics import evaluate_protocols
from sphere_easyedit.models.loading import SMOLLM2, load_model

pytestmark = pytest.mark.real


def slow(logits_of: Callable[[tuple[int, ...]], Tensor], tok: Any, prompt: str, target: str) -> tuple[bool, float]:
    """Whether every target token is the argmax, and the mean of their log-probabilities."""
    start, ids = len(tok(prompt).input_ids), tok(prompt + " " + target).input_ids
    logits = logits_of(tuple(ids[:-1]))[start - 1:]
    log_probs, wanted = logits.double().log_softmax(-1), torch.tensor(ids[start:])
    return bool((log_probs.argmax(-1) == wanted).all()), float(log_probs.gather(1, wanted[:, None]).mean())


def test_real_records_case_by_case(data_dir: Path) -> None:
    try:
        model, tok = load_model(SMOLLM2, "cpu", torch.float32)
    except ValueError as error:
        pytest.skip(str(error))
    records = [replace(record, neighborhood_prompts=record.neighborhood_prompts[:3])  # of ten: minutes of plain calls
               for record in load_records("counterfact", data_dir / "counterfact.json", 16, seed=3)]
    scores = evaluate_protocols(model, tok, records, ["paper", "rome"])

    @functools.lru_cache(maxsize=2)  # two answers of one token ask the model the same
    def logits_of(ids: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]

    kinds = set()
    for paper, rome, record in zip(scores["paper"], scores["rome"], records, strict=True):
        new, true = record.target_new, record.target_true or ""
        asked = {"efficacy": [(record.edit_prompt, new, true)],
                 "generalization": [(text, new, true) for text in record.paraphrase_prompts],
                 "specificity": [(one.text, true, new) for one in record.neighborhood_prompts]}
        for metric, questions in asked.items():
            for number, (prompt, wanted, other) in enumerate(questions):
                (hit, one), (_, two) = slow(logits_of, tok, prompt, wanted), slow(logits_of, tok, prompt, other)
                assert getattr(paper, f"{metric}_prompts")[number] == float(hit)
                value = getattr(rome, f"{metric}_prompts")[number]
                assert value == float(one > two)
                # Float32 through 30 layers: log-probabilities differ from float64's by up to 3e-5.
                assert getattr(rome, f"{metric}_magnitudes")[number] == pytest.approx(
                    math.exp(one) - math.exp(two), abs=1e-4)
                kinds.add((metric, hit, value))
    assert {("specificity", True, 1.0), ("specificity", False, 1.0), ("efficacy", False, 0.0)} <= kinds
