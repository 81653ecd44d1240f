"""What a run measures on its way, and again afterwards from the weights that it kept."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers.golden import GOLDEN
from helpers.models import tiny_hparams, tiny_model
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.callbacks import EditCallback, EditEvent, StopEditing
from sphere_easyedit.evaluation.metrics import evaluate_records, summarise
from sphere_easyedit.evaluation.text_quality import Decoding, TextQuality, fluency
from sphere_easyedit.models.fingerprint import model_fingerprint
from sphere_easyedit.runs.measuring import Measurer
from sphere_easyedit.runs.reevaluation import EditedRun
from sphere_easyedit.runs.schedule import AbilitySettings, MeasureSettings
from sphere_easyedit.runs.sequential import RunSettings, run_sequential


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


def test_text_is_measured_again_as_on_the_way(tmp_path: Path, tok: PreTrainedTokenizerBase,
                                              caplog: pytest.LogCaptureFixture) -> None:
    """Fluency and consistency are added to lines that lack them, to the numbers that the run itself would have had."""
    corpus, path = tmp_path / "corpus.txt", facts_file(tmp_path)
    corpus.write_text("Ann was the mayor of the town.\nTom and Eve lived in the town.\n")
    described = {"dataset": "facts", "data": str(path), "seed": 0, "order_seed": None, "skip": 0}
    text = MeasureSettings(decoding=Decoding(8), references=corpus)
    for name, measure in (("with", text), ("without", MeasureSettings())):
        run_sequential(tiny_model("llama"), tok, load_records("facts", path, 6, 0),
                       tiny_hparams(tmp_path, v_num_grad_steps=2),
                       RunSettings(tmp_path / name, 6, described=described, measure=measure))
    EditedRun(tmp_path / "without").measure(tiny_model("llama"), tok, [6], MeasureSettings(decoding=Decoding(8)))
    added = lines_of(tmp_path / "without" / "metrics.jsonl")[-1]
    assert "fluency" in added and "consistency" not in added
    EditedRun(tmp_path / "without").measure(tiny_model("llama"), tok, [0], text)
    one, other = (lines_of(tmp_path / name / "metrics.jsonl") for name in ("with", "without"))
    assert one[0] | {"seconds": 0} == other[0] | {"seconds": 0}
    assert one[1]["fluency"] == other[1]["fluency"]
    caplog.clear()
    EditedRun(tmp_path / "without").measure(tiny_model("llama"), tok, [6], text)  # the texts there are without it
    consistent = lines_of(tmp_path / "without" / "metrics.jsonl")[-1]
    assert consistent == added | {"consistency": one[1]["consistency"]}
    assert "has paper after 6 edits already, which stays" in caplog.text
    found = EditedRun(tmp_path / "with").measure(tiny_model("llama"), tok, [6], MeasureSettings(
        protocols=("rome",), cases=2, decoding=Decoding(4)))
    assert (found[-1].metrics["fluency"].n, found[-1].cases) == (2, 2)
    assert "4 new tokens" in str(found[-1].metrics["fluency"].protocol)


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
    rome = {one.num_edits: one for one in found if one.protocol == "rome"}
    assert [rome[number].when for number in (0, 4, 6)] == ["before", "during", "after"]
    expected = summarise(evaluate_records(model, tok, records, protocol="rome"))["specificity"]
    assert rome[6].metrics["specificity"].to_dict() == expected
    assert rome[4].cases == 4
    assert rome[4].update_norms != rome[6].update_norms
    assert rome[0].update_norms == {1: 0.0, 2: 0.0}
    assert model_fingerprint(again) == model_fingerprint(model)
    scores = lines_of(tmp_path / "run" / "scores" / "after-6.jsonl")
    assert [line["protocol"] for line in scores] == ["paper"] * 6 + ["rome"] * 6  # none took another's place
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    edited.measure(tiny_model("llama"), tok, [6], MeasureSettings(protocols=("rome",)))
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    with pytest.raises(ValueError, match="kept are 4, 6"):
        edited.measure(tiny_model("llama"), tok, [2], MeasureSettings())
    easyedit = edited.measure(tiny_model("llama"), tok, [4], MeasureSettings(protocols=("easyedit",)))
    specificity = {one.num_edits: one.metrics["specificity"].mean for one in easyedit if one.protocol == "easyedit"}
    assert specificity[0] == 100.0 > specificity[4]


@pytest.fixture(scope="module")
def six_facts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six facts in batches of two, measured by `paper` before and after; weights after 4 and 6 are kept."""
    folder = tmp_path_factory.mktemp("six")
    run_sequential(tiny_model("llama"), AutoTokenizer.from_pretrained(GOLDEN / "llama" / "tiny-llama"),
                   load_records("demo", None, 6, 5), tiny_hparams(folder, v_num_grad_steps=2),
                   RunSettings(folder / "run", 2, described=DEMO, keep_weights_every=4))
    return folder / "run"


DEMO = {"dataset": "demo", "data": None, "seed": 5, "order_seed": None, "skip": 0}


@pytest.fixture
def run(six_facts: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(six_facts, tmp_path / "run"))


def test_perplexity_is_added_where_it_is_missing(run: Path, tmp_path: Path, tok: PreTrainedTokenizerBase,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "text.txt").write_text("Ann was the mayor of the town, and Tom was old.\n")
    before = lines_of(run / "metrics.jsonl")
    asked = MeasureSettings(protocols=("rome", "paper"), text=tmp_path / "text.txt")
    EditedRun(run).measure(tiny_model("llama"), tok, [6], asked)
    found = lines_of(run / "metrics.jsonl")
    assert [(line["num_edits"], line["protocol"]) for line in found] == [(0, "paper"), (6, "paper"), (6, "rome")]
    assert found[0] == before[0]
    assert before[1]["watched"].pop("perplexity") is None
    perplexity = found[1]["watched"].pop("perplexity")
    assert perplexity == found[2]["watched"]["perplexity"] > 1
    assert found[1] == before[1]
    whole = (run / "metrics.jsonl").read_text()
    EditedRun(run).measure(tiny_model("llama"), tok, [6], asked)
    assert (run / "metrics.jsonl").read_text() == whole
    assert "has paper, rome after 6 edits already, which stays" in caplog.text


def test_a_perplexity_that_is_there_stays_when_a_line_lacks_something_else(
        run: Path, tmp_path: Path, tok: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [tmp_path / name for name in ("one.txt", "other.txt")]
    texts[0].write_text("Ann was the mayor of the town, and Tom was old.\n")
    texts[1].write_text("In the town there is a house by the sea.\n")
    EditedRun(run).measure(tiny_model("llama"), tok, [6], MeasureSettings(text=texts[0]))
    before = lines_of(run / "metrics.jsonl")[1]
    monkeypatch.setattr(Measurer, "_lacks", lambda *_: True)  # as where fluency is missing
    EditedRun(run).measure(tiny_model("llama"), tok, [6], MeasureSettings(text=texts[1]))
    assert lines_of(run / "metrics.jsonl")[1] == before


def test_other_facts_than_those_measured_are_told(run: Path, tok: PreTrainedTokenizerBase,
                                                  caplog: pytest.LogCaptureFixture) -> None:
    for sample in (2, 3):
        assert not caplog.records
        EditedRun(run).measure(tiny_model("llama"), tok, [4], MeasureSettings(sample=sample))
    assert "paper after 4 edits already, which stays, whatever its settings were. Remove its line" in caplog.text
    assert [line["cases"] for line in lines_of(run / "metrics.jsonl")] == [6, 6, 2]


def test_protocol_easyedit_finds_what_it_compares_with(run: Path, tok: PreTrainedTokenizerBase) -> None:
    found = EditedRun(run).measure(tiny_model("llama"), tok, [6],
                                   MeasureSettings(protocols=("easyedit",), cases=3, sample=3))
    assert [(one.when, one.cases) for one in found if one.protocol == "easyedit"] == [
        ("before", 6), ("after", 3)]


class Stop(EditCallback):
    """Ends a run once four edits are in the model."""

    def on_batch_start(self, event: EditEvent) -> None:
        if event.num_edits == 4:
            raise StopEditing("enough")


def test_a_run_that_stopped_ends_where_it_did(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    run = tmp_path / "run"
    run_sequential(tiny_model("llama"), tok, load_records("demo", None, 6, 5), tiny_hparams(tmp_path,
                   v_num_grad_steps=2), RunSettings(run, 2, described=DEMO), [Stop()])
    found = EditedRun(run).measure(tiny_model("llama"), tok, [0, 4], MeasureSettings(protocols=("rome",)))
    assert [(one.when, one.num_edits, one.protocol, one.cases) for one in found] == [
        ("before", 0, "paper", 6), ("after", 4, "paper", 4), ("before", 0, "rome", 6), ("after", 4, "rome", 4)]


@pytest.mark.parametrize("content", ["[]", "{}", '{"num_edits": "6"}', '{"num_edits": 6, "skipped": [1]}',
                                     '{"num_edits": 6, "skipped": 1}'])
def test_a_damaged_summary_is_refused(run: Path, content: str) -> None:
    (run / "summary.json").write_text(content)
    with pytest.raises(ValueError, match=r"summary\.json is not a summary of a run"):
        EditedRun(run)


@pytest.mark.parametrize("line", [{}, {"watched": "x"}, {"abilities": 3}, {"fluency": "high", "num_edits": "6"}])
def test_damaged_measurements_are_refused(run: Path, tok: PreTrainedTokenizerBase, line: dict[str, Any]) -> None:
    whole = {"num_edits": 6, "when": "after", "protocol": "rome", "seconds": 1.0}
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps(whole | line if line else {}) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 3"):
        EditedRun(run).measure(tiny_model("llama"), tok, [6], MeasureSettings(protocols=("rome",)))


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


def test_abilities_that_are_there_are_told(run: Path, tmp_path: Path, tok: PreTrainedTokenizerBase,
                                           caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("lm_eval")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"num_edits": 6, "when": "after", "protocol": "lm-eval", "seconds": 1.0, "abilities": {
            "rte": {"mean": 5.0, "n": 9, "shots": 1, "protocol": "lm-eval 0"}}}) + "\n")
    (tmp_path / "rte.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": "entailment"}\n')
    EditedRun(run).measure(tiny_model("llama"), tok, [6], MeasureSettings(
        before=False, after=False, abilities=AbilitySettings(("rte",), data=tmp_path)))
    assert "rte after 6 edits already, which stays" in caplog.text


@pytest.mark.parametrize(("task", "message"), [
    ("nosuch", "no task 'nosuch'"), ("gsm8k", r"gsm8k\.jsonl does not exist"), ("rte", "lm_eval is missing")])
def test_abilities_that_can_not_be_measured_are_refused_at_once(
        task: str, message: str, tmp_path: Path, tok: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from sphere_easyedit.evaluation.abilities import harness

    monkeypatch.setattr(harness, "TaskManager", lambda: SimpleNamespace(all_tasks=["boolq"]))  # the real takes 20 s
    if task == "rte":
        (tmp_path / "rte.jsonl").write_text('{"sentence1": "a", "sentence2": "b", "label": "entailment"}\n')
        monkeypatch.delitem(sys.modules, harness.__name__)
        monkeypatch.setitem(sys.modules, "lm_eval", None)
    model = tiny_model("llama")
    before = model_fingerprint(model)
    with pytest.raises((ValueError, ImportError), match=message):
        run_sequential(model, tok, load_records("demo", None, 4, 0), tiny_hparams(tmp_path), RunSettings(
            tmp_path / "run", 2, measure=MeasureSettings(abilities=AbilitySettings((task,), data=tmp_path))))
    assert model_fingerprint(model) == before
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "stats").exists()  # nor was anything collected
