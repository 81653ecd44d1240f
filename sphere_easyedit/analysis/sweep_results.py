"""Numbers of a sweep's runs, and differences between arms paired by seed and, where scores were kept, by case."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from ..evaluation.paired import paired_bootstrap
from ..hparams import SPHERE_ONLY
from ..runs.directory import RunDirectory
from ..runs.records import RunRecords
from ..runs.schema import CONFIG, METRICS, SUMMARY, CaseId, Estimate, When
from ..runs.sweep.record import KEEPING, Run

logger = logging.getLogger(__name__)

PERPLEXITY: Final = "perplexity"
UPDATE_NORM: Final = "update_norm"
HE_CHANGE: Final = "he_change"
WATCHED: Final = ""  # the protocol of numbers that no protocol defines: perplexity, update norm, energy
_MIN_SEEDS_FOR_T: Final = 3
_RESAMPLES: Final = 2000
_SCALES: Final = (1.0, 100.0)  # from the mean of case scores to the reported mean: none, or percent

Key = tuple[int, When, str, str]  # num_edits, when, protocol, metric


@dataclass(frozen=True)
class MetricValue:
    """One number of a run.

    Attributes:
        num_edits: edits in the model when it was measured.
        when: ``before``, ``during``, ``last_batch`` or ``after``.
        protocol: protocol of the metric; ``""`` for metrics without one.
        metric: a metric of ``metrics.jsonl`` (percent), a general ability, or, without a protocol, ``perplexity``,
            ``update_norm`` (root of the sum of squares over layers) or ``he_change`` (relative change of
            hyperspherical energy since the start, mean over layers).
        ci95: 95% interval, or None.
        n: number of cases, or None.
    """

    num_edits: int
    when: When
    protocol: str
    metric: str
    mean: float
    ci95: tuple[float, float] | None = None
    n: int | None = None


@dataclass(frozen=True)
class MeasuredRun:
    """A run of a sweep with the measurements in its directory, also of an unfinished run."""

    run: Run
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether the run has ended."""
        return RunDirectory(self.folder).has(SUMMARY)

    @cached_property
    def measurements(self) -> dict[Key, MetricValue]:
        """Numbers by key, in the files' order; a ValueError if a file is damaged."""
        files = RunDirectory(self.folder)
        if not (files.has(CONFIG) and files.has(METRICS)):
            return {}
        found = (*_of_points(self._records), *_of_energy(self._records))
        return {(one.num_edits, one.when, one.protocol, one.metric): one for one in found}

    @cached_property
    def _records(self) -> RunRecords:
        return RunRecords.read(self.folder)

    def scores(self, key: Key) -> dict[CaseId, float]:
        """Scores by case that a number is the mean of; empty if none were kept."""
        num_edits, when, protocol, metric = key
        point = num_edits, when, protocol
        if point not in self._scores:
            kept = RunDirectory(self.folder).has(f"scores/{when}-{num_edits}.jsonl")
            self._scores[point] = self._records.scores(when, num_edits, protocol) if kept and protocol else {}
        return {case: scores[metric] for case, scores in self._scores[point].items() if metric in scores}

    @cached_property
    def _scores(self) -> dict[tuple[int, When, str], dict[CaseId, dict[str, float]]]:
        """Score files read so far."""
        return {}


def _of_points(records: RunRecords) -> Iterator[MetricValue]:
    for point in records.points:
        where = point.num_edits, point.when
        for metric, estimate in point.metrics.items():
            yield _value(*where, point.protocol, metric, estimate)
        if point.perplexity is not None:
            yield MetricValue(*where, WATCHED, PERPLEXITY, point.perplexity)
        if point.update_norms:
            yield MetricValue(*where, WATCHED, UPDATE_NORM, math.hypot(*point.update_norms.values()))
    for abilities in records.abilities:
        for task, estimate in abilities.abilities.items():
            yield _value(abilities.num_edits, abilities.when, abilities.protocol, task, estimate)


def _value(num_edits: int, when: When, protocol: str, metric: str, estimate: Estimate) -> MetricValue:
    return MetricValue(num_edits, when, protocol, metric, estimate.mean, estimate.ci95, estimate.n)


def _of_energy(records: RunRecords) -> Iterator[MetricValue]:
    for record in records.energy:
        ended = records.summary is not None and record is records.energy[-1]
        when: When = "before" if record.num_edits == 0 else "after" if ended else "during"
        changes = record.relative_change.values()
        yield MetricValue(record.num_edits, when, WATCHED, HE_CHANGE, math.fsum(changes) / len(changes))


@dataclass(frozen=True)
class Difference:
    """Difference of one number between two arms, paired by seed, in the metric's units.

    Attributes:
        arm, reference: names without seeds; the difference is the arm's mean minus the reference's.
        num_edits, when, protocol, metric: see ``MetricValue``.
        arm_mean, reference_mean, mean: means over the seeds that both arms have, and the mean difference.
        lowest, highest: range of the differences over seeds.
        t95: 95% interval of the mean difference over seeds by Student's t; None below 3 seeds or if a value is not
            finite.
        seeds: the seeds that both arms have.
        cases95: 95% interval of the mean difference by bootstrap over pairs of equal cases, pooled over seeds. It
            generalises to other cases with the same seeds. None if scores were not kept, or their mean is not the
            reported one.
        cases: number of pairs of cases; None without ``cases95``.
    """

    arm: str
    reference: str
    num_edits: int
    when: str
    protocol: str
    metric: str
    arm_mean: float
    reference_mean: float
    mean: float
    lowest: float
    highest: float
    t95: tuple[float, float] | None
    seeds: tuple[int, ...]
    cases95: tuple[float, float] | None
    cases: int | None


Pair = tuple[MeasuredRun, MeasuredRun]  # of one seed: the arm's, the reference's


def with_and_without_sphere(runs: Sequence[MeasuredRun]) -> tuple[dict[str, list[Pair]], list[str]]:
    """Pairs of runs that differ by SPHERE alone, by arm with SPHERE, and the names of runs without a counterpart."""
    plain = {_without_sphere(measured.run): measured for measured in runs if not measured.run.sphere}
    pairs: dict[str, list[Pair]] = defaultdict(list)
    alone = []
    for measured in runs:
        if measured.run.sphere:
            partner = plain.get(_without_sphere(measured.run))
            if partner is None:
                alone.append(measured.run.name)
            else:
                pairs[measured.run.arm].append((measured, partner))
    return dict(pairs), alone


def differences(pairs: Sequence[Pair]) -> list[Difference]:
    """Differences of all numbers that both runs of some pair have."""
    keys = dict.fromkeys(key for arm, reference in pairs for key in arm.measurements if key in reference.measurements)
    return [_difference(key, [pair for pair in pairs if all(key in run.measurements for run in pair)]) for key in keys]


def _difference(key: Key, pairs: Sequence[Pair]) -> Difference:
    values = np.array([[run.measurements[key].mean for run in pair] for pair in pairs])  # (pairs, 2)
    with np.errstate(invalid="ignore"):  # perplexities may be infinite
        seeds = values[:, 0] - values[:, 1]
    arm_mean, reference_mean = values.mean(axis=0)
    cases = _over_cases(key, pairs)
    num_edits, when, protocol, metric = key
    return Difference(pairs[0][0].run.arm, pairs[0][1].run.arm, num_edits, when, protocol, metric, float(arm_mean),
                      float(reference_mean), float(seeds.mean()), float(seeds.min()), float(seeds.max()), _t95(seeds),
                      tuple(arm.run.seed for arm, _ in pairs), *(cases or (None, None)))


def _t95(values: np.ndarray[Any, Any]) -> tuple[float, float] | None:
    if len(values) < _MIN_SEEDS_FOR_T or not np.isfinite(values).all():
        return None
    from scipy.stats import t  # takes a second to import

    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half


def _over_cases(key: Key, pairs: Sequence[Pair]) -> tuple[tuple[float, float], int] | None:
    num_edits, _, protocol, metric = key
    left: list[float] = []
    right: list[float] = []
    scales = set(_SCALES)
    for pair in pairs:
        one, other = (run.scores(key) for run in pair)
        if not one or not other:
            return None
        for run, scores in zip(pair, (one, other), strict=True):
            scales &= _scales(run.measurements[key].mean, scores.values())
        shared = [case for case in one if case in other]
        left += [one[case] for case in shared]
        right += [other[case] for case in shared]
    if not scales:
        logger.warning("%s at %d edits: the mean of the case scores is not the reported %s (%s), so the difference has "
                       "no interval over cases", pairs[0][0].run.arm, num_edits, metric, protocol)
    if not scales or not left:
        return None
    scale = min(scales)  # both fit only if all scores are 0
    found = paired_bootstrap(scale * np.array(left), scale * np.array(right), resamples=_RESAMPLES)
    return None if found.ci95 is None else (found.ci95, found.n)


def _scales(reported: float, scores: Collection[float]) -> set[float]:
    """Factors between the mean of the scores and the reported mean."""
    mean = math.fsum(scores) / len(scores)
    return {scale for scale in _SCALES if math.isclose(scale * mean, reported, rel_tol=1e-6, abs_tol=1e-9)}


def _without_sphere(run: Run) -> str:
    """Key that is equal for two runs that differ by SPHERE alone."""
    hyperparameters = {name: value for name, value in run.hyperparameters.items() if name not in SPHERE_ONLY}
    edit = {name: value for name, value in run.edit.items() if name not in KEEPING}
    return json.dumps([run.method, hyperparameters, run.dataset, run.data, run.num_edits, run.batch_size, run.seed,
                       edit], sort_keys=True, default=repr)
