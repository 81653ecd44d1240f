"""Fixtures of all tests, and marks by folder."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import sphere_easyedit as sphere
from helpers.golden import GOLDEN, GOLDEN_MODELS, Golden, load_golden
from helpers.paths import DATA, TESTS
from sphere_easyedit.easyedit.discovery import load_easyedit

# Tiny models gain nothing from threads, and lose much where test processes share the cores.
torch.set_num_threads(1)

FOLDERS = ("slow", "robustness", "integration", "unit")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by their folder; the folders with the longest tests go first, so that no process ends up alone.

    Lines are traced for coverage in unit and integration tests only: tracing slows the others and adds nothing.
    """
    folder_of = {item: item.path.relative_to(TESTS).parts[0] for item in items}
    items.sort(key=lambda item: FOLDERS.index(folder_of[item]))
    for item, folder in folder_of.items():
        item.add_marker(folder)
        if folder in ("slow", "robustness"):
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


@pytest.fixture
def tok() -> PreTrainedTokenizerBase:
    """The golden tokenizer: byte-level BPE, 1,500 tokens, no BOS."""
    return AutoTokenizer.from_pretrained(GOLDEN / "llama" / "tiny-llama")


@pytest.fixture(scope="session")
def llama_stats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For `tiny_hparams`: a folder where tests of the plain tiny Llama share statistics, a second's work each time."""
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the real records; tests that need it skip where it is absent."""
    folder = DATA
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
