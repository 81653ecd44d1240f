"""Differences between runs of two arms, paired by seed and, where scores of cases were kept, by case."""

from __future__ import annotations

import json
import logging
import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from ..evaluation.paired import paired_bootstrap
from ..hparams import SPHERE_ONLY
from ..runs.sweep.record import KEEPING, Run
from .sweep_results import Key, MeasuredRun

logger = logging.getLogger(__name__)

_LEAST_FOR_T: Final = 3  # seeds
_RESAMPLES: Final = 2000
_SCALES: Final = (1.0, 100.0)  # of a mean that was reported to that of its cases: percent, or as they are


@dataclass(frozen=True)
class Difference:
    """An arm minus another, in the metric's own units.

    Attributes:
        arm, reference: names without seeds; the difference is the arm's mean minus the reference's.
        num_edits, when, protocol, metric: as of ``Measurement``.
        arm_mean, reference_mean, mean: over seeds that both have.
        lowest, highest: of the seeds' differences.
        t95: 95% interval of the mean over seeds by Student's t; None below 3 seeds, or where a value is not finite.
        seeds: those that both have, one pair each.
        cases95: 95% interval of the mean by bootstrap over pairs of equal cases, those of all seeds together. It speaks
            for other cases with these seeds, and so is the interval to go by where there is one seed. None where scores
            were not kept, or do not give the means reported.
        cases: pairs of cases; None without ``cases95``.
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
    """Pairs of runs that differ by SPHERE alone, for each arm with SPHERE; and the names of runs without a partner."""
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


def same_seeds(runs: Sequence[MeasuredRun], arm: str, reference: str) -> list[Pair]:
    """Pairs of runs of two arms.

    Raises:
        ValueError: an arm is unknown, or they share no seed.
    """
    by_arm: dict[str, dict[int, MeasuredRun]] = defaultdict(dict)
    for measured in runs:
        by_arm[measured.run.arm][measured.run.seed] = measured
    for name in (arm, reference):
        if name not in by_arm:
            raise ValueError(f"there is no arm {name!r}: the sweep has {', '.join(by_arm)}")
    pairs = [(measured, by_arm[reference][seed]) for seed, measured in by_arm[arm].items() if seed in by_arm[reference]]
    if not pairs:
        raise ValueError(f"{arm} and {reference} share no seed: run one of them with a seed of the other's")
    return pairs


def differences(pairs: Sequence[Pair]) -> list[Difference]:
    """The differences of whatever both runs of a pair have measured."""
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
    if len(values) < _LEAST_FOR_T or not np.isfinite(values).all():
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
        logger.warning("%s at %d edits: scores of cases do not give the %s (%s) reported, so its difference has no "
                       "interval over cases", pairs[0][0].run.arm, num_edits, metric, protocol)
    if not scales or not left:
        return None
    scale = min(scales)  # where both fit, all scores are 0
    found = paired_bootstrap(scale * np.array(left), scale * np.array(right), resamples=_RESAMPLES)
    return None if found.ci95 is None else (found.ci95, found.n)


def _scales(reported: float, scores: Collection[float]) -> set[float]:
    """By which the scores' mean must be multiplied to give the mean that was reported."""
    mean = math.fsum(scores) / len(scores)
    return {scale for scale in _SCALES if math.isclose(scale * mean, reported, rel_tol=1e-6, abs_tol=1e-9)}


def _without_sphere(run: Run) -> str:
    """What two runs share that differ by SPHERE alone."""
    hyperparameters = {name: value for name, value in run.hyperparameters.items() if name not in SPHERE_ONLY}
    edit = {name: value for name, value in run.edit.items() if name not in KEEPING}
    return json.dumps([run.method, hyperparameters, run.dataset, run.data, run.num_edits, run.batch_size, run.seed,
                       edit], sort_keys=True, default=repr)
