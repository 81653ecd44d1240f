"""``sphere.run``: whole runs of a tiny model from Python, and what their results show."""

from __future__ import annotations

import gc
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.golden import GOLDEN
from helpers.models import edited_weights, tiny_hparams, tiny_model
from sphere_easyedit.callbacks.energy_metrics import EnergyRecord
from sphere_easyedit.datasets.from_python import records_from
from sphere_easyedit.datasets.loaders import load_facts, load_records
from sphere_easyedit.runs.result import RunResult
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.sequential import RunSettings, run_sequential

FACT = {"prompt": "The capital of France is", "subject": "France", "target_new": "Rome"}


@pytest.fixture(scope="module")
def hparams(llama_stats: Path) -> sphere.SPHEREHyperParams:
    return tiny_hparams(llama_stats, v_num_grad_steps=4)


@pytest.fixture(scope="module")
def result(hparams: sphere.SPHEREHyperParams, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run of five demo facts in batches of two."""
    tok = AutoTokenizer.from_pretrained(GOLDEN / "llama" / "tiny-llama")
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("He said that the capital of France is Paris. " * 10)
    return sphere.run(tiny_model("llama"), tok, load_records("demo", None, 5, 0), hparams, batch_size=2, eval_every=2,
                      text=text, examples=1, progress=False)


def test_a_run_is_that_of_run_sequential(hparams: sphere.SPHEREHyperParams, tok: PreTrainedTokenizerBase,
                                         tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts, ours, theirs = load_records("demo", None, 4, 0), tiny_model("llama"), tiny_model("llama")
    seen = sphere.HETracker()
    result = sphere.run(ours, tok, facts, hparams, tmp_path / "ours", batch_size=2, callbacks=[seen], examples=1,
                        protocol=("rome", "paper"))
    expected = run_sequential(theirs, tok, facts, hparams, RunSettings(
        tmp_path / "theirs", 2, 1, measure=MeasureSettings(("rome", "paper"))))
    assert result.summary["weights_sha256"] == expected.summary["weights_sha256"]
    assert (result.summary["protocols"], result.generations) == (expected.summary["protocols"], expected.generations)
    assert seen.records == result.tracker.records == expected.tracker.records
    assert json.loads((result.directory / "summary.json").read_text()) == result.summary
    assert result.directory == tmp_path / "ours"
    assert "4/4 edits" in capsys.readouterr().err


def test_without_output_the_run_directory_goes_with_the_result(
        hparams: sphere.SPHEREHyperParams, tok: PreTrainedTokenizerBase, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = tiny_model("llama")
    before = edited_weights(model, hparams)
    result = sphere.run(model, tok, [FACT], hparams, progress=False)
    assert result.directory.parent == tmp_path
    assert (result.directory / "summary.json").is_file()
    del result
    gc.collect()
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"holds 1 edits already: .*rollback\(0\)"):
        sphere.run(model, tok, [FACT], hparams, progress=False)
    assert not list(tmp_path.iterdir())
    sphere.EditSession.of(model).rollback(0)
    assert all(weight.equal(before[layer]) for layer, weight in edited_weights(model, hparams).items())
    assert sphere.run(model, tok, [FACT], hparams, eval_before=False, progress=False).summary["num_edits"] == 1


def test_a_run_resumes(hparams: sphere.SPHEREHyperParams, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    class Stops(sphere.EditCallback):
        def on_batch_end(self, event: sphere.EditEvent) -> None:
            if event.num_edits == 4:
                raise KeyboardInterrupt

    facts = load_records("demo", None, 4, 0)
    common: dict[str, Any] = {"batch_size": 2, "checkpoint_every": 2, "eval_before": False, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        sphere.run(tiny_model("llama"), tok, facts, hparams, tmp_path, callbacks=[Stops()], **common)
    result = sphere.run(tiny_model("llama"), tok, facts, hparams, tmp_path, resume=True, **common)
    assert [batch.num_edits for batch in result.run.batches] == [2, 4]
    again = sphere.run(tiny_model("llama"), tok, facts, hparams, tmp_path, resume=True, **common)
    assert again.frame().equals(result.frame())


def test_a_result_as_frame(result: RunResult) -> None:
    frame = result.frame()
    assert list(frame["num_edits"]) == [0, 2, 4, 5]
    assert list(frame["when"]) == ["before", "during", "during", "after"]
    after = result.summary["post"]["generalization"]
    last = frame.iloc[-1]
    assert (last["generalization"], [last["generalization_low"], last["generalization_high"]]) == (
        after["mean"], after["ci95"])
    assert last["perplexity"] == result.summary["watched"]["post"]["perplexity"]
    changes = result.tracker.records[-1].relative_change.values()
    assert last["energy_change"] == sum(changes) / 2
    assert not frame.isna().any().any()


def test_a_result_as_plot(result: RunResult, tmp_path: Path) -> None:
    metrics, energy, perplexity = result.plot().axes
    lines = {line.get_label(): line for line in metrics.lines}
    assert list(lines) == ["efficacy", "generalization", "specificity", "efficacy, batch just edited"]
    assert list(lines["specificity"].get_ydata()) == list(result.frame()["specificity"])
    assert list(energy.lines[-1].get_ydata()[1:]) == pytest.approx([
        sum(record.relative_change.values()) / 2 for record in result.tracker.records[1:]])
    assert list(perplexity.lines[0].get_xdata()) == [0, 2, 4, 5]
    result.plot().savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


class _Cells(HTMLParser):
    """The texts of a page's cells, and its tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_a_result_as_html_escapes_texts(result: RunResult) -> None:
    nasty = '<script>alert("&")</script>'
    shown = _Cells(replace(result, generations=[(nasty, " a", " b")])._repr_html_())
    assert nasty in shown.texts
    assert shown.tags == {"table", "caption", "thead", "tbody", "tr", "th", "td"}
    efficacy = shown.texts[shown.texts.index("efficacy"):][:3]
    assert efficacy == ["efficacy", f"{result.summary['pre']['efficacy']['mean']:.1f}",
                        f"{result.summary['post']['efficacy']['mean']:.1f}"]
    assert {"perplexity", "hyperspherical energy"} <= {*shown.texts}


def test_a_result_that_was_not_measured_shows_its_energy(hparams: sphere.SPHEREHyperParams,
                                                          tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    plain = run_sequential(tiny_model("llama"), tok, records_from([FACT]), hparams, RunSettings(
        tmp_path / "run", 1, measure=MeasureSettings(before=False, after=False)))
    assert (len(plain.frame()), *plain.frame().columns) == (0, "num_edits", "when", "protocol", "cases")
    assert len(plain.plot().axes) == 2
    assert "hyperspherical energy" in plain._repr_html_()


def test_a_tracker_as_frame_plot_and_html(tmp_path: Path) -> None:
    tracker = sphere.HETracker()
    with pytest.raises(ValueError, match="no records to plot"):
        tracker.plot()
    assert "no records yet" in tracker._repr_html_()
    tracker.records = [EnergyRecord(0, {4: 100.0, 5: 200.0}, {4: 0.0, 5: 0.0}),
                       EnergyRecord(10, {4: 101.0, 5: 198.0}, {4: 0.01, 5: -0.01})]
    tracker.to_csv(tmp_path / "energy.csv")
    header, *lines = (tmp_path / "energy.csv").read_text().splitlines()
    frame = tracker.frame()
    assert list(frame.columns) == header.split(",")
    assert frame.to_numpy().tolist() == [list(map(float, line.split(","))) for line in lines]
    (axes,) = tracker.plot().axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[0, 0.01], [0, -0.01], [0, 0]]
    assert [text for text in _Cells(tracker._repr_html_()).texts if "e-" in text] == ["+1.00e-02", "-1.00e-02"]


@pytest.mark.parametrize(("package", "method"), [("pandas", "frame"), ("matplotlib.pyplot", "plot")])
def test_a_missing_package_is_named_with_its_remedy(package: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker = sphere.HETracker()
    tracker.records = [EnergyRecord(0, {4: 100.0}, {4: 0.0})]
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=re.escape("pip install 'sphere-easyedit[notebook]'")) as caught:
        getattr(tracker, method)()
    assert "\n" not in str(caught.value)


def test_facts_are_read_from_files_and_dicts_of_both_kinds(tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    own = {**FACT, "target_true": "Paris", "paraphrases": ["France's capital is"],
           "neighbours": [{"prompt": "The capital of Spain is", "target": "Madrid"}]}
    file.write_text(json.dumps(own) + "\n")
    easyedit = {**FACT, "ground_truth": "Paris", "rephrase_prompt": "France's capital is",
                "locality": {"neighborhood": {"prompt": "The capital of Spain is", "ground_truth": "Madrid"}}}
    assert records_from(str(file)) == records_from([own]) == records_from(iter([easyedit])) == load_facts(file)
    demo = load_records("demo", None, 2, 0)
    assert records_from(demo) == demo


@pytest.mark.parametrize(("given", "message"), [
    (FACT, "records is a single dict: put it in a list"),
    (7, "records is of type int: give EditRecords, dicts"),
    ([], "records is empty"),
    ("facts.txt", "facts file facts.txt ends in '.txt'"),
    ("absent.csv", "absent.csv does not exist"),
    ([FACT, "France"], "records: record 1: found str 'France', expected an object"),
    ([{"prompt": "x", "subject": "France", "target_new": "Rome"}], "text that contains the subject 'France'"),
    ([{**FACT, "paraphrase": ["x"], "neighbours": []}], "field 'paraphrase'"),
    ([{**FACT, "case_id": 1}, {**FACT, "case_id": 1}], "case_id"),
    ([*load_records("demo", None, 1, 0), FACT], "mixes 1 EditRecords with 1 others"),
    (load_records("demo", None, 1, 0) * 2, r"twice: number the records anew, with dataclasses.replace"),
])
def test_wrong_facts_are_refused_on_one_line(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        records_from(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"batch_size": 0}, "batch_size is 0; give a whole number, at least 1"),
    ({"batch_size": "2"}, "batch_size is '2'; give a whole number"),
    ({"protocol": "papr"}, "protocol 'papr' is not known: choose one of paper"),
    ({"protocol": ("paper", "papr")}, "papr"),
    ({"protocol": ()}, "name at least one"),
    ({"eval_every": 0}, "every is 0"),
    ({"text": "absent.txt"}, "absent.txt"),
    ({"on_error": "ignore"}, "on_error is 'ignore'"),
    ({"resume": True}, "resume is set, but output is None"),
    ({"hparams": "AlphaEdit/smollm2-135n"}, "AlphaEdit/smollm2-135m"),
])
def test_wrong_arguments_are_refused_on_one_line(changes: dict[str, Any], message: str, tok: PreTrainedTokenizerBase,
                                                 hparams: sphere.SPHEREHyperParams) -> None:
    model = tiny_model("llama")
    before = edited_weights(model, hparams)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        sphere.run(model, tok, [FACT], progress=False, **{"hparams": hparams, **changes})
    assert "\n" not in str(caught.value)
    assert all(weight.equal(before[layer]) for layer, weight in edited_weights(model, hparams).items())
