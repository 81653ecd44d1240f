"""The documentation's site is built strictly: no dead link, no page left out, nothing asked of the network."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.paths import REPOSITORY
from sphere_easyedit.hparams import SPHEREHyperParams
from sphere_easyedit.runs.schema import FILES

pytest.importorskip("mkdocstrings", reason="the extra `docs` is not installed")
pytest.importorskip("latex2mathml", reason="the extra `docs` is not installed")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a warning ends the build."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(REPOSITORY)
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config("mkdocs.yml", strict=True, site_dir=str(folder)))
    return folder


def test_pages_load_nothing_from_the_network(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*\ssrc="([^"]*)"|<link[^>]*\shref="([^"]*)"',
                            page.read_text("utf-8"))
        assert [url for pair in loaded for url in pair if re.match("(https?:)?//", url)] == [], page


def test_generated_pages_have_all_that_is_declared(site: Path) -> None:
    hyperparameters = (site / "reference" / "hyperparameters.html").read_text("utf-8")
    assert all(f"<code>{name}</code>" in hyperparameters for name in SPHEREHyperParams.__dataclass_fields__)
    commands = (site / "reference" / "command-line.html").read_text("utf-8")
    assert all(f"<code>{flag}</code>" in commands for flag in ("--guard-warmup", "--launcher", "--no-eval-before"))
    files = (site / "reference" / "files.html").read_text("utf-8")
    assert all(name in files for name in FILES)


def test_equations_become_mathml(site: Path) -> None:
    page = (site / "explanation" / "sphere.html").read_text("utf-8")
    assert page.count("<math") > 15
    assert "$`" not in page
