"""FLOPs by kind of work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..batching import padded_batches
from ..editing.executors import is_alphaedit
from ..editing.requests import TokenizedRequest
from ..editing.steering import Layout
from ..editing.target_values import TOKENS_FOR_HEAD
from ..hparams import SPHEREHyperParams
from .batches import Run, micro_batches
from .shapes import ModelShape


def forward_flops(shape: ModelShape, runs: Iterable[Run], blocks: int) -> float:
    """FLOPs of rows through so many blocks.

    A token meets every entry of a block's matrices once (2 FLOPs); scores and mixing take 4 FLOPs for each token
    attended to and each of the attention's columns.
    """
    return float(blocks) * sum(2 * shape.block_entries * run.tokens + 4 * shape.attention_width * run.attended
                               for run in runs)


def head_flops(shape: ModelShape, positions: int) -> float:
    """FLOPs of the LM head at so many positions."""
    return 2.0 * shape.vocabulary * shape.hidden * positions


def target_value_flops(shape: ModelShape, requests: Sequence[TokenizedRequest], hparams: SPHEREHyperParams,
                       layout: Layout) -> tuple[float, float]:
    """FLOPs of one batch's target values: (once, in one forward pass of a step).

    A run of s steps takes ``once + (2 s - 1) step``: each step runs forward and backward, which costs as much again
    since weights take no gradient; the last one runs forward alone.

    Once: what is recorded through all blocks, and checks of head and layout. A step: the tokens from the subject's last
    one onward through the blocks above the last edited one, and the head at the target's positions and one for each
    drift prompt.
    """
    last = hparams.layers[-1]
    loss_blocks = max(int(hparams.v_loss_layer), last) - last
    once, step = _check_flops(shape, requests, layout, shape.blocks - 1 - last), 0.0
    for group in micro_batches(requests, hparams.token_budget, layout):
        once += forward_flops(shape, group.recorded, shape.blocks) + head_flops(shape, group.edits)
        step += forward_flops(shape, group.to_loss, loss_blocks)
        step += forward_flops(shape, group.to_end, shape.blocks - 1 - last)
        step += head_flops(shape, group.positions + group.edits)
    return once, step


def _check_flops(shape: ModelShape, requests: Sequence[TokenizedRequest], layout: Layout, above: int) -> float:
    """FLOPs of finding how logits are made, in three rows of a few tokens, and of checking the layout.

    Packing is tried on the prompts with the longest and the shortest beginning and on the longest, each whole and again
    packed along with the beginning; a prefix cache, where packing is none, on the one with the longest beginning, whole
    and in two parts. Then the ``above`` blocks that steps run go over the tokens from the subject's last one on.
    """
    prompts = [prompt for request in requests for prompt in (request.plain, *request.contexts)]
    first, shortest = (chosen(prompts, key=lambda prompt: prompt.lookup) for chosen in (max, min))
    tried = list(dict.fromkeys([first, shortest, max(prompts, key=lambda prompt: len(prompt.ids))]))
    head = Run(3, min(TOKENS_FOR_HEAD, len(requests[0].plain.ids)))
    runs, again = [head], []
    for prompt in tried:
        runs += [Run(2, len(prompt.ids)), Run(1, prompt.lookup + 1)]
        again += [Run(1, len(prompt.ids) - prompt.lookup, prompt.lookup), Run(1, 1, prompt.lookup)]
    if layout != "packed":
        runs.append(Run(2, len(first.ids)))
        again.append(Run(1, len(first.ids) - first.lookup, first.lookup))
    blocks = forward_flops(shape, runs, shape.blocks) + forward_flops(shape, again, above)
    return blocks + head_flops(shape, head.tokens)


def key_flops(shape: ModelShape, requests: Sequence[TokenizedRequest], hparams: SPHEREHyperParams) -> float:
    """FLOPs of one batch's keys and residual states.

    All prompts run, padded, up to the subject's last token through every block as far as the last edited one. Then each
    edited layer is read once with all prompts, and the plain prompts go on from it to the last; advancing from layer to
    layer runs the blocks between once more, and so does reading all keys at the end, where earlier keys are kept.
    """
    first, last = hparams.layers[0], hparams.layers[-1]
    passes = (last + 1) + len(hparams.layers) + (last - first) + ((last - first + 1) if keeps_keys(hparams) else 0)
    total = 0.0
    contexts = [prompt for request in requests for prompt in request.contexts]
    for prompts, blocks in (([request.plain for request in requests],
                             passes + sum(last - layer for layer in hparams.layers)), (contexts, passes)):
        lengths = [prompt.lookup + 1 for prompt in prompts]
        runs = [Run(len(batch), max(lengths[i] for i in batch))
                for batch in padded_batches(lengths, hparams.token_budget)]
        total += forward_flops(shape, runs, blocks)
    return total


def keeps_keys(hparams: SPHEREHyperParams) -> bool:
    """Whether earlier edits' keys are kept, natively."""
    return is_alphaedit(hparams) or bool(hparams.keep_previous_keys)


def null_space_columns(shape: ModelShape, hparams: SPHEREHyperParams) -> int:
    """Columns that span AlphaEdit's null space or what it leaves out, whichever are fewer; by a threshold, at most."""
    if hparams.nullspace_share is None:
        return shape.d_in // 2
    kept = max(1, int(hparams.nullspace_share * shape.d_in))
    return min(kept, shape.d_in - kept)


def key_capacity(shape: ModelShape, hparams: SPHEREHyperParams) -> int:
    """Most earlier keys in a layer's factor: more are absorbed into the method's metric.

    That has as many rows as the null space has coordinates: its dimensions where its own columns are kept, else d_in.
    """
    if is_alphaedit(hparams) and hparams.nullspace_share is not None:
        kept = max(1, int(hparams.nullspace_share * shape.d_in))
        return kept if kept <= shape.d_in // 2 else shape.d_in
    return shape.d_in


def solve_flops(shape: ModelShape, hparams: SPHEREHyperParams, num_edits: int, batch_size: int) -> float:
    """FLOPs of all batches' solves in all layers, in float64, to leading order.

    A batch of n keys with m earlier ones weighs n keys twice (through the null space's columns, ``4 d_in q``, or by two
    triangular solves with the factor of C, ``2 d_in^2``, a key), multiplies n columns by the earlier keys twice
    (``2 d_in m``) and solves with their factor twice (``m^2``); each of the three once more where it joins them. What
    the residual asks for, of a few columns, is left out. Every ``capacity`` keys are absorbed by one factorisation,
    ``capacity^3 / 3``, after a product with them.
    """
    capacity = key_capacity(shape, hparams)
    through = null_space_columns(shape, hparams)
    weigh = 4.0 * shape.d_in * through if is_alphaedit(hparams) else 2.0 * shape.d_in**2
    total, waiting = 0.0, 0
    for start in range(0, num_edits, batch_size):
        n = min(batch_size, num_edits - start)
        columns = 3 * n if keeps_keys(hparams) else 2 * n
        total += columns * (weigh + 2.0 * shape.d_in * (waiting + n) + 1.0 * waiting**2)
        if keeps_keys(hparams):
            if waiting + n > capacity:
                total += 2.0 * capacity**2 * waiting + capacity**3 / 3
                waiting = 0
            waiting += n
    return total * len(hparams.layers)


def metric_flops(d_in: int, hparams: SPHEREHyperParams) -> float:
    """FLOPs of one layer's null space (reduction to tridiagonal form and the vectors) or Cholesky factor of C."""
    return (4 / 3 + 2) * float(d_in) ** 3 if is_alphaedit(hparams) else float(d_in) ** 3 / 3


def projection_flops(shape: ModelShape, hparams: SPHEREHyperParams, columns: int) -> float:
    """FLOPs of shaping one layer's update of ``columns`` edits: Gram matrix, eigenvectors, two thin products; PRUNE's
    singular values of the dense change. RECT's threshold counts as a few operations an entry. A Gram matrix that is
    carried from batch to batch takes less than one computed anew, as it is here."""
    side, entries = min(shape.d_out, shape.d_in), float(shape.d_out * shape.d_in)
    total = 0.0
    if hparams.base_alg == "RECT":
        total += 20 * entries
    if hparams.base_alg == "PRUNE":
        total += 2 * 6 * entries * side  # of the change and of the pretrained weight
    if hparams.projects:
        total += 2 * entries * side + 2.0 * side**3 + 4 * entries * columns
    return total


def energy_flops(shape: ModelShape) -> float:
    """FLOPs of one hyperspherical energy: cosines of all pairs of rows once, and some thirty operations a pair."""
    return float(shape.d_out) ** 2 * (shape.d_in + 30)


def evaluation_flops(shape: ModelShape, lengths: Sequence[tuple[int, int]]) -> float:
    """FLOPs of scoring prompts with their targets, given as (tokens read, target tokens): a forward pass each.

    What evaluation saves where prompts begin alike is left to the measured rate.
    """
    runs = [Run(1, read) for read, _ in lengths]
    return forward_flops(shape, runs, shape.blocks) + head_flops(shape, sum(targets for _, targets in lengths))


def generation_flops(shape: ModelShape, tokens: int) -> float:
    """FLOPs of generating so many tokens: each runs through the model and its head; attention left out."""
    return forward_flops(shape, [Run(tokens, 1)], shape.blocks) + head_flops(shape, tokens)


def moment_flops(shape: ModelShape, hparams: SPHEREHyperParams, tokens: int, num_layers: int) -> float:
    """FLOPs of the second moments of ``num_layers`` layers' keys: a pass up to the last one, and ``k k^T``."""
    below = forward_flops(shape, [Run(tokens, 1)], hparams.layers[-1] + 1)  # attention left out
    return below + 2.0 * tokens * num_layers * shape.d_in**2
