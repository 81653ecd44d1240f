"""DriftGuard: what it compares with what, what it does about it, and how it goes on after an interruption."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import edited_weights, tiny_hparams, tiny_model
from sphere_easyedit.callbacks.drift_guard import Action
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.requests import parse_requests
from sphere_easyedit.evaluation.metrics import evaluate_records
from sphere_easyedit.runs.sequential import RunSettings, run_sequential

BATCH = 4


def requests_of(batch: int) -> list[dict[str, Any]]:
    return [{"prompt": "The capital of {} is", "subject": f"land {batch} {place}", "target_new": "Rome"}
            for place in range(BATCH)]


class Edited:
    """Batches of random changes, as a run tells a callback of them; a real change of weights behind each."""

    def __init__(self, guard: sphere.DriftGuard) -> None:
        self.guard, self.batches = guard, 0
        self.weights = {layer: torch.randn(8, 12, generator=torch.Generator().manual_seed(layer)) for layer in (1, 2)}

    def batch(self, size: float = 0.01) -> float:
        """One batch; returns the share of it that stands."""
        event = sphere.EditEvent(nn.Identity(), self.weights, self.batches * BATCH, self.batches, (),
                                 requests=parse_requests(requests_of(self.batches)))
        self.guard.on_batch_start(event)
        generator = torch.Generator().manual_seed(100 + self.batches)
        before = self.weights
        change = {layer: size * torch.randn(8, 12, generator=generator) for layer in before}
        strength = 1.0
        while True:
            self.weights = {layer: weight + strength * change[layer] for layer, weight in before.items()}
            norms = {layer: float((strength * part).norm()) for layer, part in change.items()}
            event = sphere.EditEvent(nn.Identity(), self.weights, (self.batches + 1) * BATCH, self.batches + 1, (),
                                     update_norms=norms, strength=strength, requests=event.requests)
            try:
                share = self.guard.review(event)
            except sphere.StopEditing:
                self.weights = before
                raise
            if share == 1.0:
                break
            strength *= share
        self.guard.on_batch_end(event)
        self.batches += 1
        return strength


class Efficacy:
    """Stands in for a measurement: what is set, and what was asked."""

    def __init__(self, value: float = 100.0) -> None:
        self.value = value
        self.asked: list[Sequence[Mapping[str, str]]] = []

    def __call__(self, model: nn.Module, facts: Sequence[Mapping[str, str]]) -> float:
        self.asked.append(facts)
        return self.value


def guarded(action: Action = "warn", **settings: Any) -> tuple[Edited, sphere.DriftGuard]:
    guard = sphere.DriftGuard(action, **{"warmup": 3, "norm": None, "energy": None, **settings})
    return Edited(guard), guard


def test_it_sees_the_change_of_energy_and_the_norm() -> None:
    edited, guard = guarded(norm=9.0)
    before = {layer: float(sphere.hyperspherical_energy(weight)) for layer, weight in edited.weights.items()}
    start: dict[int, Tensor] = edited.weights
    edited.batch()
    (seen,) = guard.records
    steps = [abs(float(sphere.hyperspherical_energy(weight)) / before[layer] - 1)
             for layer, weight in edited.weights.items()]
    assert seen.energy_step == pytest.approx(sum(steps) / 2, rel=1e-6)
    norms = [float((weight - start[layer]).norm()) for layer, weight in edited.weights.items()]
    assert seen.update_norm == pytest.approx(sum(norms) / 2, rel=1e-5)
    assert (seen.num_edits, seen.signs, seen.strength) == (BATCH, (), 1.0)


@pytest.mark.parametrize(("sign", "settings"), [("norm", {"norm": 2.0}), ("energy", {"energy": 20.0})])
def test_nothing_is_done_while_batches_are_as_usual_nor_in_the_warm_up(sign: str, settings: dict[str, float]) -> None:
    edited, guard = guarded("stop", **settings)
    for size in (0.01, 0.5, 0.01, 0.01, 0.01):  # the second is far off, but sets the measure with two others
        edited.batch(size)
    assert all(not seen.signs for seen in guard.records)
    with pytest.raises(sphere.StopEditing):
        edited.batch(1.0)
    assert sign in guard.records[-1].signs


def test_warn_lets_the_batch_stand_and_says_why(caplog: pytest.LogCaptureFixture) -> None:
    edited, guard = guarded(norm=1.5)
    for size in (0.01, 0.01, 0.01, 0.02):
        assert edited.batch(size) == 1.0
    assert guard.records[-1].signs == ("norm",)
    assert "batch up to 16 edits: the norm of the change is 0.1" in caplog.text and "is usual" in caplog.text


def test_lower_halves_until_the_batch_is_as_usual() -> None:
    edited, guard = guarded("lower", norm=1.5)
    for size in (0.01, 0.01, 0.01):
        edited.batch(size)
    assert edited.batch(0.04) == 0.25
    assert guard.records[-1].signs == () and guard.records[-1].strength == 0.25
    before = edited.weights
    with pytest.raises(sphere.StopEditing, match="the norm of the change"):
        edited.batch(1.0)
    assert edited.weights is before
    assert guard.records[-1].strength == 0.125 and guard.records[-1].signs == ("norm",)


def test_early_facts_are_a_fair_sample_of_the_warm_up_and_compared_with_their_first_efficacy() -> None:
    efficacy = Efficacy(80.0)
    edited, guard = guarded("stop", early=0.75, facts=7, efficacy_of=efficacy)
    for _ in range(4):
        edited.batch()
    assert [seen.early_efficacy for seen in guard.records] == [None, None, 80.0, 80.0]
    facts = efficacy.asked[-1]
    assert [sum(f"land {batch} " in fact["subject"] for fact in facts) for batch in range(4)] == [3, 2, 2, 0]
    assert all(fact["prompt"] == "The capital of {} is" and fact["target_new"] == "Rome" for fact in facts)
    efficacy.value = 60.0
    edited.batch()
    efficacy.value = 59.0
    with pytest.raises(sphere.StopEditing, match="of 7 early facts 59% are left of 80%"):
        edited.batch()


def test_a_resumed_run_goes_on_with_the_same_measure(tmp_path: Path) -> None:
    def batches(guard: sphere.DriftGuard, again: bool) -> list[Any]:
        edited = Edited(guard)
        for number in range(5):
            if again and number in (1, 3, 4):  # the process was killed here, once before its batch was written
                edited.guard = guarded("warn", norm=1.5, early=0.5, facts=5, efficacy_of=Efficacy(),
                                       path=tmp_path / "killed.json")[1]
            edited.batch(0.01 * (1 + number))
        return edited.guard.records

    whole = guarded(norm=1.5, early=0.5, facts=5, efficacy_of=Efficacy(), path=tmp_path / "whole.json")[1]
    killed = guarded(norm=1.5, early=0.5, facts=5, efficacy_of=Efficacy(), path=tmp_path / "killed.json")[1]
    assert batches(whole, False) == batches(killed, True)
    assert (tmp_path / "whole.json").read_text() == (tmp_path / "killed.json").read_text()
    assert len(json.loads((tmp_path / "whole.json").read_text())["facts"]) == 5


def test_another_run_begins_with_another_measure(tmp_path: Path) -> None:
    _, guard = guarded(norm=1.5, path=tmp_path / "guard.json")
    for _ in range(2):
        edited = Edited(guard)
        edited.batch()
        assert [seen.num_edits for seen in guard.records] == [BATCH]


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "guard.json").write_text('{"facts": [], "records": [{}]}')
    edited, _ = guarded(norm=1.5, path=tmp_path / "guard.json")
    edited.batches = 1
    with pytest.raises(ValueError, match="not a file of a DriftGuard"):
        edited.batch()


@pytest.mark.parametrize(("settings", "message"), [
    ({"action": "flee"}, "action is 'flee'"), ({"energy": 0.0}, "energy is 0.0"),
    ({"norm": float("nan")}, "norm is nan"),
    ({"early": 1.5}, "early is 1.5: give a number above 0 and at most 1"), ({"warmup": 0}, "warmup is 0"),
    ({"facts": 0}, "facts is 0"), ({"energy": None, "norm": None}, "nothing to watch")])
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sphere.DriftGuard(**settings)


def test_a_run_ends_before_a_batch_that_is_too_large(tmp_path: Path, llama_stats: Path,
                                                     tok: PreTrainedTokenizerBase) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="MEMIT", v_num_grad_steps=3)
    records = load_records("demo", None, 8, 0)
    model = tiny_model("llama")
    # Any batch is too large for this guard once the warm-up is over.
    guard = sphere.DriftGuard("stop", tok, norm=0.01, energy=None, warmup=2, facts=3, path=tmp_path / "guard.json")
    result = run_sequential(model, tok, records, hparams, RunSettings(tmp_path / "run", 2), [guard])
    assert result.summary["num_edits"] == 4 and "the norm of the change" in result.summary["stopped"]
    assert [seen.num_edits for seen in guard.records] == [2, 4, 6]
    other = tiny_model("llama")
    for first in (0, 2):
        sphere.apply_sphere_to_model(other, tok, [record.request() for record in records[first: first + 2]], hparams)
    assert all(torch.equal(weight, edited_weights(other, hparams)[layer])
               for layer, weight in edited_weights(model, hparams).items())


def test_early_efficacy_is_protocol_papers(llama_stats: Path, tok: PreTrainedTokenizerBase) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="MEMIT", v_num_grad_steps=20, v_lr=1.0, mom2_update_weight=1.0)
    records = load_records("demo", None, 6, 0)
    model, guard = tiny_model("llama"), sphere.DriftGuard(tok=tok, warmup=1, facts=2, early=0.5)
    for first in (0, 2, 4):
        sphere.apply_sphere_to_model(model, tok, [record.request() for record in records[first: first + 2]], hparams,
                                     callbacks=[guard])
    scores = evaluate_records(model, tok, records[:2])
    assert guard.records[-1].early_efficacy == 100 * sum(score.efficacy or 0 for score in scores) / 2
