"""Loaders of edit records: real and hand-made files, and how bad ones are refused."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphere_easyedit.datasets.loaders import (
    EditRecord,
    EvaluationPrompt,
    MissingDatasetError,
    draw_records,
    fill,
    load_records,
    records_fingerprint,
    with_protocol_targets,
)


def counterfact_raw(case_id: int = 7) -> dict[str, Any]:
    return {
        "case_id": case_id,
        "pararel_idx": None,
        "requested_rewrite": {
            "prompt": "The harbour of {} lies on the",
            "relation_id": "P1",
            "target_new": {"str": "Black Sea", "id": None},
            "target_true": {"str": "Adriatic", "id": "Q1"},
            "subject": f"Port {case_id}",
        },
        "paraphrase_prompts": [f"Ships reach Port {case_id} by the", f"Port {case_id}, on the"],
        "neighborhood_prompts": ["Split lies on the", "Bari lies on the", "Ancona lies on the"],
        "attribute_prompts": [],
        "generation_prompts": [f"Port {case_id} is known for"],
    }


def zsre_raw(subject: str = "Grey Otter Press") -> dict[str, Any]:
    return {
        "subject": subject,
        "src": f"In which year was {subject} founded?",
        "pred": "1901",
        "rephrase": f"When did {subject} start?",
        "alt": "1950",
        "answers": ["1899", "the year 1899"],
        "loc": "nq question: who wrote the tide tables",
        "loc_ans": "A. Mariner",
        "cond": "1901 >> 1950 || ...",
    }


def written(folder: Path, value: Any, name: str = "set.json") -> Path:
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


# --- what a good file gives ---------------------------------------------------------------------------------


def test_counterfact_record_field_by_field(tmp_path: Path) -> None:
    (record,) = load_records("counterfact", written(tmp_path, [counterfact_raw()]))
    assert record == EditRecord(
        case_id=7,
        prompt="The harbour of {} lies on the",
        subject="Port 7",
        target_new="Black Sea",
        target_true="Adriatic",
        paraphrase_prompts=("Ships reach Port 7 by the", "Port 7, on the"),
        neighborhood_prompts=(
            EvaluationPrompt("Split lies on the", "Adriatic"),
            EvaluationPrompt("Bari lies on the", "Adriatic"),
            EvaluationPrompt("Ancona lies on the", "Adriatic"),
        ),
        generation_prompts=("Port 7 is known for",),
        dataset="counterfact",
    )
    assert record.edit_prompt == "The harbour of Port 7 lies on the"
    assert record.request() == {
        "case_id": 7,
        "prompt": "The harbour of {} lies on the",
        "subject": "Port 7",
        "target_new": "Black Sea",
    }


def test_zsre_record_follows_the_papers_protocol(tmp_path: Path) -> None:
    first, second = load_records("zsre", written(tmp_path, [zsre_raw(), zsre_raw("Blue Heron")]))
    assert first == EditRecord(
        case_id=0,
        prompt="In which year was {} founded?",
        subject="Grey Otter Press",
        target_new="1899",  # answers[0], not alt
        target_true=None,
        paraphrase_prompts=("When did Grey Otter Press start?",),
        neighborhood_prompts=(EvaluationPrompt("nq question: who wrote the tide tables?", "A. Mariner"),),
        generation_prompts=(),
        dataset="zsre",
        target_alt="1950",
    )
    assert second.case_id == 1
    assert second.edit_prompt == "In which year was Blue Heron founded?"


def test_targets_lose_spaces_around_them(tmp_path: Path) -> None:
    raw = counterfact_raw()
    raw["requested_rewrite"]["target_new"]["str"] = " Black Sea\n"
    raw["requested_rewrite"]["target_true"]["str"] = " Adriatic"
    (record,) = load_records("counterfact", written(tmp_path, [raw]))
    assert (record.target_new, record.target_true) == ("Black Sea", "Adriatic")
    assert {prompt.target for prompt in record.neighborhood_prompts} == {"Adriatic"}
    raw = zsre_raw()
    raw["answers"][0], raw["loc_ans"] = " 1899", " A. Mariner "
    (record,) = load_records("zsre", written(tmp_path, [raw]))
    assert (record.target_new, record.neighborhood_prompts[0].target) == ("1899", "A. Mariner")


def test_generation_prompts_and_empty_lists_are_optional(tmp_path: Path) -> None:
    raw = counterfact_raw()
    del raw["generation_prompts"]
    raw["paraphrase_prompts"] = []
    raw["neighborhood_prompts"] = []
    (record,) = load_records("counterfact", written(tmp_path, [raw]))
    assert record.generation_prompts == record.paraphrase_prompts == ()
    assert record.neighborhood_prompts == ()


def test_other_braces_are_text(tmp_path: Path) -> None:
    raw = counterfact_raw()
    raw["requested_rewrite"]["prompt"] = "{0} and {name} of {} in {{x}"
    raw["requested_rewrite"]["subject"] = "{} {y}"
    (record,) = load_records("counterfact", written(tmp_path, [raw]))
    assert record.edit_prompt == "{0} and {name} of {} {y} in {{x}"
    assert fill("a {} b", "{}") == "a {} b"


def test_zsre_subject_more_than_once_takes_the_place_of_a_whole_word(tmp_path: Path) -> None:
    raw = zsre_raw("Ann")
    raw["src"] = "Which Annual did Ann edit before Ann left?"
    (record,) = load_records("zsre", written(tmp_path, [raw]))
    assert record.prompt == "Which Annual did {} edit before Ann left?"
    assert record.edit_prompt == raw["src"]
    raw["src"] = "Who owns theAnnex?"  # no place of its own: the first there is
    (record,) = load_records("zsre", written(tmp_path, [raw]))
    assert record.prompt == "Who owns the{}ex?"


def test_record_needs_one_slot() -> None:
    for prompt in ("no slot", "{} and {}"):
        with pytest.raises(ValueError, match=r"case 3: prompt .*exactly once"):
            EditRecord(3, prompt, "s", "t", None, (), (), (), "demo")


# --- which records ------------------------------------------------------------------------------------------


def test_selection_by_order_and_by_seed(tmp_path: Path) -> None:
    path = written(tmp_path, [counterfact_raw(number) for number in range(100, 130)])

    def ids(num_edits: int | None, seed: int | None) -> list[int]:
        return [record.case_id for record in load_records("counterfact", path, num_edits, seed)]

    assert ids(None, None) == list(range(100, 130))
    assert ids(4, None) == [100, 101, 102, 103]
    expected = [100 + int(index) for index in np.random.default_rng(5).permutation(30)]
    assert ids(None, 5) == expected
    assert ids(6, 5) == expected[:6]
    assert ids(6, 6) != expected[:6]
    assert len(set(ids(None, 5))) == 30


def test_more_edits_than_records(tmp_path: Path) -> None:
    path = written(tmp_path, [counterfact_raw(1), counterfact_raw(2)])
    with pytest.raises(ValueError, match=r"num_edits is 3, but counterfact .* has 2 records: give at most 2"):
        load_records("counterfact", path, 3, None)
    with pytest.raises(ValueError, match=r"num_edits is 2 and skip 1, but .* has 2 records: give at most 1"):
        load_records("counterfact", path, 2, 0, skip=1)
    for num_edits in (None, 1):
        with pytest.raises(ValueError, match=r"skip.* 2, but .* has 2 records: skip at most 1"):
            load_records("counterfact", path, num_edits, skip=2)
    assert len(load_records("counterfact", path, 2, 0)) == 2
    assert len(load_records("counterfact", path, skip=1)) == 1


def plain(number: int) -> EditRecord:
    return EditRecord(number, "The harbour of {} lies on the", f"Port {number}", "Black Sea", None, (), (), (), "facts")


seeds = st.integers(0, 2**32)


@given(st.integers(1, 60), st.none() | seeds, st.data())
def test_fewer_edits_are_the_beginning_of_more(size: int, seed: int | None, data: st.DataObject) -> None:
    records = [plain(number) for number in range(size)]
    more = data.draw(st.integers(1, size))
    fewer = data.draw(st.integers(1, more))
    assert draw_records(records, fewer, seed) == draw_records(records, more, seed)[:fewer]
    assert sorted(r.case_id for r in draw_records(records, None, seed)) == list(range(size))


@given(st.integers(2, 60), st.none() | seeds, st.data())
def test_skipped_records_are_those_that_a_run_of_as_many_edits_sees(size: int, seed: int | None, data: st.DataObject
                                                                    ) -> None:
    records = [plain(number) for number in range(size)]
    skip = data.draw(st.integers(0, size - 1))
    wanted = data.draw(st.integers(1, size - skip))
    held_out = draw_records(records, wanted, seed, skip=skip)
    whole = draw_records(records, None, seed)
    assert held_out == whole[skip : skip + wanted]
    assert draw_records(records, None, seed, skip=skip) == whole[skip:]
    if skip:
        seen = {record.case_id for record in draw_records(records, skip, seed)}
        assert seen.isdisjoint(record.case_id for record in held_out)


@given(st.integers(1, 60), st.none() | seeds, seeds, seeds, st.data())
def test_order_seed_reorders_what_the_seed_drew(size: int, seed: int | None, order: int, other: int, data: st.DataObject
                                                ) -> None:
    records = [plain(number) for number in range(size)]
    wanted = data.draw(st.integers(1, size))
    skip = data.draw(st.integers(0, size - wanted))
    drawn = draw_records(records, wanted, seed, skip=skip)
    ordered = draw_records(records, wanted, seed, order_seed=order, skip=skip)
    assert {r.case_id for r in ordered} == {r.case_id for r in drawn} and len(ordered) == wanted
    assert ordered == [drawn[int(i)] for i in np.random.default_rng(order).permutation(wanted)]
    again = draw_records(records, wanted, seed, order_seed=other, skip=skip)
    assert {r.case_id for r in again} == {r.case_id for r in drawn}


def test_seeds_give_different_draws_and_orders() -> None:
    records = [plain(number) for number in range(100)]
    assert draw_records(records, 20, 0) != draw_records(records, 20, 1)
    first, second = (draw_records(records, 20, 0, order_seed=order) for order in (0, 1))
    assert first != second and sorted(r.case_id for r in first) == sorted(r.case_id for r in second)


@pytest.mark.parametrize(
    ("dataset", "arguments", "message"),
    [
        ("counterfakt", {}, "'counterfakt' is not known: choose one of counterfact"),
        ("demo", {"num_edits": 0}, "num_edits is 0"),
        ("demo", {"num_edits": -1}, "num_edits is -1"),
        ("demo", {"seed": -1}, "seed is -1"),
        ("demo", {"order_seed": -1}, "order_seed is -1"),
        ("demo", {"skip": -1}, "skip is -1"),
        ("demo", {"path": Path("x.json")}, "ships with the package"),
    ],
)
def test_wrong_arguments(dataset: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_records(dataset, **arguments)


def test_demo_needs_no_file() -> None:
    records = load_records("demo", None, 300, 1)
    assert len({record.case_id for record in records}) == 300
    assert {record.dataset for record in records} == {"demo"}
    assert all(record.target_true and record.neighborhood_prompts for record in records)


# --- MultiCounterFact -----------------------------------------------------------------------------------------


def test_multi_counterfact_may_lack_paraphrases_and_repeat_subjects(tmp_path: Path) -> None:
    whole, bare = counterfact_raw(1), counterfact_raw(2)
    bare["requested_rewrite"]["subject"] = "Port 1"
    del bare["paraphrase_prompts"], bare["generation_prompts"]
    path = written(tmp_path, [whole, bare])
    first, second = load_records("multi_counterfact", path)
    assert first.dataset == second.dataset == "multi_counterfact"
    assert (first.subject, first.paraphrase_prompts) == ("Port 1", tuple(whole["paraphrase_prompts"]))
    assert (second.subject, second.paraphrase_prompts, second.generation_prompts) == ("Port 1", (), ())
    assert len(second.neighborhood_prompts) == 3
    with pytest.raises(ValueError, match=r"record 1 \(case_id 2\), field 'paraphrase_prompts': found nothing"):
        load_records("counterfact", path)
    with pytest.raises(ValueError, match=r"record 0 \(case_id 1\), field 'neighborhood_prompts': found nothing"):
        load_records("multi_counterfact", written(tmp_path, [
            remove_or_put(counterfact_raw(1), "neighborhood_prompts", ABSENT)]))


# --- protocols and fingerprints ---------------------------------------------------------------------------------


def test_protocols_edit_their_own_target(tmp_path: Path) -> None:
    (counterfact,) = load_records("counterfact", written(tmp_path, [counterfact_raw()]))
    (zsre,) = load_records("zsre", written(tmp_path, [zsre_raw()]))
    for protocol in ("paper", "rome"):
        assert with_protocol_targets([counterfact, zsre], protocol) == [counterfact, zsre]
    same, edited = with_protocol_targets([counterfact, zsre], "easyedit")
    assert same == counterfact
    assert (edited.target_new, edited.target_alt, edited.target_true) == ("1950", "1950", "1899")
    assert edited.paraphrase_prompts == zsre.paraphrase_prompts and edited.prompt == zsre.prompt
    assert with_protocol_targets([same, edited], "easyedit") == [same, edited]
    with pytest.raises(ValueError, match="protocol 'easyedti' is not known: choose one of paper, rome, easyedit"):
        with_protocol_targets([zsre], "easyedti")


def test_zsre_without_alt_is_refused_for_easyedit(tmp_path: Path) -> None:
    raw = [zsre_raw(f"Press {number}") for number in range(9)]
    for item in raw[1:8]:
        item["alt"] = ""
    records = load_records("zsre", written(tmp_path, raw))
    assert with_protocol_targets(records, "paper") == records
    with pytest.raises(ValueError, match=r"7 of 9 ZsRE records have no alt, .*case_id 1, 2, 3, 4, 5, \.\.\.\): leave"):
        with_protocol_targets(records, "easyedit")
    kept = [record for record in records if record.target_alt]
    assert [record.target_new for record in with_protocol_targets(kept, "easyedit")] == ["1950", "1950"]


def test_zsre_one_hop_of_easyedit(tmp_path: Path) -> None:
    raw = zsre_raw() | {"portability": {"Recalled Relation": "(a, b, c)", "New Question": "What is sold there?",
                                        "New Answer": " Books"}}
    (record,) = load_records("zsre", written(tmp_path, [raw]))
    assert record.portability_prompts == (EvaluationPrompt("What is sold there?", "Books"),)
    raw["portability"]["New Answer"] = 5
    with pytest.raises(ValueError, match=r"record 0, field 'portability.New Answer': found int 5"):
        load_records("zsre", written(tmp_path, [raw]))


@given(st.permutations(range(5)), st.integers(0, 4))
def test_fingerprint_is_of_content_and_order(order: list[int], changed: int) -> None:
    records = [plain(number) for number in range(5)]
    fingerprint = records_fingerprint(records)
    assert len(fingerprint) == 64 and fingerprint == records_fingerprint(tuple(records))
    reordered = [records[i] for i in order]
    assert (records_fingerprint(reordered) == fingerprint) == (reordered == records)
    assert records_fingerprint(records[:changed]) != fingerprint
    for change in ({"target_true": ""}, {"paraphrase_prompts": ("x",)}, {"dataset": "zsre"}, {"target_new": "Black"},
                   {"neighborhood_prompts": (EvaluationPrompt("a", "b"),)}, {"subject": "\ud800"}):
        other = list(records)
        other[changed] = dataclasses.replace(records[changed], **change)
        assert records_fingerprint(other) != fingerprint


def test_fingerprint_stays_from_version_to_version() -> None:
    # A run's resume check compares it with one from another day: a change here ends every run's life.
    line = ('{"case_id":3,"dataset":"facts","generation_prompts":[],"neighborhood_prompts":[],"paraphrase_prompts":[],'
            '"portability_prompts":[],"prompt":"The harbour of {} lies on the","subject":"Port 3","target_alt":null,'
            '"target_new":"Black Sea","target_true":null}\n')
    assert records_fingerprint([plain(3)]) == hashlib.sha256(line.encode()).hexdigest()


# --- bad files ----------------------------------------------------------------------------------------------


def test_missing_file_says_where_to_put_it(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.json"
    for dataset, what in (("counterfact", "counterfact.json"), ("zsre", "zsre_mend_eval.json")):
        with pytest.raises(FileNotFoundError, match="nowhere.json does not exist") as caught:
            load_records(dataset, path)
        assert isinstance(caught.value, MissingDatasetError) and isinstance(caught.value, ValueError)
        assert what in str(caught.value)
    with pytest.raises(MissingDatasetError, match=r"facts needs a file: give the path of a \.jsonl"):
        load_records("facts", None, 1, None)
    with pytest.raises(ValueError, match="is not a file"):
        load_records("counterfact", tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    whole = json.dumps([counterfact_raw(1), counterfact_raw(2)])
    for cut in (len(whole) // 2, len(whole) - 1):
        with pytest.raises(ValueError, match=r"line 1, column \d+ \(character \d+ of \d+\).*truncated"):
            load_records("counterfact", written(tmp_path, whole[:cut]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ('[{"case_id": 1,}]', r"not valid JSON: .* at line 1, column \d+"),
        ('{"case_id": 1}\n{"case_id": 2}\n', r"line 2, column 1 .*one record per line"),
        ('{"case_id": 1}', "at the top, expected a list of records"),
        ("[]", "the list of records is empty"),
        ('[{"case_id": 1}, 5]', r"record 0 \(case_id 1\), field 'requested_rewrite'"),
        ("[5]", "record 0: found int 5, expected an object"),
    ],
)
def test_files_without_a_list_of_records(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=message) as caught:
        load_records("counterfact", path)
    assert str(path) in str(caught.value)


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "set.json"
    path.write_bytes(b"[\xff\xfe]")
    with pytest.raises(ValueError, match="not UTF-8 text .* at byte 1"):
        load_records("zsre", path)


def put(raw: dict[str, Any], field: str, value: Any) -> None:
    *parents, last = field.split(".")
    for parent in parents:
        raw = raw[parent]
    raw[last] = value


ABSENT = object()


def remove_or_put(raw: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    raw = copy.deepcopy(raw)
    if value is ABSENT:
        *parents, last = field.split(".")
        inner = raw
        for parent in parents:
            inner = inner[parent]
        del inner[last]
    else:
        put(raw, field, value)
    return raw


@pytest.mark.parametrize(
    ("field", "value", "found"),
    [
        ("case_id", ABSENT, "nothing"),
        ("case_id", "7", "str '7'"),
        ("requested_rewrite", [], "list []"),
        ("requested_rewrite.prompt", "no slot", "0 times '{}'"),
        ("requested_rewrite.prompt", "{} by {}", "2 times '{}'"),
        ("requested_rewrite.subject", "", "str ''"),
        ("requested_rewrite.target_new", "Black Sea", "str 'Black Sea'"),
        ("requested_rewrite.target_true.str", ABSENT, "nothing"),
        ("paraphrase_prompts", ABSENT, "nothing"),
        ("paraphrase_prompts", "one", "str 'one'"),
        ("neighborhood_prompts[1]", ["a", ""], "str ''"),
        ("neighborhood_prompts[0]", [{"prompt": "a"}], "dict {'prompt': 'a'}"),
        ("generation_prompts[0]", [3], "int 3"),
        ("subject", ABSENT, "nothing"),
        ("src", "When did it start?", "str 'When did it start?'"),
        ("src", "When did grey otter press start?", "str 'When did grey otter press start?' (it is spelled 'grey otter "
         "press' there)"),
        ("src", "{} for Grey Otter Press?", "str '{} for Grey Otter Press?'"),
        ("answers", [], "an empty list"),
        ("answers", "1899", "str '1899'"),
        ("loc_ans", ABSENT, "nothing"),
    ],
)
def test_schema(tmp_path: Path, field: str, value: Any, found: str) -> None:
    """Errors name the file, the record, the field, and the value."""
    bare = field.partition("[")[0]
    counterfact = bare.partition(".")[0] in {*counterfact_raw(), "generation_prompts"}
    good, bad = (counterfact_raw(1), counterfact_raw(44)) if counterfact else (zsre_raw("A"), zsre_raw())
    path = written(tmp_path, [good, remove_or_put(bad, bare, value)])
    with pytest.raises(ValueError) as caught:
        load_records("counterfact" if counterfact else "zsre", path)
    message = str(caught.value)
    assert f"{path}: record 1" in message
    assert f"field '{field}': found {found}" in message
    assert "expected" in message
    assert not counterfact or field == "case_id" or "(case_id 44)" in message


def test_file_of_the_other_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="record 0.*'requested_rewrite': found nothing .*subject, src"):
        load_records("counterfact", written(tmp_path, [zsre_raw()]))
    with pytest.raises(ValueError, match=r"record 0 \(case_id 7\), field 'answers': found nothing"):
        load_records("zsre", written(tmp_path, [counterfact_raw()]))


def test_case_id_twice(tmp_path: Path) -> None:
    path = written(tmp_path, [counterfact_raw(number) for number in (5, 6, 5)])
    with pytest.raises(ValueError, match=r"record 2 \(case_id 5\), field 'case_id': .*record 0 has too"):
        load_records("counterfact", path)


def test_long_values_are_shown_in_part(tmp_path: Path) -> None:
    raw = remove_or_put(counterfact_raw(), "paraphrase_prompts", "x" * 5000)
    with pytest.raises(ValueError) as caught:
        load_records("counterfact", written(tmp_path, [raw]))
    assert len(str(caught.value)) < 1000


# --- real files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dataset", "size"),
    [("counterfact.json", "counterfact", 2100), ("zsre_mend_eval.json", "zsre", 1100)],
)
def test_real_files_load_whole(name: str, dataset: Any, size: int, data_dir: Path) -> None:
    path = data_dir / name
    raw = json.loads(path.read_text(encoding="utf-8"))
    records = load_records(dataset, path)
    assert len(records) == len(raw) >= size
    assert len({record.case_id for record in records}) == len(raw)
    for record, item in zip(records, raw, strict=True):
        assert record.target_new == record.target_new.strip() != ""
        if record.dataset == "zsre":
            assert record.edit_prompt == item["src"]
            assert record.subject == item["subject"] and record.target_new == item["answers"][0].strip()
            neighbour = EvaluationPrompt(item["loc"] + "?", item["loc_ans"].strip())
            assert record.neighborhood_prompts == (neighbour,)
            assert record.paraphrase_prompts == (item["rephrase"],)
            hop = item.get("portability")
            asked = [] if hop is None else [EvaluationPrompt(hop["New Question"], hop["New Answer"].strip())]
            assert list(record.portability_prompts) == asked
        else:
            rewrite = item["requested_rewrite"]
            assert record.case_id == item["case_id"]
            assert record.edit_prompt == rewrite["prompt"].format(rewrite["subject"])
            assert list(record.paraphrase_prompts) == item["paraphrase_prompts"]
            assert [prompt.text for prompt in record.neighborhood_prompts] == item["neighborhood_prompts"]
            targets = {prompt.target for prompt in record.neighborhood_prompts}
            assert targets == {rewrite["target_true"]["str"]}
            assert list(record.generation_prompts) == item["generation_prompts"]


def test_real_zsre_in_easyedits_protocol(data_dir: Path) -> None:
    records = load_records("zsre", data_dir / "zsre_mend_eval.json")
    kept = [record for record in records if record.target_alt]
    assert 0 < len(records) - len(kept) < 10
    with pytest.raises(ValueError, match="have no alt"):
        with_protocol_targets(records, "easyedit")
    for before, after in zip(kept, with_protocol_targets(kept, "easyedit"), strict=True):
        assert after.target_new == before.target_alt
        assert after.case_id == before.case_id and after.edit_prompt == before.edit_prompt


def test_real_counterfact_reads_as_multi_counterfact(data_dir: Path) -> None:
    path = data_dir / "counterfact.json"
    records = load_records("counterfact", path)
    assert load_records("multi_counterfact", path) == [
        dataclasses.replace(record, dataset="multi_counterfact") for record in records]
