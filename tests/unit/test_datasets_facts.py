"""Users' own facts: what JSONL and CSV give, that they give the same, and which line a bad file is told by."""

from __future__ import annotations

import csv
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sphere_easyedit.datasets.loaders import (
    EditRecord,
    EvaluationPrompt,
    MissingDatasetError,
    load_facts,
    load_records,
)

FULL = {
    "case_id": 12,
    "prompt": "The harbour of {} lies on the",
    "subject": "Bari",
    "target_new": "Black Sea",
    "target_true": "Adriatic",
    "paraphrases": ["Ships reach Bari by the", "Bari, on the"],
    "neighbours": [{"prompt": "Split lies on the", "target": "Adriatic"}, "Ancona lies on the",
                   {"prompt": "Kiel lies on the", "target": "Baltic"}],
    "generation_prompts": ["Bari is known for"],
}
RECORD = EditRecord(
    case_id=12,
    prompt="The harbour of {} lies on the",
    subject="Bari",
    target_new="Black Sea",
    target_true="Adriatic",
    paraphrase_prompts=("Ships reach Bari by the", "Bari, on the"),
    neighborhood_prompts=(EvaluationPrompt("Split lies on the", "Adriatic"),
                          EvaluationPrompt("Ancona lies on the", "Adriatic"),
                          EvaluationPrompt("Kiel lies on the", "Baltic")),
    generation_prompts=("Bari is known for",),
    dataset="facts",
)
BARE = '{"prompt": "The harbour of Bari lies on the", "subject": "Bari", "target_new": "Black Sea"}'


def written(folder: Path, text: str | bytes, name: str) -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(*records: dict[str, Any], **options: Any) -> str:
    return "".join(json.dumps(record, **options) + "\n" for record in records)


# --- JSONL ------------------------------------------------------------------------------------------------------


def test_jsonl_record_field_by_field(tmp_path: Path) -> None:
    path = written(tmp_path, jsonl(FULL), "facts.jsonl")
    assert load_facts(path) == load_records("facts", path) == [RECORD]


def test_jsonl_needs_three_fields_and_numbers_its_records(tmp_path: Path) -> None:
    other = {"prompt": "They speak {} there ", "subject": " Latvian", "target_new": " x ", "target_true": None,
             "neighbours": None, "case_id": None}
    first, second = load_facts(written(tmp_path, f"\ufeff{BARE}\r\n\n{json.dumps(other)}", "Facts.JSONL"))
    assert first == EditRecord(0, "The harbour of {} lies on the", "Bari", "Black Sea", None, (), (), (), "facts")
    assert second == EditRecord(1, "They speak {} there", "Latvian", "x", None, (), (), (), "facts")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (BARE[:40], r"line 3 is not valid JSON: .* at column \d+; the file ends within the line"),
        (f"{BARE} {BARE}", "line 3 is not valid JSON: Extra data"),
        ('{"prompt": "a", "subject": "a"}', "line 3, field 'target_new': found nothing .*prompt, subject"),
        ('{"prompt": "a", "subject": "b", "target_new": "c"}',
         "line 3, field 'prompt': found str 'a', .* 'b' verbatim"),
        ('{"prompt": "a", "subject": "a", "target_new": 1984}', "line 3, field 'target_new': found int 1984"),
        ('{"prompt": "a", "subject": "a", "target_new": "c", "paraphrase": ["d"]}',
         "line 3, field 'paraphrase': found list .*, expected no other fields than prompt, subject.* paraphrases"),
        ('{"prompt": "a", "subject": "a", "target_new": "c", "paraphrases": "d"}', "'paraphrases': found str 'd'"),
        ('{"prompt": "a", "subject": "a", "target_new": "c", "neighbours": ["d"]}',
         r"line 3, field 'neighbours\[0\]': found str 'd', expected an answer with it"),
        ('{"prompt": "a", "subject": "a", "target_new": "c", "neighbours": [{"prompt": "d"}]}',
         r"line 3, field 'neighbours\[0\].target': found nothing"),
        ('{"prompt": "a", "subject": "a", "target_new": "c", "case_id": 4}', "1 of 3 records have a case_id"),
        ('{"prompt": "a", "subject": "a", "target_new": "c", "case_id": 1}',
         r"line 3 \(case_id 1\), field 'case_id': found 1, which line 2 has too"),
        ('{"prompt": "a", "subject": "a", "target_new": "c", "case_id": "4"}', "line 3 .*'case_id': found str '4'"),
    ],
)
def test_jsonl_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = written(tmp_path, f"{BARE}\n{BARE}\n{line}", "facts.jsonl")
    with pytest.raises(ValueError, match=message) as caught:
        load_facts(path)
    assert str(caught.value).startswith(f"{path}: ")


# --- CSV --------------------------------------------------------------------------------------------------------

HEADER = "prompt, subject, target_new, target_true, case_id, paraphrases, neighbours, generation_prompts\n"


def test_csv_record_field_by_field(tmp_path: Path) -> None:
    row = ('The harbour of {} lies on the, Bari, Black Sea, Adriatic, 12, "Ships reach Bari by the | Bari, on the", '
           "Split lies on the => Adriatic | Ancona lies on the | Kiel lies on the=>Baltic, Bari is known for\n")
    assert load_facts(written(tmp_path, HEADER + row, "facts.csv")) == [RECORD]


def test_csv_needs_three_columns_in_any_order(tmp_path: Path) -> None:
    text = ('\ufeffsubject,target_new,prompt,target_true\r\nBari,"Black Sea",The harbour of Bari lies on the,\r\n'
            '\r\n"Split","the ""Adriatic"", a sea","In two\nlines, {}",x\r\n')
    first, second = load_facts(written(tmp_path, text, "facts.csv"))
    assert first == EditRecord(0, "The harbour of {} lies on the", "Bari", "Black Sea", None, (), (), (), "facts")
    assert second == EditRecord(1, "In two\nlines, {}", "Split", 'the "Adriatic", a sea', "x", (), (), (), "facts")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("a,a,b\n\nThe sea, in a,a,b\n", r'line 4: found 4 cells, expected 3 as in the header; .*quotes'),
        ('"two\nlines {}",a,b\na,a\n', "line 4: found 2 cells, expected 3"),
        ('a,a,b\n"a,a,b\n', "the record that begins in line 3 is not valid CSV: unexpected end of data"),
        ("a,a,b\na,c,b\n", "line 3, field 'prompt': found str 'a', expected text that contains the subject 'c'"),
        ("a,a,b\na,,b\n", r"line 3, field 'subject': found nothing \(the fields there are: prompt, target_new\)"),
        ("", "there is a header and nothing else"),
    ],
)
def test_csv_line_is_named(tmp_path: Path, rows: str, message: str) -> None:
    path = written(tmp_path, "prompt,subject,target_new\n" + rows, "facts.csv")
    with pytest.raises(ValueError, match=message) as caught:
        load_facts(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("prompt,subject,target", "header lacks 'target_new'; has the unknown 'target': name the columns prompt"),
        ("prompt;subject;target_new", "has the unknown 'prompt;subject;target_new': .*commas"),
        ("prompt,subject,target_new,subject", "header has twice 'subject'"),
        ("a {},a,b", "header lacks 'prompt', 'subject', 'target_new'"),
    ],
)
def test_csv_header(tmp_path: Path, header: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_facts(written(tmp_path, f"{header}\na,a,b\n", "facts.csv"))


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ("x,,,", r"line 2 \(case_id 'x'\), field 'case_id': found str 'x', expected a whole number"),
        (',"[""a"", ""b""]",,', r"line 2, field 'paraphrases': found str .*, expected texts with \| .* a .jsonl file"),
        (",,a,", r"line 2, field 'neighbours\[0\]': found str 'a', expected an answer with it"),
        (",,a => ,", r"line 2, field 'neighbours\[0\].target': found str ''"),
    ],
)
def test_csv_cells(tmp_path: Path, cells: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_facts(written(tmp_path, f"{HEADER}a {{}},b,c,,{cells}\n", "facts.csv"))


# --- either -----------------------------------------------------------------------------------------------------


def test_file_and_its_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x.json ends in '.json': give a \.jsonl .* \.csv"):
        load_facts(tmp_path / "x.json")
    with pytest.raises(MissingDatasetError, match="x.csv does not exist"):
        load_facts(tmp_path / "x.csv")
    for name in ("x.csv", "x.jsonl"):
        with pytest.raises(ValueError, match="the file is empty"):
            load_facts(written(tmp_path, " \n\n", name))
        with pytest.raises(ValueError, match="not UTF-8 text"):
            load_facts(written(tmp_path, b"prompt\xff", name))


# Anything that UTF-8 holds but NUL, which csv of Python 3.10 refuses; the loader drops whitespace around it.
letters = st.characters(codec="utf-8", exclude_characters="\0")
texts = st.text(letters, min_size=1, max_size=8).map(str.strip).filter(bool)
plain = texts.filter(lambda text: "{}" not in text)
items = texts.filter(lambda text: not set("|[") & set(text) and "=>" not in text)  # as a CSV cell's lists have them


def facts(of_lists: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Records, some with numbers; ``of_lists``: the texts in their lists."""
    neighbour = st.one_of(of_lists, st.fixed_dictionaries({"prompt": of_lists, "target": of_lists}))
    one = st.fixed_dictionaries(
        {"prompt": st.tuples(plain, plain).map("{} ".join).filter(lambda text: text.count("{}") == 1), "subject": texts,
         "target_new": texts, "target_true": texts},
        optional={"paraphrases": st.lists(of_lists, max_size=3), "generation_prompts": st.lists(of_lists, max_size=2),
                  "neighbours": st.lists(neighbour, max_size=3)})
    return st.tuples(st.lists(one, min_size=1, max_size=4), st.booleans()).map(
        lambda drawn: [{**fact, "case_id": 7 * number - 3} if drawn[1] else fact
                       for number, fact in enumerate(drawn[0])])


def expected(given_facts: list[dict[str, Any]]) -> list[EditRecord]:
    return [
        EditRecord(
            case_id=fact.get("case_id", number), prompt=fact["prompt"], subject=fact["subject"],
            target_new=fact["target_new"], target_true=fact["target_true"],
            paraphrase_prompts=tuple(fact.get("paraphrases", ())),
            neighborhood_prompts=tuple(
                EvaluationPrompt(item, fact["target_true"]) if isinstance(item, str) else
                EvaluationPrompt(item["prompt"], item["target"]) for item in fact.get("neighbours", ())),
            generation_prompts=tuple(fact.get("generation_prompts", ())), dataset="facts")
        for number, fact in enumerate(given_facts)
    ]


@given(facts(texts), st.booleans())
def test_jsonl_gives_back_what_was_written(given_facts: list[dict[str, Any]], ascii_only: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = jsonl(*given_facts, ensure_ascii=ascii_only)
        assert load_facts(written(Path(folder), lines, "facts.jsonl")) == expected(given_facts)


@given(facts(items))
def test_csv_gives_back_what_was_written(given_facts: list[dict[str, Any]]) -> None:
    def cell(value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return " | ".join(item if isinstance(item, str) else f"{item['prompt']} => {item['target']}" for item in value)

    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, HEADER.strip().split(", "))
    writer.writeheader()
    writer.writerows({name: cell(value) for name, value in fact.items()} for fact in given_facts)
    with tempfile.TemporaryDirectory() as folder:
        assert load_facts(written(Path(folder), file.getvalue(), "facts.csv")) == expected(given_facts)
