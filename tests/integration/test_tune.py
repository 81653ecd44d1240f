"""``tune``: the search finds what is planted, goes on after an interruption, and leaves the model as it was."""

from __future__ import annotations

import csv
import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import save_tiny_model, tiny_hparams
from helpers.processes import call_cli
from sphere_easyedit.datasets.demo import demo_records
from sphere_easyedit.hparams_files import shipped_name
from sphere_easyedit.tuning import Tuner, TuneSettings
from sphere_easyedit.tuning.trial import Limits, Scores

pytest.importorskip("optuna", reason="optuna is not installed: pip install 'sphere-easyedit[tune]'")

FIXED = ("layers", "clamp_norm_factor", "nullspace_share")


def ticking() -> Callable[[], float]:
    """A clock that goes on by a second whenever it is read, so that the number of trials does not depend on speed."""
    return itertools.count().__next__


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("tune")
    save_tiny_model(found / "tiny", "llama", num_hidden_layers=3)
    (found / "held-out.txt").write_text("The house stands near the river, he said. " * 6)
    return found


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    return sphere.load_model(str(folder / "tiny"))


@pytest.fixture(scope="module")
def make(folder: Path, loaded: tuple[nn.Module, PreTrainedTokenizerBase]) -> Callable[..., Tuner]:
    """Searches v_lr and L2 from settings that change the model far more than the limit on perplexity allows."""
    start = tiny_hparams(folder, model_name=str(folder / "tiny"), layers=[1], v_loss_layer=2, v_lr=2.0, L2=0.01,
                         v_num_grad_steps=4, mom2_max_length=32).to_dict()
    facts = demo_records()[:6]

    def tuner(output: str = "search", budget: float = 34, clock: Callable[[], float] | None = None,
              say: Callable[[str], None] = str, changes: dict[str, Any] | None = None, **settings: Any) -> Tuner:
        given = TuneSettings(folder / output, budget, **{"batch_size": 2, "fixed": FIXED, "text_tokens": 64,
                                                         "text": folder / "held-out.txt", **settings})
        return Tuner(*loaded, {**start, **(changes or {})}, facts[:3], facts[3:], given, say, clock or ticking())

    return tuner


class Search(NamedTuple):
    best: Path
    said: list[str]
    before: dict[str, Tensor]
    seconds: float


@pytest.fixture(scope="module")
def search(make: Callable[..., Tuner], loaded: tuple[nn.Module, PreTrainedTokenizerBase]) -> Search:
    clock, said = ticking(), list[str]()
    before = {name: value.clone() for name, value in loaded[0].state_dict().items()}
    with mock.patch("sphere_easyedit.tuning.search._STARTUP", 3):  # so that Optuna's model proposes some trials
        return Search(make(clock=clock, say=said.append).run(), said, before, clock())


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_a_planted_optimum_is_found(search: Search) -> None:
    trials, text = rows(search.best.parent), search.best.read_text(encoding="utf-8")
    assert float(trials[0]["perplexity_rise"]) > 5.0 and float(trials[0]["value"]) < 0.0
    within = [row for row in trials if row["value"] and float(row["value"]) >= 0.0]
    assert within and all(float(row["perplexity_rise"]) <= 5.0 for row in within)
    found = sphere.SPHEREHyperParams.from_hparams(search.best)
    best = max(within, key=lambda row: float(row["value"]))
    assert (found.v_lr, found.L2) == pytest.approx((float(best["v_lr"]), float(best["L2"])), rel=1e-3)
    assert found.layers == [1]
    assert "Searched: v_lr, L2." in text and "# 3 validation facts:" in text
    assert search.said[-1] in text  # the last line of the validation's table


def test_weights_and_statistics_stay(search: Search, loaded: tuple[nn.Module, PreTrainedTokenizerBase], folder: Path
                                     ) -> None:
    assert all(torch.equal(value, search.before[name]) for name, value in loaded[0].state_dict().items())
    names = [path.name for path in (folder / "stats").rglob("*") if path.is_file()]
    assert any(name.endswith(".npz") for name in names) and not any("null_space" in name for name in names)


def test_the_budget_is_kept_to_within_a_trial(search: Search) -> None:
    readings = 8  # of the clock, a trial and what is around it
    assert 34 - 4 * readings <= search.seconds <= 34 + readings


def test_an_interrupted_search_goes_on_with_the_same_trials(make: Callable[..., Tuner], search: Search, folder: Path
                                                            ) -> None:
    clock = ticking()

    def interrupted() -> float:
        if (seconds := clock()) == 14:
            raise KeyboardInterrupt
        return seconds

    with pytest.raises(KeyboardInterrupt):
        make("parts", clock=interrupted).run()
    assert (folder / "parts" / "best.yaml").exists()
    done, said = len(rows(folder / "parts")), list[str]()
    again = rows(make("parts", budget=22, say=said.append).run().parent)
    # Numbers differ after the trial that was ended, which is tried once more.
    kept = ("v_lr", "L2", "value")
    assert 0 < done < len(again)
    for one, other in zip(rows(search.best.parent)[: done + 1], again, strict=False):
        assert all(one[name] == other[name] for name in kept)
    said.clear()
    make("parts", budget=22, say=said.append).run()  # nothing is left to do
    assert rows(folder / "parts") == again and not any(line.startswith("trial") for line in said)


def test_a_start_that_fails_is_replaced(make: Callable[..., Tuner]) -> None:
    empty = {"nullspace_share": None, "nullspace_threshold": 1e-30}
    best = make("fails", budget=5, changes=empty, max_rise=1e6,
                fixed=("layers", "clamp_norm_factor", "v_lr", "L2")).run()
    trials = rows(best.parent)
    assert "nullspace_threshold 1e-30" in trials[0]["error"] and not trials[1]["error"]
    assert re.search("^# edited, start  +failed$", best.read_text(encoding="utf-8"), re.MULTILINE)
    assert sphere.SPHEREHyperParams.from_hparams(best).nullspace_share is not None


def test_the_start_is_the_file_that_ships_for_a_model() -> None:
    assert shipped_name("smollm2-135m", "MEMIT") == "MEMIT/smollm2-135m"
    assert shipped_name("google/gemma-3-270m", "AlphaEdit") == "AlphaEdit/gemma3-270m"
    assert shipped_name("someone/some-model", "AlphaEdit") is None


def test_limits_come_before_the_score() -> None:
    limits = Limits(Scores(1.0, 1.0, 30.0, 20.0), max_rise=5.0, max_loss=3.0)
    assert limits.value(Scores(90.0, 60.0, 28.0, 20.5)) == 75.0
    assert limits.value(Scores(90.0, None, None, 20.5)) == 90.0
    little, much = (limits.value(Scores(99.0, 99.0, 30.0, perplexity)) for perplexity in (21.2, 30.0))
    assert much < little < 0.0 < limits.value(Scores(1.0, 1.0, 30.0, 20.9))
    assert limits.value(Scores(99.0, 99.0, 20.0, 20.0)) == -7.0
    for broken in (float("inf"), float("nan")):
        assert limits.value(Scores(99.0, 99.0, 30.0, broken)) < much


@pytest.fixture
def without_optuna() -> Iterator[None]:
    with mock.patch.dict("sys.modules", {"optuna": None}):
        yield


def test_settings_that_do_not_fit_are_refused(make: Callable[..., Tuner], search: Search, folder: Path) -> None:
    with pytest.raises(ValueError, match="'alpha' is not searched for AlphaEdit"):
        make(fixed=("alpha",))
    with pytest.raises(ValueError, match="nothing is left to search"):
        make(fixed=(*FIXED, "v_lr", "L2"))
    with pytest.raises(ValueError, match="budget is 0"):
        make(budget=0)
    with pytest.raises(ValueError, match="a search with other seed"):
        make(seed=1)
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").touch()
    with pytest.raises(ValueError, match="not empty and holds no search"):
        make("full")


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    arguments = ["tune", str(folder / "tiny"), "--budget", "0.01", "--output", "found", "--num-edits", "2", "--set",
                 "mom2_n_samples=12", "--set", "mom2_max_length=32", "--set", "v_num_grad_steps=2", "--text",
                 str(folder / "held-out.txt"), "--max-perplexity-rise", "1000"]
    done = call_cli(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trial 0 (start): " in done.stdout and "--hparams found/best.yaml" in done.stdout
    assert sphere.SPHEREHyperParams.from_hparams(tmp_path / "found" / "best.yaml").mom2_dataset == "generated"
    few = call_cli(*arguments[:5], "new", "--num-edits", "100000", cwd=tmp_path)
    assert few.returncode == 2 and few.stderr.startswith("error: num_edits is 100000, but demo has")
    assert few.stderr.count("\n") == 1


def test_without_optuna_the_remedy_is_named(without_optuna: None, tmp_path: Path) -> None:
    done = call_cli("tune", "smollm2-135m", "--budget", "1", "--output", "found", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.endswith("pip install 'sphere-easyedit[tune]'\n")
    assert done.stderr.count("\n") == 1 and not (tmp_path / "found").exists()
