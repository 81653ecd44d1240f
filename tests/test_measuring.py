"""What a run measures on its way, and again afterwards from the weights that it kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_hparams, tiny_model
from transformers import PreTrainedTokenizerBase

from sphere_easyedit.evaluation.datasets import load_records
from sphere_easyedit.evaluation.measuring import AbilitySettings, MeasureSettings
from sphere_easyedit.evaluation.metrics import evaluate_records, summarise
from sphere_easyedit.evaluation.revisiting import EditedRun
from sphere_easyedit.evaluation.sequential import RunSettings, run_sequential
from sphere_easyedit.evaluation.text_quality import Decoding, TextQuality, fluency
from sphere_easyedit.fingerprints import model_fingerprint


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def facts_file(folder: Path) -> Path:
    """Six facts of a user's own, with generation prompts."""
    path = folder / "facts.jsonl"
    towns = ["Lund", "Bonn", "Pisa", "Cork", "Nice", "Gent"]
    path.write_text("".join(json.dumps({
        "prompt": "The mayor of {} is called", "subject": town, "target_new": name, "target_true": "Bob",
        "generation_prompts": [f"{town} is", f"In {town} one"]}) + "\n"
        for town, name in zip(towns, ["Ann", "Tom", "Eve", "Max", "Pia", "Leo"], strict=True)))
    return path


def test_text_is_measured_where_there_are_prompts(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Ann was the mayor of the town.\nTom and Eve lived in the town.\nMax was old.\n")
    records = load_records("facts", facts_file(tmp_path), 6, 0)
    measure = MeasureSettings(decoding=Decoding(8, seed=3), references=corpus, every=2, sample=2)
    result = run_sequential(tiny_model("llama"), tok, records, tiny_hparams(tmp_path, v_num_grad_steps=2),
                            RunSettings(tmp_path / "run", 2, measure=measure))
    run = tmp_path / "run"
    metrics = lines_of(run / "metrics.jsonl")
    assert [(line["when"], line["num_edits"]) for line in metrics] == [
        ("before", 0), ("during", 2), ("during", 4), ("after", 6)]
    texts = [TextQuality.from_dict(line) for line in lines_of(run / "texts" / "after-6.jsonl")]
    assert [text.case_id for text in texts] == [record.case_id for record in records]
    assert metrics[-1]["fluency"]["mean"] == pytest.approx(
        sum(fluency(said) for text in texts for said in text.texts) / 12)
    assert "top-5 seed 3, 8 new tokens" in metrics[-1]["fluency"]["protocol"]
    assert metrics[-1]["consistency"]["protocol"] == "corpus:corpus"
    assert metrics[-1]["consistency"]["n"] == 4  # Pia and Leo are not named in the corpus
    assert result.summary["post"]["fluency"] == metrics[-1]["fluency"]
    with pytest.raises(ValueError, match="decoding"):
        MeasureSettings(references=corpus)


def test_easyedits_protocol_in_a_run(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    records = load_records("demo", None, 4, 0)
    result = run_sequential(
        tiny_model("llama"), tok, records, tiny_hparams(tmp_path, v_num_grad_steps=4),
        RunSettings(tmp_path / "run", 2, measure=MeasureSettings(protocols=("easyedit", "rome"), every=2)))
    assert result.summary["protocol"] == "easyedit"
    assert result.summary["pre"]["specificity"]["mean"] == 100.0  # a model agrees with itself
    assert result.summary["post"]["specificity"]["mean"] < 100.0
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert {line["protocol"] for line in lines if line["when"] == "during"} == {"easyedit", "rome"}
    assert [line["seconds"] > 0 for line in lines] == [True, False] * 3  # both protocols were one measurement


def test_mixed_targets_of_zsre_are_refused(tmp_path: Path, tok: PreTrainedTokenizerBase, data_dir: Path) -> None:
    records = load_records("zsre", data_dir / "zsre_mend_eval.json", 2, 0)
    with pytest.raises(ValueError, match="alt"):
        run_sequential(tiny_model("llama"), tok, records, tiny_hparams(tmp_path),
                       RunSettings(tmp_path / "run", 2, measure=MeasureSettings(protocols=("paper", "easyedit"))))
    assert not (tmp_path / "run").exists()


def test_a_run_is_measured_again_from_its_weights(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    records = load_records("demo", None, 6, 5)
    described = {"dataset": "demo", "data": None, "seed": 5, "order_seed": None, "skip": 0}
    model = tiny_model("llama")
    run_sequential(model, tok, records, tiny_hparams(tmp_path, v_num_grad_steps=4),
                   RunSettings(tmp_path / "run", 2, described=described, keep_weights_every=4))
    edited = EditedRun(tmp_path / "run")
    assert edited.records == records
    again = tiny_model("llama")
    found = edited.measure(again, tok, [0, 4, 6], MeasureSettings(protocols=("rome",)))
    rome = {line["num_edits"]: line for line in found if line["protocol"] == "rome"}
    assert [rome[number]["when"] for number in (0, 4, 6)] == ["before", "during", "after"]
    assert rome[6]["specificity"] == summarise(evaluate_records(model, tok, records, protocol="rome"))["specificity"]
    assert rome[4]["cases"] == 4
    assert rome[4]["watched"]["update_norms"] != rome[6]["watched"]["update_norms"]
    assert rome[0]["watched"]["update_norms"] == {"1": 0.0, "2": 0.0}
    assert model_fingerprint(again) == model_fingerprint(model)
    scores = lines_of(tmp_path / "run" / "scores" / "after-6.jsonl")
    assert [line["protocol"] for line in scores] == ["paper"] * 6 + ["rome"] * 6  # none took another's place
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    edited.measure(tiny_model("llama"), tok, [6], MeasureSettings(protocols=("rome",)))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    with pytest.raises(ValueError, match="kept are 4, 6"):
        edited.measure(tiny_model("llama"), tok, [2], MeasureSettings())
    easyedit = edited.measure(tiny_model("llama"), tok, [4], MeasureSettings(protocols=("easyedit",)))
    specificity = {line["num_edits"]: line["specificity"]["mean"] for line in easyedit
                   if line["protocol"] == "easyedit"}
    assert specificity[0] == 100.0 > specificity[4]


def test_fingerprints_tell_models_apart() -> None:
    model = tiny_model("gpt2")
    before = model_fingerprint(model)
    assert before == model_fingerprint(tiny_model("gpt2"))
    with torch.no_grad():
        model.transformer.ln_f.bias[3] += 1e-3
    assert model_fingerprint(model) != before


def test_abilities_on_the_way(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("lm_eval")
    folder = tmp_path / "general"
    folder.mkdir()
    (folder / "boolq.jsonl").write_text("".join(json.dumps({
        "question": f"is the {noun} old", "passage": f"The {noun} is very old.", "answer": number % 2 == 0}) + "\n"
        for number, noun in enumerate(["mayor", "bridge", "church"])))
    records = load_records("demo", None, 4, 0)
    measure = MeasureSettings(before=False, after=False,
                              abilities=AbilitySettings(("boolq",), every=2, data=folder, limit=2))
    run_sequential(tiny_model("llama"), tok, records, tiny_hparams(tmp_path, v_num_grad_steps=2),
                   RunSettings(tmp_path / "run", 2, measure=measure))
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert [(line["when"], line["num_edits"]) for line in lines] == [("before", 0), ("during", 2), ("after", 4)]
    for line in lines:
        assert line["protocol"].startswith("lm-eval")
        assert line["abilities"]["boolq"]["n"] == 2
