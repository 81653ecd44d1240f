"""Names of runs, which are names of directories: readable, stable, and without a way out of the sweep's folder."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

LONGEST: Final = 120  # characters of a name, seed not counted; file systems take 255 bytes
_LONGEST_VALUE: Final = 32

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")


def is_name(text: str) -> bool:
    """Whether runs may have this name. The seed at its end keeps it apart from files beside the run."""
    return len(text) <= LONGEST and _NAME.fullmatch(text) is not None


def compose(parts: Iterable[str], settings: Mapping[str, Any]) -> str:
    """``parts``, then each setting as NAME=VALUE by the order of names, joined by hyphens and cut to ``LONGEST``."""
    words = [_clean(part) for part in parts]
    words += [f"{_clean(name)}={_value(settings[name])}" for name in sorted(settings)]
    name = "-".join(words)
    return name if len(name) <= LONGEST else f"{name[:LONGEST - 9]}-{_digest(name)}"


def _value(value: Any) -> str:
    text = _plain(value)
    return _clean(text) if len(text) <= _LONGEST_VALUE else _digest(text)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(_plain(item) for item in value) or "empty"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("._-") or "_"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
