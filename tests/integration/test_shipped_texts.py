"""Generated texts that ship with the package: used where they are the model's own, left out everywhere else."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.models import tiny_hparams, tiny_model
from sphere_easyedit.methods import corpus, covariance
from sphere_easyedit.methods.checked_tensors import read_checked
from sphere_easyedit.methods.corpus import text_length, token_sequences
from sphere_easyedit.methods.covariance import moment_path, second_moments
from sphere_easyedit.methods.shipped_texts import FOLDER, shipped_texts, write_texts
from sphere_easyedit.methods.statistics_fingerprint import StatisticsFingerprints, fingerprint_path


def settings(folder: Path, **changed: Any) -> sphere.SPHEREHyperParams:
    return tiny_hparams(folder, **{"mom2_dataset": "generated", "mom2_n_samples": 4, "mom2_max_length": 8, **changed})


@pytest.fixture
def shipped(tok: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of texts that the tiny model wrote, in a folder where collecting looks for it."""
    hparams = settings(tmp_path)
    editable = hparams.editable(tiny_model("llama"))
    sequences = token_sequences(editable, tok, hparams, text_length(editable, hparams))
    origin = StatisticsFingerprints(editable, hparams, tok).text_origin()
    folder = tmp_path / "texts"
    monkeypatch.setattr(covariance, "shipped_texts", partial(shipped_texts, folder=folder))
    assert shipped_texts(origin, folder) is None
    path = write_texts("tiny", origin, sequences, folder)
    assert shipped_texts(origin, folder) == sequences
    return path


def collected(folder: Path, tok: PreTrainedTokenizerBase, model: nn.Module | None = None, **changed: Any
              ) -> tuple[dict[int, Tensor], list[Any]]:
    """Second moments and their fingerprints."""
    hparams = settings(folder, **changed)
    editable = hparams.editable(tiny_model("llama") if model is None else model)
    found = second_moments(editable, tok, hparams)
    return found, [json.loads(fingerprint_path(moment_path(editable, hparams, layer)).read_text()) for layer in found]


def test_shipped_text_gives_the_statistics_of_generated_text(shipped: Path, tok: PreTrainedTokenizerBase,
                                                             tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_generate", pytest.fail)
        found, fingerprints = collected(tmp_path / "shipped", tok)
    kept = shipped.rename(shipped.with_suffix(".away"))
    expected, theirs = collected(tmp_path / "generated", tok)
    assert kept.exists()
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)
    assert fingerprints == theirs


def _other_weights(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[0, 0] += 0.5


def _other_config(model: nn.Module) -> None:
    model.config.rms_norm_eps *= 2  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(("change", "changed"), [(_other_weights, {}), (_other_config, {}), (None, {"seed": 1}),
                                                 (None, {"mom2_n_samples": 3}), (None, {"mom2_max_length": 7})],
                         ids=["weights", "config", "seed", "number", "length"])
def test_texts_of_another_origin_are_not_used(change: Callable[[nn.Module], None] | None, changed: dict[str, Any],
                                              shipped: Path, tok: PreTrainedTokenizerBase, tmp_path: Path,
                                              caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(tiny_model("llama"))
    if change is not None:
        change(model)
    hparams = settings(tmp_path, **changed)
    origin = StatisticsFingerprints(hparams.editable(model), hparams, tok).text_origin()
    assert shipped_texts(origin, shipped.parent) is None
    assert not caplog.records


def test_damaged_file_is_reported_and_text_is_generated(shipped: Path, tok: PreTrainedTokenizerBase, tmp_path: Path,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    hparams = settings(tmp_path)
    origin = StatisticsFingerprints(hparams.editable(tiny_model("llama")), hparams, tok).text_origin()
    good = shipped.read_bytes()
    one_bit = bytearray(good)
    one_bit[-20] ^= 1
    for content in (b"", good[:-50], good.replace(b"texts 1", b"texts 0"), bytes(one_bit)):
        shipped.write_bytes(content)
        caplog.clear()
        assert shipped_texts(origin, shipped.parent) is None
        assert f"{shipped}" in caplog.text
        assert "the model writes its text anew" in caplog.text
    found, _ = collected(tmp_path / "damaged", tok)
    shipped.write_bytes(good)
    expected, _ = collected(tmp_path / "whole", tok)
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)


def test_smollm2_ships_the_texts_of_its_settings() -> None:
    hparams = sphere.SPHEREHyperParams.from_hparams("AlphaEdit/smollm2-135m")
    (path,) = FOLDER.glob("smollm2-135m-*.safetensors")
    metadata, _ = read_checked(path)
    origin = json.loads(metadata["origin"])
    assert (origin["texts"], origin["seed"]) == (hparams.mom2_n_samples, hparams.seed)
    texts = shipped_texts(origin)
    assert texts is not None
    assert len(texts) == hparams.mom2_n_samples
    assert max(map(len, texts)) == origin["tokens of a text"]
    assert path.stat().st_size < 200_000  # it travels in every wheel
