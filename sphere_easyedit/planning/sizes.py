"""Bytes of what a session keeps and of what a step of target values takes."""

from __future__ import annotations

from typing import Final

import torch

from ..editing.executors import is_alphaedit
from ..editing.grams import carries_grams
from ..editing.solvers import BLOCK
from ..editing.target_values import LOGITS_AT_ONCE
from ..hparams import SPHEREHyperParams
from ..projection import FLOAT64_SIDE
from .batches import MicroBatch, total_tokens
from .counts import keeps_keys, key_capacity, null_space_columns
from .shapes import ModelShape

FLOAT: Final = 4  # bytes
DOUBLE: Final = 8
HEADER: Final = 1024  # bytes of names and shapes in a file of arrays, about


def original_weight_bytes(shape: ModelShape, hparams: SPHEREHyperParams) -> int:
    """The session's copies of the edited weights as they were."""
    return len(hparams.layers) * shape.d_out * shape.d_in * shape.itemsize


def factor_bytes(size: int) -> int:
    """A Cholesky factor in float64, kept as block rows that end at the diagonal."""
    blocks, rest = divmod(size, BLOCK)
    full = BLOCK**2 * blocks * (blocks + 1) // 2
    return DOUBLE * (full + rest * size)


def metric_bytes(shape: ModelShape, hparams: SPHEREHyperParams) -> int:
    """How all layers' keys are weighed: float32 columns of the null space, or the factor of C in float64."""
    if is_alphaedit(hparams):
        return len(hparams.layers) * shape.d_in * null_space_columns(shape, hparams) * FLOAT
    return len(hparams.layers) * factor_bytes(shape.d_in)


def history_bytes(shape: ModelShape, hparams: SPHEREHyperParams, num_edits: int) -> int:
    """Earlier keys of all layers, float32, and the factor of their system, which stops growing at its capacity.

    From there on the absorbed keys' own factor is kept, of as many rows. Upper bound where it is just emptied.
    """
    if not keeps_keys(hparams):
        return 0
    capacity = key_capacity(shape, hparams)
    factors = factor_bytes(min(num_edits, capacity)) + (factor_bytes(capacity) if num_edits > capacity else 0)
    return len(hparams.layers) * (shape.d_in * num_edits * FLOAT + factors)


def gram_bytes(shape: ModelShape, hparams: SPHEREHyperParams) -> int:
    """Gram matrices ``d_out x d_out`` that are carried from batch to batch, float64 up to a side of 1024, else float32.

    Of wide weights alone.
    """
    if not carries_grams(hparams, hparams.executor == "native") or shape.d_out > shape.d_in:
        return 0
    return len(hparams.layers) * shape.d_out**2 * (DOUBLE if shape.d_out <= FLOAT64_SIDE else FLOAT)


def moment_bytes(shape: ModelShape, hparams: SPHEREHyperParams) -> int:
    """One layer's statistics as filed."""
    return int(shape.d_in**2 * getattr(torch, hparams.mom2_dtype).itemsize) + HEADER


def running_bytes(shape: ModelShape, tokens: int) -> int:
    """What a block takes for so many tokens while nothing is kept for a backward pass, about."""
    return tokens * (4 * shape.hidden + 3 * shape.d_in) * shape.itemsize


def front_bytes(shape: ModelShape, hparams: SPHEREHyperParams, group: MicroBatch) -> int:
    """Keys and values in front of the rows of a micro-batch's steps: of the blocks that steps run where rows are
    packed, else of all blocks."""
    in_front = sum(run.rows * run.front for run in group.stepped)
    blocks = shape.blocks - 1 - hparams.layers[-1] if group.packed else shape.blocks
    return in_front * 2 * shape.key_value_width * blocks * shape.itemsize


def saved_bytes(shape: ModelShape, hparams: SPHEREHyperParams, group: MicroBatch) -> int:
    """What the backward pass through the blocks above the last edited one asks for, in a step of one micro-batch.

    Linear maps leave nothing behind, since their weights take no gradient. For each token of a step and each block
    there are the inputs of two norms, in float32; and in the feed-forward network what enters the activation, leaves
    it, and is multiplied with it, or where there is no gate the four factors of a GELU by tanh.

    Packed attention leaves queries, keys and values, those of all rows and again those of each length, and its weights
    in float32, and as they are multiplied where that is another dtype. Other attention leaves queries and output, and
    keys and values of the prefix too, which they are joined with; all heads' where queries share them.
    """
    tokens = total_tokens(group.stepped)
    has_gate = 2 * shape.mlp_entries > 5 * shape.d_in * shape.hidden  # three matrices, not two
    in_block = tokens * (2 * shape.hidden * FLOAT + (3 if has_gate else 4) * shape.d_in * shape.itemsize)
    if group.packed:
        in_block += 2 * tokens * (shape.attention_width + 2 * shape.key_value_width) * shape.itemsize
        each = FLOAT + (shape.itemsize if shape.itemsize != FLOAT else 0)
        in_block += sum(run.attended for run in group.stepped) * shape.heads * each
    else:
        attended = sum(run.rows * (run.front + run.width) for run in group.stepped)
        in_block += 2 * (tokens + attended) * shape.attention_width * shape.itemsize
    return (shape.blocks - 1 - hparams.layers[-1]) * in_block


def logit_bytes(shape: ModelShape, group: MicroBatch) -> int:
    """Logits of a step: as the head makes them, their log-softmax in float32, and two gradients, for as many states as
    the optimiser takes at once; and the drift prompts' first ones, which stay."""
    at_once = min(group.positions + group.edits, max(1, LOGITS_AT_ONCE // shape.vocabulary))
    return shape.vocabulary * (at_once * (shape.itemsize + 3 * FLOAT) + group.edits * FLOAT)


def activation_bytes(shape: ModelShape, hparams: SPHEREHyperParams, group: MicroBatch) -> int:
    """Most that one micro-batch of target values holds: in a step, or while what is run once is recorded.

    From the recording to the end stay states in front of and behind the blocks and keys and values in front. The
    recording has keys and values of all its tokens in all blocks; a step what the backward pass asks for, and logits.
    """
    states = 2 * total_tokens(group.stepped) * shape.hidden * shape.itemsize
    recorded = total_tokens(group.recorded)
    recording = (recorded * 2 * shape.key_value_width * shape.blocks * shape.itemsize
                 + running_bytes(shape, recorded))
    step = saved_bytes(shape, hparams, group) + logit_bytes(shape, group)
    return front_bytes(shape, hparams, group) + states + max(recording, step)
