"""Hooks of MkDocs: pages generated from the code, equations as MathML, links to files outside the site.

The names of the generated pages are in ``GENERATED``; nothing of them is kept in the repository.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line_page
import hyperparameters_page
import mathml
import tutorial_page
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

GENERATED: dict[str, Callable[[], str]] = {
    "reference/command-line.md": command_line_page.text,
    "reference/hyperparameters.md": hyperparameters_page.text,
    "tutorial.md": tutorial_page.text,
}
_LINK = re.compile(r"\[([^\]]+)\]\((\.\.?/[^)#\s]+)[^)]*\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the Markdown extension for equations."""
    config.markdown_extensions.append(mathml.Equations())  # type: ignore[arg-type]
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [
        {"name": "math", "class": "math", "format": mathml.fence}]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for name, text in GENERATED.items():
        files.append(File.generated(config, name, content=text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, **_: Any) -> str:
    """Show links to files outside the site, such as the source code, as their paths in the repository."""
    docs = Path(config.docs_dir)

    def shown(link: re.Match[str]) -> str:
        target = (docs / page.file.src_uri).parent / link[2]
        path = os.path.relpath(os.path.normpath(target), docs.parent)
        return link[0] if path.startswith("docs") else f"`{path}`"

    # On the site the notebook is a page of its own.
    return _LINK.sub(shown, markdown).replace("tutorial.ipynb)", "tutorial.md)")
