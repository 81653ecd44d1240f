"""The tutorial: ``docs/tutorial.ipynb`` with its outputs, as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "tutorial.ipynb"


def text() -> str:
    """The page, as Markdown; images are part of it."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(part for cell in cells for part in _parts(cell)) + "\n"


def _parts(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
    elif source.strip():
        yield f"```python\n{source}\n```"
        for output in cell["outputs"]:
            yield from _shown(output)


def _shown(output: dict[str, Any]) -> Iterator[str]:
    if output["output_type"] == "stream":
        yield _text(output["text"])
        return
    data = {kind: "".join(value) for kind, value in output.get("data", {}).items() if not isinstance(value, dict)}
    if "image/svg+xml" in data:
        yield f'<div class="output">{data["image/svg+xml"]}</div>'
    elif "image/png" in data:
        image = data["image/png"].replace("\n", "")
        yield f'<div class="output"><img alt="Output of the cell above" src="data:image/png;base64,{image}"></div>'
    elif "text/html" in data:
        yield f'<div class="output">\n{data["text/html"]}\n</div>'
    elif "text/plain" in data:
        yield _text(data["text/plain"])


def _text(value: str | list[str]) -> str:
    return "```text\n" + "".join(value).rstrip() + "\n```"
