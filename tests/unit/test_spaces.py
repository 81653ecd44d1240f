"""Where changes of weights lie: against a plain decomposition, in a run, in a resumed one, and told afterwards."""

from __future__ import annotations

import csv
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from helpers.models import tiny_hparams, tiny_model
from sphere_easyedit import EditEvent, EditSession, SPHEREHyperParams
from sphere_easyedit.callbacks.spaces import SpaceTracker, read_spaces_csv
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.runs.records import RunRecords
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.schema import NEURONS, SPACES, SpaceRecord
from sphere_easyedit.runs.sequential import RunSettings, run_sequential

SEEDS = st.integers(0, 2**31)


def rows(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def share_of(change: Tensor, weight: Tensor, gamma: float) -> tuple[float, int]:
    """The share of a change in a weight's principal space, and the space's rank, by a decomposition in float64."""
    there = weight.double().numpy()
    _, singular, directions = np.linalg.svd(there / np.linalg.norm(there, axis=1, keepdims=True), full_matrices=False)
    rank = min(int((np.cumsum(singular**2) / len(there) <= gamma).sum()) + 1, len(singular))
    inside = change.double().numpy() @ directions[:rank].T
    return float((inside**2).sum() / (change.double().numpy() ** 2).sum()), rank


def event(model: nn.Module, num_edits: int, weights: dict[int, Tensor], **more: Any) -> EditEvent:
    return EditEvent(model, weights, num_edits, num_edits // 2, (), **more)


@given(SEEDS, st.sampled_from([(6, 10), (10, 6)]), st.floats(0.1, 0.95), st.booleans(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_shares_are_those_of_a_plain_decomposition(tmp_path_factory: pytest.TempPathFactory, seed: int,
                                                   shape: tuple[int, int], gamma: float, pretrained: bool,
                                                   carried: bool) -> None:
    path, model = tmp_path_factory.mktemp("spaces") / "spaces.csv", tiny_model("llama")
    stages = [rows(seed + number, *shape) for number in range(3)]
    EditSession.of(model).original = {7: stages[0]}
    tracker = SpaceTracker(path, gamma, pretrained)
    weight = stages[0].clone()
    for number in (0, 1):
        grams = {7: weight @ weight.T} if carried else {}
        tracker.on_batch_start(event(model, 2 * number, {7: weight}, grams=grams))
        weight.copy_(stages[number + 1])  # in place, as editing does
        tracker.on_batch_end(event(model, 2 * number + 2, {7: weight}))
    for number, record in enumerate(tracker.records):
        share, rank = share_of(stages[number + 1] - stages[number], stages[0 if pretrained else number], gamma)
        assert record == SpaceRecord(2 * number, 2 * number + 2, 7, record.share, rank, shape[1])
        assert record.share == pytest.approx(share, rel=6e-4)
    assert read_spaces_csv(path) == tracker.records


def test_a_change_of_nothing_and_a_broken_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker, model = SpaceTracker(tmp_path / "spaces.csv", 0.5), nn.Linear(1, 1)
    weights = {1: rows(0, 4, 6), 2: rows(1, 4, 6)}
    tracker.on_batch_start(event(model, 0, weights))
    weights[2][0, 0] = torch.inf
    with caplog.at_level(logging.WARNING):
        tracker.on_batch_end(event(model, 2, weights))
    assert "layer 2: no share of the change from 0 to 2 edits" in caplog.text
    only, = read_spaces_csv(tmp_path / "spaces.csv")
    assert only.layer == 1
    assert np.isnan(only.share)
    with caplog.at_level(logging.WARNING):
        tracker.on_batch_start(event(model, 2, weights))
    assert "layer 2 has no principal space after 2 edits" in caplog.text
    tracker.on_batch_end(event(model, 4, {1: weights[1] + 1.0, 2: weights[2]}))
    assert [(record.num_edits, record.layer) for record in tracker.records] == [(2, 1), (4, 1)]


@pytest.mark.parametrize(("old", "new", "complaint"), [
    ("since,num_edits", "from,num_edits", "columns"), ("0,2,1", "0,2,one", "line 2"),
    ("0,2,1", "2,2,1", "impossible numbers"), (",6\r", "\r", "line 2"),
])
def test_damaged_files_are_refused(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    path, model = tmp_path / "spaces.csv", nn.Linear(1, 1)
    tracker = SpaceTracker(path, 0.5)
    tracker.on_batch_start(event(model, 0, {1: rows(0, 4, 6)}))
    tracker.on_batch_end(event(model, 2, {1: rows(1, 4, 6)}))
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    with pytest.raises(ValueError, match=complaint) as caught:
        read_spaces_csv(path)
    assert str(path) in str(caught.value)


def run_it(folder: Path, name: str, tok: PreTrainedTokenizerBase, family: str, hparams: SPHEREHyperParams,
           **more: Any) -> Path:
    described = {"dataset": "demo", "data": None, "seed": 3, "order_seed": None, "skip": 0}
    measure = MeasureSettings(protocols=("paper",), before=False, every=2, seed=5)
    run_sequential(tiny_model(family), tok, load_records("demo", None, 5, 3), hparams,
                   RunSettings(folder / name, 2, described=described, measure=measure, **more))
    return folder / name


@pytest.mark.parametrize(("family", "method"), [
    ("llama", {"base_alg": "AlphaEdit"}), ("gpt2", {"base_alg": "MEMIT", "alpha": 0.0}),
    ("llama", {"base_alg": "PRUNE"}),
])
def test_what_a_run_writes(tmp_path: Path, tok: PreTrainedTokenizerBase, family: str, method: dict[str, Any]) -> None:
    hparams = tiny_hparams(tmp_path, v_num_grad_steps=3, **method)
    run = run_it(tmp_path, "run", tok, family, hparams)
    records = RunRecords.read(run)
    assert [(space.since, space.num_edits, space.layer) for space in records.spaces] == [
        (since, end, layer) for since, end in ((0, 2), (2, 4), (4, 5)) for layer in (1, 2)]
    assert all(0 < space.share < 1 and 0 < space.rank < space.d_in for space in records.spaces)
    assert records.neurons is not None
    assert (records.neurons.num_edits, records.neurons.seed, records.neurons.gamma) == (5, 5, 0.5)
    assert {layer: (found.sampled, found.d_in) for layer, found in records.neurons.layers.items()} == {
        1: (48, 80), 2: (48, 80)}
    last = {space.layer: space for space in records.spaces[:2]}
    for layer, found in records.neurons.layers.items():
        assert found.ranks[0] == last[layer].rank  # of the unedited weight, in both


def test_older_runs_have_neither(tmp_path: Path, tok: PreTrainedTokenizerBase) -> None:
    run = run_it(tmp_path, "run", tok, "llama", tiny_hparams(tmp_path, v_num_grad_steps=1))
    for name in (NEURONS, SPACES):
        (run / name).unlink()
    records = RunRecords.read(run)
    assert records.spaces == ()
    assert records.neurons is None
    (run / NEURONS).write_bytes(b"damaged")
    with pytest.raises(ValueError, match=NEURONS):
        _ = replace(records).neurons
    with (run / SPACES).open("w", newline="") as stream:
        csv.writer(stream).writerows([["since", "num_edits", "layer", "share", "rank", "d_in"],
                                      *[[0, 2, 1, 0.5, 3, 80]] * 2])
    with pytest.raises(ValueError, match="two lines"):
        RunRecords.read(run)
