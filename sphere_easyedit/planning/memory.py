"""A run's memory by purpose."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterator, Sequence

from ..editing.covariance import TOKENS_AT_ONCE, working_dtype
from ..editing.executors import is_alphaedit
from ..editing.steering import Layout
from ..evaluation.teacher_forcing import TOKENS_PER_LOGITS, fast_token_budget
from ..hparams import SPHEREHyperParams
from ..projection import FLOAT64_SIDE
from .batches import micro_batches
from .facts import Facts
from .inventory import Statistics
from .results import MemoryItem, PlanSettings
from .shapes import ModelShape
from .sizes import (
    DOUBLE,
    FLOAT,
    activation_bytes,
    gram_bytes,
    history_bytes,
    metric_bytes,
    original_weight_bytes,
    running_bytes,
)


def resident_bytes() -> int:
    """What Python takes with all libraries and the model's code, before a model is loaded: the peak until now."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_items(shape: ModelShape, hparams: SPHEREHyperParams, settings: PlanSettings, facts: Facts, device: str,
                 statistics: Statistics, layout: Layout, base: int = 0) -> list[MemoryItem]:
    """Memory by purpose.

    Args:
        device: kind of the device that the model is on.
        layout: of the optimiser's rows.
        base: what Python and its libraries take.
    """
    weights = original_weight_bytes(shape, hparams)
    copies = 3 * weights  # to undo the batch, to solve from, and to tell where the change lies
    items = [MemoryItem("Python and libraries", "host", base, True),
             MemoryItem("weights", "device", shape.weight_bytes, True),
             MemoryItem("original weights", "host", weights, True)]
    if grams := gram_bytes(shape, hparams):
        items.append(MemoryItem(f"Gram matrices {shape.d_out} x {shape.d_out}", "device", grams, True))
    if device != "cpu":
        items.append(MemoryItem("weights while loading", "host", shape.weight_bytes, False))
    if hparams.base_alg == "PRUNE":
        items.append(MemoryItem("unrestrained weights", "host", weights, True))
    if hparams.executor == "native":
        items.extend(_native_items(shape, hparams, settings, facts, statistics, layout, copies))
    # A Gram matrix, its eigenvectors and the solver's copy; the dense update in float32, and the sum with it.
    side = min(shape.d_out, shape.d_in)
    shaped = 3 * side**2 * (DOUBLE if side <= FLOAT64_SIDE else FLOAT) + 2 * shape.d_out * shape.d_in * FLOAT
    items.append(MemoryItem("projecting and writing a layer", "device", shaped + copies, False))
    items.append(MemoryItem("evaluation, one batch", "device", _evaluation_bytes(shape, facts, device), False))
    return items


def _native_items(shape: ModelShape, hparams: SPHEREHyperParams, settings: PlanSettings, facts: Facts,
                  statistics: Statistics, layout: Layout, copies: int) -> Iterator[MemoryItem]:
    what = "null space" if is_alphaedit(hparams) else "factor of C"
    note = "at most" if is_alphaedit(hparams) and hparams.nullspace_share is None else ""
    room = math.inf if hparams.state_memory is None else hparams.state_memory * 1e9
    for name, size, said in ((what, metric_bytes(shape, hparams), note), (
            f"keys of {settings.num_edits} edits and their factor",
            history_bytes(shape, hparams, settings.num_edits), "")):
        kept = int(min(size, room))
        room -= kept
        if kept:
            yield MemoryItem(name, "device", kept, True, said)
        if size > kept:
            above = "above state_memory" + ("" if hparams.state_folder is None else f", in {hparams.state_folder}")
            yield MemoryItem(name, "host", size - kept, True, "; ".join(word for word in (said, above) if word))
    largest = max(activation_bytes(shape, hparams, group)
                  for shares in facts.shares(settings.batch_size, settings.processes) for share in shares
                  for group in micro_batches(share, hparams.token_budget, layout))
    yield MemoryItem("target values, one micro-batch", "device", largest + copies, False,
                     f"token_budget {hparams.token_budget}; with copies of the edited weights")
    if not statistics.metric_is_filed:
        # The matrix, a copy for the solver, and what comes out, in float64 up to a side and float32 above.
        width = working_dtype(shape.d_in).itemsize if is_alphaedit(hparams) else DOUBLE
        yield MemoryItem(f"making the {what}", "device", (3 * width + FLOAT) * shape.d_in**2, False)
    if statistics.missing:
        sums = (len(hparams.layers) * DOUBLE + DOUBLE + FLOAT) * shape.d_in**2
        yield MemoryItem("collecting statistics", "device", sums + running_bytes(shape, TOKENS_AT_ONCE), False)


def _evaluation_bytes(shape: ModelShape, facts: Facts, device: str) -> int:
    """One batch: states in a block, and logits as the head makes them and in float32."""
    tokens = fast_token_budget(device)
    scored = [pair for pairs in facts.scored for pair in pairs]
    tokens_run = min(tokens, sum(read for read, _ in scored))
    places = min(tokens // TOKENS_PER_LOGITS, sum(targets for _, targets in scored))
    return running_bytes(shape, tokens_run) + places * shape.vocabulary * (shape.itemsize + FLOAT)


def peak_bytes(items: Sequence[MemoryItem], device: str) -> dict[str, int]:
    """What lasts, and the phase that takes most beside it; on a CPU, device and host are one."""
    def peak(chosen: Sequence[MemoryItem]) -> int:
        return (sum(item.bytes for item in chosen if item.lasting)
                + max((item.bytes for item in chosen if not item.lasting), default=0))

    if device == "cpu":
        return {"host": peak(items)}
    return {place: peak([item for item in items if item.place == place]) for place in ("device", "host")}
