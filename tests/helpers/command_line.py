"""The command line in this process, and a folder to run it in."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from helpers.models import save_tiny_model, tiny_hparams


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer and a hyperparameter file."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_model(folder / "tiny-llama", "llama")
    settings = tiny_hparams(folder, model_name="tiny-llama").to_dict() | {"stats_dir": "stats"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder

