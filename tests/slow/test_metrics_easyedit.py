"""Protocol `easyedit` against EasyEdit's own functions, on tiny models and on SmolLM2.

Set EASYEDIT_HOME to a checkout of its main branch, with what it imports installed; without it these tests skip.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.built_models import built, edited
from helpers.metric_records import AROUND, mixed_records, tokenizer
from sphere_easyedit.datasets.loaders import EditRecord, load_records
from sphere_easyedit.easyedit.editor import edit_arguments
from sphere_easyedit.evaluation.metrics import CaseScores, evaluate_protocols, evaluate_records
from sphere_easyedit.models.loading import SMOLLM2, load_model

pytestmark = pytest.mark.easyedit


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # EasyEdit writes logs where it stands


def requests_of(records: Sequence[EditRecord]) -> list[dict[str, Any]]:
    """Records as EasyEdit's ``_prepare_requests`` would make them; it wants a paraphrase of each."""
    given = edit_arguments([record if record.paraphrase_prompts else
                            replace(record, paraphrase_prompts=(record.edit_prompt,)) for record in records])
    near = given["locality_inputs"]["neighborhood"]
    return [{
        "prompt": given["prompts"][number], "target_new": record.target_new, "subject": record.subject,
        "ground_truth": given["ground_truth"][number], "portability": {},
        "locality": {"neighborhood": {name: values[number] for name, values in near.items()}},
    } | ({"rephrase_prompt": given["rephrase_prompts"][number]} if record.paraphrase_prompts else {})
        for number, record in enumerate(records)]


def easyedits(package: Any, model: Any, unedited: Any, tok: Any, records: Sequence[EditRecord]
              ) -> list[tuple[list[float], list[float], list[float]]]:
    """rewrite_acc, rephrase_acc and locality acc of each record, by EasyEdit's functions."""
    hparams = SimpleNamespace(alg_name="MEMIT", max_length=40, device="cpu")  # as in EasyEdit's files
    finish = importlib.import_module("easyeditor.editors.editor").finalize_locality_metrics
    found = []
    for request in requests_of(records):
        metric = {when: package.evaluate.compute_edit_quality(one, "tiny", hparams, tok, request, "cpu")
                  for when, one in (("pre", unedited), ("post", model))}
        finish(metric, request, hparams, "tiny")
        post = metric["post"]
        found.append((post["rewrite_acc"], post.get("rephrase_acc", []), post["locality"]["neighborhood_acc"]))
    return found


def assert_equal_to_easyedits(package: Any, model: Any, unedited: Any, tok: Any, records: Sequence[EditRecord]
                              ) -> list[CaseScores]:
    before = {score.case_id: score for score in evaluate_records(unedited, tok, records, "easyedit")}
    scores = evaluate_protocols(model, tok, records, ["easyedit"], before)["easyedit"]
    tok.pad_token_id = tok.eos_token_id if tok.pad_token_id is None else tok.pad_token_id  # as its editors do
    theirs = easyedits(package, model, unedited, tok, records)
    for score, (rewrite, rephrase, locality) in zip(scores, theirs, strict=True):
        assert list(score.efficacy_prompts) == pytest.approx(rewrite), score.case_id
        assert list(score.generalization_prompts) == pytest.approx(rephrase), score.case_id
        assert list(score.specificity_prompts) == pytest.approx(locality), score.case_id
    for metric in ("efficacy", "specificity"):  # or the comparison says little
        values = {value for score in scores for value in getattr(score, f"{metric}_prompts")}
        assert len(values) > 2
    return scores


@pytest.mark.parametrize(("family", "kind"), [*(("llama", kind) for kind in AROUND), ("qwen2", "both"),
                                              ("gpt2", "plain")])
def test_equal_to_easyedits_own(package: Any, family: str, kind: str, tmp_path: Path) -> None:
    model, tok = built(family), tokenizer(kind)
    changed = edited(model)
    records = mixed_records(changed, tok, AROUND[kind][0], tmp_path)
    if family == "gpt2":  # whose absolute positions EasyEdit shifts where it pads: one neighbour, no padding
        records = [replace(record, neighborhood_prompts=record.neighborhood_prompts[:1]) for record in records]
    assert_equal_to_easyedits(package, changed, model, tok, records)


@pytest.mark.real
def test_equal_to_easyedits_own_on_real_records(package: Any, data_dir: Path) -> None:
    try:
        model, tok = load_model(SMOLLM2, "cpu", torch.float32)
    except ValueError as error:
        pytest.skip(str(error))
    records = load_records("counterfact", data_dir / "counterfact.json", 8, seed=2) \
        + [replace(record, case_id=9000 + record.case_id)
           for record in load_records("zsre", data_dir / "zsre_mend_eval.json", 12, seed=2)]
    assert_equal_to_easyedits(package, edited(model), model, tok, records)
