"""Facts that later edits overwrite are found and edited again, and what a session knows of them follows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.command_line import workplace  # noqa: F401
from helpers.models import REQUESTS, edited_weights, relative_error, tiny_hparams, tiny_model
from helpers.processes import call_cli
from sphere_easyedit.callbacks.he_tracker import read_energy_csv
from sphere_easyedit.core.hyperspherical import hyperspherical_energy
from sphere_easyedit.datasets.loaders import EditRecord, load_records
from sphere_easyedit.editing.session import EditSession
from sphere_easyedit.evaluation.metrics import efficacies
from sphere_easyedit.methods.covariance import load_moment
from sphere_easyedit.removal import FactorKeeper
from sphere_easyedit.runs.repair import RepairSettings, key_order
from sphere_easyedit.runs.schema import Repair
from sphere_easyedit.runs.sequential import RunSettings, run_sequential


@given(st.data())
def test_the_order_of_keys_follows_batches_and_repairs(data: st.DataObject) -> None:
    facts = data.draw(st.lists(st.integers(0, 99), unique=True, max_size=12).map(sorted))
    order: list[int] = []
    repairs = []
    for count, fact in enumerate(facts, start=1):
        order.append(fact)
        for number in range(data.draw(st.integers(0, 2))):
            places = data.draw(st.lists(st.sampled_from(order), unique=True, min_size=1))
            order = [one for one in order if one not in places] + places
            repairs.append(Repair(count, number + 1, tuple(places), tuple(places), 0.0))
    assert key_order(facts, repairs) == order


@pytest.mark.parametrize("changes", [{"base_alg": "MEMIT", "keep_previous_keys": True}, {"base_alg": "AlphaEdit"}],
                         ids=["MEMIT", "AlphaEdit"])
def test_an_edit_made_anew_is_solved_without_its_earlier_keys(
        changes: dict[str, Any], llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    """Against the closed form in float64, with the keys that are left."""
    hparams = tiny_hparams(llama_stats, layers=[1], alpha=0.0, v_num_grad_steps=3, **changes)
    model = tiny_model("llama")
    session = EditSession.of(model)
    sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    keys = session.history[1].keys
    before = edited_weights(model, hparams)[1]
    seen: list[sphere.EditEvent] = []

    class Keeps(sphere.EditCallback):
        def on_batch_end(self, event: sphere.EditEvent) -> None:
            seen.append(event)

    sphere.apply_sphere_to_model(model, tok, [REQUESTS[1]], hparams, replaces=[1], callbacks=[Keeps()])
    [event] = seen
    assert (event.num_edits, session.num_edits, session.num_batches) == (3, 3, 2)
    update = event.updates[1]
    assert torch.equal(session.history[1].keys, torch.cat([keys[:, [0, 2]], update.solved_for], dim=1))
    left = torch.cat([keys[:, [0, 2]], update.solved_for], dim=1).double()
    if hparams.base_alg == "MEMIT":
        moment = load_moment(session.statistics[1].path, len(keys)).double()
        adjusted = torch.linalg.solve(hparams.mom2_update_weight * moment + left @ left.T, update.solved_for.double())
    else:
        space = session.metrics[1].space
        system = space.project(left @ left.T) + hparams.L2 * torch.eye(len(keys), dtype=torch.float64)
        adjusted = torch.linalg.solve(system, space.project(update.solved_for))
    assert relative_error(update.keys, adjusted) < 1e-5
    assert relative_error(edited_weights(model, hparams)[1] - before, update.values.double() @ adjusted.T) < 1e-4


def test_replaced_edits_must_exist_and_a_failed_batch_keeps_their_keys(
        llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    hparams, model = tiny_hparams(llama_stats, base_alg="AlphaEdit", v_num_grad_steps=2), tiny_model("llama")
    sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    session, weights = EditSession.of(model), edited_weights(model, hparams)
    keys = {layer: history.keys for layer, history in session.history.items()}

    class Fails(sphere.EditCallback):
        def on_batch_end(self, event: sphere.EditEvent) -> None:
            raise RuntimeError("no")

    for replaces in ([3], [-1], [0, 0]):
        with pytest.raises(ValueError, match="give different numbers from 0 to 2"):
            sphere.apply_sphere_to_model(model, tok, REQUESTS[:1], hparams, replaces=replaces)
    with pytest.raises(RuntimeError):
        sphere.apply_sphere_to_model(model, tok, REQUESTS[:1], hparams, replaces=[0], callbacks=[Fails()])
    with pytest.raises(ValueError, match="executor"):
        sphere.apply_sphere_to_model(model, tok, REQUESTS[:1], hparams, replaces=[0], executor=lambda *_, **__: None)
    assert session.num_edits == 3
    assert all(torch.equal(session.history[layer].keys, one) for layer, one in keys.items())
    assert all(torch.equal(weights[layer], one) for layer, one in edited_weights(model, hparams).items())


# --- runs ----------------------------------------------------------------------------------------------------

SETTINGS = {"MEMIT": {"keep_previous_keys": True}, "AlphaEdit": {}, "PRUNE": {}, "ReplayFT": {}}


@pytest.fixture
def records() -> list[EditRecord]:
    return load_records("demo", None, 7, 0)


def _hparams(folder: Path, method: str = "AlphaEdit", **changes: Any) -> sphere.SPHEREHyperParams:
    trained = {"ft_lr": 0.02, "ft_epochs": 3, "ft_batch_size": 4, "kl_factor": 0.1, "projection_stage": "update"}
    return tiny_hparams(folder, base_alg=method, v_num_grad_steps=3, alpha=0.0, **SETTINGS[method],
                        **(trained if method == "ReplayFT" else {}), **changes)


def _run(folder: Path, tok: PreTrainedTokenizerBase, records: list[EditRecord], hparams: sphere.SPHEREHyperParams,
         repair: RepairSettings | None, *callbacks: sphere.EditCallback, resume: bool = False
         ) -> tuple[dict[str, Any], dict[int, Tensor], torch.nn.Module]:
    model = tiny_model("llama")
    result = run_sequential(model, tok, records, hparams,
                            RunSettings(folder, 2, resume=resume, checkpoint_every=2, repair=repair), callbacks)
    return result.summary, edited_weights(model, hparams), model


def _repairs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "repairs.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", SETTINGS)
def test_a_run_is_repaired(method: str, tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase,
                           records: list[EditRecord]) -> None:
    hparams = _hparams(llama_stats, method)
    summary, weights, model = _run(tmp_path / "run", tok, records, hparams, RepairSettings(4, norm_limit=9.0))
    repairs = _repairs(tmp_path / "run")
    # The random model predicts next to nothing, so most facts fail: in batches of 2, twice after 4 and after 7 edits.
    assert {(line["num_edits"], line["round"]) for line in repairs} == {(4, 1), (4, 2), (7, 1), (7, 2)}
    assert all(1 <= len(line["places"]) <= 2 and max(line["places"]) < line["num_edits"] for line in repairs)
    assert [line["case_ids"] for line in repairs] == [[records[place].case_id for place in line["places"]]
                                                      for line in repairs]
    scores = efficacies(model, tok, records)
    assert summary["unrepaired"] == [record.case_id for record, score in zip(records, scores, strict=True)
                                     if score != 1.0]
    assert summary["repaired"] == sum(len(line["places"]) for line in repairs)
    session = EditSession.of(model)
    assert summary["num_edits"] == session.num_edits == 7
    if hparams.method.keeps_keys(hparams):
        assert all(history.num_keys == 7 for history in session.history.values())
    energies = read_energy_csv(tmp_path / "run" / "energy.csv")
    assert [record.num_edits for record in energies] == [0, 2, 4, 6, 7]
    if method != "PRUNE":
        last = energies[-1].energy
        assert all(last[layer] == pytest.approx(float(hyperspherical_energy(weight)), rel=1e-5)
                   for layer, weight in weights.items())
    assert not list((tmp_path / "run").rglob(".*"))


class Killed(BaseException):
    pass


class KillsAt(sphere.EditCallback):
    def __init__(self, num_edits: int) -> None:
        self.num_edits = num_edits

    def on_batch_start(self, event: sphere.EditEvent) -> None:
        if event.num_edits == self.num_edits:
            raise Killed


@pytest.mark.parametrize("method", SETTINGS)
def test_a_repaired_run_is_resumed_to_the_same_bits(
        method: str, tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase, records: list[EditRecord],
        monkeypatch: pytest.MonkeyPatch) -> None:
    hparams, repair = _hparams(llama_stats, method), RepairSettings(4, norm_limit=9.0)
    summary, whole, _ = _run(tmp_path / "whole", tok, records, hparams, repair)
    with pytest.raises(Killed):  # after the first repair
        _run(tmp_path / "run", tok, records, hparams, repair, KillsAt(4))
    with monkeypatch.context() as patch, pytest.raises(Killed):  # within the second
        patch.setattr("sphere_easyedit.runs.repair.Repairer._norm", _raise_killed)
        _run(tmp_path / "run", tok, records, hparams, repair, resume=True)
    again, weights, _ = _run(tmp_path / "run", tok, records, hparams, repair, resume=True)
    assert all(torch.equal(weights[layer], weight) for layer, weight in whole.items())
    for one in (summary, again):
        for name in [name for name in one if name.endswith(("seconds", "bytes"))]:
            del one[name]
    assert again == summary
    assert [(line["num_edits"], line["round"], line["places"]) for line in _repairs(tmp_path / "run")] == [
        (line["num_edits"], line["round"], line["places"]) for line in _repairs(tmp_path / "whole")]
    with pytest.raises(ValueError, match="repair was"):
        _run(tmp_path / "run", tok, records, hparams, replace(repair, rounds=3), resume=True)


def _raise_killed(*_: Any) -> float:
    raise Killed


def test_a_repair_ends_where_the_change_would_be_too_large(
        tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase, records: list[EditRecord],
        caplog: pytest.LogCaptureFixture) -> None:
    hparams = _hparams(llama_stats)
    summary, weights, model = _run(tmp_path / "run", tok, records, hparams, RepairSettings(7, norm_limit=1 + 1e-9))
    _, plain, _ = _run(tmp_path / "plain", tok, records, hparams, None)
    assert "would bring the norm of the change to" in caplog.text
    assert summary["repaired"] == 0 and not (tmp_path / "run" / "repairs.jsonl").exists()
    assert all(torch.equal(weights[layer], weight) for layer, weight in plain.items())
    assert EditSession.of(model).history[1].num_keys == 7


def test_what_can_not_be_repaired_is_refused(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase,
                                             records: list[EditRecord]) -> None:
    hparams = _hparams(llama_stats)
    with pytest.raises(ValueError, match="repair is set, but FactorKeeper"):
        _run(tmp_path / "run", tok, records, hparams, RepairSettings(4), FactorKeeper(tmp_path / "factors", hparams))
    theirs = sphere.SPHEREHyperParams.from_dict({**hparams.to_dict(), "executor": "easyedit",
                                                 "projection_stage": "update"})
    with pytest.raises(ValueError, match="repair is set, but executor easyedit"):
        _run(tmp_path / "run", tok, records, theirs, RepairSettings(4))
    for wrong in ({"every": 0}, {"every": 4, "rounds": 0}, {"every": 4, "norm_limit": 1.0},
                  {"every": 4, "norm_limit": float("nan")}):
        with pytest.raises(ValueError, match="repair: "):
            RepairSettings(**wrong)
    assert not (tmp_path / "run").exists()


def test_the_command_line_repairs(workplace: Path) -> None:
    done = call_cli("edit", "--hparams", "tiny.yaml", "--num-edits", "4", "--batch-size", "2", "--repair-every", "2",
                    "--repair-rounds", "1", "--repair-norm", "3", "--report", "--output", "repaired", cwd=workplace)
    assert done.returncode == 0, done.stderr
    run = workplace / "repaired"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["repaired"] > 0
    assert (f"Edited again: {summary['repaired']} facts; {len(summary['unrepaired'])} are still not predicted"
            in " ".join(done.stdout.split()))
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["repair"] == {
        "every": 2, "rounds": 1, "norm_limit": 3.0}
    assert "facts again that later edits had overwritten" in (run / "report.html").read_text()
