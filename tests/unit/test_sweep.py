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
from sphere_easyedit.runs.sweep.grid import MAX_LENGTH, compose, is_name

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


def test_seeds_go_outside_or_inside(tmp_path: Path) -> None:
    outside = names(load(tmp_path, seeds=[3, 1], methods="MEMIT"))
    assert outside == ["MEMIT-plain-seed3", "MEMIT-sphere-gamma0.5-alpha0.8-seed3", "MEMIT-plain-seed1",
                       "MEMIT-sphere-gamma0.5-alpha0.8-seed1"]
    inside = names(load(tmp_path, seeds=[3, 1], methods="MEMIT", seeds_outermost=False))
    assert inside == [outside[0], outside[2], outside[1], outside[3]]


def test_arguments_are_what_edit_takes(tmp_path: Path) -> None:
    """Parsed by the real command line, and resolved by it to the same hyperparameters."""
    sweep = load(tmp_path, dataset="counterfact", data="cf.json", num_edits=20, batch_size=5, seeds=4,
                 edit={"eval-every": 10, "eval_sample": 3, "protocol": ["paper", "rome"], "eval-before": False,
                       "eval-last-batch": True, "text": None},
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


def test_without_sphere_its_axes_are_one_run(tmp_path: Path) -> None:
    sweep = load(tmp_path, methods="MEMIT", gamma=[0.3, 0.5], alpha=[0.4, 0.8], set={"suppression": "random"},
                 axes={"projection_stage": ["layer", "update"], "mom2_update_weight": [1000, 15000]})
    plain = [run for run in sweep.runs if not run.sphere]
    assert [run.hyperparameters["mom2_update_weight"] for run in plain] == [1000, 15000]
    assert [run.name for run in plain] == ["MEMIT-plain-mom2_update_weight=1000-seed0", "MEMIT-plain-seed0"]
    assert len(sweep.runs) == 2 + 2 * 2 * 2 * 2
    assert all(run.hyperparameters["suppression"] == "random" for run in sweep.runs if run.sphere)


def test_what_makes_a_method_valid_also_does_without_sphere(tmp_path: Path) -> None:
    own = {"base_alg": "PRUNE", "projection_stage": "update", "principal_space": "pretrained", "mom2_update_weight": 9}
    runs = load(tmp_path, hparams="AlphaEdit/smollm2-135m", methods={"PRUNE": own}).runs
    assert [run.name for run in runs] == ["PRUNE-plain-seed0", "PRUNE-sphere-gamma0.5-alpha0.5-seed0"]
    assert {run.hyperparameters["base_alg"] for run in runs} == {"PRUNE"}


def test_what_is_spheres_own_are_hyperparameters() -> None:
    assert set(SPHERE_ONLY) <= {field.name for field in fields(SPHEREHyperParams)}


def test_axes_by_method(tmp_path: Path) -> None:
    sweep = load(tmp_path, methods=["AlphaEdit", "PRUNE", "RECT"], sphere=True, gamma={"RECT": 0.3},
                 alpha={"AlphaEdit": [0.4, 0.5], "default": 0.7},
                 axes={"principal_space": {"PRUNE": ["pretrained"], "default": ["current", "pretrained"]}})
    assert [(run.method, run.hyperparameters["gamma"], run.hyperparameters["alpha"],
             run.hyperparameters["principal_space"]) for run in sweep.runs] == [
        ("AlphaEdit", 0.5, 0.4, "current"), ("AlphaEdit", 0.5, 0.4, "pretrained"), ("AlphaEdit", 0.5, 0.5, "current"),
        ("AlphaEdit", 0.5, 0.5, "pretrained"), ("PRUNE", 0.5, 0.7, "pretrained"), ("RECT", 0.3, 0.7, "current"),
        ("RECT", 0.3, 0.7, "pretrained")]


def test_exclude(tmp_path: Path) -> None:
    everything = set(names(load(tmp_path, seeds=[0, 1], gamma=[0.3, 0.5])))
    left = load(tmp_path, seeds=[0, 1], gamma=[0.3, 0.5], exclude=[
        {"method": "MEMIT", "gamma": [0.3, 0.4]}, {"method": "AlphaEdit", "sphere": False, "seed": 1}])
    assert everything - set(names(left)) == {
        "MEMIT-sphere-gamma0.3-alpha0.8-seed0", "MEMIT-sphere-gamma0.3-alpha0.8-seed1", "AlphaEdit-plain-seed1"}
    # An impossible point can be left out before anybody checks it.
    with pytest.raises(ValueError, match="PRUNE restrains"):
        load(tmp_path, methods="PRUNE", axes={"projection_stage": ["layer", "update"]})
    assert len(load(tmp_path, methods="PRUNE", axes={"projection_stage": ["layer", "update"]},
                    exclude=[{"projection_stage": "layer"}]).runs) == 2


def test_runs_of_their_own(tmp_path: Path) -> None:
    above: dict[str, Any] = {"methods": {"AlphaEdit": {"L2": 2}}, "num_edits": 100, "seeds": [0, 1],
                             "edit": {"eval-every": 50}, "axes": {"principal_space": ["current", "pretrained"]}}
    sweep = load(tmp_path, **above, runs=[
        {"name": "AlphaEdit-random", "method": "AlphaEdit", "sphere": True, "set": {"suppression": "random"},
         "seeds": 0},
        {"method": "MEMIT", "sphere": False, "num_edits": 30, "edit": {"eval_every": None, "examples": 0}},
        {"method": "AlphaEdit", "sphere": True, "set": {"suppression": "shrink", "L2": 3}},
    ])
    grid = names(load(tmp_path, **above))
    own = [run for run in sweep.runs if run.name not in grid]
    assert [run.name for run in own] == [
        "AlphaEdit-random-seed0", "MEMIT-plain-eval-every=none-examples=0-num_edits=30-seed0",
        "AlphaEdit-sphere-gamma0.5-alpha0.5-L2=3-suppression=shrink-seed0",
        "MEMIT-plain-eval-every=none-examples=0-num_edits=30-seed1",
        "AlphaEdit-sphere-gamma0.5-alpha0.5-L2=3-suppression=shrink-seed1"]
    assert own[0].value("L2") == 2
    assert own[0].value("suppression") == "random"
    assert own[0].edit == {"eval-every": 50}
    assert own[1].edit == {"examples": 0}
    assert own[1].num_edits == 30


def test_names_stay_when_something_is_added(tmp_path: Path) -> None:
    before = {run.name: run for run in load(tmp_path, seeds=[0], num_edits=10).runs}
    after = {run.name: run for run in load(
        tmp_path, seeds=[1, 0], num_edits=10, methods=["RECT", "AlphaEdit", "MEMIT"], gamma=[0.2, 0.5],
        axes={"v_lr": [0.1, 0.5], "principal_space": ["pretrained", "current"]}).runs}
    for name, run in before.items():
        assert after[name].hyperparameters == run.hyperparameters
    assert len(after) == 2 * 3 * (2 + 2 * 2 * 2)


@settings(max_examples=15, deadline=None)
@given(methods=st.lists(st.sampled_from(["MEMIT", "AlphaEdit", "RECT"]), min_size=1, unique=True),
       sphere=st.lists(st.booleans(), min_size=1, unique=True),
       seeds=st.lists(st.integers(0, 99), min_size=1, max_size=3, unique=True),
       gamma=st.lists(st.sampled_from([0.1, 0.25, 0.5, 1.0]), min_size=1, max_size=3, unique=True),
       alpha=st.lists(st.sampled_from([0.01, 0.5, 1]), min_size=1, max_size=3, unique=True),
       steps=st.lists(st.integers(1, 30), min_size=1, max_size=2, unique=True), outermost=st.booleans())
def test_every_point_once_and_in_order(tmp_path_factory: pytest.TempPathFactory, methods: list[str],
                                       sphere: list[bool], seeds: list[int], gamma: list[float], alpha: list[float],
                                       steps: list[int], outermost: bool) -> None:
    sweep = load(tmp_path_factory.mktemp("grid"), methods=methods, sphere=sphere, seeds=seeds, gamma=gamma, alpha=alpha,
                 axes={"v_num_grad_steps": steps}, seeds_outermost=outermost)
    arms = [(method, step, *point) for method, step, on in product(methods, steps, sphere)
            for point in (product(gamma, alpha) if on else [(None, 0)])]
    expected = ([(*arm, seed) for seed in seeds for arm in arms] if outermost
                else [(*arm, seed) for arm in arms for seed in seeds])
    found = [(run.method, run.value("v_num_grad_steps"), run.value("gamma") if run.sphere else None, run.value("alpha"),
              run.seed) for run in sweep.runs]
    assert found == expected
    assert len({run.name.lower() for run in sweep.runs}) == len(expected)


TEXTS = st.text(max_size=60)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS
LISTS = st.lists(SCALARS | st.lists(SCALARS, max_size=3), max_size=4)
VALUES = SCALARS | LISTS | st.dictionaries(TEXTS, SCALARS, max_size=3)


@settings(deadline=None)  # the machine may be busy
@given(parts=st.lists(TEXTS, min_size=1, max_size=3), told=st.dictionaries(TEXTS, VALUES, max_size=3))
def test_a_name_is_one_directory_and_no_way_out(parts: list[str], told: dict[str, Any]) -> None:
    name = compose(["A", *parts], told)
    assert is_name(name)
    assert Path(name).name == name
    assert not name.startswith((".", "-"))
    assert len(name) <= MAX_LENGTH


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
    ({"alpha": [0, 0.5]}, "which is `sphere: false`"),
    ({"alpha": {"MEMT": 0.5}}, "did you mean 'MEMIT'"),
    ({"seeds": [0, 0]}, "are the same"),
    ({"seeds": [-1]}, "a seed is -1"),
    ({"seeds": [True]}, "a seed is True"),
    ({"seeds_outermost": 1}, "seeds_outermost is 1"),
    ({"sphere": ["yes"]}, "sphere is 'yes'"),
    ({"num_edits": 0}, "num_edits is 0"),
    ({"batch_size": "many"}, "batch_size is 'many'"),
    ({"dataset": "counterfacts"}, "did you mean 'counterfact'"),
    ({"set": {"v_lrr": 1}}, "did you mean 'v_lr'"),
    ({"set": {"gamma": 1}}, "give it as `gamma` beside set"),
    ({"set": {"suppression_strength": 1}}, "give it as `alpha` beside set"),
    ({"set": ["v_lr"]}, "set must be a mapping"),
    ({"set": {"v_lr": 1}, "axes": {"v_lr": [1, 2]}}, "v_lr is given under both set and axes"),
    ({"methods": {"MEMIT": {"v_lr": 1}}, "axes": {"v_lr": [1, 2]}}, "v_lr is given under both methods.MEMIT and axes"),
    ({"axes": {"projection_stage": ["layer", "updat"]}}, "did you mean 'update'"),
    ({"edit": {"seed": 1}}, "give it as `seeds` beside edit"),
    ({"edit": {"output": "x"}}, "the sweep sets for each run"),
    ({"edit": {"--dtype": "float32"}}, "without leading dashes"),
    ({"edit": {"eval_every": 1, "eval-every": 1}}, "two spellings"),
    ({"edit": {"eval-every": {"a": 1}}}, "give a text, a number"),
    ({"edit": {"eval-evry": 1}}, "did you mean 'eval-every'"),
    ({"exclude": [{"metod": "MEMIT"}]}, "did you mean 'method'"),
    ({"exclude": [{"method": "RECT"}]}, "matches no run"),
    ({"exclude": {"method": "MEMIT"}}, "exclude must be a list"),
    ({"exclude": [{"method": ["MEMIT", "AlphaEdit"]}]}, "leaves nothing to run"),
    ({"follow": {"PRUNE": "MEMIT-plain"}}, "a sweep has no setting 'follow'"),
    ({"runs": {"method": "MEMIT"}}, "runs must be a list"),
    ({"runs": [{"name": "x"}]}, "runs[0].method must be given"),
    ({"runs": [{"method": "MEMIT", "metod": 1}]}, "did you mean 'method'"),
    ({"runs": [{"method": "MEMIT", "sphere": False}]}, "are the same"),
    ({"runs": [{"method": "MEMIT", "set": {"suppression": "random"}}]}, "are the same"),  # the one without SPHERE
    ({"runs": [{"method": "MEMIT", "name": "x"}]}, "describes 2 runs of each seed"),
    ({"runs": [{"method": "MEMIT", "name": "../x", "sphere": True}]}, "is not a valid directory name"),
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
    run = load(tmp_path, known, edit={"eval-before": False, "verbose": None}).runs[0]
    assert run.arguments(tmp_path)[-1] == "--no-eval-before"
    assert "verbose" not in run.edit
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
