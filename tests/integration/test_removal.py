"""Fact removal: the algebra, the reported errors, and that all of it happens or nothing."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from typer.testing import CliRunner, Result

import sphere_easyedit as sphere
from helpers.golden import GOLDEN
from helpers.models import REQUESTS, edited_weights, relative_error, save_tiny_model, tiny_hparams, tiny_model
from helpers.sessions import (
    BATCHES,  # case_id are the places: 0; 1, 2; 3, 4
    Make,
    equal,
    folder,  # noqa: F401 - a fixture
    hparams_of,  # noqa: F401 - a fixture
    state_of,
)
from sphere_easyedit.cli.app import app
from sphere_easyedit.core.updates import LowRankUpdate
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.callbacks import EditEvent
from sphere_easyedit.editing.checkpoints import save_checkpoint
from sphere_easyedit.methods.memit import MEMIT
from sphere_easyedit.removal import Fact, FactorKeeper, remove_facts, removing
from sphere_easyedit.removal.factors import (
    PastRemoval,
    factors_path,
    read_batches,
    read_removals,
    read_update,
    record_path,
    write_removals,
)
from sphere_easyedit.removal.removing import Edits, disturbances, remove_from
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.sequential import RunSettings, run_sequential
from sphere_easyedit.utils.files import checksum_path

PROPERTY = settings(max_examples=80, deadline=None, derandomize=True)
METHODS = ("AlphaEdit", "MEMIT", "MEMIT_seq", "MEMIT plain", "MEMIT compensated")
KINDS = [(method, "llama") for method in METHODS] + [("AlphaEdit", "gpt2"), ("MEMIT", "gpt2")]
# Edits that show in what a tiny random model says: the prompt ends with the subject, so that no attention is needed.
SHOWING = {"alpha": 0.0, "v_num_grad_steps": 40, "clamp_norm_factor": 60.0, "v_weight_decay": 0.0, "kl_factor": 0.0,
           "L2": 0.01, "nullspace_share": 1.0, "context_templates": []}
SPOKEN = [{"prompt": "People spoke of {}", "subject": subject, "target_new": target} for subject, target in (
    ("France", "Rome"), ("John Smith", "London"), ("Brazil", "English"), ("Marie Curie", "German"))]


# --- the algebra --------------------------------------------------------------------------------------------


@st.composite
def sums(draw: st.DrawFn) -> tuple[Tensor, Edits]:
    """An original weight and the edits since: some removed earlier, some being removed."""
    d_out, d_in = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    count = sum(sizes)
    states = draw(st.lists(st.sampled_from(["absent", "removed", "stays"]), min_size=count, max_size=count))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 10.0 ** draw(st.integers(-3, 2))

    update = LowRankUpdate(noise(d_out, count), noise(d_in, count), noise(d_in, count))
    batch = torch.cat([torch.full((size,), sum(sizes[: place + 1])) for place, size in enumerate(sizes)])
    return noise(d_out, d_in), Edits(update, batch, torch.tensor([state != "absent" for state in states]),
                                   torch.tensor([state == "removed" for state in states]), len(sizes) + 1)


def edited(original: Tensor, edits: Edits) -> Tensor:
    """The weight as batches leave it, each rounded; what is absent is taken out again in a step of its own."""
    weight = original
    for batch in edits.batch.unique():
        chosen = edits.batch == batch
        change = LowRankUpdate(edits.update.values[:, chosen], edits.update.keys[:, chosen])
        weight = (weight.to(torch.promote_types(weight.dtype, torch.float32)) + change.dense()).to(original.dtype)
    absent = ~edits.present
    return (weight.double() - outer(edits.update, absent)).to(original.dtype)


def outer(update: LowRankUpdate, chosen: Tensor) -> Tensor:
    total = torch.zeros(len(update.values), len(update.keys), dtype=torch.float64)
    for column in chosen.nonzero().flatten():
        total += torch.outer(update.values[:, column].double(), update.keys[:, column].double())
    return total


@given(sums(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
@PROPERTY
def test_what_stays_is_the_sum_of_what_stays(drawn: tuple[Tensor, Edits], dtype: torch.dtype) -> None:
    original, edits = drawn[0].to(dtype), drawn[1]
    weight = edited(original, edits)
    left, said = remove_from(7, original, weight, edits)  # rounding alone is never refused
    assert left.dtype == dtype
    part = outer(edits.update, edits.removed)
    rounding = torch.finfo(dtype).eps * float(weight.double().norm() + part.norm())
    assert float((left.double() - (weight.double() - part)).norm()) <= rounding
    whole = outer(edits.update, edits.present)
    wanted = original.double() + whole - part
    if bool(edits.present.any()):
        off = float((left.double() - wanted).norm() / whole.norm())
        assert said.rounding == pytest.approx(off, rel=1e-6, abs=1e-12)
    assert said.layer == 7
    if dtype == torch.float64:
        assert said.taken == pytest.approx(1.0, abs=1e-9)


@given(sums())
@PROPERTY
def test_stated_errors_by_loops(drawn: tuple[Tensor, Edits]) -> None:
    edits = drawn[1]
    values, keys = edits.update.values.double(), edits.update.keys.double()
    assert edits.update.solved_for is not None
    at = edits.update.solved_for.double()
    gone = [int(i) for i in edits.removed.nonzero()]
    stays = [int(j) for j in (edits.present & ~edits.removed).nonzero()]
    residuals, others = disturbances(edits)

    def put(which: Sequence[int], key: Tensor) -> float:
        total = torch.zeros(len(values), dtype=torch.float64)
        for one in which:
            total += values[:, one] * (keys[:, one] @ key)
        return float(total.norm())

    def ratio(top: float, bottom: float) -> float:
        return 0.0 if top == 0 else top / bottom if bottom else float("inf")

    assert residuals.tolist() == pytest.approx([
        ratio(put([j for j in stays if edits.batch[j] >= edits.batch[i]], at[:, i]), put([i], at[:, i]))
        for i in gone], rel=1e-6)
    assert others.tolist() == pytest.approx([ratio(put(gone, at[:, j]), put([j], at[:, j])) for j in stays], rel=1e-6)


@given(sums(), st.integers(0, 100))
@PROPERTY
def test_another_change_is_told_from_rounding(drawn: tuple[Tensor, Edits], place: int) -> None:
    original, edits = drawn
    weight = edited(original, edits)
    scale = float(original.norm() + weight.norm()
                  + (edits.update.values.norm(dim=0) * edits.update.keys.norm(dim=0)).sum())
    weight.view(-1)[place % weight.numel()] += 1e-3 * scale
    with pytest.raises(ValueError, match="not the original one plus the edits on file"):
        remove_from(0, original, weight, edits)


# --- tiny models --------------------------------------------------------------------------------------------


class Recorder(sphere.EditCallback):
    """Weights before each batch and after the last, and the keys that each edit was solved for."""

    def __init__(self) -> None:
        self.weights: list[dict[int, Tensor]] = []
        self.keys: dict[int, list[Tensor]] = {}

    def on_batch_start(self, event: EditEvent) -> None:
        self.weights.append({layer: weight.clone() for layer, weight in event.weights.items()})

    def on_batch_end(self, event: EditEvent) -> None:
        for layer, update in event.updates.items():
            assert update.solved_for is not None
            self.keys.setdefault(layer, []).extend(update.solved_for.double().T)


def edit(model: nn.Module, tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams, kept: Path | None,
         batches: Sequence[Sequence[dict[str, Any]]] = BATCHES,
         callbacks: Sequence[sphere.EditCallback] = ()) -> None:
    keeper = [] if kept is None else [FactorKeeper(kept, hparams)]
    for batch in batches:
        sphere.apply_sphere_to_model(model, tok, batch, hparams, callbacks=[*keeper, *callbacks])


def weights_of(model: nn.Module, hparams: sphere.SPHEREHyperParams) -> dict[int, Tensor]:
    return {layer: weight.clone() for layer, weight in hparams.editable(model).weights().items()}


@pytest.mark.parametrize(("method", "family"), KINDS)
def test_the_only_fact_of_a_batch(method: str, family: str, tok: PreTrainedTokenizerBase, hparams_of: Make,
                                  tmp_path: Path) -> None:
    hparams, model = hparams_of(method, family), tiny_model(family)
    edit(model, tok, hparams, tmp_path, [BATCHES[1]])
    before = weights_of(model, hparams)
    edit(model, tok, hparams, tmp_path, [BATCHES[0]])
    moved = {layer: relative_error(weight, before[layer]) for layer, weight in weights_of(model, hparams).items()}
    remove_facts(model, hparams, tmp_path, [2])
    for layer, weight in weights_of(model, hparams).items():
        assert relative_error(weight, before[layer]) < 3e-7 < 1e-3 < moved[layer]


@pytest.mark.parametrize(("method", "family"), KINDS)
def test_all_facts_at_once_and_one_by_one(method: str, family: str, tok: PreTrainedTokenizerBase, hparams_of: Make,
                                          tmp_path: Path) -> None:
    hparams = hparams_of(method, family)
    for place, portions in enumerate(([[0, 1, 2, 3, 4]], [[3], [0, 2], [4], [1]])):
        model, kept = tiny_model(family), tmp_path / str(place)
        original = weights_of(model, hparams)
        edit(model, tok, hparams, kept)
        changed = weights_of(model, hparams)
        for portion in portions:
            done = remove_facts(model, hparams, kept, portion)
        assert done.staying == ()
        for said in done.layers:
            now, was = weights_of(model, hparams)[said.layer], original[said.layer]
            off, norm = float((now.double() - was.double()).norm()), float(was.double().norm())
            assert off < 3e-7 * norm
            if place == 0:
                size = float((changed[said.layer].double() - was.double()).norm())
                assert off == pytest.approx(said.rounding * size, rel=1e-3, abs=1e-12)
                assert said.taken == pytest.approx(1.0, abs=1e-4)
            assert (said.largest, said.median) == (0.0, 0.0)


@pytest.mark.parametrize(("method", "family"), [("AlphaEdit", "llama"), ("MEMIT", "gpt2")])
def test_what_is_stated_is_so_in_the_weights(method: str, family: str, tok: PreTrainedTokenizerBase, hparams_of: Make,
                                             tmp_path: Path) -> None:
    """Against weights and keys alone, without a look at the factors."""
    hparams, model, seen = hparams_of(method, family), tiny_model(family), Recorder()
    edit(model, tok, hparams, tmp_path / "factors", callbacks=[seen])
    before = weights_of(model, hparams)
    # What each fact put at its own key: each by itself removed from a copy of the run.
    own: dict[int, list[float]] = {layer: [] for layer in hparams.layers}
    sphere.EditSession.of(model).save(tmp_path / "session")
    for case in range(5):
        again, kept = tiny_model(family), shutil.copytree(tmp_path / "factors", tmp_path / f"copy-{case}")
        again.load_state_dict(model.state_dict())
        remove_facts(again, hparams, kept, [case], sphere.EditSession.load(tmp_path / "session"))
        for layer, weight in weights_of(again, hparams).items():
            own[layer].append(float(((before[layer].double() - weight.double()) @ seen.keys[layer][case]).norm()))
    done = remove_facts(model, hparams, tmp_path / "factors", [1])
    after = weights_of(model, hparams)
    for said in done.layers:
        layer, keys = said.layer, seen.keys[said.layer]
        put = (after[layer].double() - seen.weights[1][layer].double()) @ keys[1]
        assert said.residuals == pytest.approx([float(put.norm()) / own[layer][1]], rel=1e-3)
        gone = before[layer].double() - after[layer].double()
        ratios = [float((gone @ keys[case]).norm()) / own[layer][case] for case in (0, 2, 3, 4)]
        assert said.largest == pytest.approx(max(ratios), rel=1e-3)
        assert said.median == pytest.approx(sum(sorted(ratios)[1:3]) / 2, rel=1e-3)


@torch.no_grad()
def log_probability(model: nn.Module, tok: PreTrainedTokenizerBase, request: dict[str, Any]) -> float:
    """Of a request's target after its prompt, nats."""
    prompt = tok(request["prompt"].format(request["subject"]))["input_ids"]
    target = tok(" " + request["target_new"])["input_ids"]
    logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1: -1]
    return float(logits.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_model_no_longer_says_it(family: str, tok: PreTrainedTokenizerBase, hparams_of: Make,
                                     tmp_path: Path) -> None:
    hparams, model = hparams_of(family=family, **SHOWING), tiny_model(family)

    def said() -> list[float]:
        return [log_probability(model, tok, request) for request in SPOKEN]

    never = said()
    edit(model, tok, hparams, tmp_path, [SPOKEN[:1], SPOKEN[1:3], SPOKEN[3:]])
    held = said()
    remove_facts(model, hparams, tmp_path, [1])
    now = said()
    assert held[1] - never[1] > 4.0
    assert now[1] - never[1] < 0.5
    for other in (0, 2, 3):  # which stay
        assert now[other] - never[other] > 0.75 * (held[other] - never[other]) > 2.0


@pytest.mark.parametrize("method", ["AlphaEdit", "MEMIT"])
def test_nearer_to_a_run_without_the_fact_than_with_it(method: str, tok: PreTrainedTokenizerBase, hparams_of: Make,
                                                       tmp_path: Path) -> None:
    """Not the same: what came after was fitted with the fact in place."""
    hparams, model, without = hparams_of(method), tiny_model("llama"), tiny_model("llama")
    edit(model, tok, hparams, tmp_path)
    edit(without, tok, hparams, None, [BATCHES[0], BATCHES[1][1:], BATCHES[2]])
    held, never = weights_of(model, hparams), weights_of(without, hparams)
    remove_facts(model, hparams, tmp_path, [1])
    for layer, now in weights_of(model, hparams).items():
        off = float((now - never[layer]).norm()) / float((held[layer] - never[layer]).norm())
        assert 1e-3 < off < 0.9


def test_a_batch_whose_change_was_lowered(tok: PreTrainedTokenizerBase, hparams_of: Make, tmp_path: Path) -> None:
    class Halve(sphere.EditCallback):
        def review(self, event: EditEvent) -> float:
            return 0.5 if event.strength == 1.0 else 1.0

    hparams, model = hparams_of(), tiny_model("llama")
    original = weights_of(model, hparams)
    edit(model, tok, hparams, tmp_path, callbacks=[Halve()])
    remove_facts(model, hparams, tmp_path, range(5))
    assert all(relative_error(weight, original[layer]) < 3e-7 for layer, weight in weights_of(model, hparams).items())


@pytest.mark.parametrize(("change", "warned"), [(2.0 ** -10, True), (0.5, False)])
def test_a_warning_if_little_of_the_change_left(change: float, warned: bool, hparams_of: Make, tmp_path: Path,
                                                caplog: pytest.LogCaptureFixture) -> None:
    """Next to 1, bfloat16 has steps of 1/128 and 1/256."""
    original = torch.ones(2, 3, dtype=torch.bfloat16)
    weight = (original.float() + change).to(torch.bfloat16)
    keeper = FactorKeeper(tmp_path, hparams_of())
    update = LowRankUpdate(torch.full((2, 1), change), torch.ones(3, 1), torch.ones(3, 1))
    event = EditEvent(nn.Linear(3, 2), {1: original}, 0, 0, ["a"])
    keeper.on_batch_start(event)
    keeper.on_batch_end(replace(event, weights={1: weight}, num_edits=1, updates={1: update}))
    left, done = removing.weights_without({1: original}, {1: weight}, tmp_path, 1, [], ["a"])
    assert torch.equal(left[1], original)
    assert done.layers[0].taken == (0.0 if warned else 1.0)
    assert (caplog.messages == ["layer 1: only 0% of the removed change left the weight, since torch.bfloat16 is "
                                "coarser than the change: edit and remove facts in float32"]) == warned
    assert bool(caplog.messages) == warned


def test_bfloat16_says_what_its_steps_swallow(tok: PreTrainedTokenizerBase, hparams_of: Make, tmp_path: Path) -> None:
    hparams, model = hparams_of(), tiny_model("llama").to(torch.bfloat16)
    edit(model, tok, hparams, tmp_path)
    before = weights_of(model, hparams)
    done = remove_facts(model, hparams, tmp_path, [3])
    for said in done.layers:
        factors = [read_update(factors_path(tmp_path, batch.num_edits), said.layer, (48, 80))
                   for batch in read_batches(tmp_path, 5, hparams.layers)]
        [of_fact] = [outer(one, torch.tensor([True, False])) for one in factors[2:]]
        now = weights_of(model, hparams)[said.layer]
        taken = float(((before[said.layer].double() - now.double()) * of_fact).sum() / (of_fact * of_fact).sum())
        assert said.taken == pytest.approx(taken, rel=1e-6)
        assert 1e-4 < said.rounding < 0.2
        assert 0.5 < said.taken < 1.5


# --- going on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["AlphaEdit", "MEMIT", "MEMIT_seq"])
def test_editing_goes_on(method: str, tok: PreTrainedTokenizerBase, hparams_of: Make, tmp_path: Path,
                         caplog: pytest.LogCaptureFixture) -> None:
    hparams, model = hparams_of(method), tiny_model("llama")
    edit(model, tok, hparams, tmp_path, BATCHES[:2])
    session = sphere.EditSession.of(model)
    keys = {layer: history.keys for layer, history in session.history.items()}
    done = remove_facts(model, hparams, tmp_path, [1])
    assert [fact.case_id for fact in done.staying] == [0, 2]
    assert (session.num_edits, session.num_batches, done.num_edits) == (3, 2, 3)
    for layer, history in session.history.items():
        assert torch.equal(history.keys, keys[layer][:, [0, 2] if keys[layer].shape[1] else []])
    with caplog.at_level(logging.INFO):
        edit(model, tok, hparams, tmp_path, BATCHES[2:])
    assert "afresh" not in caplog.text
    assert session.num_edits == 5
    # Now reports leave the removed fact out, and it can't be removed again.
    with pytest.raises(ValueError, match="case_id 1 was removed already"):
        remove_facts(model, hparams, tmp_path, [1])
    done = remove_facts(model, hparams, tmp_path, [3])
    assert [fact.case_id for fact in done.staying] == [0, 2, 4]
    if method != "MEMIT":
        assert session.history[1].keys.shape == (80, 3)
    # Edited anew it is another edit, and goes by its name.
    edit(model, tok, hparams, tmp_path, [[{**REQUESTS[1], "case_id": 1}]])
    assert [(fact.case_id, fact.batch) for fact in remove_facts(model, hparams, tmp_path, [1]).facts] == [(1, 6)]


def test_a_fact_edited_twice_goes_with_both_edits(tok: PreTrainedTokenizerBase, hparams_of: Make,
                                                  tmp_path: Path) -> None:
    hparams, model = hparams_of(), tiny_model("llama")
    edit(model, tok, hparams, tmp_path, [BATCHES[1], [{**REQUESTS[1], "case_id": 0}]])
    assert [fact.batch for fact in remove_facts(model, hparams, tmp_path, [0, 0]).facts] == [2, 3]


def test_a_session_of_ones_own_and_a_saved_one(tok: PreTrainedTokenizerBase, hparams_of: Make, tmp_path: Path) -> None:
    hparams, model, session = hparams_of(), tiny_model("llama"), sphere.EditSession()
    keeper = FactorKeeper(tmp_path / "factors", hparams)
    for batch in BATCHES[:2]:
        sphere.apply_sphere_to_model(model, tok, batch, hparams, session=session, callbacks=[keeper])
    session.save(tmp_path / "session")
    again = tiny_model("llama")
    again.load_state_dict(model.state_dict())
    remove_facts(again, hparams, shutil.copytree(tmp_path / "factors", tmp_path / "copy"), [2],
             sphere.EditSession.load(tmp_path / "session"))
    remove_facts(model, hparams, tmp_path / "factors", [2], session)
    assert "_sphere_session" not in vars(model)
    assert all(torch.equal(weight, weights_of(again, hparams)[layer])
               for layer, weight in weights_of(model, hparams).items())


def test_a_rollback_brings_facts_back(tok: PreTrainedTokenizerBase, hparams_of: Make, tmp_path: Path) -> None:
    hparams, model, kept, checkpoints = hparams_of(), tiny_model("llama"), tmp_path / "f", tmp_path / "c"
    edit(model, tok, hparams, kept, BATCHES[:2])
    session, editable = sphere.EditSession.of(model), hparams.editable(model)
    session.drop_derived()
    save_checkpoint(editable, session, checkpoints)
    remove_facts(model, hparams, kept, [1])
    remove_facts(model, hparams, kept, [2])
    edit(model, tok, hparams, kept, BATCHES[2:])
    session.rollback(3, checkpoints)  # to before the removals
    assert [fact.case_id for fact in remove_facts(model, hparams, kept, [1]).staying] == [0, 2]
    assert [entry.facts[0].case_id for entry in read_removals(kept)] == [1]
    session.drop_derived()
    save_checkpoint(editable, session, checkpoints)
    remove_facts(model, hparams, kept, [2])
    session.rollback(3, checkpoints)  # to between them
    edit(model, tok, hparams, kept, BATCHES[2:])
    assert [entry.facts[0].case_id for entry in read_removals(kept)] == [1]
    assert [fact.case_id for fact in remove_facts(model, hparams, kept, [0]).staying] == [2, 3, 4]
    session.rollback(0)
    edit(model, tok, hparams, kept, BATCHES[2:])
    assert read_removals(kept) == []
    assert [path.name for path in kept.glob("factors-*.safetensors")] == ["factors-2.safetensors"]


def tree(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


class _Killed(BaseException):
    pass


class Kill(sphere.EditCallback):
    """Ends the run after so many edits, with the batch's factors on file already."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_batch_end(self, event: EditEvent) -> None:
        if event.num_edits == self.at:
            raise _Killed


@pytest.mark.parametrize("at", [2, 3, 4])
def test_a_resumed_run_has_the_factors_of_an_undisturbed_one(at: int, tok: PreTrainedTokenizerBase, hparams_of: Make,
                                                             tmp_path: Path) -> None:
    hparams, records = hparams_of(v_num_grad_steps=2), load_records("demo", None, 4, 0)
    measure = MeasureSettings(before=False, after=False)

    def run(name: str, at: int | None = None, resume: bool = False) -> dict[str, str]:
        folder = tmp_path / name
        callbacks: list[sphere.EditCallback] = [FactorKeeper(folder / "factors", hparams)]
        run_sequential(tiny_model("llama"), tok, records, hparams,
                       RunSettings(folder, 1, measure=measure, checkpoint_every=2, resume=resume),
                       [*callbacks, *([] if at is None else [Kill(at)])])
        return tree(folder / "factors")

    whole = run("whole")
    assert len(whole) == 8  # a checksum beside each
    with pytest.raises(_Killed):
        run("killed", at)
    assert run("killed", resume=True) == whole


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "match"), [
    ({"base_alg": "RECT"}, "RECT returns dense changes"),
    ({"base_alg": "PRUNE"}, "PRUNE returns dense changes"),
    ({"base_alg": "MEMIT", "executor": "easyedit"}, "executor easyedit returns dense changes"),
])
def test_methods_without_factors(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=match):
        FactorKeeper(tmp_path / "factors", tiny_hparams(tmp_path, **changes))
    assert not list(tmp_path.iterdir())


def test_a_registered_method_with_dense_changes(tmp_path: Path) -> None:
    class Dense(MEMIT):
        name = "Dense"
        is_low_rank = False

    sphere.register_method(Dense)
    try:
        with pytest.raises(ValueError, match="Dense returns dense changes"):
            FactorKeeper(tmp_path / "factors", tiny_hparams(tmp_path, base_alg="Dense"))
    finally:
        sphere.unregister_method("Dense")


def test_an_executors_batch_is_undone(tok: PreTrainedTokenizerBase, hparams_of: Make, tmp_path: Path) -> None:
    hparams, model = hparams_of("MEMIT"), tiny_model("llama")
    before = edited_weights(model, hparams)

    def executor(model: nn.Module, *_: Any, **__: Any) -> tuple[nn.Module, dict[str, Tensor]]:
        with torch.no_grad():
            hparams.editable(model).parameter(1).add_(0.01)
        return model, {}

    with pytest.raises(ValueError, match=r"layers \[1, 2\] is not of low rank"):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams, executor=executor,
                                     callbacks=[FactorKeeper(tmp_path / "factors", hparams)])
    assert all(torch.equal(weight, before[layer]) for layer, weight in edited_weights(model, hparams).items())
    assert not (tmp_path / "factors").exists()


def test_factors_are_kept_from_the_first_batch_on(tok: PreTrainedTokenizerBase, hparams_of: Make,
                                                  tmp_path: Path) -> None:
    hparams, model = hparams_of("MEMIT"), tiny_model("llama")
    edit(model, tok, hparams, None, BATCHES[:1])
    before = edited_weights(model, hparams)
    with pytest.raises(ValueError, match=r"holds 1 edits, but .* the factors of 0: keep factors from the first"):
        edit(model, tok, hparams, tmp_path, BATCHES[1:])
    assert all(torch.equal(weight, before[layer]) for layer, weight in edited_weights(model, hparams).items())
    with pytest.raises(ValueError, match="holds the factors of 0 edits, of 1 in the model"):
        remove_facts(model, hparams, tmp_path, [0])


Edited = tuple[nn.Module, sphere.SPHEREHyperParams, Path]


@pytest.fixture(scope="module")
def kept_once(folder: Path) -> Edited:
    """A model after three batches with the first fact removed, and its factors."""
    model, tok = tiny_model("llama"), AutoTokenizer.from_pretrained(GOLDEN / "llama" / "tiny-llama")
    hparams = tiny_hparams(folder / "llama", base_alg="MEMIT", keep_previous_keys=True, v_num_grad_steps=2)
    edit(model, tok, hparams, folder / "factors")
    remove_facts(model, hparams, folder / "factors", [0])
    sphere.EditSession.of(model).save(folder / "session")
    return model, hparams, folder / "factors"


@pytest.fixture
def kept(kept_once: Edited, tmp_path: Path) -> Edited:
    """The same, to be changed by one test."""
    model, hparams, factors = kept_once
    again = copy.deepcopy(model)
    sphere.EditSession.attach(again, sphere.EditSession.load(factors.with_name("session")))
    return again, hparams, shutil.copytree(factors, tmp_path / "factors")


@pytest.fixture
def unharmed(kept: Edited) -> Iterator[None]:
    """Model, session and record are as before when the test ends."""
    model, hparams, folder = kept
    session = sphere.EditSession.of(model)

    weights, record, held = edited_weights(model, hparams), record_path(folder).read_bytes(), state_of(session)
    yield
    assert equal(edited_weights(model, hparams), weights)
    assert record_path(folder).read_bytes() == record
    assert state_of(session) == held


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(("cases", "match"), [
    ([], "at least one case"), ("34", "give a list"), ([7], "case_id 7 was not edited"), (["3"], "'3' was not edited"),
    ([3, 0], "case_id 0 was removed already"),
], ids=str)
def test_wrong_cases(cases: Any, match: str, kept: Edited) -> None:
    with pytest.raises(ValueError, match=match):
        remove_facts(*kept, cases)


def remove_one(folder: Path) -> None:
    factors_path(folder, 3).unlink()


def flip_a_byte(folder: Path) -> None:
    content = bytearray(factors_path(folder, 3).read_bytes())
    content[-5] ^= 1
    factors_path(folder, 3).write_bytes(content)


def exchange(folder: Path) -> None:
    shutil.copy(factors_path(folder, 5), factors_path(folder, 3))


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object]) -> None:
    """Change the description and tensors of the second batch, without a checksum."""
    path = factors_path(folder, 3)
    with safe_open(path, framework="pt") as stored:
        [(name, text)] = stored.metadata().items()
    description, tensors = json.loads(text), load_file(path)
    change(description, tensors)
    target = factors_path(folder, description["num_edits"])
    save_file(tensors, target, {name: json.dumps(description)})
    checksum_path(target).unlink(missing_ok=True)


def poison(folder: Path) -> None:
    rewrite(folder, lambda _, tensors: tensors["keys.2"][0].fill_(float("nan")))


def lose_a_case(folder: Path) -> None:
    rewrite(folder, lambda description, _: description["case_ids"].pop())


def lose_a_tensor(folder: Path) -> None:
    rewrite(folder, lambda _, tensors: tensors.pop("keys.2"))


def lose_a_column(folder: Path) -> None:
    rewrite(folder, lambda _, tensors: tensors.update({"keys.2": tensors["keys.2"][:, :1].contiguous()}))


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize(("harm", "match"), [
    (remove_one, "holds the factors of 1 edits, of 5"), (flip_a_byte, "is damaged .its sha256 is not"),
    (exchange, "it is of the batch after 5 edits"), (poison, "keys of layer 2 are not finite"),
    (lose_a_case, "1 cases from 1 to 3 edits"), (lose_a_tensor, r"it holds keys.1, .* not values, keys"),
    (lose_a_column, r"keys.2 is F32 of shape .80, 1., not"),
])
def test_damaged_factors(harm: Callable[[Path], None], match: str, kept: Edited) -> None:
    harm(kept[2])
    with pytest.raises(ValueError, match=match) as raised:
        remove_facts(*kept, [3])
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("unharmed")
def test_a_gap_is_found_before_the_next_batch(kept: Edited, tok: PreTrainedTokenizerBase) -> None:
    model, hparams, factors = kept
    remove_one(factors)
    with pytest.raises(ValueError, match=r"holds 5 edits, but .* the factors of 1: keep factors from the first"):
        edit(model, tok, hparams, factors, BATCHES[:1])


@pytest.mark.parametrize("content", ["{", '{"format": "other", "withdrawals": []}',
                                     '{"format": "sphere-easyedit withdrawals 1", "withdrawals": [{"num_edits": 5, '
                                     '"left": "", "facts": [{"case_id": [], "batch": 1, "column": 0}]}]}'])
def test_a_damaged_record(content: str, kept: Edited) -> None:
    record_path(kept[2]).write_text(content)
    with pytest.raises(ValueError, match=r"withdrawn\.json is not a record of removals"):
        remove_facts(*kept, [3])


def test_a_record_of_an_earlier_release(tmp_path: Path) -> None:
    assert read_removals(tmp_path) == []
    record_path(tmp_path).write_text(
        '{"format": "sphere-easyedit withdrawals 1", "withdrawals": [{"num_edits": 5, "left": "0a", "facts": '
        '[{"case_id": "a", "batch": 1, "column": 0}, {"case_id": 7, "batch": 5, "column": 3}]}]}')
    assert read_removals(tmp_path) == [PastRemoval(5, "0a", (Fact("a", 1, 0), Fact(7, 5, 3)))]
    write_removals(tmp_path, read_removals(tmp_path))
    assert read_removals(tmp_path)[0].facts[1].case_id == 7


@pytest.mark.usefixtures("unharmed")
def test_the_factors_of_another_run(kept: Edited, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model, hparams, _ = kept
    other = tiny_model("llama")
    edit(other, tok, hparams, tmp_path / "other", [[request, *rest] for request, *rest in reversed(BATCHES)])
    with pytest.raises(ValueError, match="the weight is not the original one plus the edits on file"):
        remove_facts(model, hparams, tmp_path / "other", [3])
    wider = tiny_model("llama", intermediate_size=96)
    with pytest.raises(ValueError, match="session holds no edits"):
        remove_facts(wider, hparams, tmp_path / "other", [3])


@pytest.mark.usefixtures("unharmed")
def test_other_hyperparameters(kept: Edited, hparams_of: Make) -> None:
    with pytest.raises(ValueError, match="the hyperparameters are others"):
        remove_facts(kept[0], hparams_of("MEMIT"), kept[2], [3])


def test_weights_changed_from_outside(kept: Edited) -> None:
    model, hparams, folder = kept
    with torch.no_grad():
        hparams.editable(model).parameter(1)[0, 0] += 1.0
    changed = edited_weights(model, hparams)
    with pytest.raises(ValueError, match="its weights were changed from outside"):
        remove_facts(model, hparams, folder, [3])
    assert sphere.EditSession.of(model).num_edits == 5
    assert equal(edited_weights(model, hparams), changed)


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("error", [OSError("no room"), KeyboardInterrupt()], ids=str)
@pytest.mark.parametrize("where", ["write_removals", "weights_digest"])
def test_an_error_on_the_way(where: str, error: BaseException, kept: Edited, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(removing, where, fail)
    with pytest.raises(type(error)):
        remove_facts(*kept, [3])


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in ``base`` and a run of it in ``run``, with factors: two batches of two facts."""
    folder = tmp_path_factory.mktemp("remove-cli")
    save_tiny_model(folder / "base", "gpt2")
    model, tok = (auto.from_pretrained(folder / "base") for auto in (AutoModelForCausalLM, AutoTokenizer))
    hparams = tiny_hparams(folder, model_name=str(folder / "base"), v_num_grad_steps=2)
    run_sequential(model.eval(), tok, load_records("demo", None, 4, 0), hparams, RunSettings(
        folder / "run", 2, described={"dataset": "demo", "data": None, "seed": 0},
        measure=MeasureSettings(before=False, after=False)), [FactorKeeper(folder / "run" / "factors", hparams)])
    return folder


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "140"}).invoke(app, [str(one) for one in arguments])


def cases_of(run: Path) -> list[Any]:
    return [case for line in (run / "edits.jsonl").read_text().splitlines() for case in json.loads(line)["case_ids"]]


def test_from_the_shell(workplace: Path, tmp_path: Path) -> None:
    run, before = workplace / "run", tree(workplace / "run")
    first, *others = cases_of(run)
    done = call("remove", run, "--case", first, "--output", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "1 facts removed, 3 stay" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("│")]) == 2  # a line a layer
    assert tree(run) == before
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"removed afterwards: case_id {first}" in card
    assert "3 facts edited" in card
    applied = call("apply", tmp_path / "out", "--model", workplace / "base", "--output", tmp_path / "applied")
    assert applied.exit_code == 0, applied.output
    model, base = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "applied", workplace / "base"))
    hparams = sphere.SPHEREHyperParams.from_dict({**tiny_hparams(workplace).to_dict()})
    for layer, weight in hparams.editable(model).weights().items():
        wanted = hparams.editable(base).weight(layer).double()
        for batch in read_batches(run / "factors", 4, hparams.layers):
            path = factors_path(run / "factors", batch.num_edits)
            wanted = wanted + outer(read_update(path, layer, tuple(weight.shape)),
                                    torch.tensor([case != first for case in batch.case_ids]))
        assert relative_error(weight, wanted) < 3e-7
    everything = call("remove", run, *(word for case in (first, *others) for word in ("--case", case)), "--output",
                      tmp_path / "all")
    assert everything.exit_code == 0, everything.output
    assert "4 facts removed, 0 stay" in everything.stdout


def test_mistakes_on_the_command_line(workplace: Path, tmp_path: Path) -> None:
    run = workplace / "run"
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    bare = shutil.copytree(run, tmp_path / "bare")
    shutil.rmtree(bare / "factors")
    for arguments, match in (
            ((run, "--case", "none", "--output", tmp_path / "out"), "case_id 'none' was not edited"),
            ((run, "--case", cases_of(run)[0], "--output", tmp_path / "taken"), "not empty"),
            ((bare, "--case", cases_of(run)[0], "--output", tmp_path / "out"), "edit --keep-factors"),
            ((tmp_path, "--case", "1", "--output", tmp_path / "out"), "has no config.yaml")):
        done = call("remove", *arguments)
        assert isinstance(done.exception, ValueError), done.output
        assert match in str(done.exception)
    assert not (tmp_path / "out").exists()
