"""Edits that can't be made: found by bisection, left out or named, and runs that a callback stops."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import edited_weights, tiny_hparams, tiny_model
from sphere_easyedit.callbacks.drift_guard import DriftGuard
from sphere_easyedit.datasets.loaders import EditRecord, load_records
from sphere_easyedit.editing import engines
from sphere_easyedit.runs.reevaluation import EditedRun
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.sequential import RunSettings, run_sequential
from sphere_easyedit.runs.skipping import Skipped, SkippedFacts, edit_by_bisection

# --- the bisection -----------------------------------------------------------------------------------------------


class Editor:
    """Edits whole numbers, but for bad ones, and for more than so many at once."""

    def __init__(self, bad: set[int], at_most: int = 10**9) -> None:
        self.bad, self.at_most, self.edited, self.tries = bad, at_most, [], 0

    def failure(self, items: Sequence[int]) -> Exception | None:
        self.tries += 1
        if self.bad & set(items):
            return RuntimeError(f"bad {sorted(self.bad & set(items))}")
        return MemoryError("too many") if len(items) > self.at_most else None

    def edit(self, items: Sequence[int]) -> None:
        error = self.failure(items)
        if error is not None:
            raise error
        self.edited += items


@given(count=st.integers(1, 40), bad=st.sets(st.integers(0, 39)), at_most=st.integers(1, 50))
def test_what_can_be_edited_is_edited_once_and_in_order(count: int, bad: set[int], at_most: int) -> None:
    items, editor = list(range(count)), Editor(bad, at_most)
    faulty = bad & set(items)
    if len(faulty) == count > 1:
        with pytest.raises(ValueError, match="fails by itself"):
            edit_by_bisection(items, editor.edit, editor.failure, "skip")
        assert not editor.edited
        return
    if at_most > 1 or count == 1:
        found = edit_by_bisection(items, editor.edit, editor.failure, "skip")
        assert {item for item, _ in found} == faulty
        assert editor.edited == [item for item in items if item not in faulty]


@given(count=st.integers(2, 40), bad=st.sets(st.integers(0, 39), min_size=1))
def test_stop_names_all_that_are_at_fault_and_edits_none(count: int, bad: set[int]) -> None:
    editor = Editor(bad)
    faulty = bad & set(range(count))
    if faulty:
        with pytest.raises(ValueError, match="fail by themselves") as caught:
            edit_by_bisection(range(count), editor.edit, editor.failure, "stop")
        assert all(f"{item} (RuntimeError: bad [{item}])" in str(caught.value) for item in faulty)
        assert not editor.edited


def test_one_fault_among_many_costs_two_tries_a_level() -> None:
    editor = Editor({700})
    edit_by_bisection(range(1024), editor.edit, editor.failure, "skip")
    assert editor.tries <= 3 + 2 * 10  # the edit and its repetition, one trial of all, and two halves at ten levels


@pytest.mark.parametrize("on_error", ["skip", "stop"])
def test_an_error_that_is_not_the_edits_fault_is_raised_as_it_is(on_error: Any) -> None:
    def edit(items: Sequence[int]) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        edit_by_bisection([1, 2], edit, lambda items: None, on_error)


def test_stop_raises_what_no_single_edit_is_to_blame_for() -> None:
    editor = Editor(set(), at_most=3)
    with pytest.raises(MemoryError):
        edit_by_bisection(range(8), editor.edit, editor.failure, "stop")


def test_failed_attempts_hold_no_memory() -> None:
    """Halves fit, if what the attempts before them took is free again."""
    room, taken, edited = 10, list[weakref.ref[torch.Tensor]](), list[int]()

    def take(size: int) -> torch.Tensor:
        used = sum(len(tensor) for ref in taken if (tensor := ref()) is not None)
        if used + size > room:
            raise torch.OutOfMemoryError("no room")
        tensor = torch.zeros(size)
        taken.append(weakref.ref(tensor))
        return tensor

    def edit(items: Sequence[int]) -> None:
        half = take(len(items) // 2)  # what the error finds in use
        rest = take(len(items) - len(half))
        edited.extend(items[: len(half) + len(rest)])

    def failure(items: Sequence[int]) -> Exception | None:
        try:
            half = take(len(items) // 2)
            take(len(items) - len(half))
        except torch.OutOfMemoryError as error:
            return error
        return None

    assert edit_by_bisection(range(16), edit, failure, "skip") == []
    assert edited == list(range(16))


@given(places=st.sets(st.integers(0, 29)), batch=st.integers(1, 7))
def test_edits_and_facts_tried_are_told_from_each_other(places: set[int], batch: int) -> None:
    skips = SkippedFacts(Skipped(place, place, 0, "") for place in places)
    ends = [min(end, 30) for end in range(batch, 30 + batch, batch)]
    for end in ends:
        assert skips.edited(end) == len(set(range(end)) - places)
        assert skips.edited(skips.tried(skips.edited(end), ends)) == skips.edited(end)
    with pytest.raises(ValueError, match="no batch ended with 31"):
        skips.tried(31, ends)


def test_an_error_that_all_edits_share_is_told_once_after_a_few_tries() -> None:
    tries: list[int] = []

    def fail(items: Sequence[int]) -> Any:
        tries.append(len(items))
        return RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def edit(items: Sequence[int]) -> None:
        raise fail(items)

    for on_error in ("skip", "stop"):
        tries.clear()
        with pytest.raises(ValueError, match="^RuntimeError: mat1 and mat2 .*so do 11 of the batch's 1000 edits"):
            edit_by_bisection(range(1000), edit, fail, on_error)  # type: ignore[arg-type]
        assert tries == [1000, 1000, 500, 500] + [1] * 11


def test_an_error_that_most_edits_share_is_no_error_of_all() -> None:
    good, edited = 7, list[int]()  # in the middle, so that both halves fail alike

    def failure(items: Sequence[int]) -> Exception | None:
        return RuntimeError("too long") if set(items) - {good} else None

    def edit(items: Sequence[int]) -> None:
        if error := failure(items):
            raise error
        edited.extend(items)

    found = edit_by_bisection(range(15), edit, failure, "skip")
    assert len(found) == 14 and edited == [good]


# --- runs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def records() -> list[EditRecord]:
    return load_records("demo", None, 9, 0)


@pytest.fixture
def breaks(monkeypatch: pytest.MonkeyPatch) -> Callable[[EditRecord], None]:
    """Makes the solve of every batch with this fact fail."""
    def arrange(bad: EditRecord) -> None:
        solve = engines.solve_batch

        def failing(editable: Any, requests: Any, *rest: Any) -> Any:
            if any(request.request.case_id == bad.case_id for request in requests):
                raise ArithmeticError("singular")
            return solve(editable, requests, *rest)

        monkeypatch.setattr(engines, "solve_batch", failing)

    return arrange


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(folder: Path, tok: PreTrainedTokenizerBase, records: Sequence[EditRecord], hparams: sphere.SPHEREHyperParams,
        *callbacks: sphere.EditCallback, resume: bool = False, on_error: Any = "skip", **measure: Any
        ) -> tuple[dict[str, Any], dict[int, torch.Tensor]]:
    model = tiny_model("llama")
    settings = RunSettings(folder, 3, measure=MeasureSettings(every=3, **measure), resume=resume, checkpoint_every=1,
                           on_error=on_error)
    result = run_sequential(model, tok, records, hparams, settings, callbacks)
    return result.summary, edited_weights(model, hparams)


def test_skip_leaves_out_the_fact_at_fault_and_edits_the_rest(
        tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase, records: list[EditRecord],
        breaks: Callable[[EditRecord], None]) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="AlphaEdit", v_num_grad_steps=3)
    bad = records[4]
    breaks(bad)
    summary, weights = run(tmp_path / "run", tok, records, hparams, cases=6)
    assert (summary["num_edits"], summary["num_facts"], summary["stopped"]) == (8, 9, None)
    assert summary["skipped"] == [{"case_id": bad.case_id, "error": "ArithmeticError: singular"}]
    assert [line["num_edits"] for line in lines(tmp_path / "run" / "edits.jsonl")] == [3, 5, 8]
    assert [(line["when"], line["num_edits"]) for line in lines(tmp_path / "run" / "metrics.jsonl")] == [
        ("before", 0), ("during", 3), ("during", 5), ("after", 8)]
    before, after = (lines(tmp_path / "run" / f"scores/{name}.jsonl") for name in ("before-0", "after-8"))
    assert [line["case_id"] for line in after] == [line["case_id"] for line in before
                                                   if line["case_id"] != bad.case_id]

    other = tiny_model("llama")
    for batch in (records[:3], [records[3], records[5]], records[6:]):
        sphere.apply_sphere_to_model(other, tok, [record.request() for record in batch], hparams)
        sphere.EditSession.of(other).drop_derived()
    assert all(torch.equal(weights[layer], weight) for layer, weight in edited_weights(other, hparams).items())


class Killed(BaseException):
    pass


class KillsAfter(sphere.EditCallback):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_batch_start(self, event: sphere.EditEvent) -> None:
        if event.num_batches == self.batches:
            raise Killed


@pytest.mark.parametrize("batches", [1, 2])
def test_a_run_with_skipped_facts_is_resumed_to_the_same_bits(
        batches: int, tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase, records: list[EditRecord],
        breaks: Callable[[EditRecord], None]) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="MEMIT", v_num_grad_steps=3)
    breaks(records[4])
    refused = replace(records[7], target_new=" ")
    records = [*records[:7], refused, *records[8:]]
    undisturbed, weights = run(tmp_path / "whole", tok, records, hparams)
    assert [one["case_id"] for one in undisturbed["skipped"]] == [records[4].case_id, refused.case_id]
    with pytest.raises(Killed):
        run(tmp_path / "killed", tok, records, hparams, KillsAfter(batches))
    resumed, same = run(tmp_path / "killed", tok, records, hparams, resume=True)
    for name in ("weights_sha256", "num_edits", "skipped", "pre", "post"):
        assert resumed[name] == undisturbed[name]
    assert all(torch.equal(weights[layer], weight) for layer, weight in same.items())
    for name in ("skipped.jsonl", "metrics.jsonl"):
        found = [[line | {"seconds": 0} for line in lines(tmp_path / one / name)]
                 for one in ("whole", "killed")]
        assert found[0] == found[1]


class StopsAfter(sphere.EditCallback):
    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_batch_start(self, event: sphere.EditEvent) -> None:
        if event.num_batches == self.batches:
            raise sphere.StopEditing("enough")


def test_a_run_that_goes_on_past_a_stop_is_summed_up_at_its_end(
        tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase, records: list[EditRecord]) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="MEMIT", v_num_grad_steps=3)
    stopped, _ = run(tmp_path / "run", tok, records, hparams, StopsAfter(1))
    assert stopped["stopped"] == "enough" and stopped["post"]["efficacy"]["n"] == 3
    (tmp_path / "run" / "summary.json").unlink()
    whole, _ = run(tmp_path / "run", tok, records, hparams, resume=True)
    assert (whole["num_edits"], whole["post"]["efficacy"]["n"]) == (9, 9)
    assert whole["watched"]["post"]["update_norms"] != stopped["watched"]["post"]["update_norms"]


@pytest.mark.parametrize("guard", [None, DriftGuard("stop", norm=1e6, warmup=1),
                                   DriftGuard("lower", norm=2e6, warmup=1)])
def test_a_run_that_a_guard_steers_is_resumed_with_the_same_guard(
        guard: DriftGuard | None, tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase,
        records: list[EditRecord]) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="MEMIT", v_num_grad_steps=3)

    def steered(*callbacks: sphere.EditCallback, **more: Any) -> None:
        run(tmp_path / "run", tok, records, hparams, *callbacks, **more)

    with pytest.raises(Killed):
        steered(DriftGuard("lower", norm=1e6, warmup=1), KillsAfter(1))
    with pytest.raises(ValueError, match="callbacks was .*'lower'.* and is .*Give the same ones"):
        steered(*() if guard is None else (guard,), resume=True)
    steered(DriftGuard("lower", norm=1e6, warmup=1), DriftGuard("warn", warmup=1), resume=True)


def test_what_a_run_left_out_is_not_measured_again(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase,
                                                   breaks: Callable[[EditRecord], None]) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="MEMIT", v_num_grad_steps=3)
    records = load_records("demo", None, 5, 0)
    breaks(records[1])
    settings = RunSettings(tmp_path / "run", 5, on_error="skip",
                           described={"dataset": "demo", "data": None, "seed": 0})
    run_sequential(tiny_model("llama"), tok, records, hparams, settings)
    edited = EditedRun(tmp_path / "run")
    assert edited.records == [records[0], *records[2:]]
    found = edited.measure(tiny_model("llama"), tok, [4], MeasureSettings(("rome",)))
    assert [(one.protocol, one.when, one.cases) for one in found] == [("paper", "after", 4), ("rome", "after", 4)]


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Makes every solve fail, whatever the facts, and takes down how many edits each was of."""
    made: list[int] = []

    def failing(editable: Any, requests: Any, *rest: Any) -> Any:
        made.append(len(requests))
        raise ArithmeticError("no norm of this name")

    monkeypatch.setattr(engines, "solve_batch", failing)
    return made


@pytest.mark.parametrize("on_error", ["skip", "stop"])
def test_what_all_facts_of_a_batch_share_ends_the_run_with_one_line(
        on_error: Any, tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase, attempts: list[int]) -> None:
    hparams, records = tiny_hparams(llama_stats, base_alg="MEMIT"), load_records("demo", None, 16, 0)
    settings = RunSettings(tmp_path / "run", 16, on_error=on_error, measure=MeasureSettings(before=False, after=False))
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="^ArithmeticError: no norm of this name .so do 6 of .* 16 edits") as caught:
        run_sequential(model, tok, records, hparams, settings)
    assert "\n" not in str(caught.value) and str(caught.value).count("no norm") == 1
    assert attempts == [16, 16, 8, 8] + [1] * 6
    assert all(torch.equal(weight, edited_weights(tiny_model("llama"), hparams)[layer])
               for layer, weight in edited_weights(model, hparams).items())


@pytest.mark.parametrize(("count", "tries"), [(3, 3), (40, 7)])
def test_runs_of_single_edits_do_not_leave_out_one_fact_after_another(
        count: int, tries: int, tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase, attempts: list[int]
        ) -> None:
    hparams, records = tiny_hparams(llama_stats, base_alg="MEMIT"), load_records("demo", None, 9, 0)
    records = [replace(records[number % 9], case_id=number) for number in range(count)]
    settings = RunSettings(tmp_path / "run", 1, on_error="skip", measure=MeasureSettings(before=False, after=False))
    with pytest.raises(ValueError, match=f"^ArithmeticError: no norm .*none of {tries} facts could be edited"):
        run_sequential(tiny_model("llama"), tok, records, hparams, settings)
    assert len(attempts) == 2 * tries  # each fails, and is tried again without the callbacks


@pytest.mark.parametrize("on_error", ["skip", "stop"])
@pytest.mark.parametrize(("settings", "match"), [
    ({"mom2_dataset": "nowhere.txt"}, "^mom2_dataset 'nowhere.txt' is not a file"),
    ({"lm_head_module": "head"}, "^LlamaForCausalLM has no module 'head'"),
    ({"v_loss_layer": 9}, "^v_loss_layer is 9, past the model's last block"),
], ids=["no statistics", "module names", "loss block"])
def test_what_no_fact_can_be_to_blame_for_is_raised_as_it_is(
        settings: dict[str, Any], match: str, on_error: Any, tmp_path: Path, tok: PreTrainedTokenizerBase,
        records: list[EditRecord], monkeypatch: pytest.MonkeyPatch) -> None:
    if "lm_head_module" in settings:
        names = tiny_hparams(tmp_path).module_names(tiny_model("llama").config)  # type: ignore[arg-type]
        settings = {**asdict(names), **settings}
    prepared: list[int] = []
    prepare_session = engines.prepare_session

    def counted(*given: Any) -> None:
        prepared.append(1)
        prepare_session(*given)

    monkeypatch.setattr(engines, "prepare_session", counted)
    with pytest.raises(ValueError, match=match) as caught:
        run(tmp_path / "run", tok, records, tiny_hparams(tmp_path, base_alg="MEMIT", **settings), on_error=on_error)
    assert "\n" not in str(caught.value) and len(prepared) <= 1
    assert not (tmp_path / "run").exists()


def test_stop_ends_the_run_and_names_the_fact(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase,
                                              records: list[EditRecord], breaks: Callable[[EditRecord], None]) -> None:
    breaks(records[4])
    with pytest.raises(ValueError, match=f"case_id {records[4].case_id} .ArithmeticError: singular.*on_error skip"):
        run(tmp_path / "run", tok, records, tiny_hparams(llama_stats, v_num_grad_steps=3), on_error="stop")
    assert [line["num_edits"] for line in lines(tmp_path / "run" / "edits.jsonl")] == [3]


class Fails(sphere.EditCallback):
    def on_batch_end(self, event: sphere.EditEvent) -> None:
        raise RuntimeError("a callback's own trouble")


def test_a_callback_that_fails_is_nobody_elses_fault(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase,
                                                     records: list[EditRecord]) -> None:
    with pytest.raises(RuntimeError, match="own trouble"):
        run(tmp_path / "run", tok, records, tiny_hparams(llama_stats, v_num_grad_steps=3), Fails())
    assert not (tmp_path / "run" / "skipped.jsonl").exists()


class Stops(sphere.EditCallback):
    def __init__(self, num_edits: int) -> None:
        self.num_edits = num_edits

    def on_batch_end(self, event: sphere.EditEvent) -> None:
        if event.num_edits >= self.num_edits:
            raise sphere.StopEditing("enough is enough")


def test_a_callback_ends_a_run_in_good_order(tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase,
                                             records: list[EditRecord]) -> None:
    hparams = tiny_hparams(llama_stats, base_alg="MEMIT", v_num_grad_steps=3)
    summary, weights = run(tmp_path / "run", tok, records, hparams, Stops(9))
    assert (summary["num_edits"], summary["num_facts"], summary["stopped"]) == (6, 9, "enough is enough")
    assert summary["post"]["efficacy"]["n"] == 6
    assert [line["num_edits"] for line in lines(tmp_path / "run" / "edits.jsonl")] == [3, 6]
    _, shorter = run(tmp_path / "shorter", tok, records[:6], hparams)
    assert all(torch.equal(weights[layer], weight) for layer, weight in shorter.items())
    again, _ = run(tmp_path / "run", tok, records, hparams, resume=True)
    assert again == summary


def test_a_run_stopped_at_its_first_batch_has_nothing_to_sum_up(tmp_path: Path, llama_stats: Path,
                                                                tok: PreTrainedTokenizerBase,
                                                                records: list[EditRecord]) -> None:
    with pytest.raises(ValueError, match="before any edit .* enough"):
        run(tmp_path / "run", tok, records, tiny_hparams(llama_stats, v_num_grad_steps=3), Stops(3))


def test_settings_that_contradict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="on_error is 'never'"):
        RunSettings(tmp_path, 3, on_error="never")  # type: ignore[arg-type]


def test_a_run_stopped_between_the_halves_of_a_batch_counts_the_first(
        tmp_path: Path, llama_stats: Path, tok: PreTrainedTokenizerBase, records: list[EditRecord],
        monkeypatch: pytest.MonkeyPatch) -> None:
    """More than two edits at once are too many for this machine; the guard has enough after four."""
    solve = engines.solve_batch

    def failing(editable: Any, requests: Any, *rest: Any) -> Any:
        if len(requests) > 2:
            raise MemoryError("too many")
        return solve(editable, requests, *rest)

    monkeypatch.setattr(engines, "solve_batch", failing)
    hparams = tiny_hparams(llama_stats, base_alg="MEMIT", v_num_grad_steps=3)
    summary, _ = run(tmp_path / "run", tok, records, hparams, Stops(5))
    assert (summary["num_edits"], summary["post"]["efficacy"]["n"]) == (4, 4)
    assert [line["num_edits"] for line in lines(tmp_path / "run" / "edits.jsonl")] == [1, 3, 4]
