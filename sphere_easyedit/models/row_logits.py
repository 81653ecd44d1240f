"""Logits at chosen positions of many rows, which run padded or packed end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .architecture import input_device, logits_at
from .packing import pack_with_prefixes
from .replay import pad_rows


@dataclass(frozen=True)
class TargetRow:
    """Token ids of a prompt and its target."""

    prompt: Sequence[int]
    target: Sequence[int]

    @property
    def input_ids(self) -> list[int]:
        """The tokens that the model reads: all but the last target token, which is only predicted."""
        return [*self.prompt, *self.target[:-1]]

    @property
    def positions(self) -> range:
        """Positions whose logits predict the target's tokens."""
        return range(len(self.prompt) - 1, len(self.prompt) + len(self.target) - 1)


def padded_logits(model: nn.Module, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]]) -> Tensor:
    """Logits ``(positions, vocabulary)`` in float32 at the positions of all rows in turn.

    Args:
        rows: token ids.
        positions: of each row, from 0.
    """
    padded = pad_rows(rows, input_device(model))
    numbers = torch.tensor([number for number, some in enumerate(positions) for _ in some])
    columns = torch.tensor([at for some in positions for at in some])
    return logits_at(model, padded.input_ids, padded.attention_mask, numbers, columns)


def packed_logits(model: nn.Module, rows: Sequence[Sequence[int]], positions: Sequence[Sequence[int]],
                  prefixes: Sequence[tuple[int, ...]]) -> Tensor:
    """The same for rows packed end to end; must be called within ``attending_packed``.

    Args:
        rows: token ids, with their prefixes.
        positions: of each row, counted from the start of its prefix.
        prefixes: first tokens of each row that it shares with its neighbours, which run once; () for none.
    """
    packed = pack_with_prefixes(rows, prefixes, input_device(model))
    columns = torch.tensor([start + at - len(prefix) for some, prefix, start
                            in zip(positions, prefixes, packed.starts, strict=True) for at in some])
    tokens = packed.tokens
    return logits_at(model, tokens.input_ids, tokens.attention_mask, torch.zeros_like(columns), columns,
                     position_ids=tokens.position_ids, packed_rows=packed.layout)
