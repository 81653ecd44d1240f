"""Links of the documentation, and the code that docs/ARCHITECTURE.md shows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import sphere_easyedit as sphere
from helpers.models import tiny_hparams
from helpers.paths import REPOSITORY

PAGES = [*sorted(REPOSITORY.glob("*.md")), *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_relative_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


def test_the_method_that_the_architecture_page_shows_can_be_registered(tmp_path: Path) -> None:
    page = (REPOSITORY / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict[str, Any] = {"settings": tiny_hparams(tmp_path).to_dict()}
    try:
        exec(code, names)
        halved = names["hparams"].method.restrain(torch.ones(2, 3), torch.ones(2, 3), names["hparams"])
        assert torch.equal(halved, torch.full((2, 3), 0.5))
    finally:
        sphere.unregister_method("SmallSteps")
