"""The way from the edited weight's output to the residual stream, found by running blocks of every kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.architectures import tiny_architecture
from helpers.models import relative_error, tiny_hparams, tiny_model
from sphere_easyedit.editing.requests import parse_requests, tokenize_request
from sphere_easyedit.editing.session import EditSession
from sphere_easyedit.editing.target_values import optimise_target_values
from sphere_easyedit.models.architecture import EditableModel, frozen
from sphere_easyedit.models.logit_map import find_logit_map
from sphere_easyedit.models.module_discovery import module_names
from sphere_easyedit.models.output_path import Gated, Normalised, OutputPath, Scaled
from sphere_easyedit.models.output_path_discovery import find_output_paths
from sphere_easyedit.models.replay import check_replay

WIDTH = 48
PROMPTS = [[5, 17, 90, 200, 31], [7, 300, 12, 45, 6, 99, 1000, 23]]

Way = Callable[[nn.Module, Tensor, Tensor], Tensor]  # of the block, the stream and the network's output


def _norm(kind: type[nn.Module] = nn.RMSNorm, zeros: int = 0) -> nn.Module:
    """A norm of random gains and biases; the first ``zeros`` gains are 0, as some of Gemma-3-270M's are."""
    generator = torch.Generator().manual_seed(1)
    norm = kind(WIDTH, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(WIDTH, generator=generator).abs() + 0.2)
        norm.weight[:zeros] = 0.0
        if getattr(norm, "bias", None) is not None:
            norm.bias.copy_(torch.randn(WIDTH, generator=generator))
    return norm


class _Gate(nn.Module):
    """A factor for each token, as shared experts have it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, channels)

    def forward(self, stream: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(stream))


# By name: modules that the block gets, and how its output follows from the stream and the network's output.
WAYS: dict[str, tuple[dict[str, Callable[[], nn.Module]], Way]] = {
    "straight": ({}, lambda _, x, y: x + y),
    "constant": ({}, lambda _, x, y: x + 0.3 * y),
    "negative": ({}, lambda _, x, y: x - y),
    "constant on the whole": ({}, lambda _, x, y: 0.5 * (x + y)),
    "by channel": ({"layer_scale": _norm}, lambda b, x, y: x + b.layer_scale.weight * y),
    "norm": ({"post": _norm}, lambda b, x, y: x + b.post(y)),
    "norm times constant": ({"post": _norm}, lambda b, x, y: x + 0.2 * b.post(3.0 * y)),
    "layer norm": ({"anything": lambda: _norm(nn.LayerNorm)}, lambda b, x, y: x + b.anything(y)),
    "norm with gains of 0": ({"post": lambda: _norm(zeros=2)}, lambda b, x, y: x + 0.5 * b.post(y)),
    "layer norm with gains of 0": ({"post": lambda: _norm(nn.LayerNorm, 2)}, lambda b, x, y: x + b.post(y)),
    "norm of the sum": ({"ln_2": _norm}, lambda b, x, y: b.ln_2(x + y)),
    "layer norm of the sum": ({"ln_2": lambda: _norm(nn.LayerNorm)}, lambda b, x, y: b.ln_2(x + y)),
    "gate": ({"gate": lambda: _Gate(1)}, lambda b, x, y: x + b.gate(x) * y),
    "gate by channel": ({"gate": lambda: _Gate(WIDTH)}, lambda b, x, y: x + b.gate(x) * y),
    "dropout": ({"dropout": lambda: nn.Dropout(0.5)}, lambda b, x, y: x + b.dropout(y)),
}
REFUSED: dict[str, tuple[dict[str, Callable[[], nn.Module]], Way]] = {
    "tanh": ({}, lambda _, x, y: x + torch.tanh(y)),
    "linear map": ({"out": lambda: nn.Linear(WIDTH, WIDTH)}, lambda b, x, y: x + b.out(y)),
    "gate by itself": ({"gate": lambda: _Gate(1)}, lambda b, x, y: x + b.gate(y) * y),
    "two norms": ({"one": _norm, "two": _norm}, lambda b, x, y: x + b.two(F.silu(b.one(y)))),
    "unused": ({}, lambda _, x, y: x + 0.0 * y),
    "mixing tokens": ({}, lambda _, x, y: x + y + 0.1 * F.pad(y[:, :-1], (0, 0, 1, 0))),
}


def _model(way: tuple[dict[str, Callable[[], nn.Module]], Way]) -> nn.Module:
    """A tiny Llama whose blocks add what their feed-forward network puts out in another way."""
    model = tiny_model("llama")
    modules, combine = way
    for block in model.model.layers:
        torch.manual_seed(3)
        for name, make in modules.items():
            block.add_module(name, make().eval())
        block.forward = _forward(block, combine)
    return model


def _forward(block: Any, combine: Way) -> Callable[..., Tensor]:
    def forward(hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = block.self_attn(hidden_states=block.input_layernorm(hidden_states), **kwargs)
        stream = hidden_states + attended
        return combine(block, stream, block.mlp(block.post_attention_layernorm(stream)))

    return forward


def _editable(model: nn.Module, layers: list[int]) -> EditableModel:
    return EditableModel(model, module_names(model.config), layers)


def _paths(model: nn.Module) -> dict[int, OutputPath]:
    editable = _editable(model, [1, 2])
    with frozen(model):
        return find_output_paths(editable, PROMPTS)


def test_kinds_are_told_apart() -> None:
    found = {name: _paths(_model(way))[1] for name, way in WAYS.items()}
    for name in ("straight", "dropout"):
        assert found[name] == Scaled()  # not even a multiplication: the same bits as without a path
    for name, factor in (("constant", 0.3), ("negative", -1.0), ("constant on the whole", 0.5)):
        path = found[name]
        assert isinstance(path, Scaled) and path.factor is not None
        torch.testing.assert_close(path.factor, torch.tensor([factor], dtype=torch.float64), rtol=1e-5, atol=0.0)
    by_channel = found["by channel"]
    assert isinstance(by_channel, Scaled) and by_channel.factor is not None
    torch.testing.assert_close(by_channel.factor.float(), _norm().weight.detach(), rtol=1e-4, atol=0.0)
    for name, module, centred in (("norm", "post", False), ("norm times constant", "post", False),
                                  ("layer norm", "anything", True), ("norm of the sum", "ln_2", False),
                                  ("layer norm of the sum", "ln_2", True)):
        path = found[name]
        assert isinstance(path, Normalised) and path.module == module and path.centred == centred
        assert path.eps == pytest.approx(1e-5, rel=0.01)
        gains = _norm().weight.detach().double() * (0.2 if name == "norm times constant" else 1.0)
        torch.testing.assert_close(path.gains, gains, rtol=1e-4, atol=1e-5)
    with_zeros = found["norm with gains of 0"]
    assert isinstance(with_zeros, Normalised)
    torch.testing.assert_close(with_zeros.gains, 0.5 * _norm(zeros=2).weight.detach().double(), rtol=1e-4, atol=1e-5)
    assert found["gate"] == Gated(by_channel=False)
    assert found["gate by channel"] == Gated(by_channel=True)


@pytest.mark.parametrize("name", REFUSED)
def test_a_way_that_is_not_understood_is_refused(name: str, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = _model(REFUSED[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    request = {"prompt": "{} is a city in", "subject": "Rome", "target_new": "France"}
    with pytest.raises(ValueError, match=r"model\.layers\.1.*rewrite_module_tmp") as caught:
        sphere.apply_sphere_to_model(model, tok, [request], tiny_hparams(tmp_path))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "stats").exists()  # before statistics, which may take minutes, were collected
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["MEMIT", "AlphaEdit"])
@pytest.mark.parametrize("name", WAYS)
def test_an_edit_moves_the_block_to_its_target_value(
    name: str, method: str, tok: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Through a norm, too, since only values that it can reach are tried."""
    model = _model(WAYS[name])
    editable = _editable(model, [1])
    hparams = tiny_hparams(tmp_path, layers=[1], base_alg=method, alpha=0.0, context_templates=[], v_num_grad_steps=3,
                           mom2_update_weight=1e-5, L2=1e-6, nullspace_share=1.0, v_lr=0.1)
    request = {"prompt": "{} is a city in", "subject": "Rome", "target_new": "France", "case_id": 1}
    ids = torch.tensor([tok("Rome")["input_ids"]])
    tokenized = [tokenize_request(tok, one, [], None) for one in parse_requests([request])]
    with frozen(model):
        paths = find_output_paths(editable, PROMPTS)
        [target] = optimise_target_values(editable, tokenized, hparams, paths=paths).values
    before = _at_last(editable, ids)
    sphere.apply_sphere_to_model(model, tok, [request], hparams)
    wanted, left = float((target - before).norm()), float((target - _at_last(editable, ids)).norm())
    assert wanted > 0.05
    assert left < 1e-2 * wanted


@torch.no_grad()
def _at_last(editable: EditableModel, ids: Tensor) -> Tensor:
    """Output of block 1 at the last token."""
    seen: list[Tensor] = []
    handle = editable.block(1).register_forward_hook(lambda _m, _a, output: seen.append(output[0, -1]))
    editable.model(input_ids=ids)
    handle.remove()
    return seen[0]


@given(st.integers(0, 10_000), st.floats(0.1, 1000.0), st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_change_through_a_norm_comes_nearer(seed: int, scale: float, centred: bool) -> None:
    """Also where gains are near 0, as real ones are, or negative."""
    generator = torch.Generator().manual_seed(seed)
    gains = torch.randn(WIDTH, generator=generator).exp() * 10.0
    gains[:2] = torch.tensor([1e-4, -3.0])
    path = Normalised("norm", gains.double(), centred, 1e-6, torch.ones(1, dtype=torch.float64))
    u = scale * torch.randn(4, WIDTH, generator=generator)
    wanted = scale * torch.randn(4, WIDTH, generator=generator)
    change = path.input_change(u, wanted)
    left = (path.output_change(u, change) - wanted).norm(dim=1)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        drawn = torch.randn(4, WIDTH, generator=generator)
        other = change + size * (u + change).norm(dim=1, keepdim=True) * drawn / WIDTH**0.5
        assert bool(((path.output_change(u, other) - wanted).norm(dim=1) >= left * (1 - 1e-4)).all())


@given(st.integers(0, 10_000), st.floats(1.0, 100.0), st.booleans())
@settings(max_examples=40, deadline=None)
def test_what_a_norm_can_reach_is_reached(seed: int, scale: float, centred: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    gains = (torch.rand(WIDTH, generator=generator) * 20.0 + 0.5).double()
    path = Normalised("norm", gains, centred, 1e-6, torch.full((1,), 0.25, dtype=torch.float64))
    u, step = (scale * torch.randn(4, WIDTH, generator=generator) for _ in range(2))
    reachable = path.output_change(u, step)
    assert relative_error(path.output_change(u, path.input_change(u, reachable)), reachable) < 1e-4


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "olmo2", "granite"])
def test_transformers_models_in_half_precision(family: str) -> None:
    model = tiny_model(family)
    whole, half = _paths(model)[1], _paths(model.to(torch.bfloat16))[1]
    assert type(whole) is type(half)
    if isinstance(whole, Normalised) and isinstance(half, Normalised):
        assert whole.module == half.module == "post_feedforward_layernorm"
        torch.testing.assert_close(half.gains, whole.gains, rtol=0.02, atol=0.02)
    else:
        assert isinstance(whole, Scaled) and isinstance(half, Scaled)
        assert float(whole.factor) == pytest.approx(0.25, rel=1e-5)
        assert float(half.factor) == pytest.approx(0.25, rel=1e-2)


class _Around(nn.Module):
    """Changes states in front of a block, outside of it."""

    def __init__(self, block: nn.Module, number: int, seen: dict[int, Tensor], change: Callable[..., Tensor]) -> None:
        super().__init__()
        self.block, self._number, self._seen, self._change = block, number, seen, change

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        self._seen[self._number] = hidden_states
        states = self._change(self._number, hidden_states, self._seen)
        return self.block(states, **kwargs)


BETWEEN: dict[str, Callable[[int, Tensor, dict[int, Tensor]], Tensor]] = {
    "a factor": lambda number, states, _: states * 0.7 if number == 3 else states,
    "the embeddings": lambda _, states, seen: states + 0.5 * seen[0],
    "an earlier block's input": lambda number, states, seen: states + 0.5 * seen[2] if number == 3 else states,
}


@pytest.mark.parametrize("base_alg", ["MEMIT", "AlphaEdit"])
@pytest.mark.parametrize("name", BETWEEN)
def test_what_a_model_does_between_its_blocks_is_refused(
    name: str, base_alg: str, tok: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Target values come from blocks that are run one after another, which would leave it out without a word."""
    model, seen = tiny_model("llama"), dict[int, Tensor]()
    names = asdict(module_names(model.config))
    inner = {key: value.replace("layers.{}", "layers.{}.block") for key, value in names.items()}
    for i, block in enumerate(model.model.layers):
        model.model.layers[i] = _Around(block, i, seen, BETWEEN[name])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    hparams = tiny_hparams(tmp_path, base_alg=base_alg, **inner)
    request = {"prompt": "{} is a city in", "subject": "Rome", "target_new": "France"}
    with pytest.raises(ValueError, match=r"more between its blocks") as caught:
        sphere.apply_sphere_to_model(model, tok, [request], hparams)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_blocks_that_run_twice_are_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2].register_forward_pre_hook(lambda _module, args, kwargs: (
        (model.model.layers[1](args[0], **kwargs), *args[1:]), kwargs), with_kwargs=True)
    with frozen(model), pytest.raises(ValueError, match=r"in the order \[1, 1, 2, 3\]"):
        check_replay(_editable(model, [1, 2]), PROMPTS[1])


def test_positions_that_count_otherwise_are_refused() -> None:
    """Models that count from behind the padding's id give other states where they are told to count from 0."""
    model = tiny_model("llama")
    def later(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = kwargs.get("position_ids")
        return args, kwargs if given is not None else {**kwargs, "position_ids": torch.arange(
            2, 2 + kwargs["input_ids"].shape[1])[None] * 3}

    model.register_forward_pre_hook(later, with_kwargs=True)
    with frozen(model), pytest.raises(ValueError, match=r"position_ids that count from 0"):
        check_replay(_editable(model, [1, 2]), PROMPTS[1])


@pytest.mark.parametrize(("family", "factor"), [("granite", {"residual_multiplier": 0.995}),
                                                ("cohere", {"logit_scale": 0.999})])
def test_a_factor_near_1_counts_in_float64(family: str, factor: dict[str, float]) -> None:
    """Float64 is held to the tolerances of float32, not to those of half precision."""
    model = tiny_architecture(family, **factor).double()
    editable = _editable(model, [1, 2])
    with frozen(model):
        path = find_output_paths(editable, PROMPTS)[1]
        logits = find_logit_map(editable, torch.tensor(PROMPTS[:1]))
    assert isinstance(path, Scaled)
    found = logits.scale if path.factor is None else float(path.factor)
    [expected] = factor.values()
    assert found == pytest.approx(expected, abs=1e-5)


def test_the_same_weights_as_another_architecture_get_the_same_edit(tok: PreTrainedTokenizerBase, tmp_path: Path
                                                                    ) -> None:
    """OLMo 3 is OLMo 2 with sliding attention, here wider than the prompts: only the model type differs."""
    one, other = tiny_architecture("olmo2", rope_theta=500000.0), tiny_architecture("olmo3", sliding_window=128)
    one.load_state_dict(other.state_dict())
    request = {"prompt": "{} is a city in", "subject": "Rome", "target_new": "France"}
    unedited = one.get_parameter("model.layers.1.mlp.down_proj.weight").detach().clone()
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"In {year} the river rose and the city was rebuilt." for year in range(1900, 1960)))
    for model in (one, other):
        hparams = tiny_hparams(tmp_path / model.config.model_type, layers=[1], mom2_dataset=str(text),
                               mom2_n_samples=60)
        sphere.apply_sphere_to_model(model, tok, [request], hparams)
    changes = [model.get_parameter("model.layers.1.mlp.down_proj.weight") - unedited for model in (one, other)]
    assert relative_error(*changes) < 1e-4


@pytest.mark.parametrize(("rewrite", "message"), [
    ("model.layers.{}.self_attn.q_proj", "is not supported"),
    ("model.layers.{}.self_attn.o_proj", "is not supported|at others"),
    ("model.layers.{}.mlp.up_proj", "returns 80 numbers per token, but the residual stream has 48"),
])
def test_another_module_than_the_down_projection(
    rewrite: str, message: str, tok: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    names = vars(module_names(model.config)) | {"rewrite_module_tmp": rewrite}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        sphere.apply_sphere_to_model(model, tok, [{"prompt": "{} is", "subject": "Rome", "target_new": "big"}],
                                     tiny_hparams(tmp_path, **names))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_probe_runs_once_a_session(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model, session = tiny_model("llama"), EditSession()
    requests = [{"prompt": "{} is a city in", "subject": name, "target_new": "France"} for name in ("Rome", "Oslo")]
    sphere.apply_sphere_to_model(model, tok, requests[:1], tiny_hparams(tmp_path), session=session)
    paths = session.paths
    sphere.apply_sphere_to_model(model, tok, requests[1:], tiny_hparams(tmp_path), session=session)
    assert session.paths == paths and all(session.paths[layer] is paths[layer] for layer in paths)


def test_a_weight_shared_between_blocks_is_refused(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.model.layers[3].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    with pytest.raises(ValueError, match=r"shared with blocks \[3\]"):
        sphere.apply_sphere_to_model(model, tok, [{"prompt": "{} is", "subject": "Rome", "target_new": "big"}],
                                     tiny_hparams(tmp_path))


def test_a_down_projection_called_with_a_named_argument(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    requests = [{"prompt": "{} is", "subject": "Rome", "target_new": "big"}]
    weights = []
    for named in (False, True):
        model = tiny_model("llama")
        for mlp in (block.mlp for block in model.model.layers if named):
            mlp.forward = lambda x, mlp=mlp: mlp.down_proj(input=mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))
        sphere.apply_sphere_to_model(model, tok, requests, tiny_hparams(tmp_path))
        weights.append(model.model.layers[2].mlp.down_proj.weight)
    assert torch.equal(*weights)
