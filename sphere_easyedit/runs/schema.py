"""The files of a run directory and their records: one definition for whatever writes or reads them.

=======================  ==========================================================================================
file                     content
=======================  ==========================================================================================
``config.yaml``          mappings ``run``, ``hparams``, ``versions``, ``model``, ``machine`` (see ``run_config``)
``edits.jsonl``          :class:`BatchRecord`, one a batch
``metrics.jsonl``        :class:`Measurement`, one an evaluation and protocol
``energy.csv``           ``callbacks.EnergyRecord``, one row a batch and layer
``spaces.csv``           :class:`SpaceRecord`, one row a batch and layer
``neurons.safetensors``  ``neurons.NeuronRecord``, of the latest evaluation
``scores/*.jsonl``       ``metrics.CaseScores``, one a case and protocol; a file an evaluation
``texts/*.jsonl``        ``text_quality.TextQuality``, one a case; a file an evaluation
``skipped.jsonl``        :class:`Skipped`, one a fact that was left out
``cases.jsonl``          :class:`CaseRecord`, one a case, once the run has ended
``summary.json``         :class:`Summary`, once the run has ended
``examples.json``        continuations ``before`` and ``after`` of the first prompts
``conflicts.json``       ``conflicts.ConflictReport``
``guard.json``           state of ``drift_guard.DriftGuard``
=======================  ==========================================================================================

Records are pydantic dataclasses: reading one checks it. Fields that older runs lack have a default, and fields that are
not known here are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated, Any, Final, Literal, TypeVar, get_args

from pydantic import AliasChoices, BeforeValidator, Field, StrictInt, StrictStr, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

CONFIG, EDITS, METRICS, SUMMARY = "config.yaml", "edits.jsonl", "metrics.jsonl", "summary.json"
ENERGY, CASES, EXAMPLES = "energy.csv", "cases.jsonl", "examples.json"
SPACES, NEURONS, SKIPPED, GUARD = "spaces.csv", "neurons.safetensors", "skipped.jsonl", "guard.json"
CONFLICTS, SCORES, TEXTS = "conflicts.json", "scores", "texts"  # the latter two are folders
FILES: Final = (CONFIG, EDITS, METRICS, SUMMARY, ENERGY, CASES, EXAMPLES, SPACES, NEURONS, SKIPPED, GUARD, CONFLICTS,
                SCORES, TEXTS)

# What was measured: all facts before or after, those edited so far, those of the last batch (see `measuring`).
When = Literal["before", "during", "last_batch", "after"]
MetricName = Literal["efficacy", "generalization", "specificity"]
FACT_METRICS: Final[tuple[MetricName, ...]] = get_args(MetricName)
METRIC_NAMES: Final = (*FACT_METRICS, "fluency", "consistency")
CaseId = int | str

_NORMAL_95: Final = 1.96  # standard errors
_R = TypeVar("_R")


def _number(value: object) -> object:
    """nan for null, which stands for numbers that JSON can't hold."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("not a number")
    return value


Count = Annotated[int, Field(strict=True, ge=0)]
Number = Annotated[float, BeforeValidator(_number)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
ByLayer = dict[Annotated[int, Field(ge=0)], Number]
StrictCaseId = StrictInt | StrictStr


@dataclass(frozen=True)
class MeasureDescription:
    """What ``config.yaml`` says of the measurements, as far as readers need it."""

    protocols: list[str] | None = None


@dataclass(frozen=True)
class RunDescription:
    """The part ``run`` of ``config.yaml``, as far as readers need it: number of facts, and seeds of their draw."""

    num_edits: Count | None = None
    seed: Count | None = None
    order_seed: Count | None = None
    measure: MeasureDescription | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` cases with its 95% interval (None where there is none); percent for the metrics of a run.

    Attributes:
        mean: nan where no case has the metric (``n`` is 0).
        protocol: how fluency and consistency were measured; None for other metrics.
    """

    mean: Number
    ci95: tuple[Number, Number] | None
    n: Count
    protocol: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        found = {"mean": self.mean if self.n else None, "ci95": None if self.ci95 is None else list(self.ci95),
                 "n": self.n}
        return found if self.protocol is None else found | {"protocol": self.protocol}


@dataclass(frozen=True)
class AbilityEstimate(Estimate):
    """A general ability (see ``abilities.AbilityScore``); the interval is the normal approximation's."""

    ci95: tuple[Number, Number] | None = None
    n: Count = 0
    task: str | None = None
    metric: str | None = None
    stderr: Number | None = None
    shots: int | None = None
    extra: dict[str, Any] = Field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.ci95 is None and self.stderr is not None:
            half = _NORMAL_95 * self.stderr
            object.__setattr__(self, "ci95", (self.mean - half, self.mean + half))

    def to_dict(self) -> dict[str, Any]:
        return {"task": self.task, "metric": self.metric, "mean": None if math.isnan(self.mean) else self.mean,
                "stderr": self.stderr, "n": self.n, "shots": self.shots, "protocol": self.protocol,
                "extra": self.extra}


@dataclass(frozen=True)
class BatchRecord:
    """A batch: a line of ``edits.jsonl``.

    Attributes:
        num_edits: edits in the model once the batch has ended.
        case_ids: of its edits.
        seconds: wall time by part.
        wall_seconds: wall time in all.
        losses: last loss of each target value (nats).
        update_norms: Frobenius norm of each layer's change by this batch.
        energy: hyperspherical energy after it, by layer.
        efficacy: percent of its facts that the model says right after it, by the run's first protocol; None where it
            was not measured.
        strength: share of the batch's change that callbacks let stand.
    """

    num_edits: Count
    case_ids: tuple[StrictCaseId, ...] = ()
    seconds: dict[str, Number] = Field(default_factory=dict)
    wall_seconds: Number = 0.0
    losses: tuple[Number, ...] = ()
    update_norms: ByLayer = Field(default_factory=dict)
    energy: ByLayer = Field(default_factory=dict)
    efficacy: Number | None = None
    strength: Number = 1.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return asdict(self)


@dataclass(frozen=True)
class Measurement:
    """One evaluation of a run by one protocol, or of general abilities: a line of ``metrics.jsonl``.

    Attributes:
        num_edits: edits in the model.
        when: on what it was measured: ``before`` editing; ``during``, on the edits so far or a seeded sample of them;
            on the ``last_batch`` alone; ``after``, on all of them.
        protocol: by which the numbers were computed; numbers of two protocols don't compare.
        metrics: by name.
        perplexity: on held-out text; infinite or nan for a broken model, None where not measured.
        update_norms: Frobenius norm of the change since the unedited model, by layer.
        cases: how many facts were measured; None where it was not written down, and for abilities.
        abilities: general abilities by task; empty for an evaluation of facts.
        seconds: wall time; 0 for all but the first of protocols that were measured at once.
    """

    num_edits: Count
    when: When
    protocol: StrictStr
    metrics: dict[str, Estimate] = Field(default_factory=dict)
    perplexity: Number | None = None
    update_norms: ByLayer = Field(default_factory=dict)
    cases: Count | None = None
    abilities: dict[str, AbilityEstimate] = Field(default_factory=dict)
    seconds: Number = 0.0

    @classmethod
    def from_dict(cls, line: Mapping[str, Any], where: str) -> Measurement:
        """Of a line of ``metrics.jsonl``, where metrics stand beside the other entries.

        Raises:
            ValueError: as ``read_record``.
        """
        watched = line.get("watched") or {}
        if not isinstance(watched, Mapping):
            raise ValueError(f"{where}: watched is {watched!r:.80}, not an object: it was changed by hand or damaged")
        given = {name: value for name, value in line.items() if not isinstance(value, dict)}
        given["metrics"] = {name: {"ci95": None, **value} for name, value in line.items()
                            if isinstance(value, dict) and name not in ("watched", "abilities")}
        given |= {"perplexity": watched.get("perplexity"), "update_norms": watched.get("update_norms") or {},
                  "abilities": line.get("abilities") or {}}
        return read_record(cls, given, where)

    def to_dict(self) -> dict[str, Any]:
        """As a line of ``metrics.jsonl``."""
        found: dict[str, Any] = {"num_edits": self.num_edits, "when": self.when, "protocol": self.protocol}
        if self.abilities:
            found["abilities"] = {task: estimate.to_dict() for task, estimate in self.abilities.items()}
        else:
            found |= {"cases": self.cases, **estimates_to_dict(self.metrics), "watched": self.watched()}
        return found | {"seconds": self.seconds}

    def main_metrics(self) -> dict[str, Estimate]:
        """Those of ``METRIC_NAMES`` that were measured, in their order."""
        return {name: self.metrics[name] for name in METRIC_NAMES if name in self.metrics}

    def watched(self) -> dict[str, Any]:
        """What goes with all protocols."""
        return {"perplexity": self.perplexity,
                "update_norms": {str(layer): norm for layer, norm in self.update_norms.items()}}


def estimates_to_dict(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, Any]]:
    """Metrics as JSON takes them."""
    return {name: estimate.to_dict() for name, estimate in estimates.items()}


@dataclass(frozen=True)
class SpaceRecord:
    """Where one change of one layer's weight lies: a line of ``spaces.csv``.

    Attributes:
        since, num_edits: edits before and after the change.
        layer: number of the layer.
        share: of the change's squared Frobenius norm in the principal space, 0 to 1, to 4 digits; nan of no change. By
            chance it would be ``rank / d_in``.
        rank: of the principal space.
        d_in: width of the weight.
    """

    since: Count
    num_edits: Count
    layer: int
    share: float
    rank: Count
    d_in: Count


@dataclass(frozen=True)
class Skipped:
    """A fact that was left out: a line of ``skipped.jsonl``.

    Attributes:
        index: among the run's facts, from 0; ``place`` in the file.
        case_id: its case.
        num_edits: edits in the model when it was left out.
        error: why, in one line.
    """

    index: Annotated[int, Field(strict=True, ge=0, validation_alias=AliasChoices("index", "place"))]
    case_id: StrictCaseId
    num_edits: Count
    error: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"place": self.index, "case_id": self.case_id, "num_edits": self.num_edits, "error": self.error}


_Scores = dict[str, float | None]


@dataclass(frozen=True)
class CaseRecord:
    """A case of a run that has ended: a line of ``cases.jsonl``.

    Attributes:
        pre, post: scores before and after, by metric from 0 to 1; None where not measured.
        generations: continuations ``before`` and ``after``; None where none were generated.
    """

    case_id: StrictCaseId | None = None
    prompt: str | None = None
    subject: str | None = None
    target_new: str | None = None
    target_true: str | None = None
    pre: _Scores | None = None
    post: _Scores | None = None
    generations: dict[str, str | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        found = asdict(self)
        return found if self.generations is not None else {name: value for name, value in found.items()
                                                           if name != "generations"}


@dataclass(frozen=True)
class SkippedCase:
    """A fact that ``summary.json`` lists as left out, and why."""

    case_id: StrictCaseId
    error: str = ""


@dataclass(frozen=True)
class Summary:
    """What a run came to: ``summary.json``.

    Attributes:
        protocol: of ``pre`` and ``post``, the run's first.
        num_edits: edits in the model at the end.
        num_facts: facts of the run; None in older runs, which left none out.
        skipped: facts that were left out.
        stopped: why a callback ended the run; None if none did.
        pre, post: metrics before editing and after, by name; None where not measured.
        protocols: ``pre`` and ``post`` of each protocol.
        watched: ``pre`` and ``post`` of what goes with all protocols: perplexity and update norms.
        preparation_seconds, editing_seconds, evaluation_seconds: wall time.
        peak_memory_bytes: of the GPUs that hold the model, else of the process.
        weights_sha256: of the edited weights at the end.
    """

    num_edits: Count
    protocol: str | None = None
    num_facts: Count | None = None
    skipped: tuple[SkippedCase, ...] = ()
    stopped: str | None = None
    pre: dict[str, Estimate] | None = None
    post: dict[str, Estimate] | None = None
    protocols: dict[str, Any] = Field(default_factory=dict)
    watched: dict[str, Any] = Field(default_factory=dict)
    preparation_seconds: Finite | None = None
    editing_seconds: Finite | None = None
    evaluation_seconds: Finite | None = None
    peak_memory_bytes: Count | None = None
    weights_sha256: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        pre, post = (None if one is None else estimates_to_dict(one) for one in (self.pre, self.post))
        return {"protocol": self.protocol, **asdict(self), "pre": pre, "post": post,
                "skipped": [asdict(one) for one in self.skipped]}


def read_record(kind: type[_R], data: object, where: str) -> _R:
    """A record of what a file holds.

    Args:
        kind: a class of this module, or any type that pydantic knows.
        data: as JSON was parsed.
        where: file and line, for the error.

    Raises:
        ValueError: it is not of this form; the message says where, what and the value.
    """
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        value = "missing" if first["type"] == "missing" else f"{first['input']!r:.80}"
        told = f"{where}: {field}" if field else where
        raise ValueError(f"{told} is {value} ({first['msg']}): it was changed by hand or damaged") from error
