"""Reads EasyEdit's flattened files, in which a record is one prompt with its subject filled in, and strings.

Three forms are read: EasyEdit's CounterFact (``counterfact-edit.json``, ``-train``, ``-val``), MEND's schema as
converted by its ZsRE class, and KnowEdit, whose ``locality`` and ``portability`` are objects of named axes, which are
joined in the file's order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .json_records import RawRecord, shown
from .records import DatasetName, EditRecord, EvaluationPrompt


def is_flattened(raw: Mapping[str, Any]) -> bool:
    """Whether a record has this schema rather than a published one."""
    return "prompt" in raw and "requested_rewrite" not in raw and "src" not in raw


def flattened_record(given: RawRecord, dataset: DatasetName) -> EditRecord:
    """A record of a flattened file.

    Required: ``prompt`` (with the subject verbatim, or one ``{}``), ``subject``, ``target_new``. Optional:
    ``case_id`` (else the record's index), ``ground_truth``, ``rephrase_prompt`` or ``rephrase``,
    ``locality_prompt`` with ``locality_ground_truth``, ``portability_prompt`` with ``portability_ground_truth``,
    ``locality`` and ``portability``. Prompts are a string or a list; of several answers the first is used. Prompts of
    an axis with a blank answer are skipped. All this is as in EasyEdit.

    In ZsRE the file's ``target_new`` is ``alt`` and its ``ground_truth`` the first correct answer, so they become
    ``target_alt`` and ``target_new`` as with MEND's schema, and ``locality_prompt`` gets the ``?`` that the paper's
    protocol appends to ``loc``.
    """
    subject = given.text("subject")
    target = given.text("target_new").strip()
    truth = _first(given, "ground_truth", given.raw.get("ground_truth"))
    zsre = dataset == "zsre"
    ending = "?" if zsre else ""
    neighbours = [EvaluationPrompt(pair.text + ending, pair.target) for pair in _pairs(given, "locality_")]
    return EditRecord(
        case_id=given.case_id(),
        prompt=given.template_or_around("prompt", subject),
        subject=subject,
        target_new=(truth or target) if zsre else target,
        target_true=None if zsre else truth,
        paraphrase_prompts=_rephrased(given),
        neighborhood_prompts=(*neighbours, *answered_prompts(given, "locality")),
        generation_prompts=(),
        dataset=dataset,
        target_alt=target if zsre else None,
        portability_prompts=(*_pairs(given, "portability_"), *answered_prompts(given, "portability")),
    )


def answered_prompts(given: RawRecord, field: str) -> tuple[EvaluationPrompt, ...]:
    """Prompts with their answers from an object of axes; none without such a field.

    An axis is ``{"prompt": ..., "ground_truth": ...}`` or a list of such; or the object is GPT-4's one hop for ZsRE and
    CounterFact, with ``New Question`` and ``New Answer``.
    """
    if not given.has(field):
        return ()
    axes = given.part(field, given.raw[field], "an object of named axes with prompts and answers")
    if "New Question" in axes.raw:
        return (EvaluationPrompt(axes.text("New Question"), axes.text("New Answer").strip()),)
    return tuple(pair for axis, group in axes.raw.items() for pair in _axis(axes, axis, group))


def _axis(axes: RawRecord, axis: str, group: Any) -> Iterator[EvaluationPrompt]:
    named = [(f"{axis}[{i}]", item) for i, item in enumerate(group)] if isinstance(group, list) else [(axis, group)]
    for name, item in named:
        inner = axes.part(name, item, "an object with prompt and ground_truth")
        for text, answer in _answers(inner, "prompt", "ground_truth"):
            if answer is not None:
                yield EvaluationPrompt(text, answer)


def _pairs(given: RawRecord, prefix: str) -> Iterator[EvaluationPrompt]:
    """Prompts with their answers from two fields of the record; none without such a prompt."""
    prompt_field, answer_field = f"{prefix}prompt", f"{prefix}ground_truth"
    if given.has(prompt_field):
        for text, answer in _answers(given, prompt_field, answer_field):
            if answer is None:
                given.refuse(answer_field, shown(given.raw[answer_field]), "an answer that is not blank")
            yield EvaluationPrompt(text, answer)


def _answers(given: RawRecord, prompt_field: str, answer_field: str) -> list[tuple[str, str | None]]:
    """Each prompt with the first of its answers, or None if that is blank."""
    prompts = _strings(given, prompt_field)
    answers = given.value(answer_field, object, "an answer to the prompt")
    if not isinstance(given.raw[prompt_field], list):
        answers = [answers]
    elif not isinstance(answers, list) or len(answers) != len(prompts):
        given.refuse(answer_field, shown(answers), f"a list of {len(prompts)} answers, one per prompt")
    return [(text, _first(given, answer_field, answer)) for text, answer in zip(prompts, answers, strict=True)]


def _strings(given: RawRecord, field: str) -> tuple[str, ...]:
    """A required string, or a list of strings."""
    return given.texts(field) if isinstance(given.raw.get(field), list) else (given.text(field),)


def _rephrased(given: RawRecord) -> tuple[str, ...]:
    return next((_strings(given, field) for field in ("rephrase_prompt", "rephrase") if given.has(field)), ())


def _first(given: RawRecord, field: str, answer: Any) -> str | None:
    """The first string of nested lists of answers and aliases; None if it is blank."""
    while isinstance(answer, list):
        answer = answer[0] if answer else None
    if answer is not None and not isinstance(answer, str):
        given.refuse(field, shown(answer), "a string, or a list that begins with one")
    return (answer or "").strip() or None
