"""Earlier keys in files that checkpoints share: the same bits, no file written twice, and damage is noticed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers import sessions
from helpers.models import edited_weights, tiny_model
from helpers.sessions import (
    BATCHES,
    Make,
    equal,
    folder,  # noqa: F401 - a fixture
    hparams_of,  # noqa: F401 - a fixture
)
from sphere_easyedit.editing import key_files
from sphere_easyedit.editing.checkpoints import remove_old_checkpoints, save_checkpoint, session_path
from sphere_easyedit.editing.session import resume_from


@pytest.fixture(autouse=True)
def two_keys_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_files, "KEYS_A_FILE", 2)


def edited(tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams, checkpoints: Path) -> nn.Module:
    """A model after 1, 3 and 5 edits, with a checkpoint each time."""
    model = tiny_model("llama")
    for batch in BATCHES:
        sessions.edit(model, tok, hparams, [batch])
        session = sphere.EditSession.of(model)
        session.drop_derived()
        save_checkpoint(hparams.editable(model), session, checkpoints)
    return model


def named(checkpoints: Path) -> list[str]:
    """Files of keys, without the digests."""
    return sorted(path.name.rpartition("-")[0] for path in checkpoints.glob("keys-*.safetensors"))


@pytest.mark.parametrize("method", ["AlphaEdit", "MEMIT_seq"])
def test_a_run_goes_on_to_the_bit_and_writes_no_key_twice(method: str, tok: PreTrainedTokenizerBase, hparams_of: Make,
                                                          tmp_path: Path) -> None:
    hparams = hparams_of(method, "llama")
    whole = edited(tok, hparams, tmp_path)
    assert named(tmp_path) == ["keys-2", "keys-4"]
    with safe_open(session_path(tmp_path, 5), framework="pt") as stored:
        assert stored.metadata()["format"] == "sphere-easyedit session 2"
        assert {stored.get_tensor(name).shape[1] for name in stored.keys() if name.startswith("keys.")} == {1}
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("keys-*")}

    model = tiny_model("llama")
    resume_from(hparams.editable(model), tmp_path, 3)
    sessions.edit(model, tok, hparams, BATCHES[2:])
    assert equal(edited_weights(model, hparams), edited_weights(whole, hparams))
    session, first = sphere.EditSession.of(model), sphere.EditSession.of(whole)
    assert all(torch.equal(session.history[layer].keys, first.history[layer].keys) for layer in first.history)
    save_checkpoint(hparams.editable(model), session, tmp_path)
    assert session.key_files == first.key_files
    kept = tmp_path / session.key_files[0]
    assert kept.stat().st_mtime_ns == written[kept]

    save_checkpoint(hparams.editable(model), session, tmp_path / "elsewhere")  # which lacks all of them
    assert named(tmp_path / "elsewhere") == ["keys-2", "keys-4"]
    session.save(tmp_path / "alone" / "session.safetensors")  # outside a folder of checkpoints: one file with all
    loaded = sphere.EditSession.load(tmp_path / "alone" / "session.safetensors")
    assert all(torch.equal(loaded.history[layer].keys, first.history[layer].keys) for layer in first.history)


def test_files_go_with_the_last_checkpoint_that_needs_them(tok: PreTrainedTokenizerBase, hparams_of: Make,
                                                           tmp_path: Path) -> None:
    hparams = hparams_of("AlphaEdit", "llama")
    edited(tok, hparams, tmp_path)
    (tmp_path / "keys-of-mine.safetensors").write_text("not ours")
    session_path(tmp_path, 5).unlink()
    remove_old_checkpoints(tmp_path, 1, set())
    assert named(tmp_path) == ["keys-2", "keys-of"]
    assert {path.suffix for path in tmp_path.glob("keys-2*")} == {".safetensors", ".sha256"}
    session_path(tmp_path, 3).write_bytes(b"damaged")  # then none can be told to be unused
    remove_old_checkpoints(tmp_path, 1, set())
    assert named(tmp_path) == ["keys-2", "keys-of"]


def test_damage_is_noticed_before_the_model_is_touched(tok: PreTrainedTokenizerBase, hparams_of: Make,
                                                       tmp_path: Path) -> None:
    hparams = hparams_of("AlphaEdit", "llama")
    session = sphere.EditSession.of(edited(tok, hparams, tmp_path))
    model = tiny_model("llama")
    before, path = edited_weights(model, hparams), tmp_path / session.key_files[1]
    raw = path.read_bytes()
    for damage in (lambda: path.write_bytes(raw[:-1] + b"\0"), path.unlink):
        damage()
        with pytest.raises(ValueError, match=rf"session-5\S+ is damaged \({path.name}.*: remove it, and resume from "
                                             "the checkpoint before, after 3 edits"):
            resume_from(hparams.editable(model), tmp_path, 5)
        assert equal(edited_weights(model, hparams), before)
    resume_from(hparams.editable(model), tmp_path, 3)
    sessions.edit(model, tok, hparams, BATCHES[2:])
    save_checkpoint(hparams.editable(model), sphere.EditSession.of(model), tmp_path)
    assert path.read_bytes() == raw


@pytest.mark.parametrize("name", ["../keys-2-0123456789abcdef.safetensors", "/etc/passwd", 7, "keys-2.safetensors"])
def test_a_made_up_name_is_refused(name: object, tok: PreTrainedTokenizerBase, hparams_of: Make, tmp_path: Path
                                   ) -> None:
    hparams = hparams_of("AlphaEdit", "llama")
    model = tiny_model("llama")
    sessions.edit(model, tok, hparams, BATCHES[:1])
    path = tmp_path / "session.safetensors"
    sphere.EditSession.of(model).save(path)
    with safe_open(path, framework="pt") as stored:
        metadata, tensors = stored.metadata(), {key: stored.get_tensor(key) for key in stored.keys()}
    metadata["state"] = json.dumps({**json.loads(metadata["state"]), "key_files": [name]})
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="is not the name of a file of keys"):
        sphere.EditSession.load(path)
