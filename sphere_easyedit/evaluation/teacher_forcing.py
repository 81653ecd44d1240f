"""Many prompts with their targets through a model: what it says in front of each target token, and how likely that is.

Nothing is run twice that need not be. Tokens that other tokens begin with are not run on their own: what a causal model
says at a place does not depend on what follows, so a prompt's targets of one token share a row. Rows that begin alike
(targets of one prompt, questions of one wording) run their common beginning once, as a row that they have in front.
Rows are packed end to end where the model takes an attention function of ours (see ``editing.packing``), else padded,
each whole. Logits are made only where a target token is predicted.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise, takewhile

import torch
from torch import Tensor, nn

from ..batching import group_by_class, length_class, padded_batches
from ..editing.packing import attending_packed, pack_behind, packs_exactly
from ..editing.replay import pad_rows
from ..models import frozen, input_device, logits_at
from ..replicas import Replicas, merge_parts, split_contiguous

Progress = Callable[[int, int], None]

# Tokens of a batch. On a CPU, states of many more fall out of its caches.
_CPU_TOKENS = 1024
_GPU_TOKENS = 8192
# Logits of a place cost a whole vocabulary of float32, 0.5 MB for Llama 3: a batch has so many fewer of them.
TOKENS_PER_PLACE = 4
_WEIGHED_AT_ONCE = 128  # places whose logits are copied to be normalised
_LEAST_SHARED = 2  # tokens: to run fewer of them again is cheaper than a row of their own


@dataclass(frozen=True)
class Row:
    """A prompt with its target in tokens."""

    prompt: list[int]
    target: list[int]

    @property
    def fed(self) -> list[int]:
        """What the model has to read: the last target token is predicted but never read."""
        return self.prompt + self.target[:-1]

    @property
    def places(self) -> range:
        """Where the target's tokens are predicted."""
        return range(len(self.prompt) - 1, len(self.prompt) + len(self.target) - 1)


@dataclass(frozen=True)
class _Sequence:
    """Tokens that the model is run on, for all rows that they begin with."""

    tokens: list[int]
    rows: list[int]
    places: list[int]  # ascending, where any of the rows is predicted


@dataclass(frozen=True)
class _Batch:
    """What is run together, with the beginning of each sequence that is run once for several; () where there is none.
    """

    sequences: list[_Sequence] = field(default_factory=list)
    stems: list[tuple[int, ...]] = field(default_factory=list)


@dataclass(frozen=True)
class RowScore:
    """What the model says where a row's target is predicted.

    Attributes:
        said: the argmax in front of each target token.
        hits: whether it is that token.
        log_probs: natural logarithm of each target token's probability; None where that was not asked.
    """

    said: tuple[int, ...]
    hits: tuple[bool, ...]
    log_probs: tuple[float, ...] | None = None


def score_rows(
    model: nn.Module, rows: Sequence[Row], token_budget: int | None = None, progress: Progress | None = None,
    weighed: Collection[int] = (),
) -> list[RowScore]:
    """Score every row, in the rows' order.

    Args:
        model: a causal language model of transformers; stays as it is.
        rows: with at least one token in prompt and target.
        token_budget: tokens of a batch, padding included; None for what is fast on the model's device.
        progress: called with (rows done, rows in all) after each batch; of this process's rows where others share them.
        weighed: numbers of the rows whose log-probabilities are wanted. They are made in float32 of the logits at
            these rows' places alone.
    """
    if token_budget is None:
        token_budget = fast_token_budget(input_device(model).type)
    replicas = Replicas.of(model)
    if replicas is None:
        return _score_here(model, rows, token_budget, progress, set(weighed))
    # Neighbours in this order begin alike, so what is run once for several stays together but at the seams.
    order = sorted(range(len(rows)), key=lambda index: rows[index].fed)
    parts = split_contiguous([len(rows[index].fed) for index in order], replicas.world_size)
    places = [[order[number] for number in part] for part in parts]
    shares = [([rows[index] for index in part], token_budget,
               {number for number, index in enumerate(part) if index in weighed}) for part in places]
    return merge_parts(places, replicas.run(_score_share, shares, progress))


def _score_share(here: Replicas, rows: Sequence[Row], token_budget: int, weighed: set[int]) -> list[RowScore]:
    return _score_here(here.editable.model, rows, token_budget, here.progress, weighed)


def _score_here(model: nn.Module, rows: Sequence[Row], token_budget: int, progress: Progress | None,
                weighed: set[int]) -> list[RowScore]:
    scores: dict[int, RowScore] = {}
    with frozen(model):
        for alike in group_by_class([len(row.fed) for row in rows], length_class(model.config)):  # type: ignore[arg-type]
            sequences = _sequences(rows, alike)
            packed = _packing_is_exact(model, sequences)
            make_batches, run = (_packed_batches, _packed_logits) if packed else (_padded_batches, _padded_logits)
            with attending_packed(model) if packed else nullcontext():
                for batch in make_batches(sequences, token_budget):
                    scores.update(_scores(rows, batch, run(model, batch), weighed))
                    if progress is not None:
                        progress(len(scores), len(rows))
    return [scores[index] for index in range(len(rows))]


def _scores(rows: Sequence[Row], batch: _Batch, logits: Tensor, weighed: set[int]) -> dict[int, RowScore]:
    """By row, from the logits ``(places, vocabulary)`` of all sequences' places in turn."""
    said = logits.argmax(dim=-1).tolist()
    numbers: dict[int, list[int]] = {}  # by row, which of the places are its own
    first = 0
    for sequence in batch.sequences:
        at = {place: first + number for number, place in enumerate(sequence.places)}
        numbers |= {index: [at[place] for place in rows[index].places] for index in sequence.rows}
        first += len(at)
    asked = [index for index in numbers if index in weighed]
    found = iter(_log_probs(logits, [number for index in asked for number in numbers[index]],
                            [token for index in asked for token in rows[index].target]))
    log_probs = {index: tuple(next(found) for _ in numbers[index]) for index in asked}
    scores = {}
    for index, own in numbers.items():
        tokens = tuple(said[number] for number in own)
        hits = tuple(one == other for one, other in zip(tokens, rows[index].target, strict=True))
        scores[index] = RowScore(tokens, hits, log_probs.get(index))
    return scores


def _log_probs(logits: Tensor, numbers: list[int], tokens: list[int]) -> list[float]:
    """Log-probability of each token at the place that ``numbers`` names for it."""
    found: list[float] = []
    for start in range(0, len(numbers), _WEIGHED_AT_ONCE):
        places = torch.tensor(numbers[start: start + _WEIGHED_AT_ONCE], device=logits.device)
        wanted = torch.tensor(tokens[start: start + _WEIGHED_AT_ONCE], device=logits.device)
        found += logits[places].log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0].tolist()
    return found


def fast_token_budget(device_type: str) -> int:
    """Tokens of a batch that are fast on a kind of device."""
    return _CPU_TOKENS if device_type == "cpu" else _GPU_TOKENS


def _sequences(rows: Sequence[Row], chosen: Sequence[int]) -> list[_Sequence]:
    """What has to be run for the chosen rows, in an order that puts together what begins alike."""
    sequences: list[_Sequence] = []
    # In this order a row comes right after those that it is the beginning of.
    for index in sorted(chosen, key=lambda index: rows[index].fed, reverse=True):
        fed = rows[index].fed
        if not sequences or sequences[-1].tokens[: len(fed)] != fed:
            sequences.append(_Sequence(fed, [], []))
        sequences[-1].rows.append(index)
    return [
        _Sequence(one.tokens, one.rows, sorted({at for index in one.rows for at in rows[index].places}))
        for one in sequences
    ]


def _padded_batches(sequences: list[_Sequence], token_budget: int) -> Iterator[_Batch]:
    costs = [TOKENS_PER_PLACE * len(one.places) for one in sequences]
    for batch in padded_batches([len(one.tokens) for one in sequences], token_budget, costs, token_budget):
        yield _Batch([sequences[number] for number in batch], [()] * len(batch))


def _packed_batches(sequences: list[_Sequence], token_budget: int) -> Iterator[_Batch]:
    """In the sequences' order; a beginning whose sequences fall in two batches is run in both."""
    stems: list[tuple[int, ...]] = [()] * len(sequences)
    for group in _shared_beginnings(sequences):
        stem = tuple(sequences[group.first].tokens[: group.depth])
        stems[group.first: group.stop] = [stem] * (group.stop - group.first)
    batch, tokens, places = _Batch(), 0, 0
    for sequence, stem in zip(sequences, stems, strict=True):
        known = len(stem) if batch.stems and batch.stems[-1] == stem else 0
        cost = len(sequence.tokens) - known
        if batch.sequences and max(tokens + cost, TOKENS_PER_PLACE * (places + len(sequence.places))) > token_budget:
            yield batch
            batch, tokens, places, cost = _Batch(), 0, 0, len(sequence.tokens)
        batch.sequences.append(sequence)
        batch.stems.append(stem)
        tokens, places = tokens + cost, places + len(sequence.places)
    if batch.sequences:
        yield batch


@dataclass
class _Group:
    """Sequences ``first .. stop - 1``, which have their first ``depth`` tokens in common."""

    first: int
    stop: int
    depth: int


@dataclass
class _Open:
    """Neighbours that agree to ``depth`` or deeper from ``first`` onward, and the best that can be made of them."""

    first: int
    depth: int
    saved: int = 0
    groups: list[_Group] = field(default_factory=list)


def _shared_beginnings(sequences: list[_Sequence]) -> list[_Group]:
    """Groups of sequences whose common beginning, run once each, saves most tokens.

    A beginning ends in front of the first place where anything is predicted. The sequences are in order, so those that
    agree to some depth are neighbours, and those that agree deeper lie within: a tree, settled from its leaves.
    """
    depths = [_common(one, other) for one, other in pairwise(sequences)]
    opened = [_Open(0, 0)]
    for number, depth in enumerate([*depths, 0]):
        closed = _Open(number, depth)
        while opened[-1].depth > depth:
            last = opened.pop()
            last.saved, last.groups = last.saved + closed.saved, last.groups + closed.groups
            whole = (number - last.first) * last.depth
            if whole >= last.saved and last.depth >= _LEAST_SHARED:
                last.saved, last.groups = whole, [_Group(last.first, number + 1, last.depth)]
            closed = last
        if opened[-1].depth == depth:
            opened[-1].saved += closed.saved
            opened[-1].groups += closed.groups
        else:
            opened.append(_Open(closed.first, depth, closed.saved, closed.groups))
    return opened[0].groups


def _common(one: _Sequence, other: _Sequence) -> int:
    most = min(one.places[0], other.places[0])
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1],
                                    zip(one.tokens[:most], other.tokens[:most], strict=True)))


def _padded_logits(model: nn.Module, batch: _Batch) -> Tensor:
    """Logits ``(places, vocabulary)`` at all sequences' places in turn."""
    padded = pad_rows([one.tokens for one in batch.sequences], input_device(model))
    rows = torch.tensor([number for number, one in enumerate(batch.sequences) for _ in one.places])
    columns = torch.tensor([at for one in batch.sequences for at in one.places])
    return logits_at(model, padded.input_ids, padded.attention_mask, rows, columns)


def _packed_logits(model: nn.Module, batch: _Batch) -> Tensor:
    """The same of packed rows, which the model must attend to (``attending_packed``)."""
    packed = pack_behind([one.tokens for one in batch.sequences], batch.stems, input_device(model))
    columns = torch.tensor([start + at - len(stem) for one, stem, start
                            in zip(batch.sequences, batch.stems, packed.starts, strict=True) for at in one.places])
    tokens = packed.tokens
    return logits_at(model, tokens.input_ids, tokens.attention_mask, torch.zeros_like(columns), columns,
                     position_ids=tokens.position_ids, packed_rows=packed.layout)


def _packing_is_exact(model: nn.Module, sequences: list[_Sequence]) -> bool:
    """Whether packed sequences, one of them behind its beginning, give the logits of sequences by themselves."""
    longest = max(sequences, key=lambda one: one.places[0])
    shortest = min(sequences, key=lambda one: len(one.tokens))
    together = _Batch([longest, shortest], [tuple(longest.tokens[: longest.places[0]]), ()])
    alone = torch.cat([_padded_logits(model, _Batch([one], [()])) for one in (longest, shortest)])
    return packs_exactly(model, alone, lambda: _packed_logits(model, together))
