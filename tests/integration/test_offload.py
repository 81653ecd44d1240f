"""Models whose weights accelerate keeps on the host or on disk are edited as if they were in memory."""

from __future__ import annotations

import copy
import gc
import hashlib
import logging
import tempfile
import weakref
from collections import UserDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import REQUESTS
from helpers.offloaded import (
    hparams_for,
    load,
    saved,  # noqa: F401 - a fixture
    split,
    stored,
)
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.checkpoints import save_checkpoint, save_weights
from sphere_easyedit.editing.session import EditSession, resume_from
from sphere_easyedit.models.architecture import EditableModel, frozen, input_device
from sphere_easyedit.models.fingerprint import model_fingerprint
from sphere_easyedit.models.loading import load_model
from sphere_easyedit.models.module_discovery import module_names
from sphere_easyedit.models.offload import (
    offloaded_weight,
    parameter_values,
    writable_parameter,
)
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.sequential import RunSettings, run_sequential

accelerate = pytest.importorskip("accelerate")

METHODS = ("AlphaEdit", "MEMIT", "RECT", "PRUNE")
MORE = [{"prompt": "{} was born in", "subject": "Ada Lovelace", "target_new": "Berlin"},
        {"prompt": "The mother tongue of {} is", "subject": "Victor Hugo", "target_new": "Dutch"}]


def digests(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def offloaded(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if offloaded_weight(model, name) is not None]


def same(first: dict[int, Tensor], second: dict[int, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[layer], second[layer]) for layer in first)


# --- edits --------------------------------------------------------------------------------------------------


def edit(model: nn.Module, tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams) -> list[Any]:
    """Edit two batches; what the tracker of hyperspherical energy found."""
    tracker = sphere.HETracker()
    for batch in (REQUESTS, MORE):
        sphere.apply_sphere_to_model(model, tok, batch, hparams, callbacks=[tracker])
    return tracker.records


CASES = [("llama", method) for method in METHODS] + [(family, method) for family in ("qwen2", "gpt2")
                                                    for method in ("AlphaEdit", "MEMIT")]


@pytest.mark.parametrize(("family", "method"), CASES)
def test_a_split_model_is_edited_to_the_same_bits(family: str, method: str, tok: PreTrainedTokenizerBase,
                                                  saved: Callable[[str], Path]) -> None:
    folder = saved(family)
    hparams = hparams_for(folder, base_alg=method)
    whole, parts = load(folder), split(folder, disk=(1, 2))
    before = digests(folder)
    unedited = stored(parts, hparams)
    assert hparams.editable(parts).offloaded_layers == [1, 2]
    expected = edit(whole, tok, hparams)  # which leaves statistics for the other
    assert edit(parts, tok, hparams) == expected
    assert same(stored(parts, hparams), stored(whole, hparams))
    assert not same(stored(parts, hparams), unedited)
    assert same(hparams.editable(parts).weights(), hparams.editable(whole).weights())
    assert digests(folder) == before  # the checkpoint that it is read from


def cpu_offloaded(folder: Path, scratch: Path) -> nn.Module:
    return accelerate.cpu_offload(load(folder))


def disk_offloaded(folder: Path, scratch: Path) -> nn.Module:
    return accelerate.disk_offload(load(folder), scratch)


def preloaded(folder: Path, scratch: Path) -> nn.Module:
    return accelerate.disk_offload(load(folder), scratch, preload_module_classes=["LlamaMLP"])


def all_on_disk(folder: Path, scratch: Path) -> nn.Module:
    return split(folder, disk=(0, 1, 2, 3), rest="disk", offload_folder=str(scratch))


def by_memory(folder: Path, scratch: Path) -> nn.Module:
    return load_model(str(folder), "auto", max_memory={"cpu": "700KB"}, offload_folder=scratch)[0]


@pytest.mark.parametrize("offload", [cpu_offloaded, disk_offloaded, preloaded, all_on_disk, by_memory])
def test_all_ways_of_offloading(offload: Callable[[Path, Path], nn.Module], tok: PreTrainedTokenizerBase,
                                saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = saved("llama")
    tok.save_pretrained(folder)
    hparams = hparams_for(folder)
    whole, away = load(folder), offload(folder, tmp_path)
    assert hparams.editable(away).offloaded_layers in ([1, 2], [2])
    assert input_device(away) == torch.device("cpu")
    before = digests(tmp_path)
    expected = edit(whole, tok, hparams)
    assert edit(away, tok, hparams) == expected
    assert same(stored(away, hparams), stored(whole, hparams))
    assert digests(tmp_path) == before  # nor are the weights that a later run may take for the model's


def test_a_weight_that_computes_on_another_device(tok: PreTrainedTokenizerBase, saved: Callable[[str], Path],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """There, ``weight`` is a copy: nothing may count on what is written into it, or on it following the model."""
    folder = saved("llama")
    hparams = hparams_for(folder, base_alg="PRUNE")
    whole = load(folder)
    expected = edit(whole, tok, hparams)
    plain = EditableModel.weight
    monkeypatch.setattr(EditableModel, "weight", lambda self, layer: plain(self, layer).clone())
    parts = split(folder)
    assert edit(parts, tok, hparams) == expected
    assert same(stored(parts, hparams), stored(whole, hparams))


def test_bfloat16(tok: PreTrainedTokenizerBase, saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    hparams = hparams_for(folder)
    whole, parts = load(folder, dtype=torch.bfloat16), split(folder, dtype=torch.bfloat16)
    expected = edit(whole, tok, hparams)
    assert edit(parts, tok, hparams) == expected
    assert same(stored(parts, hparams), stored(whole, hparams))
    assert stored(parts, hparams)[1].dtype == torch.bfloat16


# --- what is around edits -----------------------------------------------------------------------------------


class Fails(sphere.EditCallback):
    def on_batch_end(self, event: sphere.EditEvent) -> None:
        raise KeyboardInterrupt


def test_a_failed_batch_leaves_nothing(tok: PreTrainedTokenizerBase, saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    hparams = hparams_for(folder)
    parts = split(folder)
    before = stored(parts, hparams)
    with pytest.raises(KeyboardInterrupt):
        sphere.apply_sphere_to_model(parts, tok, REQUESTS, hparams, callbacks=[Fails()])
    assert same(stored(parts, hparams), before)


def test_rollback(tok: PreTrainedTokenizerBase, saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    hparams = hparams_for(folder)
    parts = split(folder)
    before = stored(parts, hparams)
    sphere.apply_sphere_to_model(parts, tok, REQUESTS, hparams)
    after = stored(parts, hparams)
    assert not same(after, before)
    EditSession.of(parts).rollback(0)
    assert same(stored(parts, hparams), before)
    sphere.apply_sphere_to_model(parts, tok, REQUESTS, hparams)
    assert same(stored(parts, hparams), after)


def test_checkpoints_of_one_go_on_in_the_other(tok: PreTrainedTokenizerBase, saved: Callable[[str], Path],
                                               tmp_path: Path) -> None:
    folder = saved("gpt2")
    hparams = hparams_for(folder)
    parts = split(folder)
    sphere.apply_sphere_to_model(parts, tok, REQUESTS, hparams)
    session = EditSession.of(parts)
    save_weights(hparams.editable(parts), tmp_path, session.num_edits)
    save_checkpoint(hparams.editable(parts), session, tmp_path)
    others = [split(folder, disk=(2,)), load(folder)]
    for other in others:
        EditSession.attach(other, resume_from(hparams.editable(other), tmp_path, session.num_edits))
        assert same(stored(other, hparams), stored(parts, hparams))
        sphere.apply_sphere_to_model(other, tok, MORE, hparams)
    assert same(*(stored(other, hparams) for other in others))
    session.rollback(session.num_edits, tmp_path)  # settles what is derived, as saving and loading does
    sphere.apply_sphere_to_model(parts, tok, MORE, hparams)
    assert same(stored(parts, hparams), stored(others[1], hparams))


def test_a_sequential_run_of_a_split_model(tok: PreTrainedTokenizerBase, saved: Callable[[str], Path], tmp_path: Path
                                           ) -> None:
    folder = saved("llama")
    hparams = hparams_for(folder)
    found = []
    for name, model in (("whole", load(folder)), ("split", split(folder))):
        result = run_sequential(model, tok, load_records("demo", None, 5, 0), hparams, RunSettings(
            tmp_path / name, 3, measure=MeasureSettings(shared_before=tmp_path / "before"), checkpoint_every=3))
        found.append({part: result.summary[part] for part in ("weights_sha256", "post", "num_edits")})
    assert found[0] == found[1]
    assert model_fingerprint(split(folder)) == model_fingerprint(load(folder))


def test_a_copy_is_edited_alone(tok: PreTrainedTokenizerBase, saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    hparams = hparams_for(folder)
    parts = split(folder)
    before = stored(parts, hparams)
    edited, originals = sphere.apply_sphere_to_model(parts, tok, REQUESTS, hparams, copy=True, return_orig_weights=True)
    once = stored(edited, hparams)
    assert not same(once, before)
    assert same(stored(parts, hparams), before)
    assert [torch.equal(weight, before[layer]) for layer, weight in zip((1, 2), originals.values(), strict=True)] \
        == [True, True]
    sphere.apply_sphere_to_model(parts, tok, REQUESTS, hparams)  # its own weights are in a file by now
    edited_twice = copy.deepcopy(parts)
    sphere.apply_sphere_to_model(edited_twice, tok, MORE, hparams)
    assert same(stored(parts, hparams), once)
    assert not same(stored(edited_twice, hparams), once)


def test_an_edited_model_is_saved(tok: PreTrainedTokenizerBase, saved: Callable[[str], Path], tmp_path: Path) -> None:
    folder = saved("llama")
    hparams = hparams_for(folder)
    parts = split(folder)
    sphere.apply_sphere_to_model(parts, tok, REQUESTS, hparams)
    parts.save_pretrained(tmp_path / "edited")
    again = load(tmp_path / "edited")
    assert same(stored(again, hparams), stored(parts, hparams))
    rest = {name: value for name, value in load(folder).state_dict().items() if "down_proj" not in name}
    assert all(torch.equal(again.state_dict()[name], value) for name, value in rest.items())


# --- weights that are lent ----------------------------------------------------------------------------------


def test_shapes_need_no_values(saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("llama", "gpt2"):
        parts = split(saved(family))
        loader = type(offloaded_weight(parts, parts_name(parts, 1)).weights.dataset)  # type: ignore[union-attr]
        with monkeypatch.context() as patched:
            patched.setattr(loader, "__getitem__", lambda self, key: pytest.fail(f"{key} was loaded"))
            editable = EditableModel(parts, module_names(parts.config), [1, 2])
            assert [editable.d_in(layer) for layer in (1, 2)] == [80, 80]
            assert editable.device(1) == torch.device("cpu")


def parts_name(model: Any, layer: int) -> str:
    return f"{module_names(model.config).rewrite_module_tmp.format(layer)}.weight"


def test_gradients_pass_offloaded_blocks_without_holding_them(saved: Callable[[str], Path],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved("llama")
    whole, parts = load(folder), split(folder, disk=(0, 1, 2, 3), rest="disk")
    loader = type(offloaded_weight(parts, parts_name(parts, 1)).weights.dataset)  # type: ignore[union-attr]
    plain, loaded = loader.__getitem__, []

    def getitem(self: Any, key: str) -> Tensor:
        tensor = plain(self, key)
        if tensor.dim() > 1:
            loaded.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    monkeypatch.setattr(loader, "__getitem__", getitem)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    gradients = []
    for model in (whole, parts):
        with frozen(model):
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            loss = model(inputs_embeds=embedded, labels=ids).loss
            gc.collect()
            held = sum(one() is not None for one in loaded)
            loss.backward()
        gradients.append(embedded.grad)
    assert torch.equal(*gradients)
    assert held == 0
    assert len(loaded) >= 2 * 4 * 7 + 2  # seven matrices a block there and back, the head twice, embeddings once
    # Outside of the context nothing is left of it.
    loss = parts(inputs_embeds=embedded, labels=ids).loss
    assert sum(one() is not None for one in loaded) > 4 * 7
    loss.backward()


def test_gradients_of_parts_of_matrices_and_of_broken_off_passes(saved: Callable[[str], Path]) -> None:
    parts = split(saved("llama"), disk=(1, 2))
    block, whole = (model.get_submodule("model.layers.1.mlp") for model in (parts, load(saved("llama"))))
    states = torch.randn(3, 48)
    found = []
    for mlp, model in ((block, parts), (whole, whole)):
        with frozen(model):
            handle = mlp.down_proj.register_forward_hook(stop)
            with pytest.raises(StopIteration):
                mlp(states)
            handle.remove()
            given = states.clone().requires_grad_()
            mlp(given).square().sum().backward()
            found.append(given.grad)
    assert torch.equal(*found)


def stop(*_: Any) -> None:
    raise StopIteration


def test_frozen_gives_flags_back_to_offloaded_parameters(saved: Callable[[str], Path]) -> None:
    parts = split(saved("llama"))
    chosen = "model.layers.1.self_attn.q_proj.weight"
    parts.get_parameter(chosen).requires_grad_(False)
    with frozen(parts):
        parts(torch.tensor([[1, 2]]))
        assert not any(parameter.requires_grad for parameter in parts.parameters())
    assert [name for name, parameter in parts.named_parameters() if not parameter.requires_grad] == [chosen]


def test_a_pass_that_broke_off_leaves_its_weight_where_nobody_reads_it(saved: Callable[[str], Path]) -> None:
    parts = split(saved("llama"))
    hparams = hparams_for(saved("llama"))
    module = parts.get_submodule("model.layers.1.mlp.down_proj")
    inside = module._old_forward
    module._old_forward = stop
    with pytest.raises(StopIteration):
        module(torch.zeros(1, 80))
    module._old_forward = inside
    assert not module.weight.is_meta  # accelerate's own doing
    wanted = torch.randn(48, 80)
    hparams.editable(parts).set_weight(1, wanted)
    assert torch.equal(stored(parts, hparams)[1], wanted)


def test_names_and_values(saved: Callable[[str], Path]) -> None:
    whole, parts = load(saved("llama")), split(saved("llama"), disk=(2,))
    assert {name.split(".layers.")[1][0] for name in offloaded(parts)} == {"2"}
    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter_values(parts, name), parameter)
        assert torch.equal(writable_parameter(parts, name), parameter)
    writable_parameter(parts, "model.layers.2.input_layernorm.weight").zero_()
    assert parameter_values(parts, "model.layers.2.input_layernorm.weight").abs().sum() == 0
    assert writable_parameter(whole, "lm_head.weight").data_ptr() == whole.lm_head.weight.data_ptr()
    bare = nn.Linear(2, 2, device="meta")
    with pytest.raises(ValueError, match="weight is on the meta device without a hook"):
        writable_parameter(bare, "weight")


def test_a_mapping_that_is_not_known_is_refused_before_anything_changes(tok: PreTrainedTokenizerBase,
                                                                        saved: Callable[[str], Path]) -> None:
    model = accelerate.cpu_offload(load(saved("llama")))
    hook = model.get_submodule("model.layers.1.mlp.down_proj")._hf_hook
    hook.weights_map = UserDict({"weight": hook.weights_map["weight"]})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj\.weight is offloaded into a UserDict"):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams_for(saved("llama")))


def test_where_no_copy_can_be_made(saved: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                   caplog: pytest.LogCaptureFixture) -> None:
    parts = split(saved("llama"), offload_folder=str(tmp_path / "away"))
    editable = hparams_for(saved("llama")).editable(parts)
    plain, tried = tempfile.TemporaryFile, []

    def without_room(**options: Any) -> Any:
        tried.append(options["dir"])
        if len(tried) == 1:
            raise OSError(28, "No space left on device")
        return plain(**options)

    monkeypatch.setattr(tempfile, "TemporaryFile", without_room)
    with caplog.at_level(logging.DEBUG, "sphere_easyedit.models.offload"):
        editable.weight(1)
    assert tried == [str(tmp_path / "away"), None]
    assert f"edited in a temporary file in {tempfile.gettempdir()}" in caplog.text

    def full(**options: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(ValueError, match=r"layers\.2.*offloaded to disk.*No space left.*a writable offload_folder"):
        editable.set_weight(2, torch.zeros(48, 80))
    monkeypatch.undo()
    assert float(editable.weight(2).abs().sum()) > 0


# --- loading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "options", "message"), [
    ("cpu", {"max_memory": {"cpu": "1GiB"}}, 'need a device map, but device is \'cpu\': give device "auto"'),
    (None, {"offload_folder": "x"}, "need a device map"),
])
def test_bounds_need_a_device_map(device: str | None, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model("nowhere", device, **options)


def test_memory_is_bounded(tok: PreTrainedTokenizerBase, saved: Callable[[str], Path]) -> None:
    folder = saved("llama")
    tok.save_pretrained(folder)
    assert offloaded(load_model(str(folder), "auto")[0]) == []
    model, _ = load_model(str(folder), "auto", max_memory={"cpu": 750_000})
    away = offloaded(model)
    held = sum(value.numel() * 4 for name, value in model.named_parameters() if name not in away)
    assert away and 0 < held <= 750_000
