"""Reads a sweep's YAML file and checks its values; errors are ValueErrors with location, value and remedy."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ...utils import yaml as safe_yaml
from ...utils.messages import suggestion

_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, with environment variables expanded."""
    content = safe_yaml.read_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a sweep is a YAML mapping with `methods` or `runs`, found {content!r:.60}")
    return {key: _expanded(value, path) for key, value in content.items()}


def _expanded(value: Any, path: Path) -> Any:
    """Replace ``${NAME}`` in strings by environment variables."""
    if isinstance(value, dict):
        return {key: _expanded(item, path) for key, item in value.items()}
    if isinstance(value, list):
        return [_expanded(item, path) for item in value]
    if not isinstance(value, str):
        return value
    missing = [name for name in _VARIABLE.findall(value) if name not in os.environ]
    if missing:
        raise ValueError(f"{path}: {value!r} names the environment variable {missing[0]}, which is not set: set it, or "
                         "write the path itself")
    return _VARIABLE.sub(lambda match: os.environ[match.group(1)], value)


def check_keys(mapping: Mapping[Any, Any], known: Collection[str], where: str) -> None:
    """Refuse unknown keys."""
    for key in mapping:
        if key not in known:
            raise ValueError(f"{where} has no setting {key!r}{suggestion(str(key), known)}")


def as_mapping(value: Any, where: str) -> Mapping[Any, Any]:
    """A mapping; empty for None."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where} must be a mapping of names to values, not {value!r:.60}")
    return value


def as_text(value: Any, where: str) -> str:
    """A string that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where} must be given as a text, not {value!r:.60}")
    return value


def as_whole(value: Any, where: str, least: int) -> int:
    """An integer of at least ``least``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{where} is {value!r:.60}: give a whole number of at least {least}")
    return value


def as_flag(value: Any, where: str) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{where} is {value!r:.60}: give true or false")
    return value


def as_list(value: Any) -> list[Any]:
    """A list as it is, anything else as a list of one."""
    return value if isinstance(value, list) else [value]
