"""What every gradient step of target values runs, and how: the blocks above the edited one, with delta added to its
output at the subject's last token.

Tokens in front of that one are run once: attention is causal, so their keys and values stay. The tokens from it on are
packed end to end where the model takes an attention function of ours (see ``packing``), else padded.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..models import EditableModel
from .packing import PackedRows, pack_behind, packs_exactly, same_states, select_packed
from .replay import BlockReplay, KeyValues, common_beginnings, pad_rows, prefix_key_values
from .requests import TokenizedPrompt, TokenizedRequest

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One token row.

    Attributes:
        edit: index of its edit among those optimised together.
        context: rows of one context template have one number; the plain prompt's is 0, the drift prompt's -1.
        ids: all tokens that are read.
        lookup: which of them is the subject's last.
        first: from which of them onward ``targets`` are predicted.
        targets: tokens to be predicted; none for the drift prompt, of which the lookup's prediction counts.
    """

    edit: int
    context: int
    ids: tuple[int, ...]
    lookup: int
    first: int = 0
    targets: tuple[int, ...] = ()


def rows_of(edit: int, request: TokenizedRequest) -> list[Row]:
    """An edit's rows: the plain prompt, the prompt in each context, the drift prompt."""
    rewriting = [Row(edit, context, prompt.ids + request.target_ids[:-1], prompt.lookup, len(prompt.ids) - 1,
                     request.target_ids) for context, prompt in enumerate([request.plain, *request.contexts])]
    return [*rewriting, Row(edit, -1, request.drift.ids, request.drift.lookup)]


@dataclass(frozen=True)
class Predictions:
    """Where targets are predicted, each ``(n,)``: row, tokens behind that row's lookup, token, edit, and weight in the
    edit's mean."""

    rows: Tensor
    behind: Tensor
    tokens: Tensor
    edits: Tensor
    weights: Tensor

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Predictions:
        """Of rows among which there may be drift prompts."""
        contexts = Counter(row.edit for row in rows if row.targets)
        found = [(i, row.first - row.lookup + j, token, row.edit, 1.0 / (len(row.targets) * contexts[row.edit]))
                 for i, row in enumerate(rows) for j, token in enumerate(row.targets)]
        row, behind, token, edit, weights = zip(*found, strict=True)
        return cls(torch.tensor(row), torch.tensor(behind), torch.tensor(token), torch.tensor(edit),
                   torch.tensor(weights, dtype=torch.float32))


class Steering(Protocol):
    """Rows ready to be run again with other deltas.

    Attributes:
        edits: those it still has rows of, in the order in which ``run`` gives their drift prompts.
        predictions: where ``run``'s other states are.
        initial: ``(edits, hidden_size)``, the edited block's output at the lookup of the plain prompt.
        drift_final: ``(edits, hidden_size)``, the last block's at the lookup of the drift prompt, without a delta.
    """

    edits: Tensor
    predictions: Predictions
    initial: Tensor
    drift_final: Tensor

    def run(self, delta: Tensor, loss_block: int) -> tuple[Tensor, Tensor]:
        """Outputs of ``loss_block`` at the predictions, and of the last block at the drift prompts' lookups.

        Args:
            delta: ``(all edits, hidden_size)``.
            loss_block: number of a block from the edited one on.
        """

    def keep(self, edits: set[int]) -> Steering:
        """The rows of some edits only."""


class PackedSteering:
    """Tokens from the lookup on, end to end; needs ``attending_packed`` to be recorded and to be run."""

    def __init__(self, rows: list[Row], layout: PackedRows, replay: BlockReplay) -> None:
        self._rows, self._layout, self._replay = rows, layout, replay
        self.predictions = Predictions.of(rows)
        self._starts = layout.starts  # the lookups
        self._owners = torch.tensor([row.edit for row in rows])
        self._drift = torch.tensor([i for i, row in enumerate(rows) if not row.targets])
        plain = torch.tensor([i for i, row in enumerate(rows) if row.context == 0])
        self._drift = self._drift[self._owners[self._drift].argsort()]
        plain = plain[self._owners[plain].argsort()]
        self.edits = self._owners[self._drift]
        self.initial = _at(replay.hidden, self._starts[plain]).float()
        self.drift_final = _at(replay.final, self._starts[self._drift])

    @classmethod
    @torch.no_grad()
    def record(cls, editable: EditableModel, rows: Sequence[Row], block: int) -> PackedSteering:
        """Run everything once, what rows of one context begin with in common only once for all of them.

        Args:
            block: the edited one.
        """
        fronts = common_beginnings([row.ids[: row.lookup] for row in rows], [row.context for row in rows])
        packed = pack_behind([row.ids for row in rows], fronts, editable.input_device, recording=True)
        replay = BlockReplay.record(editable, packed.tokens, block + 1, editable.num_blocks, packed_rows=packed.layout)
        # Steps need the keys and values in front of lookups, in the blocks above the edited one.
        table = {layer: packed.layout.recorded[layer] for layer in range(block + 1, editable.num_blocks)}
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids) - rows[i].lookup)
        rows = [rows[i] for i in order]
        lookups = [packed.starts[i] + row.lookup - len(fronts[i]) for i, row in zip(order, rows, strict=True)]
        in_front = [[*packed.fronts[i], *range(packed.starts[i], lookup)]
                    for i, lookup in zip(order, lookups, strict=True)]
        widths = [len(row.ids) - row.lookup for row in rows]
        kept = PackedRows(widths, in_front, table)
        tokens = [lookup + i for lookup, width in zip(lookups, widths, strict=True) for i in range(width)]
        return cls(rows, kept, select_packed(replay, kept, torch.tensor(tokens)))

    def run(self, delta: Tensor, loss_block: int) -> tuple[Tensor, Tensor]:
        hidden = self._replay.hidden
        steps = delta[self._owners.to(delta.device)].to(hidden)
        steered = hidden[0].index_add(0, self._starts.to(hidden.device), steps).unsqueeze(0)
        seen = self._replay.run(steered, stop=loss_block + 1)
        last = self._replay.stop - 1
        final = seen if loss_block == last else self._replay.run(seen, start=loss_block + 1)
        places = self._starts[self.predictions.rows] + self.predictions.behind
        return _at(seen, places), _at(final, self._starts[self._drift])

    def keep(self, edits: set[int]) -> PackedSteering:
        index = torch.tensor([i for i, row in enumerate(self._rows) if row.edit in edits])
        layout, tokens = self._layout.select(index)
        return PackedSteering([self._rows[i] for i in index.tolist()], layout,
                              select_packed(self._replay, layout, tokens))


def _at(packed: Tensor, places: Tensor) -> Tensor:
    return packed[0].index_select(0, places.to(packed.device))


class _PaddedRows:
    """Rows padded to one length, recorded together."""

    def __init__(self, rows: list[Row], cuts: list[int], replay: BlockReplay) -> None:
        self.rows, self.replay, self._cuts = rows, replay, cuts
        self.owners = torch.tensor([row.edit for row in rows])
        self.lookups = torch.tensor([row.lookup - cut for row, cut in zip(rows, cuts, strict=True)])

    @classmethod
    def record(cls, editable: EditableModel, rows: list[Row], block: int, use_prefix: bool) -> _PaddedRows:
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

    def steered(self, delta: Tensor) -> Tensor:
        hidden = self.replay.hidden
        index = torch.arange(len(self.rows), device=hidden.device), self.lookups.to(hidden.device)
        steps = delta[self.owners.to(delta.device)].to(hidden)
        return hidden.index_put(index, steps, accumulate=True)

    def at(self, hidden: Tensor, rows: Tensor, behind: Tensor | int = 0) -> Tensor:
        columns = self.lookups[rows] + behind
        return hidden[rows.to(hidden.device), columns.to(hidden.device)]

    def keep(self, edits: set[int]) -> _PaddedRows:
        index = [i for i, row in enumerate(self.rows) if row.edit in edits]
        return _PaddedRows([self.rows[i] for i in index], [self._cuts[i] for i in index],
                           self.replay.select(torch.tensor(index)))


class PaddedSteering:
    """Rows padded, for any decoder; prompts that rewrite and drift prompts each by themselves."""

    def __init__(self, rewriting: _PaddedRows, drift: _PaddedRows) -> None:
        self._rewriting, self._drift = rewriting, drift
        self.predictions = Predictions.of(rewriting.rows)
        self.edits = drift.owners
        plain = torch.tensor([i for i, row in enumerate(rewriting.rows) if row.context == 0])
        self.initial = rewriting.at(rewriting.replay.hidden, plain).float()
        self.drift_final = self._at_drift(drift.replay.final)

    @classmethod
    @torch.no_grad()
    def record(cls, editable: EditableModel, rows: Sequence[Row], block: int, use_prefix: bool) -> PaddedSteering:
        """Run everything once; without ``use_prefix`` every step runs all tokens.

        Args:
            rows: of the edits in order.
            block: the edited one.
        """
        return cls(*(_PaddedRows.record(editable, [row for row in rows if bool(row.targets) == rewrites], block,
                                        use_prefix) for rewrites in (True, False)))

    def _at_drift(self, hidden: Tensor) -> Tensor:
        return self._drift.at(hidden, torch.arange(len(self._drift.rows)))

    def run(self, delta: Tensor, loss_block: int) -> tuple[Tensor, Tensor]:
        seen = self._rewriting.replay.run(self._rewriting.steered(delta), stop=loss_block + 1)
        final = self._drift.replay.run(self._drift.steered(delta))
        return self._rewriting.at(seen, self.predictions.rows, self.predictions.behind), self._at_drift(final)

    def keep(self, edits: set[int]) -> PaddedSteering:
        return PaddedSteering(self._rewriting.keep(edits), self._drift.keep(edits))


# --- which of them a model allows ---------------------------------------------------------------------------

# Rows end to end; padded behind keys and values of the tokens in front; padded, with all tokens in every step.
Layout = Literal["packed", "padded", "whole"]


def layout_of(editable: EditableModel, requests: Sequence[TokenizedRequest]) -> Layout:
    """How these edits' rows can be laid out on this model, which must be frozen: the cheapest way that is exact."""
    prompts = [prompt for request in requests for prompt in (request.plain, *request.contexts)]
    longest, shortest = (chosen(prompts, key=lambda prompt: prompt.lookup) for chosen in (max, min))
    if packing_is_exact(editable, [longest, shortest]):
        return "packed"
    return "padded" if prefix_is_exact(editable, longest) else "whole"

@torch.no_grad()
def packing_is_exact(editable: EditableModel, prompts: Sequence[TokenizedPrompt]) -> bool:
    """Whether prompts packed behind keys and values of their beginnings give the states of prompts by themselves."""
    stop = editable.num_blocks
    rows = [Row(i, 0, prompt.ids, prompt.lookup, len(prompt.ids) - 1, (0,)) for i, prompt in enumerate(prompts)]
    rows += [Row(i, -1, prompt.ids[: prompt.lookup + 1], prompt.lookup) for i, prompt in enumerate(prompts)]
    whole = [BlockReplay.record(editable, pad_rows([prompt.ids], editable.input_device), stop - 1, stop).final[0]
             for prompt in prompts]
    expected = torch.stack([states[at] for states, prompt in zip(whole, prompts, strict=True)
                            for at in (len(prompt.ids) - 1, prompt.lookup)])

    def run() -> Tensor:
        steering = PackedSteering.record(editable, rows, stop - 2)
        last, lookup = steering.run(torch.zeros_like(steering.initial), stop - 1)
        return torch.stack([last[steering.predictions.edits.argsort()], lookup], dim=1).flatten(0, 1)

    return packs_exactly(editable.model, expected, run)


@torch.no_grad()
def prefix_is_exact(editable: EditableModel, prompt: TokenizedPrompt) -> bool:
    """Whether running the tokens in front through a cache gives what running all of them gives, on this model."""
    ids, cut, stop = prompt.ids, prompt.lookup, editable.num_blocks
    if cut == 0:
        return True
    device = editable.input_device
    whole = BlockReplay.record(editable, pad_rows([ids], device), stop - 1, stop).final[:, cut:]
    try:
        cached = prefix_key_values(editable, [ids[:cut]], stop)
        rows = pad_rows([ids[cut:]], device, starts=[cut], prefix_width=cut)
        split = BlockReplay.record(editable, rows, stop - 1, stop, prefix=cached).final
    except (TypeError, KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        logger.warning("%s does not take a prefix cache (%s): every step runs all tokens",
                       type(editable.model).__name__, error)
        return False
    return same_states(editable.model, "a prefix cache", split, whole)
