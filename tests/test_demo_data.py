"""The demonstration facts: schema, balance, truth by the table, independence from the shared benchmarks."""

from __future__ import annotations

import json
import os
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from sphere_easyedit.evaluation.demo import demo_records

REPO = Path(__file__).resolve().parents[1]
TABLE_PATH = REPO / "sphere_easyedit" / "data" / "demo.json"
RECORD_KEYS = {
    "case_id",
    "pararel_idx",
    "requested_rewrite",
    "paraphrase_prompts",
    "neighborhood_prompts",
    "attribute_prompts",
    "generation_prompts",
}
REWRITE_KEYS = {"prompt", "relation_id", "target_new", "target_true", "subject"}


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return demo_records()


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, Any]]:
    return {relation["relation"]: relation for relation in json.loads(TABLE_PATH.read_text(encoding="utf-8"))}


def rewrite(record: dict[str, Any]) -> dict[str, Any]:
    return record["requested_rewrite"]


def filled(record: dict[str, Any]) -> str:
    return rewrite(record)["prompt"].format(rewrite(record)["subject"])


def every_prompt(record: dict[str, Any]) -> list[str]:
    return [
        rewrite(record)["prompt"],
        filled(record),
        *record["paraphrase_prompts"],
        *record["neighborhood_prompts"],
        *record["generation_prompts"],
    ]


def all_facts(table: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """(relation, true object, subject), in the table's order."""
    return [
        (name, true_object, subject)
        for name, relation in table.items()
        for true_object, subjects in relation["facts"].items()
        for subject in subjects
    ]


def true_objects_by_prompt(relation: dict[str, Any]) -> dict[str, set[str]]:
    """Every filled prompt of the relation, with the true objects of the subjects that give that prompt."""
    answers: dict[str, set[str]] = defaultdict(set)
    for true_object, subjects in relation["facts"].items():
        for subject in subjects:
            for template in [relation["prompt"], *relation["paraphrases"]]:
                answers[template.format(subject)].add(true_object)
    return answers


# The table


def test_table_is_large_and_wide_enough(table: dict[str, dict[str, Any]]) -> None:
    assert len(table) >= 8
    assert len(all_facts(table)) >= 320
    for relation in table.values():
        assert len(relation["facts"]) >= 5
        assert min(len(subjects) for subjects in relation["facts"].values()) >= 3
        assert max(len(true_object.split()) for true_object in relation["facts"]) <= 3


def test_table_subjects_are_unique_ignoring_case(table: dict[str, dict[str, Any]]) -> None:
    counts = Counter(subject.casefold() for _, _, subject in all_facts(table))
    assert [subject for subject, count in counts.items() if count > 1] == []


def test_table_templates_have_one_slot_and_do_not_contain_subjects(table: dict[str, dict[str, Any]]) -> None:
    for relation in table.values():
        templates = [relation["prompt"], *relation["paraphrases"], *relation["generation"]]
        assert len(set(templates)) == len(templates)
        assert len(relation["paraphrases"]) >= 2
        assert len(relation["generation"]) >= 2
        for template in templates:
            assert template.count("{}") == 1
            assert template.count("{") == template.count("}") == 1
            for subjects in relation["facts"].values():
                assert [s for s in subjects if s.casefold() in template.casefold()] == []


def test_table_templates_and_subjects_do_not_give_an_object_away(table: dict[str, dict[str, Any]]) -> None:
    for relation in table.values():
        subjects = [subject for group in relation["facts"].values() for subject in group]
        templates = [relation["prompt"], *relation["paraphrases"], *relation["generation"]]
        for true_object in relation["facts"]:
            assert [t for t in subjects + templates if true_object.casefold() in t.casefold()] == []


def test_table_strings_are_stripped(table: dict[str, dict[str, Any]]) -> None:
    for name, true_object, subject in all_facts(table):
        for text in (name, true_object, subject):
            assert text and text == " ".join(text.split())


# The records


def test_records_are_the_facts_of_the_table(
    records: list[dict[str, Any]], table: dict[str, dict[str, Any]]
) -> None:
    got = Counter(
        (rewrite(r)["relation_id"], rewrite(r)["target_true"]["str"], rewrite(r)["subject"]) for r in records
    )
    assert got == Counter(all_facts(table))
    for record in records:
        assert rewrite(record)["prompt"] == table[rewrite(record)["relation_id"]]["prompt"]


def test_records_count_relations_and_unique_keys(records: list[dict[str, Any]]) -> None:
    assert len(records) >= 300
    assert len({rewrite(record)["relation_id"] for record in records}) >= 8
    assert [record["case_id"] for record in records] == list(range(len(records)))
    assert len({rewrite(record)["subject"] for record in records}) == len(records)


def test_records_have_counterfact_schema(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert set(record) == RECORD_KEYS
        assert set(rewrite(record)) == REWRITE_KEYS
        assert record["attribute_prompts"] == []
        for key in ("paraphrase_prompts", "neighborhood_prompts", "generation_prompts"):
            assert isinstance(record[key], list)
            assert all(isinstance(prompt, str) for prompt in record[key])
        for key in ("target_new", "target_true"):
            assert set(rewrite(record)[key]) == {"str", "id"}
            assert isinstance(rewrite(record)[key]["id"], str)
    assert json.loads(json.dumps(records)) == records


def test_object_ids_stand_for_one_object(records: list[dict[str, Any]]) -> None:
    by_id: dict[str, set[tuple[str, str]]] = defaultdict(set)
    by_object: dict[tuple[str, str], set[str]] = defaultdict(set)
    for record in records:
        for key in ("target_new", "target_true"):
            target = rewrite(record)[key]
            name = (rewrite(record)["relation_id"], target["str"])
            by_id[target["id"]].add(name)
            by_object[name].add(target["id"])
    assert {len(names) for names in by_id.values()} == {1}
    assert {len(ids) for ids in by_object.values()} == {1}


def test_subject_is_where_it_must_be(records: list[dict[str, Any]]) -> None:
    for record in records:
        prompt, subject = rewrite(record)["prompt"], rewrite(record)["subject"]
        assert prompt.count("{}") == 1
        assert subject not in prompt
        for text in [filled(record), *record["paraphrase_prompts"], *record["generation_prompts"]]:
            assert text.count(subject) == 1
            assert "{" not in text and "}" not in text


def test_paraphrases_are_other_prompts(records: list[dict[str, Any]]) -> None:
    for record in records:
        prompts = [filled(record), *record["paraphrase_prompts"], *record["generation_prompts"]]
        assert len(record["paraphrase_prompts"]) >= 2
        assert len(record["generation_prompts"]) >= 2
        assert len(set(prompts)) == len(prompts)


def test_prompts_are_not_empty_and_have_no_outer_whitespace(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert [prompt for prompt in every_prompt(record) if not prompt or prompt != prompt.strip()] == []


def test_target_new_is_a_false_object_of_the_same_relation(
    records: list[dict[str, Any]], table: dict[str, dict[str, Any]]
) -> None:
    for record in records:
        new, true = rewrite(record)["target_new"]["str"], rewrite(record)["target_true"]["str"]
        assert new != true
        assert new in table[rewrite(record)["relation_id"]]["facts"]


def test_target_new_is_balanced(records: list[dict[str, Any]], table: dict[str, dict[str, Any]]) -> None:
    pairs: dict[str, set[tuple[str, str]]] = defaultdict(set)
    counts = {name: Counter(dict.fromkeys(relation["facts"], 0)) for name, relation in table.items()}
    for record in records:
        name = rewrite(record)["relation_id"]
        new, true = rewrite(record)["target_new"]["str"], rewrite(record)["target_true"]["str"]
        counts[name][new] += 1
        pairs[name].add((true, new))
    for name, count in counts.items():
        assert max(count.values()) - min(count.values()) <= 2, name
        assert len(pairs[name]) >= 3 * len(table[name]["facts"]), name


def test_neighbours_are_true_and_about_other_subjects(
    records: list[dict[str, Any]], table: dict[str, dict[str, Any]]
) -> None:
    answers = {name: true_objects_by_prompt(relation) for name, relation in table.items()}
    for record in records:
        neighbours = record["neighborhood_prompts"]
        assert 2 <= len(neighbours) <= 5
        assert len(set(neighbours)) == len(neighbours)
        for prompt in neighbours:
            assert rewrite(record)["subject"].casefold() not in prompt.casefold()
            assert prompt not in (filled(record), rewrite(record)["prompt"], *record["paraphrase_prompts"])
            true_object = rewrite(record)["target_true"]["str"]
            assert answers[rewrite(record)["relation_id"]][prompt] == {true_object}


def test_neighbours_have_distinct_subjects_and_several_templates(
    records: list[dict[str, Any]], table: dict[str, dict[str, Any]]
) -> None:
    for record in records:
        relation = table[rewrite(record)["relation_id"]]
        group = relation["facts"][rewrite(record)["target_true"]["str"]]
        made_from = {
            template.format(subject): (subject, template)
            for subject in group
            for template in [relation["prompt"], *relation["paraphrases"]]
        }
        sources = [made_from[prompt] for prompt in record["neighborhood_prompts"]]
        assert len({subject for subject, _ in sources}) == len(sources) == min(5, len(group) - 1)
        assert len({template for _, template in sources}) >= 2


def test_prefixes_span_relations_and_objects(records: list[dict[str, Any]]) -> None:
    first = records[:50]
    assert len({rewrite(record)["relation_id"] for record in first}) >= 6
    assert len({rewrite(record)["relation_id"] for record in records[:6]}) == 6
    per_relation: dict[str, set[str]] = defaultdict(set)
    for record in first:
        per_relation[rewrite(record)["relation_id"]].add(rewrite(record)["target_true"]["str"])
    assert min(len(objects) for objects in per_relation.values()) >= 2


def test_two_calls_agree_and_share_nothing() -> None:
    first, second = demo_records(), demo_records()
    assert first == second
    rewrite(first[0])["target_new"]["str"] = "changed"
    for record in first:
        record["paraphrase_prompts"].clear()
        record["neighborhood_prompts"].append("changed")
        record["generation_prompts"].append("changed")
    assert demo_records() == second


# Independence from the shared benchmarks


def shared_file(name: str) -> list[dict[str, Any]]:
    folder = Path(os.environ.get("SPHERE_DATA") or REPO.parent / "shared" / "data")
    path = folder / name
    if not path.is_file():
        pytest.skip(f"{path} is absent; set SPHERE_DATA to the folder that holds it")
    return json.loads(path.read_text(encoding="utf-8"))


def strings_in(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings_in(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings_in(item)]
    return [value] if isinstance(value, str) else []


def prompts_that_occur_in(prompts: set[str], texts: list[str]) -> list[str]:
    haystack = "\n".join(texts).casefold()
    return sorted(prompt for prompt in prompts if prompt.casefold() in haystack)


def demo_prompts(records: list[dict[str, Any]]) -> set[str]:
    own = [[filled(r), *r["paraphrase_prompts"], *r["neighborhood_prompts"]] for r in records]
    return {prompt for prompts in own for prompt in prompts}


def test_no_prompt_or_template_occurs_in_counterfact(
    records: list[dict[str, Any]], table: dict[str, dict[str, Any]]
) -> None:
    shared = shared_file("counterfact.json")
    texts = strings_in(shared) + [filled(record) for record in shared]
    assert len(texts) > len(shared)
    assert prompts_that_occur_in({filled(shared[0])}, texts) == [filled(shared[0])]
    assert prompts_that_occur_in(demo_prompts(records), texts) == []
    own_templates = {t for relation in table.values() for t in [relation["prompt"], *relation["paraphrases"]]}
    assert own_templates.isdisjoint({rewrite(record)["prompt"] for record in shared})


def test_no_prompt_occurs_in_zsre(records: list[dict[str, Any]]) -> None:
    shared = shared_file("zsre_mend_eval.json")
    texts = strings_in(shared)
    assert prompts_that_occur_in({shared[0]["src"]}, texts) == [shared[0]["src"]]
    assert prompts_that_occur_in(demo_prompts(records), texts) == []
