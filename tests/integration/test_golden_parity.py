"""Parity with the numbers that EasyEdit's own executors computed (EasyEdit main at 14cea82)."""

from __future__ import annotations

import pytest
import torch

import sphere_easyedit as sphere
from helpers.golden import Golden
from helpers.models import edited_weights, relative_error
from sphere_easyedit.editing.keys import BatchStates
from sphere_easyedit.editing.requests import parse_requests, tokenize_request
from sphere_easyedit.editing.target_values import optimise_target_values
from sphere_easyedit.methods.prune import prune
from sphere_easyedit.methods.rect import rect
from sphere_easyedit.models.architecture import EditableModel, frozen


def _tokenized(golden: Golden, tok: object) -> list:
    contexts = golden.meta["context_templates"][1]
    return [tokenize_request(tok, request, contexts, None) for request in parse_requests(golden.meta["requests"])]


def _updates(golden: Golden, **changes: object) -> tuple[dict[tuple[int, int], torch.Tensor], sphere.EditSession]:
    """Weight changes by (batch, layer), as stored, of both batches one after the other."""
    model, tok = golden.load()
    hparams = golden.hparams(**changes)
    updates = {}
    for number in range(2):
        before = edited_weights(model, hparams)
        sphere.apply_sphere_to_model(model, tok, golden.batch(number), hparams)
        after = edited_weights(model, hparams)
        updates |= {(number, layer): after[layer] - before[layer] for layer in hparams.layers}
    return updates, sphere.EditSession.of(model)


def _assert_updates(golden: Golden, updates: dict[tuple[int, int], torch.Tensor], kind: str) -> None:
    errors = {key: relative_error(update, golden.tensors[f"{kind}.update.{key[0]}.{key[1]}"])
              for key, update in updates.items()}
    assert max(errors.values()) < 2e-3, errors


@pytest.mark.parametrize("token_budget", [4096, 60])
def test_target_values(golden: Golden, token_budget: int) -> None:
    model, tok = golden.load()
    hparams = golden.hparams(base_alg="MEMIT", token_budget=token_budget)
    editable = EditableModel(model, hparams.module_names(model.config), hparams.layers)
    with frozen(model):
        found = optimise_target_values(editable, _tokenized(golden, tok), hparams)
    for value, reference in zip(found.values, golden.tensors["target_values"], strict=True):
        assert relative_error(value, reference) < 1e-3


@pytest.mark.parametrize("token_budget", [4096, 30])
def test_keys(golden: Golden, token_budget: int) -> None:
    model, tok = golden.load()
    hparams = golden.hparams(base_alg="MEMIT")
    editable = EditableModel(model, hparams.module_names(model.config), hparams.layers)
    with frozen(model):
        states = BatchStates(editable, _tokenized(golden, tok), token_budget)
        by_pass = states.read_all()
        for layer in hparams.layers:
            by_layer, *_ = states.read(layer)
            if layer != hparams.layers[-1]:
                states.advance(layer, layer + 1)
            for keys in (by_pass[layer], by_layer):
                assert relative_error(keys, golden.tensors[f"keys.{layer}"]) < 1e-5


def test_memit(golden: Golden) -> None:
    updates, _ = _updates(golden, base_alg="MEMIT", alpha=0.0)
    _assert_updates(golden, updates, "memit")


def test_alphaedit(golden: Golden) -> None:
    updates, session = _updates(golden, base_alg="AlphaEdit", alpha=0.0, projection_stage="update")
    _assert_updates(golden, updates, "alphaedit")
    for layer, history in session.history.items():
        outer = history.keys @ history.keys.T
        assert relative_error(outer, golden.tensors[f"alphaedit.key_outer_sum.{layer}"]) < 1e-4


def test_sphere_after_all_layers(golden_llama: Golden) -> None:
    updates, session = _updates(golden_llama, base_alg="AlphaEdit", alpha=0.5, projection_stage="update")
    _assert_updates(golden_llama, updates, "sphere_alphaedit_posthoc")
    for layer, history in session.history.items():
        reference = golden_llama.tensors[f"sphere_alphaedit_posthoc.key_outer_sum.{layer}"]
        assert relative_error(history.keys @ history.keys.T, reference) < 1e-4


def test_sphere_layer_by_layer(golden_llama: Golden) -> None:
    updates, _ = _updates(golden_llama, base_alg="AlphaEdit", alpha=0.5, projection_stage="layer")
    _assert_updates(golden_llama, updates, "sphere_alphaedit_layerwise")


def test_easyedits_own_yaml(golden_llama: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(golden_llama.folder)  # its paths are relative to the working directory
    model, tok = golden_llama.load()
    hparams = sphere.SPHEREHyperParams.from_hparams("easyedit_sphere_hparams.yaml")
    hparams.context_templates = golden_llama.meta["context_templates"][1]
    before = edited_weights(model, hparams)
    sphere.apply_sphere_to_model(model, tok, golden_llama.batch(0), hparams)
    for layer, after in edited_weights(model, hparams).items():
        reference = golden_llama.tensors[f"sphere_alphaedit_posthoc.update.0.{layer}"]
        assert relative_error(after - before[layer], reference) < 2e-3


def test_gpt2_differs_by_easyedits_orientation_defect() -> None:
    """EasyEdit takes rows of the stored Conv1D weight, which are inputs, for neurons: done its way, we agree."""
    from helpers.golden import load_golden

    golden = load_golden("gpt2")
    model, tok = golden.load()
    hparams = golden.hparams(base_alg="AlphaEdit", alpha=0.0, projection_stage="update")
    before = edited_weights(model, hparams)
    sphere.apply_sphere_to_model(model, tok, golden.batch(0), hparams)
    ours, _ = _updates(golden, base_alg="AlphaEdit", alpha=0.5, projection_stage="update")
    for layer, after in edited_weights(model, hparams).items():
        stored_change = after - before[layer]  # (d_in, d_out)
        mistaken = sphere.PrincipalSpace.from_weight(before[layer], 0.5).suppress(stored_change, 0.5)
        right = sphere.PrincipalSpace.from_weight(before[layer].T, 0.5).suppress(stored_change.T, 0.5).T
        reference = golden.tensors[f"sphere_alphaedit_posthoc.update.0.{layer}"]
        assert relative_error(mistaken, reference) < 2e-3
        assert relative_error(ours[0, layer], right) < 2e-3
        assert relative_error(ours[0, layer], reference) > 0.05


def test_rect(golden_llama: Golden) -> None:
    weight = golden_llama.load()[0].get_parameter("model.layers.1.mlp.down_proj.weight").detach()
    kept = rect(golden_llama.tensors["memit.update.0.1"], weight, keep=0.4)
    reference = golden_llama.tensors["rect.update"]
    assert torch.equal(kept != 0, reference != 0)
    assert torch.equal(kept, reference)


def test_prune(golden_llama: Golden) -> None:
    weight = golden_llama.load()[0].get_parameter("model.layers.1.mlp.down_proj.weight").detach()
    change = golden_llama.tensors["prune.change"]
    above = torch.linalg.svdvals(change) > torch.linalg.matrix_norm(weight, ord=2)
    assert int(above.sum()) == int(golden_llama.tensors["prune.singular_values_above"]) > 0
    assert relative_error(prune(change, weight), golden_llama.tensors["prune.restrained"]) < 1e-4
