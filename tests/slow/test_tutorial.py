"""docs/tutorial.ipynb, executed with few facts and steps on SmolLM2-135M, and as it is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from helpers.paths import REPOSITORY
from helpers.processes import ENVIRONMENT
from sphere_easyedit.models.loading import smollm2_folder

NOTEBOOK = REPOSITORY / "docs" / "tutorial.ipynb"
QUICK = '''num_facts = 2
changes = {"layers": [6], "mom2_n_samples": 4, "mom2_max_length": 24, "v_num_grad_steps": 12,
           "context_templates": []}'''


def _code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _printed(cell: Any) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


@pytest.mark.real
def test_the_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        smollm2_folder()
    except ValueError as error:
        pytest.skip(str(error))
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, 4)
    [parameters] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    parameters.source = QUICK
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
                   ).execute()
    _, asked, edited, undone, _, _, result, _, plot, exported, adapted = _code_cells(notebook)
    assert "city of ... Rome" in _printed(edited)
    assert "city of ... Rome" not in _printed(asked)
    assert _printed(undone) == _printed(asked)
    assert "<table>" in result.outputs[0].data["text/html"]
    assert "image/png" in plot.outputs[0].data
    assert "relative error" in _printed(exported)
    before, after = _printed(adapted).split("\nWith the adapter:\n")
    assert before.splitlines() != after.splitlines()


def test_the_tutorial_is_stored_with_its_outputs() -> None:
    assert NOTEBOOK.stat().st_size < 400_000
    cells = _code_cells(nbformat.read(NOTEBOOK, 4))
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
