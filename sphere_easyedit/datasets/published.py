"""Records of CounterFact, MultiCounterFact and ZsRE in their published schemas, ROME's and MEND's."""

from __future__ import annotations

from .flattened import answered_prompts
from .json_records import RawRecord
from .records import DatasetName, EditRecord, EvaluationPrompt


def rome_record(given: RawRecord, dataset: DatasetName) -> EditRecord:
    """A record of ROME's schema, which CounterFact and MultiCounterFact share.

    Required: ``case_id``, ``requested_rewrite`` (``prompt`` with one ``{}``, ``subject``, ``target_new.str``,
    ``target_true.str``), ``paraphrase_prompts`` and ``neighborhood_prompts``; ``generation_prompts`` may be absent,
    and in MultiCounterFact the paraphrases too. Lists may be empty. Whitespace around targets is dropped. The
    neighbours' target is ``target_true``.
    """
    prompt = given.template("requested_rewrite.prompt")
    target_true = given.text("requested_rewrite.target_true.str").strip()
    return EditRecord(
        case_id=given.value("case_id", int, "a whole number"),
        prompt=prompt,
        subject=given.text("requested_rewrite.subject"),
        target_new=given.text("requested_rewrite.target_new.str").strip(),
        target_true=target_true,
        paraphrase_prompts=_texts(given, "paraphrase_prompts", required=dataset != "multi_counterfact"),
        neighborhood_prompts=tuple(
            EvaluationPrompt(text, target_true) for text in given.texts("neighborhood_prompts")
        ),
        generation_prompts=_texts(given, "generation_prompts", required=False),
        dataset=dataset,
    )


def _texts(given: RawRecord, field: str, required: bool) -> tuple[str, ...]:
    return given.texts(field) if required or given.has(field) else ()


def mend_record(given: RawRecord) -> EditRecord:
    """A ZsRE record of MEND's schema, read as the ROME/MEMIT/SPHERE protocol does.

    Required: ``subject``, ``src``, ``rephrase``, ``answers`` (the first is the edit's target; ``alt``, the target in
    EasyEdit's protocol, is only kept), ``loc`` and ``loc_ans``; ``portability`` is EasyEdit's addition. case_id is the
    record's index. The neighbour is ``loc + "?"`` with ``loc_ans``. The prompt is ``src`` with ``{}`` for the subject,
    which ``src`` must contain verbatim, since edits are made at the subject's last token.
    """
    answers = given.texts("answers")
    if not answers:
        given.refuse("answers", "an empty list", "at least one answer, the first being the edit's target")
    subject = given.text("subject")
    return EditRecord(
        case_id=given.index,
        prompt=given.template_around("src", subject),
        subject=subject,
        target_new=answers[0].strip(),
        target_true=None,
        paraphrase_prompts=(given.text("rephrase"),),
        neighborhood_prompts=(EvaluationPrompt(given.text("loc") + "?", given.text("loc_ans").strip()),),
        generation_prompts=(),
        dataset="zsre",
        target_alt=given.text("alt").strip() if given.raw.get("alt") else None,  # empty in a few published records
        portability_prompts=answered_prompts(given, "portability"),
    )
