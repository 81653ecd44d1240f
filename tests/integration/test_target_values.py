"""Target values, and keys, against slow and obvious references: one edit at a time, the whole model every time."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.architectures import tiny_architecture
from helpers.models import REQUESTS, relative_error, tiny_hparams, tiny_model
from sphere_easyedit.editing import delta_forward, row_layout, target_values
from sphere_easyedit.editing.keys import BatchStates
from sphere_easyedit.editing.requests import TokenizedPrompt, TokenizedRequest, parse_requests, tokenize_request
from sphere_easyedit.editing.target_values import TargetValues, context_rounds, optimise_target_values
from sphere_easyedit.models.architecture import EditableModel, frozen
from sphere_easyedit.models.module_discovery import module_names

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "gpt2", "gptj")
CONTEXTS = ["He said that. {}", "The team of the United States is known for this, and so he said. {} (he said)"]
# Prompts of very different lengths; of the last one the subject is the first token, so that nothing stands before it.
EDITS = [
    *REQUESTS,
    {"prompt": "Rome is", "subject": "Rome", "target_new": "the capital of Germany and of the United States"},
    {"prompt": "He said that the man who plays for the team of the city in which the mother tongue of the president "
               "was first known is Danielle Darrieux, of whom", "subject": "Danielle Darrieux", "target_new": "French"},
    {"prompt": "T, the official language of which was said to be that of the United States, is", "subject": "T",
     "target_new": "English"},
]
# Targets that can be reached, and targets that can't, in few steps.
MIXED = [EDITS[0], EDITS[1], {"prompt": "The capital is {}", "subject": "France", "target_new": "is"},
         {"prompt": "He said {}", "subject": "Rome", "target_new": "the"},
         {"prompt": "T", "subject": "T", "target_new": "of"},
         {"prompt": "The team of the city and of {}", "subject": "John Smith", "target_new": "and"}]
# The subject is the prompt's end: blocks that attend a few tokens back, or none at all, see delta in the loss. (Where
# they don't, the loss has no gradient, and Adam makes steps of full size from rounding errors.)
NEAR = [*MIXED[2:], {"prompt": f"{EDITS[4]['prompt']} {{}}", "subject": "Danielle Darrieux",
                     "target_new": "the United States"}]
NEAR_CONTEXTS = ["He said that. {}", CONTEXTS[1].removesuffix(" (he said)")]


def _model(family: str, **changes: Any) -> nn.Module:
    """A tiny model whose norms and biases are other than ones and zeros."""
    model = tiny_model(family, **changes)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def _editable(model: nn.Module, hparams: sphere.SPHEREHyperParams) -> EditableModel:
    return EditableModel(model, hparams.module_names(model.config), hparams.layers)


def _tokenized(tok: PreTrainedTokenizerBase, edits: Sequence[dict[str, Any]] = EDITS,
               contexts: Sequence[str] = CONTEXTS) -> list[TokenizedRequest]:
    return [tokenize_request(tok, request, contexts, None) for request in parse_requests(edits)]


def _found(model: nn.Module, requests: list[TokenizedRequest], hparams: sphere.SPHEREHyperParams) -> TargetValues:
    with frozen(model):
        return optimise_target_values(_editable(model, hparams), requests, hparams)


@dataclass
class Reference:
    """Of one edit; ``clamped`` counts the steps that ended on the ball's surface."""

    value: Tensor
    loss: float
    steps: int
    clamped: int


def _reference(model: nn.Module, request: TokenizedRequest, hparams: sphere.SPHEREHyperParams) -> Reference:
    """The optimisation as the module's docstring tells it, with a forward pass of the whole model for every row."""
    editable = _editable(model, hparams)
    edited, seen_at = editable.layers[-1], hparams.v_loss_layer
    captured: dict[int, Tensor] = {}
    z_0: list[Tensor] = []

    def outputs(ids: Sequence[int], lookup: int, delta: Tensor) -> Tensor:
        """Logits of the whole model, delta added at the lookup; the blocks' outputs are left in ``captured``."""
        def steer(_module: nn.Module, _args: Any, output: Any) -> Any:
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            if not z_0:
                z_0.append(hidden[0, lookup].detach().float())
            hidden[0, lookup] += delta.to(hidden.dtype)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            captured[seen_at] = output[0] if isinstance(output, tuple) else output

        handles = [editable.block(edited).register_forward_hook(steer),
                   editable.block(seen_at).register_forward_hook(note)]
        try:
            logits: Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits[0].float()

    targets = torch.tensor(request.target_ids)

    def rewriting(prompt: TokenizedPrompt, delta: Tensor) -> Tensor:
        """Negative log likelihood of the target, a mean over its tokens."""
        logits = outputs(prompt.ids + request.target_ids[:-1], prompt.lookup, delta)
        if seen_at < editable.num_blocks - 1:
            logits = model.get_output_embeddings()(editable.final_norm(captured[seen_at]))[0].float()
        return F.cross_entropy(logits[len(prompt.ids) - 1:], targets)

    def drift(delta: Tensor) -> Tensor:
        return outputs(request.drift.ids, request.drift.lookup, delta)[request.drift.lookup].log_softmax(-1)

    width = editable.hidden_size
    delta = torch.zeros(width, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=hparams.v_lr)
    average = torch.zeros(width)  # of gradients, each divided by its norm
    steps = clamped = 0
    with frozen(model):
        rounds = context_rounds(len(request.contexts), hparams.contexts_per_step, hparams.seed)
        losses: list[float] = []
        rewriting(request.plain, torch.zeros(width))  # for z_0
        before = drift(torch.zeros(width)).detach()
        for step in range(hparams.gradient_steps):
            prompts = [request.plain, *(request.contexts[i - 1] for i in rounds[step % len(rounds)])]
            nll = torch.stack([rewriting(prompt, delta) for prompt in prompts]).mean()
            after = drift(delta)
            kl = (after.exp() * (after - before)).sum()
            loss = nll + hparams.kl_factor * kl + hparams.v_weight_decay * delta.norm() / z_0[0].norm() ** 2
            losses.append(float(loss.detach()))
            mean = sum(losses[-len(rounds):]) / min(len(losses), len(rounds))
            if (mean < 0.05 and len(losses) >= len(rounds)) or step == hparams.gradient_steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            if hparams.normalised_steps is None:
                adam.step()
            else:
                average = 0.5 * average + 0.5 * delta.grad / delta.grad.norm()
                cosine = math.cos(math.pi * step / (hparams.gradient_steps - 1))
                length = hparams.step_norm_factor * z_0[0].norm() * (0.1 + 0.9 * (1 + cosine) / 2)
                with torch.no_grad():
                    delta -= length * average / average.norm()
            steps += 1
            radius = hparams.clamp_norm_factor * z_0[0].norm()
            if delta.norm() > radius:
                clamped += 1
                with torch.no_grad():
                    delta.mul_(radius / delta.norm())
    return Reference(z_0[0] + delta.detach(), mean, steps, clamped)


def _assert_equal(found: TargetValues, references: list[Reference], tolerance: float = 1e-3) -> None:
    errors = [relative_error(value, reference.value) for value, reference in zip(found.values, references, strict=True)]
    assert max(errors) < tolerance, errors
    assert found.steps == [reference.steps for reference in references]
    assert found.losses == pytest.approx([reference.loss for reference in references], rel=1e-2, abs=1e-3)


@pytest.fixture(params=["packed", "padded"])
def in_one_batch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits of all lengths beside one another, whatever would be cheapest, in either way of running rows."""
    for name in ("packed_micro_batches", "padded_micro_batches"):
        monkeypatch.setattr(target_values, name, lambda requests, *_: [list(range(len(requests)))])
    if request.param == "padded":
        monkeypatch.setattr(row_layout, "packing_is_exact", lambda *_: False)


def _check(model: nn.Module, requests: list[TokenizedRequest], hparams: sphere.SPHEREHyperParams) -> list[Reference]:
    references = [_reference(model, request, hparams) for request in requests]
    _assert_equal(_found(model, requests, hparams), references)
    return references


@pytest.mark.usefixtures("in_one_batch")
@pytest.mark.parametrize(("family", "changes"), [(family, {}) for family in FAMILIES] + [
    ("llama", {"attn_implementation": "eager"}),
    ("gemma3_text", {"attn_implementation": "eager", "final_logit_softcapping": 2.0})])
def test_equals_the_plain_loop(family: str, changes: dict[str, Any], tok: PreTrainedTokenizerBase, tmp_path: Path
                               ) -> None:
    requests = _tokenized(tok)
    lookups = [request.plain.lookup for request in requests]
    assert (min(lookups), lookups.count(0), max(lookups) > 20) == (0, 1, True)
    hparams = tiny_hparams(tmp_path, v_num_grad_steps=6)
    references = _check(_model(family, **changes), requests, hparams)
    assert {reference.steps for reference in references} == {5}  # the last step's loss is only reported


@pytest.mark.parametrize("token_budget", [1, 1000, 100_000])
@pytest.mark.parametrize("family", ["gemma3_text", "gpt2"])
def test_token_budget_changes_nothing(family: str, token_budget: int, tok: PreTrainedTokenizerBase, tmp_path: Path
                                      ) -> None:
    requests, model = _tokenized(tok), _model(family)
    reference = _found(model, requests, tiny_hparams(tmp_path, v_num_grad_steps=6))
    finished: list[int] = []
    hparams = tiny_hparams(tmp_path, v_num_grad_steps=6, token_budget=token_budget)
    with frozen(model):
        found = optimise_target_values(_editable(model, hparams), requests, hparams, finished.append)
    assert sum(finished) == 6
    assert (token_budget == 1) == (len(finished) == 6)
    for value, expected in zip(found.values, reference.values, strict=True):
        assert relative_error(value, expected) < 1e-4


@pytest.mark.usefixtures("in_one_batch")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_some_edits_stop_early(family: str, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Edits that are done stand still, whatever Adam's momentum, and the others go on as if they were alone."""
    model = _model(family, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6.0)  # or no target could be made likely
    hparams = tiny_hparams(tmp_path, v_lr=0.3, v_num_grad_steps=16, clamp_norm_factor=10.0, kl_factor=0.002)
    references = _check(model, _tokenized(tok, MIXED, ["He said that. {}"]), hparams)
    early = [reference for reference in references if reference.steps < 15]
    assert all(reference.loss < 0.05 for reference in early)
    assert len({reference.steps for reference in early}) >= 2
    assert 2 <= len(early) < len(references)


@pytest.mark.usefixtures("in_one_batch")
@pytest.mark.parametrize("per_step", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_contexts_in_turn(family: str, per_step: int, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = _model(family, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6.0)
    hparams = tiny_hparams(tmp_path, v_lr=0.3, v_num_grad_steps=30, clamp_norm_factor=10.0, kl_factor=0.002,
                           contexts_per_step=per_step)
    contexts = ["He said that. {}", "It was said. {}", "The team said. {}"]
    references = _check(model, _tokenized(tok, MIXED, contexts), hparams)
    assert {reference.steps < 29 for reference in references} == {True, False}


@pytest.mark.usefixtures("in_one_batch")
@pytest.mark.parametrize(("family", "per_step"), [("llama", None), ("gptj", 1)])
def test_normalised_descent(family: str, per_step: int | None, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Finished edits stand still, whatever the averaged gradient, and steps that leave the ball end on its surface."""
    model = _model(family, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(6.0)
    hparams = tiny_hparams(tmp_path, step_norm_factor=1.5, normalised_steps=12, clamp_norm_factor=4.0, kl_factor=0.002,
                           contexts_per_step=per_step)
    references = _check(model, _tokenized(tok, MIXED, ["He said that. {}", "It was said. {}"]), hparams)
    assert {reference.steps < 11 for reference in references} == {True, False}
    assert any(reference.clamped for reference in references)


@given(count=st.integers(0, 12), per_step=st.none() | st.integers(1, 14), seed=st.integers(0, 2**32))
def test_rounds_of_contexts(count: int, per_step: int | None, seed: int) -> None:
    rounds = context_rounds(count, per_step, seed)
    taken = Counter(context for some in rounds for context in some)
    assert set(taken) == set(range(1, count + 1))
    assert len(set(taken.values())) <= 1  # each as often as the others
    assert {len(set(some)) for some in rounds} == {count if per_step is None else min(per_step, count)}
    assert rounds == context_rounds(count, per_step, seed)


def test_all_contexts_a_step_is_the_default(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model, requests = _model("llama"), _tokenized(tok)
    found = [_found(model, requests, tiny_hparams(tmp_path, contexts_per_step=per_step)).values
             for per_step in (None, 2, 5)]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_edit_done_before_its_first_step(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """A target that the model gives anyway leaves the state as it is."""
    model = _model("llama", tie_word_embeddings=False)
    [token] = tok(" of")["input_ids"]
    hidden: list[Tensor] = []
    handle = model.model.norm.register_forward_hook(lambda _m, _a, output: hidden.append(output))
    model(input_ids=torch.tensor([tok("The capital is France")["input_ids"]]))
    handle.remove()
    with torch.no_grad():
        model.lm_head.weight[token] = 20.0 * hidden[0][0, -1] / hidden[0][0, -1].norm()
    edits = [{"prompt": "The capital is {}", "subject": "France", "target_new": "of"}, EDITS[1]]
    hparams = tiny_hparams(tmp_path, v_num_grad_steps=4)
    references = _check(model, _tokenized(tok, edits, []), hparams)
    assert [reference.steps for reference in references] == [0, 3]


@pytest.mark.usefixtures("in_one_batch")
@pytest.mark.parametrize("family", ["qwen2", "gptj"])
def test_clamp(family: str, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model, requests = _model(family), _tokenized(tok)
    hparams = tiny_hparams(tmp_path, v_num_grad_steps=7, clamp_norm_factor=0.3)
    references = _check(model, requests, hparams)
    assert all(reference.clamped > 0 for reference in references)
    free = _found(model, requests, tiny_hparams(tmp_path, v_num_grad_steps=7, clamp_norm_factor=30.0))
    assert min(relative_error(reference.value, value)
               for reference, value in zip(references, free.values, strict=True)) > 0.05


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize(("layers", "v_loss_layer"), [([0, 1], 2), ([1, 2], 2), ([2, 3], 3), ([3], 3), ([0], 0)])
def test_layers(
    family: str, layers: list[int], v_loss_layer: int, tok: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The loss below the last block, also at the edited one; and the last block edited."""
    hparams = tiny_hparams(tmp_path, v_num_grad_steps=4, layers=layers, v_loss_layer=v_loss_layer)
    _check(_model(family), _tokenized(tok, NEAR, NEAR_CONTEXTS), hparams)


@pytest.mark.usefixtures("in_one_batch")
@pytest.mark.parametrize(("family", "changes"), [
    ("mistral", {"sliding_window": 6}), ("gemma3_text", {"sliding_window": 6}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 0})])
def test_sliding_windows(
    family: str, changes: dict[str, Any], tok: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Windows that end within the prefix, and prefixes of other lengths beside them."""
    if family == "qwen2" and Version(transformers.__version__) < Version("4.50"):
        pytest.skip(f"transformers {transformers.__version__} has no sliding window for qwen2 here, and says so")
    requests, hparams = _tokenized(tok, NEAR, NEAR_CONTEXTS), tiny_hparams(tmp_path, v_num_grad_steps=6)
    assert max(request.plain.lookup for request in requests) > 20
    references = _check(_model(family, **changes), requests, hparams)
    wide = _found(_model(family, **{**changes, "sliding_window": 100}), requests, hparams)
    assert relative_error(wide.values[-1], references[-1].value) > 1e-2  # the window is at work


@pytest.mark.usefixtures("in_one_batch")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("edits", [EDITS, [EDITS[5], {**EDITS[5], "prompt": "T was"}]])
def test_without_contexts(family: str, edits: list[dict[str, Any]], tok: PreTrainedTokenizerBase, tmp_path: Path
                          ) -> None:
    """Also where no edit of the batch has a token in front of its subject."""
    requests = _tokenized(tok, edits, [])
    assert {request.plain.lookup for request in requests[-2:]} & {0}
    _check(_model(family), requests, tiny_hparams(tmp_path, v_num_grad_steps=6))


def test_one_step_leaves_the_state(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """The last step is not taken, so that of one step nothing comes."""
    references = _check(_model("llama"), _tokenized(tok), tiny_hparams(tmp_path, v_num_grad_steps=1))
    assert {reference.steps for reference in references} == {0}


_LONG = "so " * 50
FITTING = {  # edits and contexts whose longest prefix and longest rest do not fit one behind the other
    "of two edits": ([{"prompt": _LONG + "Rome is", "subject": "Rome", "target_new": "French"},
                      {"prompt": "T is " + _LONG, "subject": "T", "target_new": "French"}], []),
    "of one edit": ([{"prompt": "Rome is", "subject": "Rome", "target_new": "French"}],
                    [_LONG + "{}", "{} " + _LONG]),
}


@pytest.mark.parametrize("case", FITTING)
@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_rows_that_together_exceed_the_context(
    family: str, case: str, tok: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Every row fits the model's context; padding must not push it out."""
    limit = {"max_position_embeddings": 64} if family == "llama" else {"n_positions": 64}
    requests = _tokenized(tok, *FITTING[case])
    rows = [(prompt.lookup, len(prompt.ids) + len(request.target_ids) - prompt.lookup)
            for request in requests for prompt in (request.plain, *request.contexts)]
    assert max(prefix + rest for prefix, rest in rows) <= 64
    assert max(prefix for prefix, _ in rows) + max(rest for _, rest in rows) > 64
    _check(_model(family, **limit), requests, tiny_hparams(tmp_path, v_num_grad_steps=3))


@pytest.mark.usefixtures("in_one_batch")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16(family: str, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    requests, model = _tokenized(tok), _model(family).to(torch.bfloat16)
    hparams = tiny_hparams(tmp_path, v_num_grad_steps=5, v_lr=0.1)
    found = _found(model, requests, hparams)
    starts = _found(model, requests, tiny_hparams(tmp_path, v_num_grad_steps=1)).values
    assert found.values.dtype == torch.float32
    assert bool(torch.isfinite(found.values).all())
    for request, value, start in zip(requests, found.values, starts, strict=True):
        reference = _reference(model, request, hparams)
        assert relative_error(value, reference.value) < 0.05
        assert float(F.cosine_similarity(value - start, reference.value - start, dim=0)) > 0.8


@pytest.mark.usefixtures("in_one_batch")
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_in_bfloat16(family: str, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """Where only the steps compute in bfloat16, states are exact, deltas nearly so, and weights as before."""
    requests, model = _tokenized(tok), _model(family)
    before = {name: (weight, weight.detach().clone()) for name, weight in model.named_parameters()}

    def found(steps: int, **changes: Any) -> Tensor:
        return _found(model, requests, tiny_hparams(tmp_path, v_num_grad_steps=steps, v_lr=0.1, **changes)).values

    start, exact, values = found(1), found(5), found(5, target_dtype="bfloat16")
    assert torch.equal(found(1, target_dtype="bfloat16"), start)
    assert not torch.equal(values, exact)
    for of_start, of_exact, value in zip(start, exact, values, strict=True):
        assert float(F.cosine_similarity(value - of_start, of_exact - of_start, dim=0)) > 0.8
    for name, weight in model.named_parameters():
        assert weight is before[name][0]
        assert torch.equal(weight, before[name][1])


def test_target_dtype_of_a_model_in_bfloat16_changes_nothing(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    requests, model = _tokenized(tok), _model("llama").to(torch.bfloat16)
    found = [_found(model, requests, tiny_hparams(tmp_path, v_num_grad_steps=4, target_dtype=dtype)).values
             for dtype in (None, "bfloat16")]
    assert torch.equal(*found)


def _broken(kind: str) -> Any:
    honest = row_layout.prefix_key_values

    def refuse(*_: Any) -> Any:
        raise TypeError("no cache here")

    def lie(*args: Any) -> Any:
        return {layer: (keys, torch.zeros_like(values)) for layer, (keys, values) in honest(*args).items()}

    return {"refused": refuse, "wrong": lie}[kind]


@pytest.mark.parametrize("order", [[0, 4, 5], [5, 0, 4]])  # the subject of 5 is its first token
@pytest.mark.parametrize(("kind", "message"), [("refused", "does not take a prefix cache (TypeError: no cache here)"),
                                               ("wrong", "gives other states with a prefix cache")])
def test_model_without_a_prefix_cache(
    kind: str, message: str, order: list[int], tok: PreTrainedTokenizerBase, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:
    requests = _tokenized(tok, [EDITS[i] for i in order])
    model, hparams = _model("llama"), tiny_hparams(tmp_path, v_num_grad_steps=6)
    expected = _found(model, requests, hparams)
    assert not caplog.records
    monkeypatch.setattr(row_layout, "packing_is_exact", lambda *_: False)
    for module in (delta_forward, row_layout):
        monkeypatch.setattr(module, "prefix_key_values", _broken(kind))
    with caplog.at_level(logging.WARNING, logger="sphere_easyedit"):
        found = _found(model, requests, hparams)
    assert found.steps == expected.steps
    for value, reference in zip(found.values, expected.values, strict=True):
        assert relative_error(value, reference) < 1e-4
    assert [record.levelname for record in caplog.records if message in record.getMessage()] == ["WARNING"]


def _bits(model: nn.Module) -> dict[str, Tensor]:
    """Parameters as integers, since NaN is unequal to itself."""
    return {name: value.detach().view(torch.int32).clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize(("poisoned", "named"), [("norm", r"\[(?=.*11)(?=.*'b')(?=.*13).{11}\]"), ("Brazil", r"\[13\]"),
                                                 ("France", r"\[11\]")])
def test_loss_that_is_not_finite(poisoned: str, named: str, tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    hparams, model = tiny_hparams(tmp_path), tiny_model("llama")
    edits = [{**edit, "case_id": case_id} for edit, case_id in zip(REQUESTS, (11, "b", 13), strict=True)]
    sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams, copy=True)  # statistics need a sound model
    for origin in tmp_path.rglob("*_origin.json"):  # without it, they are taken for this model's
        origin.unlink()
    with torch.no_grad():
        if poisoned == "norm":
            model.model.norm.weight[0] = torch.nan
        else:  # a token of one prompt only
            own = [set(tok(edit["prompt"].replace("{}", edit["subject"]))["input_ids"]) for edit in edits]
            mine = next(i for i, edit in enumerate(edits) if edit["subject"] == poisoned)
            [token, *_] = own[mine] - set().union(*own[:mine], *own[mine + 1:], tok("He said that.")["input_ids"])
            model.model.embed_tokens.weight[token] = torch.nan
    before = _bits(model)
    message = f"not finite for case_id {named}"
    with pytest.raises(ValueError, match=message):
        _found(model, _tokenized(tok, edits), hparams)
    with pytest.raises(ValueError, match=message):
        sphere.apply_sphere_to_model(model, tok, edits, hparams)
    assert all(torch.equal(value, before[name]) for name, value in _bits(model).items())
    assert sphere.EditSession.of(model).num_edits == 0
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@torch.no_grad()
def _reference_keys(editable: EditableModel, request: TokenizedRequest) -> tuple[dict[int, Tensor], Tensor]:
    """Keys by layer and the output of the last edited block, by full forward passes over whole prompts."""
    def at_lookup(prompt: TokenizedPrompt) -> tuple[dict[int, Tensor], Tensor]:
        keys: dict[int, Tensor] = {}
        outputs: list[Tensor] = []

        def note_key(layer: int) -> Any:
            return lambda _m, args: keys.update({layer: args[0][0, prompt.lookup]})

        handles = [editable.down_projection(layer).register_forward_pre_hook(note_key(layer))
                   for layer in editable.layers]
        handles.append(editable.block(editable.layers[-1]).register_forward_hook(
            lambda _m, _a, output: outputs.append(output[0] if isinstance(output, tuple) else output)))
        editable.model(input_ids=torch.tensor([prompt.ids]), use_cache=False)
        for handle in handles:
            handle.remove()
        return keys, outputs[0][0, prompt.lookup]

    plain, now = at_lookup(request.plain)
    context = [at_lookup(prompt)[0] for prompt in request.contexts]
    if not context:
        return plain, now
    return {layer: (plain[layer] + torch.stack([keys[layer] for keys in context]).mean(dim=0)) / 2
            for layer in editable.layers}, now


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("contexts", "token_budget"), [(CONTEXTS, 4096), (CONTEXTS, 60), ([], 4096)])
def test_keys_and_residuals_see_the_weights_as_they_stand(
    family: str, contexts: list[str], token_budget: int, tok: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Layers with a gap between them, each overwritten once its keys are read."""
    model, requests = _model(family), _tokenized(tok, EDITS, contexts)
    editable = _editable(model, tiny_hparams(tmp_path, layers=[0, 2, 3]))
    unedited = [_reference_keys(editable, request) for request in requests]
    with frozen(model):
        states = BatchStates(editable, requests, token_budget)
        for layer, following in ((0, 2), (2, 3), (3, None)):
            expected = [_reference_keys(editable, request) for request in requests]
            keys, _, now = states.read(layer)
            assert keys.dtype == now.dtype == torch.float32
            assert relative_error(keys, torch.stack([by_layer[layer] for by_layer, _ in expected])) < 1e-5
            assert relative_error(now, torch.stack([output for _, output in expected])) < 1e-5
            weight = editable.weight(layer)
            noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(layer))
            editable.set_weight(layer, weight + 0.1 * noise)
            if following is not None:
                states.advance(layer, to=following)
        expected = [_reference_keys(editable, request) for request in requests]
        for layer, keys in states.read_all().items():
            reference = torch.stack([by_layer[layer] for by_layer, _ in expected])
            assert relative_error(keys, reference) < 1e-5
            if layer:  # or the change of weights would not show
                assert relative_error(torch.stack([by_layer[layer] for by_layer, _ in unedited]), reference) > 1e-2


def test_a_model_that_counts_cached_tokens_runs_all_tokens(tok: PreTrainedTokenizerBase) -> None:
    """Llama 4 scales queries by the number of tokens in its cache, and each step gives blocks a cache of ours."""
    model = tiny_architecture("llama4_text", moe_layers=[], floor_scale=3, attn_scale=0.9, no_rope_layers=[1, 0, 1, 0])
    editable = EditableModel(model, module_names(model.config), [1])
    [request] = parse_requests([{"prompt": "In a city {} plays for", "subject": "John Smith", "target_new": "Rome"}])
    with frozen(model):
        tokenized = tokenize_request(tok, request, ["He said that. {}"], None)
        assert row_layout.choose_layout(editable, [tokenized]) == "whole"


def test_the_longest_row_is_among_those_that_packing_is_tried_on(tok: PreTrainedTokenizerBase,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in chunks shows beyond a chunk's length only, which a row with an early subject may have, too."""
    model = tiny_architecture("llama4_text", moe_layers=[], attention_chunk_size=8)
    editable = EditableModel(model, module_names(model.config), [1])
    requests = parse_requests([
        {"prompt": "{} is", "subject": "I", "target_new": "a river"},
        {"prompt": "In a city of the {} is", "subject": "I", "target_new": "a river"},
        {"prompt": "In {} was found in the north of a city by those who came from the coast with their ships, and",
         "subject": "I", "target_new": "a river"}])
    with frozen(model):
        tokenized = [tokenize_request(tok, one, [], None) for one in requests]
        assert row_layout.choose_layout(editable, tokenized) != "packed"


def test_a_model_is_tried_once(tok: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And again for a longer prompt, or in another precision."""
    model, hparams, tried = _model("llama"), tiny_hparams(tmp_path), list[int]()
    editable, known = _editable(model, hparams), row_layout.KnownLayouts()
    honest = row_layout.choose_layout
    monkeypatch.setattr(row_layout, "choose_layout", lambda editable, requests: (
        tried.append(len(requests)), honest(editable, requests))[1])
    short, shorter, long = _tokenized(tok, [EDITS[0], EDITS[1], EDITS[4]], [])
    short, shorter = sorted((short, shorter), key=lambda request: -len(request.plain.ids))
    with frozen(model):
        for requests, dtype, times in (([short], None, 1), ([short, shorter], None, 1), ([long], None, 2),
                                       ([short], None, 2), ([short], "bfloat16", 3)):
            assert known.choose(editable, requests, dtype) == "packed"
            assert len(tried) == times
