"""Packed rows: attention equal to that of rows by themselves, and states equal to the model's own."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from helpers.models import relative_error, tiny_model
from sphere_easyedit.editing.requests import TokenizedPrompt
from sphere_easyedit.editing.row_layout import packing_is_exact
from sphere_easyedit.models.architecture import EditableModel
from sphere_easyedit.models.module_discovery import module_names
from sphere_easyedit.models.packing import (
    PackedRows,
    attending_packed,
    packed_attention,
    packed_tokens,
    packs_exactly,
    select_packed,
)
from sphere_easyedit.models.replay import BlockReplay, pad_rows

HAS_INTERFACE = Version(transformers.__version__) >= Version("4.48")
PACKING = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gpt2")
BLOCK = 3  # whose attention is called
needs_interface = pytest.mark.skipif(not HAS_INTERFACE, reason="transformers has no attention functions to choose from")


def editable_of(family: str, **changes: Any) -> EditableModel:
    model = tiny_model(family, **changes)
    return EditableModel(model, module_names(model.config), [1, 2])


def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedRows, **settings_: Any) -> Tensor:
    return packed_attention(SimpleNamespace(layer_idx=BLOCK), query, key, value, None,  # type: ignore[arg-type]
                            packed_rows=layout, **settings_)[0]


def plain_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None,
                    softcap: float | None = None) -> Tensor:
    """Of the last ``w`` of n tokens: queries ``(H, w, head width)``, keys ``(Hkv, n, head width)``, head by head."""
    heads, width, _ = query.shape
    shared, n = heads // len(key), key.shape[1]
    out = []
    for head in range(heads):
        scores = scale * query[head] @ key[head // shared].T
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        for i in range(width):
            here = n - width + i
            for j in range(n):
                if j > here or (window is not None and here - j >= window):
                    scores[i, j] = -torch.inf
        out.append(scores.softmax(dim=-1) @ value[head // shared])
    return torch.stack(out, dim=1)  # (w, H, head width)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Ascending widths, and for each row tokens of other rows that it has in front."""
    widths = sorted(draw(st.lists(st.integers(1, 5), min_size=1, max_size=7)))
    starts = [0, *accumulate(widths)]
    in_front = []
    for row in range(len(widths)):
        ahead = draw(st.lists(st.integers(0, len(widths) - 1).filter(lambda other, row=row: other != row), max_size=2)
                     if len(widths) > 1 else st.just([]))
        in_front.append([token for other in ahead for token in range(starts[other], starts[other + 1])])
    return widths, in_front


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from([(1, 1), (4, 1), (4, 2), (3, 3)]), st.sampled_from([None, 1, 3]),
       st.sampled_from([None, 1.5]), st.booleans(), st.integers(0, 2**31))
def test_attention_is_each_row_s_own(layout: tuple[list[int], list[list[int]]], heads: tuple[int, int],
                                     window: int | None, softcap: float | None, given_states: bool, seed: int) -> None:
    """With tokens in front that run beside it, and with given keys and values of them; and gradients."""
    widths, in_front = layout
    generator = torch.Generator().manual_seed(seed)
    total = sum(widths)
    query, key, value = (torch.randn(1, count, total, 6, dtype=torch.float64, generator=generator, requires_grad=True)
                         for count in (heads[0], heads[1], heads[1]))
    table = {BLOCK: (key[0].detach(), value[0].detach())} if given_states else None
    rows = PackedRows(widths, in_front, table)
    found = attend(query, key, value, rows, scaling=0.3, sliding_window=window, softcap=softcap)
    assert found.shape == (1, total, heads[0], 6)
    expected = []
    front_key, front_value = (key.detach(), value.detach()) if given_states else (key, value)
    for start, width, ahead in zip([0, *accumulate(widths)], widths, in_front, strict=False):
        own = slice(start, start + width)
        keys = torch.cat([front_key[0][:, ahead], key[0][:, own]], dim=1)
        values = torch.cat([front_value[0][:, ahead], value[0][:, own]], dim=1)
        expected.append(plain_attention(query[0][:, own], keys, values, 0.3, window, softcap))
    reference = torch.cat(expected).unsqueeze(0)
    assert torch.allclose(found, reference, atol=1e-6)  # softmax is float32, as in transformers
    weights = torch.randn(reference.shape, dtype=torch.float64, generator=generator)
    own_gradients = torch.autograd.grad((found * weights).sum(), (query, key, value))
    for gradient, wanted in zip(own_gradients, torch.autograd.grad((reference * weights).sum(), (query, key, value)),
                                strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-5)


def test_scale_by_default() -> None:
    query, key, value = (torch.randn(1, 2, 5, 4) for _ in range(3))
    layout = PackedRows([2, 3])
    assert torch.allclose(attend(query, key, value, layout), attend(query, key, value, layout, scaling=0.5))


def test_rows_must_ascend() -> None:
    with pytest.raises(ValueError, match="ascending order"):
        PackedRows([3, 2])


def test_sinks_are_refused() -> None:
    states = torch.randn(1, 2, 5, 4)
    with pytest.raises(NotImplementedError, match="sinks"):
        attend(states, states, states, PackedRows([5]), s_aux=torch.zeros(2))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=8), st.data())
def test_selected_rows(rows: list[tuple[int, int]], data: st.DataObject) -> None:
    """Some rows attend as they did among all."""
    rows.sort()
    generator = torch.Generator().manual_seed(0)
    table = {BLOCK: (torch.randn(2, 9, 4, generator=generator), torch.randn(2, 9, 4, generator=generator))}
    layout = PackedRows([width for width, _ in rows], [list(range(9 - front, 9)) for _, front in rows], table)
    total = sum(width for width, _ in rows)
    query, key, value = (torch.randn(1, 2, total, 4, generator=generator) for _ in range(3))
    whole = attend(query, key, value, layout)
    chosen = sorted(data.draw(st.sets(st.integers(0, len(rows) - 1), min_size=1)))
    some, tokens = layout.select(torch.tensor(chosen))
    starts = layout.starts.tolist()
    assert tokens.tolist() == [starts[i] + j for i in chosen for j in range(rows[i][0])]
    part = attend(query[:, :, tokens], key[:, :, tokens], value[:, :, tokens], some)
    assert torch.allclose(part, whole[:, tokens], atol=1e-6)


# --- on models ----------------------------------------------------------------------------------------------


def run_packed(editable: EditableModel, rows: list[list[int]], layout: PackedRows, positions: list[int], start: int
               ) -> BlockReplay:
    with attending_packed(editable.model):
        return BlockReplay.record(editable, packed_tokens(rows, positions, editable.input_device), start,
                                  editable.num_blocks, packed_rows=layout)


@needs_interface
@pytest.mark.parametrize("family", PACKING)
def test_states_of_a_model(family: str) -> None:
    """Rows of three lengths, two of them behind the tokens of a third; then some of their tokens run again."""
    editable = editable_of(family)
    stem, rest, other, alone = [5, 6, 7, 8], [20, 21], [30, 31], [9]
    rows = [alone, rest, other, stem]
    layout = PackedRows([1, 2, 2, 4], [(), range(5, 9), range(5, 9), ()], recording=True)
    replay = run_packed(editable, rows, layout, [0, 4, 4, 0], start=2)
    with torch.no_grad():
        expected = [BlockReplay.record(editable, pad_rows([ids], editable.input_device), 2, 4).final[0]
                    for ids in (alone, [*stem, *rest], [*stem, *other], stem)]
    wanted = torch.cat([expected[0], expected[1][4:], expected[2][4:], expected[3]])
    assert relative_error(replay.final[0], wanted) < 1e-5
    later = PackedRows([2, 2], [range(5, 9)] * 2, {block: layout.recorded[block] for block in (2, 3)})
    again = select_packed(replay, later, torch.tensor([1, 2, 3, 4]))
    with torch.no_grad(), attending_packed(editable.model):
        assert relative_error(again.run(again.hidden)[0], wanted[1:5]) < 1e-5


@needs_interface
@pytest.mark.parametrize("family", PACKING)
def test_models_that_take_packed_rows(family: str, caplog: pytest.LogCaptureFixture) -> None:
    editable = editable_of(family)
    prompts = [TokenizedPrompt(tuple(range(5, 40)), 25), TokenizedPrompt((50, 51, 52), 0)]
    with caplog.at_level(logging.INFO, logger="sphere_easyedit"):
        assert packing_is_exact(editable, prompts)
    assert not caplog.records


def test_model_that_does_not(caplog: pytest.LogCaptureFixture) -> None:
    editable = editable_of("gptj")
    with caplog.at_level(logging.INFO, logger="sphere_easyedit"):
        assert not packing_is_exact(editable, [TokenizedPrompt(tuple(range(5, 40)), 25)])
    assert "GPTJForCausalLM does not accept packed rows" in caplog.text


@needs_interface
def test_model_that_gives_other_states(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sphere_easyedit"):
        assert not packs_exactly(tiny_model("llama"), torch.ones(3), lambda: torch.tensor([1.0, 1.0, 1.01]))
    assert "gives other states with packed rows" in caplog.text
    assert not packs_exactly(tiny_model("llama"), torch.ones(3), lambda: torch.tensor([1.0, torch.nan, 1.0]))


@needs_interface
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_model_attends_as_before_afterwards(family: str) -> None:
    model = tiny_model(family)
    names = {module: module.config._attn_implementation for module in model.modules() if hasattr(module, "config")}
    ids = torch.arange(5, 15).unsqueeze(0)
    with torch.no_grad():
        before = model(input_ids=ids).logits
    with pytest.raises(RuntimeError, match="broken"), attending_packed(model):
        assert {module.config._attn_implementation for module in names} == {"sphere_packed"}
        raise RuntimeError("broken")
    assert {module: module.config._attn_implementation for module in names} == names
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, before)


def attention_by_config(config: PretrainedConfig, name: str = "") -> dict[str, str]:
    """What a config and all those inside it say, also those that no module has."""
    inner = {key: getattr(config, key, None) for key in config.sub_configs}
    return {name: config._attn_implementation} | {
        path: said for key, found in inner.items() if found is not None
        for path, said in attention_by_config(found, f"{name}.{key}").items()}


def wrapped(family: str, attention: dict[str, str]) -> nn.Module:
    """A tiny vision-language model of PaliGemma or Gemma 3, whose parts attend in different ways."""
    text = {"vocab_size": 200, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 80, "max_position_embeddings": 128}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1,
              "num_attention_heads": 4, "image_size": 16, "patch_size": 8, "projection_dim": 48}
    own = {"paligemma": {"text_config": {**text, "model_type": "gemma2"}, "projection_dim": 48,
                         "image_token_index": 199},
           "gemma3": {"text_config": {**text, "model_type": "gemma3_text"}, "mm_tokens_per_image": 4}}
    config = AutoConfig.for_model(family, vision_config=vision, **own[family])
    config._attn_implementation = attention
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForImageTextToText.from_config(config).eval()


@needs_interface
@pytest.mark.parametrize(("family", "attention"), [
    ("paligemma", {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}),
    ("gemma3", {"": "sdpa", "text_config": "sdpa", "vision_config": "eager"}),
    ("gemma3", {"": "eager", "text_config": "sdpa", "vision_config": "eager"}),
])
@pytest.mark.parametrize("fails", [False, True])
def test_parts_that_attend_in_different_ways_do_so_afterwards(family: str, attention: dict[str, str], fails: bool
                                                              ) -> None:
    model = wrapped(family, attention)
    before = attention_by_config(model.config)
    assert before == {f".{key}" if key else "": said for key, said in attention.items()}
    ids = torch.arange(5, 15).unsqueeze(0)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    ends = pytest.raises(RuntimeError, match="broken") if fails else nullcontext()
    with ends, attending_packed(model):
        assert model.config.text_config._attn_implementation == "sphere_packed"
        if fails:
            raise RuntimeError("broken")
    assert attention_by_config(model.config) == before
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, logits)


@needs_interface
def test_two_models_at_once() -> None:
    """One attends to packed rows, the other as ever."""
    one, other = tiny_model("llama"), tiny_model("llama")
    ids = torch.arange(5, 15).unsqueeze(0)
    with torch.no_grad(), attending_packed(one):
        assert torch.isfinite(other(input_ids=ids).logits).all()
        with pytest.raises(TypeError, match="packed_rows"):
            one(input_ids=ids)


def test_positions_of_packed_tokens() -> None:
    packed = packed_tokens([[7, 8], [9]], [3, 0], torch.device("cpu"))
    assert packed.input_ids.tolist() == [[7, 8, 9]]
    assert packed.position_ids.tolist() == [[3, 4, 0]]
    assert packed.attention_mask.tolist() == [[1, 1, 1]]
