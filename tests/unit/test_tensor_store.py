"""State of solves that lies elsewhere than where it is computed with gives the same bits, and takes no memory there."""

from __future__ import annotations

import errno
import gc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from helpers.models import REQUESTS, edited_weights, tiny_hparams, tiny_model
from helpers.paths import REPOSITORY
from sphere_easyedit import apply_sphere_to_model
from sphere_easyedit.editing.session import EditSession
from sphere_easyedit.methods import tensor_store
from sphere_easyedit.methods.solvers import (
    CholeskyFactor,
    CovarianceMetric,
    KeyHistory,
    KeyMetric,
    NullSpace,
    NullSpaceMetric,
    adjusted_keys,
)
from sphere_easyedit.methods.tensor_store import TensorStore

ROOT = REPOSITORY
CPU = torch.device("cpu")


def solved(method: str, width: int, sizes: list[int], seed: int, store: TensorStore | None) -> list[Tensor]:
    """Solutions of batches of these sizes, one after the other; more keys than the width are absorbed on the way."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    square = normal(width, 2 * width)
    metric: KeyMetric
    if method == "MEMIT":
        metric = CovarianceMetric(CholeskyFactor.of(square @ square.T / width, CPU, store), 3.0)
    else:
        columns = torch.linalg.qr(normal(width, width)).Q[:, : width // 2 + 1].contiguous()
        metric = NullSpaceMetric(NullSpace(columns, method == "complement").on(CPU, store), 0.5, store)
    history = KeyHistory.empty(width, metric, CPU, store)
    found = []
    for size in sizes:
        keys = normal(width, size)
        adjusted = adjusted_keys(history, keys)
        assert adjusted is not None
        found.append(adjusted)
        history = history.extended(keys)
    return [*found, history.keys]


@pytest.mark.parametrize("method", ["MEMIT", "null space", "complement"])
@given(width=st.integers(2, 24), sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), seed=st.integers(0, 99),
       limit=st.sampled_from([0, 500, 4000, 10**6]))
@settings(max_examples=25, deadline=None)
def test_where_state_lies_does_not_decide_about_bits(tmp_path_factory: pytest.TempPathFactory, method: str, width: int,
                                                     sizes: list[int], seed: int, limit: int) -> None:
    folder = tmp_path_factory.getbasetemp() / "state"
    plain = solved(method, width, sizes, seed, None)
    elsewhere = solved(method, width, sizes, seed, TensorStore(limit, folder))
    assert all(torch.equal(one, other) for one, other in zip(plain, elsewhere, strict=True))
    assert list(folder.iterdir()) == []  # mappings without a name


def test_a_store_respects_its_limit_and_reuses_freed_memory(tmp_path: Path) -> None:
    store = TensorStore(1000, tmp_path)
    first = store.put(torch.zeros(200))
    second = store.put(torch.arange(100.0))
    assert store._taken[CPU] == 800
    assert torch.equal(second, torch.arange(100.0))
    del first
    gc.collect()
    assert store._taken[CPU] == 0
    third = store.put(torch.ones(250))
    assert store._taken[CPU] == third.nbytes == 1000
    wide = torch.arange(40.0).view(4, 10)
    view = TensorStore(10**6).put(wide[:, :2])
    assert view.untyped_storage().nbytes() == view.nbytes  # what it is a view of is not kept with it
    assert TensorStore(0, tmp_path).put(torch.zeros(3, 0)).shape == (3, 0)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="state_folder .* can't be written"):
        TensorStore(0, tmp_path / "file" / "folder")
    with pytest.raises(ValueError, match="state_memory, .* is not given"):
        tiny_hparams(tmp_path, state_folder=str(tmp_path))
    with pytest.raises(ValueError, match="state_memory"):
        tiny_hparams(tmp_path, state_memory=-1)


def test_a_full_folder_leaves_the_model_as_it_was(tmp_path: Path, tok: PreTrainedTokenizerBase,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    hparams = tiny_hparams(tmp_path, state_memory=0, state_folder=str(tmp_path / "state"))
    apply_sphere_to_model(model, tok, REQUESTS[:1], hparams)
    before, session = edited_weights(model, hparams), EditSession.of(model)

    def full(*_: object) -> Tensor:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_store, "mapped_copy", full)
    with pytest.raises(ValueError, match="state_folder .* No space left .*: free disk space"):
        apply_sphere_to_model(model, tok, REQUESTS[1:], hparams)
    assert all(torch.equal(before[layer], weight) for layer, weight in edited_weights(model, hparams).items())
    assert session.num_edits == 1


@pytest.mark.parametrize(("base_alg", "family"), [("AlphaEdit", "llama"), ("MEMIT", "gpt2"), ("RECT", "qwen2")])
def test_editing_with_state_in_files_gives_the_same_bits(base_alg: str, family: str, tmp_path: Path,
                                                         tok: PreTrainedTokenizerBase) -> None:
    weights = []
    for changes in ({}, {"state_memory": 0, "state_folder": str(tmp_path / "state")}):
        model = tiny_model(family)
        hparams = tiny_hparams(tmp_path, base_alg=base_alg, keep_previous_keys=base_alg != "AlphaEdit", **changes)
        for start in (0, 1):
            apply_sphere_to_model(model, tok, REQUESTS[start: start + 2], hparams)
            session = EditSession.of(model)
            session.drop_derived()
            # As in a resumed run: histories are derived again from their keys.
            session.history = {layer: history.keys_only() for layer, history in session.history.items()}
        weights.append(edited_weights(model, hparams))
    assert all(torch.equal(weights[0][layer], weights[1][layer]) for layer in weights[0])
