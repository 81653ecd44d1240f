"""The EasyEdit plugin: registration, editing through the editor, wrapped executors, and EasyEdit's defects.

The host is the stand-in under ``tests/helpers/stand_in``, which follows EasyEdit's contract and has EasyEdit's defects.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import sphere_easyedit as sphere
from conftest import without_easyedit
from helpers.golden import GOLDEN
from helpers.models import REQUESTS, edited_weights, relative_error, tiny_hparams, tiny_model
from helpers.paths import TESTS
from sphere_easyedit.easyedit.discovery import batch_editor, load_easyedit, wrappable
from sphere_easyedit.easyedit.editor import make_editor
from sphere_easyedit.methods.covariance import null_space_basis, second_moments

STAND_IN = TESTS / "helpers" / "stand_in"
FACTS = [{**request, "prompt": request["prompt"].replace("{}", request["subject"])} for request in [
    *REQUESTS, {"prompt": "The mother tongue of Marie Curie is", "subject": "Marie Curie", "target_new": "English"}]]
CONTEXTS = ["He said that. {}", "As of now, {}"]
FOLDERS = {"llama": "tiny-llama", "gpt2": "tiny-gpt2-xl"}
MODULES = {
    "llama": {"rewrite_module_tmp": "model.layers.{}.mlp.down_proj", "layer_module_tmp": "model.layers.{}",
              "mlp_module_tmp": "model.layers.{}.mlp", "attn_module_tmp": "model.layers.{}.self_attn",
              "ln_f_module": "model.norm", "lm_head_module": "lm_head"},
    # EasyEdit's files for GPT-2 name the embeddings, since the head that is tied to them can't be found.
    "gpt2": {"rewrite_module_tmp": "transformer.h.{}.mlp.c_proj", "layer_module_tmp": "transformer.h.{}",
             "mlp_module_tmp": "transformer.h.{}.mlp", "attn_module_tmp": "transformer.h.{}.attn",
             "ln_f_module": "transformer.ln_f", "lm_head_module": "transformer.wte"},
}
METHODS = ["MEMIT", "AlphaEdit", "ROME", "EMMET", "FT", "ULTRAEDIT", "SimIE"]
LEFT = ("FT", "ULTRAEDIT")  # padded on the left
EXTRAS: dict[str, dict[str, Any]] = {
    "FT": {"num_steps": 3, "lr": 0.01},
    "ROME": {"context_template_length_params": [[5, 2]]},
    "EMMET": {"emmet_lambda": 0.2},
    "ULTRAEDIT": {"lr": 0.05, "batch_size_once": 2, "editor_batch_size": 8},
    "SimIE": {"base_method": "MEMIT", "lamHyper": 0.5, "init_model": True, "solver": "LU", "fast": False},
}
STATE = ("CONTEXT_TEMPLATES_CACHE", "COV_CACHE", "inv_mom2_cache", "P", "P_loaded", "cache_c", "cache_c_new")
SETTINGS = {"v_num_grad_steps": 2, "v_lr": 0.5, "v_loss_layer": 3, "clamp_norm_factor": 4.0, "mom2_adjustment": True,
            "mom2_update_weight": 20.0, "L2": 0.1, "mom2_n_samples": 12, "mom2_dtype": "float32",
            "v_weight_decay": 0.001, "kl_factor": 0.0625}
Request = Mapping[str, Any]
Batches = Sequence[Sequence[Request]]
methods = pytest.mark.parametrize("method", METHODS)


def batches_for(method: str) -> Batches:
    """Two batches; ROME takes one request a call."""
    return [FACTS[:1], FACTS[1:2]] if method == "ROME" else [FACTS[:2], FACTS[2:]]


@dataclass(frozen=True)
class Home:
    """Models in a folder, with statistics, a threshold and null-space projections that suit them."""

    folder: Path
    threshold: dict[str, float]
    loaded: dict[str, tuple[nn.Module, PreTrainedTokenizerBase]]

    def path(self, family: str = "llama") -> Path:
        return self.folder / FOLDERS[family]

    def load(self, family: str = "llama") -> tuple[nn.Module, PreTrainedTokenizerBase]:
        """As the folder holds them, each time anew."""
        if family not in self.loaded:
            self.loaded[family] = load(self.path(family))
        return copy.deepcopy(self.loaded[family])

    def projections(self, family: str = "llama") -> Path:
        return self.folder / f"P-{family}.pt"

    def hparams(self, base_alg: str | None = "MEMIT", family: str = "llama", **changes: Any
                ) -> sphere.SPHEREHyperParams:
        settings = {"model_name": str(self.path(family)), "device": "cpu", "context_templates": CONTEXTS,
                    "v_num_grad_steps": 2, "mom2_max_length": 24, **changes}
        if base_alg is not None:
            settings["base_alg"] = base_alg
        return tiny_hparams(self.folder, **settings)

    def wrapped(self, method: str, family: str = "llama", **changes: Any) -> sphere.SPHEREHyperParams:
        settings = {"executor": "easyedit", "nullspace_threshold": self.threshold[family], **EXTRAS.get(method, {})}
        return self.hparams(method, family, **{**settings, **changes})

    def alone(self, package: ModuleType, method: str, family: str = "llama", **changes: Any) -> Any:
        """Hyperparameters of the host's own class, written down rather than derived."""
        module = sys.modules[package.ALG_DICT[method].__module__]
        own = next(value for name, value in vars(module).items()
                   if name.endswith("HyperParams") and value.__module__ == module.__name__)
        values = {"alg_name": method, "model_name": str(self.path(family)), "device": "cpu", "layers": [1, 2],
                  "fact_token": "subject_last", "mom2_dataset": "generated-seed0-t24", "stats_dir":
                  str(self.folder / "stats"), "nullspace_threshold": self.threshold[family],
                  "P_loc": str(self.projections(family)), "batch_size": 1, **MODULES[family], **SETTINGS,
                  **EXTRAS.get(method, {}), **changes}
        if method == "FT":
            values["rewrite_module_tmp"] += ".weight"  # as EasyEdit's files for it, else it tunes biases too
        if method == "ULTRAEDIT":
            values |= {"model_class": "", "inner_params": [values["rewrite_module_tmp"].format(i) for i in (1, 2)]}
        if method == "SimIE":
            values |= {"fp16": False, "model_parallel": False,
                       "model_name": "gpt2-xl" if family == "gpt2" else "llama"}  # which way round weights are stored
        made = own(**{field.name: values[field.name] for field in fields(own) if field.name in values and field.init})
        if method == "SimIE":
            made._base_hparams = self.alone(package, made.base_method, family, **changes)
        return made


def load(path: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    made = Home(tmp_path_factory.mktemp("home"), {}, {})
    tok = AutoTokenizer.from_pretrained(GOLDEN / "llama" / "tiny-llama")
    for family in FOLDERS:
        tiny_model(family).save_pretrained(made.path(family))
        tok.save_pretrained(made.path(family))
        model, _ = made.load(family)
        hparams = made.hparams(family=family)
        moments = second_moments(hparams.editable(model), tok, hparams)
        values = torch.cat([torch.linalg.eigvalsh(moment) for moment in moments.values()])
        made.threshold[family] = float(values.quantile(0.6))
        bases = [null_space_basis(moment, share=0.5).float() for moment in moments.values()]
        torch.save(torch.stack([basis @ basis.T for basis in bases]), made.projections(family))
    return made


@contextmanager
def fresh_host() -> Iterator[ModuleType]:
    """The stand-in as at its first import."""
    with without_easyedit():
        yield load_easyedit()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setenv("EASYEDIT_HOME", str(STAND_IN))
    monkeypatch.chdir(tmp_path)  # where the host strews its files
    with fresh_host() as package:
        yield package


@pytest.fixture
def registered(host: Any) -> Any:
    sphere.register()
    return host


def run(model: nn.Module, tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams, batches: Batches,
        **kwargs: Any) -> dict[int, Tensor]:
    """Edited weights after some batches."""
    for batch in batches:
        sphere.apply_sphere_to_model(model, tok, batch, hparams, **kwargs)
    return edited_weights(model, hparams)


def call_host(package: Any, model: nn.Module, tok: PreTrainedTokenizerBase, own: Any, batch: Sequence[Request]) -> None:
    """The host's executor by itself, with the padding that it needs."""
    tok.padding_side = "left" if own.alg_name in LEFT else "right"
    if hasattr(own, "batch_size_once"):
        own.batch_size, own.batch_size_once = len(batch), min(own.batch_size_once, len(batch))
    package.ALG_DICT[own.alg_name](model, tok, list(batch), own, return_orig_weights=True)


def run_alone(home: Home, method: str, batches: Batches, family: str = "llama", **changes: Any) -> dict[int, Tensor]:
    """Edited weights by the host's executor in a process that did nothing else before."""
    model, tok = home.load(family)
    with fresh_host() as package:
        own = home.alone(package, method, family, **changes)
        for batch in batches:
            call_host(package, model, tok, own, batch)
    return edited_weights(model, home.hparams(family=family))


def equal(first: Any, second: Any) -> bool:
    """Bit for bit, also inside of lists and mappings."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(equal, first, second))
    return bool(first == second)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def globals_of() -> dict[str, Any]:
    """Copies of what the host's modules keep outside of their functions."""
    return {f"{module.__name__}.{name}": copy.deepcopy(vars(module)[name])
            for module_name, module in list(sys.modules.items()) if module_name.startswith("easyeditor.models")
            for name in STATE if name in vars(module)}


def session_of(model: nn.Module) -> dict[str, Any]:
    session = sphere.EditSession.of(model)
    names = ("num_edits", "num_batches", "contexts", "original", "engine_caches", "engine_history")
    return {name: copy.deepcopy(getattr(session, name)) for name in names}


def spy(package: Any, method: str, look: Callable[..., None]) -> None:
    """Have ``look`` called with the arguments of a method of the host's before it runs."""
    function = package.ALG_DICT[method]

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        look(*args, **kwargs)
        return function(*args, **kwargs)

    package.ALG_DICT[method] = watched


def arguments(facts: Sequence[Request]) -> dict[str, Any]:
    """Facts as ``BaseEditor.edit`` takes them."""
    return {"prompts": [fact["prompt"] for fact in facts], "target_new": [fact["target_new"] for fact in facts],
            "subject": [fact["subject"] for fact in facts]}


# --- registration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [1, 2])
def test_register_and_unregister(times: int, host: Any, caplog: pytest.LogCaptureFixture) -> None:
    editor = batch_editor(host)
    before, method = dict(host.ALG_DICT), vars(editor)["is_batchable_method"]
    assert not any(editor.is_batchable_method(name) for name in ("SPHERE", "PRUNE", "RECT"))
    for _ in range(2):  # after unregister, register works again
        caplog.clear()
        for _ in range(times):
            sphere.register()
        assert len([record for record in caplog.records if "replaced" in record.getMessage()]) == 1
        assert host.ALG_DICT.keys() == {*before, "PRUNE", "RECT"}
        assert host.ALG_DICT["SPHERE"] is not before["SPHERE"]
        assert all(host.ALG_DICT[name] is before[name] for name in before if name != "SPHERE")
        assert {name: editor.is_batchable_method(name) for name in ("SPHERE", "PRUNE", "RECT", "MEMIT", "ROME", "?")
                } == {"SPHERE": True, "PRUNE": True, "RECT": True, "MEMIT": True, "ROME": False, "?": False}
        for _ in range(times):
            sphere.unregister()
        assert list(host.ALG_DICT) == list(before)
        assert all(host.ALG_DICT[name] is entry for name, entry in before.items())
        assert vars(editor)["is_batchable_method"] is method


def test_unregister_keeps_entries_of_others(registered: Any) -> None:
    theirs = registered.ALG_DICT["RECT"] = print
    sphere.unregister()
    assert registered.ALG_DICT["RECT"] is theirs
    assert "PRUNE" not in registered.ALG_DICT


def test_unregister_without_a_host_imports_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYEDIT_HOME", str(STAND_IN))
    with without_easyedit():
        sphere.unregister()
        assert "easyeditor" not in sys.modules


@pytest.mark.parametrize("name", ["PRUNE", "RECT", "SPHERE"])
def test_taken_name_registers_nothing(name: str, host: Any) -> None:
    def own(model: Any, tok: Any, requests: Any, hparams: Any) -> None:
        """A user's own method."""

    host.ALG_DICT[name] = own
    before, method = dict(host.ALG_DICT), vars(batch_editor(host))["is_batchable_method"]
    with pytest.raises(ValueError, match=f"{name}.*{__name__}"):
        sphere.register()
    assert before == host.ALG_DICT
    assert vars(batch_editor(host))["is_batchable_method"] is method


def without_host(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "easyeditor"]:
        del sys.modules[name]
    monkeypatch.setenv("EASYEDIT_HOME", str(home))


def test_home_that_is_nowhere(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = list(sys.path)
    without_host(monkeypatch, tmp_path / "nowhere")
    if importlib.util.find_spec("easyeditor"):
        pytest.skip("an EasyEdit is installed")
    with pytest.raises(ImportError, match=f"EASYEDIT_HOME={tmp_path / 'nowhere'}"):
        sphere.register()
    assert sys.path == path
    monkeypatch.setenv("EASYEDIT_HOME", str(STAND_IN))
    sphere.register()  # a corrected path is enough
    assert "PRUNE" in sys.modules["easyeditor"].ALG_DICT


def old_release(folder: Path) -> Path:
    (folder / "easyeditor" / "editors").mkdir(parents=True)
    (folder / "easyeditor" / "editors" / "__init__.py").write_text("")
    (folder / "easyeditor" / "editors" / "batch_editor.py").write_text(
        "class BatchEditor:\n    @staticmethod\n    def is_batchable_method(alg_name):\n        return False\n")
    (folder / "easyeditor" / "__init__.py").write_text(
        "ALG_DICT = {}\nclass BaseEditor:\n    def edit(self, prompts, target_new, keep_original_weight=False): ...\n")
    return folder


def test_old_release_is_refused(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_host(monkeypatch, old_release(tmp_path / "old"))
    for _ in range(2):  # by then it is imported, and no better for it
        with pytest.raises(ImportError, match="sequential_edit.*EASYEDIT_HOME"):
            sphere.register()
    assert sys.modules["easyeditor"].ALG_DICT == {}


def test_imported_package_wins(host: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path / "nowhere"))
    assert load_easyedit() is host


# --- methods of the host's that can't be imported -------------------------------------------------------------


@pytest.fixture
def partly_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A copy of the stand-in with a method more, which asks transformers for a module that is gone."""
    folder = tmp_path / "checkout"
    shutil.copytree(STAND_IN, folder, ignore=shutil.ignore_patterns("__pycache__"))
    gone = folder / "easyeditor" / "models" / "unke"
    gone.mkdir()
    (gone / "__init__.py").write_text("from .unke_main import UnkeExecutor, apply_unke_to_model\n")
    (gone / "unke_main.py").write_text(
        "from transformers.modeling_that_is_gone import mask\n\n\ndef apply_unke_to_model(): ...\n\n\n"
        "class UnkeExecutor: ...\n")
    methods = folder / "easyeditor" / "util" / "alg_dict.py"
    methods.write_text("from ..models.unke import UnkeExecutor, apply_unke_to_model\n" + methods.read_text()
                       + "\nALG_DICT |= {'UNKE': apply_unke_to_model, 'UNKE-2': UnkeExecutor().apply_to_model}\n")
    monkeypatch.setenv("EASYEDIT_HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    with without_easyedit():
        yield folder


REASON = (r"easyeditor\.models\.unke\.unke_main can't be imported \(ModuleNotFoundError: No module named "
          r"'transformers\.modeling_that_is_gone'\)")


def test_register_despite_an_unimportable_method(partly_broken: Path, home: Home, caplog: pytest.LogCaptureFixture
                                                 ) -> None:
    finders = list(sys.meta_path)
    sphere.register()
    sphere.register()
    assert sys.meta_path == finders
    (warning,) = [record.getMessage() for record in caplog.records if "imported" in record.getMessage()]
    assert "easyeditor.models.unke.unke_main" in warning and "modeling_that_is_gone" in warning
    assert "\n" not in warning
    editor = sys.modules["easyeditor"].BaseEditor.from_hparams(home.wrapped("MEMIT", batch_size=2))
    edit_through(editor, 2, FACTS, sequential_edit=True)
    expected = edited_weights(editor.model, home.hparams())
    with fresh_host():  # the same copy, not registered
        assert equal(run(*home.load(), home.wrapped("MEMIT", batch_size=2), batches_for("MEMIT")), expected)


@pytest.mark.parametrize("name", ["UNKE", "UNKE-2"])
def test_use_of_an_unimportable_method_raises_the_reason(name: str, partly_broken: Path, home: Home) -> None:
    package = load_easyedit()
    assert not {"UNKE", "UNKE-2"} & set(wrappable(package))
    model, tok = home.load()
    before = state_of(model)
    for use in (lambda: package.ALG_DICT[name](model, tok, FACTS[:1], None), lambda: package.ALG_DICT[name].attribute,
                lambda: run(model, tok, home.wrapped(name), [FACTS[:1]]),
                lambda: make_editor(SimpleNamespace(alg_name=name))):
        with pytest.raises(ImportError, match=REASON) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert equal(state_of(model), before)


def test_unimportable_sphere_of_the_host(partly_broken: Path, home: Home) -> None:
    main = partly_broken / "easyeditor" / "models" / "SPHERE" / "SPHERE_main.py"
    main.write_text("import no_such_module\n" + main.read_text())
    sphere.register()
    package = sys.modules["easyeditor"]
    editor = package.BaseEditor.from_hparams(home.hparams())
    editor.edit(**arguments(FACTS[:1]), sequential_edit=True)
    assert equal(edited_weights(editor.model, home.hparams()), run(*home.load(), home.hparams(), [FACTS[:1]]))
    sphere.unregister()
    with pytest.raises(ImportError, match="no_such_module"):
        package.ALG_DICT["SPHERE"]()


def test_unimportable_core_of_the_host(partly_broken: Path) -> None:
    common = partly_broken / "easyeditor" / "util" / "common.py"
    source = common.read_text()
    common.write_text("import no_such_module\n" + source)
    finders = list(sys.meta_path)
    # Methods import this file too; it is the editor that can't do without.
    with pytest.raises(ImportError, match="EasyEdit can't be imported from EASYEDIT_HOME.*no_such_module"):
        sphere.register()
    assert sys.meta_path == finders
    assert not [name for name in sys.modules if name.partition(".")[0] == "easyeditor"]
    common.write_text(source)
    sphere.register()  # with what was missing
    assert sorted(wrappable(sys.modules["easyeditor"])) == sorted(METHODS)


# --- native methods through the host's editor ---------------------------------------------------------------

NATIVE: dict[str, dict[str, Any]] = {
    "SPHERE on AlphaEdit": {"base_alg": "AlphaEdit", "alpha": 0.5}, "SPHERE on MEMIT": {"base_alg": "MEMIT"},
    "SPHERE on RECT": {"base_alg": "RECT"}, "SPHERE on PRUNE": {"base_alg": "PRUNE"},
    "RECT": {"base_alg": None, "alg_name": "RECT"}, "PRUNE": {"base_alg": None, "alg_name": "PRUNE"}}


def hparams_of(home: Home, case: str, size: int, **changes: Any) -> sphere.SPHEREHyperParams:
    """Hyperparameters of one of ``NATIVE``, or of a wrapped method of the host's."""
    if case in NATIVE:
        return home.hparams(**NATIVE[case], batch_size=size, **changes)
    return home.wrapped(case.removeprefix("wrapped "), batch_size=size, **changes)


sizes = pytest.mark.parametrize("size", [1, 2], ids=["edit", "batch_edit"])


def chunks(size: int) -> Batches:
    """The first three facts as the host portions them."""
    return [FACTS[:3][i:i + size] for i in range(0, 3, size)]


def edit_through(editor: Any, size: int, facts: Sequence[Request], **kwargs: Any) -> tuple[Any, Any, Any]:
    """``edit`` for one request a call, else ``batch_edit``."""
    method = editor.edit if size == 1 else editor.batch_edit
    return method(**arguments(facts), verbose=False, **kwargs)


@sizes
@pytest.mark.parametrize("case", [*NATIVE, "wrapped MEMIT"])
def test_sequential_edits_through_the_editor(case: str, size: int, home: Home, registered: Any) -> None:
    hparams = hparams_of(home, case, size)
    editor = registered.BaseEditor.from_hparams(hparams)
    original = edited_weights(editor.model, hparams)
    metrics, edited, _ = edit_through(editor, size, FACTS[:3], sequential_edit=True)
    direct = run(*home.load(), hparams, chunks(size))
    assert edited is editor.model
    assert equal(edited_weights(editor.model, hparams), direct)
    assert not equal(direct, original)
    assert len(metrics) == 3
    json.dumps(metrics)  # the host writes them to a file


def record_weights(editor: Any, hparams: sphere.SPHEREHyperParams) -> list[dict[int, Tensor]]:
    """Edited weights after each call, before the host puts them back."""
    apply, found = editor.apply_algo, []

    def recording(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = apply(model, *args, **kwargs)
        found.append(edited_weights(result[0], hparams))
        return result

    editor.apply_algo = recording
    return found


@pytest.mark.parametrize(("case", "size"), [
    *((case, size) for case in NATIVE for size in (1, 2)),
    *((f"wrapped {method}", 1 if method in ("ROME", "EMMET") else 2) for method in METHODS)])
def test_edits_that_are_not_sequential_are_independent(case: str, size: int, home: Home, registered: Any) -> None:
    # Context templates generated by a session must not be generated again by an edited model.
    generated = case == "SPHERE on MEMIT" or case.startswith("wrapped")
    hparams = hparams_of(home, case, size, context_templates=None if generated else CONTEXTS)
    editor = registered.BaseEditor.from_hparams(hparams)
    original, found = state_of(editor.model), record_weights(editor, hparams)
    edit_through(editor, size, FACTS[:3], sequential_edit=False)
    assert equal(state_of(editor.model), original)
    for weights, batch in zip(found, chunks(size), strict=True):
        assert equal(weights, run(*home.load(), hparams, [batch]))


def test_own_hyperparameters_of_the_hosts_sphere(home: Home, registered: Any) -> None:
    module = importlib.import_module("easyeditor.models.SPHERE.SPHERE_main")
    alphaedit = vars(home.alone(registered, "AlphaEdit", mom2_dataset="generated"))
    own = module.SPHEREHyperParams(**{**alphaedit, "alg_name": "SPHERE", "cumulative_ratio": 0.4,
                                      "suppression_strength": 0.7})
    before = copy.deepcopy(own)
    editor = registered.BaseEditor.from_hparams(own)
    editor.edit(**arguments(FACTS[:2]), sequential_edit=True)
    ours = home.hparams("AlphaEdit", gamma=0.4, alpha=0.7, projection_stage="update", P_loc=str(home.projections()),
                        context_templates=None)
    assert equal(edited_weights(editor.model, ours), run(*home.load(), ours, [FACTS[:1], FACTS[1:2]]))
    assert own == before


@pytest.mark.parametrize("hparams", ["some.yaml", None, sphere.SPHEREHyperParams])
def test_hyperparameters_of_a_wrong_kind(hparams: Any, home: Home, registered: Any) -> None:
    with pytest.raises(TypeError, match="SPHEREHyperParams"):
        registered.ALG_DICT["SPHERE"](*home.load(), FACTS[:1], hparams)


# --- the host's executors, wrapped --------------------------------------------------------------------------


def projections_for(method: str, home: Home, family: str) -> dict[str, Any]:
    return {"P_loc": str(home.projections(family))} if method == "AlphaEdit" else {}


def use_host(package: Any, home: Home, method: str) -> None:
    """Leave state in a module of the host's, as using it without SPHERE does."""
    call_host(package, *home.load(), home.alone(package, method), FACTS[3:])


@pytest.mark.parametrize(("family", "used"), [("llama", False), ("llama", True), ("gpt2", False)])
@methods
def test_alpha_zero_gives_the_hosts_bits(method: str, family: str, used: bool, home: Home, host: Any) -> None:
    """Only the edited weights change, and the host's module globals do not."""
    if used:
        use_host(host, home, method)
    kept = globals_of()
    assert all(value is None or not value for value in kept.values()) == (not used or method in LEFT)
    hparams = home.wrapped(method, family, alpha=0.0, context_templates=None, **projections_for(method, home, family))
    model, tok = home.load(family)
    original = state_of(model)
    for batch in batches_for(method):
        wrapped = run(model, tok, hparams, [batch])
        assert equal(globals_of(), kept)
    assert equal(wrapped, run_alone(home, method, batches_for(method), family))
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, original[name])}
    assert changed == {f"{MODULES[family]['rewrite_module_tmp'].format(layer)}.weight" for layer in (1, 2)}


@pytest.mark.parametrize("family", list(FOLDERS))
@methods
def test_the_hosts_own_change_is_projected(method: str, family: str, home: Home, host: Any) -> None:
    own_values = {"batched_target_values": False} if method in ("MEMIT", "AlphaEdit") else {}
    hparams = home.wrapped(method, family, alpha=0.5, context_templates=None, **own_values,
                           **projections_for(method, home, family))
    batch = batches_for(method)[0]
    model, tok = home.load(family)
    before = edited_weights(model, hparams)
    wrapped, alone = run(model, tok, hparams, [batch]), run_alone(home, method, [batch], family)
    for layer in hparams.layers:
        turn = (lambda stored: stored.T) if family == "gpt2" else (lambda stored: stored)
        change = turn(alone[layer] - before[layer])
        space = sphere.PrincipalSpace.from_weight(turn(before[layer]), hparams.gamma)
        expected = turn(before[layer]) + space.suppress(change, 0.5)
        assert relative_error(turn(wrapped[layer]) - turn(before[layer]), expected - turn(before[layer])) < 1e-4
        assert relative_error(turn(wrapped[layer]), turn(alone[layer])) > 1e-4


@pytest.mark.parametrize("family", list(FOLDERS))
@pytest.mark.parametrize("method", ["MEMIT", "AlphaEdit"])
def test_wrapped_agrees_with_native(method: str, family: str, home: Home, host: Any) -> None:
    """Two implementations written apart from each other; the host's has neither drift term nor norm penalty."""
    same = {"alpha": 0.5, "projection_stage": "update", "v_num_grad_steps": 5, "kl_factor": 0.0, "v_weight_decay": 0.0,
            **projections_for(method, home, family)}
    original = edited_weights(home.load(family)[0], home.hparams(family=family))
    changes = []
    for hparams in (home.hparams(method, family, **same), home.wrapped(method, family, **same),
                    home.wrapped(method, family, **same, batched_target_values=False)):
        after = run(*home.load(family), hparams, batches_for(method))
        changes.append({layer: after[layer] - original[layer] for layer in after})
    for layer in (1, 2):
        assert relative_error(changes[1][layer], changes[0][layer]) < 5e-3
        assert relative_error(changes[2][layer], changes[0][layer]) < 5e-3


@methods
def test_copy_leaves_the_model_untouched(method: str, home: Home, host: Any) -> None:
    hparams, batch = home.wrapped(method), batches_for(method)[0]
    model, tok = home.load()
    before = state_of(model)
    edited, originals = sphere.apply_sphere_to_model(model, tok, batch, hparams, copy=True, return_orig_weights=True)
    assert equal(state_of(model), before)
    assert equal(edited_weights(edited, hparams), run(*home.load(), hparams, [batch]))
    assert equal(originals, {name: before[name] for name in originals}) and len(originals) == 2


@pytest.mark.parametrize(("method", "changes", "size", "message"), [
    ("FT", {"num_stepz": 4}, 1, "'num_stepz' .*'num_steps'"),
    ("FT", {"lr": None}, 1, "FT needs .*lr"),
    ("ROME", {"context_template_length_params": None}, 1, "ROME needs .*context_template_length_params"),
    ("MEMIT", {"v_lr": None}, 1, "MEMIT needs .*v_lr"),
    ("MEMIT", {"mom2_update_weight": None}, 1, "MEMIT needs .*mom2_update_weight"),
    ("AlphaEdit", {"L2": None}, 1, "AlphaEdit needs .*L2"),
    ("ROME", {}, 2, "ROME edits one request per call and got 2.*batch_size"),
    ("ULTRAEDIT", {"batch_size_once": 0}, 1, "batch_size_once is 0: give a whole number"),
    ("ULTRAEDIT", {"editor_batch_size": "many"}, 1, "editor_batch_size is 'many': give a whole number"),
    ("ULTRAEDIT", {"half": True}, 1, "half is true.*float16"),
    ("ULTRAEDIT", {"inner_params": ["model.layers.1.mlp.up_proj"]}, 1,
     "inner_params is .*up_proj.*leave inner_params"),
    ("SimIE", {"base_method": None}, 1, "base_method is None: SimIE can be wrapped on ROME, MEMIT, FT"),
    ("SimIE", {"base_method": "SimIE"}, 1, "base_method is 'SimIE'"),
    ("SimIE", {"lamHyperr": 2.0}, 1, "'lamHyperr' .*'lamHyper'"),
    ("SimIE", {"base_method": "ROME"}, 1, "ROME needs context_template_length_params"),
    ("SimIE", {"mom2_update_weight": None}, 1, "MEMIT needs mom2_update_weight"),
    ("EMMET", {"batched_target_values": True}, 2, "batched_target_values is true.*EMMET"),
    ("IKE", {}, 1, "IKE.*can't be wrapped"),
    ("MEMTI", {}, 1, "'MEMTI'.*did you mean 'MEMIT'"),
    ("AlphaEdti", {}, 1, "'AlphaEdti'.*did you mean 'AlphaEdit'"),
])
def test_refused_before_the_host_is_called(method: str, changes: dict[str, Any], size: int, message: str, home: Home,
                                           host: Any) -> None:
    """None removes a hyperparameter."""
    called: list[Any] = []
    for name in host.ALG_DICT:
        spy(host, name, lambda *args, **kwargs: called.append(args))
    values = home.wrapped(method).to_dict()
    values |= values.pop("executor_hparams") | changes
    hparams = sphere.SPHEREHyperParams.from_dict({key: value for key, value in values.items() if value is not None})
    model, tok = home.load()
    before = state_of(model)
    with pytest.raises(ValueError, match=message) as caught:
        run(model, tok, hparams, [FACTS[:size]])
    assert "\n" not in str(caught.value)
    assert not called
    assert equal(state_of(model), before)


def test_wrappable_methods(host: Any) -> None:
    assert wrappable(host) == sorted(METHODS)


def test_batch_that_chunks_do_not_divide(home: Home, host: Any, caplog: pytest.LogCaptureFixture) -> None:
    """The host drops the remainder, so smaller chunks are used and every fact is edited."""
    called: list[Any] = []
    spy(host, "ULTRAEDIT", lambda _model, _tok, requests, own, **kwargs: called.append(
        (len(requests), own.batch_size, own.batch_size_once)))
    with caplog.at_level(logging.INFO):
        weights = [run(*home.load(), home.wrapped("ULTRAEDIT", batch_size_once=once), [FACTS[:3]]) for once in (2, 1)]
    assert called == [(3, 3, 1), (3, 3, 1)]
    assert equal(*weights)
    assert len([record for record in caplog.records if "batch_size_once is 2" in record.getMessage()]) == 1


@pytest.mark.parametrize("base", ["ROME", "MEMIT", "FT"])
def test_one_method_on_another(base: str, home: Home, host: Any) -> None:
    """SimIE's own bits on each method that it runs, in batches, from weights that are projected or not."""
    changes = {"base_method": base, **EXTRAS.get(base, {}), "init_model": base == "FT"}
    hparams = home.wrapped("SimIE", **changes, alpha=0.0, context_templates=None)
    batches, (model, tok) = batches_for("SimIE"), home.load()
    assert equal(run(model, tok, hparams, batches), run_alone(home, "SimIE", batches, **changes))
    history = sphere.EditSession.of(model).engine_history
    assert list(history) == [f"matrix_P.model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)]
    # With SPHERE the second batch goes on from projected weights, with the sums of keys that SimIE has by then.
    projected = home.wrapped("SimIE", **changes, alpha=0.5, context_templates=None)
    (model, _), (alone, _) = home.load(), home.load()
    first, second = (run(model, tok, projected, [batch]) for batch in batches)
    own = home.alone(host, "SimIE", **changes)
    call_host(host, alone, tok, own, batches[0])
    for layer, weight in first.items():
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        own._simie_instance.weights_copy[name] = weight.clone()
        alone.get_parameter(name).data.copy_(weight)
    call_host(host, alone, tok, own, batches[1])
    for layer, after in edited_weights(alone, projected).items():
        change = sphere.PrincipalSpace.from_weight(first[layer], 0.5).suppress(after - first[layer], 0.5)
        assert relative_error(second[layer] - first[layer], change) < 1e-4


def test_nothing_keeps_the_edited_model(home: Home, host: Any) -> None:
    kept = host.ALG_DICT["ULTRAEDIT"].__self__
    before = dict(vars(kept))
    run(*home.load(), home.wrapped("ULTRAEDIT"), [FACTS[:2]])
    assert vars(kept) == before == {"is_init": False}


def test_original_weights_are_asked_for(home: Home, registered: Any) -> None:
    """The host's ``edit`` tells methods not to keep them; then a change beyond our layers would go unseen."""
    told: list[Any] = []
    spy(registered, "EMMET", lambda *args, **kwargs: told.append(kwargs))
    registered.BaseEditor.from_hparams(home.wrapped("EMMET")).edit(**arguments(FACTS[:1]), sequential_edit=True)
    assert [(kwargs["keep_original_weight"], kwargs["return_orig_weights"]) for kwargs in told] == [(True, True)]


# --- what the host keeps in its modules ---------------------------------------------------------------------

STATEFUL = pytest.mark.parametrize("method", ["MEMIT", "AlphaEdit", "ROME"])


def other_model(home: Home) -> nn.Module:
    """A model of the same name with other weights."""
    model, _ = home.load()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    return model


@STATEFUL
def test_two_models_in_one_process(method: str, home: Home, host: Any, tmp_path: Path) -> None:
    batches, tok = batches_for(method), home.load()[1]
    hparams = [home.wrapped(method, alpha=0.0, context_templates=None, nullspace_share=None, stats_dir=str(folder))
               for folder in (home.folder / "stats", tmp_path / "other")]
    models = [home.load()[0], other_model(home)]
    for batch in batches:
        for model, settings in zip(models, hparams, strict=True):
            run(model, tok, settings, [batch])
    ours = [edited_weights(model, hparams[0]) for model in models]
    assert equal(run(home.load()[0], tok, hparams[0], batches), ours[0])  # a later run is like the first

    alone, together = [], [home.load()[0], other_model(home)]
    for number in range(2):
        with fresh_host() as package:
            model = [home.load()[0], other_model(home)][number]
            own = home.alone(package, method, stats_dir=hparams[number].stats_dir, P_loc="nowhere")
            for batch in batches:
                call_host(package, model, tok, own, batch)
            alone.append(edited_weights(model, hparams[0]))
    with fresh_host() as package:
        for batch in batches:
            for model, settings in zip(together, hparams, strict=True):
                call_host(package, model, tok, home.alone(package, method, stats_dir=settings.stats_dir,
                                                          P_loc="nowhere"), batch)
    assert equal(ours, alone)
    # The host by itself mixes them up, so there was something to keep apart.
    assert not equal(edited_weights(together[1], hparams[0]), alone[1])


@STATEFUL
def test_statistics_of_another_model_are_not_handed_to_the_host(method: str, home: Home, host: Any, tmp_path: Path,
                                                                caplog: pytest.LogCaptureFixture) -> None:
    """The host reads them by their path, which two models of one name share."""
    batches, tok = batches_for(method), home.load()[1]

    def edit(model: nn.Module, folder: str) -> dict[int, Tensor]:
        return run(model, tok, home.wrapped(method, alpha=0.0, nullspace_share=None, stats_dir=str(tmp_path / folder)),
                   batches)

    wanted = edit(other_model(home), "alone")
    edit(home.load()[0], "shared")
    assert "replaced" not in caplog.text
    assert equal(edit(other_model(home), "shared"), wanted)
    assert caplog.text.count("were collected from other weights of the model and another text") == 1


@pytest.mark.parametrize("method", ["MEMIT", "AlphaEdit"])
def test_statistics_replaced_while_the_host_edits(method: str, home: Home, host: Any, tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    hparams = home.wrapped(method, nullspace_share=None, stats_dir=str(tmp_path / "stats"))
    (model, tok), name = home.load(), "get_context_templates" if method == "MEMIT" else "get_project"
    before = {name: value.clone() for name, value in model.state_dict().items()}
    module = sys.modules[host.ALG_DICT[method].__module__]
    own = getattr(module, name)

    def replaced(*given: Any, **named: Any) -> Any:
        second_moments(hparams.editable(other_model(home)), tok, hparams)
        return own(*given, **named)

    monkeypatch.setattr(module, name, replaced)
    with pytest.raises(ValueError, match="was replaced or removed by another process"):
        run(model, tok, hparams, batches_for(method))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert sphere.EditSession.of(model).num_edits == 0


@contextmanager
def counted(model: nn.Module, fail_at: int | None = None, failure: type[BaseException] = RuntimeError
            ) -> Iterator[SimpleNamespace]:
    """Counts the model's forward passes; raises in one of them if told to."""
    calls = SimpleNamespace(number=0)

    def count(*_: Any) -> None:
        calls.number += 1
        if calls.number == fail_at:
            raise failure("pulled the plug")

    handle = model.register_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()


@pytest.mark.parametrize(("method", "alpha", "failure"), [
    *((method, 0.5, RuntimeError) for method in METHODS), *((method, 0.0, RuntimeError) for method in METHODS[:2]),
    ("AlphaEdit", 0.5, KeyboardInterrupt)])
def test_failure_midway_leaves_no_trace(method: str, alpha: float, failure: type[BaseException], home: Home, host: Any
                                        ) -> None:
    use_host(host, home, method)
    hparams = home.wrapped(method, alpha=alpha, context_templates=None, **projections_for(method, home, "llama"))
    first, second = batches_for(method)
    (twin, tok), (model, _) = home.load(), home.load()
    kept = globals_of()

    def fail(batch: Sequence[Request], fail_at: int) -> None:
        weights, session = state_of(model), session_of(model)
        tok.padding_side = "left"
        with counted(model, fail_at, failure), pytest.raises(failure, match="pulled the plug"):
            run(model, tok, hparams, [batch])
        assert equal(state_of(model), weights)
        assert equal(session_of(model), session)
        assert equal(globals_of(), kept)
        assert tok.padding_side == "left"
        assert all(parameter.requires_grad for parameter in model.parameters())

    with counted(twin) as in_first:
        run(twin, tok, hparams, [first])
    with counted(twin) as in_second:
        expected = run(twin, tok, hparams, [second])
    # In the last pass weights have changed already, and AlphaEdit has begun to add to its sums of keys.
    fail(first, in_first.number)
    run(model, tok, hparams, [first])
    fail(second, 1)
    fail(second, in_second.number)
    assert equal(run(model, tok, hparams, [second]), expected)


@pytest.mark.parametrize("method", ["MEMIT", "AlphaEdit", "SimIE"])
def test_saved_session_goes_on(method: str, home: Home, host: Any, tmp_path: Path) -> None:
    hparams = home.wrapped(method, context_templates=None, stats_dir=str(tmp_path / "stats"))
    first, second = batches_for(method)
    (model, tok), (resumed, _) = home.load(), home.load()
    run(model, tok, hparams, [first])
    sphere.EditSession.of(model).save(tmp_path / "session.safetensors")
    resumed.load_state_dict(model.state_dict())
    expected = run(model, tok, hparams, [second])
    # Statistics that are missing by then must still come from the weights before any edit.
    shutil.rmtree(tmp_path / "stats")
    loaded = sphere.EditSession.load(tmp_path / "session.safetensors")
    assert equal(run(resumed, tok, hparams, [second], session=loaded), expected)
    assert (loaded.num_edits, loaded.num_batches) == (4, 2)


# --- target values by our optimiser -------------------------------------------------------------------------

batched = pytest.mark.parametrize("method", ["MEMIT", "AlphaEdit"])


@batched
def test_who_optimises_target_values(method: str, home: Home, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("the host's own optimiser")

    monkeypatch.setattr(importlib.import_module("easyeditor.util.closed_form"), "compute_z", refuse)
    for changes, ours in (({"alpha": 0.5}, True), ({"alpha": 0.5, "batched_target_values": False}, False),
                          ({"alpha": 0.0}, False), ({"alpha": 0.0, "batched_target_values": True}, True)):
        model, tok = home.load()
        if ours:
            run(model, tok, home.wrapped(method, **changes), batches_for(method))
        else:
            with pytest.raises(RuntimeError, match="the host's own optimiser"):
                run(model, tok, home.wrapped(method, **changes), batches_for(method))


@batched
def test_target_values_vanish_from_the_temporary_folder(method: str, home: Home, host: Any, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    temporary, found = tmp_path / "temporary", []
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    spy(host, method, lambda *args, **kwargs: found.append(list(temporary.rglob("*.npz"))))
    model, tok = home.load()
    run(model, tok, home.wrapped(method), batches_for(method))
    assert [len(files) for files in found] == [2, 2]
    assert not list(temporary.iterdir())
    with counted(model, 3), pytest.raises(RuntimeError, match="pulled the plug"):
        run(model, tok, home.wrapped(method), [FACTS[:2]])
    assert not list(temporary.iterdir())


@batched
def test_target_values_are_kept_one_file_an_edit(method: str, home: Home, host: Any, tmp_path: Path) -> None:
    folder = tmp_path / "values" / "deeper"
    hparams = home.wrapped(method, target_values_dir=str(folder))
    # Ids that begin anew in every batch, as in the host's batch_edit.
    batches = [[{**fact, "case_id": i} for i, fact in enumerate(batch)] for batch in batches_for(method)]
    first = run(*home.load(), hparams, batches)
    files = sorted(folder.iterdir())
    values = [np.load(file)["v_star"] for file in files]
    assert len(files) == 4 and all(value.shape == (48,) for value in values)
    assert len({value.tobytes() for value in values}) == 4
    assert equal(first, run(*home.load(), home.wrapped(method), batches))
    # Another model's old files are not taken for this one's.
    model = other_model(home)
    stats = {"stats_dir": str(tmp_path / "other")}
    other = run(model, home.load()[1], home.wrapped(method, target_values_dir=str(folder), **stats), batches)
    assert equal(other, run(other_model(home), home.load()[1], home.wrapped(method, **stats), batches))


@batched
def test_callers_own_cache_of_target_values(method: str, home: Home, host: Any, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """EasyEdit's ``cache_template``: the host's own values go there, and are read from there."""
    hparams, template = home.wrapped(method, alpha=0.5), str(tmp_path / "z_{}_{}_{}.npz")
    own = home.wrapped(method, alpha=0.5, batched_target_values=False)
    first = run(*home.load(), hparams, batches_for(method), cache_template=template)
    assert sorted(file.name for file in tmp_path.glob("z_*")) == [f"z_2_4.0_{i}.npz" for i in range(4)]
    assert equal(first, run(*home.load(), own, batches_for(method)))
    monkeypatch.setattr(importlib.import_module("easyeditor.util.closed_form"), "compute_z", None)
    assert equal(first, run(*home.load(), own, batches_for(method), cache_template=template))


@pytest.mark.parametrize("generated", [False, True])
@STATEFUL
def test_context_templates_reach_the_host(method: str, generated: bool, home: Home, host: Any) -> None:
    """Generated ones stay in the session after the first batch."""
    module, found = sys.modules[host.ALG_DICT[method].__module__], []
    spy(host, method, lambda *args, **kwargs: found.append(copy.deepcopy(module.CONTEXT_TEMPLATES_CACHE)))
    model, tok = home.load()
    run(model, tok, home.wrapped(method, context_templates=None if generated else CONTEXTS, alpha=0.0),
        batches_for(method))
    contexts = sphere.EditSession.of(model).contexts if generated else CONTEXTS
    assert contexts and all(context.count("{}") == 1 for context in contexts)
    given = ["{}", *contexts] if method == "ROME" else [["{}"], contexts]
    assert found == [None if generated else given, given]
    assert module.CONTEXT_TEMPLATES_CACHE is None


# --- what breaks the host -----------------------------------------------------------------------------------


def copy_model(home: Home, folder: Path, family: str = "llama") -> Path:
    model, tok = home.load(family)
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["MEMIT", "ROME"])
def test_tied_embeddings(method: str, home: Home, host: Any, tmp_path: Path) -> None:
    batches, tok = batches_for(method), home.load()[1]
    hparams = home.wrapped(method, alpha=0.0, stats_dir=str(tmp_path / "stats"))
    tied, untied = tiny_model("llama", tie_word_embeddings=True), tiny_model("llama")
    untied.load_state_dict(tied.state_dict())
    tied.config._name_or_path = untied.config._name_or_path = "my-llama"
    untied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    names = [name for name, _ in tied.named_parameters()]
    expected = run(untied, tok, hparams, batches)
    with pytest.raises(LookupError, match="lm_head"):
        call_host(host, tied, tok, home.alone(host, method, stats_dir=str(tmp_path / "stats")), batches[0])
    assert equal(run(tied, tok, hparams, batches), expected)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert [name for name, _ in tied.named_parameters()] == names


@pytest.mark.parametrize("method", ["MEMIT", "AlphaEdit", "RECT", "PRUNE"])
def test_tied_embeddings_natively(method: str, home: Home, registered: Any, tmp_path: Path) -> None:
    folder = tmp_path / "tied-llama"
    tiny_model("llama", tie_word_embeddings=True).save_pretrained(folder)
    home.load()[1].save_pretrained(folder)
    hparams = home.hparams(method, model_name=str(folder), stats_dir=str(tmp_path / "stats"))
    editor = registered.BaseEditor.from_hparams(hparams)
    before = state_of(editor.model)
    editor.edit(**arguments(FACTS[:2]), sequential_edit=True)
    assert editor.model.lm_head.weight is editor.model.model.embed_tokens.weight
    changed = {name for name, value in editor.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)}


@pytest.mark.parametrize(("method", "family", "name", "error"), [
    *((method, "llama", "my-model", NameError if method == "AlphaEdit" else None) for method in METHODS),
    ("AlphaEdit", "gpt2", "my-model", NameError), ("AlphaEdit", "llama", "gpt2-xl-stuff/my-llama", None),
    ("AlphaEdit", "gpt2", "llama-stuff/my-gpt", RuntimeError),
    ("EMMET", "llama", "gpt2-xl-stuff/my-llama", RuntimeError)])
def test_path_without_or_with_another_familys_name(method: str, family: str, name: str, error: type[Exception] | None,
                                                   home: Home, host: Any, tmp_path: Path) -> None:
    """The host finds the family by substrings of the path, and fails for some; wrapped, the path makes no difference.
    """
    path, changes = copy_model(home, tmp_path / name, family), {"stats_dir": str(tmp_path / "stats")}
    model, tok = load(path)
    hparams = home.wrapped(method, family, model_name=str(path), nullspace_share=None, **changes)
    expected = run(*home.load(family), home.wrapped(method, family, nullspace_share=None), batches_for(method))
    assert equal(run(model, tok, hparams, batches_for(method)), expected)
    assert model.config._name_or_path == str(path)
    if error is not None:
        with pytest.raises(error):
            call_host(host, *load(path), home.alone(host, method, family, model_name=str(path), **changes), FACTS[:1])


@pytest.mark.parametrize("changes", [{}, {"P_loc": "null_space_project.pt"}, {"nullspace_share": None}],
                         ids=["share", "absent file", "threshold"])
def test_null_space_without_a_file(changes: dict[str, Any], home: Home, host: Any, tmp_path: Path) -> None:
    hparams, calls = home.wrapped("AlphaEdit", alpha=0.0, context_templates=None, **changes), batches_for("AlphaEdit")
    weights = run(*home.load(), hparams, calls)
    assert not list(tmp_path.rglob("*.pt"))
    own = home.alone(host, "AlphaEdit", P_loc="nowhere")
    call_host(host, *home.load(), own, FACTS[:1])
    assert (tmp_path / "null_space_project.pt").exists()  # the host's own habit
    if "nullspace_share" in changes:
        assert equal(weights, run_alone(home, "AlphaEdit", calls, P_loc="nowhere"))


def test_null_space_by_share_needs_no_threshold(home: Home, host: Any) -> None:
    weights = [run(*home.load(), home.wrapped("AlphaEdit", alpha=0.0, nullspace_threshold=threshold), [FACTS[:2]])
               for threshold in (1e-3, None)]
    assert equal(*weights)


@pytest.mark.parametrize("executor", ["native", "easyedit"])
def test_gptj(executor: str, home: Home, host: Any, tmp_path: Path) -> None:
    """The host sets up P for it, and no sums of keys."""
    tok, tiny = home.load()[1], tiny_model("gptj")
    tiny.config._name_or_path = "EleutherAI/gpt-j-6b"
    hparams = home.hparams("AlphaEdit", executor=executor, stats_dir=str(tmp_path / "stats"), alpha=0.5,
                           nullspace_threshold=1e-3)
    before = edited_weights(tiny, hparams)
    weights = run(tiny, tok, hparams, batches_for("AlphaEdit"))
    assert all(torch.isfinite(weights[layer]).all() and not torch.equal(weights[layer], before[layer])
               for layer in (1, 2))
    names = {"rewrite_module_tmp": "transformer.h.{}.mlp.fc_out", "layer_module_tmp": "transformer.h.{}",
             "mlp_module_tmp": "transformer.h.{}.mlp", "ln_f_module": "transformer.ln_f"}
    own = home.alone(host, "AlphaEdit", model_name="EleutherAI/gpt-j-6b", **names)
    with pytest.raises(NameError, match="knows no width"):
        call_host(host, tiny, tok, own, FACTS[:1])


def test_number_of_a_gpu_that_is_not_there(home: Home, registered: Any, caplog: pytest.LogCaptureFixture,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hparams = home.hparams(device=0)
    assert hparams.device == "cpu"
    assert "no GPU" in caplog.text
    editor = registered.BaseEditor.from_hparams(hparams)
    editor.edit(**arguments(FACTS[:1]), sequential_edit=True)
    assert equal(edited_weights(editor.model, hparams), run(*home.load(), home.hparams(), [FACTS[:1]]))


@methods
def test_model_and_tokenizer_are_restored(method: str, home: Home, host: Any) -> None:
    """The method gets its own padding side and a padding token; results do not depend on the tokenizer's."""
    (model, tok), hparams = home.load(), home.wrapped(method, alpha=0.5)
    expected = run(*home.load(), hparams, batches_for(method))
    seen: list[tuple[str, Any]] = []
    spy(host, method, lambda _model, tok, *args, **kwargs: seen.append((tok.padding_side, tok.pad_token)))
    tok.padding_side, tok.pad_token = "right" if method in LEFT else "left", None  # the wrong side
    parameters = dict(model.named_parameters())
    for i, parameter in enumerate(parameters.values()):
        parameter.requires_grad_(i % 3 != 0)
        parameter.grad = torch.ones_like(parameter) if i % 2 else None
    flags = {name: parameter.requires_grad for name, parameter in parameters.items()}
    grads = {name: parameter.grad for name, parameter in parameters.items()}
    values = {name: None if grad is None else grad.clone() for name, grad in grads.items()}
    config, tokenizer = model.config.to_dict(), {name: repr(value) for name, value in vars(tok).items()}
    assert equal(run(model, tok, hparams, batches_for(method)), expected)
    assert seen == [("left" if method in LEFT else "right", tok.eos_token)] * 2
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in parameters.items())
    assert {name: parameter.requires_grad for name, parameter in after.items()} == flags
    assert all(parameter.grad is grads[name] for name, parameter in after.items())
    assert equal({name: parameter.grad for name, parameter in after.items()}, values)
    assert model.config.to_dict() == config and model.config._name_or_path == str(home.path())
    assert {name: repr(value) for name, value in vars(tok).items()} == tokenizer
    assert not model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_padding_side_matters_to_the_host(home: Home, host: Any) -> None:
    """Otherwise the test above could not fail."""
    for method, wrong in (("FT", "right"), ("MEMIT", "left")):
        model, tok = home.load()
        tok.padding_side = wrong
        host.ALG_DICT[method](model, tok, FACTS[:3], home.alone(host, method), return_orig_weights=True)
        right = run_alone(home, method, [FACTS[:3]])
        assert not equal(edited_weights(model, home.hparams()), right)


# Prompts that end with the subject: in a random model little that happens there is felt later.
EASY = [{"prompt": "Once upon a time in France", "subject": "France", "target_new": "the"},
        {"prompt": "And then came John Smith", "subject": "John Smith", "target_new": "and"}]


@pytest.mark.parametrize(("changes", "size"), [
    ({"base_alg": "MEMIT"}, 1), ({"base_alg": "AlphaEdit"}, 2),
    ({"base_alg": "FT", "executor": "easyedit", "num_steps": 8, "lr": 0.02}, 2)], ids=["MEMIT", "AlphaEdit", "FT"])
def test_editor_for_any_name(changes: dict[str, Any], size: int, home: Home, registered: Any, tmp_path: Path) -> None:
    path = copy_model(home, tmp_path / "my-model")
    hparams = home.hparams(**{**changes, "model_name": str(path), "batch_size": size, "v_num_grad_steps": 12,
                              "stats_dir": str(tmp_path / "stats"), "alpha": 0.1})
    with pytest.raises(NotImplementedError):
        registered.BaseEditor.from_hparams(hparams)
    given = copy.deepcopy(hparams)
    editor = make_editor(hparams)
    assert hparams == given and editor.hparams is hparams and editor.model_name == str(path)
    metrics, edited, _ = edit_through(
        editor, size, EASY, rephrase_prompts=[f"Well, {fact['prompt']}" for fact in EASY],
        locality_inputs={"neighborhood": {"prompt": ["The capital of Spain is"] * 2, "ground_truth": ["Madrid"] * 2}})
    assert [metric["requested_rewrite"]["prompt"] for metric in metrics] == [fact["prompt"] for fact in EASY]
    for metric in metrics:
        assert metric.keys() >= {"case_id", "requested_rewrite", "pre", "post"}
        assert len(metric["post"]["rephrase_acc"]) == 1
        assert (metric["pre"]["rewrite_acc"], metric["post"]["rewrite_acc"]) == ([0.0], [1.0])
        assert 0.0 <= metric["post"]["locality"]["neighborhood_acc"][0] <= 1.0
    assert equal(state_of(edited), state_of(load(path)[0]))


# --- tracking -----------------------------------------------------------------------------------------------


class Noting(sphere.EditCallback):
    """Keeps what it was told; raises at the end of a batch if told to."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at, self.starts, self.ends = fail_at, [], []

    def on_batch_start(self, event: sphere.EditEvent) -> None:
        self.starts.append((event.num_edits, event.num_batches))

    def on_batch_end(self, event: sphere.EditEvent) -> None:
        if event.num_batches == self.fail_at:
            raise RuntimeError("seen enough")
        self.ends.append((event.num_edits, event.num_batches, sorted(event.update_norms), len(event.losses)))


def editor_for(package: Any, home: Home, method: str, size: int = 1) -> Any:
    """An editor of our methods or of the host's own."""
    if method == "SPHERE":
        return package.BaseEditor.from_hparams(home.hparams("AlphaEdit", batch_size=size))
    if method == "wrapped FT":
        return package.BaseEditor.from_hparams(home.wrapped("FT", batch_size=size))
    return package.BaseEditor.from_hparams(home.alone(package, method, batch_size=size))


TRACKED = ["SPHERE", "wrapped FT", "MEMIT", "FT", "EMMET"]


@pytest.mark.parametrize(("size", "sequential"), [(1, False), (2, True)], ids=["restored", "sequential"])
@pytest.mark.parametrize("method", TRACKED)
def test_tracking(method: str, size: int, sequential: bool, home: Home, registered: Any, tmp_path: Path,
                  caplog: pytest.LogCaptureFixture) -> None:
    plain = editor_for(registered, home, method, size)
    edit_through(plain, size, FACTS[:3], sequential_edit=sequential)
    for module in list(sys.modules.values()):  # what the plain run left in the host would colour the next
        if module.__name__.startswith("easyeditor.models") and "COV_CACHE" in vars(module):
            module.CONTEXT_TEMPLATES_CACHE = None
    editor = editor_for(registered, home, method, size)
    apply, tracker, noting = editor.apply_algo, sphere.HETracker(tmp_path / "energy.csv"), Noting()
    caplog.clear()
    with sphere.track(editor, [tracker, noting]):
        edit_through(editor, size, FACTS[:3], sequential_edit=sequential)
    assert method != "SPHERE" or not caplog.records  # weights that the host restores are no change from outside
    assert editor.apply_algo is apply
    assert equal(state_of(editor.model), state_of(plain.model))
    counts = [0, 1, 2, 3] if size == 1 else [0, 2, 3]
    assert [record.num_edits for record in tracker.records] == counts
    assert list(tracker.records[0].energy) == [1, 2]
    assert noting.starts == list(zip(counts[:-1], range(len(counts) - 1), strict=True))
    losses = [b - a if method == "SPHERE" else 0 for a, b in pairwise(counts)]
    assert noting.ends == [(count, i + 1, [1, 2], losses[i]) for i, count in enumerate(counts[1:])]
    energies = [record.energy[1] for record in tracker.records]
    assert len(set(energies)) == len(energies)
    assert energies[0] == pytest.approx(float(sphere.hyperspherical_energy(edited_weights(
        home.load()[0], home.hparams())[1])))


def test_tracking_a_method_without_weights(home: Home, registered: Any) -> None:
    editor = editor_for(registered, home, "IKE")
    tracker, before = sphere.HETracker(), state_of(editor.model)
    with sphere.track(editor, [tracker]):
        editor.edit(**arguments(FACTS[:2]), sequential_edit=True)
    assert [record.num_edits for record in tracker.records] == [0, 1, 2]
    assert list(tracker.records[0].energy) == [0, 1, 2, 3]  # no layers in its hyperparameters: all blocks
    assert tracker.records[2].relative_change == dict.fromkeys(range(4), 0.0)
    assert equal(state_of(editor.model), before)


@pytest.mark.parametrize("method", TRACKED)
def test_callback_that_raises_undoes_the_batch(method: str, home: Home, registered: Any) -> None:
    """Later batches are numbered as if it had never been."""
    editor = editor_for(registered, home, method)
    apply, noting, tracker = editor.apply_algo, Noting(fail_at=2), sphere.HETracker()
    with sphere.track(editor, [noting, tracker]):
        editor.edit(**arguments(FACTS[:1]), sequential_edit=True)
        before = state_of(editor.model)
        with pytest.raises(RuntimeError, match="seen enough"):
            editor.edit(**arguments(FACTS[1:2]), sequential_edit=True)
        assert equal(state_of(editor.model), before)
        assert [record.num_edits for record in tracker.records] == [0, 1]
        noting.fail_at = None
        editor.edit(**arguments(FACTS[1:3]), sequential_edit=True)
    assert editor.apply_algo is apply
    assert noting.starts == [(0, 0), (1, 1), (1, 1), (2, 2)]
    assert [end[:2] for end in noting.ends] == [(1, 1), (2, 2), (3, 3)]
