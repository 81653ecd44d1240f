"""What a sweep's runs measured, as one table, and the differences that SPHERE makes."""

from __future__ import annotations

import csv
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from sphere_easyedit.analysis.sweep_results import MeasuredRun, MetricValue, differences
from sphere_easyedit.analysis.sweep_table import collect
from sphere_easyedit.evaluation.paired import paired_bootstrap
from sphere_easyedit.runs.sweep import Run, Sweep
from sphere_easyedit.runs.sweep.record import read_record, write_record


def run_of(arm: str, seed: int = 0, method: str = "MEMIT", alpha: float = 0.0, edit: Mapping[str, Any] | None = None,
           num_edits: int | None = 4, **hyperparameters: Any) -> Run:
    every = {"model_name": "m", "gamma": 0.5, "alpha": alpha, "principal_space": "current", **hyperparameters}
    changed = {"alpha": alpha, **hyperparameters}
    return Run(f"{arm}-seed{seed}", arm, method, alpha > 0, seed, "f.yaml", changed, "demo", None, num_edits, 2,
               edit or {}, every)


def metrics(num_edits: int, when: str, protocol: str, watched: Any = None, **means: float) -> dict[str, Any]:
    line: dict[str, Any] = {"num_edits": num_edits, "when": when, "protocol": protocol, "cases": 4, "seconds": 1.0}
    line |= {name: {"mean": mean, "ci95": [mean - 1, mean + 1], "n": 4} for name, mean in means.items()}
    return line | {"watched": watched or {"perplexity": None, "update_norms": {}}}


def write_run(output: Path, run: Run, lines: Sequence[Mapping[str, Any]], finished: bool = True,
              energy: Mapping[int, Sequence[float]] | None = None,
              scores: Mapping[str, Sequence[Mapping[str, Any]]] | None = None) -> None:
    folder = output / run.name
    (folder / "scores").mkdir(parents=True)
    config = {"run": {"seed": run.seed}, "hparams": dict(run.hyperparameters)}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, cases in (scores or {}).items():
        (folder / "scores" / f"{name}.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    if energy:
        rows = [f"{edits},{layer},1.0,{change}" for edits, changes in energy.items()
                for layer, change in enumerate(changes)]
        (folder / "energy.csv").write_text("\n".join(["num_edits,layer,energy,relative_change", *rows]) + "\n")
    if finished:
        (folder / "summary.json").write_text(json.dumps({"num_edits": 4}))


def cases(protocol: str, values: Sequence[float | None], metric: str = "efficacy") -> list[dict[str, Any]]:
    return [{"case_id": case, "dataset": "demo", "protocol": protocol, metric: value, "efficacy_prompts": [1.0]}
            for case, value in enumerate(values)]


def test_every_number_is_a_row(tmp_path: Path) -> None:
    plain, sphere, begun = run_of("M"), run_of("M+S", alpha=0.8), run_of("M+S", 1, alpha=0.8)
    write_run(tmp_path, plain, [
        metrics(0, "before", "paper", efficacy=1.0),
        metrics(2, "during", "paper", {"perplexity": 20.5, "update_norms": {"4": 3.0, "5": 4.0}}, efficacy=60.0),
        metrics(4, "last_batch", "paper", efficacy=70.0),
        metrics(4, "after", "paper", {"perplexity": 21.5, "update_norms": {"4": 6.0, "5": 8.0}}, efficacy=50.0,
                specificity=8.0),
        metrics(4, "after", "rome", {"perplexity": 21.5, "update_norms": {"4": 6.0, "5": 8.0}}, efficacy=90.0),
        {"num_edits": 4, "when": "after", "protocol": "lm-eval 0.4", "abilities": {"gsm8k": {"mean": 2.5, "n": 40}}},
    ], energy={0: [0.0, 0.0], 2: [0.1, 0.3], 4: [0.5, 0.7]})
    write_run(tmp_path, begun, [metrics(0, "before", "paper", efficacy=1.5)], finished=False,
              energy={0: [0.0], 2: [0.4]})
    write_record(Sweep((plain, sphere, begun)), tmp_path)
    table = collect(tmp_path)
    assert table.settings == ("method", "sphere", "gamma", "alpha")
    assert table.unfinished == ("M+S-seed0", "M+S-seed1")
    found = {(row["run"], row["num_edits"], row["when"], row["protocol"], row["metric"]): row for row in table.rows}
    assert len(found) == len(table.rows)
    numbers = {key[1:]: row["mean"] for key, row in found.items() if key[0] == "M-seed0"}
    assert numbers == pytest.approx({
        (0, "before", "paper", "efficacy"): 1.0, (2, "during", "paper", "efficacy"): 60.0,
        (2, "during", "", "perplexity"): 20.5, (2, "during", "", "update_norm"): 5.0,
        (4, "last_batch", "paper", "efficacy"): 70.0, (4, "after", "paper", "efficacy"): 50.0,
        (4, "after", "paper", "specificity"): 8.0, (4, "after", "", "perplexity"): 21.5,
        (4, "after", "", "update_norm"): 10.0, (4, "after", "rome", "efficacy"): 90.0,
        (4, "after", "lm-eval 0.4", "gsm8k"): 2.5, (0, "before", "", "he_change"): 0.0,
        (2, "during", "", "he_change"): 0.2, (4, "after", "", "he_change"): 0.6})
    row = found["M-seed0", 4, "after", "paper", "efficacy"]
    assert (row["ci95_low"], row["ci95_high"], row["n"], row["seed"], row["sphere"], row["gamma"], row["alpha"]) == (
        49.0, 51.0, 4, 0, False, None, 0.0)
    # The energy of a run that goes on is not the end of it.
    assert found["M+S-seed1", 2, "during", "", "he_change"]["alpha"] == 0.8

    paths = table.write(tmp_path)
    with paths[0].open(newline="") as stream:
        written = list(csv.DictReader(stream))
    assert list(written[0]) == ["run", "arm", "seed", "method", "sphere", "gamma", "alpha", "num_edits", "when",
                                "protocol", "metric", "mean", "ci95_low", "ci95_high", "n"]
    assert [float(line["mean"]) for line in written] == [row["mean"] for row in table.rows]
    text = paths[2].read_text()
    assert "Not finished: M+S-seed0, M+S-seed1." in text
    assert "| unedited | - | - | - | 0 1 | 0 | 1.2 (1.0 to 1.5) | - |" in text
    assert "| MEMIT | no | - | 0 | 0 | 4 | 50.0 (49.0 to 51.0) | 8.0 (7.0 to 9.0) |" in text
    assert "## The last batch, protocol paper" in text.replace("###", "##")
    assert read_record(tmp_path) == Sweep((plain, sphere, begun))


def test_what_arms_differ_in_becomes_columns(tmp_path: Path) -> None:
    runs = (run_of("a", L2=1), run_of("b", L2=2, alpha=0.5), run_of("c", L2=1, alpha=0.5, principal_space="pretrained"),
            run_of("d", method="RECT", rect_keep=0.4, edit={"protocol": ["rome"], "examples": 0}))
    write_record(Sweep(runs), tmp_path)
    for run in runs:
        write_run(tmp_path, run, [metrics(4, "after", "paper", efficacy=5.0)])
    table = collect(tmp_path)
    # Not rect_keep, which one method alone has; not examples, which change nothing.
    assert table.settings == ("method", "sphere", "gamma", "alpha", "edit.protocol", "L2", "principal_space")
    assert [[row[name] for name in table.settings[4:]] for row in table.rows] == [
        [None, 1, None], [None, 2, "current"], [None, 1, "pretrained"], [["rome"], None, None]]
    table.write(tmp_path)
    with (tmp_path / "table.csv").open(newline="") as stream:
        assert [line["edit.protocol"] for line in csv.DictReader(stream)] == ["", "", "", '["rome"]']


def test_sphere_is_paired_with_the_same_arm_without_it(tmp_path: Path) -> None:
    plain = [run_of("P", seed, edit={"keep-weights-every": 2}) for seed in (0, 1, 2)]
    sphere = [run_of("S", seed, alpha=0.8) for seed in (2, 0, 1)]
    others = [run_of("Q", alpha=0.8, method="RECT"), run_of("R", alpha=0.8, num_edits=8), run_of("T", 3, alpha=0.8),
              run_of("U", alpha=0.8, v_lr=1.0), run_of("V", alpha=0.8, edit={"dtype": "bfloat16"})]
    write_record(Sweep((*plain, *sphere, *others)), tmp_path)
    values = {"P": (40.0, 42.0, 50.0), "S": (45.0, 44.0, 51.5)}
    for run in (*plain, *sphere):
        write_run(tmp_path, run, [metrics(4, "after", "paper", efficacy=values[run.arm][run.seed])])
    for run in others:
        write_run(tmp_path, run, [metrics(4, "after", "paper", efficacy=1.0)])
    table = collect(tmp_path)
    assert table.alone == tuple(run.name for run in others)
    [found] = table.differences
    expected = np.array([1.5, 5.0, 2.0])
    assert (found["arm"], found["reference"], found["pairs"], found["seeds"]) == ("S", "P", 3, "2 0 1")
    assert (found["arm_mean"], found["reference_mean"]) == pytest.approx((140.5 / 3, 44.0))
    assert (found["difference"], found["lowest"], found["highest"]) == pytest.approx((expected.mean(), 1.5, 5.0))
    interval = stats.ttest_1samp(expected, 0.0).confidence_interval(0.95)
    assert (found["t95_low"], found["t95_high"]) == pytest.approx((interval.low, interval.high))
    assert found["cases"] is None
    assert "+2.833 | +1.5 to +5 |" in table.to_markdown()
    assert "With SPHERE, but no counterpart without it: Q-seed0" in table.to_markdown()


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_one_seed_has_an_interval_over_cases(tmp_path: Path, scale: float) -> None:
    """Scores may be shares or in the units of the mean that was reported."""
    generator = np.random.default_rng(0)
    values = {"P": generator.integers(0, 2, 40).astype(float), "S": generator.integers(0, 2, 40).astype(float)}
    other = {"P": list(generator.random(40)), "S": list(generator.random(40))}
    for run in (run_of("P"), run_of("S", alpha=0.8)):
        scores = cases("paper", [*values[run.arm]]) + cases("rome", [*other[run.arm]])
        write_run(tmp_path, run, [metrics(4, "after", "paper", efficacy=scale * values[run.arm].mean()),
                                  metrics(4, "after", "rome", efficacy=scale * float(np.mean(other[run.arm])))],
                  scores={"after-4": scores, "during-2": cases("paper", [0.0])})
    write_record(Sweep((run_of("S", alpha=0.8), run_of("P"))), tmp_path)
    paper, rome = collect(tmp_path).differences
    expected = paired_bootstrap(scale * values["S"], scale * values["P"], resamples=2000)
    assert (paper["cases95_low"], paper["cases95_high"], paper["cases"]) == pytest.approx((*(expected.ci95 or ()), 40))
    assert paper["difference"] == pytest.approx(expected.mean)
    assert rome["protocol"] == "rome"
    assert rome["cases95_low"] < rome["difference"] < rome["cases95_high"]


def test_cases_of_all_seeds_go_together(tmp_path: Path) -> None:
    """Two seeds of the same cases: twice the pairs, and the interval gets narrower by about the root of two."""
    generator = np.random.default_rng(1)
    runs = [run_of(arm, seed, alpha=alpha) for seed in (0, 1) for arm, alpha in (("P", 0.0), ("S", 0.8))]
    for run in runs:
        values = generator.random(100)
        write_run(tmp_path, run, [metrics(4, "after", "paper", efficacy=100 * float(values.mean()))],
                  scores={"after-4": cases("paper", [*values])})
    write_record(Sweep(tuple(runs[:2])), tmp_path)
    [one] = collect(tmp_path).differences
    write_record(Sweep(tuple(runs)), tmp_path)
    [both] = collect(tmp_path).differences
    assert (one["cases"], both["cases"]) == (100, 200)
    widths = [found["cases95_high"] - found["cases95_low"] for found in (one, both)]
    assert widths[0] / widths[1] == pytest.approx(math.sqrt(2), rel=0.2)


@pytest.mark.parametrize(("of_plain", "of_sphere", "warned"), [
    ([0.0, 1.0], [1.0, 1.0], True),  # the second does not give the 50% that was reported
    ([0.0, 1.0], None, False),
    ([0.0, 1.0], [None, None], False),
])
def test_scores_that_do_not_belong_give_no_interval(tmp_path: Path, caplog: pytest.LogCaptureFixture,
                                                    of_plain: list[float], of_sphere: list[float | None] | None,
                                                    warned: bool) -> None:
    for run, values in ((run_of("P"), of_plain), (run_of("S", alpha=0.8), of_sphere)):
        write_run(tmp_path, run, [metrics(4, "after", "paper", efficacy=50.0)],
                  scores={} if values is None else {"after-4": cases("paper", values)})
    write_record(Sweep((run_of("P"), run_of("S", alpha=0.8))), tmp_path)
    with caplog.at_level(logging.WARNING):
        [found] = collect(tmp_path).differences
    assert (found["cases95_low"], found["cases"], found["difference"]) == (None, None, 0.0)
    assert ("is not the reported efficacy" in caplog.text) == warned


def test_infinite_perplexity_is_a_number(tmp_path: Path) -> None:
    runs = [run_of(arm, seed, alpha=alpha) for arm, alpha in (("P", 0.0), ("S", 0.8)) for seed in (0, 1, 2)]
    write_record(Sweep(tuple(runs)), tmp_path)
    for run in runs:
        perplexity = math.inf if run.arm == "P" and run.seed == 1 else 20.0
        write_run(tmp_path, run, [metrics(4, "after", "paper", {"perplexity": perplexity}, efficacy=1.0)])
    table = collect(tmp_path)
    found = next(row for row in table.differences if row["metric"] == "perplexity")
    assert (found["difference"], found["lowest"], found["t95_low"]) == (-math.inf, -math.inf, None)
    assert "inf" in table.to_markdown()


class Given(MeasuredRun):
    """A run with efficacies by number of edits, without files."""

    def __init__(self, arm: str, seed: int, values: Mapping[int, float]) -> None:
        super().__init__(run_of(arm, seed), Path("nowhere"))
        found = {(edits, "during", "paper", "efficacy"): MetricValue(edits, "during", "paper", "efficacy", value)
                 for edits, value in values.items()}
        self.__dict__["measurements"] = found


SERIES = st.dictionaries(st.integers(1, 5), st.floats(-100, 100), max_size=4)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(SERIES, SERIES), min_size=1, max_size=5))
def test_differences_are_of_pairs_and_turn_around(series: list[tuple[dict[int, float], dict[int, float]]]) -> None:
    pairs = [(Given("a", seed, one), Given("b", seed, other)) for seed, (one, other) in enumerate(series)]
    there = differences(pairs)
    back = {found.num_edits: found for found in differences([(other, one) for one, other in pairs])}
    assert {found.num_edits for found in there} == {edits for one, other in series for edits in one if edits in other}
    for found in there:
        values = [one[found.num_edits] - other[found.num_edits] for one, other in series
                  if found.num_edits in one and found.num_edits in other]
        turned = back[found.num_edits]
        assert found.mean == pytest.approx(math.fsum(values) / len(values), abs=1e-9)
        assert found.mean == pytest.approx(found.arm_mean - found.reference_mean, abs=1e-9)
        assert (found.lowest, found.highest) == (min(values), max(values)) == (-turned.highest, -turned.lowest)
        assert len(found.seeds) == len(values)
        assert (found.t95 is None) == (len(values) < 3)
        if found.t95 is not None and turned.t95 is not None:
            assert found.t95 == pytest.approx((-turned.t95[1], -turned.t95[0]), abs=1e-9)
            assert found.t95[0] <= found.mean + 1e-9 and found.mean <= found.t95[1] + 1e-9


def test_a_folder_that_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no sweep.yaml"):
        collect(tmp_path)


def test_a_damaged_run_is_named(tmp_path: Path) -> None:
    write_run(tmp_path, run_of("P"), [])
    (tmp_path / "P-seed0" / "metrics.jsonl").write_text("{nonsense\n{}\n")
    write_record(Sweep((run_of("P"),)), tmp_path)
    with pytest.raises(ValueError, match="P-seed0/metrics.jsonl, line 1"):
        collect(tmp_path)
