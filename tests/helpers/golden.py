"""EasyEdit's golden cases: tensors that its own executors computed, and the models that they edited."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

import sphere_easyedit as sphere
from helpers.paths import TESTS

GOLDEN = TESTS / "golden"

GOLDEN_MODELS = {"llama": "tiny-llama", "gpt2": "tiny-gpt2-xl"}

@dataclass(frozen=True)
class Golden:
    """One of EasyEdit's golden cases: its tensors, settings and a way to load its model."""

    family: str
    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    folder: Path

    def load(self) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        path = self.folder / GOLDEN_MODELS[self.family]
        return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)

    def hparams(self, **changes: Any) -> sphere.SPHEREHyperParams:
        settings = {**self.meta["hparams"], "stats_dir": str(self.folder / "stats"), "L2": self.meta["alphaedit"]["L2"],
                    "P_loc": str(self.folder / "null_space_project.pt"), "nullspace_threshold": 0.02, "gamma": 0.5,
                    "context_templates": self.meta["context_templates"], **changes}
        return sphere.SPHEREHyperParams.from_dict(settings)

    def batch(self, number: int) -> list[dict[str, Any]]:
        return [self.meta["requests"][i] for i in self.meta["batches"][number]]


def load_golden(family: str) -> Golden:
    folder = GOLDEN / family
    return Golden(family, load_file(folder / "golden.safetensors"), json.loads((folder / "golden.json").read_text()),
                  folder)

