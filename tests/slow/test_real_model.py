"""SmolLM2-135M, a real model with tied embeddings, edited with real records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sphere_easyedit import SPHEREHyperParams
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.methods.shipped_texts import shipped_texts
from sphere_easyedit.methods.statistics_fingerprint import StatisticsFingerprints
from sphere_easyedit.models.loading import SMOLLM2, load_model
from sphere_easyedit.runs.sequential import RunSettings, run_sequential

pytestmark = pytest.mark.real


@pytest.fixture
def all_threads() -> Iterator[None]:
    """Undo conftest's single thread, which suits tiny models only."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("all_threads")
def test_real_facts_are_learned(data_dir: Path, tmp_path: Path) -> None:
    try:
        model, tok = load_model(SMOLLM2, "cpu")
    except ValueError as error:
        pytest.skip(str(error))
    assert model.config.tie_word_embeddings
    shipped = SPHEREHyperParams.from_hparams(f"AlphaEdit/{SMOLLM2}")
    # A run with these settings waits for no text that the model writes.
    assert shipped_texts(StatisticsFingerprints(shipped.editable(model), shipped, tok).text_origin()) is not None
    hparams = SPHEREHyperParams.from_dict(shipped.to_dict() | {
        "stats_dir": str(tmp_path), "mom2_dataset": str(data_dir / "wikitext_train.txt"), "mom2_n_samples": 30,
        "mom2_max_length": 128, "v_num_grad_steps": 15, "context_templates": ["I have heard that. {}"]})
    records = [replace(record, neighborhood_prompts=record.neighborhood_prompts[:2])
               for record in load_records("counterfact", data_dir / "counterfact.json", 4, seed=1)]
    result = run_sequential(model, tok, records, hparams, RunSettings(tmp_path / "run", 2, examples=1))
    pre, post = result.summary["pre"], result.summary["post"]
    assert pre["efficacy"]["mean"] <= 25.0
    assert post["efficacy"]["mean"] >= 75.0
    assert post["generalization"]["mean"] > pre["generalization"]["mean"]
    assert len(result.tracker.records) == 3
    assert result.generations[0][1] != result.generations[0][2]
