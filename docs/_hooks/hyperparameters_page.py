"""The page of hyperparameters, from their declarations in ``sphere_easyedit/hparams.py``.

There, a comment behind a field, or above it, describes the field; a comment after an empty line is a heading.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from typing import NamedTuple

from sphere_easyedit import hparams
from sphere_easyedit.hparams import SPHEREHyperParams
from sphere_easyedit.methods.registry import METHODS

_INTRODUCTION = """# Hyperparameters

Generated from the declarations in the code. They stand in a YAML file (`edit --hparams FILE`), are overridden by
`--set NAME=VALUE`, or are given to `SPHEREHyperParams.from_dict`. Names and defaults are EasyEdit's where EasyEdit has
the field. A default of "by method" depends on the base method (last table). "needed" means that there is no default;
`L2` is needed by AlphaEdit, `mom2_update_weight` by the others. `sphere-easyedit hparams MODEL` writes a complete file.
"""
_FIRST_HEADING = "Model"
_KINDS = {"int": "integer", "float": "number", "str": "text", "bool": "true, false", "int | str": "integer or text",
          "list[int]": "list of integers", "list[str]": "list of texts", "dict[str, Any]": "mapping"}
_DERIVED = {"base_alg": "`AlphaEdit`", "executor": "`native`", "alpha": "by method", "projection_stage": "by method",
            "principal_space": "by method"}


class _Field(NamedTuple):
    heading: str
    name: str
    kind: str
    default: str
    description: str


def text() -> str:
    """The page, as Markdown.

    Raises:
        ValueError: a field has no comment that describes it.
    """
    lines, heading = [_INTRODUCTION], None
    for field in _fields():
        if field.heading != heading:
            heading = field.heading
            lines += ["", f"## {heading.rstrip('.')}", "", "| name | values | default | meaning |",
                      "| --- | --- | --- | --- |"]
        lines.append(f"| `{field.name}` | {_values(field)} | {_default(field)} | {_cell(field.description)} |")
    return "\n".join([*lines, "", _methods()])


def _fields() -> Iterator[_Field]:
    source = inspect.getsource(SPHEREHyperParams).splitlines()
    (declared,) = ast.parse("\n".join(source)).body
    assert isinstance(declared, ast.ClassDef)
    heading = _FIRST_HEADING
    for node in declared.body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        above, at = [], node.lineno - 2
        while source[at].strip().startswith("#"):
            above.insert(0, source[at].strip("# "))
            at -= 1
        behind = source[(node.end_lineno or node.lineno) - 1][node.end_col_offset or 0:].strip(" #")
        if above and not source[at].strip():
            if behind:
                heading, above = " ".join(above), []
            else:  # the heading, and what describes the field, in one comment
                heading, above = above[0], above[1:]
        description = " ".join([*above, behind]).strip()
        if not description:
            raise ValueError(f"{node.target.id} of SPHEREHyperParams has no comment that describes it: add one")
        default = "" if node.value is None else ast.unparse(node.value)
        yield _Field(heading, node.target.id, ast.unparse(node.annotation), default, description)


def _values(field: _Field) -> str:
    if field.name in hparams._CHOICES:
        return ", ".join(f"`{choice}`" for choice in hparams._CHOICES[field.name])
    kind = field.kind.removesuffix(" | None")
    kind = _KINDS.get(kind, kind)
    if field.name in hparams._RANGES:
        return f"{kind} in {hparams._RANGES[field.name]}".replace("inf)", "∞)")
    if field.name in hparams._SMALLEST:
        return f"{kind}, at least {hparams._SMALLEST[field.name]}"
    return kind


def _default(field: _Field) -> str:
    if not field.default:
        return "needed"
    if field.default == "_NOT_GIVEN":
        return _DERIVED.get(field.name, "needed")
    if field.default.startswith("field("):
        return "`{}`"
    value = getattr(SPHEREHyperParams, field.name)
    return "none" if value is None else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _cell(words: str) -> str:
    sentence = words[0].upper() + words[1:]
    return sentence.replace("|", "\\|") + ("" if sentence.endswith(".") else ".")


def _methods() -> str:
    rows = ["## Defaults by method", "", "| `base_alg` | `alpha` | `projection_stage` | `principal_space` |",
            "| --- | --- | --- | --- |"]
    for name in METHODS.names:
        method = METHODS.get(name)
        rows.append(f"| {name} | `{method.default_alpha}` | `{method.default_stage}` | "
                    f"`{method.default_principal_space}` |")
    return "\n".join([*rows, ""])
