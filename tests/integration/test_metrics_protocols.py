"""Protocols `rome` and `easyedit` against plain reimplementations, and several protocols at once."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.built_models import built, edited
from helpers.metric_records import AROUND, mixed_records, record_of, tokenizer
from sphere_easyedit.datasets.loaders import EditRecord, EvaluationPrompt, load_records
from sphere_easyedit.evaluation.metrics import (
    CaseScores,
    Protocol,
    evaluate_protocols,
    evaluate_records,
    summarise,
)
from sphere_easyedit.evaluation.teacher_forcing import score_rows
from sphere_easyedit.models.row_logits import TargetRow

ALL: tuple[Protocol, ...] = ("paper", "rome", "easyedit")


@pytest.fixture(scope="module")
def llama() -> Any:
    return built("llama")


def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]  # type: ignore[no-any-return]


# --- rome ---------------------------------------------------------------------------------------------------


def mean_log_prob(model: Any, tok: Any, front: list[int], prompt: str, target: str) -> float:
    ids = front + tok(prompt, add_special_tokens=False).input_ids
    whole = front + tok(prompt + " " + target, add_special_tokens=False).input_ids
    assert whole[: len(ids)] == ids
    log_probs = logits_of(model, whole).double().log_softmax(-1)
    return sum(float(log_probs[place - 1, whole[place]]) for place in range(len(ids), len(whole))
               ) / (len(whole) - len(ids))


def assert_rome(score: CaseScores, record: EditRecord, model: Any, tok: Any, front: list[int]) -> None:
    assert record.target_true is not None
    asked = {
        "efficacy": [(record.edit_prompt, record.target_new, record.target_true)],
        "generalization": [(text, record.target_new, record.target_true) for text in record.paraphrase_prompts],
        "specificity": [(one.text, one.target, record.target_new) for one in record.neighborhood_prompts],
    }
    for metric, questions in asked.items():
        values, magnitudes = getattr(score, f"{metric}_prompts"), getattr(score, f"{metric}_magnitudes")
        assert len(values) == len(magnitudes) == len(questions)
        for value, magnitude, (prompt, wanted, other) in zip(values, magnitudes, questions, strict=True):
            one = mean_log_prob(model, tok, front, prompt, wanted)
            two = mean_log_prob(model, tok, front, prompt, other)
            assert value == float(one > two) or abs(one - two) < 1e-4
            assert magnitude == pytest.approx(math.exp(one) - math.exp(two), abs=1e-5)
        mean = getattr(score, metric)
        assert mean == (pytest.approx(sum(values) / len(values)) if values else None)
    assert (score.case_id, score.protocol, score.dataset) == (record.case_id, "rome", record.dataset)


@pytest.mark.parametrize(("family", "kind"), [("llama", "plain"), ("qwen2", "both"), ("gpt2", "bos")])
def test_rome_equals_the_reimplementation(family: str, kind: str, tmp_path: Path) -> None:
    model, tok, front = built(family), tokenizer(kind), AROUND[kind][0]
    records = [record for record in mixed_records(model, tok, front, tmp_path) if record.dataset == "counterfact"]
    scores = evaluate_records(model, tok, records, "rome")
    for score, record in zip(scores, records, strict=True):
        assert_rome(score, record, model, tok, front)
    for metric in ("efficacy", "generalization", "specificity"):  # or the comparison says little
        assert {value for score in scores for value in getattr(score, f"{metric}_prompts")} == {0.0, 1.0}
        assert max(abs(value) for score in scores for value in getattr(score, f"{metric}_magnitudes")) > 0.003


def test_equal_targets_are_a_tie_and_no_success(llama: Any) -> None:
    record = replace(record_of(" is", "so"), target_true="so", neighborhood_prompts=(EvaluationPrompt("He is", "so"),))
    (score,) = evaluate_records(llama, tokenizer("plain"), [record], "rome")
    assert (score.efficacy, score.specificity) == (0.0, 0.0)
    assert score.efficacy_magnitudes == score.specificity_magnitudes == (0.0,)


def test_nan_logits_score_zero(llama: Any) -> None:
    broken = copy.deepcopy(llama)
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.nan)
    (score,) = evaluate_records(broken, tokenizer("plain"), load_records("demo", None, 1), "rome")
    assert (score.efficacy, score.specificity, score.efficacy_magnitudes) == (0.0, 0.0, (0.0,))
    assert CaseScores.from_dict(json.loads(json.dumps(score.to_dict(), allow_nan=False))) == score


def test_rome_refuses_what_has_no_true_target(llama: Any) -> None:
    zsre = replace(record_of(" is", "so", case_id=7), dataset="zsre")
    with pytest.raises(ValueError, match=r"case 7 \(zsre\) has no target_true.*use protocol paper or easyedit"):
        evaluate_records(llama, tokenizer("plain"), [zsre], "rome")


def test_log_probabilities_of_chosen_rows(llama: Any) -> None:
    rows = [TargetRow([5, 6, 7], [8, 9]), TargetRow([5, 6, 7], [10]), TargetRow([5, 6], [7, 8]), TargetRow([4], [3])]
    scores = score_rows(llama, rows, log_probs_for=[1, 2])
    plain = score_rows(llama, rows)
    assert [score.log_probs is None for score in scores] == [True, False, False, True]
    assert [(one.predicted, one.hits) for one in scores] == [(one.predicted, one.hits) for one in plain]
    for row, score in zip(rows, scores, strict=True):
        log_probs = logits_of(llama, row.prompt + row.target).log_softmax(-1)
        places = range(len(row.prompt) - 1, len(row.prompt) + len(row.target) - 1)
        assert list(score.predicted) == [int(log_probs[place].argmax()) for place in places]
        assert score.hits == tuple(one == other for one, other in zip(score.predicted, row.target, strict=True))
        if score.log_probs is not None:
            wanted = [float(log_probs[place, token]) for place, token in zip(places, row.target, strict=True)]
            assert list(score.log_probs) == pytest.approx(wanted, abs=1e-4)


# --- easyedit -----------------------------------------------------------------------------------------------


def easyedits_cut(tok: Any, prompts: list[str], targets: list[str]) -> list[tuple[list[int], int]]:
    """Tokens of each whole text and where its target begins, counted in left-padded batches."""
    padding = tok.eos_token_id if tok.pad_token_id is None else tok.pad_token_id
    wholes = [tok(prompt + " " + target).input_ids for prompt, target in zip(prompts, targets, strict=True)]
    alone = [tok(prompt).input_ids for prompt in prompts]
    cuts = []
    for whole, prompt in zip(wholes, alone, strict=True):
        padded = [padding] * (max(map(len, wholes)) - len(whole)) + whole
        padded_prompt = [padding] * (max(map(len, alone)) - len(prompt)) + prompt
        start = padded.count(padding) + sum(token != padding for token in padded_prompt)
        cuts.append((whole, start - (len(padded) - len(whole))))
    return cuts


def predicted_and_target(model: Any, whole: list[int], start: int) -> tuple[list[int], list[int]]:
    return logits_of(model, whole).argmax(-1).tolist()[start - 1: -1], whole[start:]


def share_equal(one: list[int], other: list[int]) -> float:
    assert len(one) == len(other)
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def slow_easyedit(model: Any, unedited: Any, tok: Any, record: EditRecord) -> dict[str, list[float]]:
    neighbours = [one.text.removesuffix("?") if record.dataset == "zsre" else one.text
                  for one in record.neighborhood_prompts]
    scores: dict[str, list[float]] = {"efficacy": [], "generalization": [], "specificity": []}
    for metric, prompts in (("efficacy", [record.edit_prompt]), ("generalization", record.paraphrase_prompts[:1])):
        for prompt in prompts:
            (cut,) = easyedits_cut(tok, [prompt], [record.target_new])
            scores[metric].append(share_equal(*predicted_and_target(model, *cut)))
    if neighbours:
        for cut in easyedits_cut(tok, neighbours, [one.target for one in record.neighborhood_prompts]):
            now, before = (predicted_and_target(one, *cut)[0] for one in (model, unedited))
            scores["specificity"].append(share_equal(now, before))
    return scores


@pytest.mark.parametrize(("family", "kind"), [*(("llama", kind) for kind in AROUND), ("qwen2", "bos"),
                                              ("gpt2", "plain")])
def test_easyedit_equals_the_reimplementation(family: str, kind: str, tmp_path: Path) -> None:
    model, tok, front = built(family), tokenizer(kind), AROUND[kind][0]
    changed = edited(model)
    records = mixed_records(changed, tok, front, tmp_path)
    before = {score.case_id: score for score in evaluate_records(model, tok, records, "easyedit")}
    assert {score.specificity for score in before.values()} <= {1.0, None}
    # Through a file, as a run that goes on has them.
    read = {case: CaseScores.from_dict(json.loads(json.dumps(score.to_dict()))) for case, score in before.items()}
    scores = evaluate_protocols(changed, tok, records, ["easyedit"], read)["easyedit"]
    for score, record in zip(scores, records, strict=True):
        for metric, values in slow_easyedit(changed, model, tok, record).items():
            assert list(getattr(score, f"{metric}_prompts")) == pytest.approx(values), (record.case_id, metric)
            assert getattr(score, metric) == (pytest.approx(sum(values) / len(values)) if values else None)
        assert (score.case_id, score.protocol, score.dataset) == (record.case_id, "easyedit", record.dataset)
    agreed = [value for score in scores for value in score.specificity_prompts]
    assert {0.0, 1.0} <= set(agreed) and any(0 < value < 1 for value in agreed)
    if not AROUND[kind][1]:  # a scored EOS is never predicted, so that no prompt has hits only
        hit = [value for score in scores for value in score.efficacy_prompts]
        assert {0.0, 1.0} <= set(hit) and any(0 < value < 1 for value in hit)


def test_padding_tokens_in_a_text_are_counted_as_easyedit_does(llama: Any) -> None:
    tok = tokenizer("both")
    tok.pad_token_id = tok(" so", add_special_tokens=False).input_ids[0]
    prompts, targets = ["He is so", "X"], ["so it goes so on", "and so on and so on"]
    cuts = easyedits_cut(tok, prompts, targets)
    assert cuts[0][1] != len(tok(prompts[0]).input_ids)  # or this tests nothing
    for prompt, target, cut in zip(prompts, targets, cuts, strict=True):
        record = replace(record_of("", target), subject=prompt)
        (score,) = evaluate_records(llama, tok, [record], "easyedit")
        assert score.efficacy == pytest.approx(share_equal(*predicted_and_target(llama, *cut)))


def test_unedited_scores_must_fit(llama: Any) -> None:
    tok = tokenizer("plain")
    records = load_records("demo", None, 3)
    before = {score.case_id: score for score in evaluate_records(llama, tok, records, "easyedit")}
    paper = {score.case_id: score for score in evaluate_records(llama, tok, records)}
    first = records[0].case_id
    shorter = {**before, first: replace(before[first], specificity_said=before[first].specificity_said[1:])}
    for unedited, message in (
        ({}, rf"case {first} \(demo\) is not among the 0 unedited scores: give the unedited model's"),
        (paper, "the unedited scores are of protocol paper"),
        (shorter, r"its neighbours' targets have \[.*\] tokens, in the unedited scores \["),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_protocols(llama, tok, records, ["easyedit"], unedited)


# --- several at once ----------------------------------------------------------------------------------------


def test_protocols_together_equal_each_alone_and_cost_less(llama: Any) -> None:
    tok = tokenizer("bos")
    records = load_records("demo", None, 12, seed=2)
    run: list[int] = []
    handle = llama.register_forward_pre_hook(
        lambda _module, _args, kwargs: run.append(kwargs["input_ids"].numel()), with_kwargs=True)
    seen: list[tuple[int, int]] = []
    try:
        together = evaluate_protocols(llama, tok, records, ALL, progress=lambda *done: seen.append(done))
        at_once = sum(run)
        run.clear()
        alone = {protocol: evaluate_records(llama, tok, records, protocol) for protocol in ALL}
    finally:
        handle.remove()
    assert at_once < 0.6 * sum(run)
    assert seen[-1][0] == seen[-1][1]
    assert list(together) == list(ALL)
    for protocol in ALL:
        for one, other in zip(together[protocol], alone[protocol], strict=True):
            magnitudes = [getattr(score, f"{metric}_magnitudes") for score in (one, other)
                          for metric in ("efficacy", "generalization", "specificity")]
            assert magnitudes[:3] == [pytest.approx(values, abs=1e-6) for values in magnitudes[3:]]
            none = {"efficacy_magnitudes": (), "generalization_magnitudes": (), "specificity_magnitudes": ()}
            assert replace(one, **none) == replace(other, **none)


def test_scores_survive_json(llama: Any) -> None:
    tok = tokenizer("plain")
    records = [replace(record, paraphrase_prompts=()) for record in load_records("demo", None, 2)]
    for protocol, scores in evaluate_protocols(llama, tok, records, ALL).items():
        for score in scores:
            written = score.to_dict()
            assert CaseScores.from_dict(json.loads(json.dumps(written))) == score
            assert CaseScores.from_dict(written) == score
            assert ("specificity_said" in written) == (protocol == "easyedit")
            assert ("efficacy_magnitudes" in written) == (protocol == "rome")
    with pytest.raises(ValueError, match="fields case_id, other are missing or unknown"):
        CaseScores.from_dict({**{key: value for key, value in written.items() if key != "case_id"}, "other": 1})


def test_summary_of_rome_has_magnitudes(llama: Any) -> None:
    scores = evaluate_records(llama, tokenizer("plain"), load_records("demo", None, 5), "rome")
    summary = summarise(scores)
    assert list(summary) == ["efficacy", "generalization", "specificity", "efficacy_magnitude",
                             "generalization_magnitude", "specificity_magnitude"]
    wanted = [100 * sum(score.specificity_magnitudes) / len(score.specificity_magnitudes) for score in scores]
    assert summary["specificity_magnitude"]["mean"] == pytest.approx(sum(wanted) / 5)
    assert summary["specificity_magnitude"]["n"] == 5
