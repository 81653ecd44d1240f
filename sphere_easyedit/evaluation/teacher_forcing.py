"""Teacher-forced scoring of many prompts with targets: the argmax and log-probability of each target token.

Tokens run once where possible. A causal model's prediction at a position does not depend on later tokens, so a row that
is a prefix of another row is not run separately: all one-token targets of a prompt share a row. Rows with a common
prefix (targets of one prompt, prompts of one wording) run it once. Rows are packed end to end if the model accepts our
attention function (see ``models.packing``), otherwise padded, without prefix sharing. Logits are computed only where a
target token is predicted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise, takewhile

import torch
from torch import Tensor, nn

from ..models.architecture import frozen, input_device
from ..models.batching import group_by_class, length_class, padded_batches
from ..models.distributed import Replicas, merge_parts, split_contiguous
from ..models.packing import attending_packed, packs_exactly
from ..models.row_logits import TargetRow, packed_logits, padded_logits
from ..utils.progress import Progress

# Tokens in a batch. On a CPU, the hidden states of many more do not fit in its caches.
_CPU_TOKENS = 1024
_GPU_TOKENS = 8192
# Logits of one position are a float32 vocabulary (0.5 MB for Llama 3) and count as this many tokens of a batch.
TOKENS_PER_LOGITS = 4
_LOG_PROB_CHUNK = 128  # positions whose logits are copied and normalised at once
_MIN_SHARED_PREFIX = 2  # tokens: running fewer of them again is cheaper than a separate row


@dataclass(frozen=True)
class _Sequence:
    """Tokens to run, and the rows whose input is a prefix of them."""

    tokens: list[int]
    rows: list[int]
    positions: list[int]  # ascending, those of all rows


@dataclass(frozen=True)
class _Batch:
    """Sequences that run together, and for each the prefix that it shares with others; () if it shares none."""

    sequences: list[_Sequence] = field(default_factory=list)
    prefixes: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class RowScore:
    """The model's predictions of a row's target.

    Attributes:
        predicted: the argmax for each target token.
        hits: whether it equals the target token.
        log_probs: natural logarithm of each target token's probability; None if not requested.
    """

    predicted: tuple[int, ...]
    hits: tuple[bool, ...]
    log_probs: tuple[float, ...] | None = None


def score_rows(
    model: nn.Module, rows: Sequence[TargetRow], token_budget: int | None = None, progress: Progress | None = None,
    log_probs_for: Collection[int] = (),
) -> list[RowScore]:
    """Score every row, in the rows' order.

    Args:
        model: a causal language model of transformers; stays as it is.
        rows: with at least one token in prompt and target.
        token_budget: maximum number of tokens in a batch, padding included; None for the device's default.
        progress: called with (rows done, rows in total) after each batch; with several processes, of this one's rows.
        log_probs_for: indices of the rows whose log-probabilities are computed, in float32.
    """
    if token_budget is None:
        token_budget = fast_token_budget(input_device(model).type)
    replicas = Replicas.of(model)
    if replicas is None:
        return _score_rows(model, rows, token_budget, progress, set(log_probs_for))
    # In this order rows with a common prefix are neighbours, so that most of them go to one process.
    order = sorted(range(len(rows)), key=lambda index: rows[index].input_ids)
    parts = split_contiguous([len(rows[index].input_ids) for index in order], replicas.world_size)
    indices = [[order[number] for number in part] for part in parts]
    shares = [([rows[index] for index in part], token_budget,
               {number for number, index in enumerate(part) if index in log_probs_for}) for part in indices]
    return merge_parts(indices, replicas.run(_score_share, shares, progress))


def _score_share(replicas: Replicas, rows: Sequence[TargetRow], token_budget: int, log_probs_for: set[int]
                 ) -> list[RowScore]:
    return _score_rows(replicas.editable.model, rows, token_budget, replicas.progress, log_probs_for)


def _score_rows(model: nn.Module, rows: Sequence[TargetRow], token_budget: int, progress: Progress | None,
                log_probs_for: set[int]) -> list[RowScore]:
    scores: dict[int, RowScore] = {}
    lengths = [len(row.input_ids) for row in rows]
    with frozen(model), torch.no_grad():
        for group in group_by_class(lengths, length_class(model.config)):  # type: ignore[arg-type]
            sequences = _sequences(rows, group)
            packed = _packing_is_exact(model, sequences)
            make_batches, run = (_packed_batches, _packed_logits) if packed else (_padded_batches, _padded_logits)
            with attending_packed(model) if packed else nullcontext():
                for batch in make_batches(sequences, token_budget):
                    scores.update(_scores(rows, batch, run(model, batch), log_probs_for))
                    if progress is not None:
                        progress(len(scores), len(rows))
    return [scores[index] for index in range(len(rows))]


def _scores(rows: Sequence[TargetRow], batch: _Batch, logits: Tensor, log_probs_for: set[int]) -> dict[int, RowScore]:
    """Scores by row index, from the logits ``(positions, vocabulary)`` at the positions of all sequences in turn."""
    predicted = logits.argmax(dim=-1).tolist()
    columns: dict[int, list[int]] = {}  # by row, the indices of its positions in ``logits``
    first = 0
    for sequence in batch.sequences:
        at = {position: first + number for number, position in enumerate(sequence.positions)}
        columns |= {index: [at[position] for position in rows[index].positions] for index in sequence.rows}
        first += len(at)
    chosen = [index for index in columns if index in log_probs_for]
    found = iter(_log_probs(logits, [column for index in chosen for column in columns[index]],
                            [token for index in chosen for token in rows[index].target]))
    log_probs = {index: tuple(next(found) for _ in columns[index]) for index in chosen}
    scores = {}
    for index, own in columns.items():
        tokens = tuple(predicted[column] for column in own)
        hits = tuple(one == other for one, other in zip(tokens, rows[index].target, strict=True))
        scores[index] = RowScore(tokens, hits, log_probs.get(index))
    return scores


def _log_probs(logits: Tensor, indices: list[int], tokens: list[int]) -> list[float]:
    """Log-probability of each token by the logits at its index."""
    found: list[float] = []
    for start in range(0, len(indices), _LOG_PROB_CHUNK):
        chunk = torch.tensor(indices[start: start + _LOG_PROB_CHUNK], device=logits.device)
        wanted = torch.tensor(tokens[start: start + _LOG_PROB_CHUNK], device=logits.device)
        found += logits[chunk].log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0].tolist()
    return found


def fast_token_budget(device_type: str) -> int:
    """Default number of tokens in a batch on a type of device."""
    return _CPU_TOKENS if device_type == "cpu" else _GPU_TOKENS


def _sequences(rows: Sequence[TargetRow], indices: Sequence[int]) -> list[_Sequence]:
    """Sequences to run for the rows at these indices, sorted so that those with a common prefix are neighbours."""
    sequences: list[_Sequence] = []
    # In this order a row comes right after the rows that it is a prefix of.
    for index in sorted(indices, key=lambda index: rows[index].input_ids, reverse=True):
        tokens = rows[index].input_ids
        if not sequences or sequences[-1].tokens[: len(tokens)] != tokens:
            sequences.append(_Sequence(tokens, [], []))
        sequences[-1].rows.append(index)
    return [
        _Sequence(one.tokens, one.rows, sorted({at for index in one.rows for at in rows[index].positions}))
        for one in sequences
    ]


def _padded_batches(sequences: list[_Sequence], token_budget: int) -> Iterator[_Batch]:
    costs = [TOKENS_PER_LOGITS * len(one.positions) for one in sequences]
    for batch in padded_batches([len(one.tokens) for one in sequences], token_budget, costs, token_budget):
        yield _Batch([sequences[number] for number in batch], [()] * len(batch))


def _packed_batches(sequences: list[_Sequence], token_budget: int) -> Iterator[_Batch]:
    """Batches in the sequences' order; a prefix whose sequences fall in two batches runs in both."""
    prefixes: list[tuple[int, ...]] = [()] * len(sequences)
    for group in _prefix_groups(sequences):
        prefix = tuple(sequences[group.first].tokens[: group.length])
        prefixes[group.first: group.stop] = [prefix] * (group.stop - group.first)
    batch, tokens, positions = _Batch(), 0, 0
    for sequence, prefix in zip(sequences, prefixes, strict=True):
        shared = len(prefix) if batch.prefixes and batch.prefixes[-1] == prefix else 0
        cost = len(sequence.tokens) - shared
        logits_cost = TOKENS_PER_LOGITS * (positions + len(sequence.positions))
        if batch.sequences and max(tokens + cost, logits_cost) > token_budget:
            yield batch
            batch, tokens, positions, cost = _Batch(), 0, 0, len(sequence.tokens)
        batch.sequences.append(sequence)
        batch.prefixes.append(prefix)
        tokens, positions = tokens + cost, positions + len(sequence.positions)
    if batch.sequences:
        yield batch


@dataclass
class _PrefixGroup:
    """Sequences ``first .. stop - 1``, which share their first ``length`` tokens."""

    first: int
    stop: int
    length: int


@dataclass
class _OpenNode:
    """A node of the prefix tree whose sequences, from ``first`` on, are still being read.

    Attributes:
        first: index of its first sequence.
        length: tokens that its sequences share.
        saved: tokens that ``groups`` save.
        groups: the best groups among its sequences so far.
    """

    first: int
    length: int
    saved: int = 0
    groups: list[_PrefixGroup] = field(default_factory=list)


def _prefix_groups(sequences: list[_Sequence]) -> list[_PrefixGroup]:
    """Disjoint groups of sequences such that running each group's common prefix once saves the most tokens.

    A prefix ends before the first position that predicts a target. Sequences are sorted, so those with a common prefix
    are neighbours and longer prefixes nest in shorter ones: a tree, which is solved from its leaves.
    """
    lengths = [_common_prefix_length(one, other) for one, other in pairwise(sequences)]
    opened = [_OpenNode(0, 0)]
    for number, length in enumerate([*lengths, 0]):
        closed = _OpenNode(number, length)
        while opened[-1].length > length:
            last = opened.pop()
            last.saved, last.groups = last.saved + closed.saved, last.groups + closed.groups
            whole = (number - last.first) * last.length
            if whole >= last.saved and last.length >= _MIN_SHARED_PREFIX:
                last.saved, last.groups = whole, [_PrefixGroup(last.first, number + 1, last.length)]
            closed = last
        if opened[-1].length == length:
            opened[-1].saved += closed.saved
            opened[-1].groups += closed.groups
        else:
            opened.append(_OpenNode(closed.first, length, closed.saved, closed.groups))
    return opened[0].groups


def _common_prefix_length(one: _Sequence, other: _Sequence) -> int:
    limit = min(one.positions[0], other.positions[0])
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1],
                                    zip(one.tokens[:limit], other.tokens[:limit], strict=True)))


def _padded_logits(model: nn.Module, batch: _Batch) -> Tensor:
    return padded_logits(model, [one.tokens for one in batch.sequences], [one.positions for one in batch.sequences])


def _packed_logits(model: nn.Module, batch: _Batch) -> Tensor:
    return packed_logits(model, [one.tokens for one in batch.sequences], [one.positions for one in batch.sequences],
                         batch.prefixes)


def _packing_is_exact(model: nn.Module, sequences: list[_Sequence]) -> bool:
    """Whether two packed sequences, one of them with a separate prefix, give the same logits as each one alone."""
    longest = max(sequences, key=lambda one: one.positions[0])
    shortest = min(sequences, key=lambda one: len(one.tokens))
    together = _Batch([longest, shortest], [tuple(longest.tokens[: longest.positions[0]]), ()])
    alone = torch.cat([_padded_logits(model, _Batch([one], [()])) for one in (longest, shortest)])
    return packs_exactly(model, alone, lambda: _packed_logits(model, together))
