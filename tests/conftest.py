"""Shared by all tests: golden data, tiny models built from configs, and where real data lies."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

import sphere_easyedit as sphere
from sphere_easyedit.easyedit.discovery import load_easyedit

# Tiny models gain nothing from threads, and lose much where test processes share the cores.
torch.set_num_threads(1)

# Tests of the mathematics, editing and session rooms, whose coverage run_scripts/test.sh measures. All others are
# spared the tracing of lines, which takes a quarter as long again.
TRACED = frozenset(f"test_{name}" for name in (
    "covariance", "golden_parity", "hyperspherical", "output_path", "packing", "projection", "replay", "requests",
    "restraints", "session", "solvers", "suppression", "wrapper"))

# A minute of processor time each, or more.
LONGEST = tuple(f"test_{name}" for name in (
    "metrics_real", "replicas", "planning", "easyedit_plugin", "resume", "cli", "sweep_cluster", "real_model"))

GOLDEN = Path(__file__).parent / "golden"
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take longest go first, so that no process is left alone with one; mark all but the traced tests."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    for item in items:
        if item.path.stem not in TRACED:
            item.add_marker(pytest.mark.no_cover)


@pytest.fixture(autouse=True)
def own_log_level() -> Iterator[None]:
    """The command line sets the package's log level, which outlives a test that calls it in this process."""
    logger = logging.getLogger("sphere_easyedit")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(params=sorted(GOLDEN_MODELS))
def golden(request: pytest.FixtureRequest) -> Golden:
    """Each golden case in turn: Llama (Linear) and GPT-2 (Conv1D)."""
    return load_golden(request.param)


@pytest.fixture
def golden_llama() -> Golden:
    return load_golden("llama")


def gaussian(seed: int, rows: int, width: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A matrix of standard normal entries, drawn in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator, dtype=torch.float64).to(dtype)


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Frobenius norm of the difference over that of the reference."""
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """Config of a tiny decoder, by model type, that shares the golden tokenizer's vocabulary."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    common = {"vocab_size": 1500, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.15}
    rope = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 128}
    gpt = {"n_embd": 48, "n_layer": 4, "n_head": 4, "n_inner": 80, "n_positions": 128}
    own: dict[str, dict[str, Any]] = {
        "llama": rope,
        "qwen2": rope,
        "qwen3": {**rope, "head_dim": 12},
        "mistral": rope,
        # Sliding and full attention, each with its own rotary base, by turns.
        "gemma3_text": {**rope, "head_dim": 12, "sliding_window": 16,
                        "layer_types": ["sliding_attention", "full_attention"] * 2},
        "gemma2": {**rope, "head_dim": 12, "sliding_window": 16},
        "olmo2": rope,
        "granite": {**rope, "residual_multiplier": 0.25},
        "gpt2": gpt,
        "gptj": {**gpt, "rotary_dim": 8},
    }
    return AutoConfig.for_model(family, **{**common, **own[family], **changes})


def tiny_model(family: str, **changes: Any) -> nn.Module:
    """A tiny decoder with fixed random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()


@pytest.fixture
def tok() -> PreTrainedTokenizerBase:
    """The golden tokenizer: byte-level BPE, 1,500 tokens, no BOS."""
    return AutoTokenizer.from_pretrained(GOLDEN / "llama" / "tiny-llama")


def tiny_hparams(folder: Path, **changes: Any) -> sphere.SPHEREHyperParams:
    """Settings that edit a tiny model in a second, with statistics from text that it generates itself."""
    settings = {"model_name": "tiny", "layers": [1, 2], "v_num_grad_steps": 12, "v_lr": 0.5, "v_loss_layer": 3,
                "v_weight_decay": 0.001, "clamp_norm_factor": 4.0, "kl_factor": 0.0625, "L2": 0.1,
                "mom2_update_weight": 20.0, "nullspace_share": 0.6, "mom2_dataset": "generated", "mom2_n_samples": 12,
                "stats_dir": str(folder / "stats"), "context_templates": ["He said that. {}"], **changes}
    return sphere.SPHEREHyperParams.from_dict(settings)


@pytest.fixture(scope="session")
def llama_stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For `tiny_hparams`: a folder where tests of the plain tiny Llama share statistics, a second's work each time."""
    return tmp_path_factory.mktemp("llama")


REQUESTS = [
    {"prompt": "The capital of France is", "subject": "France", "target_new": "Rome"},
    {"prompt": "{} plays for the team", "subject": "John Smith", "target_new": "the United States"},
    {"prompt": "The official language of Brazil is", "subject": "Brazil", "target_new": "German"},
]


def edited_weights(model: nn.Module, hparams: sphere.SPHEREHyperParams) -> dict[int, Tensor]:
    """Copies of the edited weights as stored, by layer."""
    names = hparams.module_names(model.config)
    return {layer: model.get_parameter(f"{names.rewrite_module_tmp.format(layer)}.weight").detach().clone()
            for layer in hparams.layers}


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real records; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("SPHERE_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "counterfact.json").exists():
        pytest.skip(f"no real records at {folder}; set SPHERE_DATA to the folder that holds counterfact.json")
    return folder


@pytest.fixture(scope="session")
def package() -> Any:
    """EasyEdit, imported; tests that need it skip where there is none."""
    try:
        return load_easyedit()
    except ImportError as error:
        pytest.skip(str(error))


@contextmanager
def without_easyedit() -> Iterator[None]:
    """EasyEdit is not imported yet; afterwards its modules imported before are restored."""

    def imported() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == "easyeditor"]

    kept = {name: sys.modules.pop(name) for name in imported()}
    try:
        yield
    finally:
        sphere.unregister()
        for name in imported():
            del sys.modules[name]
        sys.modules.update(kept)
