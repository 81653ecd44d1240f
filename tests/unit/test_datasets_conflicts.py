"""Conflicts between facts: found on normalised text, reported whole, nothing dropped."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphere_easyedit.datasets.conflicts import Conflict, ConflictReport, find_conflicts
from sphere_easyedit.datasets.loaders import EditRecord, load_records
from sphere_easyedit.editing.contradictions import normalised


def record(case_id: int, subject: str, target: str, prompt: str = "The harbour of {} lies on the") -> EditRecord:
    return EditRecord(case_id, prompt, subject, target, None, (), (), (), "facts")


def test_three_kinds() -> None:
    records = [
        record(10, "Bari", "Black Sea"),
        record(11, "Split", "Baltic"),
        record(12, "BARI ", "black  sea"),  # again
        record(13, "Bari", "Baltic"),  # against the two
        record(14, "Split", "Latvian", "They speak in {}"),  # the subject alone
        record(15, "Bar", "Black Sea"),
    ]
    report = find_conflicts(records)
    prompt = "The harbour of Bari lies on the"
    assert report == ConflictReport(
        records=6,
        duplicates=(Conflict(prompt, (0, 2), (10, 12), ("Black Sea", "black  sea")),),
        contradictions=(Conflict(prompt, (0, 2, 3), (10, 12, 13), ("Black Sea", "black  sea", "Baltic")),),
        repeated_subjects=(Conflict("Bari", (0, 2, 3), (10, 12, 13), ("Black Sea", "black  sea", "Baltic")),
                           Conflict("Split", (1, 4), (11, 14), ("Baltic", "Latvian"))),
    )
    assert report
    assert report.summary() == ("6 records: 1 facts edited more than once, 1 prompts edited to different targets, "
                                "2 subjects edited more than once")
    as_json = json.loads(json.dumps(report.to_dict()))
    assert as_json["summary"] == report.summary() and as_json["records"] == 6
    assert as_json["contradictions"] == [{"text": prompt, "positions": [0, 2, 3], "case_ids": [10, 12, 13],
                                          "targets": ["Black Sea", "black  sea", "Baltic"]}]


def test_same_text_split_elsewhere_is_the_same_prompt() -> None:
    report = find_conflicts([record(0, "Bari", "a", "The port of {} is"), record(1, "port", "b", "The {} of Bari is")])
    assert [group.case_ids for group in report.contradictions] == [(0, 1)] and not report.repeated_subjects


def test_nothing_found() -> None:
    for records in ([], [record(0, "a", "x"), record(1, "b", "x")]):
        report = find_conflicts(records)
        assert not report and report.to_dict()["duplicates"] == ()
        assert report.summary().startswith(f"{len(records)} records: 0 facts")


@pytest.mark.parametrize(
    ("one", "other"),
    [("Zu\u0308rich", "Z\u00fcrich"), ("STRASSE", "stra\u00dfe"), (" a \t\nb\u00a0c ", "a b c"), ("\u212b", "\u00e5"),
     ("\u0345\u0301x", "\u0301\u0345x")],
)
def test_normalised_alike(one: str, other: str) -> None:
    assert normalised(one) == normalised(other)
    assert find_conflicts([record(0, one, "t"), record(1, other, "t")]).duplicates


def test_normalised_apart() -> None:
    assert len({normalised(text) for text in ("a", "b", "ab", "a b", "\u00e4", "a.")}) == 6


@given(st.text(max_size=20))
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)
    assert normalised(f"  {text}\n") == normalised(text)


few = st.sampled_from("abc")


@given(st.lists(st.tuples(few, few, st.sampled_from(["{} is", "In {}"])), max_size=12))
def test_groups_are_those_of_a_slow_search(facts: list[tuple[str, str, str]]) -> None:
    records = [record(100 + i, subject, target, prompt) for i, (subject, target, prompt) in enumerate(facts)]
    report = find_conflicts(records)
    times = Counter(facts)
    assert sorted(len(group.positions) for group in report.duplicates) == sorted(n for n in times.values() if n > 1)
    targets: dict[tuple[str, str], set[str]] = {}
    for subject, target, prompt in facts:
        targets.setdefault((subject, prompt), set()).add(target)
    assert len(report.contradictions) == sum(len(found) > 1 for found in targets.values())
    subjects = Counter(subject for subject, _, _ in facts)
    assert {group.text: len(group.positions) for group in report.repeated_subjects} == {
        subject: n for subject, n in subjects.items() if n > 1}
    for group in (*report.duplicates, *report.contradictions, *report.repeated_subjects):
        assert group.case_ids == tuple(100 + position for position in group.positions)
        assert group.targets == tuple(facts[position][1] for position in group.positions)
        assert list(group.positions) == sorted(set(group.positions))


@pytest.mark.parametrize(("name", "dataset"), [("counterfact.json", "counterfact"), ("zsre_mend_eval.json", "zsre")])
def test_real_samples_are_free_of_conflicts_until_one_is_put_in(name: str, dataset: Any, data_dir: Path) -> None:
    records = load_records(dataset, data_dir / name)
    assert not find_conflicts(records)
    last = records[-1]
    against = replace(last, case_id=10**6, subject=last.subject.upper(), target_new="something else entirely")
    report = find_conflicts([*records, against])
    position = len(records) - 1
    assert [group.positions for group in report.contradictions] == [(position, position + 1)]
    assert [group.text for group in report.repeated_subjects] == [last.subject] and not report.duplicates
