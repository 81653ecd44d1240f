"""``sphere-easyedit plan``: counts against counted runs, bytes against real tensors, the command as a user runs it."""

from __future__ import annotations

import itertools
import json
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import yaml
from conftest import GOLDEN, tiny_config, tiny_hparams, tiny_model
from packaging.version import Version
from processes import run_forked
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

import sphere_easyedit as sphere
from sphere_easyedit.editing import steering, target_values
from sphere_easyedit.editing.covariance import save_moment
from sphere_easyedit.editing.keys import BatchStates
from sphere_easyedit.editing.replay import common_beginnings
from sphere_easyedit.editing.requests import TokenizedRequest
from sphere_easyedit.editing.session import EditSession
from sphere_easyedit.editing.solvers import (
    CholeskyFactor,
    CovarianceMetric,
    KeyHistory,
    KeyMetric,
    NullSpace,
    NullSpaceMetric,
    adjusted_keys,
)
from sphere_easyedit.editing.steering import Layout, layout_of
from sphere_easyedit.editing.target_values import optimise_target_values
from sphere_easyedit.evaluation.datasets import load_records
from sphere_easyedit.evaluation.metrics import evaluate_records
from sphere_easyedit.evaluation.sequential import RunSettings, run_sequential
from sphere_easyedit.logit_map import LogitMap
from sphere_easyedit.models import EditableModel, frozen
from sphere_easyedit.planning import Plan, PlanSettings, TimePart, calibration, make_plan, sizes
from sphere_easyedit.planning.batches import expected_layout, micro_batches, total_tokens
from sphere_easyedit.planning.calibration import Steps, step_price
from sphere_easyedit.planning.counts import evaluation_flops, key_flops, solve_flops, target_value_flops
from sphere_easyedit.planning.facts import STAND_IN_CONTEXTS, facts_in_tokens
from sphere_easyedit.planning.files import disk_items
from sphere_easyedit.planning.inventory import Statistics, find_weights
from sphere_easyedit.planning.shapes import ModelShape, model_shape
from sphere_easyedit.planning.sizes import (
    activation_bytes,
    factor_bytes,
    front_bytes,
    gram_bytes,
    history_bytes,
    logit_bytes,
    metric_bytes,
    moment_bytes,
    original_weight_bytes,
    saved_bytes,
)
from sphere_easyedit.planning.times import time_parts

HAS_INTERFACE = Version(transformers.__version__) >= Version("4.48")

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


CONTEXTS = ["He said that. {}", "And. {}"]


def tokenized(tok: PreTrainedTokenizerBase, edits: int, contexts: Sequence[str] = CONTEXTS) -> list[TokenizedRequest]:
    return facts_in_tokens(load_records("demo", None, edits), tok, contexts, None).requests


def all_steps(tmp_path: Path, **changes: Any) -> sphere.SPHEREHyperParams:
    """Settings with which no edit is finished before the last step."""
    return tiny_hparams(tmp_path, **{"v_num_grad_steps": 5, "v_lr": 1e-6, **changes})


def lay_out(monkeypatch: pytest.MonkeyPatch, layout: Layout) -> None:
    """Make the optimiser lay out its rows in this way, without checking anything."""
    if layout == "packed" and not HAS_INTERFACE:
        pytest.skip(f"transformers {transformers.__version__} has no attention functions to choose from")
    monkeypatch.setattr(steering, "packing_is_exact", lambda *_: layout == "packed")
    monkeypatch.setattr(steering, "prefix_is_exact", lambda *_: layout == "padded")
    monkeypatch.setattr(target_values, "find_logit_map", lambda *_: LogitMap())


def counted(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def tokens_by_block(editable: EditableModel, work: Callable[[], object]) -> list[int]:
    """Tokens, padding included, that each block was run on."""
    found = [0] * editable.num_blocks

    def count(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            found[layer] += states.shape[:-1].numel()

        return hook

    handles = [editable.block(layer).register_forward_pre_hook(count(layer), with_kwargs=True)
               for layer in range(editable.num_blocks)]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize(("family", "layout"), [
    ("llama", "packed"), ("gpt2", "packed"), ("llama", "padded"), ("gptj", "padded"), ("gptj", "whole")])
@pytest.mark.parametrize("v_loss_layer", [2, 3])
@pytest.mark.parametrize("token_budget", [150, 4096])
def test_tokens_of_target_values(family: str, layout: Layout, v_loss_layer: int, token_budget: int,
                                 tok: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                                 ) -> None:
    """Every token that every block is run on is counted, none else."""
    hparams = all_steps(tmp_path, v_loss_layer=v_loss_layer, token_budget=token_budget, layers=[0, 1])
    requests, editable = tokenized(tok, 9), hparams.editable(tiny_model(family))
    lay_out(monkeypatch, layout)
    with frozen(editable.model):
        found = tokens_by_block(editable, lambda: optimise_target_values(editable, requests, hparams))
    groups = micro_batches(requests, token_budget, layout)
    assert sum(group.edits for group in groups) == 9
    recorded = sum(total_tokens(group.recorded) for group in groups)
    stepped = sum(total_tokens(group.stepped) for group in groups)
    to_end = sum(total_tokens(group.to_end) for group in groups)
    assert found == [recorded, recorded, recorded + 5 * stepped,
                     recorded + 5 * (stepped if v_loss_layer == 3 else to_end)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gptj"])
@pytest.mark.parametrize("edits", [1, 6])
def test_flops_of_target_values(family: str, edits: int, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model, hparams = tiny_model(family), all_steps(tmp_path)
    editable, shape, requests = hparams.editable(model), shape_of(model.config, hparams), tokenized(tok, edits)
    with frozen(model):
        layout = layout_of(editable, requests)
        found = counted(lambda: optimise_target_values(editable, requests, hparams))
    once, step = target_value_flops(shape, requests, hparams, layout)
    assert once + (2 * 5 - 1) * step == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize(("family", "layout"), [("llama", "packed"), ("gemma3_text", "packed"), ("gptj", "padded")])
def test_layout_is_the_optimisers(family: str, layout: Layout, tok: PreTrainedTokenizerBase, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    model, hparams = tiny_model(family), tiny_hparams(tmp_path)
    editable, requests = hparams.editable(model), tokenized(tok, 3)
    layout = layout if HAS_INTERFACE else "padded"
    assert expected_layout(shape_of(model.config, hparams)) == layout
    with frozen(model):
        assert layout_of(editable, requests) == layout
        if layout == "padded":
            monkeypatch.setattr(type(model), "forward", _without_cache(type(model).forward))
            assert layout_of(editable, requests) == "whole"


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT"])
def test_flops_of_a_solve(base_alg: str, tmp_path: Path) -> None:
    """Products alone are counted, as torch does; triangles on a factor's diagonal are a small rest."""
    hparams = tiny_hparams(tmp_path, base_alg=base_alg, layers=[0], nullspace_share=0.9)
    width, earlier, batch = 2048, 2000, 200
    config = tiny_config("llama", intermediate_size=width)
    generator = torch.Generator().manual_seed(0)
    old, keys = (torch.randn(width, count, generator=generator) for count in (earlier, batch))
    if base_alg == "AlphaEdit":
        columns = torch.linalg.qr(torch.randn(width, width - int(0.9 * width), generator=generator)).Q
        metric: KeyMetric = NullSpaceMetric(NullSpace(columns, complement=True), 0.1)
    else:
        factor = CholeskyFactor.of(old @ old.T / earlier + torch.eye(width))
        metric, earlier = CovarianceMetric(factor, 20.0), 0
    history = KeyHistory(old[:, :earlier], metric)

    def solve() -> None:
        assert adjusted_keys(history, keys) is not None
        if base_alg == "AlphaEdit":
            history.extended(keys)

    shape = shape_of(config, hparams)
    planned = solve_flops(shape, hparams, earlier + batch, batch) - solve_flops(shape, hparams, earlier, batch)
    assert 0.8 * planned < counted(solve) < 1.2 * planned


def _without_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    def refusing(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("past_key_values") is not None:
            raise TypeError("no cache here")
        return forward(self, *args, **kwargs)

    return refusing


@pytest.mark.parametrize("base_alg", ["AlphaEdit", "MEMIT"])
def test_flops_of_keys_and_evaluation(base_alg: str, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model, hparams = tiny_model("llama"), tiny_hparams(tmp_path, base_alg=base_alg, layers=[0, 2])
    editable, shape = hparams.editable(model), shape_of(model.config, hparams)
    records = load_records("demo", None, 4)
    facts = facts_in_tokens(records, tok, hparams.context_templates or [], None)

    def read() -> None:
        states = BatchStates(editable, facts.requests, hparams.token_budget)
        states.read(0)
        states.advance(0, to=2)
        states.read(2)
        if base_alg == "AlphaEdit":
            states.read_all()

    assert key_flops(shape, facts.requests, hparams) == pytest.approx(counted(read), rel=0.2)
    scored = counted(lambda: evaluate_records(model, tok, records))
    pairs = [pair for group in facts.scored for pair in group]
    # It runs what prompts have in common once, and some of them twice to check its packing.
    assert 0.7 * scored < evaluation_flops(shape, pairs) < 2 * scored


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "qwen3", "gemma3_text"])
def test_shape_by_config_alone(family: str, tmp_path: Path) -> None:
    model, hparams = tiny_model(family), tiny_hparams(tmp_path)
    shape, editable = shape_of(tiny_config(family), hparams), hparams.editable(model)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    assert shape.weight_bytes == sum(tensor.nbytes for tensor in tensors)
    assert (shape.d_out, shape.d_in) == tuple(editable.weight(1).shape)
    assert (shape.blocks, shape.hidden, shape.vocabulary) == (4, editable.hidden_size, 1500)


@pytest.mark.parametrize("settings", [
    {"base_alg": "AlphaEdit"},
    {"base_alg": "AlphaEdit", "nullspace_share": 0.3},
    {"base_alg": "MEMIT"},
    {"base_alg": "MEMIT", "keep_previous_keys": True},
    {"base_alg": "PRUNE"},
])
def test_bytes_of_a_session(settings: dict[str, Any], tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model, hparams = tiny_model("llama"), tiny_hparams(tmp_path, **settings, v_num_grad_steps=2)
    shape = shape_of(model.config, hparams)
    records = load_records("demo", None, 6)
    for start in (0, 3):
        sphere.apply_sphere_to_model(model, tok, [one.request() for one in records[start: start + 3]], hparams)
    session = EditSession.of(model)
    assert original_weight_bytes(shape, hparams) == sum(one.nbytes for one in session.original.values())
    metrics = [metric for metric in session.metrics.values() if metric is not None]
    assert metric_bytes(shape, hparams) == sum(metric.nbytes for metric in metrics)
    with_metrics = sum(history.nbytes for history in session.history.values())  # without any where none is kept
    kept = with_metrics - sum(metric.nbytes for metric in metrics) if with_metrics else 0
    assert history_bytes(shape, hparams, 6) == kept
    assert gram_bytes(shape, hparams) == sum(gram.matrix.nbytes for gram in session.grams.values())
    # What a run writes of it.
    session.save(tmp_path / "session.safetensors")
    items = {item.name: item for item in disk_items(shape, hparams, PlanSettings(6, 3), Statistics({}), "")}
    assert items["checkpoint: session"].bytes == pytest.approx((tmp_path / "session.safetensors").stat().st_size,
                                                               abs=4096)


def test_bytes_of_statistics(tmp_path: Path) -> None:
    hparams = tiny_hparams(tmp_path)
    shape = shape_of(tiny_config("llama"), hparams)
    save_moment(tmp_path / "moment.npz", torch.eye(shape.d_in), 5, 10)
    assert moment_bytes(shape, hparams) == pytest.approx((tmp_path / "moment.npz").stat().st_size, abs=512)


@pytest.mark.parametrize(("family", "layout"), [("llama", "packed"), ("gpt2", "packed"), ("llama", "padded")])
def test_bytes_of_activations(family: str, layout: Layout, tok: PreTrainedTokenizerBase, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what autograd says it keeps in one step: distinct tensors, without parameters and logits."""
    wide = {"hidden_size": 96, "intermediate_size": 256} if family == "llama" else {"n_embd": 96, "n_inner": 384}
    model, hparams = tiny_model(family, **wide), tiny_hparams(tmp_path, v_num_grad_steps=2)
    editable, shape = hparams.editable(model), shape_of(model.config, hparams)
    requests = tokenized(tok, 8)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in (parameters | kept.keys()) and tensor.shape[-1:] != (1500,):
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no other tensor takes its address
        return tensor

    lay_out(monkeypatch, layout)
    with frozen(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        optimise_target_values(editable, requests, hparams)
    group, = micro_batches(requests, hparams.token_budget, layout)
    # Packed, autograd refers to what is in front of rows; padded, to what it was joined with.
    saved = saved_bytes(shape, hparams, group) + (front_bytes(shape, hparams, group) if layout == "packed" else 0)
    assert saved == pytest.approx(sum(kept.values()), rel=0.1)
    assert activation_bytes(shape, hparams, group) > saved


@pytest.mark.parametrize("at_once", [1, 7, 10_000])
def test_bytes_of_logits(at_once: int, tok: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
                         ) -> None:
    """Never more states at the head than counted, but for the drift prompts' before all steps."""
    for module in (target_values, sizes):
        monkeypatch.setattr(module, "LOGITS_AT_ONCE", at_once * 1500)
    model, hparams = tiny_model("llama"), tiny_hparams(tmp_path, v_num_grad_steps=2)
    editable, shape, requests = hparams.editable(model), shape_of(model.config, hparams), tokenized(tok, 5)
    seen: list[int] = []
    lay_out(monkeypatch, "packed")
    handle = editable.lm_head.register_forward_pre_hook(lambda _module, args: seen.append(len(args[0])))
    with frozen(model):
        optimise_target_values(editable, requests, hparams)
    handle.remove()
    group, = micro_batches(requests, hparams.token_budget, "packed")
    assert seen[0] == group.edits == 5
    assert sum(seen[1:]) == 2 * (group.positions + group.edits)
    assert logit_bytes(shape, group) == 1500 * 4 * (4 * max(seen[1:]) + group.edits)


@pytest.mark.parametrize("size", [1, 255, 256, 300, 1000])
def test_bytes_of_a_factor(size: int) -> None:
    from sphere_easyedit.editing.solvers import CholeskyFactor

    assert factor_bytes(size) == CholeskyFactor.of(torch.eye(size)).nbytes


def test_without_a_tokenizer_only_contexts_are_shared() -> None:
    requests = facts_in_tokens(load_records("demo", None, 4), None, STAND_IN_CONTEXTS, None).requests
    plain = common_beginnings([request.plain.ids for request in requests], [0] * 4)
    assert plain == [()] * 4
    first = common_beginnings([request.contexts[0].ids for request in requests], [1] * 4)
    assert [len(stem) for stem in first] == [10] * 4  # "The first thing that I want to say is. ": 39 characters
    assert all(0 <= prompt.lookup < len(prompt.ids) for request in requests
               for prompt in (request.plain, request.drift, *request.contexts))


def config_folder(folder: Path, settings: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def plan_of(model: Path, base: str = "AlphaEdit/llama3-8b", **settings: Any) -> Plan:
    hparams = sphere.SPHEREHyperParams.from_dict(
        {**sphere.SPHEREHyperParams.from_hparams(base).to_dict(), "model_name": str(model), "device": "cpu",
         "stats_dir": str(model / "stats")})
    return make_plan(hparams, PlanSettings(**{"num_edits": 2000, **settings}))


@pytest.mark.parametrize(("config", "settings", "complaint"), [
    ({"hidden_size": 0}, {}, "hidden_size 0|no model can be built from this LlamaConfig"),
    ({"num_hidden_layers": -1}, {}, "layers"),
    ({}, {"rewrite_module_tmp": "model.layers.{}.mlp"}, "model.layers.4.mlp has no weight matrix with a side of 4096"),
    ({}, {"rewrite_module_tmp": "model.layers.{}.input_layernorm"}, "no weight matrix with a side of 4096"),
])
def test_sizes_that_do_not_fit_are_refused_in_a_line(config: dict[str, Any], settings: dict[str, Any], complaint: str,
                                                     tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "model", {**LLAMA3_8B, **config})
    hparams = sphere.SPHEREHyperParams.from_dict(
        {**sphere.SPHEREHyperParams.from_hparams("AlphaEdit/llama3-8b").to_dict(), "model_name": str(folder),
         "device": "cpu", "stats_dir": str(folder / "stats"), **settings})
    with pytest.raises(ValueError, match=complaint) as caught:
        make_plan(hparams, PlanSettings(10))
    assert "\n" not in str(caught.value)


def test_llama3_8b_without_weights(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "Meta-Llama-3-8B-Instruct", LLAMA3_8B)
    plan = plan_of(folder, gflops=100_000.0)
    memory = {item.name: item.bytes for item in plan.memory}
    assert memory["weights"] == pytest.approx(8_030_261_248 * 2, rel=1e-6)
    assert memory["original weights"] == 5 * 4096 * 14336 * 2
    # 25 steps of some 50 tokens an edit, 2 FLOPs for each of 5e9 parameters (23 of 32 blocks), forward and backward.
    assert part(plan, "target values").flops / 2000 == pytest.approx(25 * 50 * 2 * 5e9 * 2, rel=0.5)
    assert plan.seconds == pytest.approx(sum(one.flops for one in plan.time) / 1e14)
    assert sum(one.share or 0.0 for one in plan.time) == pytest.approx(1.0)
    disk = {item.name: item for item in plan.disk}
    assert disk["statistics of 5 layers"].bytes == pytest.approx(5 * 14336**2 * 4, rel=1e-4)
    assert not disk["statistics of 5 layers"].present
    assert [download.name for download in plan.downloads] == ["wikipedia"]  # a folder can't be downloaded into
    assert "not on this machine" in plan.method
    assert any("characters" in note for note in plan.notes)


def test_without_a_rate_there_is_no_time(tmp_path: Path) -> None:
    plan = plan_of(config_folder(tmp_path / "llama", LLAMA3_8B), "MEMIT/llama3-8b", num_edits=3)
    assert plan.seconds is None
    assert all(one.share is None and (one.seconds is None) == (one.flops > 0) for one in plan.time)
    assert "--gflops" in plan.method


def test_rates_by_kind_stand_before_the_one_rate(tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "llama", LLAMA3_8B)
    plan = plan_of(folder, gflops=100.0, rates={"solve": 5.0, "keys": 20.0})
    keys_and_solve, targets = part(plan, "keys and solve"), part(plan, "target values")
    assert targets.seconds == pytest.approx(targets.flops / 1e11)
    alike = part(plan_of(folder, gflops=1.0, rates={"keys": 1e30}), "keys and solve")  # the solve alone counts
    solving = float(alike.seconds or 0.0) * 1e9
    assert 0 < solving < keys_and_solve.flops
    assert keys_and_solve.seconds == pytest.approx(solving / 5e9 + (keys_and_solve.flops - solving) / 20e9)
    assert "solve at 5" in plan.method
    with pytest.raises(ValueError, match="there is no work of the kind solves: give rates of contexts"):
        plan_of(folder, rates={"solves": 1.0})
    with pytest.raises(ValueError, match="the rate of solve is -1.0"):
        PlanSettings(1, rates={"solve": -1.0})


@pytest.mark.parametrize("processes", [2, 8])
def test_processes_share_out_what_edits_do_for_themselves(processes: int, tmp_path: Path) -> None:
    folder = config_folder(tmp_path / "llama", LLAMA3_8B)
    alone, shared = (plan_of(folder, gflops=1.0, num_edits=200, processes=number) for number in (1, processes))
    flops = {name: part(shared, name).flops / part(alone, name).flops for name in (one.name for one in alone.time)}
    for name in ("target values", "evaluation before", "evaluation after"):
        # Each checks its layout by itself, and a share's steps are not quite in proportion to its tokens.
        assert 0.99 / processes < flops[name] < 1.25 / processes, name
    assert flops["statistics"] == pytest.approx(1 / processes, rel=1e-3)
    assert flops["projection and energy"] == flops["preparation"] == 1.0
    assert 1 / processes < flops["keys and solve"] < 1.0
    memory = {item.name: (item.bytes, other.bytes) for item, other in zip(alone.memory, shared.memory, strict=True)
              if item.name != "Python and libraries"}
    assert memory.pop("target values, one micro-batch")[1] <= max(one.bytes for one in alone.memory)
    assert all(one == other for one, other in memory.values())
    assert any(f"{processes} processes" in note for note in shared.notes)


def test_more_processes_than_edits(tmp_path: Path) -> None:
    plan = plan_of(config_folder(tmp_path / "llama", LLAMA3_8B), gflops=1.0, num_edits=3, batch_size=2, processes=8)
    single = plan_of(tmp_path / "llama", gflops=1.0, num_edits=2, batch_size=1)  # of two batches with an edit each
    assert part(plan, "target values").flops == pytest.approx(part(single, "target values").flops, rel=0.2)
    with pytest.raises(ValueError, match="processes is 0"):
        PlanSettings(1, processes=0)


def test_a_model_in_the_cache_that_is_not_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 16_060_522_496}, "weight_map": {"a": "1.safetensors"}}))
    cached = {"model.safetensors.index.json": str(index)}
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda _repo, name: cached.get(name))
    shape = shape_of(tiny_config("llama"), tiny_hparams(tmp_path))
    assert find_weights("org/model", shape) == (False, 16_060_522_496)
    cached["1.safetensors"] = "there"
    assert find_weights("org/model", shape) == (True, None)
    cached.clear()
    assert find_weights("org/model", shape) == (False, shape.parameters * 4)


def test_counts_grow_with_edits_and_fall_with_statistics(tmp_path: Path) -> None:
    hparams = tiny_hparams(tmp_path, model_name=str(tmp_path / "tiny"), device="cpu")
    tiny_config("llama").save_pretrained(tmp_path / "tiny")
    few = make_plan(hparams, PlanSettings(10, 5, gflops=1.0))
    many = make_plan(hparams, PlanSettings(2000, 5, gflops=1.0))
    assert part(many, "target values").flops == pytest.approx(200 * part(few, "target values").flops, rel=0.3)
    assert part(many, "statistics").flops == part(few, "statistics").flops > 0
    assert many.peak_bytes["host"] > few.peak_bytes["host"]
    for layer in hparams.layers:
        save_moment(tmp_path / "stats/tiny/generated-seed0-t128_stats" /
                    f"model.layers.{layer}.mlp.down_proj_float32_mom2_12.npz", torch.eye(80), 5, 12)
    there = make_plan(hparams, PlanSettings(10, 5, gflops=1.0))
    assert part(there, "statistics").flops == 0
    assert part(there, "statistics").seconds == 0.0


def test_a_wrapped_executor_is_not_counted(tmp_path: Path) -> None:
    tiny_config("llama").save_pretrained(tmp_path / "tiny")
    hparams = sphere.SPHEREHyperParams.from_dict(
        {"model_name": str(tmp_path / "tiny"), "layers": [1], "base_alg": "FT", "executor": "easyedit", "lr": 1e-3,
         "device": "cpu"})
    plan = make_plan(hparams, PlanSettings(5, gflops=1.0))
    assert part(plan, "target values").flops == 0
    assert part(plan, "evaluation before").flops > 0
    assert any("EasyEdit's own FT" in note for note in plan.notes)


def test_times_are_work_over_rates() -> None:
    work = dict.fromkeys(("text", "moments", "contexts", "metrics", "once", "steps", "keys", "solve", "projection",
                          "energy", "scores", "continuations"), 2e9)
    rates = dict.fromkeys(work, 1e9) | {"steps": 2e9}
    del rates["moments"]  # that of scoring serves
    parts = {one.name: one.seconds for one in time_parts(work, rates, None)}
    assert parts["target values"] == 2.0 + 1.0
    assert parts["statistics"] == parts["evaluation before"] == parts["evaluation after"] == 4.0
    del rates["keys"]
    assert {one.name: one.seconds for one in time_parts(work, rates, None)}["keys and solve"] is None
    assert {one.name: one.seconds for one in time_parts(work, rates, 4.0)}["keys and solve"] == 2.5


def test_price_of_a_step() -> None:
    """A step of 0.3 s, whatever is in it, and 1 s for 1e9 FLOPs."""
    alone, several = Steps(1e8, 0.0, 10, 1), Steps(1e9, 0.0, 100, 2)
    assert step_price(alone, 0.4, several, 1.6) == pytest.approx(0.3)
    assert step_price(alone, 0.1, several, 1.0) == 0.0
    assert step_price(alone, 0.1, several, 1.2) == 0.0  # other processes slowed the second
    assert step_price(alone, 5.0, several, 1.6) == pytest.approx(0.72)  # or the first
    assert step_price(alone, 0.9, alone, 0.9) == pytest.approx(0.8)  # 80 of 90 tokens


@pytest.mark.parametrize(("changes", "message"), [
    ({"num_edits": 0}, "num_edits"), ({"batch_size": 0}, "batch_size"), ({"gflops": 0.0}, "gflops"),
    ({"gflops": float("nan")}, "gflops")])
def test_settings_that_make_no_sense(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(tiny_hparams(tmp_path), replace(PlanSettings(3), **changes))


# --- the command --------------------------------------------------------------------------------------------


def run_plan(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return run_forked("plan", *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer and a hyperparameter file."""
    folder = tmp_path_factory.mktemp("plan")
    tiny_model("llama").save_pretrained(folder / "tiny-llama")
    for file in (GOLDEN / "llama" / "tiny-llama").glob("tokenizer*"):
        (folder / "tiny-llama" / file.name).write_bytes(file.read_bytes())
    settings = tiny_hparams(folder, model_name="tiny-llama", context_templates=None).to_dict() | {"stats_dir": "stats"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_json_of_a_calibrated_plan(workplace: Path) -> None:
    done = run_plan("--hparams", "tiny.yaml", "--num-edits", "40", "--batch-size", "10", "--json", cwd=workplace)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert "calibration" in plan["method"]
    assert plan["seconds"] == pytest.approx(sum(one["seconds"] for one in plan["time"]))
    assert all(one["seconds"] > 0 for one in plan["time"])
    names = [one["name"] for one in plan["time"]]
    assert names == ["statistics", "preparation", "target values", "keys and solve", "projection and energy",
                     "evaluation before", "evaluation after"]
    assert plan["downloads"] == []
    assert set(plan["peak_bytes"]) <= {"device", "host"}
    assert not (workplace / "stats").exists()  # nothing has started


@pytest.mark.parametrize("base_alg", ["AlphaEdit"])  # another takes half a minute and says the same
def test_prediction_is_what_a_run_takes(base_alg: str, workplace: Path, tmp_path: Path, tok: PreTrainedTokenizerBase,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that counts FLOPs, as torch does, in place of seconds: no other process can make it go wrong."""
    hparams = tiny_hparams(tmp_path, model_name=str(workplace / "tiny-llama"), base_alg=base_alg, device="cpu",
                           v_lr=1e-6, context_templates=None)
    with FlopCounterMode(display=False) as counter:
        ticks = itertools.count()  # what torch does not count, such as eigenvectors, takes next to nothing
        clock = SimpleNamespace(perf_counter=lambda: counter.get_total_flops() / 1e9 + next(ticks) * 1e-9)
        monkeypatch.setattr(calibration, "time", clock)
        plan = make_plan(hparams, PlanSettings(12, 6))
    model = AutoModelForCausalLM.from_pretrained(workplace / "tiny-llama")
    records = load_records("demo", None, 12)
    found = counted(lambda: run_sequential(model, tok, records, hparams, RunSettings(tmp_path / "run", 6, 3)))
    assert plan.seconds == pytest.approx(found / 1e9, rel=0.15)


def test_table_without_calibration(workplace: Path) -> None:
    done = run_plan("--hparams", "tiny.yaml", "--num-edits", "5", "--no-calibrate", "--gflops", "2", "--set",
                    "base_alg=MEMIT", "--set", "projection_stage=update", "--rate", "solve=0.5", "--processes", "2",
                    cwd=workplace)
    assert done.returncode == 0, done.stderr
    for word in ("target values", "keys and solve", "weights", "factor of C", "at the peak", "checkpoint", "FLOP",
                 "2, solve at 0.5 GFLOP/s as stated", "2 processes", "nothing"):
        assert word in done.stdout


@pytest.mark.parametrize(("arguments", "message"), [
    (["--num-edits", "0"], "num_edits"),
    (["--num-edits", "3", "--hparams", "AlphaEdit/smollm2-135n"], "AlphaEdit/smollm2-135m"),
    (["--num-edits", "3", "--set", "model_name=no/such-model"], "no/such-model"),
    (["--num-edits", "3", "--dtype", "fp16"], "bfloat16"),
    (["--num-edits", "3", "--set", "layers=[3, 9]", "--set", "v_loss_layer=9"], "4 layers"),
    (["--num-edits", "3", "--dataset", "counterfact"], "counterfact"),
    (["--num-edits", "3", "--rate", "solve:3"], "KIND=GFLOPS"),
])
def test_a_mistake_ends_in_one_clear_line(workplace: Path, arguments: list[str], message: str,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPHERE_DATA", raising=False)  # where counterfact would be found
    done = run_plan("--hparams", "tiny.yaml", *arguments, cwd=workplace)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_llama3_8b_by_its_config(tmp_path: Path) -> None:
    AutoConfig.for_model(**LLAMA3_8B).save_pretrained(tmp_path / "llama3")
    done = run_plan("--hparams", "AlphaEdit/llama3-8b", "--num-edits", "2000", "--set", "model_name=llama3", "--gflops",
                    "200000", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["seconds"] > 0
    assert plan["peak_bytes"]["host"] > 16e9
