"""From run directories to report.html and figures: what the numbers are, and what the page holds."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.report_runs import (
    ALL,
    runs,  # noqa: F401 - a fixture
)
from helpers.run_files import write_run
from sphere_easyedit import PrincipalSpace
from sphere_easyedit.callbacks.spaces import principal_share
from sphere_easyedit.report.build import figures_of, write_report
from sphere_easyedit.report.cases import case_table
from sphere_easyedit.report.changes import _regression
from sphere_easyedit.report.figure import as_file, by_run, coloured, on_page, spread, with_values
from sphere_easyedit.report.forgetting import _binned, forgetting_figure
from sphere_easyedit.report.neurons import embed
from sphere_easyedit.report.notices import notices_of
from sphere_easyedit.report.runs import named_runs
from sphere_easyedit.report.shares import _before_suppression
from sphere_easyedit.runs.records import RunRecords

vl_convert = pytest.importorskip("vl_convert", reason="vl-convert-python (the extra `report`) is not installed")


def figures(runs: Sequence[Path]) -> dict[str, Any]:
    found, _ = figures_of(named_runs([RunRecords.read(run) for run in runs]))
    return {figure.name: figure for figure in found}


@pytest.fixture(scope="module")
def drawn(runs: list[Path]) -> dict[str, Any]:
    """Figures of the two runs, by name."""
    return figures(runs)


def data_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = spec["data"]["values"]
    return rows


# --- the whole ------------------------------------------------------------------------------------------------


def test_every_figure_comes_from_the_run_directories_alone(runs: list[Path], tmp_path: Path) -> None:
    written = write_report(runs, tmp_path)
    assert {path.name for path in written.figures} == {f"{name}.{kind}" for name in ALL for kind in ("svg", "png")}
    assert all(path.stat().st_size > 3000 for path in written.figures)
    page = written.html.read_text(encoding="utf-8")
    assert len(page) < 6e6
    assert 'id="refresh"' not in page
    for name in ALL:
        assert f'id="{name}"' in page
    assert not re.search(r"""(src|href)\s*=\s*["'](https?:)?//""", page)


def test_the_page_escapes_texts_of_facts(runs: list[Path], tmp_path: Path) -> None:
    page = write_report(runs[:1], tmp_path, files=False).html.read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page
    data = page.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    rows = [row for table in json.loads(data)["cases"] for row in table["rows"]]
    assert any("<script>alert(1)</script>" in row[1] and row[2] == "</script><b>French" for row in rows)


def test_a_live_page_comes_anew_and_leaves_out_what_takes_long(runs: list[Path], tmp_path: Path) -> None:
    page = write_report(runs[:1], tmp_path, files=False, live=True).html.read_text(encoding="utf-8")
    assert 'id="refresh"' in page
    assert 'id="embedding"' not in page


def test_a_run_under_way_can_be_reported(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in ("summary.json", "edits.jsonl", "energy.csv"):
        (run / name).unlink()
    written = write_report([run], files=False).html
    assert written == run / "report.html"
    assert "has not ended" in written.read_text(encoding="utf-8")


@pytest.mark.parametrize(("given", "output", "complaint"), [
    ([], None, "0 runs are given"), (["a", "a"], None, "give output"), (["absent"], None, "no config.yaml"),
    (["run", "run"], "out", "more than once")])
def test_wrong_runs_are_refused(tmp_path: Path, given: list[str], output: str | None, complaint: str) -> None:
    write_run(tmp_path / "run")
    with pytest.raises(ValueError, match=complaint):
        write_report([tmp_path / name for name in given], None if output is None else tmp_path / output)


# --- specs ----------------------------------------------------------------------------------------------------


def test_specs_compile_on_the_page_and_as_files(drawn: dict[str, Any]) -> None:
    for figure in drawn.values():
        for panel in figure.panels:
            for spec in (on_page(panel), with_values(on_page(panel), panel.log)):
                vl_convert.vegalite_to_vega(spec)
        svg = vl_convert.vegalite_to_svg(as_file(figure))
        assert "var(--" not in svg
        assert svg.count("<path") > 5 or figure.name == "heatmaps"
        assert len(figure.description) > 40
        assert figure.caption
        assert not re.search(r"\bnan\b", figure.description + figure.caption)
        if figure.name in ("embedding", "cosines", "spectra"):  # a key of before and after
            assert "role-legend" in svg
        if figure.name == "heatmaps":
            assert "cosine" in svg


def test_colours_have_enough_contrast() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[place: place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    for index in range(10):
        assert 1.05 / (luminance(coloured(f"var(--s{index})")) + 0.05) >= 4.5


@given(st.lists(st.floats(-50, 300), min_size=1, max_size=16))
def test_labels_do_not_cover_one_another(wanted: list[float]) -> None:
    placed = spread(wanted, least=13, top=0, bottom=230)
    assert all(-1e-6 <= place <= 230 + 1e-6 for place in placed)
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    gaps = [placed[later] - placed[earlier] for earlier, later in pairwise(order)]
    assert all(gap >= min(13, 230 / len(wanted)) - 1e-6 for gap in gaps)
    assert spread([200.0, 10.0, 100.0]) == [200.0, 10.0, 100.0]


# --- numbers --------------------------------------------------------------------------------------------------


def test_curves_are_the_runs_numbers(runs: list[Path], drawn: dict[str, Any]) -> None:
    figure = drawn["curves"]
    run = RunRecords.read(runs[1])
    label = "MEMIT+SPHERE"
    for panel in figure.panels:
        if panel.title == "Efficacy (%)":
            shown = {row["edits"]: row["value"] for row in data_of(panel.spec) if row["run"] == label}
            before = run.before()
            assert before is not None
            assert shown == {0: before.metrics["efficacy"].mean,
                             **{point.num_edits: point.metrics["efficacy"].mean for point in run.trajectory()}}
        if panel.title.startswith("Hyperspherical"):
            shown = {row["edits"]: row["value"] for row in data_of(panel.spec)
                     if row["run"] == label and row["layer"] == "1"}
            assert shown == {edits: changes[1] for edits, changes in run.energy_changes.items()}


@given(st.lists(st.tuples(st.floats(-1e-3, 1e-3), st.floats(-50, 50)), min_size=4, max_size=30,
                unique_by=lambda pair: pair[0]))
def test_the_band_is_that_of_least_squares(pairs: list[tuple[float, float]]) -> None:
    x, y = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs])
    if np.ptp(x) < 1e-5 or np.ptp(y) < 1e-3:
        return
    line, _, _ = _regression(x.tolist(), y.tolist(), "efficacy", "signed")
    design = np.stack([np.ones_like(x), x * 1e3], axis=1)  # of like size, for a well-conditioned inverse
    solution, *_ = np.linalg.lstsq(design, y, rcond=None)
    residual = y - design @ solution
    covariance = np.linalg.inv(design.T @ design) * (residual @ residual) / (len(x) - 2)
    from scipy import stats

    for row in (line[0], line[-1]):
        at = np.array([1.0, row["x"] * 1e3])
        half = stats.t.ppf(0.975, len(x) - 2) * math.sqrt(max(0.0, at @ covariance @ at))
        assert row["y"] == pytest.approx(at @ solution, rel=1e-6, abs=1e-6)
        assert row["high"] - row["y"] == pytest.approx(half, rel=1e-4, abs=1e-6)
        assert row["y"] - row["low"] == pytest.approx(half, rel=1e-4, abs=1e-6)


@given(st.integers(0, 1000), st.floats(0.0, 0.95))
def test_the_share_before_suppression_is_found_again(seed: int, alpha: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 14, generator=generator, dtype=torch.float64)
    update = torch.randn(8, 14, generator=generator, dtype=torch.float64)
    space = PrincipalSpace.from_weight(weight, 0.5)
    applied = principal_share(space.suppress(update, alpha), space).share
    assert _before_suppression(applied, 1 - alpha) == pytest.approx(principal_share(update, space).share, rel=1e-8)


def test_shares_are_shown_as_applied_and_as_proposed(drawn: dict[str, Any]) -> None:
    rows = data_of(drawn["shares"].panels[0].spec)
    plain = [row for row in rows if row["run"] == "MEMIT" and row["layer"] == "1"]
    applied, proposed = ([row["share"] for row in plain if row["kind"] == kind] for kind in ("applied", "proposed"))
    assert applied == pytest.approx(proposed)
    suppressed = {kind: [row["share"] for row in rows if row["run"] == "MEMIT+SPHERE" and row["layer"] == "1"
                         and row["kind"] == kind] for kind in ("applied", "proposed")}
    assert all(less < more for less, more in zip(suppressed["applied"], suppressed["proposed"], strict=True))
    assert len(applied) == 4


def test_forgetting_counts_every_fact_once(runs: list[Path]) -> None:
    named = named_runs([RunRecords.read(run) for run in runs[:1]])
    figure = forgetting_figure(named)
    assert figure is not None
    by_age, at_end, right_after = (data_of(panel.spec) for panel in figure.panels)
    run = named[0].run
    assert sum(row["n"] for row in by_age) == sum(point.num_edits for point in run.trajectory())
    assert sum(row["n"] for row in at_end) == 12
    assert sum(row["n"] * row["mean"] for row in at_end) / 12 == pytest.approx(
        run.trajectory()[-1].metrics["efficacy"].mean)
    # Facts just edited are seen at age 0 by evaluations after each batch, as they are right after their batch.
    assert sum(row["mean"] for row in by_age if row["to"] == 0) * 4 == pytest.approx(
        sum(row["mean"] for row in right_after))


@given(st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0.0, 100.0])), min_size=1, max_size=80))
def test_bins_keep_every_fact_and_their_mean(pairs: list[tuple[int, float]]) -> None:
    rows = _binned("run", "age", pairs)
    assert sum(row["n"] for row in rows) == len(pairs)
    assert sum(row["n"] * row["mean"] for row in rows) == pytest.approx(sum(score for _, score in pairs))
    assert all(earlier["to"] < later["from"] for earlier, later in pairwise(rows))
    assert len(rows) <= 12
    for row in rows:
        inside = [score for place, score in pairs if row["from"] <= place <= row["to"]]
        assert (row["n"], row["mean"]) == (len(inside), pytest.approx(np.mean(inside)))


def test_facts_lost_since_come_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    cases = [(1, 0.0, 1.0), (2, 0.0, 0.0), (3, 0.0, 0.0), (4, 1.0, 1.0)]
    (run / "cases.jsonl").write_text("".join(json.dumps(
        {"case_id": case, "prompt": f"p{case}", "subject": "s", "target_new": "t", "target_true": None,
         "pre": {"efficacy": before}, "post": {"efficacy": after}}) + "\n" for case, before, after in cases))
    (run / "scores").mkdir()
    for edits in (100, 200):
        (run / "scores" / f"during-{edits}.jsonl").write_text("".join(json.dumps(
            {"case_id": case, "protocol": "paper", "efficacy": float(case == 3 and edits == 100)}) + "\n"
            for case, _, _ in cases))
    table = case_table(named_runs([RunRecords.read(run)])[0])
    assert table is not None
    assert [(row[0], row[4], row[7]) for row in table.rows] == [
        (3, "lost since", 100), (2, "not learned", None), (1, "held", None), (4, "known before", None)]


def test_neighbours_stay_near_in_the_plane() -> None:
    generator = np.random.default_rng(0)
    groups = np.repeat(np.eye(40)[:3] * 6, 20, axis=0) + generator.normal(size=(60, 40))
    unit = groups / np.linalg.norm(groups, axis=1, keepdims=True)
    places = embed((unit @ unit.T).astype(np.float32))
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (distances.argmin(axis=1) // 20 == np.arange(60) // 20).mean() > 0.95
    assert np.array_equal(places, embed((unit @ unit.T).astype(np.float32)))


def test_places_are_computed_once(runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = named_runs([RunRecords.read(runs[0])])
    places = tmp_path / "places.json"
    places.write_text("[of another form]")
    first, _ = figures_of(named, coordinates=places)

    def never(_: object) -> None:
        raise AssertionError("embedded again")

    monkeypatch.setattr("sphere_easyedit.report.neurons.embed", never)
    assert figures_of(named, coordinates=places)[0] == first


# --- warnings -------------------------------------------------------------------------------------------------


def test_warnings_name_what_went_wrong(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", efficacy=(90.0, 80.0, 20.0), perplexity=(20.0, 21.0, math.inf))
    (run / "summary.json").unlink()
    energy = "num_edits,layer,energy,relative_change\n" + "".join(
        f"{100 * batch},4,{1 + change},{change}\n" for batch, change in enumerate((0.0, 0.01, 0.02, 0.03, 0.5)))
    (run / "energy.csv").write_text(energy)
    found = notices_of(named_runs([RunRecords.read(run)]))
    texts = [notice.text for notice in found]
    assert any("collapsed by 300 edits: efficacy" in text and "perplexity" in text for text in texts)
    assert any("3 target values" in text for text in texts)  # a nan in each batch's losses
    assert any("perplexity is not finite at 300" in text for text in texts)
    assert any("in 1 of the 1 later ones, first in the one that ended at 400" in text for text in texts)
    assert any("has not ended" in text for text in texts)
    assert [notice.level for notice in found] == sorted((notice.level for notice in found),
                                                       key=["bad", "warning", "note"].index)


def test_warnings_name_what_was_left_out_and_why_a_run_was_stopped(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {
        "num_edits": 1298, "num_facts": 2000, "skipped": [{"case_id": 7, "error": "ValueError: <b>"}, {"case_id": 9,
                                                                                                    "error": "no"}],
        "stopped": "early facts are going"}))
    texts = [notice.text for notice in notices_of(named_runs([RunRecords.read(run)]))]
    assert texts[1:] == ["was stopped after 1,298 of 2,000 facts: early facts are going",
                         "left out 2 facts that can't be edited, the first case_id 7 (ValueError: <b>)."]


# --- names ----------------------------------------------------------------------------------------------------


def test_labels_say_what_runs_differ_in(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, alpha=alpha, seed=seed, dataset=dataset) for name, alpha, seed, dataset in (
        ("a", 0.0, 0, "counterfact"), ("b", 0.8, 0, "counterfact"), ("c", 0.0, 1, "counterfact"),
        ("d", 0.0, 0, "zsre"))]
    labels = [run.label for run in named_runs([RunRecords.read(folder) for folder in folders])]
    assert len(set(labels)) == 4
    assert any("ZsRE" in label for label in labels)
    assert any("seed 1" in label for label in labels)


def test_a_name_that_two_seeds_share_says_the_seed(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, alpha=alpha, seed=seed) for name, alpha, seed in (
        ("a", 0.0, 0), ("b", 0.8, 0), ("c", 0.0, 1))]
    config = folders[2] / "config.yaml"
    config.write_text(config.read_text().replace("seed: 1", "seed: 0\n  order_seed: 3"))
    assert [run.label for run in named_runs([RunRecords.read(folder) for folder in folders])] == [
        "MEMIT, seed 0", "MEMIT+SPHERE", "MEMIT, seed 0, order 3"]


def test_names_say_model_and_data_set_wherever_they_differ(tmp_path: Path) -> None:
    """Two methods have names of their own; that their numbers don't compare is to be seen all the same."""
    folders = [write_run(tmp_path / "a"), write_run(tmp_path / "b", alpha=0.8, dataset="zsre"),
               write_run(tmp_path / "c", base="RECT", model_name="models/other")]
    labels = [run.label for run in named_runs([RunRecords.read(folder) for folder in folders])]
    assert set(labels) == {"MEMIT, CounterFact, tiny", "MEMIT+SPHERE, ZsRE, tiny", "RECT, CounterFact, other"}
    page = write_report(folders, tmp_path / "out", files=False).html.read_text(encoding="utf-8")
    assert "other, CounterFact; tiny, CounterFact; tiny, ZsRE" in page
    for subject in ("tiny, CounterFact", "tiny, ZsRE", "other, CounterFact"):
        assert f"unedited: {subject}" in page


# --- many runs, and unusual ones -----------------------------------------------------------------------------


def test_more_runs_than_colours_differ_in_dashes_and_shapes() -> None:
    encodings = by_run([f"run {index}" for index in range(20)], ("color", "strokeDash", "shape"))
    colours, dashed, shapes = (encodings[name]["scale"]["range"] for name in ("color", "strokeDash", "shape"))
    assert len(set(zip(colours, map(tuple, dashed), strict=True))) == 20
    assert len(set(zip(colours, shapes, strict=True))) == 20


def test_labels_of_shorter_runs_stand_beside_all_curves(tmp_path: Path) -> None:
    many = write_run(tmp_path / "a", efficacy=(90.0, 80.0, 70.0, 60.0, 50.0), perplexity=(20.0,) * 5)
    found = figures([many, write_run(tmp_path / "b", alpha=0.8)])["curves"]
    efficacy = next(panel for panel in found.panels if panel.title == "Efficacy (%)")
    ends = efficacy.spec["layer"][-1]["data"]["values"]
    assert [end["edits"] for end in ends] == [500, 500]


def test_names_are_not_cut_in_legends_of_files(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"a-run-with-a-name-that-takes-more-room-than-it-had-{index}") for index in range(2)]
    svg = vl_convert.vegalite_to_svg(as_file(figures(runs)["curves"]))
    for run in runs:
        assert f">MEMIT ({run.name})<" in svg


def test_bases_are_compared_on_the_same_facts(tmp_path: Path) -> None:
    plain = write_run(tmp_path / "a")
    assert "gains" not in figures([plain, write_run(tmp_path / "b", alpha=0.8, dataset="zsre")])
    assert "gains" not in figures([plain, write_run(tmp_path / "c", alpha=0.8, seed=1)])
    found = figures([plain, write_run(tmp_path / "d", alpha=0.8)])["gains"]
    assert [row["mean"] for row in data_of(found.panels[0].spec)] == [70.0, 70.0]


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", perplexity=(20.0, math.nan, math.inf)),
            write_run(tmp_path / "b", alpha=0.8, efficacy=(90.0, math.nan, math.nan), perplexity=(math.nan,) * 3)]
    energy = (runs[1] / "energy.csv").read_text()
    (runs[1] / "energy.csv").write_text(re.sub(r"(300,4,).*", r"\1nan,nan", energy))
    written = write_report(runs, tmp_path / "out")
    assert all(path.stat().st_size > 3000 for path in written.figures)


def test_a_run_without_before_energy_or_texts_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", efficacy=(90.0,), perplexity=(None,), scores={"a": {"efficacy": 1.0}})
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines(keepends=True) if '"before"' not in line]
    (run / "metrics.jsonl").write_text("".join(lines))
    (run / "energy.csv").unlink()
    (run / "cases.jsonl").write_text(json.dumps(
        {"case_id": "a", "prompt": "p", "subject": "s", "target_new": "t", "target_true": None, "pre": None,
         "post": {"efficacy": 1.0}}) + "\n"
        + json.dumps({"case_id": "b", "pre": None, "post": {"efficacy": None}}) + "\n")
    written = write_report([run])
    assert "unedited" not in written.html.read_text(encoding="utf-8").split("<table>")[1].split("</table>")[0]
    table = case_table(named_runs([RunRecords.read(run)])[0])
    assert table is not None
    assert [(row[0], row[4]) for row in table.rows] == [("a", "held"), ("b", "not measured")]


def test_sound_runs_have_no_warnings(tmp_path: Path) -> None:
    """Even if the last record of energies is incomplete."""
    run = write_run(tmp_path / "run")
    (run / "edits.jsonl").unlink()
    assert notices_of(named_runs([RunRecords.read(run)])) == []
    lines = (run / "energy.csv").read_text().splitlines(keepends=True)
    assert lines[-1].split(",")[1] == "5"
    (run / "energy.csv").write_text("".join(lines[:-1]))
    assert notices_of(named_runs([RunRecords.read(run)])) == []


def heads(page: str, after: str) -> list[str]:
    """Column titles of the first table behind a piece of the page."""
    return re.findall(r'<th scope="col">(.*?)</th>', page.split(after)[1].split("</thead>")[0])


def test_columns_without_a_value_in_any_run_are_left_out(tmp_path: Path) -> None:
    bare = write_run(tmp_path / "bare", perplexity=(None, None, None), scores={"a": {"efficacy": 1.0}})
    metrics = bare / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"perplexity": 20.0', '"perplexity": null'))
    (bare / "cases.jsonl").write_text(json.dumps(
        {"case_id": "a", "prompt": "p", "subject": "s", "target_new": "t", "target_true": None, "pre": None,
         "post": {"efficacy": 1.0}}) + "\n")
    page = write_report([bare], files=False).html.read_text(encoding="utf-8")
    columns = heads(page, 'id="results"')
    assert "efficacy, %" in columns
    assert not {"fluency", "consistency", "perplexity"} & set(columns)
    for row in page.split('id="results"')[1].split("</table>")[0].split("<tr>")[2:]:
        assert row.count("<td>") == len(columns) - 1
    assert heads(page, 'id="cases"') == ["case", "prompt", "new target", "state", "at the end"]
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["columns"] == [0, 1, 2, 4, 6]
    full = write_run(tmp_path / "full", alpha=0.8, perplexity=(20.0, 21.0, 22.0))
    both = write_report([bare, full], tmp_path / "both", files=False).html.read_text(encoding="utf-8")
    assert "perplexity" in heads(both, 'id="results"')  # of one run, and the other's cell is empty


def test_a_figures_columns_without_a_value_are_left_out(runs: list[Path], tmp_path: Path) -> None:
    page = write_report(runs, tmp_path, files=False).html.read_text(encoding="utf-8")
    for table in re.findall(r'aria-label="Numbers of.*?</table>', page, re.DOTALL):
        columns = len(re.findall(r'<th scope="col">', table))
        rows = [re.findall(r"<td>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
        assert rows
        assert all(len(row) == columns for row in rows)
        assert all(any(cells) for cells in zip(*rows, strict=True))


def test_runs_of_other_protocols_are_warned_of(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", alpha=0.8)]
    for name in ("config.yaml", "metrics.jsonl"):
        text = (runs[1] / name).read_text()
        (runs[1] / name).write_text(text.replace("batch_size: 100", "batch_size: 100\n  protocol: easyedit")
                                    .replace('"paper"', '"easyedit"'))
    named = named_runs([RunRecords.read(run) for run in runs])
    assert [run.protocol for run in named] == ["paper", "easyedit"]
    assert any("by protocol easyedit, those of MEMIT by paper" in notice.text for notice in notices_of(named))
    assert "gains" not in {figure.name for figure in figures_of(named)[0]}


def test_shares_as_proposed_are_shown_if_known(tmp_path: Path) -> None:
    shares = {}
    given: dict[str, dict[str, Any]] = {
        "plain": {}, "sphere": {"alpha": 0.5}, "shrink": {"alpha": 0.5, "suppression": "shrink"},
        "random": {"alpha": 0.5, "suppression": "random"}, "keys": {"alpha": 0.5, "space_source": "keys"},
        "prune": {"alpha": 0.5, "base": "PRUNE"}, "followed": {"base": "PRUNE"}}
    for name, hparams in given.items():
        run = write_run(tmp_path / name, **hparams)
        (run / "spaces.csv").write_text("since,num_edits,layer,share,rank,d_in\n0,100,4,0.2,10,100\n")
        rows = data_of(figures([run])["shares"].panels[0].spec)
        shares[name] = {row["kind"]: row["share"] for row in rows if row["layer"] == "4"}
    before = 100 * 0.8 / (0.8 + 0.8)  # 0.2 inside was 0.8 before it was halved
    assert shares == {"plain": {"proposed": 20.0, "applied": 20.0}, "sphere": {"proposed": before, "applied": 20.0},
                    "shrink": {"proposed": 20.0, "applied": 20.0}, "random": {"applied": 20.0},
                    "keys": {"applied": 20.0}, "prune": {"applied": 20.0}, "followed": {"applied": 20.0}}


def test_abilities_by_two_protocols_are_two_curves(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert [panel.title for panel in figures([run])["abilities"].panels] == ["gsm8k"]
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"num_edits": 300, "when": "after", "protocol": "lm-eval 0.4, limit 5",
                                 "abilities": {"gsm8k": {"mean": 60.0, "stderr": 5.0, "n": 5}}}) + "\n")
    assert [panel.title for panel in figures([run])["abilities"].panels] == [
        "gsm8k (lm-eval 0.4)", "gsm8k (lm-eval 0.4, limit 5)"]


def test_a_report_writes_into_its_own_folder_alone(runs: list[Path], tmp_path: Path) -> None:
    copies = [Path(shutil.copytree(run, tmp_path / run.name, ignore=shutil.ignore_patterns("figures", "report.html")))
              for run in runs]
    before = sorted(path for copy in copies for path in copy.rglob("*"))
    write_report(copies, tmp_path / "out", files=False)
    assert sorted(path for copy in copies for path in copy.rglob("*")) == before


def test_layers_that_runs_do_not_share_are_named(runs: list[Path], drawn: dict[str, Any]) -> None:
    assert "Layers that a run has" not in drawn["heatmaps"].caption
    records = [RunRecords.read(run) for run in runs]
    neurons = records[1].neurons
    assert neurons is not None
    layer, found = next(iter(neurons.layers.items()))
    records[1].__dict__["neurons"] = dataclasses.replace(neurons, layers={layer: found})
    found, _ = figures_of(named_runs(records), live=True)
    caption = {figure.name: figure for figure in found}["heatmaps"].caption
    assert f"MEMIT+SPHERE {layer}." in caption


def test_pages_stay_small(runs: list[Path], drawn: dict[str, Any], tmp_path: Path) -> None:
    """What a layer of a run takes of the 6 MB: twelve runs of five layers have 60 of them."""
    record = RunRecords.read(runs[0]).neurons
    assert record is not None
    layers = len(runs) * len(record.layers)
    neurons = next(iter(record.layers.values())).sampled
    heatmaps = sum(len(json.dumps(panel.spec)) for panel in drawn["heatmaps"].panels) / layers
    assert heatmaps < 2 * 6 * min(48, neurons) ** 2 + 2000
    assert len(json.dumps(drawn["embedding"].panels[0].spec)) / layers < 80 * neurons + 2000

    run = write_run(tmp_path / "run")
    (run / "cases.jsonl").write_text("".join(json.dumps(
        {"case_id": case, "prompt": "p" * 400, "pre": {"efficacy": 0.0}, "post": {"efficacy": case % 2}}) + "\n"
        for case in range(20)))
    table = case_table(named_runs([RunRecords.read(run)])[0], max_characters=5000)
    assert table is not None
    assert (len(table.rows), table.left_out) == (10, 10)
    assert {row[4] for row in table.rows} == {"not learned"}  # what is right is left out first


def test_bars_of_other_settings_stand_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, base="AlphaEdit", alpha=alpha, L2=strength)
               for name, alpha, strength in (("a", 0.0, 1), ("b", 0.5, 1), ("c", 0.0, 10), ("d", 0.5, 10),
                                             ("e", 0.0, 5))]
    figure = figures(folders)["gains"]
    groups: dict[int, set[str]] = {}
    for row in data_of(figure.panels[0].spec):
        groups.setdefault(row["group"], set()).add(row["run"])
    assert sorted(map(sorted, groups.values())) == [["AlphaEdit (a)", "AlphaEdit+SPHERE (b)"],
                                                    ["AlphaEdit (c)", "AlphaEdit+SPHERE (d)"]]
