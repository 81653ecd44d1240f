"""HETracker: what it records, what it writes, and how it goes on after an interruption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import REQUESTS, edited_weights, tiny_hparams, tiny_model
from sphere_easyedit.callbacks.energy_metrics import EnergyRecord
from sphere_easyedit.callbacks.he_tracker import read_energy_csv

LAYERS = (1, 2)


def weights_after(edits: int) -> dict[int, Tensor]:
    """Other weights for every number of edits."""
    generator = torch.Generator().manual_seed(100 + edits)
    return {layer: torch.randn(6, 9, generator=generator) for layer in LAYERS}


def event(edits: int, weights: Mapping[int, Tensor] | None = None, batch: int = 5) -> sphere.EditEvent:
    weights = weights_after(edits) if weights is None else weights
    return sphere.EditEvent(nn.Identity(), weights, edits, edits // batch, [])


def run(tracker: sphere.HETracker, batches: Sequence[int], batch: int = 5) -> None:
    """Batches numbered from 1, as an edit run tells a callback of them."""
    for number in batches:
        tracker.on_batch_start(event((number - 1) * batch))
        tracker.on_batch_end(event(number * batch))


def expected_records(counts: Sequence[int], layers: Sequence[int] = LAYERS) -> list[EnergyRecord]:
    energies = [{layer: float(sphere.hyperspherical_energy(weights_after(count)[layer])) for layer in layers}
                for count in counts]
    return [EnergyRecord(count, energy, {layer: energy[layer] / energies[0][layer] - 1.0 for layer in layers})
            for count, energy in zip(counts, energies, strict=True)]


# --- recording ----------------------------------------------------------------------------------------------


def test_records_before_the_first_and_after_each_batch() -> None:
    tracker = sphere.HETracker()
    run(tracker, [1, 2, 3])
    assert tracker.records == expected_records([0, 5, 10, 15])
    assert tracker.records[0].relative_change == {1: 0.0, 2: 0.0}
    assert len({record.energy[1] for record in tracker.records}) == 4


def test_every_second_batch() -> None:
    tracker = sphere.HETracker(every=2)
    run(tracker, [1, 2, 3, 4, 5])
    assert tracker.records == expected_records([0, 10, 20])


@pytest.mark.parametrize("every", [0, -1])
def test_every_below_one(every: int) -> None:
    with pytest.raises(ValueError, match=f"every is {every}; give 1"):
        sphere.HETracker(every=every)


def test_some_layers_only() -> None:
    tracker = sphere.HETracker(layers=[2])
    run(tracker, [1])
    assert tracker.records == expected_records([0, 5], layers=[2])


def test_unknown_layer() -> None:
    tracker = sphere.HETracker(layers=[1, 7])
    with pytest.raises(ValueError, match=r"track layers \[7\]: edited layers are \[1, 2\]"):
        run(tracker, [1])


def test_energies_of_a_real_run(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """GPT-2: its stored weights are transposed, the energy is of its neurons."""
    model = tiny_model("gpt2")
    hparams = tiny_hparams(tmp_path, base_alg="MEMIT", v_num_grad_steps=3)
    tracker = sphere.HETracker(tmp_path / "energy.csv")
    expected = [edited_weights(model, hparams)]
    for _ in range(2):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams, callbacks=[tracker])
        expected.append(edited_weights(model, hparams))
    assert [record.num_edits for record in tracker.records] == [0, 3, 6]
    for record, weights in zip(tracker.records, expected, strict=True):
        for layer in LAYERS:
            energy = float(sphere.hyperspherical_energy(weights[layer].T))
            assert record.energy[layer] == pytest.approx(energy, rel=1e-8)  # by a carried Gram matrix, or directly
    assert read_energy_csv(tmp_path / "energy.csv") == tracker.records


# --- the file -----------------------------------------------------------------------------------------------


def test_file_content_and_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "run" / "energy.csv"
    tracker = sphere.HETracker(path)
    tracker.on_batch_start(event(0))
    assert read_energy_csv(path) == expected_records([0])  # there before the first batch has ended
    tracker.on_batch_end(event(5))
    assert read_energy_csv(path) == expected_records([0, 5]) == tracker.records
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "num_edits,layer,energy,relative_change"
    assert len(lines) == 5
    last = tracker.records[1]
    assert lines[4] == f"5,2,{last.energy[2]!r},{last.relative_change[2]!r}"
    assert list(path.parent.iterdir()) == [path]  # no temporary file


def test_to_csv_elsewhere(tmp_path: Path) -> None:
    tracker = sphere.HETracker()
    run(tracker, [1, 2])
    assert list(tmp_path.iterdir()) == []
    tracker.to_csv(str(tmp_path / "copy.csv"))
    assert read_energy_csv(tmp_path / "copy.csv") == tracker.records


def test_interrupted_run_goes_on(tmp_path: Path) -> None:
    whole = sphere.HETracker(tmp_path / "whole.csv")
    run(whole, [1, 2, 3, 4])
    run(sphere.HETracker(tmp_path / "energy.csv"), [1, 2])
    second = sphere.HETracker(tmp_path / "energy.csv")
    run(second, [3, 4])
    assert second.records == whole.records
    assert (tmp_path / "energy.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()


def test_records_past_the_resumption_point_are_dropped(tmp_path: Path) -> None:
    """The last checkpoint may be older than the last record."""
    path = tmp_path / "energy.csv"
    run(sphere.HETracker(path), [1, 2, 3, 4])
    second = sphere.HETracker(path)
    second.on_batch_start(event(10))
    assert second.records == expected_records([0, 5, 10])
    other = weights_after(999)
    second.on_batch_end(event(15, other))
    assert [record.num_edits for record in read_energy_csv(path)] == [0, 5, 10, 15]
    assert read_energy_csv(path)[-1].energy == {
        layer: float(sphere.hyperspherical_energy(weight)) for layer, weight in other.items()}
    # The change is still against the unedited model.
    assert read_energy_csv(path)[-1].relative_change[1] == pytest.approx(
        read_energy_csv(path)[-1].energy[1] / expected_records([0])[0].energy[1] - 1)


def test_resuming_with_every(tmp_path: Path) -> None:
    path = tmp_path / "energy.csv"
    run(sphere.HETracker(path, every=2), [1, 2, 3])
    second = sphere.HETracker(path, every=2)
    run(second, [4, 5, 6])
    assert second.records == expected_records([0, 10, 20, 30])


def test_resuming_without_a_file_starts_with_what_is_there(tmp_path: Path) -> None:
    tracker = sphere.HETracker(tmp_path / "energy.csv")
    run(tracker, [3])
    assert [record.num_edits for record in tracker.records] == [10, 15]


def test_resuming_with_other_layers_is_refused(tmp_path: Path) -> None:
    """A layer without a first record has nothing to be compared with."""
    path = tmp_path / "energy.csv"
    run(sphere.HETracker(path, layers=[1]), [1])
    content = path.read_bytes()
    with pytest.raises(ValueError, match="layer"):
        run(sphere.HETracker(path, layers=[1, 2]), [2])
    assert path.read_bytes() == content


def test_new_run_starts_afresh(tmp_path: Path) -> None:
    path = tmp_path / "energy.csv"
    run(sphere.HETracker(path), [1, 2, 3])
    second = sphere.HETracker(path)
    run(second, [1])
    assert second.records == read_energy_csv(path) == expected_records([0, 5])
    run(second, [1, 2])  # the same tracker, a second run
    assert second.records == read_energy_csv(path) == expected_records([0, 5, 10])


def test_undone_batch_keeps_the_records_before_it(tmp_path: Path) -> None:
    """A batch that fails after it was recorded is undone; when it is tried again, the run's records are still there."""
    path = tmp_path / "energy.csv"
    tracker = sphere.HETracker(path)
    run(tracker, [1, 2, 2, 3])  # the second batch twice: its first try was undone
    assert tracker.records == expected_records([0, 5, 10, 15])
    assert read_energy_csv(path) == tracker.records


def test_undone_first_batch_leaves_no_stale_start() -> None:
    """The first batch failed before it was recorded, and the tracker goes on to another model."""
    tracker = sphere.HETracker()
    tracker.on_batch_start(event(0))
    other = weights_after(77)
    tracker.on_batch_start(event(0, other))
    tracker.on_batch_end(event(5))
    assert [record.num_edits for record in tracker.records] == [0, 5]
    assert tracker.records[0].energy[1] == float(sphere.hyperspherical_energy(other[1]))


# --- bad files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["", "num_edits,layer,energy", "num_edits,layer,energy,change",
                                    "layer,num_edits,energy,relative_change"])
def test_other_columns(header: str, tmp_path: Path) -> None:
    path = tmp_path / "energy.csv"
    path.write_text(f"{header}\n0,1,2.0,0.0\n", encoding="utf-8")
    with pytest.raises(ValueError, match="relative_change") as caught:
        read_energy_csv(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("line", ["5,1,12.0", "5,1,twelve,0.1", "5,one,12.0,0.1", "5.5,1,12.0,0.1", "5"])
def test_bad_line_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "energy.csv"
    content = f"num_edits,layer,energy,relative_change\n0,1,2.0,0.0\n{line}\n"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="line 3") as caught:
        read_energy_csv(path)
    assert str(path) in str(caught.value)
    with pytest.raises(ValueError, match="line 3"):
        run(sphere.HETracker(path), [2])
    assert path.read_text(encoding="utf-8") == content


def test_unusable_file_leaves_the_model_untouched(tok: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = tiny_model("llama")
    hparams = tiny_hparams(tmp_path, base_alg="MEMIT", v_num_grad_steps=2)
    sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams)
    before = edited_weights(model, hparams)
    (tmp_path / "energy.csv").write_text("something else\n", encoding="utf-8")
    with pytest.raises(ValueError, match="its columns are .*remove the file"):
        sphere.apply_sphere_to_model(model, tok, REQUESTS, hparams,
                                     callbacks=[sphere.HETracker(tmp_path / "energy.csv")])
    assert all(torch.equal(before[layer], weight) for layer, weight in edited_weights(model, hparams).items())
    assert sphere.EditSession.of(model).num_batches == 1


def test_hooks_of_the_base_class_do_nothing() -> None:
    callback = sphere.EditCallback()
    assert callback.on_batch_start(event(0)) is None
    assert callback.on_batch_end(event(5)) is None
    assert callback.resume_settings() is None


def test_the_former_name_of_resume_settings_still_works() -> None:
    class Former(sphere.EditCallback):
        def deciding(self) -> Mapping[str, Any]:
            return {"limit": 3}

    with pytest.warns(DeprecationWarning, match=r"Former.deciding is deprecated: rename it to resume_settings"):
        assert Former().resume_settings() == {"limit": 3}
