"""Keys and residual states of a batch of edits, layer after layer.

A key is the input of the down-projection at the subject's last token; the residual is taken at the output of the last
edited block. Both are read from blocks replayed on the prompts' tokens up to that token (nothing later can influence
it), on states cached below the layer being written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batching import padded_batches
from ..models import EditableModel
from .replay import BlockReplay, pad_rows
from .requests import TokenizedPrompt, TokenizedRequest


@dataclass
class _Chunk:
    """Rows replayed together, all plain prompts or all prompts in context."""

    owner: list[int]  # the edit of each row
    is_plain: bool
    lookup: Tensor  # (rows,)
    replay: BlockReplay
    hidden: Tensor  # (rows, tokens, hidden_size), entering the next layer to be written

    def at_lookup(self, states: Tensor) -> Tensor:
        lookup = self.lookup.to(states.device)
        return states[torch.arange(len(lookup), device=states.device), lookup]


class BatchStates:
    """States of a batch's prompts in the edited layers, kept up to date while weights are written.

    Args:
        editable: the model; ``editable.layers`` are written in ascending order.
        requests: the tokenised edits.
        token_budget: padded tokens that go through the model at once.
    """

    def __init__(self, editable: EditableModel, requests: Sequence[TokenizedRequest], token_budget: int) -> None:
        self._editable, self._count = editable, len(requests)
        self._contexts = len(requests[0].contexts)
        plain = [(edit, request.plain) for edit, request in enumerate(requests)]
        context = [(edit, prompt) for edit, request in enumerate(requests) for prompt in request.contexts]
        self._chunks = [self._record(rows, is_plain)
                        for rows_of_kind, is_plain in ((plain, True), (context, False))
                        for rows in _batches(rows_of_kind, token_budget)]

    def _record(self, rows: list[tuple[int, TokenizedPrompt]], is_plain: bool) -> _Chunk:
        editable = self._editable
        padded = pad_rows([prompt.ids[: prompt.lookup + 1] for _, prompt in rows], editable.input_device)
        replay = BlockReplay.record(editable, padded, editable.layers[0], editable.layers[-1] + 1)
        lookup = torch.tensor([prompt.lookup for _, prompt in rows])
        return _Chunk([edit for edit, _ in rows], is_plain, lookup, replay, replay.hidden)

    @torch.no_grad()
    def read(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values at ``layer`` and outputs of the last edited block, by the weights as they stand.

        Returns:
            ``keys (edits, d_in)``: mean of the key in the plain prompt and the mean over the contexts;
            ``values (edits, d_out)``, the down-projection's output, and ``now (edits, hidden_size)``, both from the
            plain prompt. All float32, at the subject's last token.
        """
        keys = _KeyMean(self._count, self._contexts)
        plain: list[tuple[Tensor, Tensor]] = []
        owner: list[int] = []
        last = self._editable.layers[-1]
        for chunk in self._chunks:
            with _tap(self._editable.down_projection(layer)) as seen:
                output = chunk.replay.run(chunk.hidden, start=layer, stop=layer + 1)
            keys.add(chunk, chunk.at_lookup(seen.inputs[0]))
            if chunk.is_plain:
                final = chunk.replay.run(output, start=layer + 1, stop=last + 1)
                plain.append((chunk.at_lookup(seen.outputs[0]).float(), chunk.at_lookup(final).float()))
                owner.extend(chunk.owner)
        values, now = (_in_order(owner, parts) for parts in zip(*plain, strict=True))
        return keys.result(), values, now

    @torch.no_grad()
    def advance(self, layer: int, to: int) -> None:
        """Carry the states from entering ``layer``, now written, to entering layer ``to``."""
        for chunk in self._chunks:
            chunk.hidden = chunk.replay.run(chunk.hidden, start=layer, stop=to)

    @torch.no_grad()
    def read_all(self) -> dict[int, Tensor]:
        """Keys ``(edits, d_in)`` float32 at every edited layer in one pass, by the weights as they stand."""
        layers = self._editable.layers
        keys = {layer: _KeyMean(self._count, self._contexts) for layer in layers}
        for chunk in self._chunks:
            hidden = chunk.replay.hidden
            for layer, following in zip(layers, [*layers[1:], layers[-1] + 1], strict=True):
                with _tap(self._editable.down_projection(layer)) as seen:
                    hidden = chunk.replay.run(hidden, start=layer, stop=following)
                keys[layer].add(chunk, chunk.at_lookup(seen.inputs[0]))
        return {layer: mean.result() for layer, mean in keys.items()}


class _KeyMean:
    """Sums up ``(plain + mean over contexts) / 2``; the plain prompt alone where there is no context."""

    def __init__(self, count: int, contexts: int) -> None:
        self._count, self._contexts = count, contexts
        self._total: Tensor | None = None

    def add(self, chunk: _Chunk, keys: Tensor) -> None:
        share = 1.0 if not self._contexts else 0.5 if chunk.is_plain else 0.5 / self._contexts
        if self._total is None:
            self._total = torch.zeros(self._count, keys.shape[1], dtype=torch.float32, device=keys.device)
        owner = torch.tensor(chunk.owner, device=keys.device)
        self._total.index_add_(0, owner, keys.float() * share)

    def result(self) -> Tensor:
        assert self._total is not None  # every batch has plain prompts
        return self._total


class _tap:
    """Collects a module's inputs and outputs inside the context."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __enter__(self) -> _tap:
        def note(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.inputs.append(args[0])
            self.outputs.append(output)

        self._handle = self._module.register_forward_hook(note)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


def _in_order(owner: list[int], parts: Sequence[Tensor]) -> Tensor:
    """Rows of the parts, which ``owner`` numbers, in the order of these numbers."""
    rows = torch.cat(list(parts))
    ordered = torch.empty_like(rows)
    ordered[owner] = rows
    return ordered


def _batches(rows: list[tuple[int, TokenizedPrompt]], token_budget: int) -> list[list[tuple[int, TokenizedPrompt]]]:
    lengths = [prompt.lookup + 1 for _, prompt in rows]
    return [[rows[index] for index in batch] for batch in padded_batches(lengths, token_budget)]
