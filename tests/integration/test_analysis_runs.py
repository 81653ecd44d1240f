"""Reading run directories: records, energy along a run, labels, Markdown and CSV, and the weights of the study."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase

from helpers.models import REQUESTS, tiny_hparams, tiny_model
from helpers.run_files import metric, write_run
from sphere_easyedit import PrincipalSpace
from sphere_easyedit.analysis.collapse import Collapse, collapse_of
from sphere_easyedit.analysis.correlations import energy_correlations, energy_points
from sphere_easyedit.analysis.labels import labelled_runs
from sphere_easyedit.analysis.tables import Column, Table
from sphere_easyedit.callbacks.spaces import principal_share
from sphere_easyedit.methods.covariance import moment_path, save_moment
from sphere_easyedit.runs.directory import RunDirectory
from sphere_easyedit.runs.records import RunRecords
from sphere_easyedit.runs.schema import Estimate, Summary
from study.geometry import neuron_geometry
from study.runs import find_runs
from study.weights import keys_of_edits, over_layers, stages, weight_tables
from study_results import ARCHIVE, unpack

METRIC_NAMES = ("efficacy", "generalization", "specificity")


def rows_of(table: Table) -> list[dict[str, Any]]:
    return [dict(zip((column.name for column in table.columns), row, strict=True)) for row in table.rows]


# --- reading --------------------------------------------------------------------------------------------------


def test_a_run_is_read_whole(tmp_path: Path) -> None:
    run = RunRecords.read(write_run(tmp_path / "MEMIT-plain", scores={7: {"efficacy": 1.0, "generalization": None}}))
    assert (run.name, run.method, run.model) == ("MEMIT-plain", "MEMIT", "tiny")
    assert (run.dataset, run.seed) == ("counterfact", 0)
    assert [point.when for point in run.points] == ["before", "during", "last_batch", "during", "after"]
    before, after = run.before(), run.after()
    assert before is not None and after is not None
    assert before.metrics["specificity"] == Estimate(20.0, (19.0, 21.0), 8)
    assert after.num_edits == 300 and set(after.metrics) == set(METRIC_NAMES)  # no case has fluency
    assert after.update_norms == {4: 3.0, 5: 9.0} and after.perplexity == 22.0
    assert [point.num_edits for point in run.trajectory()] == [100, 200, 300]
    assert run.after("rome") is None and run.trajectory("rome") == []
    assert run.energy_changes[200] == {4: 0.02, 5: -0.01}
    assert [point.abilities["gsm8k"].mean for point in run.abilities] == [40, 20]
    assert run.batches[1].case_ids == (2, "b") and run.batches[1].seconds == {"solve": 0.5}
    assert math.isnan(run.batches[1].losses[1]) and run.batches[1].energy == {4: 1.0, 5: 2.0}
    assert run.summary == Summary(300)
    assert run.scores("after", 300) == {7: {"efficacy": 1.0}}
    assert run.scores("after", 300, "rome") == {7: {"efficacy": 0.0}}


def test_a_run_under_way_is_read_as_far_as_it_came(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for name in ("summary.json", "edits.jsonl", "energy.csv"):
        (folder / name).unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]) + lines[3][:40])  # torn
    run = RunRecords.read(folder)
    assert (len(run.points), run.energy, run.batches, run.summary, run.after()) == (2, (), (), None, None)
    assert energy_points(run) == []


def test_what_was_watched_during_completes_after(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"num_edits": 300, "when": "during", "protocol": "paper", "efficacy": metric(10.0),
                                 "watched": {"perplexity": 5.0, "update_norms": {"4": 7.0}}}) + "\n")
    assert RunRecords.read(folder).trajectory()[-1].perplexity == 22.0
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text.replace('"perplexity": 22.0', '"perplexity": null'))
    last = RunRecords.read(folder).trajectory()[-1]
    assert (last.when, last.perplexity, last.metrics["efficacy"].mean) == ("after", 5.0, 70.0)


@pytest.mark.parametrize(("name", "alpha", "more", "method"), [
    ("plain", 0.0, {}, "MEMIT"), ("x", 0.5, {}, "MEMIT+SPHERE"), ("x", 0.5, {"suppression": "random"}, "MEMIT+random"),
    ("x", 0.0, {"suppression": "random"}, "MEMIT"), ("cf-memit+shrink-seed1", 0.5, {}, "MEMIT+shrink"),
    ("MEMIT+sphere_2", 0.5, {}, "MEMIT+SPHERE"), ("MEMIT+SPHERE+knee", 0.5, {}, "MEMIT+SPHERE+knee")])
def test_methods_are_told_by_name_or_hyperparameters(tmp_path: Path, name: str, alpha: float, more: dict[str, Any],
                                                     method: str) -> None:
    assert RunRecords.read(write_run(tmp_path / name, alpha=alpha, **more)).method == method


AFTER_ONE = {"num_edits": 1, "when": "after", "protocol": "p"}


@pytest.mark.parametrize(("file", "line", "complaint"), [
    ("metrics.jsonl", {"num_edits": 100, "when": "later", "protocol": "paper"}, "when is 'later' .*'before'"),
    ("metrics.jsonl", {"num_edits": -1, "when": "after", "protocol": "paper"}, "num_edits is -1 "),
    ("metrics.jsonl", {"num_edits": 1, "when": "after"}, "protocol is missing"),
    ("metrics.jsonl", {"num_edits": 300, "when": "after", "protocol": "paper"}, "two lines of"),
    ("metrics.jsonl", AFTER_ONE | {"efficacy": {"mean": "x", "n": 1}}, "efficacy.mean is 'x' .*not a number"),
    ("metrics.jsonl", AFTER_ONE | {"efficacy": {"mean": 1}}, "efficacy.n is missing"),
    ("metrics.jsonl", AFTER_ONE | {"efficacy": {"mean": 1, "n": 1, "ci95": [1]}},
     "efficacy.ci95.1 is missing"),
    ("metrics.jsonl", AFTER_ONE | {"watched": {"update_norms": {"a": 1}}},
     "update_norms.a.*valid integer"),
    ("edits.jsonl", {"num_edits": 1, "case_ids": 3}, "case_ids is 3 .*valid tuple"),
    ("edits.jsonl", {"num_edits": 300}, "two lines of 300")])
def test_wrong_lines_are_named(tmp_path: Path, file: str, line: dict[str, Any], complaint: str) -> None:
    folder = write_run(tmp_path / "run")
    with (folder / file).open("a") as stream:
        stream.write(json.dumps(line) + "\n")
    with pytest.raises(ValueError, match=complaint) as caught:
        RunRecords.read(folder)
    assert file in str(caught.value)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run"):
        find_runs(tmp_path)
    folder = write_run(tmp_path / "deep" / "run")
    assert [run.directory for run in find_runs(tmp_path)] == [folder]
    with pytest.raises(ValueError, match=r"after-300.jsonl does not exist"):
        find_runs(tmp_path)[0].scores("after", 300)
    (folder / "config.yaml").write_text("run: {}\n")
    with pytest.raises(ValueError, match="no mapping `hparams`"):
        RunRecords.read(folder)
    (folder / "config.yaml").unlink()
    with pytest.raises(ValueError, match=r"no config.yaml"):
        RunRecords.read(folder)


@pytest.mark.parametrize(("lines", "complaint"), [
    ([{"case_id": 1, "protocol": "rome"}], "no scores of protocol paper"),
    ([{"case_id": 1, "protocol": "paper"}] * 2, "case 1 has two lines"),
    ([{"case_id": None, "protocol": "paper"}], "case_id is None")])
def test_scores_are_checked(tmp_path: Path, lines: list[dict[str, Any]], complaint: str) -> None:
    folder = write_run(tmp_path / "run", scores={1: {}})
    (folder / "scores" / "after-300.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=complaint):
        RunRecords.read(folder).scores("after", 300)


# --- along a run ----------------------------------------------------------------------------------------------


def test_energy_is_followed_to_the_collapse(tmp_path: Path) -> None:
    efficacy, perplexity = [90.0, 80.0, 85.0, 60.0, 30.0, 10.0], [20.0, 20.0, 21.0, 22.0, 50.0, math.inf]
    run = RunRecords.read(write_run(tmp_path / "run", efficacy=efficacy, perplexity=perplexity))
    assert collapse_of(run) == Collapse(500, ("efficacy",))
    assert collapse_of(run, share=0.1, perplexity_factor=2) == Collapse(500, ("perplexity",))
    points = energy_points(run)
    assert [point.num_edits for point in points] == [100, 200, 300, 400, 500, 600]
    assert points[1].values["log_perplexity"] == math.log(20) and "log_perplexity" not in points[5].values
    assert [point.num_edits for point in energy_points(run, before=500)] == [100, 200, 300, 400]
    whole, early = energy_correlations(points), energy_correlations(energy_points(run, before=500))
    assert whole["efficacy"].signed.energy.rho == pytest.approx(-0.942857, abs=1e-5)
    assert early["efficacy"].signed.energy.rho == pytest.approx(-0.8)
    assert whole["log_perplexity"].signed.energy.n == 5
    assert collapse_of(RunRecords.read(write_run(tmp_path / "holds"))) is None


def test_energy_that_is_not_finite_is_no_point(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    text = (folder / "energy.csv").read_text()
    (folder / "energy.csv").write_text(text.replace("300,4,1030.0,0.03", "300,4,nan,nan"))
    assert [point.num_edits for point in energy_points(RunRecords.read(folder))] == [100, 200]


def test_published_runs_still_open(tmp_path: Path) -> None:
    """Runs of older versions are read, and their lines written again as they stand."""
    unpack(ARCHIVE, tmp_path)
    runs = find_runs(tmp_path)
    assert len(runs) > 30
    for run in runs:
        assert run.points and run.batches and run.energy and run.summary is not None
        for name, records in (("metrics.jsonl", RunDirectory(run.directory).measurements()),
                              ("edits.jsonl", run.batches)):
            lines = [json.loads(line) for line in (run.directory / name).read_text().splitlines()]
            for line, record in zip(lines, records, strict=True):
                again = json.loads(json.dumps(record.to_dict()))
                assert {key: again[key] for key in line} == line


# --- labels ----------------------------------------------------------------------------------------


def test_runs_that_share_a_method_are_told_apart(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name, alpha=0.8)
    write_run(tmp_path / "other", seed=1, alpha=0.8)
    assert [arm.label for arm in labelled_runs(find_runs(tmp_path))] == [
        "MEMIT+SPHERE (one)", "MEMIT+SPHERE (two)", "MEMIT+SPHERE"]


def test_another_order_is_another_experiment(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, alpha=alpha, scores={1: {"efficacy": 1.0}, 2: {"efficacy": 0.0}})
               for name, alpha in (("a", 0.0), ("b", 0.8), ("c", 0.0))]
    config = yaml.safe_load((folders[2] / "config.yaml").read_text())
    config["run"]["order_seed"] = 1
    (folders[2] / "config.yaml").write_text(yaml.safe_dump(config))
    arms = labelled_runs([RunRecords.read(folder) for folder in folders])
    assert [(arm.label, arm.run.draw) for arm in arms] == [("MEMIT", 0), ("MEMIT+SPHERE", 0), ("MEMIT", "0, order 1")]


def test_earlier_keys_are_another_base_method(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, alpha=alpha, keep_previous_keys=keys, scores={1: {"efficacy": 1.0}})
               for name, alpha, keys in (("a", 0.0, False), ("b", 0.8, True), ("c", 0.0, True))]
    arms = labelled_runs([RunRecords.read(folder) for folder in folders])
    assert [arm.label for arm in arms] == ["MEMIT", "MEMIT, earlier keys", "MEMIT, earlier keys+SPHERE"]


def test_abilities_may_be_measured_one_after_the_other(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    last = RunRecords.read(folder).abilities[-1]
    more = {"num_edits": last.num_edits, "when": last.when, "protocol": last.protocol}
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({**more, "abilities": {"boolq": {"mean": 60.0, "n": 50}}}) + "\n")
    assert [sorted(point.abilities) for point in RunRecords.read(folder).abilities[-2:]] == [["gsm8k"], ["boolq"]]
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({**more, "abilities": {"gsm8k": {"mean": 1.0, "n": 50}}}) + "\n")
    with pytest.raises(ValueError, match="two lines of"):
        RunRecords.read(folder)


# --- tables ---------------------------------------------------------------------------------------------------


def test_a_table_is_written_in_both_forms(tmp_path: Path) -> None:
    table = Table("t", "Title", (Column("name"), Column("|x|", ".2f"), Column("mean"), Column("nothing")), (
        ("a|b", 1.234, Estimate(2.0, (-1.0, 3.0), 4), None), ("c", math.nan, Estimate(-0.01, None, 1), None),
        ("d", None, None, None)), "Note.")
    assert table.to_markdown() == (
        "### Title\n\nNote.\n\n| name | \\|x\\| | mean | nothing |\n| --- | ---: | ---: | --- |\n"
        "| a\\|b | 1.23 | 2.0 (-1.0 to 3.0) | - |\n| c | - | 0.0 | - |\n| d | - | - | - |\n")
    table.without_empty_columns().write_csv(tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as stream:
        assert list(csv.reader(stream)) == [
            ["name", "|x|", "mean", "mean low", "mean high", "mean n"], ["a|b", "1.234", "2.0", "-1.0", "3.0", "4"],
            ["c", "", "-0.01", "", "", "1"], ["d", "", "", "", "", ""]]
    with pytest.raises(ValueError, match="row 0 has 1 cells for 2 columns"):
        Table("t", "", (Column("a"), Column("b")), ((1,),))


# --- weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weights_are_described_in_the_right_orientation(tmp_path: Path, family: str, tok: PreTrainedTokenizerBase
                                                        ) -> None:
    model = tiny_model(family)
    hparams = tiny_hparams(tmp_path)
    editable = hparams.editable(model)
    unedited = {layer: editable.weight(layer).clone() for layer in (1, 2)}
    folder = write_run(tmp_path / "run")
    (folder / "checkpoints").mkdir()
    generator = torch.Generator().manual_seed(0)
    steps = [{layer: 0.01 * torch.randn(weight.shape, generator=generator) for layer, weight in unedited.items()}
             for _ in range(2)]
    for number in (1, 2):
        save_file({editable.parameter_name(layer): editable.orient(
            layer, weight + sum(step[layer] for step in steps[:number])).contiguous()
            for layer, weight in unedited.items()}, folder / "checkpoints" / f"weights-{number * 100}.safetensors")
    run = RunRecords.read(folder)
    seen = [(edits, {layer: tuple(weight.shape) for layer, weight in weights.items()})
            for edits, weights in stages(run, editable)]
    assert seen == [(edits, {1: (48, 80), 2: (48, 80)}) for edits in (0, 100, 200)]
    assert all(torch.equal(editable.weight(layer), weight) for layer, weight in unedited.items())

    keys = keys_of_edits(editable, tok, REQUESTS, [], 100)
    assert {layer: tuple(found.shape) for layer, found in keys.items()} == {1: (3, 80), 2: (3, 80)}
    save_moment(moment_path(editable, hparams, 1), keys[1].double().T @ keys[1].double(), 3, 3)
    tables = weight_tables(labelled_runs([run]), lambda run: (editable, hparams), lambda run: keys)
    geometry, spectra, updates = (rows_of(table) for table in tables)
    states = ("unedited", 0), ("MEMIT", 100), ("MEMIT", 200)
    assert [(row["method"], row["edits"], row["layer"]) for row in geometry] == [
        (*state, layer) for state in states for layer in (1, 2)]
    assert geometry[1]["std"] == neuron_geometry(unedited[2]).std
    space = PrincipalSpace.from_weight(unedited[1], 0.5)
    assert spectra[0]["rank at gamma 0.5"] == space.rank and spectra[0]["d_in"] == 80
    of_keys = spectra[0]["edits' keys in the principal space"]
    assert of_keys == principal_share(keys[1], space).share and 0 < of_keys < 1
    assert spectra[0]["keys' second moment in the principal space"] == pytest.approx(of_keys, rel=1e-5)
    assert spectra[1]["keys' second moment in the principal space"] is None  # of this layer none was filed
    assert spectra[2]["edits' keys in the principal space"] is None
    assert [(row["layer"], row["from"], row["to"]) for row in updates] == [
        (1, 0, 100), (2, 0, 100), (1, 100, 200), (2, 100, 200), (1, 0, 200), (2, 0, 200)]
    first = steps[0][1].double()
    share = float((first @ space.directions.double()).square().sum() / first.square().sum())
    assert updates[0]["in the principal space"] == pytest.approx(share, rel=1e-4)
    assert updates[0]["by chance"] == space.rank / 80 and updates[0]["cosine with the step before"] is None
    assert updates[2]["cosine with the step before"] == pytest.approx(0, abs=0.1)


    whole = over_layers(tables[2])
    assert [column.name for column in whole.columns][:7] == [
        "model", "data set", "seed", "method", "from", "to", "layers"]
    first_step = rows_of(whole)[0]
    assert len(whole.rows) == 3 and (first_step["from"], first_step["to"], first_step["layers"]) == (0, 100, 2)
    assert first_step["times chance"] == pytest.approx((updates[0]["times chance"] + updates[1]["times chance"]) / 2)
    assert first_step["cosine with the step before"] is None
