"""Every architecture that can be built tiny: edited right by a plain forward pass, or refused in one line."""

from __future__ import annotations

import pytest

from helpers.architecture_trials import TOLERANCE, try_edit
from helpers.architectures import ARCHITECTURES, tiny_architecture
from helpers.paths import REPOSITORY

PAGE = REPOSITORY / "docs" / "MODELS.md"

pytestmark = pytest.mark.architectures


def _rows() -> dict[str, list[str]]:
    """The table in the docs: the cells behind each label."""
    rows = [line.strip("|").split("|") for line in PAGE.read_text(encoding="utf-8").splitlines()
            if line.startswith("| ") and "---" not in line and "| edited weight |" not in line]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in rows}


def test_the_page_lists_all() -> None:
    assert list(_rows()) == list(ARCHITECTURES)
    assert sum(not cells[1].startswith("refused") for cells in _rows().values()) >= 40


@pytest.mark.parametrize("label", ARCHITECTURES)
def test_edited_right_or_refused(label: str) -> None:
    trial = try_edit(label, tiny_architecture(label))
    _, told, *_ = _rows()[label]
    if trial.refusal is not None:
        assert "\n" not in trial.refusal and trial.untouched
        assert told.startswith("refused")
        return
    assert told == trial.path
    for before, after, reported in zip(trial.before, trial.after, trial.reported, strict=True):
        assert abs(after - reported) < TOLERANCE
        assert after < before - 0.02
