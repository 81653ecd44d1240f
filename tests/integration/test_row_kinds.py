"""Rotary frequencies chosen by the longest row of a batch: every row is what a fresh model makes of it alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.metric_records import tokenizer
from helpers.models import relative_error, tiny_hparams, tiny_model
from sphere_easyedit.editing import row_layout
from sphere_easyedit.editing.keys import BatchStates
from sphere_easyedit.editing.requests import TokenizedRequest, parse_requests, tokenize_request
from sphere_easyedit.editing.target_values import optimise_target_values
from sphere_easyedit.evaluation import generation, teacher_forcing
from sphere_easyedit.evaluation.generation import generate_continuations
from sphere_easyedit.evaluation.perplexity import perplexity
from sphere_easyedit.evaluation.teacher_forcing import score_rows
from sphere_easyedit.methods import covariance
from sphere_easyedit.models.architecture import EditableModel, frozen
from sphere_easyedit.models.batching import group_by_class, length_class
from sphere_easyedit.models.module_discovery import module_names
from sphere_easyedit.models.row_logits import TargetRow

LIMIT = 16
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0}
FAMILIES = ("phi3", "llama", "gemma3_text")


def config_of(family: str) -> Any:
    """Phi-3 by ``longrope``, Llama by ``dynamic``; Gemma 3 by ``dynamic`` in its layers of full attention alone."""
    common = {"vocab_size": 1500, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "intermediate_size": 80, "bos_token_id": 0, "eos_token_id": 0,
              "pad_token_id": 0, "tie_word_embeddings": False}
    if Version(transformers.__version__) < Version("5") and family == "gemma3_text":
        pytest.skip("one kind of rotary embeddings for all layers")
    longrope = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
                "long_factor": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]}
    own: dict[str, dict[str, Any]] = {
        "phi3": {"max_position_embeddings": 128, "original_max_position_embeddings": LIMIT, **rope(longrope)},
        "llama": {"max_position_embeddings": LIMIT, **rope(DYNAMIC)},
        "gemma3_text": {"max_position_embeddings": LIMIT, "head_dim": 12, "sliding_window": 8,
                        "layer_types": ["sliding_attention", "full_attention"] * 2,
                        "rope_parameters": {"full_attention": {**DYNAMIC, "rope_theta": 10000.0},
                                            "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0}}},
    }
    return AutoConfig.for_model(family, **common, **own[family])


def rope(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of rotary embeddings as this release of transformers takes them."""
    if Version(transformers.__version__) < Version("5"):
        name = "type" if settings["rope_type"] == "longrope" else "rope_type"
        return {"rope_scaling": {name: settings["rope_type"], **{key: value for key, value in settings.items()
                                                                 if key != "rope_type"}}}
    return {"rope_parameters": {**settings, "rope_theta": 10000.0}}


def fresh(family: str) -> nn.Module:
    """A model that no call has been made of; its attention depends much on positions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(family)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@torch.no_grad()
def logits_alone(family: str, ids: Sequence[int]) -> Tensor:
    logits: Tensor = fresh(family)(torch.tensor([list(ids)])).logits[0]
    return logits


def test_rows_of_one_kind() -> None:
    phi, llama, plain = (length_class(config) for config in (config_of("phi3"), config_of("llama"),
                                                               tiny_model("llama").config))
    assert [phi(length) for length in (1, 16, 17, 100, 128)] == [0, 0, 1, 1, 1]
    assert [llama(length) for length in (1, 16, 17, 18, 100)] == [0, 0, 17, 18, 100]
    assert {plain(length) for length in (1, 128, 10**6)} == {0}
    assert group_by_class([3, 17, 16, 18, 17], phi) == [[0, 2], [1, 3, 4]]
    assert group_by_class([3, 17, 16, 18, 17], llama) == [[0, 2], [1, 4], [3]]
    assert group_by_class([], llama) == []
    gemma = length_class(config_of("gemma3_text"))
    assert [gemma(length) for length in (1, 16, 17, 18, 100)] == [0, 0, 17, 18, 100]


STEM = list(range(5, 17))  # 12 tokens
ROWS = [TargetRow([*STEM, 20], [30, 31]), TargetRow([*STEM, 20, 21, 22, 23], [24]),
        TargetRow([*STEM, 20, 21, 22, 23], [24, 25, 26]), TargetRow([*STEM, 20, 21, 22, 23], [24, 25, 27]),
        TargetRow([*STEM, *STEM], [40]), TargetRow([7], [8]),
        TargetRow([*STEM, 20, 21], [22, 23, 24]), TargetRow([*STEM, 20, 21, 22, 23, 24], [9])]


@pytest.mark.parametrize("packed", [True, False])
def test_scores(family: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of rows of which one is the beginning of another, and after rows that were longer."""
    if not packed:
        monkeypatch.setattr(teacher_forcing, "_packing_is_exact", lambda *_: False)
    assert {len(row.input_ids) for row in ROWS} >= {16, 17, 18}
    expected = []
    for row in ROWS:
        log_probs = logits_alone(family, row.input_ids).log_softmax(dim=-1)
        expected.append([float(log_probs[at, token]) for at, token in zip(row.positions, row.target, strict=True)])
    model = fresh(family)
    for rows in (list(range(len(ROWS))), list(reversed(range(len(ROWS))))):
        scores = score_rows(model, [ROWS[number] for number in rows], log_probs_for=range(len(rows)))
        for number, score in zip(rows, scores, strict=True):
            assert score.log_probs == pytest.approx(expected[number], abs=1e-4)
    # The model is as it was: what comes after is not by the longest row that was scored.
    with torch.no_grad():
        after = model(torch.tensor([ROWS[1].input_ids])).logits[0]
    assert torch.allclose(after, logits_alone(family, ROWS[1].input_ids), atol=1e-5)


def test_frequencies_matter(family: str) -> None:
    """The other kind's would be seen."""
    short, longer = ROWS[0].input_ids, ROWS[4].input_ids
    with torch.no_grad():
        beside = fresh(family)(torch.tensor([[*short, *[0] * (len(longer) - len(short))], longer])).logits
    assert (beside[0, : len(short)] - logits_alone(family, short)).abs().max() > 1e-2


EDITS = [
    {"prompt": "The capital of France is", "subject": "France", "target_new": "Rome"},
    {"prompt": "He said that the official language of the city, to which he came, is", "subject": "the city",
     "target_new": "German"},
    {"prompt": "He said that the man who plays for the team of the city is known as Danielle Darrieux",
     "subject": "Danielle Darrieux", "target_new": "the United States"},
]
CONTEXTS = ["He said that. {}", "The team of this city was first. {}"]


def requests_of(limit: int = LIMIT) -> list[TokenizedRequest]:
    """Edits with rows on both sides of the limit, one of them among the rows of a single edit."""
    tok = tokenizer("plain")
    found = [tokenize_request(tok, request, CONTEXTS, None) for request in parse_requests(EDITS)]
    sides = [{len(prompt.ids) + len(request.target_ids) - 1 > limit for prompt in (request.plain, *request.contexts)}
             for request in found]
    assert {True, False} in sides and {True} in sides
    return found


def editable_of(family: str) -> EditableModel:
    model = fresh(family)
    return EditableModel(model, module_names(model.config), [1, 2])


@pytest.mark.parametrize("layout", ["packed", "padded", "whole"])
def test_target_values(family: str, layout: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The losses reported are those of plain forward passes with the values put in, one row at a time."""
    if layout == "packed" and Version(transformers.__version__) < Version("4.48"):
        pytest.skip("transformers has no attention functions to choose from")
    if layout != "packed":
        monkeypatch.setattr(row_layout, "packing_is_exact", lambda *_: False)
    if layout == "whole":
        monkeypatch.setattr(row_layout, "prefix_is_exact", lambda *_: False)
    hparams = tiny_hparams(tmp_path, kl_factor=0.0, v_weight_decay=0.0, v_num_grad_steps=4, v_loss_layer=3)
    requests = requests_of()
    with frozen((editable := editable_of(family)).model):
        assert row_layout.choose_layout(editable, requests) == layout
        found = optimise_target_values(editable, requests, hparams)
    for number, request in enumerate(requests):
        assert found.losses[number] == pytest.approx(loss_alone(family, request, found.values[number]), rel=1e-5)
        with frozen((alone := editable_of(family)).model):
            value = optimise_target_values(alone, [request], hparams).values[0]
        assert relative_error(found.values[number], value) < 1e-3


@torch.no_grad()
def loss_alone(family: str, request: TokenizedRequest, value: Tensor) -> float:
    """Mean over the prompts of the target's mean negative log-likelihood, a plain forward pass each."""
    losses: list[float] = []
    delta: Tensor | None = None
    for prompt in (request.plain, *request.contexts):
        def add(_module: nn.Module, _args: Any, output: Any, at: int = prompt.lookup) -> None:
            nonlocal delta
            hidden = output[0] if isinstance(output, tuple) else output
            if delta is None:
                delta = value - hidden[0, at]
            hidden[0, at] += delta

        model = fresh(family)
        model.get_submodule(module_names(model.config).layer_module_tmp.format(2)).register_forward_hook(add)
        ids = [*prompt.ids, *request.target_ids[:-1]]
        log_probs = model(torch.tensor([ids])).logits[0, len(prompt.ids) - 1:].log_softmax(dim=-1)
        losses.append(-float(log_probs.gather(1, torch.tensor(request.target_ids)[:, None]).mean()))
    return math.fsum(losses) / len(losses)


@torch.no_grad()
def keys_alone(family: str, ids: Sequence[int], layer: int) -> Tensor:
    """The down-projection's input at every token, from a plain forward pass."""
    model, seen = fresh(family), []
    down = model.get_submodule(module_names(model.config).rewrite_module_tmp.format(layer))
    down.register_forward_pre_hook(lambda _module, args: seen.append(args[0][0]))
    model(torch.tensor([list(ids)]))
    return torch.cat(seen)


def test_keys(family: str) -> None:
    """Of the whole prompt, though only what is in front of the subject's end is read where the rest makes no odds."""
    requests = requests_of()
    assert any(prompt.lookup + 1 <= LIMIT < len(prompt.ids) for request in requests for prompt in request.contexts)
    with frozen((editable := editable_of(family)).model):
        keys = BatchStates(editable, requests, 256).read_all()
    for layer in (1, 2):
        for number, request in enumerate(requests):
            plain, *contexts = (keys_alone(family, prompt.ids, layer)[prompt.lookup]
                                for prompt in (request.plain, *request.contexts))
            expected = (plain + sum(contexts) / len(contexts)) / 2
            assert relative_error(keys[layer][number], expected) < 1e-4


def test_statistics(family: str) -> None:
    texts = [list(range(start, start + length)) for start, length in ((5, 9), (20, 30), (60, 16), (80, 17), (99, 31))]
    with frozen((editable := editable_of(family)).model):
        totals = covariance._sum_locally(editable, texts, [1, 2])
    for layer in (1, 2):
        keys = torch.cat([keys_alone(family, ids, layer) for ids in texts]).double()
        assert relative_error(totals[layer], keys.T @ keys) < 1e-4


def test_perplexity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of several lengths (which a model of ``dynamic`` has within its context only)."""
    tok = tokenizer("plain")
    texts = ["The official language of Brazil was said to be that of the United States, of which he is. " * 2,
             "Who is here?", "The capital of France is Rome"]
    losses = []
    for text in texts:
        ids = tok(text).input_ids
        for window in (ids[start: start + 24] for start in range(0, len(ids), 24)):
            log_probs = logits_alone("phi3", window).log_softmax(dim=-1)
            losses += [-float(log_probs[place - 1, window[place]]) for place in range(1, len(window))]
    found = perplexity(fresh("phi3"), tok, texts, window=24)
    assert (found.tokens, found.nll) == (len(losses), pytest.approx(math.fsum(losses) / len(losses), abs=1e-4))


PROMPTS = ["The capital", "The official language of Brazil is", "A", "Who is here, and why?",
           "He said that the man who plays for the team of the city is known"]


def test_generation(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that grow past the limit, and one that begins beyond it."""
    tok = tokenizer("plain")
    monkeypatch.setattr(generation, "max_positions", lambda _config: None)  # of ``dynamic`` it is where scaling begins
    lengths = [len(tok(prompt).input_ids) for prompt in PROMPTS]
    assert min(lengths) < 8 < LIMIT < max(lengths)
    for prompts, steps in ((PROMPTS, 24), (PROMPTS[:4], 4)):
        texts = generate_continuations(fresh(family), tok, prompts, steps)
        for prompt, text in zip(prompts, texts, strict=True):
            ids = tok(prompt).input_ids
            new: list[int] = []
            while len(new) < steps and (not new or new[-1] != tok.eos_token_id):
                new.append(int(logits_alone(family, ids + new)[-1].argmax()))
            assert text == generation._new_text(tok, ids, [token for token in new if token != tok.eos_token_id])


def test_cache_is_used_below_the_limit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tok, used = tokenizer("plain"), []
    honest: Callable[..., Any] = generation._with_cache

    def noting(model: Any, rows: Any, check: bool) -> Any:
        used.append(rows.first.shape[1])
        return honest(model, rows, check)

    monkeypatch.setattr(generation, "_with_cache", noting)
    long = len(tok(PROMPTS[4]).input_ids)
    generate_continuations(fresh("phi3"), tok, PROMPTS, 4)
    assert long in used and 1 in used and len(used) > 1
    used.clear()
    generate_continuations(fresh("phi3"), tok, [PROMPTS[1]], 12)  # grows past it
    assert not used


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_frequencies_of_longer_calls_are_forgotten(family: str) -> None:
    """Those of a call that was made before ours are not used, nor left behind."""
    model, row = fresh(family), list(range(5, 21))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.no_grad():
        model(torch.tensor([list(range(5, 35))]))
        assert any(not torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
        with frozen(model):
            assert torch.equal(model(torch.tensor([row])).logits[0], logits_alone(family, row))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
