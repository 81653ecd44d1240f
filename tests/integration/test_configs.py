"""Configs that the package ships, so that planning needs no network."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import transformers
from transformers import CONFIG_MAPPING

from helpers.paths import REPOSITORY
from sphere_easyedit.hparams import SPHEREHyperParams
from sphere_easyedit.hparams_files import available_hparams
from sphere_easyedit.models.loading import SMOLLM2
from sphere_easyedit.models.model_class import meta_model
from sphere_easyedit.models.shipped_configs import planning_config, shipped_config, shipped_models
from sphere_easyedit.planning import PlanSettings, make_plan

ROOT = REPOSITORY
# Parameters, tied ones once, as the hub and the publishers count them.
PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248, "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "meta-llama/Llama-3.2-1B": 1_235_814_400, "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096, "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512, "Qwen/Qwen3-0.6B": 596_049_920, "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096, "Qwen/Qwen3-8B": 8_190_735_360, "google/gemma-3-270m": 268_098_176,
    "google/gemma-3-1b-pt": 999_885_952, "google/gemma-3-4b-pt": 4_300_079_472,
    "allenai/OLMo-2-0425-1B": 1_484_916_736, "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "allenai/Olmo-3-1025-7B": 7_298_011_136, "EleutherAI/gpt-j-6B": 6_050_882_784,
    "openai-community/gpt2-xl": 1_557_611_200,
}


def known(name: str) -> None:
    if (kind := shipped_models()[name]["model_type"]) not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[object]]:
    """Whoever opens a connection fails; yields the addresses that were asked for."""
    asked: list[object] = []

    def refused(*arguments: object, **_: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    yield asked


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shipped_config_makes_a_model_of_the_published_size(name: str) -> None:
    known(name)
    config = shipped_config(name)
    assert config is not None
    assert sum(parameter.numel() for parameter in meta_model(config).parameters()) == PUBLISHED[name]


@pytest.mark.parametrize("name", available_hparams())
def test_every_shipped_file_is_planned_without_network(
        name: str, no_network: list[object], caplog: pytest.LogCaptureFixture) -> None:
    hparams = SPHEREHyperParams.from_hparams(name)
    if hparams.model_name == SMOLLM2:
        pytest.skip("comes with a package, not from the hub")
    known(hparams.model_name)
    started = time.perf_counter()
    with caplog.at_level(logging.INFO, "sphere_easyedit.models.shipped_configs"):
        plan = make_plan(hparams, PlanSettings(20, 20))
    assert time.perf_counter() - started < 20
    assert not no_network
    told = [record.getMessage() for record in caplog.records if record.name == "sphere_easyedit.models.shipped_configs"]
    assert told == [
        f"{hparams.model_name} is not on this machine: using the sizes that the package ships"]
    [weights] = [item for item in plan.downloads if item.name == hparams.model_name]
    assert weights.bytes == pytest.approx(PUBLISHED[hparams.model_name] * plan_itemsize(hparams.model_name))


def plan_itemsize(name: str) -> int:
    return {"bfloat16": 2, "float32": 4}[shipped_models()[name]["torch_dtype"]]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, for which the hub is a port where nobody listens."""
    return subprocess.run(
        [sys.executable, "-m", "sphere_easyedit", *arguments], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0",
                          "COLUMNS": "300", "OMP_NUM_THREADS": "1", **environment})


def test_the_readmes_plan_says_where_its_numbers_are_from(tmp_path: Path) -> None:
    done = run("plan", "--hparams", "AlphaEdit/llama3-8b", "--num-edits", "100", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("meta-llama/Meta-Llama-3-8B-Instruct is not on this machine") == 1
    assert "Retry" not in done.stderr


def test_a_starting_file_of_a_shipped_model_takes_no_network(tmp_path: Path) -> None:
    done = run("hparams", "meta-llama/Llama-3.2-1B", HF_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "v_loss_layer: 15" in done.stdout


@pytest.mark.parametrize("command", [("hparams", "nobody/none"), ("plan", "--num-edits", "1", "--hparams")],
                         ids=lambda command: command[0])
def test_an_unknown_model_without_network_ends_at_once_in_a_line(command: tuple[str, ...], tmp_path: Path) -> None:
    if command[0] == "plan":
        text = (ROOT / "hparams" / "SPHERE" / "AlphaEdit" / "llama3-8b.yaml").read_text()
        (tmp_path / "none.yaml").write_text(text.replace("meta-llama/Meta-Llama-3-8B-Instruct", "nobody/none"))
        command = (*command, str(tmp_path / "none.yaml"))
    done = run(*command, HF_HOME=str(tmp_path))
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("error: the config of 'nobody/none' can't be read: there is no such folder")
    assert "the hub can't be reached" in line


def test_a_config_that_is_here_comes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "gpt2-xl"  # the hub name of a shipped model
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 2}))
    assert planning_config("gpt2-xl", "gpt2-xl").n_embd == 48


def test_other_libraries_lines_are_written_once(tmp_path: Path) -> None:
    """huggingface_hub has a handler of its own and hands its lines on to the root's, too."""
    code = ("from sphere_easyedit.cli.common import set_up; set_up(); import logging, huggingface_hub, transformers;"
            "from transformers.utils import logging as own;"
            "logging.getLogger('huggingface_hub.file').warning('hub line');"
            "own.get_logger('transformers.thing').warning('model line');"
            "logging.getLogger('elsewhere').warning('plain line');"
            "logging.getLogger('sphere_easyedit.x').info('our line')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    for line in ("hub line", "model line", "plain line", "our line"):
        assert done.stderr.count(line) == 1, done.stderr
