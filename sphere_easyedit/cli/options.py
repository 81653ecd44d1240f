"""Options of the commands, declared once in groups that commands share.

A group is a dataclass whose fields are options: the name gives the flag (``num_edits``: ``--num-edits``), the
annotation the type and help. ``PANEL`` is their heading in ``--help``. A command takes groups as parameters and is
decorated with ``with_option_groups``, which passes the single options to typer.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args, get_type_hints

import typer

from ..datasets.records import DatasetName, Protocol
from ..defaults import BATCH_SIZE, FLUENCY_TOKENS, TEXT_TOKENS
from ..speed import SpeedName

if TYPE_CHECKING:
    from ..hparams import SPHEREHyperParams
    from ..runs.schedule import MeasureSettings

DtypeName = Literal["float32", "bfloat16", "float16"]
Command = Callable[..., None]
# typer takes a list of an enumeration's members, but none of literals.
ProtocolName = Enum("ProtocolName", {name: name for name in get_args(Protocol)}, type=str)  # type: ignore[misc]


def option(text: str, *names: str, panel: str | None = None, **more: Any) -> Any:
    """Declare an option.

    Args:
        text: help text.
        names: flags, if not derived from the field's name.
        panel: heading in ``--help``, if not the group's.
        more: further arguments of ``typer.Option``, such as ``min``.
    """
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def with_option_groups(command: Command) -> Command:
    """Replace a command's option groups by one option per field; its other parameters stay. All become keywords."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, type[Any]] = {name: hint for name, hint in hints.items()
                                    if isinstance(hint, type) and is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name in groups:
            parameters += _parameters_of(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def flat(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{one.name: values.pop(one.name) for one in fields(group)})
        command(**values)

    flat.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _parameters_of(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [_parameter(one, hints[one.name], group.PANEL) for one in fields(group)]


def _parameter(one: Field[Any], hint: Any, panel: str) -> inspect.Parameter:
    kind, declared = get_args(hint)
    declared = copy(declared)  # since groups may share it
    declared.rich_help_panel = declared.rich_help_panel or panel
    default = inspect.Parameter.empty if one.default is MISSING else one.default
    return inspect.Parameter(
        one.name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, declared],
        default=default if one.default_factory is MISSING else one.default_factory())


Verbose = Annotated[bool, option("Log more details.", "--verbose", "-v", panel="Output")]
Quiet = Annotated[bool, option("Print only results, warnings and errors.", "--quiet", "-q", panel="Output")]
AsJson = Annotated[bool, option("Print one JSON object instead of a table.", "--json", panel="Output")]
At = Annotated[int | None, option("Use the weights after this many edits, if they were kept (the last ones if not "
                                  "given).", min=1)]
Dtype = Annotated[DtypeName | None, option("Type of the model's weights (the checkpoint's own if not given).")]
RunFolder = Annotated[Path, typer.Argument(help="Run directory.")]
NewFolder = Annotated[Path, option("Folder to write to; must be new or empty.")]


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """The hyperparameters, and the type of the model's weights."""

    PANEL: ClassVar = "Method"

    hparams: Annotated[str, option("YAML file of hyperparameters, or a short name such as AlphaEdit/smollm2-135m.")]
    override: Annotated[list[str], option("Override a hyperparameter: NAME=VALUE, with VALUE in YAML; repeatable.",
                                          "--set")] = field(default_factory=list)
    speed: Annotated[SpeedName | None, option("Optimisation of target values: exact as EasyEdit's, balanced or fast "
                                              "(the file's, if not given).")] = None
    dtype: Dtype = None

    def load(self) -> SPHEREHyperParams:
        """The hyperparameters with their overrides."""
        chosen = [] if self.speed is None else [f"speed={self.speed}"]
        return read_hparams(self.hparams, chosen + self.override)


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The facts, and the batch size."""

    PANEL: ClassVar = "Data"

    dataset: Annotated[DatasetName, option("Data set to edit.")] = "demo"
    data: Annotated[Path | None, option("File of the data set. If not given, it is looked for in the folder "
                                        "SPHERE_DATA, then downloaded; demo needs none.")] = None
    batch_size: Annotated[int, option("Number of facts edited at once.", min=1)] = BATCH_SIZE
    seed: Annotated[int | None, option("Seed for drawing and ordering the facts (the file's order if not given).")
                    ] = None


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """Measurements of a model."""

    PANEL: ClassVar = "Evaluation"

    protocol: Annotated[list[ProtocolName], option("How metrics are computed; repeatable, the first is the summary's.")
                        ] = field(default_factory=lambda: [ProtocolName("paper")])
    eval_sample: Annotated[int | None, option("Measure at most this many of the facts edited so far, drawn at random "
                                              "(all if not given).", min=1)] = None
    eval_seed: Annotated[int, option("Seed for random samples and confidence intervals.", min=0)] = 0
    text: Annotated[Path | None, option("Held-out text (.txt, .jsonl) to measure perplexity on.")] = None
    text_tokens: Annotated[int | None, option("Number of tokens of that text to use.", min=1)] = TEXT_TOKENS
    fluency: Annotated[bool, option("Measure the fluency of generated text.", "--fluency")] = False
    fluency_tokens: Annotated[int, option("Number of new tokens per generated text.", min=1)] = FLUENCY_TOKENS
    fluency_prompts: Annotated[int | None, option("Generate at most this many texts per fact.", min=1)] = None
    references: Annotated[Path | None, option("Measure the consistency of generated text with these texts: a folder of "
                                              "ROME's files, or a .txt or .jsonl corpus.")] = None
    abilities: Annotated[list[str], option("Measure a general ability by lm-eval: gsm8k, rte, natural_questions, "
                                           "boolq, or any of its tasks; repeatable.")] = field(default_factory=list)
    abilities_data: Annotated[Path | None, option("Folder with the .jsonl files of these four tasks.")] = None
    abilities_shots: Annotated[int, option("Number of examples before each question.", min=0)] = 0
    abilities_limit: Annotated[int | None, option("Ask at most this many questions per task.", min=1)] = None

    def settings(self, abilities_every: int | None = None, **when: Any) -> MeasureSettings:
        """The measurement settings.

        Args:
            abilities_every: also measure abilities after every this many edits.
            when: further fields of ``MeasureSettings``, such as ``before`` and ``every``.
        """
        from ..evaluation.text_quality import Decoding
        from ..runs.schedule import AbilitySettings, MeasureSettings

        protocols: Any = tuple(one.value for one in self.protocol)
        decoding = Decoding(self.fluency_tokens, seed=self.eval_seed, prompts=self.fluency_prompts)
        abilities = AbilitySettings(tuple(self.abilities), abilities_every, self.abilities_data, self.abilities_shots,
                                    self.abilities_limit)
        return MeasureSettings(
            protocols=protocols, sample=self.eval_sample, seed=self.eval_seed, text=self.text,
            text_tokens=self.text_tokens, decoding=decoding if self.fluency or self.references is not None else None,
            references=self.references, abilities=abilities, **when)


def read_hparams(name: str, overrides: list[str]) -> SPHEREHyperParams:
    """Read hyperparameters and override some of them.

    Args:
        name: YAML file or short name.
        overrides: ``NAME=VALUE`` each.

    Raises:
        ValueError: an override has no ``=``, or a hyperparameter is unknown or out of range.
    """
    from ..hparams import SPHEREHyperParams

    loaded = SPHEREHyperParams.from_hparams(name)
    if not overrides:
        return loaded
    return SPHEREHyperParams.from_dict({**loaded.to_dict(), **parse_overrides(overrides)})


def parse_overrides(overrides: list[str]) -> dict[str, Any]:
    """Values by name from ``NAME=VALUE`` each, with VALUE in YAML (ValueError without ``=``, or for a wrong speed)."""
    from ..speed import with_speed
    from ..utils.yaml import read_yaml

    changes = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ValueError(f"--set {override!r} has no '=': write NAME=VALUE")
        changes[key.strip()] = read_yaml(value, f"--set {override!r}")
    return with_speed(changes)
