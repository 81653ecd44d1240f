"""One case of a run, said by three models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers.models import edited_weights, tiny_hparams, tiny_model
from helpers.paths import TESTS
from sphere_easyedit.analysis import case_study
from sphere_easyedit.analysis.case_study import choose_case, study_case
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.checkpoints import load_weights
from sphere_easyedit.evaluation.generation import generate_continuations
from sphere_easyedit.runs.reevaluation import EditedRun
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.sequential import RunSettings, run_sequential


@pytest.fixture(scope="module")
def run_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four facts of the demo set, edited in batches of two; all weights kept."""
    folder = tmp_path_factory.mktemp("study")
    tok = AutoTokenizer.from_pretrained(TESTS / "golden" / "llama" / "tiny-llama")
    described = {"dataset": "demo", "data": None, "seed": 0}
    run_sequential(tiny_model("llama"), tok, load_records("demo", None, 4, 0), tiny_hparams(folder),
                   RunSettings(folder / "run", 2, described=described, measure=MeasureSettings(),
                               keep_weights_every=2))
    return folder / "run"


def test_three_models_speak(run_path: Path, tok: PreTrainedTokenizerBase) -> None:
    run, model = EditedRun(run_path), tiny_model("llama")
    record = run.records[1]
    before = edited_weights(model, run.hparams)
    place, num_edits = choose_case(run, str(record.case_id))
    assert (place, num_edits) == (1, 4)
    study = study_case(run, model, tok, place, num_edits, max_new_tokens=8)
    assert (study.number, study.total, study.is_edited) == (2, 4, True)
    assert [(one.kind, one.prompt) for one in study.continuations] == [
        ("edit", record.edit_prompt), *(("paraphrase", text) for text in record.paraphrase_prompts[:2]),
        ("neighborhood", record.neighborhood_prompts[0].text), ("generation", record.generation_prompts[0])]

    prompts = [one.prompt for one in study.continuations]
    unedited = generate_continuations(tiny_model("llama"), tok, prompts, 8)
    other = tiny_model("llama")
    load_weights(run.hparams.editable(other), run.directory.checkpoints, 4)
    assert [one.unedited for one in study.continuations] == unedited
    assert [one.edited for one in study.continuations] == generate_continuations(other, tok, prompts, 8) != unedited
    assert [one.rolled_back for one in study.continuations] == unedited
    assert study.restored
    for layer, weight in edited_weights(model, run.hparams).items():
        assert torch.equal(weight, before[layer])
    line = run.directory.lines("cases.jsonl")[1]
    assert study.scores == {"pre": line["pre"], "post": line["post"]}
    assert study.to_dict()["is_edited"] is True


def test_earlier_weights_do_not_hold_the_fact_yet(run_path: Path, tok: PreTrainedTokenizerBase) -> None:
    run = EditedRun(run_path)
    place, num_edits = choose_case(run, str(run.records[3].case_id), at=2)
    study = study_case(run, tiny_model("llama"), tok, place, num_edits, max_new_tokens=2)
    assert (study.number, study.num_edits, study.is_edited) == (4, 2, False)


def test_a_record_with_one_prompt_alone(run_path: Path, tok: PreTrainedTokenizerBase) -> None:
    run = EditedRun(run_path)
    run.records[0] = replace(run.records[0], case_id="mayor-of-bonn", paraphrase_prompts=(), neighborhood_prompts=(),
                             generation_prompts=(), target_true=None)
    study = study_case(run, tiny_model("llama"), tok, *choose_case(run, "mayor-of-bonn"), max_new_tokens=2)
    assert [one.kind for one in study.continuations] == ["edit"]
    assert study.scores is None


def test_bits_that_are_not_back_are_told(run_path: Path, tok: PreTrainedTokenizerBase,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    run, model = EditedRun(run_path), tiny_model("llama")
    checksum = case_study.weights_checksum
    seen = []

    def changed(editable: object) -> str:
        if seen:
            with torch.no_grad():
                edited_parameter = run.hparams.editable(model).parameter(1)
                edited_parameter[0, 0] = torch.nextafter(edited_parameter[0, 0], torch.tensor(torch.inf))
        seen.append(True)
        return checksum(run.hparams.editable(model))

    monkeypatch.setattr(case_study, "weights_checksum", changed)
    assert not study_case(run, model, tok, 0, 4, max_new_tokens=1).restored


def test_weights_are_back_after_an_error(run_path: Path, tok: PreTrainedTokenizerBase,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    run, model = EditedRun(run_path), tiny_model("llama")
    before = edited_weights(model, run.hparams)
    calls = []

    def failing(*arguments: object) -> list[str]:
        calls.append(arguments)
        if len(calls) == 2:
            raise MemoryError
        return [""] * 5

    monkeypatch.setattr(case_study, "generate_continuations", failing)
    with pytest.raises(MemoryError):
        study_case(run, model, tok, 0, 4)
    for layer, weight in edited_weights(model, run.hparams).items():
        assert torch.equal(weight, before[layer])


def test_unknown_cases_and_weights_are_refused(run_path: Path) -> None:
    run = EditedRun(run_path)
    numbers = [5, 90, 700, 21000]
    run.records = [replace(record, case_id=number) for record, number in zip(run.records, numbers, strict=True)]
    with pytest.raises(ValueError, match="no case 600: nearest are 5, 90, 700, of 4 from 5 to 21000"):
        choose_case(run, "600")
    with pytest.raises(ValueError, match="no weights after 3 edits: kept are 2, 4; .*--keep-weights-every"):
        choose_case(run, "90", at=3)
    subject = run.records[1].subject
    assert choose_case(run, subject.upper())[0] == 1
    run.records[3] = replace(run.records[3], subject=subject)
    with pytest.raises(ValueError, match=f"has 2 cases of subject '{subject}': give the case_id, one of 90, 21000"):
        choose_case(run, subject)
    run.records[0] = replace(run.records[0], case_id="capital-of-france")
    with pytest.raises(ValueError, match="no case capital-france: its 4 cases are such as capital-of-france"):
        choose_case(run, "capital-france")


def test_a_run_without_weights_is_refused(run_path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text((run_path / "config.yaml").read_text())
    run = EditedRun(tmp_path)
    with pytest.raises(ValueError, match="kept no weights.*run `edit` again"):
        choose_case(run, str(run.records[0].case_id))
