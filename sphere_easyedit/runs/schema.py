"""The files of a run directory and their records, defined once for writers and readers.

=======================  ==========================================================================================
file                     content
=======================  ==========================================================================================
``config.yaml``          mappings ``run``, ``hparams``, ``versions``, ``model``, ``machine`` (see ``run_config``)
``edits.jsonl``          :class:`BatchRecord`, one per batch
``metrics.jsonl``        :class:`Measurement`, one per evaluation and protocol
``energy.csv``           ``callbacks.EnergyRecord``, one row per batch and layer
``spaces.csv``           :class:`SpaceRecord`, one row per batch and layer
``neurons.safetensors``  ``neurons.NeuronRecord``, of the latest evaluation
``scores/*.jsonl``       ``metrics.CaseScores``, one per case and protocol; a file per evaluation
``texts/*.jsonl``        ``text_quality.TextQuality``, one per case; a file per evaluation
``skipped.jsonl``        :class:`Skipped`, one per skipped fact
``repairs.jsonl``        :class:`Repair`, one per batch of facts that were edited again
``cases.jsonl``          :class:`CaseRecord`, one per case, at the end of the run
``summary.json``         :class:`Summary`, at the end of the run
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
REPAIRS, CONFLICTS = "repairs.jsonl", "conflicts.json"
SCORES, TEXTS = "scores", "texts"  # folders
FILES: Final = (CONFIG, EDITS, METRICS, SUMMARY, ENERGY, CASES, EXAMPLES, SPACES, NEURONS, SKIPPED, GUARD, REPAIRS,
                CONFLICTS, SCORES, TEXTS)

# Phase of a measurement (see `runs.schedule`).
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
    """The part ``run.measure`` of ``config.yaml`` that readers use."""

    protocols: list[str] | None = None


@dataclass(frozen=True)
class RunDescription:
    """The part ``run`` of ``config.yaml`` that readers use: number of facts, and seeds of their draw."""

    num_edits: Count | None = None
    seed: Count | None = None
    order_seed: Count | None = None
    measure: MeasureDescription | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` cases with its 95% interval, or None; in percent for the metrics of a run.

    Attributes:
        mean: nan if no case has the metric (``n`` is 0).
        protocol: of fluency and consistency; None for other metrics.
    """

    mean: Number
    ci95: tuple[Number, Number] | None
    n: Count
    protocol: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        found = {"mean": self.mean if self.n else None, "ci95": None if self.ci95 is None else list(self.ci95),
                 "n": self.n}
        return found if self.protocol is None else found | {"protocol": self.protocol}


@dataclass(frozen=True)
class AbilityEstimate(Estimate):
    """A general ability (see ``abilities.AbilityScore``), with the normal approximation of the interval."""

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
        num_edits: edits in the model after the batch.
        case_ids: of its edits.
        seconds: wall time by phase.
        wall_seconds: total wall time.
        losses: final loss of each target value (nats).
        update_norms: Frobenius norm of each layer's change by this batch.
        energy: hyperspherical energy after it, by layer.
        efficacy: percent of its facts that the model predicts right after it, by the run's first protocol; None if not
            measured.
        strength: share of the batch's change that callbacks kept.
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
        """As JSON data."""
        return asdict(self)


@dataclass(frozen=True)
class Measurement:
    """One evaluation of a run by one protocol, or of general abilities: a line of ``metrics.jsonl``.

    Attributes:
        num_edits: edits in the model.
        when: phase and facts: ``before`` editing; ``during``, the edits so far or a seeded sample of them; the
            ``last_batch`` alone; ``after``, all of them.
        protocol: of the metrics; numbers of different protocols are not comparable.
        metrics: by name.
        perplexity: on held-out text; infinite or nan for a broken model, None if not measured.
        update_norms: Frobenius norm of the change since the unedited model, by layer.
        cases: number of measured facts; None for abilities, and in older runs.
        abilities: general abilities by task; empty for an evaluation of facts.
        seconds: wall time; for protocols measured together, only the first has it, the others 0.
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
        """From a line of ``metrics.jsonl``, in which metrics are top-level entries.

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
        """Measured metrics of ``METRIC_NAMES``, in their order."""
        return {name: self.metrics[name] for name in METRIC_NAMES if name in self.metrics}

    def watched(self) -> dict[str, Any]:
        """Perplexity and update norms, which do not depend on the protocol."""
        return {"perplexity": self.perplexity,
                "update_norms": {str(layer): norm for layer, norm in self.update_norms.items()}}


def estimates_to_dict(estimates: Mapping[str, Estimate]) -> dict[str, dict[str, Any]]:
    """Metrics as JSON data."""
    return {name: estimate.to_dict() for name, estimate in estimates.items()}


@dataclass(frozen=True)
class SpaceRecord:
    """Share of one change of one layer's weight in the principal space: a line of ``spaces.csv``.

    Attributes:
        since, num_edits: edits before and after the change.
        layer: number of the layer.
        share: share of the change's squared Frobenius norm in the principal space, 0 to 1, to 4 digits; nan for no
            change. Expected for a random change: ``rank / d_in``.
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
    """A skipped fact: a line of ``skipped.jsonl``.

    Attributes:
        index: index among the run's facts, from 0; ``place`` in the file.
        case_id: its case.
        num_edits: edits in the model when it was skipped.
        error: the reason, on one line.
    """

    index: Annotated[int, Field(strict=True, ge=0, validation_alias=AliasChoices("index", "place"))]
    case_id: StrictCaseId
    num_edits: Count
    error: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return {"place": self.index, "case_id": self.case_id, "num_edits": self.num_edits, "error": self.error}


@dataclass(frozen=True)
class Repair:
    """A batch of facts that were edited again, since the model failed on them: a line of ``repairs.jsonl``.

    Attributes:
        num_edits: edits in the model, before and after.
        round: of this repair, from 1.
        places: indices among the run's facts, from 0.
        case_ids: their cases.
        seconds: wall time of editing.
    """

    num_edits: Count
    round: Count
    places: tuple[Count, ...]
    case_ids: tuple[StrictCaseId, ...]
    seconds: Number

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)


_Scores = dict[str, float | None]


@dataclass(frozen=True)
class CaseRecord:
    """A case of a run that has ended: a line of ``cases.jsonl``.

    Attributes:
        pre, post: scores before and after editing, by metric from 0 to 1; None if not measured.
        generations: continuations ``before`` and ``after``; None if not generated.
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
        """As JSON data."""
        found = asdict(self)
        return found if self.generations is not None else {name: value for name, value in found.items()
                                                           if name != "generations"}


@dataclass(frozen=True)
class SkippedCase:
    """A skipped fact in ``summary.json``, with the reason."""

    case_id: StrictCaseId
    error: str = ""


@dataclass(frozen=True)
class Summary:
    """Result of a run: ``summary.json``.

    Attributes:
        protocol: of ``pre`` and ``post``, the run's first.
        num_edits: edits in the model at the end.
        num_facts: facts of the run, with skipped ones; None in older runs, which skipped none.
        skipped: skipped facts.
        repaired: number of times that a fact was edited again; None where the run was not to be repaired.
        unrepaired: cases that the model does not predict after the last repair.
        stopped: why a callback ended the run, or None.
        pre, post: metrics before and after editing, by name; None if not measured.
        protocols: ``pre`` and ``post`` of each protocol.
        watched: perplexity and update norms ``pre`` and ``post``.
        preparation_seconds, editing_seconds, evaluation_seconds: wall time.
        peak_memory_bytes: of the GPUs that hold the model, else of the process.
        weights_sha256: of the edited weights at the end.
    """

    num_edits: Count
    protocol: str | None = None
    num_facts: Count | None = None
    skipped: tuple[SkippedCase, ...] = ()
    repaired: Count | None = None
    unrepaired: tuple[StrictCaseId, ...] = ()
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
        """As JSON data."""
        pre, post = (None if one is None else estimates_to_dict(one) for one in (self.pre, self.post))
        return {"protocol": self.protocol, **asdict(self), "pre": pre, "post": post,
                "skipped": [asdict(one) for one in self.skipped], "unrepaired": list(self.unrepaired)}


def read_record(kind: type[_R], data: object, where: str) -> _R:
    """Validate parsed JSON.

    Args:
        kind: a class of this module, or any type that pydantic supports.
        data: parsed JSON.
        where: file and line, for the error.

    Raises:
        ValueError: it does not fit; the message gives location, field and value.
    """
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"]))
        value = "missing" if first["type"] == "missing" else f"{first['input']!r:.80}"
        location = f"{where}: {field}" if field else where
        raise ValueError(f"{location} is {value} ({first['msg']}): it was changed by hand or damaged") from error
