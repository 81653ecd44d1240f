"""EditSession.rollback: bits as they were, and nothing changed where that can't be had."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
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
    state_of,
)
from sphere_easyedit.editing import session as session_room
from sphere_easyedit.editing.checkpoints import save_checkpoint, session_path, weights_path

ENDS = [1, 3, 5]
METHODS = ("AlphaEdit", "AlphaEdit pretrained", "MEMIT", "MEMIT_seq", "RECT", "PRUNE")


def edit(model: nn.Module, tok: PreTrainedTokenizerBase, hparams: sphere.SPHEREHyperParams,
         batches: Sequence[list[dict[str, Any]]], checkpoints: Path | None = None) -> dict[int, Tensor]:
    """The edited weights after some batches, each with a checkpoint as a run makes them if a folder is given."""
    for batch in batches:
        sessions.edit(model, tok, hparams, [batch])
        if checkpoints is not None:
            session = sphere.EditSession.of(model)
            session.drop_derived()
            save_checkpoint(hparams.editable(model), session, checkpoints)
    return edited_weights(model, hparams)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_editing_goes_on_as_if_it_had_stopped_there(method: str, family: str, tok: PreTrainedTokenizerBase,
                                                    hparams_of: Make, tmp_path: Path) -> None:
    hparams, model = hparams_of(method, family), tiny_model(family)
    edit(model, tok, hparams, BATCHES, tmp_path / "here")
    session = sphere.EditSession.of(model)
    for done, end in reversed(list(enumerate(ENDS[:2], start=1))):
        stopped = tiny_model(family)
        there = edit(stopped, tok, hparams, BATCHES[:done], tmp_path / f"stopped-{end}")
        session.rollback(end, tmp_path / "here")
        assert (session.num_edits, session.num_batches) == (end, done)
        assert equal(edited_weights(model, hparams), there)
        assert sphere.EditSession.of(model) is session
        # Other batches than before, so that nothing of the first time could be taken for them.
        further = [BATCHES[2], BATCHES[0]]
        assert equal(edit(model, tok, hparams, further), edit(stopped, tok, hparams, further))
        assert session.num_edits == sphere.EditSession.of(stopped).num_edits


@pytest.mark.parametrize("method", METHODS)
def test_to_nothing_needs_no_checkpoint(method: str, tok: PreTrainedTokenizerBase, hparams_of: Make) -> None:
    hparams, model = hparams_of(method), tiny_model("llama")
    original = edited_weights(model, hparams)
    edit(model, tok, hparams, BATCHES[:2])
    session = sphere.EditSession.of(model)
    metrics = dict(session.metrics)
    session.rollback(0)
    assert equal(edited_weights(model, hparams), original)
    assert (session.num_edits, session.num_batches, session.history, session.unrestrained) == (0, 0, {}, {})
    assert session.is_original(hparams.editable(model))
    assert session.metrics == metrics  # derived from the original weights, which are back
    assert equal(edit(model, tok, hparams, BATCHES[1:]), edit(tiny_model("llama"), tok, hparams, BATCHES[1:]))
    session.rollback(0)  # again, from elsewhere
    assert equal(edited_weights(model, hparams), original)


def test_forward_again(tok: PreTrainedTokenizerBase, hparams_of: Make, tmp_path: Path) -> None:
    hparams, model = hparams_of(), tiny_model("llama")
    last = edit(model, tok, hparams, BATCHES, tmp_path)
    session = sphere.EditSession.of(model)
    session.rollback(0)
    session.rollback(5, tmp_path)
    assert equal(edited_weights(model, hparams), last)
    assert session.history[1].keys.shape == (80, 5)


def test_a_change_from_outside_after_a_rollback_is_noticed(tok: PreTrainedTokenizerBase, hparams_of: Make,
                                                           caplog: pytest.LogCaptureFixture) -> None:
    hparams, model = hparams_of(), tiny_model("llama")
    edit(model, tok, hparams, BATCHES[:1])
    sphere.EditSession.of(model).rollback(0)
    with torch.no_grad():
        hparams.editable(model).parameter(1)[0, 0] += 1.0
    other = edited_weights(model, hparams)
    edit(model, tok, hparams, BATCHES[:1])
    assert "changed from outside" in caplog.text
    assert equal(sphere.EditSession.of(model).original, other)


def test_a_session_of_ones_own(tok: PreTrainedTokenizerBase, hparams_of: Make, tmp_path: Path) -> None:
    """One that does not live on the model object: what lives there stays, or stays absent."""
    hparams, model, session = hparams_of(), tiny_model("llama"), sphere.EditSession()
    for batch in BATCHES[:2]:
        sphere.apply_sphere_to_model(model, tok, batch, hparams, session=session)
        save_checkpoint(hparams.editable(model), session, tmp_path)
    session.rollback(1, tmp_path)
    assert session.num_edits == 1
    assert "_sphere_session" not in vars(model)


# --- refusals -----------------------------------------------------------------------------------------------


@pytest.fixture
def edited(tok: PreTrainedTokenizerBase, hparams_of: Make, tmp_path: Path
           ) -> tuple[nn.Module, sphere.SPHEREHyperParams, Path]:
    """A model after three batches, and the folder of its checkpoints."""
    hparams, model = hparams_of("PRUNE"), tiny_model("llama")
    edit(model, tok, hparams, BATCHES, tmp_path / "kept")
    return model, hparams, tmp_path / "kept"


def refused(model: nn.Module, hparams: sphere.SPHEREHyperParams, to: int, checkpoints: Path | None, match: str) -> None:
    session, weights = sphere.EditSession.of(model), edited_weights(model, hparams)
    before = state_of(session)
    with pytest.raises(ValueError, match=match):
        session.rollback(to, checkpoints)
    assert equal(edited_weights(model, hparams), weights)
    assert state_of(session) == before
    assert sphere.EditSession.of(model) is session


def test_what_was_not_kept_is_refused(edited: tuple[nn.Module, sphere.SPHEREHyperParams, Path]) -> None:
    model, hparams, kept = edited
    refused(model, hparams, 2, kept, r"can't roll back to 2 edits \(checkpoints are in .*possible are 0, 1, 3, 5")
    refused(model, hparams, -1, kept, "possible are 0, 1, 3, 5")
    refused(model, hparams, 3, None, r"no folder of checkpoints was given\): possible are 0$")
    session_path(kept, 3).unlink()  # weights alone are no checkpoint to go on from
    refused(model, hparams, 3, kept, "possible are 0, 1, 5")


def test_damaged_and_exchanged_files_are_refused(edited: tuple[nn.Module, sphere.SPHEREHyperParams, Path]) -> None:
    model, hparams, kept = edited
    weights, session = weights_path(kept, 1), session_path(kept, 1)
    whole = weights.read_bytes(), session.read_bytes()
    weights.write_bytes(whole[0][: len(whole[0]) // 2])
    refused(model, hparams, 1, kept, "weights-1")
    weights.write_bytes(whole[0])
    session.write_bytes(whole[1][: len(whole[1]) // 2])
    refused(model, hparams, 1, kept, "session-1")
    session.write_bytes(whole[1])
    # Whole files, but of another state, with no checksum that tells.
    weights.with_name(f"{weights.name}.sha256").unlink(missing_ok=True)
    save_file(load_file(weights_path(kept, 3)), weights)
    refused(model, hparams, 1, kept, r"not those that its session left, in layers \[1, 2\]")


def test_other_settings_and_other_models_are_refused(edited: tuple[nn.Module, sphere.SPHEREHyperParams, Path],
                                                     tok: PreTrainedTokenizerBase, hparams_of: Make, tmp_path: Path
                                                     ) -> None:
    model, hparams, _ = edited
    edit(tiny_model("llama"), tok, hparams_of("MEMIT_seq"), BATCHES[:1], tmp_path / "memit")
    refused(model, hparams, 1, tmp_path / "memit", "other hyperparameters than this session's")
    other = tiny_model("llama", initializer_range=0.1)
    edit(other, tok, hparams, BATCHES[:1], tmp_path / "other")
    refused(model, hparams, 1, tmp_path / "other", "other weights than this model's")


def test_another_dtype_is_refused(edited: tuple[nn.Module, sphere.SPHEREHyperParams, Path]) -> None:
    model, hparams, kept = edited
    model.to(torch.bfloat16)
    refused(model, hparams, 0, None, "dtype was changed")
    refused(model, hparams, 1, kept, "dtype was changed")


def test_an_interrupt_changes_nothing(edited: tuple[nn.Module, sphere.SPHEREHyperParams, Path],
                                      monkeypatch: pytest.MonkeyPatch) -> None:
    model, hparams, kept = edited
    session, weights = sphere.EditSession.of(model), edited_weights(model, hparams)
    before = state_of(session)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session_room.EditSession, "_changed_layers", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.rollback(1, kept)
    assert equal(edited_weights(model, hparams), weights)
    assert state_of(session) == before
    assert sphere.EditSession.of(model) is session


def test_a_session_without_a_model_is_refused(edited: tuple[nn.Module, sphere.SPHEREHyperParams, Path]) -> None:
    _, _, kept = edited
    with pytest.raises(ValueError, match="tied to no model"):
        sphere.EditSession().rollback(0)
    with pytest.raises(ValueError, match="tied to no model"):
        sphere.EditSession.load(session_path(kept, 1)).rollback(1, kept)
