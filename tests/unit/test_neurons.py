"""How neurons lie before and after editing, against plain computations, and the file that keeps it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor

from sphere_easyedit import PrincipalSpace
from sphere_easyedit.callbacks.neurons import BINS, SAMPLE, NeuronRecord, NeuronTracker

SEEDS = st.integers(0, 2**31)


def rows(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def unit(weight: Tensor) -> np.ndarray:
    """Rows of length 1; those of length 0 left out."""
    there = weight.double().numpy()
    there = there[np.abs(there).sum(axis=1) > 0]
    return there / np.linalg.norm(there, axis=1, keepdims=True)


@given(SEEDS, st.sampled_from([(7, 12), (12, 7), (9, 9)]), st.floats(0.1, 1.0), st.booleans())
@settings(max_examples=30, deadline=None)
def test_records_are_those_of_a_plain_computation(seed: int, shape: tuple[int, int], gamma: float, zero: bool) -> None:
    before, after = rows(seed, *shape), rows(seed + 1, *shape)
    if zero:
        before[2] = after[3] = 0.0
    found = NeuronTracker({4: before}, gamma, seed).record({4: after}, 8).layers[4]
    alive = np.flatnonzero(before.numpy().any(axis=1))
    assert found.rows.tolist() == alive.tolist()  # fewer than are sampled
    norms = [np.linalg.norm(weight.numpy(), axis=1, keepdims=True) for weight in (before, after)]
    joint = np.concatenate([(weight.numpy() / np.where(norm > 0, norm, 1.0))[alive]
                            for weight, norm in zip((before, after), norms, strict=True)])
    assert np.allclose(found.cosines, joint @ joint.T, atol=1e-6)
    for side, weight in enumerate((before, after)):
        directions = unit(weight)
        count = len(directions)
        cosines = (directions @ directions.T)[np.triu_indices(count, 1)]
        assert found.histogram[side].tolist() == np.histogram(cosines, BINS, (-1, 1))[0].tolist()
        assert found.histogram[side].sum() == count * (count - 1) // 2
        values = np.zeros(min(shape))
        singular = np.linalg.svd(directions, compute_uv=False) ** 2
        values[: len(singular)] = singular[: len(values)]
        assert np.allclose(found.spectrum[side], values, atol=1e-5)
        assert found.ranks[side] == PrincipalSpace.from_weight(weight, gamma).rank


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_many_neurons_go_through_float32(gamma: float) -> None:
    weight = torch.nn.functional.pad(rows(0, 1100, 40).float(), (0, 1100)) + 0.02 * rows(1, 1100, 1140).float()
    found = NeuronTracker({0: weight}, gamma).record({0: weight}, 1).layers[0]
    directions = unit(weight)
    assert found.sampled == SAMPLE
    assert (np.diff(found.rows) > 0).all()
    sampled = directions[found.rows]
    assert np.allclose(found.cosines, np.tile(sampled @ sampled.T, (2, 2)), atol=1e-6)
    cosines = (directions @ directions.T)[np.triu_indices(1100, 1)]
    moved = np.abs(found.histogram[0] - np.histogram(cosines, BINS, (-1, 1))[0]).sum()
    assert moved <= 120  # 0.01% of 604,450 pairs, counted where they left and where they came: those on a bin's edge
    assert np.allclose(found.spectrum[0], np.linalg.svd(directions, compute_uv=False) ** 2, atol=1e-4)
    assert found.ranks[1] == PrincipalSpace.from_weight(weight, gamma).rank
    assert (found.histogram[0] == found.histogram[1]).all()


def test_neurons_are_drawn_by_seed_and_layer() -> None:
    weights = {layer: rows(layer, 300, 5) for layer in (1, 2)}
    one, same, other = (NeuronTracker(weights, 0.5, seed).record(weights, 1).layers for seed in (0, 0, 1))
    assert (one[1].rows == same[1].rows).all()
    assert (one[1].rows != other[1].rows).any()
    assert (one[1].rows != one[2].rows).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_record_is_read_as_it_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    watch = NeuronTracker({3: rows(0, 6, 9).to(dtype), 5: rows(1, 6, 9).to(dtype)}, 0.25, 11)
    record = watch.record({3: rows(2, 6, 9).to(dtype), 5: rows(3, 6, 9).to(dtype)}, 40)
    record.write(tmp_path / "one.safetensors")
    read = NeuronRecord.read(tmp_path / "one.safetensors")
    assert (read.num_edits, read.seed, read.gamma, list(read.layers)) == (40, 11, 0.25, [3, 5])
    for layer, found in read.layers.items():
        assert found.d_in == 9
        for name in ("rows", "cosines", "histogram", "spectrum", "ranks"):
            assert (getattr(found, name) == getattr(record.layers[layer], name)).all()
    read.write(tmp_path / "two.safetensors")
    assert (tmp_path / "two.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()


def test_a_broken_model_leaves_the_last_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, weight = tmp_path / "neurons.safetensors", rows(0, 6, 9)
    watch = NeuronTracker({0: weight}, 0.5)
    watch.write(path, {0: weight}, 2)
    written = path.read_bytes()
    broken = weight.clone()
    broken[1, 1] = torch.nan
    with caplog.at_level(logging.WARNING):
        watch.write(path, {0: broken}, 4)
    assert "no record of neurons after 4 edits" in caplog.text
    assert path.read_bytes() == written
    with pytest.raises(ValueError, match="finite"):
        NeuronTracker({0: broken}, 0.5)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path, weight = tmp_path / "neurons.safetensors", rows(0, 6, 9)
    NeuronTracker({0: weight}, 0.5).write(path, {0: weight}, 2)
    whole, tensors = path.read_bytes(), load_file(path)
    name = str(path)

    def refused(complaint: str) -> None:
        with pytest.raises(ValueError, match=complaint) as caught:
            NeuronRecord.read(path)
        assert name in str(caught.value)

    path.write_bytes(whole[: len(whole) // 2])
    refused("Safetensor")
    save_file(tensors, path)
    refused("KeyError")
    path.write_bytes(whole.replace(b'{\\"format\\": \\"1\\"', b'{\\"format\\": \\"9\\"'))
    refused("format is '9'")
    path.unlink()
    refused("NotFound")
    for tensor, damaged in (("histogram.0", tensors["histogram.0"][:, 1:]), ("rank.0", tensors["rank.0"][:1]),
                            ("cosines.0", tensors["cosines.0"].astype(np.float64)), ("rows.0", tensors["rows.0"][1:]),
                            ("spectrum.0", tensors["spectrum.0"][0])):
        path.write_bytes(whole)
        with safe_open(path, framework="np") as stored:
            metadata = stored.metadata()
        save_file({**tensors, tensor: np.ascontiguousarray(damaged)}, path, metadata)
        refused(tensor if tensor != "rows.0" else "cosines.0")
