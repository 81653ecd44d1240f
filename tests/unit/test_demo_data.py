"""The demonstration facts: form, balance, truth by the table, independence from the shared benchmarks."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from helpers.paths import REPOSITORY
from sphere_easyedit.datasets.loaders import EditRecord, load_records

REPO = REPOSITORY
TABLE_PATH = REPO / "sphere_easyedit" / "data" / "demo.json"
Table = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def records() -> list[EditRecord]:
    return load_records("demo")


@pytest.fixture(scope="module")
def table() -> Table:
    """Relations by their edit template, which no two share."""
    relations = json.loads(TABLE_PATH.read_text(encoding="utf-8"))
    found = {relation["prompt"]: relation for relation in relations}
    assert len(found) == len(relations)
    return found


def all_facts(table: Table) -> list[tuple[str, str, str]]:
    """(edit template, true object, subject), in the table's order."""
    return [(prompt, true_object, subject) for prompt, relation in table.items()
            for true_object, subjects in relation["facts"].items() for subject in subjects]


# --- the table ------------------------------------------------------------------------------------------------


def test_table_is_large_and_wide_enough(table: Table) -> None:
    assert len(table) >= 8
    assert len(all_facts(table)) >= 320
    for relation in table.values():
        assert len(relation["facts"]) >= 5
        assert min(len(subjects) for subjects in relation["facts"].values()) >= 3
        assert max(len(true_object.split()) for true_object in relation["facts"]) <= 3


def test_table_texts_are_stripped_and_subjects_unique_ignoring_case(table: Table) -> None:
    counts = Counter(subject.casefold() for _, _, subject in all_facts(table))
    assert set(counts.values()) == {1}
    for fact in all_facts(table):
        assert all(text and text == " ".join(text.split()) for text in fact)


def test_templates_have_one_slot_and_give_neither_subject_nor_object_away(table: Table) -> None:
    for relation in table.values():
        templates = [relation["prompt"], *relation["paraphrases"], *relation["generation"]]
        subjects = [subject for group in relation["facts"].values() for subject in group]
        assert len(set(templates)) == len(templates)
        assert min(len(relation["paraphrases"]), len(relation["generation"])) >= 2
        for template in templates:
            assert template.count("{}") == template.count("{") == template.count("}") == 1
            assert [subject for subject in subjects if subject.casefold() in template.casefold()] == []
        for true_object in relation["facts"]:
            assert [text for text in subjects + templates if true_object.casefold() in text.casefold()] == []


# --- the records ----------------------------------------------------------------------------------------------


def test_records_are_the_facts_of_the_table(records: list[EditRecord], table: Table) -> None:
    assert Counter((r.prompt, str(r.target_true), r.subject) for r in records) == Counter(all_facts(table))
    assert [record.case_id for record in records] == list(range(len(records)))
    assert load_records("demo") == records


def test_prompts_hold_the_subject_once_and_differ(records: list[EditRecord]) -> None:
    for record in records:
        prompts = [record.edit_prompt, *record.paraphrase_prompts, *record.generation_prompts]
        assert min(len(record.paraphrase_prompts), len(record.generation_prompts)) >= 2
        assert len(set(prompts)) == len(prompts)
        for text in prompts:
            assert text.count(record.subject) == 1
            assert "{" not in text and "}" not in text
        for text in (*prompts, *(prompt.text for prompt in record.neighborhood_prompts)):
            assert text and text == text.strip()


def test_target_new_is_a_false_object_of_the_same_relation_in_balance(records: list[EditRecord], table: Table) -> None:
    pairs: dict[str, set[tuple[str | None, str]]] = defaultdict(set)
    counts = {prompt: Counter(dict.fromkeys(relation["facts"], 0)) for prompt, relation in table.items()}
    for record in records:
        assert record.target_new != record.target_true
        assert record.target_new in table[record.prompt]["facts"]
        counts[record.prompt][record.target_new] += 1
        pairs[record.prompt].add((record.target_true, record.target_new))
    for prompt, count in counts.items():
        assert max(count.values()) - min(count.values()) <= 2, prompt
        assert len(pairs[prompt]) >= 3 * len(table[prompt]["facts"]), prompt


def test_neighbours_are_true_and_about_other_subjects(records: list[EditRecord], table: Table) -> None:
    for record in records:
        relation = table[record.prompt]
        sources: dict[str, list[tuple[str, str, str]]] = defaultdict(list)
        for true_object, subjects in relation["facts"].items():
            for subject in subjects:
                for template in (relation["prompt"], *relation["paraphrases"]):
                    sources[template.format(subject)].append((true_object, subject, template))
        made_from = []
        for prompt in record.neighborhood_prompts:
            (source,) = sources[prompt.text]
            assert prompt.target == source[0] == record.target_true
            assert record.subject.casefold() not in prompt.text.casefold()
            made_from.append(source)
        group = relation["facts"][record.target_true]
        assert len({subject for _, subject, _ in made_from}) == len(made_from) == min(5, len(group) - 1) >= 2
        assert len({template for _, _, template in made_from}) >= 2


def test_prefixes_span_relations_and_objects(records: list[EditRecord]) -> None:
    assert len({record.prompt for record in records[:6]}) == 6
    per_relation: dict[str, set[str | None]] = defaultdict(set)
    for record in records[:50]:
        per_relation[record.prompt].add(record.target_true)
    assert min(len(objects) for objects in per_relation.values()) >= 2


# --- independence from the shared benchmarks ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "field"), [("counterfact.json", "requested_rewrite"), ("zsre_mend_eval.json", "src")])
def test_no_prompt_occurs_in_the_shared_benchmarks(records: list[EditRecord], table: Table, name: str, field: str,
                                                   data_dir: Path) -> None:
    shared = json.loads((data_dir / name).read_text(encoding="utf-8"))
    asked = [entry[field] if isinstance(entry[field], str) else entry[field]["prompt"].format(entry[field]["subject"])
             for entry in shared]
    haystack = "\n".join([*strings_in(shared), *asked]).casefold()
    assert asked[0].casefold() in haystack
    own = {prompt for record in records for prompt in (
        record.edit_prompt, *record.paraphrase_prompts, *(neighbour.text for neighbour in record.neighborhood_prompts))}
    assert [prompt for prompt in own if prompt.casefold() in haystack] == []
    templates = {template for relation in table.values() for template in [relation["prompt"], *relation["paraphrases"]]}
    assert templates.isdisjoint(strings_in(shared))


def strings_in(value: Any) -> list[str]:
    """All texts in a JSON value."""
    if isinstance(value, dict | list):
        items = value.values() if isinstance(value, dict) else value
        return [text for item in items for text in strings_in(item)]
    return [value] if isinstance(value, str) else []
