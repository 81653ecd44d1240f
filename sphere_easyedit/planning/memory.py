"""Bytes that a run holds in memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from ..core.projection import FLOAT64_SIDE
from ..editing.gram_matrices import carries_grams
from ..editing.target_values import LOGITS_AT_ONCE
from ..evaluation.teacher_forcing import TOKENS_PER_LOGITS, fast_token_budget
from ..hparams import SPHEREHyperParams
from ..methods.covariance import TOKENS_AT_ONCE
from ..methods.solvers import BLOCK
from .results import MemoryItem, PlanSettings
from .sizes import ModelShape, Statistics, Tokens

FLOAT: Final = 4  # bytes
DOUBLE: Final = 8


def keeps_keys(hparams: SPHEREHyperParams) -> bool:
    """Whether the keys of earlier edits are kept."""
    return hparams.executor == "native" and hparams.method.keeps_keys(hparams)


def null_space_columns(shape: ModelShape, hparams: SPHEREHyperParams) -> int:
    """Columns that span the null space or its complement, whichever are fewer; by a threshold, at most."""
    if hparams.nullspace_share is None:
        return shape.d_in // 2
    kept = max(1, int(hparams.nullspace_share * shape.d_in))
    return min(kept, shape.d_in - kept)


def factor_bytes(size: int) -> int:
    """A Cholesky factor in float64, stored as block rows that end at the diagonal."""
    blocks, rest = divmod(size, BLOCK)
    return DOUBLE * (BLOCK**2 * blocks * (blocks + 1) // 2 + rest * size)


def state_bytes(shape: ModelShape, hparams: SPHEREHyperParams, num_edits: int) -> dict[str, int]:
    """What a session holds in all layers: original weights, PRUNE's second copy of the edited ones, null spaces or
    factors of C (``metrics``), earlier keys with the factor of their system (``history``), and Gram matrices.
    """
    d_in, weight = shape.d_in, shape.d_out * shape.d_in * shape.itemsize
    keys = num_edits if keeps_keys(hparams) else 0
    # At most: d_in keys at a time are absorbed into a factor of their own.
    factors = factor_bytes(min(keys, d_in)) + (factor_bytes(d_in) if keys > d_in else 0)
    metric = (d_in * null_space_columns(shape, hparams) * FLOAT if hparams.method.uses_null_space
              else factor_bytes(d_in))
    carried = carries_grams(hparams, hparams.executor == "native") and shape.d_out <= d_in
    gram = shape.d_out**2 * (DOUBLE if shape.d_out <= FLOAT64_SIDE else FLOAT) if carried else 0
    each = {"original": weight, "metrics": metric,
            "unrestrained": weight if hparams.method.restrains_whole_change else 0,
            "history": d_in * keys * FLOAT + factors, "grams": gram}
    return {name: len(hparams.layers) * size for name, size in each.items()}


def activation_bytes(shape: ModelShape, hparams: SPHEREHyperParams, tokens: Tokens, edits: int) -> int:
    """Approximate peak bytes of one micro-batch of the target-value optimisation.

    It holds up to ``edits`` edits within ``token_budget``.

    For the backward pass each token of a step leaves in a block the inputs of two norms in float32, the factors of the
    activation, and queries, keys and values twice. At the head are logits, their log-softmax and two gradients. With
    ``target_dtype`` the weights that steps use are rounded copies.
    """
    count = max(1.0, min(edits, hparams.token_budget / tokens.taken))
    itemsize, above = shape.itemsize, shape.blocks - 1 - hparams.layers[-1]
    copies = 0
    if hparams.target_dtype is not None and (narrow := getattr(torch, hparams.target_dtype).itemsize) < itemsize:
        itemsize, copies = narrow, narrow * (above * shape.block_entries + shape.vocabulary * shape.hidden)
    in_block = 2 * shape.hidden * FLOAT + (4 * shape.d_in + 6 * shape.hidden) * itemsize
    places = min(count * tokens.predicted, max(1, LOGITS_AT_ONCE // shape.vocabulary))
    logits = shape.vocabulary * (places * (itemsize + 3 * FLOAT) + count * FLOAT)
    return int(count * tokens.stepped * above * in_block + logits + copies)


def memory_items(shape: ModelShape, hparams: SPHEREHyperParams, settings: PlanSettings, tokens: Tokens, device: str,
                 statistics: Statistics, base: int = 0) -> list[MemoryItem]:
    """Memory by purpose, on a kind of device; ``base`` is that of Python and its libraries."""
    state, square, side = state_bytes(shape, hparams, settings.num_edits), shape.d_in**2, min(shape.d_out, shape.d_in)
    copies = 3 * state["original"]  # to undo the batch, to solve from, and to tell where the change lies
    # A Gram matrix, its eigenvectors and the solver's copy; the dense update in float32, and the sum with it.
    projecting = 3 * side**2 * (DOUBLE if side <= FLOAT64_SIDE else FLOAT) + 2 * shape.d_out * shape.d_in * FLOAT
    running = (4 * shape.hidden + 3 * shape.d_in) * shape.itemsize  # a token in a block, without a backward pass
    scored = fast_token_budget(device)
    scoring = scored * running + scored // TOKENS_PER_LOGITS * shape.vocabulary * (shape.itemsize + FLOAT)
    items = [MemoryItem("Python and libraries", "host", base, True),
             MemoryItem("weights", "device", shape.weight_bytes, True),
             MemoryItem("weights while loading", "host", 0 if device == "cpu" else shape.weight_bytes, False),
             MemoryItem("original weights", "host", state["original"], True),
             MemoryItem("unrestrained weights", "host", state["unrestrained"], True),
             MemoryItem(f"Gram matrices {shape.d_out} x {shape.d_out}", "device", state["grams"], True),
             MemoryItem("projecting and writing a layer", "device", projecting + copies, False),
             MemoryItem("evaluation, one batch", "device", scoring, False)]
    if hparams.executor == "native":
        most = activation_bytes(shape, hparams, tokens, settings.batch_size)
        sums = (len(hparams.layers) * DOUBLE + DOUBLE + FLOAT) * square + TOKENS_AT_ONCE * running
        free = math.inf if hparams.state_memory is None else hparams.state_memory * 1e9
        for name, size in (("null space" if hparams.method.uses_null_space else "factor of C", state["metrics"]),
                           (f"keys of {settings.num_edits} edits and their factor", state["history"])):
            kept = int(min(size, free))
            free -= kept
            items += [MemoryItem(name, "device", kept, True),
                      MemoryItem(name, "host", size - kept, True, "above state_memory")]
        items += [MemoryItem("target values, one micro-batch", "device", most + copies, False,
                             f"token_budget {hparams.token_budget}; with copies of the edited weights"),
                  # The matrix, a copy for the solver, and the result.
                  MemoryItem("computing null spaces or factors", "device",
                             0 if statistics.metric_is_filed else (3 * DOUBLE + FLOAT) * square, False),
                  MemoryItem("collecting statistics", "device", sums if statistics.missing else 0, False)]
    return [item for item in items if item.bytes]


def peak_bytes(items: Sequence[MemoryItem], device: str) -> dict[str, int]:
    """What lasts and the largest phase beside it, by place; on a CPU, device and host are one."""
    places = {"host": {"device", "host"}} if device == "cpu" else {place: {place} for place in ("device", "host")}
    return {place: sum(item.bytes for item in items if item.lasting and item.place in parts)
            + max((item.bytes for item in items if not item.lasting and item.place in parts), default=0)
            for place, parts in places.items()}
