"""Errors, also of other libraries, as text on one line."""

from __future__ import annotations

from typing import Final

MOST: Final = 200  # characters


def one_line(error: BaseException | str, most: int = MOST) -> str:
    """An error's text on one line of at most ``most`` characters.

    Libraries write errors of many lines (transformers lists every class that it knows), whose beginning says what is
    wrong. Where the text is a single word or none, as a KeyError's, the error's type is put in front.
    """
    text = " ".join(str(error).split())
    if isinstance(error, BaseException) and " " not in text:
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= most else text[:most - 1].rstrip() + "…"


def kind_and_text(error: BaseException) -> str:
    """An error's type and its whole text on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
