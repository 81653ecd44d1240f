"""EditSession: whose it is, when it starts afresh, and that it survives being saved."""

from __future__ import annotations

import copy
import gc
import io
import json
import logging
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import edited_weights, relative_error, tiny_model
from helpers.sessions import (
    BATCHES,
    Make,
    edit,
    equal,
    folder,  # noqa: F401 - a fixture
    hparams_of,  # noqa: F401 - a fixture
)
from sphere_easyedit.models.architecture import EditableModel
from sphere_easyedit.models.fingerprint import Fingerprint

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
# Every native state there is to carry: earlier keys of either kind, unrestrained weights, none.
method = pytest.mark.parametrize("method", ["AlphaEdit", "AlphaEdit pretrained", "MEMIT", "MEMIT_seq", "PRUNE"])


def put_back(model: nn.Module, hparams: sphere.SPHEREHyperParams, weights: dict[int, Tensor]) -> None:
    """Overwrite the edited weights from outside."""
    names = hparams.module_names(model.config)
    with torch.no_grad():
        for layer, weight in weights.items():
            model.get_parameter(f"{names.rewrite_module_tmp.format(layer)}.weight").copy_(weight)


# --- whose it is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True], ids=["on the model", "given"])
def test_state_goes_with_the_model(given: bool, tok: PreTrainedTokenizerBase, hparams_of: Make) -> None:
    model, session = tiny_model("llama"), sphere.EditSession()
    names = list(model.state_dict())
    edit(model, tok, hparams_of("AlphaEdit pretrained"), BATCHES[:1], session=session if given else None)
    session = session if given else sphere.EditSession.of(model)
    assert session.num_edits == 1
    assert list(model.state_dict()) == names
    watched, gone = weakref.ref(session), weakref.ref(model)
    del model
    if not given:
        del session
    gc.collect()
    assert gone() is None
    assert (watched() is None) == (not given)


def _pickled(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def _saved(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    loaded: nn.Module = torch.load(stream, weights_only=False)
    return loaded


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved])
def test_copies_take_no_session_along(duplicate: Callable[[nn.Module], nn.Module], tok: PreTrainedTokenizerBase,
                                      hparams_of: Make) -> None:
    model, hparams = tiny_model("llama"), hparams_of()
    edit(model, tok, hparams, BATCHES[:1])
    session = sphere.EditSession.of(model)
    copied = duplicate(model)
    assert sphere.EditSession.of(copied).num_edits == 0
    assert sphere.EditSession.of(copied).history == {}
    # What is edited next is a first batch on the copy, and a second one on the model.
    fresh = tiny_model("llama")
    fresh.load_state_dict(model.state_dict())
    second = edit(model, tok, hparams, BATCHES[1:2])
    assert equal(edit(copied, tok, hparams, BATCHES[1:2]), edit(fresh, tok, hparams, BATCHES[1:2]))
    assert sphere.EditSession.of(model) is session
    assert session.num_batches == 2
    assert not equal(second, edited_weights(copied, hparams))


def test_session_of_another_model_is_refused(tok: PreTrainedTokenizerBase, hparams_of: Make) -> None:
    model, other, hparams = tiny_model("llama"), tiny_model("llama"), hparams_of()
    session = sphere.EditSession()
    edit(model, tok, hparams, BATCHES[:1], session=session)
    before = edited_weights(other, hparams)
    with pytest.raises(ValueError, match=r"belongs to another model object.*its own session"):
        edit(other, tok, hparams, BATCHES[1:2], session=session)
    assert equal(edited_weights(other, hparams), before)
    assert session.num_batches == 1
    edit(model, tok, hparams, BATCHES[1:2], session=session)  # still good for its own
    assert session.num_batches == 2


@method
def test_two_models_interleaved(method: str, tok: PreTrainedTokenizerBase, hparams_of: Make) -> None:
    mine, yours = hparams_of(method), hparams_of(method, "gpt2", alpha=0.3)
    alone = edit(tiny_model("llama"), tok, mine, BATCHES), edit(tiny_model("gpt2"), tok, yours, BATCHES[::-1])
    first, second = tiny_model("llama"), tiny_model("gpt2")
    for i in range(3):
        edit(first, tok, mine, [BATCHES[i]])
        edit(second, tok, yours, [BATCHES[2 - i]])
    assert equal(edited_weights(first, mine), alone[0])
    assert equal(edited_weights(second, yours), alone[1])


# --- when it starts afresh ----------------------------------------------------------------------------------


@method
def test_restored_weights_start_afresh(method: str, tok: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture,
                                       hparams_of: Make) -> None:
    model, hparams = tiny_model("llama"), hparams_of(method)
    original = edited_weights(model, hparams)
    expected = edit(tiny_model("llama"), tok, hparams, BATCHES[1:])
    edit(model, tok, hparams, BATCHES[:2])
    put_back(model, hparams, original)
    caplog.clear()
    with caplog.at_level(logging.INFO):
        found = edit(model, tok, hparams, BATCHES[1:])
    messages = [record.getMessage() for record in caplog.records if "starting afresh" in record.getMessage()]
    assert len(messages) == 1
    assert "layers [1, 2] were restored from outside after 3 edits" in messages[0]
    assert equal(found, expected)
    assert sphere.EditSession.of(model).num_edits == 4
    assert sphere.EditSession.of(model).num_batches == 2


@method
def test_other_weights_start_afresh(method: str, tok: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture,
                                    hparams_of: Make) -> None:
    """Not put back but changed: what was original is forgotten as well."""
    model, hparams = tiny_model("llama"), hparams_of(method)
    other = {layer: weight.roll(1, 0) for layer, weight in edited_weights(model, hparams).items()}
    fresh = tiny_model("llama")
    put_back(fresh, hparams, other)
    expected = edit(fresh, tok, hparams, BATCHES[1:])
    edit(model, tok, hparams, BATCHES[:1])
    put_back(model, hparams, other)
    found = edit(model, tok, hparams, BATCHES[1:])
    assert "starting afresh" in caplog.text
    assert equal(found, expected)
    assert equal(sphere.EditSession.of(model).original, other)


@method
def test_undisturbed_session_goes_on(method: str, tok: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture,
                                     hparams_of: Make) -> None:
    model, hparams = tiny_model("llama"), hparams_of(method)
    with caplog.at_level(logging.INFO):
        edit(model, tok, hparams, BATCHES)
    assert "afresh" not in caplog.text
    session = sphere.EditSession.of(model)
    assert (session.num_edits, session.num_batches) == (5, 3)
    assert equal(session.original, edited_weights(tiny_model("llama"), hparams))


@method
def test_weights_changed_after_a_first_batch_that_failed(method: str, tok: PreTrainedTokenizerBase,
                                                         hparams_of: Make) -> None:
    """A session that has seen a model but not edited it must not take that sight for the original weights."""
    model, hparams = tiny_model("llama"), hparams_of(method)
    other = {layer: weight.roll(1, 0) for layer, weight in edited_weights(model, hparams).items()}
    fresh = tiny_model("llama")
    put_back(fresh, hparams, other)
    expected = edit(fresh, tok, hparams, BATCHES[:2])
    with pytest.raises(ValueError, match="subject"):
        edit(model, tok, hparams, [[{"prompt": "No such thing", "subject": "Rome", "target_new": "Paris"}]])
    put_back(model, hparams, other)
    found = edit(model, tok, hparams, BATCHES[:2])
    assert equal(found, expected)
    assert equal(sphere.EditSession.of(model).original, other)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("layer", [1, 2])
def test_one_ulp_is_noticed(layer: int, family: str, tok: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture,
                            hparams_of: Make) -> None:
    model, hparams = tiny_model(family), hparams_of("MEMIT", family)
    weights = edit(model, tok, hparams, BATCHES[:1])
    weights[layer][3, 5] = torch.nextafter(weights[layer][3, 5], torch.tensor(torch.inf))
    put_back(model, hparams, weights)
    edit(model, tok, hparams, BATCHES[1:2])
    assert f"weights of layers [{layer}] were changed" in caplog.text
    assert sphere.EditSession.of(model).num_batches == 1


@PROPERTY
@given(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]), st.integers(0, 10**6),
       st.integers(0, 6), st.integers(0, 8), st.booleans(), st.booleans())
def test_fingerprint_notices_one_ulp_anywhere(dtype: torch.dtype, seed: int, row: int, column: int, up: bool,
                                              transposed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    stored = torch.randn(9, 7, generator=generator).to(dtype)
    weight = stored.T if transposed else stored.T.contiguous()
    before = Fingerprint.of(weight)
    assert before == Fingerprint.of(weight.contiguous())
    changed = weight.clone()
    bits = changed.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()])
    bits[row, column] += 1 if up else -1  # the neighbouring number
    assert not torch.equal(changed, weight)
    assert Fingerprint.of(changed) != before


def test_fingerprint_notices_signs_of_zero_and_exchanges() -> None:
    zeros = torch.zeros(3, 4)
    negative = zeros.clone()
    negative[1, 2] = -0.0
    assert Fingerprint.of(negative) != Fingerprint.of(zeros)
    weight = torch.arange(12.0).reshape(3, 4)
    assert Fingerprint.of(weight.flip(0)) != Fingerprint.of(weight)
    assert Fingerprint.of(weight.flip(1)) != Fingerprint.of(weight)
    assert Fingerprint.of(weight) != "no fingerprint"


@pytest.mark.parametrize("changes", [
    {"L2": 0.2}, {"nullspace_share": 0.5}, {"layers": [1]}, {"seed": 1}, {"context_templates": ["Well, {}"]},
    {"base_alg": "MEMIT"}, {"mom2_n_samples": 11}], ids=str)
def test_settings_that_shape_the_state_start_afresh(
    changes: dict[str, Any], tok: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture,
    hparams_of: Make,
) -> None:
    caplog.set_level(logging.INFO)
    model, hparams, other = tiny_model("llama"), hparams_of(), hparams_of(**changes)
    edit(model, tok, hparams, BATCHES[:1])
    fresh = tiny_model("llama")
    fresh.load_state_dict(model.state_dict())
    found = edit(model, tok, other, BATCHES[1:2])
    assert "hyperparameters that shape the session changed after 1 edits: starting afresh" in caplog.text
    assert sphere.EditSession.of(model).num_edits == 2
    assert equal(found, edit(fresh, tok, other, BATCHES[1:2]))


@pytest.mark.parametrize("changes", [
    {"token_budget": 40}, {"device": "cpu"}, {"batch_size": 7}, {"v_lr": 0.3}, {"v_num_grad_steps": 3},
    {"clamp_norm_factor": 2.0}], ids=str)
def test_settings_that_shape_nothing_go_on(changes: dict[str, Any], tok: PreTrainedTokenizerBase,
                                           hparams_of: Make) -> None:
    model = tiny_model("llama")
    edit(model, tok, hparams_of(), BATCHES[:1])
    edit(model, tok, hparams_of(**changes), BATCHES[1:2])
    session = sphere.EditSession.of(model)
    assert (session.num_edits, session.num_batches) == (3, 2)
    assert session.history[1].keys.shape == (80, 3)


def test_other_settings_with_a_bad_request_leave_the_session(tok: PreTrainedTokenizerBase, hparams_of: Make) -> None:
    """A call that raises leaves the session as it was, even if a good one would have started afresh."""
    model, hparams = tiny_model("llama"), hparams_of()
    expected = edit(tiny_model("llama"), tok, hparams, BATCHES[:2])
    edit(model, tok, hparams, BATCHES[:1])
    with pytest.raises(ValueError, match="subject"):
        edit(model, tok, hparams_of(L2=0.2), [[{"prompt": "No such thing", "subject": "Rome", "target_new": "Paris"}]])
    assert sphere.EditSession.of(model).num_edits == 1
    assert equal(edit(model, tok, hparams, BATCHES[1:2]), expected)


# --- saving and loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@method
def test_saved_session_goes_on(method: str, family: str, tok: PreTrainedTokenizerBase, tmp_path: Path,
                               caplog: pytest.LogCaptureFixture, hparams_of: Make) -> None:
    hparams = hparams_of(method, family)
    expected = edit(tiny_model(family), tok, hparams, BATCHES)
    model = tiny_model(family)
    edit(model, tok, hparams, BATCHES[:2])
    saved = sphere.EditSession.of(model)
    saved.save(tmp_path / "deep" / "session.safetensors")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    session = sphere.EditSession.load(tmp_path / "deep" / "session.safetensors")
    assert (session.num_edits, session.num_batches, session.contexts) == (3, 2, saved.contexts)
    assert equal(session.original, saved.original)
    assert equal(session.unrestrained, saved.unrestrained)
    assert bool(session.unrestrained) == (method == "PRUNE")
    assert equal({layer: history.keys for layer, history in session.history.items()},
                 {layer: history.keys for layer, history in saved.history.items()})
    del model, saved

    loaded = tiny_model(family)
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    caplog.clear()
    found = edit(loaded, tok, hparams, BATCHES[2:], session=session)
    assert "afresh" not in caplog.text
    assert (session.num_edits, session.num_batches) == (5, 3)
    for layer, weight in expected.items():
        assert relative_error(found[layer], weight) < 1e-6
    # State matters: without it the third batch would have come out otherwise.
    stateless = tiny_model(family)
    stateless.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    if method != "MEMIT":
        assert relative_error(edit(stateless, tok, hparams, BATCHES[2:])[2], expected[2]) > 1e-5


def test_loaded_session_with_other_weights_starts_afresh(
    tok: PreTrainedTokenizerBase, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    hparams_of: Make,
) -> None:
    model, hparams = tiny_model("llama"), hparams_of()
    edit(model, tok, hparams, BATCHES[:1])
    sphere.EditSession.of(model).save(tmp_path / "session.safetensors")
    session = sphere.EditSession.load(tmp_path / "session.safetensors")
    unedited = tiny_model("llama")
    found = edit(unedited, tok, hparams, BATCHES[1:2], session=session)
    assert "starting afresh" not in caplog.text  # restored: worth no warning
    assert session.num_batches == 1
    assert equal(found, edit(tiny_model("llama"), tok, hparams, BATCHES[1:2]))


def test_generated_contexts_are_saved(tok: PreTrainedTokenizerBase, tmp_path: Path, hparams_of: Make) -> None:
    model, hparams = tiny_model("llama"), hparams_of(context_templates=None)
    edit(model, tok, hparams, BATCHES[:1])
    contexts = sphere.EditSession.of(model).contexts
    assert contexts is not None
    assert len(contexts) == 5
    assert all(template.count("{}") == 1 for template in contexts)
    edit(model, tok, hparams, BATCHES[1:2])
    assert sphere.EditSession.of(model).contexts == contexts  # made once, by the unedited model
    sphere.EditSession.of(model).save(tmp_path / "session.safetensors")
    assert sphere.EditSession.load(tmp_path / "session.safetensors").contexts == contexts


def test_unused_session_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not been used"):
        sphere.EditSession().save(tmp_path / "session.safetensors")
    assert list(tmp_path.iterdir()) == []


def _saved_session(tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams, path: Path) -> None:
    model = tiny_model("llama")
    edit(model, tok, hparams, BATCHES[:1])
    sphere.EditSession.of(model).save(path)


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "header", "text", "folder"])
def test_damaged_file_is_refused(damage: str, tok: PreTrainedTokenizerBase, tmp_path: Path, hparams_of: Make) -> None:
    path = tmp_path / "session.safetensors"
    _saved_session(tok, hparams_of(), path)
    raw = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "truncated": raw[: len(raw) // 2], "header": raw[:8] + b"x" + raw[9:],
                          "text": b"no session at all" * 50}[damage])
    with pytest.raises(ValueError, match=r"session\.safetensors"):
        sphere.EditSession.load(path)


@pytest.mark.parametrize("case", ["foreign", "other format", "no state", "bad state", "state without key",
                                  "tensor missing"])
def test_file_that_is_no_whole_session_is_refused(case: str, tok: PreTrainedTokenizerBase, tmp_path: Path,
                                                  hparams_of: Make) -> None:
    path = tmp_path / "session.safetensors"
    _saved_session(tok, hparams_of(), path)
    with safe_open(path, framework="pt") as stored:
        metadata = dict(stored.metadata())
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    state = json.loads(metadata["state"])
    if case == "foreign":
        metadata = {}
    elif case == "other format":
        metadata["format"] = "sphere-easyedit session 99"
    elif case == "no state":
        del metadata["state"]
    elif case == "bad state":
        metadata["state"] = "{"
    elif case == "state without key":
        del state["key"]
        metadata["state"] = json.dumps(state)
    else:
        del tensors["edited.columns.1"]
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"session\.safetensors"):
        sphere.EditSession.load(path)


def test_saving_is_atomic(tok: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                          hparams_of: Make) -> None:
    model, hparams, path = tiny_model("llama"), hparams_of(), tmp_path / "session.safetensors"
    edit(model, tok, hparams, BATCHES[:1])
    sphere.EditSession.of(model).save(path)
    content = path.read_bytes()
    edit(model, tok, hparams, BATCHES[1:2])

    def fail(_tensors: Any, target: Path, **_: Any) -> None:
        Path(target).write_bytes(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr("sphere_easyedit.editing.session.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        sphere.EditSession.of(model).save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == content


def test_session_of_a_bfloat16_model(tok: PreTrainedTokenizerBase, tmp_path: Path, hparams_of: Make) -> None:
    model, hparams = tiny_model("llama").to(torch.bfloat16), hparams_of("PRUNE")
    edit(model, tok, hparams, BATCHES[:1])
    sphere.EditSession.of(model).save(tmp_path / "session.safetensors")
    session = sphere.EditSession.load(tmp_path / "session.safetensors")
    editable = EditableModel(model, hparams.module_names(model.config), hparams.layers)
    assert session.original[1].dtype == torch.bfloat16
    assert equal(session.original, edited_weights(tiny_model("llama").to(torch.bfloat16), hparams))
    session.bind(editable, hparams)
    assert session.num_edits == 1
