"""HETracker.join and .correlation: which record a case belongs to, which numbers are metrics, and the correlations."""

from __future__ import annotations

import copy
import itertools
import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

import sphere_easyedit as sphere
from sphere_easyedit.callbacks.energy_metrics import EnergyRecord, MetricCorrelation, Spearman

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
NUMBERS = st.integers(-10**6, 10**6).map(lambda number: number / 1000)


def tracker_at(counts: Sequence[int], changes: Sequence[float] | None = None, every: int = 1) -> sphere.HETracker:
    """A tracker that has recorded two layers at these numbers of edits; the mean of their changes is as given."""
    changes = [0.1 * i for i in range(len(counts))] if changes is None else changes
    tracker = sphere.HETracker(every=every)
    for count, change in zip(counts, changes, strict=True):
        relative = {1: change - 0.25, 2: change + 0.25}
        tracker.records.append(EnergyRecord(count, {1: 10.0 + 10 * relative[1], 2: 5e4 + 5e4 * relative[2]}, relative))
    return tracker


def cases(posts: Sequence[Any], batch: int = 1) -> list[dict[str, Any]]:
    """As ``batch_edit`` returns them: ``case_id`` starts anew in every batch."""
    return [{"case_id": i % batch, "requested_rewrite": {"prompt": f"prompt {i}"}, "pre": {"rewrite_acc": [0.0]},
             "time": 1.5, "post": post} for i, post in enumerate(posts)]


def accuracies(values: Sequence[Any], batch: int = 1) -> list[dict[str, Any]]:
    return cases([{"rewrite_acc": value} for value in values], batch)


def numbered(metrics: Sequence[dict[str, Any]]) -> list[int | None]:
    joined = [entry["hyperspherical_energy"] for entry in metrics]
    return [None if record is None else record["num_edits"] for record in joined]


def correlation_of(tracker: sphere.HETracker, posts: Sequence[Any]) -> dict[str, MetricCorrelation]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return tracker.correlation(cases(posts))


def assert_agrees(found: Spearman, left: Sequence[float], right: Sequence[float]) -> None:
    """With scipy, called with these numbers."""
    expected = spearmanr(left, right)
    assert found.rho == pytest.approx(expected.statistic)
    assert found.p == pytest.approx(expected.pvalue, abs=1e-12)
    assert found.n == len(left)


def is_nan(correlation: Spearman) -> bool:
    return math.isnan(correlation.rho) and math.isnan(correlation.p)


# --- join ---------------------------------------------------------------------------------------------------


def test_join_goes_by_position() -> None:
    """Two batches whose case_ids repeat; the second is smaller."""
    tracker = tracker_at([0, 3, 5])
    metrics = accuracies([[1.0]] * 5, batch=3)
    assert [entry["case_id"] for entry in metrics] == [0, 1, 2, 0, 1]
    assert tracker.join(metrics) is metrics
    assert numbered(metrics) == [3, 3, 3, 5, 5]
    record = tracker.records[1]
    assert metrics[0]["hyperspherical_energy"] == {
        "num_edits": 3, "energy": record.energy, "relative_change": record.relative_change}
    assert metrics[4]["hyperspherical_energy"]["energy"] == tracker.records[2].energy
    assert metrics[0]["hyperspherical_energy"]["energy"] != metrics[4]["hyperspherical_energy"]["energy"]


def test_join_leaves_everything_else() -> None:
    metrics = accuracies([[0.5], [np.float64(0.25)]])
    before = copy.deepcopy(metrics)
    tracker_at([0, 1, 2]).join(metrics)
    for entry, was in zip(metrics, before, strict=True):
        assert list(entry) == [*was, "hyperspherical_energy"]
        assert {key: entry[key] for key in was} == was


def test_joined_dicts_are_fresh() -> None:
    tracker = tracker_at([0, 2])
    records = copy.deepcopy(tracker.records)
    metrics = tracker.join(accuracies([1.0, 1.0], batch=2))
    for part in ("energy", "relative_change"):
        metrics[0]["hyperspherical_energy"][part].clear()
        assert metrics[1]["hyperspherical_energy"][part]
    metrics[0]["hyperspherical_energy"]["num_edits"] = 7
    assert tracker.records == records
    assert numbered(metrics) == [7, 2]


def test_joined_metrics_are_json() -> None:
    tracker = tracker_at([0, 4], every=2)
    metrics = tracker.join(accuracies([[np.float64(0.5)]] * 5, batch=2))
    read = json.loads(json.dumps(metrics))
    assert read[0]["hyperspherical_energy"]["energy"] == {
        str(layer): energy for layer, energy in tracker.records[1].energy.items()}
    assert read[4]["hyperspherical_energy"] is None


def test_join_twice_is_join_once() -> None:
    tracker = tracker_at([0, 1, 3])
    metrics = tracker.join(accuracies([1.0] * 3))
    once = copy.deepcopy(metrics)
    assert tracker.join(metrics) == once


@PROPERTY
@given(st.lists(st.integers(1, 6), min_size=1, max_size=12), st.integers(0, 40), st.integers(1, 4))
def test_every_entry_gets_the_next_record(batches: list[int], start: int, every: int) -> None:
    counts = [start, *itertools.accumulate(batches, initial=start)][1:]
    kept = [count for number, count in enumerate(counts) if number % every == 0]
    if len(kept) < 2:
        return
    found = numbered(tracker_at(kept, every=every).join(accuracies([1.0] * sum(batches))))
    expected: list[int | None] = []
    for number, size in enumerate(batches, start=1):
        following = -(-number // every) * every
        expected += [counts[following] if following < len(counts) else None] * size
    assert found == expected


# --- what is refused ----------------------------------------------------------------------------------------


REFUSED: list[tuple[list[int], int, Any, str]] = [
    ([], 1, accuracies([1.0]), "has 0 records, none of them after a batch: have it watch"),
    ([0], 3, accuracies([1.0]), r"has 1 records, none of them after a batch: .* every \(3\)"),
    ([0, 3], 1, accuracies([1.0] * 2), r"metrics has 2 entries, the tracker recorded 3 edits \(from 0 to 3\): give"),
    ([0, 3], 1, accuracies([1.0] * 4), "metrics has 4 entries, the tracker recorded 3 edits"),
    ([5, 8], 1, accuracies([1.0] * 8), r"8 entries, the tracker recorded 3 edits \(from 5 to 8\)"),
    ([0, 4, 8], 2, accuracies([1.0] * 7), "metrics has 7 entries, the tracker recorded 8 edits"),
    ([0, 3], 1, [], "metrics has 0 entries"),
    ([0, 3], 1, (accuracies([1.0] * 3), "model", {}), "metrics is a tuple: give .* the first of the three"),
    ([0, 3], 1, accuracies([1.0])[0], "metrics is a dict: give .* list with one dict a case"),
    ([0, 3], 1, None, "metrics is a NoneType: give"),
    ([0, 3], 1, [*accuracies([1.0] * 2), "post"], r"metrics\[2\] is a str: give .* list with one dict a case"),
]


@pytest.mark.parametrize("method", ["join", "correlation"])
@pytest.mark.parametrize(("counts", "every", "metrics", "message"), REFUSED)
def test_what_does_not_fit_is_refused_unchanged(counts: list[int], every: int, metrics: Any, message: str,
                                                method: str) -> None:
    tracker = tracker_at(counts, every=every)
    records, before = copy.deepcopy(tracker.records), copy.deepcopy(metrics)
    with pytest.raises(ValueError, match=message):
        getattr(tracker, method)(metrics)
    assert metrics == before
    assert tracker.records == records


def test_correlation_without_layers() -> None:
    tracker = sphere.HETracker(layers=[])
    tracker.records = [EnergyRecord(count, {}, {}) for count in range(4)]
    with pytest.raises(ValueError, match="recorded 0 layers: give"):
        tracker.correlation(accuracies([1.0] * 3))


# --- which numbers are metrics ------------------------------------------------------------------------------


EASYEDIT_POST: dict[str, Any] = {
    "rewrite_acc": [np.float64(1.0)],
    "rephrase_acc": [0.5],
    "rewrite_ppl": 12,
    "rewrite_gen_content": ["some text"],
    "locality": {"neighborhood_output": [[3, 4, 5]], "neighborhood_acc": [0.0, 1.0],
                 "distracting_output": [7], "distracting_gen_content": ["text"]},
    "portability": {"one_hop_acc": np.float32(0.5)},
    "fluency": {"ngram_entropy": [5.5, 6.5]},
    "ok": True,
    "numpy_ok": np.bool_(True),
    "numpy_count": np.int64(3),
    "nothing": None, "empty": [], "hollow": [[1.0], []], "mixed": [0.5, "text"], "dicts": [{"rewrite_acc": 1.0}],
    "metric_meta": {"rewrite": {"version": 1, "rewrite_acc": 1.0}},
    "inner": {"metric_meta": {"version": 1}},
}


def test_names_of_metrics() -> None:
    found = correlation_of(tracker_at([0, 1, 2, 3]), [EASYEDIT_POST] * 3)
    assert sorted(found) == ["fluency.ngram_entropy", "locality.neighborhood_acc", "numpy_count", "numpy_ok", "ok",
                             "portability.one_hop_acc", "rephrase_acc", "rewrite_acc", "rewrite_ppl"]
    for correlation in found.values():  # every case says the same
        assert is_nan(correlation.energy) and is_nan(correlation.change)
        assert (correlation.energy.n, correlation.change.n) == (3, 2)


def test_correlation_changes_nothing_and_joined_energy_is_no_metric() -> None:
    tracker = tracker_at([0, 1, 2, 3])
    metrics = accuracies([0.3, 0.2, 0.9])
    plain = tracker.correlation(metrics)
    joined = tracker.join(metrics)
    before = copy.deepcopy(joined)
    assert tracker.correlation(joined) == plain
    assert joined == before
    assert list(plain) == ["rewrite_acc"]


@pytest.mark.parametrize("wrap", [lambda v: v, np.float64, np.float32, lambda v: [v], lambda v: [[v], [v, v]],
                                  lambda v: (np.float64(v),), lambda v: [np.float64(v - 1), v + 1]])
def test_any_shape_of_the_same_values(wrap: Any) -> None:
    values = [0.5, 0.25, 0.75, 0.125]
    tracker = tracker_at([0, 1, 2, 3, 4], [0.0, 0.3, 0.1, 0.2, 0.05])
    expected = correlation_of(tracker, [{"rewrite_acc": value} for value in values])
    assert correlation_of(tracker, [{"rewrite_acc": wrap(value)} for value in values]) == expected
    assert expected["rewrite_acc"].energy.rho == pytest.approx(0.8)


def test_bools_are_rates() -> None:
    tracker = tracker_at([0, 2, 4, 6], [0.0, 0.1, 0.2, 0.3])
    hits = [False, False, True, False, np.True_, True]
    assert correlation_of(tracker, [{"ok": hit} for hit in hits])["ok"].energy.rho == 1.0


@pytest.mark.parametrize("post", [None, {}, {"rewrite_acc": []}, {"rewrite_acc": math.nan}, {"rewrite_acc": "n/a"}, 3])
def test_entries_without_the_metric_are_left_out(post: Any) -> None:
    """Batches of two: one lacks the metric once, the last one altogether."""
    tracker = tracker_at([0, 2, 4, 6, 8], [0.0, 0.1, 0.2, 0.3, 0.0])
    posts = [*({"rewrite_acc": value} for value in [0.1, 0.3]), {"rewrite_acc": 0.4}, post,
             *({"rewrite_acc": value} for value in [0.9, 0.7]), post, post]
    found = correlation_of(tracker, posts)
    assert list(found) == ["rewrite_acc"]
    assert_agrees(found["rewrite_acc"].energy, [1, 2, 3], [4, 5, 6])
    assert found["rewrite_acc"].change.n == 2 and is_nan(found["rewrite_acc"].change)


def test_entries_without_post_have_no_metrics() -> None:
    metrics = accuracies([0.1, 0.2, 0.3])
    for entry in metrics:
        del entry["post"]
    assert tracker_at([0, 1, 2, 3]).correlation(metrics) == {}


def test_metric_that_is_always_nan_is_told_of() -> None:
    found = correlation_of(tracker_at([0, 1, 2, 3]), [{"rewrite_ppl": math.nan}] * 3)["rewrite_ppl"]
    assert is_nan(found.energy) and is_nan(found.change)
    assert (found.energy.n, found.change.n) == (0, 0)


def test_points_around_a_gap_are_consecutive() -> None:
    changes = [0.0, 0.1, 0.2, 0.4, 0.5, 0.9]
    values = [5.0, 4.0, None, 1.0, 0.5]
    found = correlation_of(tracker_at(range(6), changes), [{"rewrite_acc": value} for value in values])["rewrite_acc"]
    assert_agrees(found.change, [0.1, 0.3, 0.4], [-1, -3, -0.5])
    assert found.change.rho == pytest.approx(0.5)


# --- correlations -------------------------------------------------------------------------------------------


def test_agrees_with_scipy_by_hand() -> None:
    """Batches of 2, 1, 3, 2 and 2, with ties; HE is the mean over layers of the relative change."""
    changes = [0.0, 0.02, -0.01, 0.05, 0.03, 0.04]
    posts = [{"rewrite_acc": [1.0], "locality": {"neighborhood_acc": value}}
             for value in [[0.5, 0.7], [0.2], [0.9], [0.1, 0.1], [0.3], [0.5], [0.0], [0.8], [0.9], [1.0]]]
    found = correlation_of(tracker_at([0, 2, 3, 6, 8, 10], changes), posts)
    means = [0.4, 0.9, 0.3, 0.4, 0.95]
    neighborhood = found["locality.neighborhood_acc"]
    assert_agrees(neighborhood.energy, changes[1:], means)
    assert_agrees(neighborhood.change, [-0.03, 0.06, -0.02, 0.01], [0.5, -0.6, 0.1, 0.55])
    assert neighborhood.energy.rho != neighborhood.change.rho
    assert is_nan(found["rewrite_acc"].energy) and is_nan(found["rewrite_acc"].change)


@PROPERTY
@given(st.lists(st.tuples(st.integers(-50, 50), st.integers(-50, 50)), min_size=4, max_size=30))
def test_agrees_with_scipy(points: list[tuple[int, int]]) -> None:
    energies, values = ([float(v) for v in column] for column in zip(*points, strict=True))
    tracker = tracker_at(range(len(points) + 1), [0.0, *energies])
    found = correlation_of(tracker, [{"rewrite_acc": value} for value in values])["rewrite_acc"]
    for correlation, left, right in ((found.energy, energies, values),
                                     (found.change, np.diff(energies).tolist(), np.diff(values).tolist())):
        if len(set(left)) == 1 or len(set(right)) == 1:
            assert is_nan(correlation)
        else:
            assert_agrees(correlation, left, right)


def test_energy_is_the_mean_over_layers_of_the_relative_change() -> None:
    """The big layer rises in energy, the mean of the relative changes falls."""
    tracker = sphere.HETracker()
    for i in range(5):
        tracker.records.append(EnergyRecord(i, {1: 10.0 - i, 2: 1000.0 + 10 * i}, {1: -0.1 * i, 2: 0.01 * i}))
    assert correlation_of(tracker, [{"rewrite_acc": -i} for i in range(4)])["rewrite_acc"].energy.rho == 1.0


def test_constant_energy() -> None:
    found = correlation_of(tracker_at(range(6), [0.5] * 6), [{"rewrite_acc": value} for value in [1.0, 0.5, 0.1, 0, 2]])
    assert is_nan(found["rewrite_acc"].energy) and is_nan(found["rewrite_acc"].change)


@pytest.mark.parametrize("batches", [1, 2])
def test_too_few_batches(batches: int) -> None:
    found = correlation_of(tracker_at(range(batches + 1)), [{"rewrite_acc": float(i)} for i in range(batches)])
    assert is_nan(found["rewrite_acc"].energy) and is_nan(found["rewrite_acc"].change)
    assert (found["rewrite_acc"].energy.n, found["rewrite_acc"].change.n) == (batches, batches - 1)


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.3, 0.4, 0.5], [1000.1, 1000.2, 1000.3, 1000.4, 1000.5]])
def test_differences_equal_but_for_rounding_are_ties(values: list[float]) -> None:
    """0.2 - 0.1 and 0.3 - 0.2 differ in float64."""
    assert len(set(np.diff(values))) > 1
    tracker = tracker_at(range(6), [0.0, 0.3, 0.1, 0.2, 0.6, 0.5])
    found = correlation_of(tracker, [{"rewrite_acc": value} for value in values])["rewrite_acc"]
    assert found.energy.rho == pytest.approx(0.6)
    assert is_nan(found.change)


def test_means_equal_but_for_rounding_are_ties() -> None:
    batches = [[0.1, 0.2, 0.3], [0.2, 0.2, 0.2], [0.3, 0.2, 0.1], [0.7, 0.7, 0.7]]
    assert len({sum(batch) for batch in batches}) == 3
    tracker = tracker_at([0, 3, 6, 9, 12], [0.0, 0.2, 0.1, 0.3, 0.4])
    found = correlation_of(tracker, [{"rewrite_acc": value} for batch in batches for value in batch])["rewrite_acc"]
    assert found.energy.rho == pytest.approx(spearmanr([2, 1, 3, 4], [1, 1, 1, 2]).statistic)


@pytest.mark.parametrize(("changes", "values"), [
    ([3e-9, 1e-9, 2e-9, 5e-9], [0.3, 0.1, 0.2, 0.5]),  # the energy of a large layer moves by billionths
    ([0.1, 0.4, 0.2, 0.3], [0.5, 0.5 + 3e-9, 0.5 + 1e-9, 0.5 + 2e-9]),
    ([0.1, 0.2, 0.4, 0.35, 0.9], [20.0, 20.001, 20.003, 20.002, 1e12]),  # perplexity explodes at the end
])
def test_small_differences_are_no_ties(changes: list[float], values: list[float]) -> None:
    tracker = sphere.HETracker()
    tracker.records = [EnergyRecord(i, {1: 1.0 + change}, {1: change}) for i, change in enumerate([0.0, *changes])]
    found = correlation_of(tracker, [{"rewrite_acc": value} for value in values])["rewrite_acc"]
    assert (found.energy.rho, found.change.rho) == pytest.approx((1.0, 1.0))


def test_infinite_perplexity_ranks_last_and_has_no_difference_from_another() -> None:
    values = [1.0, 2.0, 3.0, math.inf, math.inf]
    tracker = tracker_at(range(6), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5])
    two = correlation_of(tracker, [{"rewrite_ppl": value} for value in values])["rewrite_ppl"]
    assert_agrees(two.energy, [1, 2, 3, 4, 5], [1, 2, 3, 4, 4])
    assert is_nan(two.change)
    one = correlation_of(tracker_at(range(5), [0.0, 0.1, 0.2, 0.4, 0.9]), [{"rewrite_ppl": v} for v in values[:4]])
    assert_agrees(one["rewrite_ppl"].energy, [1, 2, 3, 4], [1, 2, 3, 4])
    assert_agrees(one["rewrite_ppl"].change, [1, 2, 3], [1, 1, 2])


def test_every_second_batch_pools_its_cases() -> None:
    """A point is a record: cases of both batches before it, and none after the last one."""
    tracker = tracker_at([0, 2, 4, 6], [0.0, 0.1, 0.2, 0.3], every=2)
    values = [0.9, 0.0, 0.5, 0.5, 0.0, 1.2]
    found = correlation_of(tracker, [{"rewrite_acc": value} for value in values])
    assert found["rewrite_acc"].energy.rho == 1.0
    trailing = correlation_of(tracker, [*({"rewrite_acc": value} for value in values), {"other_acc": 100.0}])
    assert trailing == found


