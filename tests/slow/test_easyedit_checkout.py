"""Inside EasyEdit itself: a real checkout of its main branch, on the tiny golden Llama.

Set EASYEDIT_HOME to the checkout, with what it imports installed; without it these tests skip.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM

import sphere_easyedit as sphere
from helpers.golden import Golden
from helpers.models import edited_weights, relative_error, tiny_model
from helpers.paths import REPOSITORY
from sphere_easyedit.easyedit.discovery import wrappable
from sphere_easyedit.easyedit.editor import make_editor
from sphere_easyedit.models.loading import smollm2_folder

pytestmark = pytest.mark.easyedit

DOWN = "model.layers.{}.mlp.down_proj"
# What each method of EasyEdit asks for beyond our own fields.
OWN: dict[str, dict[str, Any]] = {
    "FT": {"num_steps": 4, "lr": 5e-3, "weight_decay": 0, "norm_constraint": False, "kl_factor": 0,
           "objective_optimization": "prompt_last", "rewrite_module_tmp": f"{DOWN}.weight"},
    "ROME": {"context_template_length_params": [[5, 2]], "fp16": False},
    "R-ROME": {"context_template_length_params": [[5, 2]]},
    "MEMIT": {},
    "MEMIT-FE": {},
    "AlphaEdit": {},
    "EMMET": {"update_norm_lambda": 0, "emmet_lambda": 0.1},
    "PMET": {"rewrite_module_tmps": [DOWN], "nll_loss_factor": 1},
    "CORE": {},
    "ULTRAEDIT": {"lr": 0.1, "token": "mask", "batch_size_once": 3, "editor_batch_size": 32},
    **{f"SimIE on {base}": {"lamHyper": 2.0, "init_model": base != "FT", "solver": "LU", "fast": base == "MEMIT"}
       for base in ("ROME", "MEMIT", "FT")},
}
for _base in ("ROME", "MEMIT", "FT"):
    OWN[f"SimIE on {_base}"] |= {"base_method": _base, **OWN[_base]}
ONE_BY_ONE = ("ROME", "R-ROME")


@pytest.fixture(autouse=True)
def registered(package: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)  # EasyEdit writes logs where it stands
    sphere.register()
    yield
    sphere.unregister()


@pytest.fixture
def golden(golden_llama: Golden) -> Golden:
    return golden_llama


def hparams_for(golden: Golden, name: str, executor: str = "easyedit", **changes: Any) -> sphere.SPHEREHyperParams:
    own = OWN[name] if executor == "easyedit" else {}
    return golden.hparams(**{"base_alg": name.partition(" on ")[0], "executor": executor, "projection_stage": "update",
                             "model_name": str(golden.folder / "tiny-llama"), **own, **changes})


def arguments(requests: list[dict[str, Any]]) -> dict[str, Any]:
    """Requests as the arguments of ``BaseEditor.edit``."""
    prompts = [request["prompt"] for request in requests]
    return {"prompts": prompts, "target_new": [request["target_new"] for request in requests],
            "subject": [request["subject"] for request in requests], "rephrase_prompts": prompts,
            "locality_inputs": {"neighborhood": {"prompt": ["The sky is"] * len(prompts),
                                                 "ground_truth": ["blue"] * len(prompts)}}, "verbose": False}


def run(package: Any, golden: Golden, hparams: Any, callbacks: list[sphere.EditCallback] | None = None,
        sequential: bool = True, numbers: tuple[int, ...] = (0, 1)) -> tuple[list[dict[str, Any]], dict[int, Tensor]]:
    """EasyEdit's metrics and the edited weights after golden batches through a ``BaseEditor``."""
    editor = package.BaseEditor.from_hparams(hparams)
    requests = [request for number in numbers for request in golden.batch(number)]
    one = getattr(hparams, "base_alg", hparams.alg_name) in ONE_BY_ONE
    edit = editor.edit if one else editor.batch_edit
    with sphere.track(editor, callbacks or []):
        metrics, model, _ = edit(**arguments(requests), sequential_edit=sequential)
    return metrics, weights_of(model, hparams)


def weights_of(model: Any, hparams: Any) -> dict[int, Tensor]:
    return {layer: model.get_parameter(f"{DOWN.format(layer)}.weight").detach().clone() for layer in hparams.layers}


def batch_size(golden: Golden) -> int:
    return len(golden.batch(0))


def equal(a: dict[int, Tensor], b: dict[int, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[layer], b[layer]) for layer in a)


def function_of(package: Any, name: str) -> Callable[..., Any]:
    return package.ALG_DICT[name.partition(" on ")[0]]  # type: ignore[no-any-return]


def easyedits_own(package: Any, golden: Golden, name: str) -> Any:
    """Hyperparameters of EasyEdit's own class for a method, made by hand."""
    hparams_class = function_of(package, name).__annotations__["hparams"]
    method, _, base = name.partition(" on ")
    values = {**golden.meta["hparams"], "stats_dir": str(golden.folder / "stats"), "alg_name": method,
              "model_name": str(golden.folder / "tiny-llama"), "device": "cpu", "L2": golden.meta["alphaedit"]["L2"],
              "P_loc": str(golden.folder / "null_space_project.pt"), "nullspace_threshold": 0.02,
              "max_length": 40, "model_parallel": False, **OWN[name]}
    if method == "SimIE":
        values |= {"fp16": False}
    if method == "ULTRAEDIT":
        values |= {"model_class": "AutoModelForCausalLM", "tokenizer_class": "AutoTokenizer", "tokenizer_name": "",
                   "dropout": 0.0, "no_grad_layers": None, "silent": False, "results_dir": ".",
                   "batch_size": batch_size(golden),
                   "inner_params": [f"{DOWN.format(layer)}.weight" for layer in values["layers"]]}
    known = {field.name for field in dataclasses.fields(hparams_class) if field.init}
    made = hparams_class(**{key: value for key, value in values.items() if key in known})
    if base:
        made._base_hparams = easyedits_own(package, golden, base)
    return made


def fresh_globals(package: Any, golden: Golden, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """EasyEdit's module globals as at first import, with the golden context templates."""
    main = importlib.import_module(function_of(package, name).__module__)
    templates = golden.meta["context_templates"]
    flat = [template for group in templates for template in group]
    if " on " in name:
        fresh_globals(package, golden, name.partition(" on ")[2], monkeypatch)
    fresh = {"CONTEXT_TEMPLATES_CACHE": flat if name in ONE_BY_ONE else templates, "COV_CACHE": {}, "P_loaded": False,
             "cache_c_new": False}
    for key, value in fresh.items():
        if hasattr(main, key):
            monkeypatch.setattr(main, key, value)


def test_register_and_back(package: Any) -> None:
    sphere.unregister()
    before = dict(package.ALG_DICT)
    batchable = importlib.import_module("easyeditor.editors.batch_editor").BatchEditor
    assert "RECT" not in before and not batchable.is_batchable_method("SPHERE")
    sphere.register()
    sphere.register()
    assert set(package.ALG_DICT) == {*before, "PRUNE", "RECT"}
    assert all(batchable.is_batchable_method(name) for name in ("SPHERE", "PRUNE", "RECT", "MEMIT"))
    assert not batchable.is_batchable_method("ROME")
    sphere.unregister()
    assert dict(package.ALG_DICT) == before
    assert not batchable.is_batchable_method("SPHERE")


def test_easyedits_methods_can_be_wrapped(package: Any) -> None:
    assert {name.partition(" on ")[0] for name in OWN} <= set(wrappable(package))
    assert not {"IKE", "GRACE", "LoRA", "KN", "SPHERE", "RECT"} & set(wrappable(package))


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT"])
def test_wrapped_equals_native(package: Any, golden: Golden, base_alg: str) -> None:
    size = batch_size(golden)
    original = weights_of(golden.load()[0], hparams_for(golden, base_alg))
    _, native = run(package, golden, hparams_for(golden, base_alg, "native", batch_size=size))
    for batched in (True, False):
        _, wrapped = run(package, golden, hparams_for(golden, base_alg, batch_size=size, batched_target_values=batched))
        for layer, weight in wrapped.items():
            assert relative_error(weight - original[layer], native[layer] - original[layer]) < 2e-3


@pytest.mark.parametrize("name", sorted(OWN))
def test_alpha_zero_leaves_easyedits_bits(package: Any, golden: Golden, name: str, monkeypatch: pytest.MonkeyPatch
                                          ) -> None:
    """The method's function by itself, two batches, against the same wrapped with alpha 0."""
    fresh_globals(package, golden, name, monkeypatch)
    own = easyedits_own(package, golden, name)
    alone, tok = golden.load()
    tok.padding_side = "left" if name in ("FT", "SimIE on FT", "ULTRAEDIT") else "right"
    wrapped, _ = golden.load()
    hparams = hparams_for(golden, name, alpha=0.0, batch_size=getattr(own, "batch_size", 1))
    for number in range(2):
        requests = golden.batch(number)[: 1 if name in ONE_BY_ONE else None]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            function_of(package, name)(alone, tok, requests, own, return_orig_weights=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sphere.apply_sphere_to_model(wrapped, tok, requests, hparams)
    assert not equal(weights_of(alone, hparams), weights_of(golden.load()[0], hparams))
    assert equal(weights_of(wrapped, hparams), weights_of(alone, hparams))


@pytest.mark.parametrize("alpha", [0.0, 0.8])
@pytest.mark.parametrize("base_alg", ["FT", "ROME", "MEMIT", "RECT", "PRUNE", "AlphaEdit", "ULTRAEDIT",
                                      "SimIE on ROME"])
def test_methods_with_energy(package: Any, golden: Golden, base_alg: str, alpha: float) -> None:
    """The paper's six and two more, with HE tracked; SPHERE changes the weights, tracking does not."""
    size = 1 if base_alg in ONE_BY_ONE else batch_size(golden)
    executor = "native" if base_alg in ("RECT", "PRUNE") else "easyedit"
    hparams = hparams_for(golden, base_alg, executor, alpha=alpha, batch_size=size)
    tracker = sphere.HETracker()
    metrics, tracked = run(package, golden, hparams, [tracker])
    assert [record.num_edits for record in tracker.records] == list(range(0, len(metrics) + 1, size))
    assert any(abs(change) > 1e-7 for change in tracker.records[-1].relative_change.values())
    tracker.join(metrics)
    assert metrics[-1]["hyperspherical_energy"]["num_edits"] == len(metrics)
    assert {"rewrite_acc", "locality.neighborhood_acc"} <= set(tracker.correlation(metrics))
    _, untracked = run(package, golden, hparams)
    assert equal(tracked, untracked)
    if alpha:
        _, without = run(package, golden, hparams_for(golden, base_alg, executor, alpha=0.0, batch_size=size))
        assert not equal(tracked, without)


@pytest.mark.parametrize("name", ["FT", "ROME", "MEMIT", "AlphaEdit"])
def test_tracking_easyedits_own_methods(package: Any, golden: Golden, name: str, monkeypatch: pytest.MonkeyPatch
                                        ) -> None:
    """Plain EasyEdit, its own classes: HE at every batch, and not a bit of difference."""
    own = easyedits_own(package, golden, name)
    if hasattr(own, "batch_size"):
        own.batch_size = batch_size(golden)
    found = []
    tracker = sphere.HETracker()
    for callbacks in ([tracker], []):
        fresh_globals(package, golden, name, monkeypatch)
        found.append(run(package, golden, own, callbacks)[1])
    assert equal(*found)
    assert len(tracker.records) == (1 + (2 if name not in ONE_BY_ONE else 2 * batch_size(golden)))
    assert tracker.records[-1].energy != tracker.records[0].energy


def test_tracking_methods_that_leave_the_weights(package: Any, golden: Golden) -> None:
    """GRACE puts an adapter around the layer; its energy stays, and is there at every edit."""
    hparams = package.GraceHyperParams(
        edit_lr=1.0, n_iter=3, eps=1.0, dist_fn="euc", val_init="cold", val_train="sgd", val_reg="None",
        reg="early_stop", replacement="replace_last", eps_expand="coverage", num_pert="8", dropout=0.0,
        inner_params=["model.layers[2].mlp.down_proj.weight"],
        device="cpu", alg_name="GRACE", model_name=str(golden.folder / "tiny-llama"))
    editor = package.BaseEditor.from_hparams(hparams)
    tracker = sphere.HETracker(layers=[2])
    with sphere.track(editor, [tracker]):
        editor.edit(**arguments(golden.batch(0)), sequential_edit=True)
    assert len(tracker.records) == 1 + batch_size(golden)
    assert tracker.records[-1].energy == tracker.records[0].energy


@pytest.mark.parametrize(("base_alg", "executor"), [("AlphaEdit", "native"), ("PRUNE", "native"),
                                                    ("AlphaEdit", "easyedit"), ("FT", "easyedit"),
                                                    ("ULTRAEDIT", "easyedit"), ("SimIE on ROME", "easyedit")])
def test_single_edits_restore_and_leave_nothing(package: Any, golden: Golden, base_alg: str, executor: str) -> None:
    """``edit`` without sequential_edit: after several edits the weights are the original ones, and the last edit did
    what it does to a fresh model."""
    hparams = hparams_for(golden, base_alg, executor)
    requests = golden.batch(0)
    seen: list[dict[int, Tensor]] = []

    class Keep(sphere.EditCallback):
        def on_batch_end(self, event: sphere.EditEvent) -> None:
            seen.append({layer: weight.clone() for layer, weight in event.weights.items()})

    editor = package.BaseEditor.from_hparams(hparams)
    with sphere.track(editor, [Keep()]):
        editor.edit(**arguments(requests), sequential_edit=False)
    assert equal(weights_of(editor.model, hparams), weights_of(golden.load()[0], hparams))
    model, tok = golden.load()
    sphere.apply_sphere_to_model(model, tok, requests[-1:], hparams, callbacks=[Keep()])
    assert len(seen) == len(requests) + 1
    assert equal(seen[-2], seen[-1])


def test_easyedits_sphere_file_as_it_is(package: Any, golden: Golden) -> None:
    """Both classes read EasyEdit's YAML; our executor does the same with either object."""
    file = golden.folder / "easyedit_sphere_hparams.yaml"
    found = []
    for read in (sphere.SPHEREHyperParams, package.SPHEREHyperParams):
        hparams = read.from_hparams(str(file))
        hparams.model_name, hparams.device = str(golden.folder / "tiny-llama"), "cpu"
        hparams.stats_dir, hparams.P_loc = str(golden.folder / "stats"), str(golden.folder / "null_space_project.pt")
        hparams.batch_size = batch_size(golden)
        torch.manual_seed(0)
        found.append(run(package, golden, hparams)[1])
    assert equal(*found)


def test_every_sphere_file_of_easyedit_is_read(package: Any) -> None:
    files = sorted((Path(package.__file__).parents[1] / "hparams" / "SPHERE").glob("*.yaml"))
    if not files:
        pytest.skip("this EasyEdit has no hparams folder beside it")
    for file in files:
        hparams = sphere.SPHEREHyperParams.from_hparams(file)
        assert (hparams.base_alg, hparams.projection_stage) == ("AlphaEdit", "update")


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT"])
def test_runs_and_models_do_not_meet(package: Any, golden: Golden, base_alg: str) -> None:
    """A second run after a first, and two models edited by turns, end like a run by itself."""
    hparams = hparams_for(golden, base_alg)
    models = [golden.load()[0] for _ in range(3)]
    tok = golden.load()[1]
    for number in range(2):
        sphere.apply_sphere_to_model(models[0], tok, golden.batch(number), hparams)
    for number in range(2):
        for model in models[1:]:
            sphere.apply_sphere_to_model(model, tok, golden.batch(number), hparams)
    first = weights_of(models[0], hparams)
    assert all(equal(weights_of(model, hparams), first) for model in models[1:])


@pytest.mark.parametrize("base_alg", ["MEMIT", "AlphaEdit", "ROME", "FT", "EMMET"])
def test_tied_embeddings(package: Any, golden: Golden, base_alg: str, tmp_path: Path) -> None:
    """EasyEdit finds no ``lm_head.weight`` there; the weights must stay tied."""
    model, tok = tiny_model("llama", tie_word_embeddings=True), golden.load()[1]
    hparams = hparams_for(golden, base_alg, layers=[1], v_loss_layer=3, mom2_dataset="generated", mom2_n_samples=8,
                          stats_dir=str(tmp_path / "stats"), P_loc=None, nullspace_share=0.6)
    before = weights_of(model, hparams)
    sphere.apply_sphere_to_model(model, tok, golden.batch(0)[:1], hparams)
    assert not equal(weights_of(model, hparams), before)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not (tmp_path / "null_space_project.pt").exists()


@pytest.mark.parametrize("folder", ["gpt2-xl-of-mine/tiny-llama", "llama-and-t5/some-model"])
@pytest.mark.parametrize("family", ["llama", "gptj", "qwen2"])
def test_odd_names_and_families(package: Any, golden: Golden, family: str, folder: str, tmp_path: Path) -> None:
    """Wrapped AlphaEdit goes by what the model is, not by how its path reads."""
    model, tok = tiny_model(family), golden.load()[1]
    weights = []
    for path in (folder, "tiny"):
        model.save_pretrained(tmp_path / path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / path)
        hparams = golden.hparams(
            base_alg="AlphaEdit", executor="easyedit", layers=[1, 2], v_loss_layer=3, mom2_dataset="generated",
            mom2_n_samples=8, stats_dir=str(tmp_path / "stats"), P_loc=None, nullspace_share=0.6,
            model_name=str(tmp_path / path), **dict.fromkeys(
                ("rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module",
                 "lm_head_module")))
        for number in range(2):
            sphere.apply_sphere_to_model(loaded, tok, golden.batch(number), hparams)
        weights.append(edited_weights(loaded, hparams))
    assert equal(*weights)


def test_any_decoder_by_make_editor(package: Any, golden: Golden, tmp_path: Path) -> None:
    """A name that EasyEdit refuses, tied embeddings, and its evaluation all the same."""
    model, tok = tiny_model("llama", tie_word_embeddings=True), golden.load()[1]
    model.save_pretrained(tmp_path / "smol")
    tok.save_pretrained(tmp_path / "smol")
    hparams = hparams_for(golden, "AlphaEdit", "native", model_name="smol", layers=[1], v_loss_layer=3, P_loc=None,
                          mom2_dataset="generated", mom2_n_samples=8, stats_dir="stats", nullspace_share=0.6,
                          batch_size=batch_size(golden))
    with pytest.raises(NotImplementedError):
        package.BaseEditor.from_hparams(hparams)
    editor = make_editor(hparams)
    metrics, _, _ = editor.batch_edit(**arguments(golden.batch(0)), sequential_edit=True)
    assert [set(case["post"]) >= {"rewrite_acc", "locality"} for case in metrics] == [True] * batch_size(golden)
    json.dumps(metrics, default=float)


def test_smollm2_by_its_folder(package: Any, tmp_path: Path) -> None:
    """The folder's name says llama, so EasyEdit's own loader takes it, and its evaluation runs."""
    try:
        folder = smollm2_folder()
    except ValueError as error:
        pytest.skip(str(error))
    hparams = sphere.SPHEREHyperParams.from_dict({
        **sphere.SPHEREHyperParams.from_hparams("AlphaEdit/smollm2-135m").to_dict(), "model_name": str(folder),
        "layers": [4], "v_num_grad_steps": 3, "mom2_n_samples": 4, "mom2_max_length": 16, "device": "cpu",
        "stats_dir": str(tmp_path / "stats"), "context_templates": []})
    editor = package.BaseEditor.from_hparams(hparams)
    request = {"prompt": "The capital of France is", "subject": "France", "target_new": "Rome"}
    tracker = sphere.HETracker()
    with sphere.track(editor, [tracker]):
        metrics, _, _ = editor.edit(**arguments([request]), sequential_edit=True)
    assert 0 <= metrics[0]["post"]["rewrite_acc"][0] <= 1
    assert tracker.records[1].energy != tracker.records[0].energy


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "SimIE on ROME"])
def test_wrapped_session_goes_on_from_file(package: Any, golden: Golden, base_alg: str, tmp_path: Path) -> None:
    """EasyEdit's key sums are in the saved session: a run that goes on from it ends like one that never stopped."""
    hparams = hparams_for(golden, base_alg)
    whole, tok = golden.load()
    for number in range(2):
        sphere.apply_sphere_to_model(whole, tok, golden.batch(number), hparams)
    first = golden.load()[0]
    sphere.apply_sphere_to_model(first, tok, golden.batch(0), hparams)
    sphere.EditSession.of(first).save(tmp_path / "session.safetensors")
    second = golden.load()[0]
    second.load_state_dict(first.state_dict())
    session = sphere.EditSession.load(tmp_path / "session.safetensors")
    sphere.apply_sphere_to_model(second, tok, golden.batch(1), hparams, session=session)
    assert equal(weights_of(second, hparams), weights_of(whole, hparams))


@pytest.mark.parametrize("dataset", ["counterfact", "zsre"])
def test_script_with_real_records(package: Any, golden: Golden, dataset: str, data_dir: Path, tmp_path: Path) -> None:
    """run_scripts/edit_with_easyedit.py end to end: EasyEdit's metrics with energy, for one of its own files too."""
    file = {"counterfact": "counterfact.json", "zsre": "zsre_mend_eval.json"}[dataset]
    own = dataclasses.asdict(easyedits_own(package, golden, "MEMIT"))
    ours = hparams_for(golden, "AlphaEdit", "native", v_num_grad_steps=3).to_dict()
    for name, values in {"easyedit": own, "sphere": ours}.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**values, "device": "cpu"}))
        script = REPOSITORY / "run_scripts" / "edit_with_easyedit.py"
        subprocess.run([sys.executable, str(script), "--hparams", str(tmp_path / f"{name}.yaml"), "--dataset", dataset,
                        "--data", str(data_dir / file), "--num-edits", "4", "--batch-size", "2", "--seed", "0",
                        "--set", "v_num_grad_steps=2", "--output", str(tmp_path / name)], check=True, timeout=300,
                       env={**os.environ, "EASYEDIT_HOME": str(Path(package.__file__).parents[1])})
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        assert [case["hyperspherical_energy"]["num_edits"] for case in metrics] == [2, 2, 4, 4]
        assert all(case["post"]["locality"]["neighborhood_acc"] for case in metrics)
        assert "rewrite_acc" in json.loads((tmp_path / name / "correlation.json").read_text())
        assert (tmp_path / name / "energy.csv").exists()
