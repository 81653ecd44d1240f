"""A small set of facts that ships with the package, for tutorials and tests without CounterFact.

The facts and prompt templates in ``data/demo.json`` were written for this package; results on them are not comparable
with results on CounterFact. For each relation the file contains one edit template, paraphrase templates with the same
continuation, generation templates, and the subjects grouped by their true object.
"""

from __future__ import annotations

import json
from dataclasses import replace
from importlib import resources
from itertools import zip_longest
from typing import Any, Final

from .records import EditRecord, EvaluationPrompt

_MAX_NEIGHBOURS: Final = 5


def demo_records() -> list[EditRecord]:
    """All demonstration facts, ``case_id`` counting from 0.

    Relations alternate, and within a relation its true objects, so that any prefix covers as many relations as
    possible. ``target_new`` rotates through the other objects of the relation, so that all occur about equally often.
    Neighbourhood prompts are the edit and paraphrase templates with other subjects of the same true object.
    """
    path = resources.files("sphere_easyedit") / "data" / "demo.json"
    table: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    records = _interleaved([_relation_records(relation) for relation in table])
    return [replace(record, case_id=case_id) for case_id, record in enumerate(records)]


def _relation_records(relation: dict[str, Any]) -> list[EditRecord]:
    """One relation's records, with alternating objects."""
    facts: dict[str, list[str]] = relation["facts"]
    objects = list(facts)
    groups = []
    for index, true_object in enumerate(objects):
        group = []
        for position, subject in enumerate(facts[true_object]):
            # A step of 1 .. len(objects) - 1 never gives the true object.
            step = 1 + position % (len(objects) - 1)
            group.append(EditRecord(
                case_id=0, prompt=relation["prompt"], subject=subject,
                target_new=objects[(index + step) % len(objects)], target_true=true_object,
                paraphrase_prompts=tuple(template.format(subject) for template in relation["paraphrases"]),
                neighborhood_prompts=_neighbours(relation, true_object, position),
                generation_prompts=tuple(template.format(subject) for template in relation["generation"]),
                dataset="demo"))
        groups.append(group)
    return _interleaved(groups)


def _neighbours(relation: dict[str, Any], true_object: str, position: int) -> tuple[EvaluationPrompt, ...]:
    """Prompts about the subjects that follow ``position`` (cyclically) in the same group."""
    group = relation["facts"][true_object]
    others = (group[position + 1:] + group[:position])[:_MAX_NEIGHBOURS]
    templates = [relation["prompt"], *relation["paraphrases"]]
    return tuple(EvaluationPrompt(templates[turn % len(templates)].format(other), true_object)
                 for turn, other in enumerate(others))


def _interleaved(groups: list[list[EditRecord]]) -> list[EditRecord]:
    """The first record of each group, then the second of each, and so on."""
    return [record for turn in zip_longest(*groups) for record in turn if record is not None]
