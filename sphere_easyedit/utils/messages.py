"""Text for error messages: one line, and suggestions for unknown names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from typing import Final

MOST: Final = 200  # characters


def one_line(error: BaseException | str, most: int = MOST) -> str:
    """An error's text on one line of at most ``most`` characters.

    Libraries' errors can have many lines, of which the first give the cause. The error's type is prefixed if the text
    is a single word or empty, as a KeyError's.
    """
    text = " ".join(str(error).split())
    if isinstance(error, BaseException) and " " not in text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= most else text[:most - 1].rstrip() + "…"


def kind_and_text(error: BaseException) -> str:
    """An error's type and its whole text on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def nearest(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Up to ``count`` known names most similar to ``name``, ignoring case, the nearest first.

    Args:
        cutoff: minimum similarity, 0 to 1 (see ``difflib``).
    """
    by_lower = {one.lower(): one for one in known}
    return [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=count, cutoff=cutoff)]


def suggestion(name: str, known: Collection[str]) -> str:
    """The end of a message about an unknown name: the nearest known one, or all of them."""
    near = nearest(name, known)
    return f": did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
