"""Protocol `paper` against a plain reimplementation: one prompt at a time, full forward passes."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, normalizers
from tokenizers.models import Unigram
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers.metric_records import (
    AROUND,
    FOLDERS,
    mixed_records,
    model,  # noqa: F401 - a fixture
    record_of,
    tokenizer,
)
from helpers.models import tiny_model
from sphere_easyedit.datasets.loaders import (
    EditRecord,
    EvaluationPrompt,
    load_records,
)
from sphere_easyedit.evaluation import teacher_forcing
from sphere_easyedit.evaluation.bootstrap import bootstrap_interval
from sphere_easyedit.evaluation.generation import generate_continuations
from sphere_easyedit.evaluation.metrics import CaseScores, evaluate_records, summarise
from sphere_easyedit.models.tokenization import continuation_ids, continuation_ids_batch, leading_special_ids


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads slow models this small down, a hundredfold on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def llama() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDERS["llama"]).train(False)


# --- the reimplementation -----------------------------------------------------------------------------------


def target_hits(model: Any, tok: Any, front: list[int], prompt: str, target: str) -> list[bool]:
    prompt_ids = tok(prompt, add_special_tokens=False).input_ids
    whole = tok(prompt + " " + target, add_special_tokens=False).input_ids
    assert whole[: len(prompt_ids)] == prompt_ids
    with torch.no_grad():
        logits = model(torch.tensor([front + whole])).logits[0]
    hits = []
    for place in range(len(prompt_ids), len(whole)):
        hits.append(int(logits[len(front) + place - 1].argmax()) == whole[place])
    return hits


def slow_scores(model: Any, tok: Any, front: list[int], record: EditRecord) -> dict[str, list[float]]:
    pairs = {
        "efficacy": [(record.prompt.replace("{}", record.subject), record.target_new)],
        "generalization": [(text, record.target_new) for text in record.paraphrase_prompts],
        "specificity": [(prompt.text, prompt.target) for prompt in record.neighborhood_prompts],
    }
    scores: dict[str, list[float]] = {}
    for metric, questions in pairs.items():
        scores[metric] = []
        for prompt, target in questions:
            hits = target_hits(model, tok, front, prompt, target)
            if record.dataset == "zsre":
                scores[metric].append(hits.count(True) / len(hits))
            else:
                scores[metric].append(0.0 if False in hits else 1.0)
    return scores


def assert_equal_to_slow(scores: list[CaseScores], records: list[EditRecord], model: Any, tok: Any,
                         front: list[int]) -> None:
    assert [score.case_id for score in scores] == [record.case_id for record in records]
    for score, record in zip(scores, records, strict=True):
        expected = slow_scores(model, tok, front, record)
        for metric, values in expected.items():
            found = list(getattr(score, f"{metric}_prompts"))
            assert found == pytest.approx(values), (record.case_id, metric)
            mean = getattr(score, metric)
            assert mean == (pytest.approx(sum(values) / len(values)) if values else None)
        assert (score.protocol, score.dataset) == ("paper", record.dataset)


# --- records with targets that the model predicts -----------------------------------------------------------


# --- the metrics --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(AROUND))
def test_equals_the_reimplementation(model: Any, kind: str, tmp_path: Path) -> None:
    tok, front = tokenizer(kind), AROUND[kind][0]
    records = mixed_records(model, tok, front, tmp_path)
    scores = evaluate_records(model, tok, records)
    assert_equal_to_slow(scores, records, model, tok, front)
    # Hits, misses and fractions must all occur.
    for dataset in ("counterfact", "zsre"):
        prompts = {
            metric: [value for score in scores if score.dataset == dataset
                     for value in getattr(score, f"{metric}_prompts")]
            for metric in ("efficacy", "generalization", "specificity")
        }
        if dataset == "counterfact":
            assert all(set(values) == {0.0, 1.0} for values in prompts.values())
        else:
            for metric in ("efficacy", "specificity"):
                assert {0.0, 1.0} <= set(prompts[metric])
                assert any(0 < value < 1 for value in prompts[metric])
    lengths = [len(continuation_ids(tok, r.edit_prompt, " " + r.target_new)[1]) for r in records]
    assert max(lengths) > 2 and min(lengths) >= 1
    assert scores[0].generalization is None and scores[1].generalization is not None


def test_batching_changes_nothing(model: Any, tmp_path: Path) -> None:
    tok = tokenizer("bos")
    records = mixed_records(model, tok, [0], tmp_path)
    alone = evaluate_records(model, tok, records, token_budget=1)
    assert evaluate_records(model, tok, records, token_budget=8192) == alone
    assert evaluate_records(model, tok, records, token_budget=100) == alone
    backwards = evaluate_records(model, tok, records[::-1], token_budget=300)
    assert backwards[::-1] == alone


def test_dropout_is_off() -> None:
    model, tok = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5), tokenizer("plain")
    records = load_records("demo", None, 3)
    expected = evaluate_records(model, tok, records, "rome")
    model.train()
    assert not torch.equal(*(model(torch.tensor([[5, 6, 7]])).logits for _ in range(2)))
    assert evaluate_records(model, tok, records, "rome") == expected
    assert model.training


@pytest.fixture
def watched(llama: Any) -> Iterator[tuple[Any, list[torch.Size]]]:
    """A model and the shapes of the inputs that it was run on."""
    shapes: list[torch.Size] = []

    def note(_module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        shapes.append(kwargs["input_ids"].shape)

    handle = llama.register_forward_pre_hook(note, with_kwargs=True)
    yield llama, shapes
    handle.remove()


@pytest.mark.parametrize("packed", [True, False])
def test_equal_rows_run_once_within_the_budget(packed: bool, watched: tuple[Any, list[torch.Size]],
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    model, shapes = watched
    monkeypatch.setattr(teacher_forcing, "_packing_is_exact", lambda *_: packed)
    tok = tokenizer("plain")
    # Long prompts, so that tokens and not logits make the batches.
    once = load_records("demo", None, 20, seed=1)
    records = [
        replace(
            record,
            prompt="The following is known to be true: " * (1 + record.case_id % 3) + record.prompt,
            paraphrase_prompts=tuple((text + " ") * 3 + text for text in record.paraphrase_prompts),
            neighborhood_prompts=tuple(
                replace(prompt, text=(prompt.text + ", and ") * 4 + prompt.text)
                for prompt in record.neighborhood_prompts
            ),
        )
        for record in once
    ]
    twins = [replace(record, case_id=1000 + record.case_id) for record in records]
    pairs = {
        pair
        for record in records
        for pair in [(record.edit_prompt, record.target_new)]
        + [(text, record.target_new) for text in record.paraphrase_prompts]
        + [(prompt.text, prompt.target) for prompt in record.neighborhood_prompts]
    }
    seen: list[tuple[int, int]] = []
    scores = evaluate_records(model, tok, records + twins, token_budget=500,
                              progress=lambda done, total: seen.append((done, total)))
    assert all(shape.numel() <= 500 for shape in shapes)
    assert sum(shape.numel() for shape in shapes) > 0.6 * 500 * len(shapes)  # batches are well filled
    ids = [continuation_ids(tok, text, " " + target) for text, target in pairs]
    whole = [tuple(prompt + target[:-1]) for prompt, target in ids]
    if packed:  # prefixes that several pairs share run about once
        assert all(shape[0] == 1 for shape in shapes)
        distinct = {row[:length] for row in whole for length in range(1, len(row) + 1)}
        assert len(distinct) <= sum(shape.numel() for shape in shapes) < sum(map(len, whole))
    else:
        assert sum(shape[0] for shape in shapes) == len(pairs)
        assert [shape[1] for shape in shapes] == sorted((shape[1] for shape in shapes), reverse=True)
    assert len(seen) == len(shapes) and seen[-1] == (len(pairs), len(pairs))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    without_ids = [replace(score, case_id=0) for score in scores]
    assert without_ids[:20] == without_ids[20:]


def test_logits_are_bounded_too(llama: Any) -> None:
    rows: list[int] = []
    handle = llama.lm_head.register_forward_hook(lambda _m, _a, out: rows.append(out.shape[1]))
    try:
        evaluate_records(llama, tokenizer("plain"), load_records("demo", None, 40, seed=1), token_budget=400)
    finally:
        handle.remove()
    assert 50 < max(rows) <= 100  # a quarter of the budget


def test_model_and_tokenizer_stay_as_they_are(llama: Any) -> None:
    tok, model = tokenizer("bos"), copy.deepcopy(llama)
    tok.pad_token = None
    tok.padding_side = "right"
    model.train()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    settings = repr(tok)
    evaluate_records(model, tok, load_records("demo", None, 3))
    generate_continuations(model, tok, ["The mother tongue", "A", "Who is here today?"], 4)
    assert (tok.pad_token, tok.padding_side, repr(tok)) == (None, "right", settings)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_prompt_over_the_context_names_the_case(model: Any) -> None:
    tok = tokenizer("plain")
    assert model.config.max_position_embeddings == 256
    fitting = record_of(" a" * 255, "is")
    assert [len(ids) for ids in continuation_ids(tok, fitting.edit_prompt, " is")] == [256, 1]
    (score,) = evaluate_records(model, tok, [fitting])  # the target's last token is never fed
    assert score.specificity is None
    fine = record_of(" a", "is", case_id=1)
    with pytest.raises(ValueError, match=r"case 31 \(demo\), efficacy prompt .*257 tokens.*context is 256"):
        evaluate_records(model, tok, [fine, record_of(" a" * 256, "is")])
    neighbour = replace(fine, case_id=32, neighborhood_prompts=(EvaluationPrompt(" a" * 300, "is"),))
    with pytest.raises(ValueError, match=r"case 32 \(demo\), specificity prompt"):
        evaluate_records(model, tok, [neighbour])


def test_target_of_nothing_is_refused(llama: Any) -> None:
    tok = tokenizer("plain")
    for target in ("", "  "):
        with pytest.raises(ValueError, match=r"case 31 \(demo\), efficacy prompt .* has no tokens"):
            evaluate_records(llama, tok, [record_of(" is", target)])
    tok.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace("\u00f8", ""), normalizers.Strip(left=False, right=True)]
    )
    with pytest.raises(ValueError, match="target '\u00f8' has no tokens"):
        evaluate_records(llama, tok, [record_of(" is", "\u00f8")])
    empty = replace(record_of(" is", "so"), neighborhood_prompts=(EvaluationPrompt("\u00f8", "so"),))
    with pytest.raises(ValueError, match="specificity prompt .* the prompt has no tokens"):
        evaluate_records(llama, tok, [empty])


def test_wrong_arguments(llama: Any) -> None:
    tok, record = tokenizer("plain"), record_of(" is", "so")
    unknown: Any = "papier"
    with pytest.raises(ValueError, match="protocol 'papier' is not known: choose one of paper"):
        evaluate_records(llama, tok, [record], protocol=unknown)
    with pytest.raises(ValueError, match="token_budget is 0"):
        evaluate_records(llama, tok, [record], token_budget=0)
    assert evaluate_records(llama, tok, []) == []


# --- where the target's tokens begin ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(AROUND))
def test_continuation_ids(kind: str) -> None:
    tok, (front, _) = tokenizer(kind), AROUND[kind]

    def plain_ids(text: str) -> list[int]:
        ids: list[int] = tok(text, add_special_tokens=False).input_ids
        return ids

    prompt, target = "The mother tongue of", " Danielle Darrieux"
    ids = continuation_ids(tok, prompt, target)
    assert ids == (front + plain_ids(prompt), plain_ids(prompt + target)[len(plain_ids(prompt)) :])
    assert 0 not in ids[1] and len(ids[1]) > 1
    assert tok.decode(ids[1]) == target
    spaced = continuation_ids(tok, prompt + " ", target)
    assert spaced == (front + plain_ids(prompt + " "), plain_ids(prompt + " " + target)[len(plain_ids(prompt + " ")) :])
    assert len(spaced[0]) == len(ids[0]) + 1
    assert continuation_ids(tok, "", "The") == (front, plain_ids("The"))
    assert continuation_ids(tok, prompt, "") == (front + plain_ids(prompt), [])
    assert leading_special_ids(tok) == front
    pairs = [(prompt, target), ("A", " b"), (prompt, " French")]
    batch = continuation_ids_batch(tok, [p for p, _ in pairs], [c for _, c in pairs])
    assert batch == [continuation_ids(tok, p, c) for p, c in pairs]
    with pytest.raises(ValueError, match="2 prompts but 1 continuations"):
        continuation_ids_batch(tok, ["a", "b"], ["c"])


@pytest.mark.parametrize("kind", list(AROUND))
def test_tokens_merged_across_the_seam(kind: str) -> None:
    tok, (front, _) = tokenizer(kind), AROUND[kind]
    prompt, rest = "The moth", "er tongue"
    whole = tok(prompt + rest, add_special_tokens=False).input_ids
    own = tok(prompt, add_special_tokens=False).input_ids
    assert whole[: len(own)] != own  # or this tests nothing
    expected = tok(rest, add_special_tokens=False).input_ids
    assert continuation_ids(tok, prompt, rest) == (front + own, expected)


def test_a_tokenizers_own_space_is_no_target_token() -> None:
    # As Llama 2's: a space before any text, and pieces that span words.
    pieces = ["<unk>", "\u2581", "\u2581New", "\u2581York", "\u2581New\u2581York", "s"]
    scored = [(piece, -10.0 if index < 2 else -1.0) for index, piece in enumerate(pieces)]
    backend = Tokenizer(Unigram(scored, 0))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    make: Any = PreTrainedTokenizerFast
    tok = make(tokenizer_object=backend, unk_token="<unk>")
    assert tok("New York").input_ids == [4] and tok(" York").input_ids == [1, 3]
    assert continuation_ids(tok, "New", " York") == ([2], [3])
    assert continuation_ids(tok, "York", " New") == ([3], [2])


# --- summary ------------------------------------------------------------------------------------------------


def score_of(
    case_id: int, efficacy: float, specificity: float | None = None, protocol: str = "paper"
) -> CaseScores:
    return CaseScores(case_id, "demo", protocol, efficacy, None, specificity, (efficacy,), (), ())


def test_summary_means_and_missing_metrics() -> None:
    values = [(1.0, 0.25), (0.0, None), (0.5, 0.75), (1.0, 0.5)]
    summary = summarise([score_of(index, *value) for index, value in enumerate(values)])
    assert summary["efficacy"]["mean"] == pytest.approx(62.5) and summary["efficacy"]["n"] == 4
    assert summary["specificity"]["mean"] == pytest.approx(50.0) and summary["specificity"]["n"] == 3
    assert summary["generalization"] == {"mean": None, "ci95": None, "n": 0}
    assert list(summary) == ["efficacy", "generalization", "specificity"]
    json.dumps(summary)  # goes into summary.json as it is


def test_bootstrap_interval() -> None:
    scores = [score_of(index, float(index % 10 < 3)) for index in range(400)]
    assert summarise(scores, seed=4) == summarise(scores, seed=4)
    assert summarise(scores, seed=4) != summarise(scores, seed=5)
    summary = summarise(scores, resamples=4000)
    interval = summary["efficacy"]["ci95"]
    assert interval is not None
    half = 1.96 * 100 * (0.3 * 0.7 / 400) ** 0.5
    assert interval[0] == pytest.approx(30 - half, abs=0.5)
    assert interval[1] == pytest.approx(30 + half, abs=0.5)
    fewer = summarise(scores[:40])["efficacy"]["ci95"]
    assert fewer is not None and fewer[1] - fewer[0] > 2 * (interval[1] - interval[0])
    assert summarise([score_of(0, 1.0)])["efficacy"] == {"mean": 100.0, "ci95": [100.0, 100.0], "n": 1}


@pytest.mark.parametrize("cases", [1, 7, 3000])
def test_interval_is_that_of_one_resample_at_a_time(cases: int) -> None:
    values = np.random.default_rng(5).random(cases)
    generator = np.random.default_rng(3)
    means = [values[generator.integers(0, cases, cases)].mean() for _ in range(250)]
    assert bootstrap_interval(values, 3, 250) == tuple(np.percentile(means, [2.5, 97.5]))


def test_summary_refuses() -> None:
    with pytest.raises(ValueError, match="no scores"):
        summarise([])
    with pytest.raises(ValueError, match="protocols other, paper"):
        summarise([score_of(0, 1.0), score_of(1, 1.0, protocol="other")])
    with pytest.raises(ValueError, match="resamples is 0"):
        summarise([score_of(0, 1.0)], resamples=0)
