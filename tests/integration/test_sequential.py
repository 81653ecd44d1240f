"""The sequential run from records to run directory, on a tiny model."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from helpers.models import edited_weights, tiny_hparams, tiny_model
from sphere_easyedit import EditCallback, EditEvent, EditSession
from sphere_easyedit.callbacks.he_tracker import read_energy_csv
from sphere_easyedit.callbacks.neurons import NeuronRecord
from sphere_easyedit.callbacks.spaces import read_spaces_csv
from sphere_easyedit.datasets.loaders import EditRecord, load_records
from sphere_easyedit.editing.callbacks import MeasureEvent, RunState
from sphere_easyedit.evaluation.metrics import Protocol, evaluate_protocols, evaluate_records, summarise
from sphere_easyedit.models.tokenization import continuation_ids
from sphere_easyedit.runs import sequential
from sphere_easyedit.runs.directory import RunDirectory
from sphere_easyedit.runs.records import RunRecords, read_state
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.sequential import RunSettings, run_sequential


def _target_log_prob(model: torch.nn.Module, tok: PreTrainedTokenizerBase, records: list[EditRecord]) -> float:
    """Mean log probability of the targets' first tokens."""
    found = []
    for record in records:
        prompt, target = continuation_ids(tok, record.edit_prompt, " " + record.target_new)
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits
        found.append(float(logits[0, -1].log_softmax(-1)[target[0]]))
    return sum(found) / len(found)


def test_run_directory_holds_what_the_design_says(tmp_path: Path, llama_stats: Path,
                                                  tok: PreTrainedTokenizerBase) -> None:
    model, hparams = tiny_model("llama"), tiny_hparams(llama_stats, mom2_max_length=128)
    records = load_records("demo", None, 5, 0)
    before = summarise(evaluate_records(model, tok, records))
    likely_before = _target_log_prob(model, tok, records)
    phases: list[str] = []
    result = run_sequential(model, tok, records, hparams, RunSettings(tmp_path / "run", 2, examples=1),
                            progress=lambda what, done, total: phases.append(f"{what} {done}/{total}"))
    run = tmp_path / "run"

    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["hparams"] == hparams.to_dict()
    assert config["run"]["num_edits"] == 5
    assert config["versions"]["torch"] == torch.__version__

    batches = [json.loads(line) for line in (run / "edits.jsonl").read_text().splitlines()]
    assert [batch["num_edits"] for batch in batches] == [2, 4, 5]
    assert [case for batch in batches for case in batch["case_ids"]] == [record.case_id for record in records]
    assert all(norm > 0 for batch in batches for norm in batch["update_norms"].values())
    assert [len(batch["losses"]) for batch in batches] == [2, 2, 1]
    scores = evaluate_records(model, tok, records[4:])  # the last batch's facts, in the model that it left
    assert batches[-1]["efficacy"] == 100 * scores[0].efficacy
    assert [record.num_edits for record in read_spaces_csv(run / "spaces.csv")] == [2, 2, 4, 4, 5, 5]
    assert NeuronRecord.read(run / "neurons.safetensors").num_edits == 5

    energies = read_energy_csv(run / "energy.csv")
    assert [record.num_edits for record in energies] == [0, 2, 4, 5]
    assert energies == result.tracker.records

    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["when"], line["num_edits"], line["protocol"]) for line in metrics] == [
        ("before", 0, "paper"), ("after", 5, "paper")]

    summary = json.loads((run / "summary.json").read_text())
    assert summary == result.summary
    assert summary["pre"] == before
    assert summary["post"] == summarise(evaluate_records(model, tok, records))
    assert _target_log_prob(model, tok, records) > likely_before + 0.3  # nats; argmax is out of reach of a random model
    assert summary["num_edits"] == 5
    assert summary["protocol"] == "paper"
    assert min(summary["editing_seconds"], summary["evaluation_seconds"], summary["peak_memory_bytes"]) > 0

    cases = [json.loads(line) for line in (run / "cases.jsonl").read_text().splitlines()]
    assert [case["case_id"] for case in cases] == [record.case_id for record in records]
    assert cases[0]["generations"]["before"] == result.generations[0][1]
    assert "generations" not in cases[1]

    saved = load_file(run / "checkpoints" / "weights-5.safetensors")
    for layer, weight in edited_weights(model, hparams).items():
        assert torch.equal(saved[f"model.layers.{layer}.mlp.down_proj.weight"], weight)
    assert EditSession.load(run / "checkpoints" / "session-5.safetensors").num_edits == 5
    assert {phase.split()[0] for phase in phases} == {"before", "editing", "after"}
    assert "editing 5/5" in phases
    assert not list(run.rglob(".*"))  # no temporary file is left


class Observer(EditCallback):
    """Keeps what a run tells."""

    def __init__(self) -> None:
        self.events: list[MeasureEvent] = []
        self.ends: list[RunState] = []

    def on_measured(self, event: MeasureEvent) -> None:
        self.events.append(event)

    def on_run_end(self, run: RunState) -> None:
        self.ends.append(run)


def test_observers_get_what_the_files_hold(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    def run(observer: Observer) -> dict[str, Any]:
        return run_sequential(
            tiny_model("llama"), tok, load_records("demo", None, 5, 0), tiny_hparams(llama_stats, v_num_grad_steps=2),
            RunSettings(tmp_path / "run", 2, resume=True, measure=MeasureSettings(every=4)), [observer]).summary

    observer = Observer()
    summary = run(observer)
    batches = [event.batch for event in observer.events if event.batch is not None]
    points = [event.measurement for event in observer.events if event.measurement is not None]
    told = [(event.batch or event.measurement).num_edits for event in observer.events]  # type: ignore[union-attr]
    assert told == [0, 2, 4, 4, 5, 5]  # in the order in which it happened
    written = read_state(RunDirectory(tmp_path / "run"))
    assert (batches, points) == (written.batches, written.measurements)
    end, = observer.ends
    assert (end.batches, end.measurements, end.energy, end.spaces) == (
        written.batches, written.measurements, written.energy, written.spaces)
    assert end.config == written.config and end.summary is not None and end.summary.to_dict() == summary
    again = Observer()
    assert run(again) == summary
    assert again.events == [] and [state.summary for state in again.ends] == [end.summary]


def test_same_seed_same_bits(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    hparams = tiny_hparams(llama_stats, context_templates=None)
    weights = []
    for name in ("one", "two"):
        model = tiny_model("llama")
        run_sequential(model, tok, load_records("demo", None, 4, 3), hparams, RunSettings(tmp_path / name, 2))
        weights.append(edited_weights(model, hparams))
    for layer in hparams.layers:
        assert torch.equal(weights[0][layer], weights[1][layer])


@pytest.mark.parametrize("protocol", ["paper", "rome", "easyedit"])
def test_every_batch_tells_its_efficacy_and_stays_as_it_is(
    tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase, protocol: Protocol,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Watches(EditCallback):
        """Asks the model at the end of each batch, as the run will."""

        def on_batch_end(self, event: EditEvent) -> None:
            batch = records[event.num_edits - 2: event.num_edits]
            scores = evaluate_protocols(event.model, tok, batch, [protocol], unedited)[protocol]
            found.append(50 * sum(score.efficacy or 0.0 for score in scores))

    model, hparams, found = tiny_model("llama"), tiny_hparams(llama_stats, v_num_grad_steps=1), list[float]()
    drawn = load_records("demo", None, 40, 0)
    with torch.no_grad():
        said = [tok.decode(model(torch.tensor([tok(record.edit_prompt)["input_ids"]])).logits[0, -1].argmax())
                for record in drawn]
    # Some say already what is wanted, since argmax is out of reach of a random model's edits.
    known = [replace(record, target_new=text[1:]) for record, text in zip(drawn, said, strict=True)
             if text[:1] == " " and text[1:].isalnum()][:3]
    records = [*known, *[record for record in drawn if record.case_id not in {one.case_id for one in known}][:1]]
    measure = MeasureSettings(protocols=(protocol,))
    unedited = {score.case_id: score for score in evaluate_records(tiny_model("llama"), tok, records, protocol)}
    run_sequential(tiny_model("llama"), tok, records, hparams, RunSettings(tmp_path / "one", 2, measure=measure),
                   callbacks=[Watches()])
    assert [batch.efficacy for batch in RunRecords.read(tmp_path / "one").batches] == found
    checksum = json.loads((tmp_path / "one" / "summary.json").read_text())["weights_sha256"]

    def refused(*_: object) -> float:
        raise ValueError("the protocol does not fit")

    monkeypatch.setattr(sequential, "edit_efficacy", refused)
    unasked = run_sequential(tiny_model("llama"), tok, records, hparams,
                             RunSettings(tmp_path / "two", 2, measure=measure))
    assert [batch.efficacy for batch in RunRecords.read(tmp_path / "two").batches] == [None, None]
    assert unasked.summary["weights_sha256"] == checksum


def test_watching_does_not_count_as_editing(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> None:
        time.sleep(2)

    monkeypatch.setattr(sequential, "edit_efficacy", slow)
    started = time.perf_counter()
    result = run_sequential(tiny_model("llama"), tok, load_records("demo", None, 2, 0),
                            tiny_hparams(llama_stats, v_num_grad_steps=1), RunSettings(tmp_path / "run", 2))
    assert result.summary["editing_seconds"] < time.perf_counter() - started - 2


def test_refuses_a_directory_in_use(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        run_sequential(tiny_model("llama"), tok, load_records("demo", None, 2, 0), tiny_hparams(llama_stats),
                       RunSettings(tmp_path / "run", 2))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_refuses_an_impossible_batch_size(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase,
                                          batch_size: int) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        run_sequential(tiny_model("llama"), tok, load_records("demo", None, 2, 0), tiny_hparams(llama_stats),
                       RunSettings(tmp_path / "run", batch_size))
    assert not (tmp_path / "run").exists()


def test_a_failed_batch_leaves_the_batches_before_it(tmp_path: Path, llama_stats: Path,
                                                     tok: PreTrainedTokenizerBase) -> None:
    class FailsInSecondBatch(EditCallback):
        def on_batch_end(self, event: EditEvent) -> None:
            if event.num_batches == 1:
                after_first.update({layer: weight.clone() for layer, weight in event.weights.items()})
            else:
                raise RuntimeError("as planned")

    after_first: dict[int, torch.Tensor] = {}
    model, hparams, run = tiny_model("llama"), tiny_hparams(llama_stats), tmp_path / "run"
    with pytest.raises(RuntimeError, match="as planned"):
        run_sequential(model, tok, load_records("demo", None, 4, 0), hparams, RunSettings(run, 2, checkpoint_every=2),
                       callbacks=[FailsInSecondBatch()])
    saved = load_file(run / "checkpoints" / "weights-2.safetensors")
    for layer, weight in edited_weights(model, hparams).items():
        assert torch.equal(weight, after_first[layer])
        assert torch.equal(weight, saved[f"model.layers.{layer}.mlp.down_proj.weight"])
    assert [json.loads(line)["num_edits"] for line in (run / "edits.jsonl").read_text().splitlines()] == [2]
    assert [record.num_edits for record in read_energy_csv(run / "energy.csv")] == [0, 2]
    assert not (run / "summary.json").exists()


def test_bad_records_are_refused_before_anything_is_written(tmp_path: Path, llama_stats: Path,
                                                            tok: PreTrainedTokenizerBase) -> None:
    records = load_records("demo", None, 3, 0)
    too_long = replace(records[2], prompt="so " * 200 + "{} is")
    with pytest.raises(ValueError, match="context"):
        run_sequential(tiny_model("llama"), tok, [*records[:2], too_long], tiny_hparams(llama_stats),
                       RunSettings(tmp_path / "run", 2))
    assert not (tmp_path / "run").exists()


def test_a_model_with_edits_is_refused(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    model, hparams, records = tiny_model("llama"), tiny_hparams(llama_stats), load_records("demo", None, 4, 0)
    run_sequential(model, tok, records[:2], hparams, RunSettings(tmp_path / "one", 2))
    with pytest.raises(ValueError, match="holds 2 edits"):
        run_sequential(model, tok, records[2:], hparams, RunSettings(tmp_path / "two", 2))
