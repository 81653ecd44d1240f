"""A run's work by kind, and its parts' seconds by the rate of each kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

from ..editing.contexts import NEW_TOKENS, OPENINGS
from ..editing.corpus import GENERATED
from ..editing.steering import Layout
from ..hparams import SPHEREHyperParams
from .counts import (
    energy_flops,
    evaluation_flops,
    generation_flops,
    key_flops,
    metric_flops,
    moment_flops,
    projection_flops,
    solve_flops,
    target_value_flops,
)
from .facts import Facts
from .inventory import Statistics
from .results import PlanSettings, TimePart
from .shapes import ModelShape

_NEW_TOKENS: Final = 20  # of a continuation that a run shows

# Kinds of work, each with a rate of its own, by the parts of a run that they belong to.
PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "statistics": ("text", "moments"),
    "preparation": ("contexts", "metrics"),
    "target values": ("once", "steps"),
    "keys and solve": ("keys", "solve"),
    "projection and energy": ("projection", "energy"),
    "evaluation before": ("scores", "continuations"),
    "evaluation after": ("scores", "continuations"),
}
_STAND_INS: Final = {"moments": "scores", "text": "scores"}  # whose rate serves where its own was not measured


def run_flops(shape: ModelShape, hparams: SPHEREHyperParams, settings: PlanSettings, facts: Facts,
              statistics: Statistics, layout: Layout) -> dict[str, float]:
    """FLOPs of a whole run by kind of work, of the busiest process; those of one evaluation, which takes place twice.

    Processes share out target values, keys, evaluation and the statistics' text; the first one, which is the busiest,
    alone solves, projects, and generates text.

    Args:
        layout: of the optimiser's rows.
    """
    scale = settings.num_edits / len(facts.requests)
    layers, batches = len(hparams.layers), math.ceil(settings.num_edits / settings.batch_size)
    work = dict.fromkeys((kind for kinds in PARTS.values() for kind in kinds), 0.0)
    if hparams.executor == "native":
        for shares in facts.shares(settings.batch_size, settings.processes):
            once, step = max((target_value_flops(shape, share, hparams, layout) for share in shares),
                             key=lambda counted: counted[1])
            work["once"] += (once + step) * scale
            work["steps"] += 2 * step * (hparams.v_num_grad_steps - 1) * scale
            work["keys"] += max(key_flops(shape, share, hparams) for share in shares) * scale
        work["solve"] = solve_flops(shape, hparams, settings.num_edits, settings.batch_size)
        work["metrics"] = 0.0 if statistics.metric_is_filed else layers * metric_flops(shape.d_in, hparams)
        if hparams.context_templates is None:
            work["contexts"] = generation_flops(shape, len(OPENINGS) * NEW_TOKENS)
        if statistics.missing:
            tokens = math.ceil(statistics.tokens / settings.processes)
            work["moments"] = moment_flops(shape, hparams, tokens, len(statistics.missing))
            work["text"] = (generation_flops(shape, statistics.tokens) if hparams.mom2_dataset == GENERATED else 0.0)
    columns = settings.batch_size if hparams.executor == "native" else shape.d_out
    work["projection"] = batches * layers * projection_flops(shape, hparams, columns)
    work["energy"] = (batches + 1) * layers * energy_flops(shape)
    scored = evaluation_flops(shape, [pair for pairs in facts.scored for pair in pairs])
    work["scores"] = scored * scale / min(settings.processes, settings.num_edits)
    work["continuations"] = generation_flops(shape, min(settings.examples, settings.num_edits) * _NEW_TOKENS)
    return work


def time_parts(work: Mapping[str, float], rates: Mapping[str, float], gflops: float | None) -> list[TimePart]:
    """Seconds and shares of a run's parts.

    Args:
        work: FLOPs by kind (see ``run_flops``).
        rates: measured FLOP/s by kind.
        gflops: 1e9 FLOP/s for kinds that were not measured; None for none.
    """
    parts = []
    for name, kinds in PARTS.items():
        done = {kind: work[kind] for kind in kinds if work[kind]}
        seconds: float | None = 0.0
        for kind, flops in done.items():
            rate = rates.get(kind, rates.get(_STAND_INS.get(kind, ""), (gflops or 0.0) * 1e9))
            seconds = seconds + flops / rate if rate and seconds is not None else None
        parts.append(TimePart(name, sum(done.values()), seconds, None))
    total = sum(part.seconds or 0.0 for part in parts)
    if total == 0.0:
        return parts
    return [replace(part, share=None if part.seconds is None else part.seconds / total) for part in parts]


def total_seconds(parts: list[TimePart]) -> float | None:
    """Of all parts; None where one has none."""
    seconds = [part.seconds for part in parts if part.seconds is not None]
    return sum(seconds) if len(seconds) == len(parts) else None
