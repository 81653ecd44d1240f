"""The command line in this process, and a folder to run it in."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from helpers.golden import GOLDEN
from helpers.models import tiny_hparams, tiny_model


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer and a hyperparameter file."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(folder / "tiny-llama")
    for file in (GOLDEN / "llama" / "tiny-llama").glob("tokenizer*"):
        (folder / "tiny-llama" / file.name).write_bytes(file.read_bytes())
    settings = tiny_hparams(folder, model_name="tiny-llama").to_dict() | {"stats_dir": "stats"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    return folder

