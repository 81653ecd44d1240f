"""``sphere-easyedit plan``: time against a run, bytes against real tensors, the command as a user runs it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import save_tiny_model, tiny_config, tiny_hparams, tiny_model
from helpers.processes import run_forked
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.delta_forward import rows_of
from sphere_easyedit.editing.requests import parse_requests, tokenize_request
from sphere_easyedit.editing.session import EditSession
from sphere_easyedit.editing.target_values import optimise_target_values
from sphere_easyedit.methods.covariance import save_moment
from sphere_easyedit.methods.solvers import (
    CholeskyFactor,
    CovarianceMetric,
    KeyHistory,
    KeyMetric,
    NullSpace,
    NullSpaceMetric,
    adjusted_keys,
)
from sphere_easyedit.models.architecture import frozen
from sphere_easyedit.models.loading import smollm2_folder
from sphere_easyedit.planning import Plan, PlanSettings, TimePart, make_plan, times
from sphere_easyedit.planning.files import bytes_to_download, disk_items
from sphere_easyedit.planning.memory import activation_bytes, factor_bytes, state_bytes
from sphere_easyedit.planning.sizes import ModelShape, Statistics, count_tokens, model_shape
from sphere_easyedit.planning.times import solve_flops
from sphere_easyedit.runs.sequential import RunSettings, run_sequential

# As published with meta-llama/Meta-Llama-3-8B-Instruct.
LLAMA3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": 128009,
}


def shape_of(config: PretrainedConfig, hparams: sphere.SPHEREHyperParams) -> ModelShape:
    return model_shape(config, hparams.module_names(config), hparams.layers, torch.float32)


def part(plan: Plan, name: str) -> TimePart:
    return next(one for one in plan.time if one.name == name)


# --- sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "qwen3", "gemma3_text"])
def test_shape_by_config_alone(family: str, tmp_path: Path) -> None:
    model, hparams = tiny_model(family), tiny_hparams(tmp_path)
    shape, editable = shape_of(tiny_config(family), hparams), hparams.editable(model)
    assert shape.weight_bytes == sum(parameter.nbytes for parameter in model.parameters())
    assert (shape.d_out, shape.d_in) == tuple(editable.weight(1).shape)
    assert (shape.blocks, shape.hidden, shape.vocabulary) == (4, editable.hidden_size, 1500)


def test_tokens_by_characters() -> None:
    """Within a third of SmolLM2's, whose vocabulary is that of English text."""
    try:
        folder = smollm2_folder()
    except (ImportError, ValueError) as error:
        pytest.skip(str(error))
    tok, records = AutoTokenizer.from_pretrained(folder), load_records("demo", None, 40)
    contexts = ["The first thing that I want to say is. {}"]
    rows = [row for i, request in enumerate(parse_requests([record.request() for record in records]))
            for row in rows_of(i, tokenize_request(tok, request, contexts, None))]
    found = count_tokens(records, contexts)
    assert 40 * found.read == pytest.approx(sum(len(row.ids) for row in rows), rel=1 / 3)
    assert 40 * found.stepped == pytest.approx(sum(len(row.ids) - row.lookup for row in rows), rel=1 / 3)
    assert count_tokens(records, None).read > 3 * count_tokens(records, []).read


@pytest.mark.parametrize("settings", [
    {"base_alg": "AlphaEdit"},
    {"base_alg": "AlphaEdit", "nullspace_share": 0.3},
    {"base_alg": "MEMIT"},
    {"base_alg": "MEMIT", "keep_previous_keys": True},
    {"base_alg": "PRUNE"},
])
def test_bytes_of_a_session(settings: dict[str, Any], tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model, hparams = tiny_model("llama"), tiny_hparams(tmp_path, **settings, v_num_grad_steps=2)
    shape, records = shape_of(model.config, hparams), load_records("demo", None, 6)
    for start in (0, 3):
        sphere.apply_sphere_to_model(model, tok, [one.request() for one in records[start: start + 3]], hparams)
    session = EditSession.of(model)
    metrics = sum(metric.nbytes for metric in session.metrics.values() if metric is not None)
    kept = sum(history.nbytes for history in session.history.values())  # metrics included, where keys are kept
    assert state_bytes(shape, hparams, 6) == {
        "original": sum(one.nbytes for one in session.original.values()),
        "unrestrained": sum(one.nbytes for one in session.unrestrained.values()), "metrics": metrics,
        "history": kept - metrics if kept else 0, "grams": sum(gram.matrix.nbytes for gram in session.grams.values())}
    session.save(tmp_path / "session.safetensors")
    items = {item.name: item for item in disk_items(shape, hparams, 6, Statistics({}))}
    assert items["checkpoint: session"].bytes == pytest.approx((tmp_path / "session.safetensors").stat().st_size,
                                                               abs=4096)


def test_bytes_of_statistics(tmp_path: Path) -> None:
    hparams = tiny_hparams(tmp_path)
    shape = shape_of(tiny_config("llama"), hparams)
    save_moment(tmp_path / "moment.npz", torch.eye(shape.d_in), 5, 10)
    [item] = [item for item in disk_items(shape, hparams, 6, Statistics({1: tmp_path / "absent"}, missing=1))
              if item.name.startswith("statistics")]
    assert item.bytes == pytest.approx((tmp_path / "moment.npz").stat().st_size, abs=512)


@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("gpt2", {}), ("llama", {
    "contexts_per_step": 1, "target_dtype": "bfloat16",
    "context_templates": [f"{front} {{}}" for front in ("He said.", "It was.", "The team said.", "So.")]})])
def test_bytes_of_activations(family: str, changes: dict[str, Any], tok: PreTrainedTokenizerBase, tmp_path: Path
                              ) -> None:
    """Against what autograd says it keeps in one step: distinct tensors without parameters, and the logits' share."""
    wide = {"hidden_size": 96, "intermediate_size": 256} if family == "llama" else {"n_embd": 96, "n_inner": 384}
    model, hparams = tiny_model(family, **wide), tiny_hparams(tmp_path, v_num_grad_steps=2, **changes)
    editable, shape, records = hparams.editable(model), shape_of(model.config, hparams), load_records("demo", None, 8)
    requests = [tokenize_request(tok, request, hparams.context_templates or [], None)
                for request in parse_requests([record.request() for record in records])]
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in (parameters | kept.keys()):
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no other tensor takes its address
        return tensor

    with frozen(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        optimise_target_values(editable, requests, hparams)
    tokens = count_tokens(records, hparams.context_templates, hparams.contexts_per_step)
    found = activation_bytes(shape, hparams, tokens, 8)
    assert 0.6 < sum(kept.values()) / found < 1.5


@pytest.mark.parametrize("size", [1, 255, 256, 300, 1000])
def test_bytes_of_a_factor(size: int) -> None:
    assert factor_bytes(size) == CholeskyFactor.of(torch.eye(size)).nbytes


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT"])
def test_flops_of_solves(base_alg: str, tmp_path: Path) -> None:
    """Of ten batches, in products alone, as torch counts them."""
    hparams = tiny_hparams(tmp_path, base_alg=base_alg, layers=[0], nullspace_share=0.9)
    width, batch = 1024, 100
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(width, 2 * width, generator=generator)
    if base_alg == "AlphaEdit":
        columns = torch.linalg.qr(torch.randn(width, width - int(0.9 * width), generator=generator)).Q
        metric: KeyMetric = NullSpaceMetric(NullSpace(columns, complement=True), 0.1)
    else:
        metric = CovarianceMetric(CholeskyFactor.of(old @ old.T / old.shape[1] + torch.eye(width)), 20.0)
    history = KeyHistory.empty(width, metric, torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        for _ in range(10):
            keys = torch.randn(width, batch, generator=generator)
            assert adjusted_keys(history, keys) is not None
            history = history.extended(keys) if base_alg == "AlphaEdit" else history
    shape = shape_of(tiny_config("llama", intermediate_size=width), hparams)
    assert solve_flops(shape, hparams, 10 * batch) == pytest.approx(counter.get_total_flops(), rel=0.3)


def test_a_model_in_the_cache_that_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cached: dict[str, str] = {}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _repo, name: cached.get(name))
    shape = shape_of(tiny_config("llama"), tiny_hparams(tmp_path))
    assert bytes_to_download("org/model", shape) == shape.parameters * 4
    cached["config.json"] = str(tmp_path / "config.json")
    (tmp_path / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": 16_060_522_496}, "weight_map": {"a": "1.safetensors"}}))
    assert bytes_to_download("org/model", shape) == 16_060_522_496
    assert bytes_to_download(str(tmp_path), shape) == 0  # nothing can be downloaded into a folder
    (tmp_path / "1.safetensors").touch()
    assert bytes_to_download("org/model", shape) is None
    (tmp_path / "model.safetensors.index.json").unlink()
    assert bytes_to_download(str(tmp_path), shape) == 0
    (tmp_path / "model.safetensors").touch()
    assert bytes_to_download(str(tmp_path), shape) is None


# --- plans --------------------------------------------------------------------------------------------------


def config_folder(folder: Path, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def plan_of(model: Path, base: str = "AlphaEdit/llama3-8b", changes: dict[str, Any] | None = None, **settings: Any
            ) -> Plan:
    hparams = sphere.SPHEREHyperParams.from_dict(
        {**sphere.SPHEREHyperParams.from_hparams(base).to_dict(), "model_name": str(model), "device": "cpu",
         "stats_dir": str(model / "stats"), **(changes or {})})
    return make_plan(hparams, PlanSettings(**{"num_edits": 2000, **settings}))


@pytest.mark.parametrize(("config", "changes", "complaint"), [
    ({"hidden_size": 0}, {}, "hidden_size|no model can be built from this LlamaConfig|hidden size"),
    ({"num_hidden_layers": -1}, {}, "layers"),
    ({}, {"rewrite_module_tmp": "model.layers.{}.mlp"}, "model.layers.4.mlp has no weight matrix with a side of 4096"),
    ({}, {"rewrite_module_tmp": "model.layers.{}.input_layernorm"}, "no weight matrix with a side of 4096"),
])
def test_sizes_that_do_not_fit_are_refused_in_a_line(config: dict[str, Any], changes: dict[str, Any], complaint: str,
                                                     tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "model", {**LLAMA3_8B, **config})
    with pytest.raises(ValueError, match=complaint) as caught:
        plan_of(folder, changes=changes)
    assert "\n" not in str(caught.value)


def test_llama3_8b_without_weights(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "Meta-Llama-3-8B-Instruct", LLAMA3_8B)
    plan = plan_of(folder, gflops=100_000.0)
    memory = {item.name: item.bytes for item in plan.memory}
    assert memory["weights"] == pytest.approx(8_030_261_248 * 2, rel=1e-6)
    assert memory["original weights"] == 5 * 4096 * 14336 * 2
    # 25 steps of some 50 tokens an edit, 2 FLOPs for each of 5e9 parameters (23 of 32 blocks), forward and backward.
    assert part(plan, "target values").seconds == pytest.approx(2000 * 25 * 50 * 2 * 5e9 * 2 / 1e14, rel=0.5)
    assert plan.seconds == pytest.approx(sum(one.seconds or 0.0 for one in plan.time))
    assert sum(one.share or 0.0 for one in plan.time) == pytest.approx(1.0)
    disk = {item.name: item for item in plan.disk}
    assert disk["statistics of 5 layers"].bytes == pytest.approx(5 * 14336**2 * 4, rel=1e-4)
    assert not disk["statistics of 5 layers"].present
    assert [download.name for download in plan.downloads] == ["wikipedia"]  # a folder can't be downloaded into
    assert "not on this machine" in plan.method
    assert "characters" in plan.method
    unknown = plan_of(folder, num_edits=3)
    assert unknown.seconds is None
    assert all((one.seconds, one.share) == (None, None) for one in unknown.time)
    assert "--gflops" in unknown.method


def test_memory_above_the_devices_share_is_the_hosts(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "model", LLAMA3_8B)
    whole, split = (sorted((item.name, item.bytes) for item in plan_of(folder, changes=changes).memory if "key" in
                           item.name) for changes in ({}, {"state_memory": 0.1}))
    assert sum(size for _, size in whole) == sum(size for _, size in split)
    items = [item for item in plan_of(folder, changes={"state_memory": 0.1}).memory if "state_memory" in item.note]
    assert {item.place for item in items} == {"host"}


def test_needs_grow_with_edits_and_fall_with_statistics(tmp_path: Path) -> None:
    hparams = tiny_hparams(tmp_path, model_name=str(tmp_path / "tiny"), device="cpu")
    tiny_config("llama").save_pretrained(tmp_path / "tiny")

    def seconds(plan: Plan, name: str) -> float:
        return part(plan, name).seconds or 0.0

    few, many = (make_plan(hparams, PlanSettings(edits, 5, gflops=1.0)) for edits in (10, 2000))
    assert seconds(many, "target values") == pytest.approx(200 * seconds(few, "target values"), rel=0.3)
    assert seconds(many, "statistics") == seconds(few, "statistics") > 0
    assert many.peak_bytes["host"] > few.peak_bytes["host"]
    for layer in hparams.layers:
        save_moment(tmp_path / "stats/tiny/generated-seed0-t32_stats" /
                    f"model.layers.{layer}.mlp.down_proj_float32_mom2_12.npz", torch.eye(80), 5, 12)
    there = make_plan(hparams, PlanSettings(10, 5, gflops=1.0))
    assert part(there, "statistics").seconds == 0.0


def test_a_wrapped_executor_is_not_counted(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path / "tiny")
    hparams = sphere.SPHEREHyperParams.from_dict(
        {"model_name": str(tmp_path / "tiny"), "layers": [1], "base_alg": "FT", "executor": "easyedit", "lr": 1e-3,
         "device": "cpu"})
    plan = make_plan(hparams, PlanSettings(5, gflops=1.0))
    assert part(plan, "target values").seconds == 0.0
    assert part(plan, "evaluation before").seconds
    assert any("EasyEdit's own FT" in note for note in plan.notes)


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_edits": 0}, "num_edits"), ({"batch_size": 0}, "batch_size"), ({"gflops": 0.0}, "gflops"),
    ({"gflops": float("nan")}, "gflops")])
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PlanSettings(3), **changes)


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer and a hyperparameter file."""
    folder = tmp_path_factory.mktemp("plan")
    save_tiny_model(folder / "tiny-llama", "llama")
    settings = tiny_hparams(folder, model_name="tiny-llama", context_templates=None).to_dict() | {"stats_dir": "stats"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.mark.parametrize("base_alg", ["AlphaEdit"])  # another takes half a minute and says the same
def test_prediction_is_what_a_run_takes(base_alg: str, workplace: Path, tmp_path: Path, tok: PreTrainedTokenizerBase,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts FLOPs, as torch does, in place of seconds: no other process can make it go wrong."""
    hparams = tiny_hparams(tmp_path, model_name=str(workplace / "tiny-llama"), base_alg=base_alg, device="cpu",
                           v_lr=1e-6, v_num_grad_steps=6, context_templates=None)
    with FlopCounterMode(display=False) as counter:
        ticks = itertools.count()  # what torch does not count, such as eigenvectors, takes next to nothing
        clock = SimpleNamespace(perf_counter=lambda: counter.get_total_flops() / 1e9 + next(ticks) * 1e-9)
        monkeypatch.setattr(times, "time", clock)
        plan = make_plan(hparams, PlanSettings(6, 3))
    model = AutoModelForCausalLM.from_pretrained(workplace / "tiny-llama")
    with FlopCounterMode(display=False) as counter:
        run_sequential(model, tok, load_records("demo", None, 6), hparams, RunSettings(tmp_path / "run", 3, 3))
    assert plan.seconds == pytest.approx(counter.get_total_flops() / 1e9, rel=0.25)


def test_json_of_a_calibrated_plan(workplace: Path) -> None:
    done = run_forked("plan", "--hparams", "tiny.yaml", "--num-edits", "40", "--batch-size", "10", "--json",
                      cwd=workplace)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert "calibration" in plan["method"]
    assert plan["seconds"] == pytest.approx(sum(one["seconds"] for one in plan["time"]))
    assert all(one["seconds"] > 0 for one in plan["time"])
    assert [one["name"] for one in plan["time"]] == [
        "statistics", "preparation", "target values", "keys and solve", "projection and energy", "evaluation before",
        "evaluation after"]
    assert plan["downloads"] == []
    assert set(plan["peak_bytes"]) <= {"device", "host"}
    assert not (workplace / "stats").exists()  # nothing has started


def test_table_without_calibration(workplace: Path) -> None:
    done = run_forked("plan", "--hparams", "tiny.yaml", "--num-edits", "5", "--no-calibrate", "--gflops", "2", "--set",
                      "base_alg=MEMIT", "--set", "projection_stage=update", cwd=workplace)
    assert done.returncode == 0, done.stderr
    for word in ("target values", "keys and solve", "weights", "factor of C", "at the peak", "checkpoint",
                 "2 GFLOP/s as stated", "nothing"):
        assert word in done.stdout


@pytest.mark.parametrize(("arguments", "message"), [
    (["--num-edits", "0"], "num_edits"),
    (["--num-edits", "3", "--hparams", "AlphaEdit/smollm2-135n"], "AlphaEdit/smollm2-135m"),
    (["--num-edits", "3", "--set", "model_name=no/such-model"], "no/such-model"),
    (["--num-edits", "3", "--dtype", "fp16"], "bfloat16"),
    (["--num-edits", "3", "--set", "layers=[3, 9]", "--set", "v_loss_layer=9"], "4 layers"),
    (["--num-edits", "3", "--dataset", "counterfact"], "counterfact"),
])
def test_a_mistake_ends_in_one_clear_line(workplace: Path, arguments: list[str], message: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPHERE_DATA", raising=False)  # where counterfact would be found
    done = run_forked("plan", "--hparams", "tiny.yaml", *arguments, cwd=workplace)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_llama3_8b_by_its_config(tmp_path: Path) -> None:
    AutoConfig.for_model(**LLAMA3_8B).save_pretrained(tmp_path / "llama3")
    done = run_forked("plan", "--hparams", "AlphaEdit/llama3-8b", "--num-edits", "2000", "--set", "model_name=llama3",
                      "--gflops", "200000", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["seconds"] > 0
    assert plan["peak_bytes"]["host"] > 16e9
