"""What a model does to its logits besides its norm and head: found, or refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import relative_error, tiny_hparams, tiny_model
from sphere_easyedit.models.architecture import EditableModel
from sphere_easyedit.models.logit_map import LogitMap, find_logit_map
from sphere_easyedit.models.module_discovery import module_names

IDS = torch.tensor([[5, 17, 90, 200, 31]])


def _editable(model: nn.Module, **names: str) -> EditableModel:
    return EditableModel(model, type(module_names(model.config))(**vars(module_names(model.config)) | names), [1])


def _with_logits(change: Callable[[Tensor], Tensor], spread: float = 1.0) -> nn.Module:
    """A tiny Llama that does something to its logits."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(spread)
    forward = model.forward

    def changed(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = change(output.logits)
        return output

    model.forward = changed
    return model


def _of_last_block(editable: EditableModel) -> tuple[Tensor, Tensor]:
    """Output of the last block and logits ``(tokens, ...)`` of a plain forward pass."""
    seen: list[Tensor] = []
    handle = editable.block(editable.num_blocks - 1).register_forward_hook(
        lambda _m, _a, output: seen.append(output[0] if isinstance(output, tuple) else output))
    with torch.no_grad():
        logits = editable.model(input_ids=IDS, use_cache=False).logits
    handle.remove()
    return seen[0][0], logits[0]


@pytest.mark.parametrize("spread", [1e-2, 1.0, 30.0])
@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.125, None), (13.0, None), (1.0, 30.0), (0.3, 5.0),
                                            (2.0, 1000.0)])
def test_scale_and_cap_are_found(scale: float, cap: float | None, spread: float) -> None:
    """Whether or not the logits at hand come near the cap."""
    editable = _editable(_with_logits(LogitMap(1.0, scale, cap).from_head, spread))
    found = find_logit_map(editable, IDS)
    assert found.input_scale == 1.0
    assert found.scale == pytest.approx(scale, rel=1e-4) and (scale != 1.0 or found.scale == pytest.approx(1.0))
    assert (cap is None or found.cap is None) or found.cap == pytest.approx(cap, rel=1e-3)
    states, logits = _of_last_block(editable)
    for size in (1.0, 3.0):  # a target value makes states and logits larger
        expected = LogitMap(1.0, scale, cap).logits(states * size, editable.final_norm, editable.lm_head)
        with torch.no_grad():
            assert relative_error(found.logits(states * size, editable.final_norm, editable.lm_head), expected) < 1e-3
    assert relative_error(found.logits(states, editable.final_norm, editable.lm_head), logits) < 1e-3


def test_plain_logits_take_no_operation() -> None:
    for family in ("llama", "gpt2", "qwen2"):
        assert find_logit_map(_editable(tiny_model(family)), IDS) == LogitMap()
    assert find_logit_map(_editable(tiny_model("llama").to(torch.bfloat16)), IDS) == LogitMap()


def test_a_factor_in_front_of_the_head() -> None:
    model = tiny_model("llama")
    model.lm_head.register_forward_pre_hook(lambda _module, args: (args[0] * 0.25,))
    assert find_logit_map(_editable(model), IDS).input_scale == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(("change", "message"), [
    (lambda logits: logits + torch.linspace(-3, 3, logits.shape[-1]), r"are not what 'lm_head' returns"),
    (torch.sin, r"are not what 'lm_head' returns"),
    (lambda logits: logits.masked_fill(torch.arange(logits.shape[-1]) < 7, -torch.inf), r"overwrites 7 of its 1500"),
])
def test_what_else_is_done_is_refused(change: Callable[[Tensor], Tensor], message: str, tok: PreTrainedTokenizerBase,
                                      tmp_path: Path) -> None:
    model = _with_logits(change)
    with pytest.raises(ValueError, match=message) as caught:
        sphere.apply_sphere_to_model(model, tok, [{"prompt": "{} is", "subject": "Rome", "target_new": "big"}],
                                     tiny_hparams(tmp_path))
    assert "\n" not in str(caught.value) and not (tmp_path / "stats").exists()


@pytest.mark.parametrize(("names", "message"), [
    ({"lm_head_module": "model.norm"}, r"'model\.norm' returns 48 numbers per token, but LlamaForCausalLM has 1500"),
    ({"ln_f_module": "model.layers.0.input_layernorm"}, r"is not what 'model\.layers\.0\.input_layernorm' returns"),
    ({"lm_head_module": "model.layers.3.mlp.act_fn"}, r"returns 80 numbers per token"),
    ({"lm_head_module": "model.embed_tokens"}, r"is not run on hidden states"),
    ({"ln_f_module": "model.embed_tokens"}, r"'model\.embed_tokens' does not take the last block's output"),
])
def test_wrong_names_are_refused_before_anything_is_tried(names: dict[str, str], message: str,
                                                          tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():  # all norms of a new model are alike
        model.model.norm.weight.copy_(torch.rand(48, generator=torch.Generator().manual_seed(0)) + 0.5)
    given = vars(module_names(model.config)) | names
    with pytest.raises(ValueError, match=message) as caught:
        sphere.apply_sphere_to_model(model, tok, [{"prompt": "{} is", "subject": "Rome", "target_new": "big"}],
                                     tiny_hparams(tmp_path, **given))
    assert "\n" not in str(caught.value) and not (tmp_path / "stats").exists()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("field", ["ln_f_module", "lm_head_module"])
def test_any_other_module_is_refused_in_one_line(family: str, field: str) -> None:
    """Modules that take indices, no positional arguments or other widths, that give tuples, or that are never run."""
    model = tiny_model(family)
    right = vars(module_names(model.config))
    for name, module in model.named_modules():
        if not name or name == right[field] or (field == "ln_f_module" and "norm" in type(module).__name__.lower()):
            continue  # all norms of a new model are alike
        with pytest.raises(ValueError, match=rf"'{name}'") as caught:
            find_logit_map(_editable(model, **{field: name}), IDS)
        assert "\n" not in str(caught.value)


def test_blocks_that_are_not_run_are_refused() -> None:
    editable = _editable(tiny_model("gpt2"), layer_module_tmp="transformer.h.{}.attn.attn_dropout")
    with pytest.raises(ValueError, match=r"'transformer\.h\.3\.attn\.attn_dropout' returns no hidden states"):
        find_logit_map(editable, IDS)
