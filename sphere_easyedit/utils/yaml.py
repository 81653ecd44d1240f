"""Loads untrusted YAML safely, with one type of error."""

from __future__ import annotations

from typing import Any

import yaml

from .messages import one_line

_LARGEST = 1_000_000  # number of values with aliases expanded; a sweep of 1,000 runs has about 10,000


def read_yaml(text: str, source: str) -> Any:
    """Load a YAML document of plain values, without tags that build objects.

    Args:
        text: the document.
        source: its name in errors.

    Raises:
        ValueError: it is not valid YAML, has a key twice (YAML would keep the last) or a number to base 60 such
            as 4:00:00, refers to itself, or is too large with aliases expanded ("billion laughs").
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        # Checked before loading, since merge keys (<<) expand aliases.
        if node is not None and _size(node, {}) > _LARGEST:
            raise ValueError(f"its aliases (*name) expand to more than {_LARGEST} values: remove them")
        return yaml.safe_load(text)
    except RecursionError as error:
        raise ValueError(f"{source}: not readable as YAML: it is nested too deeply") from error
    except Exception as error:  # malformed tagged scalars raise AttributeError, KeyError and others
        raise ValueError(f"{source}: not readable as YAML: {one_line(error)}") from error


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Number of values in a node with all aliases expanded; refuses keys given twice and numbers to base 60."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise ValueError(f"the value in line {node.start_mark.line + 1} contains itself by an alias (*name)")
        return known[id(node)]
    known[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:int" and ":" in node.value:
        raise ValueError(f"line {node.start_mark.line + 1}: YAML reads {node.value} as a number to base 60: "
                         f'write "{node.value}"')
    if isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is given twice: remove one")
                keys.add(key.value)
        children = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    known[id(node)] = 1 + sum(_size(child, known) for child in children)
    return known[id(node)]
