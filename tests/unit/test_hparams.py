"""Hyperparameters: shipped files, EasyEdit's own files, strictness, what a session carries."""

from __future__ import annotations

import copy
import math
import pickle
import shutil
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, BertConfig, GPT2Config, LlamaConfig, Qwen2Config

from helpers.paths import REPOSITORY, TESTS
from helpers.published_sizes import PUBLISHED, published_config
from sphere_easyedit import hparams_files
from sphere_easyedit.hparams import SPHEREHyperParams
from sphere_easyedit.hparams_files import available_hparams, render_hparams, starting_hparams
from sphere_easyedit.models.config_fields import num_blocks
from sphere_easyedit.models.module_discovery import module_names

GOLDEN = TESTS / "golden"
SHIPPED = REPOSITORY / "hparams" / "SPHERE"
BASES = ("AlphaEdit", "MEMIT", "PRUNE", "RECT", "FT", "ROME")
MODELS = ("llama3-8b", "llama3.1-8b", "llama3.2-1b", "llama3.2-3b", "qwen2.5-0.5b", "qwen2.5-7b",
          "mistral-7b", "gpt2-xl", "gpt-j-6B", "smollm2-135m")
MODEL_TYPES = {"llama": "llama", "qwen": "qwen2", "mistral": "mistral", "gpt2": "gpt2", "gpt-j": "gptj",
               "smollm2": "llama"}
RECOMMENDED = ("recommended/smollm2-135m",)
NAMES = sorted({*(f"{base}/{model}" for base in BASES for model in MODELS),
                *(f"{base}/{model}" for base in ("AlphaEdit", "MEMIT") for model in PUBLISHED), *RECOMMENDED})
# Files whose values are those that a starting file would have, but for the target values of Gemma's.
STARTED = [name for name in NAMES if name.partition("/")[2] in PUBLISHED and "llama" not in name
           and name != "AlphaEdit/gemma3-270m"]
# What EasyEdit's FTHyperParams and ROMEHyperParams (main, 14cea82) take without a default.
MODULES = {"rewrite_module_tmp", "layer_module_tmp", "mlp_module_tmp", "attn_module_tmp", "ln_f_module",
           "lm_head_module"}
FT_FIELDS = {"layers", "num_steps", "lr", "weight_decay", "kl_factor", "norm_constraint", "device",
             "alg_name", "model_name", "objective_optimization", *MODULES}
ROME_FIELDS = {"layers", "fact_token", "v_num_grad_steps", "v_lr", "v_loss_layer", "v_weight_decay",
               "clamp_norm_factor", "kl_factor", "mom2_adjustment", "context_template_length_params",
               "mom2_dataset", "mom2_n_samples", "mom2_dtype", "alg_name", "device", "model_name",
               "stats_dir", *MODULES}


def minimal(**changes: Any) -> dict[str, Any]:
    """The least that AlphaEdit and MEMIT ask for, with changes; ``...`` as a value takes a key away."""
    given_: dict[str, Any] = {
        "model_name": "tiny", "layers": [1, 2], "v_num_grad_steps": 5, "v_lr": 0.5, "v_loss_layer": 5,
        "v_weight_decay": 0.5, "clamp_norm_factor": 0.75, "kl_factor": 0.0625, "mom2_update_weight": 20,
        "nullspace_threshold": 0.02, "L2": 0.1, **changes,
    }
    return {key: value for key, value in given_.items() if value is not ...}


def make(**changes: Any) -> SPHEREHyperParams:
    return SPHEREHyperParams.from_dict(minimal(**changes))


def wrapped(**changes: Any) -> dict[str, Any]:
    return {"model_name": "tiny", "layers": [1], "base_alg": "FT", "executor": "easyedit", "lr": "5e-4",
            "num_steps": 25, "norm_constraint": False, **changes}


def yaml_file(folder: Path, text: str) -> Path:
    file = folder / "hparams.yaml"
    file.write_text(text)
    return file


# Shipped files


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("model", MODELS)
def test_shipped_file_has_the_papers_gamma_and_alpha(base: str, model: str) -> None:
    hparams = SPHEREHyperParams.from_hparams(f"{base}/{model}")
    assert hparams.base_alg == base
    assert hparams.gamma == 0.5
    assert hparams.alpha == (0.5 if base == "AlphaEdit" else 0.8)
    assert hparams.projection_stage == ("layer" if base == "AlphaEdit" else "update")
    assert hparams.executor == ("easyedit" if base in ("FT", "ROME") else "native")
    assert hparams.device is None
    assert hparams.P_loc is None  # EasyEdit's one null_space_project.pt would be shared by all models
    model_type = next(value for key, value in MODEL_TYPES.items() if model.startswith(key))
    config = CONFIG_MAPPING[model_type]()
    assert hparams.module_names(config) == module_names(config)
    raw = yaml.safe_load((SHIPPED / base / f"{model}.yaml").read_text())
    assert {"FT": FT_FIELDS, "ROME": ROME_FIELDS}.get(base, set()) <= set(raw)


@pytest.mark.parametrize("base", ["AlphaEdit", "MEMIT", "PRUNE", "RECT"])
@pytest.mark.parametrize(("model", "v_lr"), [("llama3-8b", 0.1), ("qwen2.5-7b", 0.5)])
def test_shipped_file_of_a_model_in_the_paper_has_its_settings(base: str, model: str, v_lr: float) -> None:
    hparams = SPHEREHyperParams.from_hparams(f"{base}/{model}")
    assert (hparams.layers, hparams.v_num_grad_steps, hparams.v_lr) == ([4, 5, 6, 7, 8], 25, v_lr)


@pytest.mark.parametrize("base", ["AlphaEdit", "MEMIT"])
@pytest.mark.parametrize("model", PUBLISHED)
def test_shipped_file_fits_the_published_sizes(base: str, model: str) -> None:
    hparams, config = SPHEREHyperParams.from_hparams(f"{base}/{model}"), published_config(model)
    assert hparams.model_name == PUBLISHED[model][0]
    assert hparams.module_names(config) == module_names(config)
    assert hparams.v_loss_layer == num_blocks(config) - 1


@pytest.mark.parametrize("name", STARTED)
def test_shipped_files_of_newer_models_are_starting_files(name: str) -> None:
    base, _, model = name.partition("/")
    tried = {"v_lr": 20, "v_num_grad_steps": 10} if model.startswith("gemma3") else {}
    raw = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text())
    assert raw == starting_hparams(published_config(model), PUBLISHED[model][0], base) | tried
    tuned = SPHEREHyperParams.from_hparams("AlphaEdit/gemma3-270m")
    assert all(getattr(tuned, field) == value for field, value in tried.items())


def test_every_shipped_file_names_its_sources_and_is_listed() -> None:
    assert available_hparams() == NAMES
    for file in SHIPPED.glob("*/*.yaml"):
        assert "Sources of the values" in file.read_text().splitlines()[0], file


@pytest.mark.parametrize("name", ["recommended/smollm2-135m", "MEMIT/smollm2-135m", "FT/smollm2-135m"])
def test_all_hyperparameters_are_written_once_and_read_back(name: str, tmp_path: Path) -> None:
    hparams = SPHEREHyperParams.from_hparams(name)
    (tmp_path / "all.yaml").write_text(render_hparams(hparams.to_dict()))
    assert SPHEREHyperParams.from_hparams(tmp_path / "all.yaml") == hparams


def test_small_models_have_settings_of_their_own() -> None:
    hparams = SPHEREHyperParams.from_hparams("AlphaEdit/smollm2-135m")
    assert (hparams.model_name, hparams.v_loss_layer, hparams.mom2_dataset) == ("smollm2-135m", 29, "generated")
    hparams = SPHEREHyperParams.from_hparams("AlphaEdit/gemma3-270m")
    assert (hparams.layers, hparams.v_loss_layer, hparams.v_lr, hparams.L2) == ([3, 4, 5, 6, 7], 17, 20.0, 10.0)


# EasyEdit's own files


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_easyedits_own_file_loads_unchanged_and_means_stage_update(family: str) -> None:
    hparams = SPHEREHyperParams.from_hparams(GOLDEN / family / "easyedit_sphere_hparams.yaml")
    assert (hparams.base_alg, hparams.executor, hparams.projection_stage) == ("AlphaEdit", "native", "update")
    assert (hparams.gamma, hparams.alpha) == (0.5, 0.5)
    assert hparams.device == "cpu"
    assert hparams.P_loc == "null_space_project.pt"
    assert (hparams.max_length, hparams.batch_size, hparams.model_parallel) == (40, 1, False)


def test_easyedits_names_do_not_override_a_stage_that_is_named() -> None:
    assert make(cumulative_ratio=0.4, projection_stage="layer").projection_stage == "layer"
    assert make(cumulative_ratio=0.4).projection_stage == "update"
    assert make(gamma=0.4).projection_stage == "layer"


def test_two_equal_names_of_one_value_are_fine() -> None:
    hparams = make(gamma=0.4, cumulative_ratio="4e-1", alpha=0.7, suppression_strength=0.7)
    assert (hparams.gamma, hparams.alpha) == (hparams.cumulative_ratio, hparams.suppression_strength) == (0.4, 0.7)


@pytest.mark.parametrize(("ours", "theirs"), [("gamma", "cumulative_ratio"),
                                              ("alpha", "suppression_strength")])
def test_two_names_of_one_value_that_differ_are_refused(ours: str, theirs: str) -> None:
    with pytest.raises(ValueError, match=f"{ours} is 0.4 but {theirs}.* 0.5: remove one"):
        make(**{ours: 0.4, theirs: 0.5})


# Defaults that depend on the base method


@pytest.mark.parametrize(("base", "alpha", "stage", "space"), [
    ("AlphaEdit", 0.5, "layer", "current"), ("MEMIT", 0.8, "update", "current"),
    ("RECT", 0.8, "update", "current"), ("PRUNE", 0.8, "update", "pretrained"),
])
def test_defaults_follow_the_base_method(base: str, alpha: float, stage: str, space: str) -> None:
    hparams = make(base_alg=base)
    assert (hparams.alpha, hparams.projection_stage, hparams.principal_space) == (alpha, stage, space)


def test_a_wrapped_method_is_projected_after_the_solve() -> None:
    assert SPHEREHyperParams.from_dict(wrapped()).projection_stage == "update"
    assert make(base_alg="AlphaEdit", executor="easyedit").projection_stage == "update"


def test_module_names_are_filled_from_the_architecture() -> None:
    assert make().rewrite_module_tmp is None
    assert make().module_names(GPT2Config()) == module_names(GPT2Config())


def test_a_weights_name_in_place_of_its_modules_is_understood() -> None:
    names = vars(module_names(LlamaConfig())).copy()
    names["rewrite_module_tmp"] += ".weight"  # as in EasyEdit's FT files
    assert make(**names).rewrite_module_tmp == "model.layers.{}.mlp.down_proj"
    kept = SPHEREHyperParams.from_dict(wrapped(**names))
    assert kept.rewrite_module_tmp == "model.layers.{}.mlp.down_proj.weight"  # EasyEdit's FT wants it so
    assert kept.module_names(LlamaConfig()) == module_names(LlamaConfig())


# Types


def test_scientific_notation_is_a_number(tmp_path: Path) -> None:
    text = yaml.safe_dump(minimal(v_lr=..., L2=..., mom2_n_samples=...))
    file = yaml_file(tmp_path, text + "v_lr: 5e-1\nL2: 1e-3\nmom2_n_samples: 1e5\n")
    assert isinstance(yaml.safe_load(file.read_text())["v_lr"], str)  # this is how PyYAML reads it
    hparams = SPHEREHyperParams.from_hparams(file)
    assert (hparams.v_lr, hparams.L2, hparams.mom2_n_samples) == (0.5, 0.001, 100000)
    assert isinstance(hparams.mom2_n_samples, int)


def test_context_templates_are_flattened_without_the_plain_prompt() -> None:
    nested = [["{}"], ["The cat sat. {}", "So. {}"]]
    assert make(context_templates=nested).context_templates == ["The cat sat. {}", "So. {}"]
    assert make(context_templates=["{}"]).context_templates == []
    assert make().context_templates is None


@pytest.mark.parametrize(("changes", "message"), [
    ({"alpha": 1.5}, r"alpha is 1.5 but must lie in \[0, 1\]"),
    ({"gamma": -0.1}, r"gamma is -0.1 but must lie in \[0, 1\]"),
    ({"v_lr": math.inf}, "v_lr is inf: give a finite number"),
    ({"v_lr": "nan"}, "v_lr is 'nan': give a finite number"),
    ({"v_lr": 0}, r"v_lr is 0.0 but must lie in \(0, inf\)"),
    ({"v_lr": "fast"}, "v_lr must be a number, not 'fast'"),
    ({"v_lr": True}, "v_lr must be a number, not True"),
    ({"v_num_grad_steps": 0}, "v_num_grad_steps is 0: it must be at least 1"),
    ({"v_num_grad_steps": 2.5}, "v_num_grad_steps is 2.5: give a whole number"),
    ({"seed": None}, "seed must be a number, not None"),
    ({"clamp_norm_factor": 0}, "clamp_norm_factor"),
    ({"kl_factor": -1}, "kl_factor"),
    ({"step_norm_factor": 0}, r"step_norm_factor is 0.0 but must lie in \(0, inf\)"),
    ({"L2": 0}, "L2 is 0.0"),
    ({"rect_keep": 0}, r"rect_keep is 0.0 but must lie in \(0, 1\]"),
    ({"prune_log_base": 1}, r"prune_log_base is 1.0 but must lie in \(1, inf\)"),
    ({"nullspace_share": 1.2}, "nullspace_share"),
    ({"mom2_adjustment": "yes"}, "mom2_adjustment must be true or false, not 'yes'"),
    ({"model_name": 7}, "model_name must be a text"),
    ({"model_name": ""}, "model_name must be a text that is not empty"),
    ({"model_name": ...}, "not given: model_name"),
    ({"layers": []}, "layers must be a list"),
    ({"layers": "4-8"}, "layers must be a list .* not '4-8'"),
    ({"layers": [2, 2]}, r"layers is \[2, 2\].*without repetition"),
    ({"layers": [3, 1]}, "ascend"),
    ({"layers": [-1, 1]}, "0 or more"),
    ({"v_loss_layer": 1}, "v_loss_layer is 1, before the last edited layer 2"),
    ({"device": True}, "device is True"),
    ({"mom2_dtype": "float31"}, "mom2_dtype is 'float31'.*did you mean 'float32'"),
    ({"projection_stage": "layers"}, "projection_stage is 'layers'.*did you mean 'layer'"),
    ({"principal_space": "old"}, "principal_space is 'old' but must be current or pretrained"),
    ({"alg_name": "MEMIT"}, "alg_name is 'MEMIT' but must be SPHERE"),
    ({"executor": "easy"}, "executor is 'easy' but must be native or easyedit"),
    ({"executor": "easyedt", "lr": 1}, "executor is 'easyedt'.*did you mean 'easyedit'"),
    ({"fact_token": "last"}, "only subject_last is built in.*executor: easyedit"),
    ({"layer_selection": "random"}, "layer_selection is 'random'"),
    ({"context_templates": "So. {}"}, "context_templates must be a list"),
    ({"context_templates": ["no brace"]}, "'no brace': each must be a text with exactly one {}"),
    ({"context_templates": ["{0} {}"]}, "no other brace"),
    ({"rewrite_module_tmp": "h.{}.c_proj"}, "module names given without layer_module_tmp"),
    ({"base_alg": "FT"}, "base_alg is 'FT'.*executor: easyedit"),
    ({"base_alg": "alphaedit"}, "Did you mean 'AlphaEdit'"),
    ({"base_alg": "RECT", "executor": "easyedit"}, "executor: native"),
    ({"base_alg": "SPHERE", "executor": "easyedit"}, "can't wrap itself"),
    ({"base_alg": "MEMIT", "executor": "easyedit", "projection_stage": "layer"}, "projection_stage: update"),
    ({"base_alg": "PRUNE", "projection_stage": "layer"}, "projection_stage: update"),
    ({"base_alg": "PRUNE", "principal_space": "current"}, "principal_space: pretrained"),
    ({"L2": ...}, "AlphaEdit needs L2"),
    ({"v_lr": ...}, "AlphaEdit needs v_lr"),
    ({"nullspace_threshold": ...}, "nullspace_threshold .or nullspace_share"),
    ({"base_alg": "MEMIT", "mom2_update_weight": ...}, "MEMIT needs mom2_update_weight"),
    ({"executor_hparams": {"lr": 1}}, "executor: easyedit"),
    ({"executor_hparams": 3}, "executor_hparams must be a mapping"),
])
def test_a_wrong_value_is_refused_with_name_value_and_remedy(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_a_module_template_without_a_layer_number_is_refused() -> None:
    names = {**vars(module_names(LlamaConfig())), "mlp_module_tmp": "model.layers.3.mlp"}
    with pytest.raises(ValueError, match=r"mlp_module_tmp is 'model.layers.3.mlp'"):
        make(**names)


@pytest.mark.parametrize(("key", "near"), [("gama", "gamma"), ("alhpa", "alpha"), ("V_LR", "v_lr"),
                                           ("nullspace_treshold", "nullspace_threshold"),
                                           ("suppresion_strength", "suppression_strength")])
def test_an_unknown_key_is_refused_with_the_nearest_known(key: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}' .value 0.5. is not a hyperparameter: did you mean '{near}'"):
        make(**{key: 0.5})


def test_an_unknown_key_near_nothing_lists_what_is_known() -> None:
    with pytest.raises(ValueError, match=r"known are .*gamma.*executor: easyedit"):
        make(zzz=1)


@pytest.mark.parametrize(("name", "default", "other"), [
    ("gamma_rule", "share", "knee"), ("space_source", "weight", "both"), ("energy_budget", None, 5e-7)])
def test_an_option_of_older_versions_is_read_at_its_default_alone(name: str, default: Any, other: Any) -> None:
    assert make(**{name: default}) == make()
    assert name not in make(**{name: default}).to_dict()
    with pytest.raises(ValueError, match=f"{name} is {other!r}, an option that was removed since .*: leave it out$"):
        make(**{name: other})


def test_what_is_no_mapping_or_has_odd_names_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a mapping"):
        SPHEREHyperParams.from_dict([1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be text, not 3"):
        SPHEREHyperParams.from_dict({**minimal(), 3: 4})  # type: ignore[dict-item]


@given(st.sampled_from(["gamma", "alpha"]), st.one_of(st.floats(0, 1), st.floats(allow_nan=True)))
def test_gamma_and_alpha_lie_between_0_and_1(name: str, value: float) -> None:
    if 0 <= value <= 1:
        assert getattr(make(**{name: value}), name) == value
    else:
        with pytest.raises(ValueError, match=name):
            make(**{name: value})


# Wrapped methods


def test_a_wrapped_methods_own_keys_are_kept_and_readable() -> None:
    hparams = SPHEREHyperParams.from_dict(wrapped(objective_optimization="prompt_last"))
    assert hparams.executor_hparams == {"lr": 5e-4, "num_steps": 25, "norm_constraint": False,  # lr was given as text
                                        "objective_optimization": "prompt_last"}
    assert hparams.num_steps == 25  # type: ignore[attr-defined]
    assert not hasattr(hparams, "fp16")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hparams.nothing  # type: ignore[attr-defined]


@pytest.mark.parametrize("key", ["gama", "alhpa", "projection_stag", "supression_strength"])
def test_a_misspelling_of_ours_is_no_key_of_a_wrapped_method(key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}'.*did you mean"):
        SPHEREHyperParams.from_dict(wrapped(**{key: 0.5}))


@pytest.mark.parametrize("key", ["weight_decay", "context_template_length_params", "fp16", "inner_lr"])
def test_a_wrapped_methods_key_is_not_taken_for_a_misspelling(key: str) -> None:
    assert key in SPHEREHyperParams.from_dict(wrapped(**{key: 0})).executor_hparams


def test_a_wrapped_methods_key_that_ours_also_bears_goes_into_executor_hparams() -> None:
    hparams = SPHEREHyperParams.from_dict(wrapped(alpha=0.3, executor_hparams={"alpha": 9}))
    assert hparams.alpha == 0.3
    assert hparams.executor_hparams["alpha"] == 9
    assert SPHEREHyperParams.from_dict(hparams.to_dict()) == hparams


def test_a_wrapped_methods_key_given_twice_and_differing_is_refused() -> None:
    with pytest.raises(ValueError, match="lr is '5e-4' but executor_hparams says 3"):
        SPHEREHyperParams.from_dict(wrapped(executor_hparams={"lr": 3}))


def test_a_wrapped_method_may_use_other_fact_tokens() -> None:
    assert make(base_alg="ROME", executor="easyedit", fact_token="last").fact_token == "last"


# Round trip and copies


@pytest.mark.parametrize("mapping", [
    minimal(), minimal(base_alg="PRUNE", prune_log_base=2), minimal(context_templates=["So. {}"], device=0),
    minimal(nullspace_threshold=..., nullspace_share=0.6),
    minimal(cumulative_ratio=0.4), wrapped(),
], ids=["alphaedit", "prune", "contexts", "share", "easyedit-names", "wrapped"])
def test_round_trip_copy_and_pickle(mapping: dict[str, Any]) -> None:
    hparams = SPHEREHyperParams.from_dict(mapping)
    assert SPHEREHyperParams.from_dict(hparams.to_dict()) == hparams
    assert SPHEREHyperParams.from_dict(yaml.safe_load(render_hparams(hparams.to_dict()))) == hparams
    assert copy.deepcopy(hparams) == hparams
    assert copy.copy(hparams) == hparams
    assert pickle.loads(pickle.dumps(hparams)) == hparams


def test_a_dict_shares_nothing_with_the_hyperparameters() -> None:
    hparams = make()
    hparams.to_dict()["layers"].append(9)
    assert hparams.layers == [1, 2]


# What a session carries


@pytest.mark.parametrize("change", [
    {"layers": [1]}, {"base_alg": "MEMIT"}, {"L2": 0.2},
    {"mom2_update_weight": 21}, {"P_loc": "p.pt"}, {"nullspace_threshold": 0.03}, {"nullspace_share": 0.5},
    {"context_templates": []},
    {"mom2_dataset": "other"}, {"mom2_n_samples": 9}, {"mom2_dtype": "float64"}, {"mom2_max_length": 9},
    {"seed": 1},
    {"keep_previous_keys": True}, dict(vars(module_names(LlamaConfig()))),
], ids=lambda change: next(iter(change)))
def test_session_key_changes_with_what_shapes_the_carried_state(change: dict[str, Any]) -> None:
    assert make(**change).session_key() != make().session_key()


@pytest.mark.parametrize("change", [
    {"device": "cpu"}, {"batch_size": 7}, {"max_length": 7}, {"token_budget": 7}, {"model_parallel": True},
    {"v_lr": 0.1}, {"v_num_grad_steps": 7}, {"normalised_steps": 9}, {"model_name": "other"}, {"stats_dir": "other"},
    {"gamma": 0.4}, {"alpha": 0.4}, {"projection_stage": "update"}, {"principal_space": "pretrained"},
    {"rect_keep": 0.5}, {"prune_log_base": 2},
], ids=lambda change: next(iter(change)))
def test_session_key_stays_with_what_does_not(change: dict[str, Any]) -> None:
    assert make(**change).session_key() == make().session_key()


def test_session_key_is_the_same_however_the_values_were_written() -> None:
    assert make(L2="1e-1", gamma=0.5).session_key() == make(L2=0.1, cumulative_ratio=0.5,
                                                            projection_stage="layer").session_key()


# Files


@pytest.mark.parametrize(("text", "message"), [
    ("- 1\n- 2\n", "must be a YAML mapping .* found list"), ("", "found nothing"), ("just text", "found str"),
    ("a: [1", "not readable as YAML"), ("3: 4", "names must be text, found 3"),
    ("gamma: 0.1\ngamma: 0.2", "line 2: gamma is given twice"),
    ("gamma: !!python/object/apply:os.getcwd []", "not readable"),
])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    file = yaml_file(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        SPHEREHyperParams.from_hparams(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_value_in_a_file_is_reported_with_the_file(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, yaml.safe_dump(minimal(gamma=2)))
    for path in (file, file.with_suffix("")):  # is found with and without its ending
        with pytest.raises(ValueError, match=r"gamma is 2.0") as caught:
            SPHEREHyperParams.from_hparams(path)
        assert str(file) in str(caught.value)


def test_a_missing_file_says_what_is_near_and_how_to_write_one() -> None:
    with pytest.raises(FileNotFoundError, match="AlphaEdit/smollm2-135m.*sphere-easyedit hparams MODEL"):
        SPHEREHyperParams.from_hparams("alphaedit/smolm2-135m")
    with pytest.raises(FileNotFoundError, match=r"nearest shipped: AlphaEdit/smollm2-135m\. "):
        SPHEREHyperParams.from_hparams("AlphaEdit/smollm2")
    with pytest.raises(FileNotFoundError, match=r"bases .*PRUNE.* models .*gpt2-xl"):
        SPHEREHyperParams.from_hparams("/nowhere/xyz.yaml")
    with pytest.raises(FileNotFoundError, match=r"nearest shipped: .*MEMIT/gpt2-xl"):
        SPHEREHyperParams.from_hparams("gpt2-xl")


def test_an_installed_wheel_finds_its_own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "site-packages" / "sphere_easyedit"
    shutil.copytree(SHIPPED, package / "_hparams" / "SPHERE")
    (package / "hparams_files.py").touch()
    monkeypatch.setattr(hparams_files, "__file__", str(package / "hparams_files.py"))
    monkeypatch.setattr(resources, "files", lambda _package: package)
    monkeypatch.chdir(tmp_path)
    assert available_hparams() == NAMES
    assert SPHEREHyperParams.from_hparams("MEMIT/gpt2-xl").layers == [13, 14, 15, 16, 17]


# A starting file


@pytest.mark.parametrize("config", [LlamaConfig(num_hidden_layers=6), Qwen2Config(num_hidden_layers=4),
                                    GPT2Config(n_layer=6), GPT2Config(n_layer=1)],
                         ids=["llama", "qwen2", "gpt2", "one-block"])
@pytest.mark.parametrize("base", BASES)
def test_a_starting_file_is_complete_for_its_base(config: Any, base: str) -> None:
    mapping = starting_hparams(config, "some/model", base)
    text = render_hparams(mapping, "made by a test\n\nof ours")
    assert yaml.safe_load(text) == mapping
    assert all(len(line) <= 110 for line in text.splitlines())
    hparams = SPHEREHyperParams.from_dict(mapping)
    assert (hparams.gamma, hparams.alpha) == (0.5, 0.5 if base == "AlphaEdit" else 0.8)
    assert 0 <= hparams.layers[0] <= hparams.layers[-1] < config.num_hidden_layers
    assert hparams.module_names(config) == module_names(config)
    if base != "FT":
        assert hparams.v_loss_layer == config.num_hidden_layers - 1


@pytest.mark.parametrize(("config", "layers"), [
    (LlamaConfig(num_hidden_layers=32), [4, 5, 6, 7, 8]), (LlamaConfig(num_hidden_layers=16), [2, 3, 4]),
    (GPT2Config(n_layer=48), [13, 14, 15, 16, 17]),
])
def test_starting_layers_lie_at_the_published_depth(config: Any, layers: list[int]) -> None:
    assert starting_hparams(config, "m")["layers"] == layers


def test_a_starting_file_for_an_unknown_base_or_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="base_alg is 'WISE'"):
        starting_hparams(LlamaConfig(), "m", "WISE")
    with pytest.raises(ValueError, match="'bert' is an encoder"):
        starting_hparams(BertConfig(), "m")
