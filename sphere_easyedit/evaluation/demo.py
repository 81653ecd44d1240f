"""A small fact-editing set that ships with the package.

The facts and the prompt templates in ``data/demo.json`` were written for this package.  They serve tutorials,
smoke runs and tests where CounterFact itself is not at hand; numbers measured on them are not comparable with
numbers measured on CounterFact.

The table holds, for every relation, one edit template, a few paraphrase templates whose continuation is the
object as well, a few open-ended generation templates, and the facts grouped by their true object.
:func:`demo_records` expands it into records of CounterFact's schema.
"""

from __future__ import annotations

import json
from importlib import resources
from itertools import zip_longest
from typing import Any

__all__ = ["demo_records"]

_MAX_NEIGHBOURS = 5


def demo_records() -> list[dict[str, Any]]:
    """Return the demonstration facts as records of CounterFact's schema.

    The result is the same on every call.  Relations take turns, so any prefix spans as many relations as it
    has records (up to all of them), and within a relation the true objects take turns.  ``target_new``
    rotates through the other objects of the relation, so that every object is asked for about equally often.
    The neighbourhood prompts put other subjects with the same true object into the edit and paraphrase
    templates; their correct continuation is ``target_true``.

    Returns:
        Fresh records, ``case_id`` counting from 0; a caller may change them freely.
    """
    per_relation = [_relation_records(relation) for relation in _load_table()]
    records = _take_turns(per_relation)
    return [{"case_id": case_id, **record} for case_id, record in enumerate(records)]


def _load_table() -> list[dict[str, Any]]:
    """Read the table of relations, templates and facts from the package's data folder."""
    path = resources.files("sphere_easyedit") / "data" / "demo.json"
    table: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return table


def _relation_records(relation: dict[str, Any]) -> list[dict[str, Any]]:
    """Expand one relation of the table into records without ``case_id``, objects taking turns."""
    facts: dict[str, list[str]] = relation["facts"]
    objects = list(facts)
    groups = []
    for index, true_object in enumerate(objects):
        group = []
        for position, subject in enumerate(facts[true_object]):
            # A step of 1 .. len(objects) - 1 never lands on the true object again.
            step = 1 + position % (len(objects) - 1)
            new_object = objects[(index + step) % len(objects)]
            group.append(_record(relation, subject, position, true_object, new_object))
        groups.append(group)
    return _take_turns(groups)


def _record(
    relation: dict[str, Any], subject: str, position: int, true_object: str, new_object: str
) -> dict[str, Any]:
    """Build one record without ``case_id``; ``position`` is the subject's place in its object's group."""
    name = relation["relation"]
    return {
        "pararel_idx": None,
        "requested_rewrite": {
            "prompt": relation["prompt"],
            "relation_id": name,
            "target_new": {"str": new_object, "id": _object_id(name, new_object)},
            "target_true": {"str": true_object, "id": _object_id(name, true_object)},
            "subject": subject,
        },
        "paraphrase_prompts": [template.format(subject) for template in relation["paraphrases"]],
        "neighborhood_prompts": _neighbours(relation, true_object, position),
        "attribute_prompts": [],
        "generation_prompts": [template.format(subject) for template in relation["generation"]],
    }


def _neighbours(relation: dict[str, Any], true_object: str, position: int) -> list[str]:
    """Return prompts about the subjects that follow ``position`` (cyclically) in the same group."""
    group = relation["facts"][true_object]
    others = (group[position + 1 :] + group[:position])[:_MAX_NEIGHBOURS]
    templates = [relation["prompt"], *relation["paraphrases"]]
    return [templates[turn % len(templates)].format(other) for turn, other in enumerate(others)]


def _object_id(relation_name: str, target: str) -> str:
    """Return the stable id of an object, e.g. ``demo:dish-country/italy``."""
    return f"{relation_name}/{target.lower().replace(' ', '-')}"


def _take_turns(groups: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Merge the groups: the first record of each, then the second of each, and so on."""
    return [record for turn in zip_longest(*groups) for record in turn if record is not None]
