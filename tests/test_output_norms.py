"""Changes of the residual stream by way of what lies between a block's down-projection and the stream."""

from pathlib import Path

import pytest
import torch
from conftest import relative_error, tiny_hparams, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

import sphere_easyedit as sphere
from sphere_easyedit.editing.output_norms import ahead_of_stream
from sphere_easyedit.editing.requests import parse_requests, tokenize_request
from sphere_easyedit.editing.target_values import optimise_target_values
from sphere_easyedit.models import EditableModel, frozen, module_names

WIDTH = 48


def _editable(family: str) -> EditableModel:
    model = tiny_model(family)
    return EditableModel(model, module_names(model.config), [1])


def _gained(gains: Tensor) -> tuple[EditableModel, nn.Module]:
    """A tiny Gemma 3 whose output norm has these gains."""
    editable = _editable("gemma3_text")
    norm = editable.output_norm(1)
    assert isinstance(norm, Gemma3RMSNorm)
    with torch.no_grad():
        norm.weight.copy_(gains - 1.0)
    return editable, norm


def _unit(generator: torch.Generator, rows: int) -> Tensor:
    """Rows of root mean square 1."""
    drawn = torch.randn(rows, WIDTH, generator=generator)
    return drawn / drawn.square().mean(dim=1, keepdim=True).sqrt()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nothing_between(family: str) -> None:
    wanted = torch.randn(3, WIDTH)
    assert ahead_of_stream(_editable(family), 1, torch.randn(3, WIDTH), wanted) is wanted


@given(st.integers(0, 10_000), st.floats(1.0, 100.0))
@settings(max_examples=25, deadline=None)
def test_what_an_output_can_reach_is_reached(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    editable, norm = _gained(torch.rand(WIDTH, generator=generator) * 20.0 + 0.5)
    values = scale * torch.randn(4, WIDTH, generator=generator)
    with torch.no_grad():
        target = norm(_unit(generator, 4))
        change = ahead_of_stream(editable, 1, values, target - norm(values))
        assert relative_error(norm(values + change), target) < 1e-4


@given(st.integers(0, 10_000), st.floats(0.1, 1000.0))
@settings(max_examples=25, deadline=None)
def test_no_output_comes_nearer(seed: int, scale: float) -> None:
    """Also where gains are near 0, as real ones are, or negative."""
    generator = torch.Generator().manual_seed(seed)
    gains = torch.randn(WIDTH, generator=generator).exp() * 10.0
    gains[:2] = torch.tensor([1e-4, -3.0])
    editable, norm = _gained(gains)
    values, wanted = torch.randn(4, WIDTH, generator=generator), scale * torch.randn(4, WIDTH, generator=generator)
    with torch.no_grad():
        found = values + ahead_of_stream(editable, 1, values, wanted)
        target = norm(values) + wanted
        assert relative_error(found.norm(dim=1), values.norm(dim=1)) < 1e-5
        nearest = (norm(found) - target).norm(dim=1)
        for size in (1e-3, 1e-2, 0.1, 1.0):
            other = found + size * found.norm(dim=1, keepdim=True) * _unit(generator, 4) / WIDTH**0.5
            assert bool(((norm(other) - target).norm(dim=1) >= nearest * (1 - 1e-5)).all())


@pytest.mark.parametrize("family", ["llama", "granite", "gemma2", "gemma3_text", "olmo2"])
@pytest.mark.parametrize("method", ["MEMIT", "AlphaEdit"])
def test_an_edit_moves_the_stream_to_its_target_value(
    family: str, method: str, tok: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """As near as a normalised output of unit gains can: ``| |n + d| - |n| |`` is left of a wanted change ``d``."""
    editable = _editable(family)
    hparams = tiny_hparams(tmp_path, layers=[1], base_alg=method, alpha=0.0, context_templates=[], v_num_grad_steps=3,
                           mom2_update_weight=1e-5, L2=1e-6, nullspace_share=1.0)
    request = {"prompt": "{} is a city in", "subject": "Rome", "target_new": "France", "case_id": 1}
    ids = torch.tensor([tok("Rome")["input_ids"]])
    before, written = _at_last(editable, ids)
    tokenized = [tokenize_request(tok, one, [], None) for one in parse_requests([request])]
    with frozen(editable.model):
        [target] = optimise_target_values(editable, tokenized, hparams).values
    sphere.apply_sphere_to_model(editable.model, tok, [request], hparams)
    after, _ = _at_last(editable, ids)
    wanted = target - before
    left = float((target - after).norm())
    norm = editable.output_norm(1)
    nearest = 0.0 if norm is None else abs(float((written + wanted).norm() - written.norm()))
    assert abs(left - nearest) < 1e-2 * float(wanted.norm())


def _at_last(editable: EditableModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Output of block 1 at the last token, and what its feed-forward network adds to the stream there."""
    seen: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            seen[name] = (output if isinstance(output, Tensor) else output[0])[0, -1].detach()
        return module.register_forward_hook(hook)

    handles = [note("block", editable.block(1)), note("added", editable.output_norm(1) or editable.down_projection(1))]
    editable.model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen["block"], seen["added"]
