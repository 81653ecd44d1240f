"""Runs for tests of reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from helpers.golden import GOLDEN
from helpers.models import tiny_hparams, tiny_model
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.runs.schedule import MeasureSettings
from sphere_easyedit.runs.sequential import RunSettings, run_sequential

ALL = ["curves", "changes", "gains", "forgetting", "shares", "heatmaps", "embedding", "cosines", "spectra"]

@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two real runs of a tiny model: MEMIT without SPHERE and with it, 12 facts, one of them with a tag in it."""
    folder = tmp_path_factory.mktemp("runs")
    tok = AutoTokenizer.from_pretrained(GOLDEN / "llama" / "tiny-llama")
    text = folder / "held-out.txt"
    text.write_text("The river runs to the sea. " * 12)
    records = load_records("demo", None, 11, 0)
    facts = folder / "facts.jsonl"
    facts.write_text(json.dumps({"prompt": "The language of {} is", "subject": "<script>alert(1)</script>",
                                 "target_new": "</script><b>French"}) + "\n")
    records += load_records("facts", facts, None, None)
    made = []
    for name, alpha in (("MEMIT-plain", 0.0), ("MEMIT-sphere", 0.8)):
        hparams = tiny_hparams(folder, base_alg="MEMIT", alpha=alpha, projection_stage="update")
        measure = MeasureSettings(every=3, text=text)
        run_sequential(tiny_model("llama"), tok, records, hparams,
                       RunSettings(folder / name, 3, examples=12, measure=measure,
                                   described={"dataset": "demo", "seed": 0, "data": None}))
        made.append(folder / name)
    return made

