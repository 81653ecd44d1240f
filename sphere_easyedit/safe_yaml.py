"""YAML from anybody: plain values, or one kind of error."""

from __future__ import annotations

from typing import Any

import yaml

from .messages import one_line

_LARGEST = 1_000_000  # values, aliases written out; a sweep of a thousand runs has some ten thousand


def read_yaml(text: str, source: str) -> Any:
    """The plain value that a YAML text holds: no tags that build objects, nothing within itself, nothing explosive.

    Args:
        text: the document.
        source: what errors call it.

    Raises:
        ValueError: it is no YAML, holds itself, or is too large with its aliases written out ("a billion laughs").
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        # Before anything is built of it: merging (<<) writes aliases out.
        if node is not None and _size(node, {}) > _LARGEST:
            raise ValueError(f"its aliases (*name) stand for more than {_LARGEST} values: write out what is meant")
        return yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError(f"{source}: not readable as YAML: it is nested too deep") from error
    except Exception as error:  # PyYAML lets AttributeError, KeyError and more out of malformed tagged scalars
        raise ValueError(f"{source}: not readable as YAML: {one_line(error)}") from error


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node is with every alias in it written out."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError(f"the value in line {node.start_mark.line + 1} holds itself by an alias (*name)")
        return known[id(node)]
    known[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]
