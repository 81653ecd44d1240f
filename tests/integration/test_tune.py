"""``tune``: the search finds what is planted, goes on after an interruption, and leaves the model as it was."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import save_tiny_model, tiny_hparams
from helpers.processes import call_cli
from sphere_easyedit.datasets.demo import demo_records
from sphere_easyedit.datasets.records import EditRecord
from sphere_easyedit.tuning import Tuner, TuneSettings
from sphere_easyedit.tuning.trial import Limits, Scores

pytest.importorskip("optuna", reason="optuna is not installed: pip install 'sphere-easyedit[tune]'")

FIXED = ("layers", "clamp_norm_factor", "nullspace_share")
Start = dict[str, Any]


def ticking() -> Callable[[], float]:
    """A clock that goes on by a second whenever it is read, so that the number of trials does not depend on speed."""
    return itertools.count().__next__


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tune")
    save_tiny_model(found / "tiny", "llama", num_hidden_layers=3)
    return found


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    return sphere.load_model(str(folder / "tiny"))


@pytest.fixture(scope="module")
def start(folder: Path) -> Start:
    """Settings under which nothing is edited in: v_lr is far too small."""
    return tiny_hparams(folder, model_name=str(folder / "tiny"), layers=[1], v_loss_layer=2, v_lr=0.02, L2=0.01,
                        v_num_grad_steps=8).to_dict()


@pytest.fixture(scope="module")
def facts() -> list[EditRecord]:
    return demo_records()[:6]


@pytest.fixture
def tuner(loaded: tuple[nn.Module, PreTrainedTokenizerBase], start: Start, facts: list[EditRecord], tmp_path: Path
          ) -> Callable[..., Tuner]:
    def make(output: str = "search", budget: float = 60, clock: Callable[[], float] | None = None,
             say: Callable[[str], None] = str, changes: Start | None = None, **settings: Any) -> Tuner:
        given = TuneSettings(tmp_path / output, budget, **{
            "batch_size": 2, "max_rise": 1e6, "max_loss": 100, "fixed": FIXED, "text_tokens": 128, **settings})
        return Tuner(*loaded, {**start, **(changes or {})}, facts[:3], facts[3:], given, say, clock or ticking())

    return make


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_a_planted_optimum_is_found_and_the_weights_stay(
        tuner: Callable[..., Tuner], loaded: tuple[nn.Module, PreTrainedTokenizerBase], start: Start) -> None:
    before = {name: value.clone() for name, value in loaded[0].state_dict().items()}
    said: list[str] = []
    best = tuner(say=said.append).run()
    found, trials = sphere.SPHEREHyperParams.from_hparams(best), rows(best.parent)
    assert found.v_lr > start["v_lr"] and found.layers == start["layers"]
    assert float(trials[0]["efficacy"]) == 0.0 == float(trials[0]["value"])
    values = [float(row["value"]) for row in trials if row["value"]]
    assert max(values) >= 50.0
    text = best.read_text(encoding="utf-8")
    assert "# 3 validation facts:" in text and "Searched: v_lr, L2." in text and said[-4] in text
    assert any(row["state"] == "pruned" for row in trials) or len(trials) < 9
    assert all(torch.equal(value, before[name]) for name, value in loaded[0].state_dict().items())
    assert "_null_space_" not in "".join(path.name for path in Path(start["stats_dir"]).rglob("*")
                                         if "share_0.6" not in path.name)


def test_an_interrupted_search_goes_on_with_the_same_trials(tuner: Callable[..., Tuner], tmp_path: Path) -> None:
    whole = tuner("whole", budget=25).run()
    seconds = ticking()

    def interrupted() -> float:
        found = seconds()
        if found == 9:  # in a trial
            raise KeyboardInterrupt
        return found

    with pytest.raises(KeyboardInterrupt):
        tuner("parts", budget=25, clock=interrupted).run()
    assert (tmp_path / "parts" / "best.yaml").exists()
    done = rows(tmp_path / "parts")
    again = tuner("parts", budget=25).run()
    # Numbers differ after the trial that was ended, which is tried once more.
    kept = ("v_lr", "L2", "value")
    pairs = list(zip(rows(whole.parent), rows(again.parent), strict=False))
    assert 0 < len(done) < len(pairs)
    assert all(one[name] == other[name] for one, other in pairs[: len(done) + 1] for name in kept)
    ended: list[str] = []
    tuner("parts", budget=25, say=ended.append).run()  # nothing is left to do
    assert rows(again.parent) == rows(tmp_path / "parts") and not any(line.startswith("trial") for line in ended)


def test_the_budget_is_kept_to_within_a_trial(tuner: Callable[..., Tuner]) -> None:
    clock = ticking()
    done = tuner(budget=20, clock=clock).run()
    longest = max(float(row["seconds"]) for row in rows(done.parent))
    assert 20 - 3 * longest - 4 <= clock() <= 20 + longest + 2


def test_a_start_that_fails_is_replaced(tuner: Callable[..., Tuner]) -> None:
    empty = {"nullspace_share": None, "nullspace_threshold": 1e-30}
    best = tuner(budget=12, changes=empty, fixed=("layers", "clamp_norm_factor", "v_lr", "L2")).run()
    trials = rows(best.parent)
    assert "null space" in trials[0]["error"] and not trials[1]["error"]
    assert "edited, start                     failed" not in trials[1]["error"]
    assert "failed" in best.read_text(encoding="utf-8")
    assert sphere.SPHEREHyperParams.from_hparams(best).nullspace_share is not None


def test_limits_come_before_the_score() -> None:
    limits = Limits(Scores(1.0, 1.0, 30.0, 20.0), max_rise=5.0, max_loss=3.0)
    assert limits.value(Scores(90.0, 60.0, 28.0, 20.5)) == 75.0
    assert limits.value(Scores(90.0, None, None, 20.5)) == 90.0
    little, much = (limits.value(Scores(99.0, 99.0, 30.0, perplexity)) for perplexity in (21.2, 30.0))
    assert much < little < 0.0 < limits.value(Scores(1.0, 1.0, 30.0, 21.0))
    assert limits.value(Scores(99.0, 99.0, 20.0, 20.0)) == -7.0
    for broken in (float("inf"), float("nan")):
        assert limits.value(Scores(99.0, 99.0, 30.0, broken)) < much


@pytest.fixture
def without_optuna() -> Iterator[None]:
    with mock.patch.dict("sys.modules", {"optuna": None}):
        yield


def test_settings_that_do_not_fit_are_refused(tuner: Callable[..., Tuner], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'alpha' is not searched for AlphaEdit"):
        tuner(fixed=("alpha",))
    with pytest.raises(ValueError, match="nothing is left to search"):
        tuner(fixed=(*FIXED, "v_lr", "L2"))
    with pytest.raises(ValueError, match="budget is 0"):
        tuner(budget=0)
    tuner()
    with pytest.raises(ValueError, match="another seed|other seed"):
        tuner(seed=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(ValueError, match="not empty and holds no search"):
        tuner("full")


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    arguments = ["tune", str(folder / "tiny"), "--budget", "0.01", "--output", "found", "--num-edits", "2", "--set",
                 "mom2_n_samples=12", "--set", "v_num_grad_steps=2", "--max-perplexity-rise", "1000"]
    done = call_cli(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trial 0 (start): efficacy" in done.stdout and "--hparams found/best.yaml" in done.stdout
    assert sphere.SPHEREHyperParams.from_hparams(tmp_path / "found" / "best.yaml").mom2_dataset == "generated"
    few = call_cli(*arguments[:5], "new", "--num-edits", "100000", cwd=tmp_path)
    assert few.returncode == 2 and few.stderr.startswith("error: num_edits is 100000, but demo has")
    assert few.stderr.count("\n") == 1


def test_without_optuna_the_remedy_is_named(without_optuna: None, tmp_path: Path) -> None:
    done = call_cli("tune", "smollm2-135m", "--budget", "1", "--output", "found", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.endswith("pip install 'sphere-easyedit[tune]'\n")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "found").exists()
