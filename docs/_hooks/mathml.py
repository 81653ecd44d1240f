"""Converts equations to MathML, which browsers display without a script: ```` ```math ```` blocks and ``$`...`$``."""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor


def fence(source: str, _language: str, _class: str, _options: dict[str, Any], _md: Markdown, **_: Any) -> str:
    """The HTML of a ``math`` block (a formatter of pymdownx.superfences)."""
    return f'<div class="math">{convert(source, display="block")}</div>'


class Equations(Extension):
    """Inline equations, written ``$`...`$``."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_Inline(r"\$`([^`]+)`\$", md), "equations", 195)  # before code, 190


class _Inline(InlineProcessor):
    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # type: ignore[override]
        return self.md.htmlStash.store(convert(m[1])), m.start(0), m.end(0)
