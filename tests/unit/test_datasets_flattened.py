"""EasyEdit's flattened files: the same records as from the published ones, KnowEdit's axes, and how bad ones fail."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from sphere_easyedit.datasets.loaders import EditRecord, EvaluationPrompt, load_records


def flat_raw(case_id: int = 4) -> dict[str, Any]:
    return {
        "case_id": case_id,
        "prompt": f"The harbour of Port {case_id} lies on the",
        "target_new": "Black Sea",
        "subject": f"Port {case_id}",
        "ground_truth": "Adriatic",
        "rephrase_prompt": f"Ships reach Port {case_id} by the",
        "locality_prompt": "Split lies on the",
        "locality_ground_truth": "Adriatic",
    }


def knowedit_raw() -> dict[str, Any]:
    return {
        "subject": "Grey Otter Press",
        "prompt": "In which year was Grey Otter Press founded?",
        "target_new": "1950",
        "ground_truth": ["1899", "the year 1899"],
        "rephrase_prompt": "When did Grey Otter Press start?",
        "locality": {
            "Relation_Specificity": [
                {"prompt": "The town of Grey Otter Press is", "ground_truth": [["Bristol", "Bristol, England"]]},
                {"prompt": "Grey Otter Press prints", "ground_truth": ["maps"]},
                {"prompt": "Grey Otter Press sells", "ground_truth": [[""]]},
                {"prompt": "Grey Otter Press owns", "ground_truth": []},
            ],
            "Forgetfulness": {"prompt": ["Its second year was", "Its third year was"],
                              "ground_truth": ["1900", ["1901", "1901 AD"]]},
        },
        "portability": {"Reasoning": [{"prompt": "Who reigned when it was founded?", "ground_truth": "George VI"}],
                        "Subject_Aliasing": []},
    }


def written(folder: Path, records: list[Any]) -> Path:
    path = folder / "flat.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_counterfact_record_field_by_field(tmp_path: Path) -> None:
    path = written(tmp_path, [flat_raw()])
    expected = EditRecord(
        case_id=4,
        prompt="The harbour of {} lies on the",
        subject="Port 4",
        target_new="Black Sea",
        target_true="Adriatic",
        paraphrase_prompts=("Ships reach Port 4 by the",),
        neighborhood_prompts=(EvaluationPrompt("Split lies on the", "Adriatic"),),
        generation_prompts=(),
        dataset="counterfact",
    )
    assert load_records("counterfact", path) == [expected]
    assert load_records("multi_counterfact", path) == [dataclasses.replace(expected, dataset="multi_counterfact")]


def test_knowedit_axes_are_joined(tmp_path: Path) -> None:
    path = written(tmp_path, [knowedit_raw()])
    (record,) = load_records("counterfact", path)
    assert (record.case_id, record.target_new, record.target_true) == (0, "1950", "1899")
    assert record.neighborhood_prompts == (
        EvaluationPrompt("The town of Grey Otter Press is", "Bristol"),
        EvaluationPrompt("Grey Otter Press prints", "maps"),  # those without an answer are passed over
        EvaluationPrompt("Its second year was", "1900"),
        EvaluationPrompt("Its third year was", "1901"),
    )
    assert record.portability_prompts == (EvaluationPrompt("Who reigned when it was founded?", "George VI"),)
    (zsre,) = load_records("zsre", path)  # what the file edits in is alt
    assert (zsre.target_new, zsre.target_alt, zsre.target_true) == ("1899", "1950", None)
    assert zsre.neighborhood_prompts == record.neighborhood_prompts  # no question mark: they are no nq questions


def test_only_three_fields_are_needed(tmp_path: Path) -> None:
    raw = {"prompt": "{} lies on the", "subject": "Bari", "target_new": " Black Sea ", "locality": None}
    (record,) = load_records("counterfact", written(tmp_path, [raw]))
    assert record == EditRecord(0, "{} lies on the", "Bari", "Black Sea", None, (), (), (), "counterfact")
    (record,) = load_records("zsre", written(tmp_path, [raw]))  # no other answer than the file's
    assert record == EditRecord(0, "{} lies on the", "Bari", "Black Sea", None, (), (), (), "zsre", "Black Sea")


def test_lists_of_prompts(tmp_path: Path) -> None:
    raw = flat_raw()
    del raw["rephrase_prompt"]
    raw |= {"rephrase": ["a", "b"], "locality_prompt": ["c", "d"], "locality_ground_truth": ["e", ["f", "g"]],
            "portability_prompt": "h", "portability_ground_truth": ["i", "j"]}
    (record,) = load_records("counterfact", written(tmp_path, [raw]))
    assert record.paraphrase_prompts == ("a", "b")
    assert record.neighborhood_prompts == (EvaluationPrompt("c", "e"), EvaluationPrompt("d", "f"))
    assert record.portability_prompts == (EvaluationPrompt("h", "i"),)


@pytest.mark.parametrize(
    ("change", "field", "found"),
    [
        ({"subject": "Port Nine"}, "prompt", "str 'The harbour of Port 9 lies on the'"),
        ({"subject": "port 9"}, "prompt", "str 'The harbour of Port 9 lies on the' (it is spelled 'Port 9' there)"),
        ({"prompt": "{} and {}"}, "prompt", "2 times '{}'"),
        ({"target_new": ["Black Sea"]}, "target_new", "list ['Black Sea']"),
        ({"case_id": "9"}, "case_id", "str '9'"),
        ({"ground_truth": [{}]}, "ground_truth", "dict {}"),
        ({"rephrase_prompt": ["a", 3]}, "rephrase_prompt[1]", "int 3"),
        ({"locality_prompt": ["a", "b"]}, "locality_ground_truth", "str 'Adriatic'"),
        ({"portability_prompt": "a"}, "portability_ground_truth", "nothing"),
        ({"locality": "a"}, "locality", "str 'a'"),
        ({"locality": {"Axis.1": ["a"]}}, "locality.Axis.1[0]", "str 'a'"),
        ({"locality": {"Axis": [{"prompt": "a"}]}}, "locality.Axis[0].ground_truth", "nothing"),
        ({"locality": {"Axis": {"prompt": "a", "ground_truth": [[4]]}}}, "locality.Axis.ground_truth", "int 4"),
        ({"portability": {"New Question": "a"}}, "portability.New Answer", "nothing"),
    ],
)
def test_schema(tmp_path: Path, change: dict[str, Any], field: str, found: str) -> None:
    path = written(tmp_path, [flat_raw(1), flat_raw(9) | change])
    case = change.get("case_id", 9)
    with pytest.raises(ValueError) as caught:
        load_records("counterfact", path)
    assert f"{path}: record 1 (case_id {case!r}), field '{field}': found {found}" in str(caught.value)
    assert "expected" in str(caught.value)


def test_all_records_are_of_the_first_ones_schema(tmp_path: Path) -> None:
    rome = {"case_id": 5, "requested_rewrite": {"prompt": "{} is", "subject": "a", "target_new": {"str": "b"},
                                                "target_true": {"str": "c"}},
            "paraphrase_prompts": [], "neighborhood_prompts": []}
    with pytest.raises(ValueError, match=r"record 1 \(case_id 5\), field 'subject': found nothing"):
        load_records("counterfact", written(tmp_path, [flat_raw(), rome]))
    with pytest.raises(ValueError, match=r"record 1 \(case_id 4\), field 'requested_rewrite': found nothing"):
        load_records("counterfact", written(tmp_path, [rome, flat_raw()]))
    with pytest.raises(ValueError, match=r"record 1 \(case_id 4\), field 'case_id': found 4, which record 0 has too"):
        load_records("counterfact", written(tmp_path, [flat_raw(), flat_raw()]))


def test_real_counterfact_flattened_is_the_published_one(tmp_path: Path, data_dir: Path) -> None:
    path = data_dir / "counterfact.json"
    flat = [
        {"case_id": item["case_id"], "prompt": rewrite["prompt"].format(rewrite["subject"]),
         "target_new": rewrite["target_new"]["str"], "subject": rewrite["subject"],
         "ground_truth": rewrite["target_true"]["str"], "rephrase_prompt": item["paraphrase_prompts"][0],
         "locality_prompt": item["neighborhood_prompts"][0], "locality_ground_truth": rewrite["target_true"]["str"]}
        for item in json.loads(path.read_text()) for rewrite in [item["requested_rewrite"]]
    ]
    published = load_records("counterfact", path)
    for record, expected in zip(load_records("counterfact", written(tmp_path, flat)), published, strict=True):
        shortened = dataclasses.replace(expected, paraphrase_prompts=expected.paraphrase_prompts[:1],
                                        neighborhood_prompts=expected.neighborhood_prompts[:1], generation_prompts=(),
                                        prompt=record.prompt)
        assert record == shortened
        assert record.edit_prompt == expected.edit_prompt


def test_real_zsre_flattened_is_the_published_one(tmp_path: Path, data_dir: Path) -> None:
    path = data_dir / "zsre_mend_eval.json"
    # As EasyEdit's ZsreDataset does it, and with the subject and portability, which it leaves out.
    flat = [
        {"case_id": number, "prompt": item["src"], "subject": item["subject"], "target_new": item["alt"],
         "ground_truth": item["answers"][0], "rephrase_prompt": item["rephrase"], "locality_prompt": item["loc"],
         "locality_ground_truth": item["loc_ans"], "portability": item.get("portability")}
        for number, item in enumerate(json.loads(path.read_text())) if item["alt"]
    ]
    published = [record for record in load_records("zsre", path) if record.target_alt]
    assert load_records("zsre", written(tmp_path, flat)) == published
