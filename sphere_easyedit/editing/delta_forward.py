"""Forward passes of the target-value optimisation: the blocks above the edited one, with a delta added to its output.

Tokens before the subject's last one are run once: with causal attention their keys and values stay the same. The tokens
from it on are packed end to end where the model takes our attention function (see ``models.packing``), else padded.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..models.architecture import EditableModel
from ..models.batching import group_by_class, length_class
from ..models.packing import PackedRows, pack_with_prefixes, select_packed
from ..models.replay import BlockReplay, KeyValues, pad_rows, prefix_key_values, shared_prefixes
from .requests import TokenizedRequest

logger = logging.getLogger(__name__)


# Rows end to end; padded, with cached keys and values of the tokens before; padded, with all tokens in every step.
Layout = Literal["packed", "padded", "whole"]


@dataclass(frozen=True)
class PromptRow:
    """Token ids of one prompt, with the target where the row has one.

    Attributes:
        edit: index of its edit among those optimised together.
        context: index of the context template (0: the plain prompt, -1: the drift prompt).
        ids: all tokens.
        lookup: index of the subject's last token.
        first: index of the token that predicts the first of ``targets``.
        targets: tokens to predict; empty for the drift prompt, whose prediction at the lookup is used.
        weight: weight of each of these predictions in the edit's loss.
    """

    edit: int
    context: int
    ids: tuple[int, ...]
    lookup: int
    first: int = 0
    targets: tuple[int, ...] = ()
    weight: float = 1.0


def rows_of(edit: int, request: TokenizedRequest) -> list[PromptRow]:
    """An edit's rows: the plain prompt, the prompt in each context, the drift prompt."""
    prompts = [request.plain, *request.contexts]
    weight = 1.0 / (len(request.target_ids) * len(prompts))
    rewriting = [PromptRow(edit, context, prompt.ids + request.target_ids[:-1], prompt.lookup, len(prompt.ids) - 1,
                     request.target_ids, weight) for context, prompt in enumerate(prompts)]
    return [*rewriting, PromptRow(edit, -1, request.drift.ids, request.drift.lookup)]


@dataclass(frozen=True)
class Predictions:
    """Positions where targets are predicted, each ``(n,)``: row, offset from the row's lookup, target token, edit, and
    weight in the edit's loss."""

    rows: Tensor
    offset: Tensor
    tokens: Tensor
    edits: Tensor
    weights: Tensor

    @classmethod
    def of(cls, rows: Sequence[PromptRow]) -> Predictions:
        """Predictions of rows; drift prompts have none."""
        positions = [(i, row.first - row.lookup + j, token, row.edit)
                     for i, row in enumerate(rows) for j, token in enumerate(row.targets)]
        weights = [row.weight for row in rows for _ in row.targets]
        row, offset, token, edit = _longs(positions).view(-1, 4).unbind(dim=1)
        return cls(row, offset, token, edit, torch.tensor(weights, dtype=torch.float32))


def _longs(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


class _RowGroup(ABC):
    """Rows that are run together, with their recorded states in the blocks above the edited one."""

    def __init__(self, rows: list[PromptRow], replay: BlockReplay) -> None:
        self.rows, self.replay = rows, replay
        self.predictions = Predictions.of(rows)
        self.owners = _longs([row.edit for row in rows])
        self.plain, self.drift = (_longs([i for i, row in enumerate(rows) if row.context == context])
                                  for context in (0, -1))

    @abstractmethod
    def at(self, hidden: Tensor, rows: Tensor, offset: Tensor | int = 0) -> Tensor:
        """States ``(n, hidden_size)`` of rows at their lookups, or at an offset from them."""

    @abstractmethod
    def add_delta(self, delta: Tensor) -> Tensor:
        """Output of the edited block with each edit's ``delta`` added at its rows' lookups."""

    @abstractmethod
    def select(self, index: Tensor, rows: list[PromptRow]) -> _RowGroup:
        """Some rows, given by ascending index, described by ``rows``."""

    def run(self, delta: Tensor, loss_block: int) -> tuple[Tensor, Tensor]:
        """``DeltaForward.run`` for these rows, with drift prompts in the order of the rows."""
        seen = self.replay.run(self.add_delta(delta), stop=loss_block + 1)
        final = seen
        if len(self.drift) and loss_block + 1 < self.replay.stop:
            final = self.replay.run(seen, start=loss_block + 1)
        return self.at(seen, self.predictions.rows, self.predictions.offset), self.at(final, self.drift)


class _Packed(_RowGroup):
    """Rows packed end to end from their lookups on; recorded and run within ``attending_packed``."""

    def __init__(self, rows: list[PromptRow], layout: PackedRows, replay: BlockReplay) -> None:
        super().__init__(rows, replay)
        self._layout = layout
        self._starts = layout.starts  # the lookups

    @classmethod
    def record(cls, editable: EditableModel, rows: list[PromptRow], block: int) -> _Packed:
        """Run all rows once; beginnings that rows of one context share are run once for all of them."""
        fronts = shared_prefixes([row.ids[: row.lookup] for row in rows], [row.context for row in rows])
        packed = pack_with_prefixes([row.ids for row in rows], fronts, editable.input_device, recording=True)
        replay = BlockReplay.record(editable, packed.tokens, block + 1, editable.num_blocks, packed_rows=packed.layout)
        # Later passes need the keys and values before the lookups, in the blocks above the edited one.
        table = {layer: packed.layout.recorded[layer] for layer in range(block + 1, editable.num_blocks)}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids) - rows[i].lookup)
        rows = [rows[i] for i in order]
        lookups = [packed.starts[i] + row.lookup - len(fronts[i]) for i, row in zip(order, rows, strict=True)]
        in_front = [[*packed.prefixes[i], *range(packed.starts[i], lookup)]
                    for i, lookup in zip(order, lookups, strict=True)]
        widths = [len(row.ids) - row.lookup for row in rows]
        kept = PackedRows(widths, in_front, table)
        tokens = [lookup + i for lookup, width in zip(lookups, widths, strict=True) for i in range(width)]
        return cls(rows, kept, select_packed(replay, kept, torch.tensor(tokens)))

    def at(self, hidden: Tensor, rows: Tensor, offset: Tensor | int = 0) -> Tensor:
        return hidden[0].index_select(0, (self._starts[rows] + offset).to(hidden.device))

    def add_delta(self, delta: Tensor) -> Tensor:
        hidden = self.replay.hidden
        steps = delta[self.owners.to(delta.device)].to(hidden)
        return hidden[0].index_add(0, self._starts.to(hidden.device), steps).unsqueeze(0)

    def select(self, index: Tensor, rows: list[PromptRow]) -> _Packed:
        layout, tokens = self._layout.select(index)
        return _Packed(rows, layout, select_packed(self.replay, layout, tokens))


class _Padded(_RowGroup):
    """Rows padded to one length."""

    def __init__(self, rows: list[PromptRow], cuts: list[int], replay: BlockReplay) -> None:
        super().__init__(rows, replay)
        self._cuts = cuts
        self._lookups = _longs([row.lookup - cut for row, cut in zip(rows, cuts, strict=True)])

    @classmethod
    def record(cls, editable: EditableModel, rows: list[PromptRow], block: int, use_prefix: bool) -> _Padded:
        """Run all rows once; without ``use_prefix``, later passes run all tokens again."""
        stop = editable.num_blocks
        cuts = [row.lookup if use_prefix else 0 for row in rows]
        width = max(cuts)
        prefix: KeyValues | None = None
        if width:
            prefix = prefix_key_values(editable, [row.ids[:cut] for row, cut in zip(rows, cuts, strict=True)], stop,
                                       [row.context for row in rows])
        padded = pad_rows([row.ids[cut:] for row, cut in zip(rows, cuts, strict=True)], editable.input_device, cuts,
                          width)
        return cls(rows, cuts, BlockReplay.record(editable, padded, block + 1, stop, prefix))

    def at(self, hidden: Tensor, rows: Tensor, offset: Tensor | int = 0) -> Tensor:
        columns = self._lookups[rows] + offset
        return hidden[rows.to(hidden.device), columns.to(hidden.device)]

    def add_delta(self, delta: Tensor) -> Tensor:
        hidden = self.replay.hidden
        index = torch.arange(len(self.rows), device=hidden.device), self._lookups.to(hidden.device)
        steps = delta[self.owners.to(delta.device)].to(hidden)
        return hidden.index_put(index, steps, accumulate=True)

    def select(self, index: Tensor, rows: list[PromptRow]) -> _Padded:
        return _Padded(rows, [self._cuts[i] for i in index.tolist()], self.replay.select(index))


class DeltaForward:
    """Runs the blocks above the edited one on recorded rows, with other deltas each time.

    Attributes:
        edits: indices of the edits that have rows, ascending.
        predictions: positions of the first result of ``run``; rows are numbered within each group that is run together.
        initial: ``(edits, hidden_size)``, the edited block's output at the lookup of the plain prompt.
        drift_final: ``(edits, hidden_size)``, the last block's output at the lookup of the drift prompt, without delta.
    """

    def __init__(self, parts: Sequence[_RowGroup]) -> None:
        self._parts = parts
        self.predictions = Predictions(*(torch.cat([getattr(part.predictions, column.name) for part in parts])
                                         for column in fields(Predictions)))
        edits = torch.cat([part.owners[part.drift] for part in parts])
        self.edits, self._order = edits.sort()
        plain = torch.cat([part.owners[part.plain] for part in parts]).argsort()
        self.initial = _joined([part.at(part.replay.hidden, part.plain) for part in parts], plain).float()
        self.drift_final = _joined([part.at(part.replay.final, part.drift) for part in parts], self._order)

    @classmethod
    @torch.no_grad()
    def record(cls, editable: EditableModel, rows: Sequence[PromptRow], block: int, layout: Layout) -> DeltaForward:
        """Run all rows once.

        Rows of different length classes (see ``models.batching``) are run apart; padded rows with and without targets,
        too.

        Args:
            rows: of all edits in order.
            block: the edited one.
        """
        class_of = length_class(editable.config)
        parts: list[_RowGroup] = []
        for index in group_by_class([len(row.ids) for row in rows], class_of):
            alike = [rows[i] for i in index]
            if layout == "packed":
                parts.append(_Packed.record(editable, alike, block))
                continue
            # A prefix is run as a row of the smallest length class, so only rows of that class can have one.
            use_prefix = layout == "padded" and class_of(len(alike[0].ids)) == class_of(1)
            for rewrites in (True, False):
                some = [row for row in alike if bool(row.targets) == rewrites]
                if some:
                    parts.append(_Padded.record(editable, some, block, use_prefix))
        return cls(parts)

    @classmethod
    @torch.no_grad()
    def record_packed(cls, editable: EditableModel, rows: Sequence[PromptRow], block: int) -> DeltaForward:
        """Run all rows once, packed, whatever their length classes."""
        return cls([_Packed.record(editable, [*rows], block)])

    def run(self, delta: Tensor, loss_block: int) -> tuple[Tensor, Tensor]:
        """Outputs of ``loss_block`` at ``predictions``, and of the last block at the lookups of the drift prompts.

        Args:
            delta: ``(all edits, hidden_size)``.
            loss_block: index of the edited block or a later one.
        """
        seen, final = zip(*(part.run(delta, loss_block) for part in self._parts), strict=True)
        return torch.cat(seen), _joined(final, self._order)

    def keep(self, edits: set[int]) -> DeltaForward:
        """Only the rows of these edits."""
        return self._select(lambda row: row.edit in edits)

    def with_contexts(self, contexts: Collection[int], count: int) -> DeltaForward:
        """Only the plain prompt, the drift prompt and some of the ``count`` contexts of each edit.

        The loss is the mean over the rows that stay.

        Args:
            contexts: indices of the context templates, from 1 on.
        """
        return self._select(lambda row: row.context <= 0 or row.context in contexts, (1 + count) / (1 + len(contexts)))

    def _select(self, chosen: Callable[[PromptRow], bool], scale: float = 1.0) -> DeltaForward:
        """The rows that are chosen, with their weights in the loss scaled."""
        parts = []
        for part in self._parts:
            index = [i for i, row in enumerate(part.rows) if chosen(row)]
            if index:
                rows = [replace(part.rows[i], weight=part.rows[i].weight * scale) for i in index]
                parts.append(part.select(_longs(index), rows))
        return DeltaForward(parts)


def _joined(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    # Groups without drift prompts end at the loss block, which may be on another device than the last one.
    joined = torch.cat([part.to(parts[-1].device) for part in parts])
    return joined.index_select(0, order.to(joined.device))
