"""ReplayFT: a step equals a plain reimplementation, facts are learned and replayed, and bad settings are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import REQUESTS, edited_weights, save_tiny_model, tiny_hparams, tiny_model
from helpers.processes import call_cli
from helpers.sessions import BATCHES, edit, equal
from helpers.sessions import folder as folder  # a fixture
from sphere_easyedit.core.projection import PrincipalSpace
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing import fine_tuning
from sphere_easyedit.editing.replay_memory import ReplayMemory, StoredFact
from sphere_easyedit.evaluation.metrics import evaluate_records
from sphere_easyedit.methods.covariance import second_moments

SETTINGS = {"base_alg": "ReplayFT", "ft_lr": 0.01, "ft_epochs": 2, "kl_factor": 0.5, "alpha": 0.0,
            "context_templates": ["It is said. {}"]}
Make = Callable[..., sphere.SPHEREHyperParams]
Tokens = st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple)


def make_settings(folder: Path, family: str = "llama", **changes: Any) -> sphere.SPHEREHyperParams:
    return tiny_hparams(folder / family, **{**SETTINGS, **changes})


@pytest.fixture
def make(folder: Path) -> Make:
    return partial(make_settings, folder)


def memory_of(session: sphere.EditSession) -> ReplayMemory:
    return ReplayMemory.from_tensors({name.removeprefix("replay."): tensor
                                      for name, tensor in session.engine_history.items()})


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_one_step_is_that_of_a_plain_reimplementation(family: str, make: Make, tok: PreTrainedTokenizerBase,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows run one by one, unpacked, and Adam's first step is written out: -lr * g / (|g| + eps)."""
    monkeypatch.setattr(fine_tuning, "_WINDOWS_A_STEP", 10**6)  # all windows, so that the order does not matter
    monkeypatch.setattr(fine_tuning, "_CONTEXT_SHARE", 0.0)
    hparams = make(family, ft_epochs=1)
    model, plain = tiny_model(family), tiny_model(family)
    session = sphere.EditSession()
    sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams, session=session)
    prepared: fine_tuning.Prepared = session.engine_caches["fine-tuning"]

    editable = hparams.editable(plain)
    parameters = {layer: editable.parameter(layer) for layer in editable.layers}
    total = torch.zeros(())
    for fact in memory_of(session).facts:
        ids = torch.tensor([[*fact.prompts[0], *fact.target]])
        logits = plain(ids).logits[0, len(fact.prompts[0]) - 1: -1]
        total = total + F.cross_entropy(logits, torch.tensor(fact.target)).clamp(min=0.2) / hparams.ft_batch_size
    with torch.no_grad():
        before = [tiny_model(family)(torch.tensor([window])).logits[0, ::2].log_softmax(-1)
                  for window in prepared.windows]
    divergences = [(old.exp() * (old - plain(torch.tensor([window])).logits[0, ::2].log_softmax(-1))).sum(-1)
                   for window, old in zip(prepared.windows, before, strict=True)]
    total = total + hparams.kl_factor * torch.cat(divergences).mean()
    gradients = torch.autograd.grad(total, list(parameters.values()))
    moments = second_moments(hparams.editable(tiny_model(family)), tok, hparams)
    for (layer, found), gradient in zip(edited_weights(model, hparams).items(), gradients, strict=True):
        moment = moments[layer].double()
        damped = moment + 0.05 * moment.trace() / len(moment) * torch.eye(len(moment))
        eigenvalues, vectors = torch.linalg.eigh(damped)
        whitening = vectors @ torch.diag(eigenvalues**-0.5) @ vectors.T
        of_v = editable.orient(layer, gradient).double() @ whitening
        change = -hparams.ft_lr * of_v / (of_v.abs() + 1e-8) @ whitening
        started = editable.weight(layer)
        error = ((editable.orient(layer, found) if found.shape != started.shape else found) - started - change).norm()
        # Elements of the gradient near 0 have either sign by rounding.
        assert error / change.norm() < 0.02, float(error / change.norm())


def test_a_small_token_budget_changes_rounding_only(make: Make, tok: PreTrainedTokenizerBase) -> None:
    old = edited_weights(tiny_model("llama"), make())
    whole, split = (edit(tiny_model("llama"), tok, make(token_budget=budget, ft_epochs=1), [REQUESTS])
                    for budget in (4096, 1))
    for layer, weight in whole.items():
        assert (weight - split[layer]).norm() < 1e-2 * (weight - old[layer]).norm()


def test_facts_are_learned_kept_and_measured(make: Make, tok: PreTrainedTokenizerBase) -> None:
    model, hparams = tiny_model("llama"), make(ft_epochs=30)
    records = load_records("demo", None, 6, 0)
    before = evaluate_records(model, tok, records)
    for first in range(0, 6, 2):
        sphere.apply_sphere_to_model(model, tok, [record.request() for record in records[first: first + 2]], hparams)
    after = evaluate_records(model, tok, records)
    assert sum(score.efficacy or 0 for score in before) == 0
    assert sum(score.efficacy or 0 for score in after) >= 5  # of 6, those of the first batches included


def test_without_replay_earlier_facts_get_lost(make: Make, tok: PreTrainedTokenizerBase) -> None:
    """The control of the test above: what keeps the facts is the replay."""
    losses = {}
    for ratio in (0.0, 2.0):
        model, session = tiny_model("llama"), sphere.EditSession()
        edit(model, tok, make(ft_epochs=20, replay_ratio=ratio, ft_lr=0.02), BATCHES, session=session)
        memory = memory_of(session)
        with torch.no_grad():
            losses[ratio] = sum(float(F.cross_entropy(
                model(torch.tensor([[*fact.prompts[0], *fact.target]])).logits[0, len(fact.prompts[0]) - 1: -1],
                torch.tensor(fact.target))) for fact in memory.facts[: len(BATCHES[0]) + len(BATCHES[1])])
    assert losses[2.0] < losses[0.0]


def test_a_new_answer_replaces_the_old_one_in_the_memory(make: Make, tok: PreTrainedTokenizerBase) -> None:
    session = sphere.EditSession()
    changed = {**REQUESTS[0], "target_new": "Berlin"}
    edit(tiny_model("llama"), tok, make(), [REQUESTS, [changed]], session=session)
    facts = memory_of(session).facts
    assert len(facts) == len(REQUESTS)
    assert tok.decode(facts[-1].target) == " Berlin"
    assert facts[-1].prompts[0] not in [fact.prompts[0] for fact in facts[:-1]]


def test_sphere_takes_out_its_share(make: Make, tok: PreTrainedTokenizerBase) -> None:
    plain, projected, untouched = (tiny_model("llama") for _ in range(3))
    changes = []
    for model, alpha in ((plain, 0.0), (projected, 1.0)):
        hparams = make(alpha=alpha, gamma=0.4)
        old = edited_weights(untouched, hparams)
        changes.append({layer: weight - old[layer] for layer, weight in
                        edit(model, tok, hparams, [REQUESTS]).items()})
    for layer, change in changes[0].items():
        directions = PrincipalSpace.from_weight(edited_weights(untouched, make())[layer], 0.4).directions
        assert (change @ directions).norm() > 0.05 * change.norm()
        assert (changes[1][layer] @ directions).norm() < 1e-4 * change.norm()


def test_bfloat16_is_near_and_leaves_dtypes_alone(make: Make, tok: PreTrainedTokenizerBase) -> None:
    exact, rounded = tiny_model("llama"), tiny_model("llama")
    first = edit(exact, tok, make(), [REQUESTS])
    second = edit(rounded, tok, make(target_dtype="bfloat16"), [REQUESTS])
    assert not equal(first, second)
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.float32}
    old = edited_weights(tiny_model("llama"), make())
    for layer, weight in first.items():
        cosine = F.cosine_similarity((weight - old[layer]).flatten(), (second[layer] - old[layer]).flatten(), dim=0)
        assert cosine > 0.7


def test_an_error_leaves_model_and_session_as_they_were(make: Make, tok: PreTrainedTokenizerBase) -> None:
    model, session = tiny_model("llama"), sphere.EditSession()
    hparams = make()
    edit(model, tok, hparams, [[REQUESTS[0]]], session=session)
    weights, memory = edited_weights(model, hparams), memory_of(session)
    model.get_parameter("model.layers.0.mlp.down_proj.weight").data[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite|nan"):
        edit(model, tok, hparams, [REQUESTS[1:]], session=session)
    assert equal(weights, edited_weights(model, hparams))
    assert memory == memory_of(session)
    assert not any(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(("changes", "message"), [
    ({"ft_lr": None}, "ReplayFT needs ft_lr"), ({"ft_epochs": 0}, "ft_epochs is 0"),
    ({"replay_ratio": -1}, "replay_ratio is -1"), ({"ft_batch_size": 0}, "ft_batch_size is 0"),
    ({"kl_factor": None}, "needs kl_factor")])
def test_wrong_settings_are_refused(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_the_stage_of_layers_is_refused(make: Make, tok: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="set projection_stage to 'update'"):
        edit(tiny_model("llama"), tok, make(projection_stage="layer"), [REQUESTS])


@given(st.lists(st.tuples(st.builds(StoredFact, st.lists(Tokens, min_size=1, max_size=3).map(tuple), Tokens),
                          st.floats(0, 100, width=32)), max_size=6))
def test_the_memory_survives_its_tensors(facts: list[tuple[StoredFact, float]]) -> None:
    memory = ReplayMemory([fact for fact, _ in facts], [loss for _, loss in facts])
    assert ReplayMemory.from_tensors(memory.to_tensors()) == memory


@given(st.lists(st.floats(0, 10), max_size=12), st.integers(0, 12), st.integers(0, 5))
def test_facts_are_drawn_without_repetition(losses: list[float], count: int, seed: int) -> None:
    memory = ReplayMemory([StoredFact(((1,),), (2,))] * len(losses), losses)
    drawn = memory.draw(count, torch.Generator().manual_seed(seed))
    assert len(drawn) == len(set(drawn)) == min(count, len(losses))


def test_the_hardest_facts_are_drawn() -> None:
    memory = ReplayMemory([StoredFact(((1,),), (2,))] * 8, [0, 0, 9, 0, 0, 8, 0, 0])
    for seed in range(5):
        assert {2, 5} <= set(memory.draw(4, torch.Generator().manual_seed(seed)))


def test_it_is_not_planned(make: Make) -> None:
    from sphere_easyedit.planning import PlanSettings, make_plan

    with pytest.raises(ValueError, match="ReplayFT, whose time and memory can't be planned"):
        make_plan(make(), PlanSettings(4, 2))




def test_what_is_recommended_is_printed_or_refused(tmp_path: Path) -> None:
    printed = call_cli("hparams", "smollm2-135m", "--recommended", cwd=tmp_path)
    (tmp_path / "mine.yaml").write_text(printed.stdout)
    assert sphere.SPHEREHyperParams.from_hparams(tmp_path / "mine.yaml").base_alg == "ReplayFT"
    refused = call_cli("hparams", "gpt2", "--recommended", cwd=tmp_path)
    assert refused.returncode != 0
    assert "nothing is recommended for 'gpt2'" in refused.stderr


def test_a_run_of_the_command_line_learns_its_facts(tmp_path: Path, folder: Path) -> None:
    save_tiny_model(tmp_path / "tiny", "llama")
    (tmp_path / "hparams.yaml").write_text(yaml.safe_dump(
        make_settings(folder, model_name=str(tmp_path / "tiny"), ft_epochs=30).to_dict()))
    done = call_cli("edit", "--hparams", "hparams.yaml", "--dataset", "demo", "--num-edits", "4", "--batch-size", "2",
                    "--output", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["pre"]["efficacy"]["mean"] == 0
    assert summary["post"]["efficacy"]["mean"] >= 75
