"""A sweep's file: what it expands to, and what it refuses."""

from __future__ import annotations

import re
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from sphere_easyedit.cli.app import app
from sphere_easyedit.cli.options import read_hparams
from sphere_easyedit.hparams import SPHERE_ONLY, SPHEREHyperParams
from sphere_easyedit.runs.sweep import Run, Sweep, load_sweep

BASE: dict[str, Any] = {"model": "smollm2-135m", "methods": ["MEMIT", "AlphaEdit"]}


def load(folder: Path, edit_options: list[str] | None = None, **content: Any) -> Sweep:
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({**BASE, **content}, sort_keys=False), encoding="utf-8")
    return load_sweep(file, edit_options)


def names(sweep: Sweep) -> list[str]:
    return [run.name for run in sweep.runs]


def test_the_smallest_file(tmp_path: Path) -> None:
    sweep = load(tmp_path)
    assert names(sweep) == ["MEMIT-plain-seed0", "MEMIT-sphere-gamma0.5-alpha0.8-seed0", "AlphaEdit-plain-seed0",
                            "AlphaEdit-sphere-gamma0.5-alpha0.5-seed0"]
    assert [run.hyperparameters["alpha"] for run in sweep.runs] == [0, 0.8, 0, 0.5]
    assert {run.dataset for run in sweep.runs} == {"demo"}


def test_environment_variables_stand_in_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTS", "/some/where")
    monkeypatch.delenv("NOWHERE", raising=False)
    given = {"dataset": "counterfact", "data": "${FACTS}/cf.json", "set": {"stats_dir": "${FACTS}/stats"},
             "edit": {"text": "${FACTS}/text.txt", "protocol": ["paper"]}}
    run = load(tmp_path, **given).runs[0]
    assert run.data == "/some/where/cf.json"
    assert run.hyperparameters["stats_dir"] == "/some/where/stats"
    assert "--text=/some/where/text.txt" in run.arguments(tmp_path / "out")
    with pytest.raises(ValueError, match=r"NOWHERE, which is not set"):
        load(tmp_path, **{**given, "data": "${NOWHERE}/cf.json"})
    assert load(tmp_path, dataset="counterfact", data="costs $5 {here}.json").runs[0].data == "costs $5 {here}.json"


def test_runs_are_in_order_of_seeds(tmp_path: Path) -> None:
    assert names(load(tmp_path, seeds=[3, 1], methods="MEMIT")) == [
        "MEMIT-plain-seed3", "MEMIT-sphere-gamma0.5-alpha0.8-seed3", "MEMIT-plain-seed1",
        "MEMIT-sphere-gamma0.5-alpha0.8-seed1"]


def test_arguments_are_what_edit_takes(tmp_path: Path) -> None:
    """Parsed by the real command line, and resolved by it to the same hyperparameters."""
    sweep = load(tmp_path, dataset="counterfact", data="cf.json", num_edits=20, batch_size=5, seeds=4,
                 edit={"eval-every": 10, "eval_sample": 3, "protocol": ["paper", "rome"], "eval-before": False,
                       "eval-last-batch": True},
                 set={"context_templates": ["He said: {}", "No. {}"], "mom2_dataset": "1e-3", "v_lr": 1e-5,
                      "P_loc": None, "mom2_update_weight": 1e-7},
                 methods={"MEMIT": {"v_weight_decay": 0}, "PRUNE": None})
    command = typer.main.get_command(app).commands["edit"]  # type: ignore[attr-defined]
    for run in sweep.runs:
        parsed = command.make_context("edit", run.arguments(tmp_path / "out" / run.name)).params
        assert read_hparams(parsed["hparams"], parsed["override"]).to_dict() == run.hyperparameters
        assert (parsed["num_edits"], parsed["batch_size"], parsed["seed"]) == (20, 5, 4)
        assert (parsed["eval_every"], parsed["eval_sample"], parsed["eval_before"]) == (10, 3, False)
        assert ([one.value for one in parsed["protocol"]], parsed["eval_last_batch"]) == (["paper", "rome"], True)
        assert (parsed["dataset"], parsed["data"], parsed["resume"]) == ("counterfact", Path("cf.json"), True)
        assert parsed["output"] == tmp_path / "out" / run.name
    assert (sweep.runs[0].value("mom2_update_weight"), sweep.runs[0].value("v_weight_decay")) == (1e-7, 0)


def test_what_makes_a_method_valid_also_does_without_sphere(tmp_path: Path) -> None:
    own = {"base_alg": "PRUNE", "projection_stage": "update", "principal_space": "pretrained", "mom2_update_weight": 9}
    runs = load(tmp_path, hparams="AlphaEdit/smollm2-135m", methods={"PRUNE": own}).runs
    assert [run.name for run in runs] == ["PRUNE-plain-seed0", "PRUNE-sphere-gamma0.5-alpha0.5-seed0"]
    assert {run.hyperparameters["base_alg"] for run in runs} == {"PRUNE"}


def test_what_is_spheres_own_are_hyperparameters() -> None:
    assert set(SPHERE_ONLY) <= {field.name for field in fields(SPHEREHyperParams)}


def test_runs_of_their_own(tmp_path: Path) -> None:
    above: dict[str, Any] = {"methods": {"AlphaEdit": {"L2": 2}}, "num_edits": 100, "seeds": [0, 1],
                             "edit": {"eval-every": 50}}
    sweep = load(tmp_path, **above, runs=[
        {"name": "AlphaEdit-random", "method": "AlphaEdit", "sphere": True, "set": {"suppression": "random"},
         "seeds": 0},
        {"method": "MEMIT", "sphere": False, "num_edits": 30, "edit": {"examples": 0}},
        {"name": "AlphaEdit-shrink", "method": "AlphaEdit", "sphere": True, "set": {"suppression": "shrink", "L2": 3}},
    ])
    own = [run for run in sweep.runs if run.name not in names(load(tmp_path, **above))]
    assert [run.name for run in own] == ["AlphaEdit-random-seed0", "MEMIT-plain-seed0", "AlphaEdit-shrink-seed0",
                                         "MEMIT-plain-seed1", "AlphaEdit-shrink-seed1"]
    assert [own[0].value(name) for name in ("L2", "suppression")] == [2, "random"]
    assert own[0].edit == {"eval-every": 50}
    assert own[1].edit == {"eval-every": 50, "examples": 0}
    assert own[1].num_edits == 30
    assert own[2].value("L2") == 3


@settings(max_examples=15, deadline=None)
@given(methods=st.lists(st.sampled_from(["MEMIT", "AlphaEdit", "RECT"]), min_size=1, unique=True),
       sphere=st.lists(st.booleans(), min_size=1, unique=True),
       seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
       gamma=st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0]), min_size=1, max_size=3, unique=True),
       alpha=st.lists(st.sampled_from([0.01, 0.5, 1]), min_size=1, max_size=3, unique=True))
def test_every_point_once_and_in_order(tmp_path_factory: pytest.TempPathFactory, methods: list[str],
                                       sphere: list[bool], seeds: list[int], gamma: list[float], alpha: list[float]
                                       ) -> None:
    sweep = load(tmp_path_factory.mktemp("grid"), methods=methods, sphere=sphere, seeds=seeds, gamma=gamma, alpha=alpha)
    expected = [(method, *point, seed) for seed in seeds for method, on in product(methods, sphere)
                for point in (product(gamma, alpha) if on else [(None, 0)])]
    found = [(run.method, run.value("gamma") if run.sphere else None, run.value("alpha"), run.seed)
             for run in sweep.runs]
    assert found == expected
    assert len({run.name.lower() for run in sweep.runs}) == len(expected)


TEXTS = st.text(max_size=60)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
LISTS = st.lists(SCALARS | st.lists(SCALARS, max_size=3), max_size=4)
VALUES = SCALARS | LISTS | st.dictionaries(TEXTS, SCALARS, max_size=3)


@settings(deadline=None)
@given(VALUES)
def test_values_pass_the_command_line_as_they_are(value: Any) -> None:
    run = Run("a-seed0", "a", "M", False, 0, "f.yaml", {"x": value}, "demo", None, None, 1, {}, {})
    arguments = run.arguments(Path("out"))
    name, _, text = arguments[arguments.index("--set") + 1].partition("=")
    assert name == "x"
    assert yaml.safe_load(text) == value


@pytest.mark.parametrize(("content", "message"), [
    ({"metods": ["MEMIT"]}, "did you mean 'methods'"),
    ({"methods": None}, "nothing to run"),
    ({"methods": ["MEMIT", "MEMIT"]}, "MEMIT twice"),
    ({"methods": ["MEMITT"]}, "MEMIT/smollm2-135m"),
    ({"model": None}, "model (or hparams, a file) must be given"),
    ({"gamma": [0.5, 0.5]}, "are the same"),
    ({"gamma": [0.5, 1.5]}, "gamma is 1.5"),
    ({"gamma": []}, "empty list"),
    ({"axes": {"v_lr": [1, 2]}}, "a sweep has no setting 'axes'"),  # older versions had it
    ({"alpha": [0, 0.5]}, "which is `sphere: false`"),
    ({"seeds": [0, 0]}, "are the same"),
    ({"seeds": [-1]}, "a seed is -1"),
    ({"seeds": [True]}, "a seed is True"),
    ({"sphere": ["yes"]}, "sphere is 'yes'"),
    ({"num_edits": 0}, "num_edits is 0"),
    ({"batch_size": "many"}, "batch_size is 'many'"),
    ({"dataset": "counterfacts"}, "did you mean 'counterfact'"),
    ({"set": {"v_lrr": 1}}, "did you mean 'v_lr'"),
    ({"set": {"gamma": 1}}, "give it as `gamma` beside set"),
    ({"set": {"suppression_strength": 1}}, "give it as `alpha` beside set"),
    ({"set": ["v_lr"]}, "set must be a mapping"),
    ({"edit": {"seed": 1}}, "give it as `seeds` beside edit"),
    ({"edit": {"output": "x"}}, "the sweep sets for each run"),
    ({"edit": {"--dtype": "float32"}}, "without leading dashes"),
    ({"edit": {"eval_every": 1, "eval-every": 1}}, "two spellings"),
    ({"edit": {"eval-every": {"a": 1}}}, "give a text, a number"),
    ({"edit": {"eval-evry": 1}}, "did you mean 'eval-every'"),
    ({"runs": {"method": "MEMIT"}}, "runs must be a list"),
    ({"runs": [{"name": "x"}]}, "runs[0].method must be given"),
    ({"runs": [{"method": "MEMIT", "metod": 1}]}, "did you mean 'method'"),
    ({"runs": [{"method": "MEMIT", "sphere": False}]}, "are the same"),
    ({"runs": [{"method": "MEMIT", "set": {"suppression": "random"}}]}, "are the same"),  # the one without SPHERE
    ({"runs": [{"method": "MEMIT", "name": "x"}]}, "describes 2 runs of each seed"),
    ({"runs": [{"method": "MEMIT", "name": "../x", "sphere": True}]}, "is not a valid directory name"),
    ({"runs": [{"method": "MEMIT", "sphere": True, "num_edits": 3}]}, "two different runs would be called"),
    ({"methods": ["x/../y"], "hparams": "MEMIT/smollm2-135m"}, "'x/../y-plain' is not a valid name"),
    ({"runs": [{"method": "MEMIT", "name": "x", "sphere": True, "set": {"v_lr": v}} for v in (1, 2)]},
     "two different runs would be called x"),
    ({"runs": [{"method": "MEMIT", "name": n, "sphere": True, "set": {"v_lr": v}} for n, v in (("x", 1), ("X", 2))]},
     "two different runs would be called X"),
])
def test_what_is_refused(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(tmp_path, ["eval-every", "dtype"], **content)
    assert message in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [
    ("methods: {MEMIT: {}, MEMIT: {}}", "line 1: MEMIT is given twice"),
    ("methods: [MEMIT]\nruns: [{method: A, seeds: 0, seeds: 1}]", "line 2: seeds is given twice"),
    ("methods: [MEMIT", "not readable as YAML"),
    ("[MEMIT]", "a YAML mapping"),
    ("", "a YAML mapping"),
])
def test_text_that_is_no_sweep(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_sweep(tmp_path / "sweep.yaml")


def test_a_flag_is_switched_off_only_where_it_can_be(tmp_path: Path) -> None:
    known = ["eval-before", "no-eval-before", "verbose"]
    run = load(tmp_path, known, edit={"eval-before": False}).runs[0]
    assert run.arguments(tmp_path)[-1] == "--no-eval-before"
    with pytest.raises(ValueError, match="there is no --no-verbose"):
        load(tmp_path, known, edit={"verbose": False})


@pytest.mark.parametrize(("changed", "difference"), [
    ({"gamma_rule": "share", "space_source": "weight", "energy_budget": None}, None),
    ({"gamma_rule": "knee"}, "gamma_rule was 'knee' and is None now"), ({"alpha": 0.3}, "alpha was 0.3 and is 0.0 now"),
])
def test_records_of_older_versions_name_removed_options(tmp_path: Path, changed: dict[str, Any], difference: str | None
                                                        ) -> None:
    run = load(tmp_path).runs[0]
    assert run.change_from({**run.hyperparameters, **changed}) == difference
