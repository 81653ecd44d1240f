"""Computes keys and residual states of a batch of edits, layer after layer.

A key is the input of the down-projection at the subject's last token; residuals are taken at the output of the last
edited block. Both are read from blocks replayed on each prompt's tokens up to that token (later ones can't affect it),
starting from states cached below the layer being written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from ..models.architecture import EditableModel
from ..models.batching import group_by_class, length_class, padded_batches
from ..models.output_path import OutputPath, Scaled
from ..models.replay import BlockReplay, as_rows, first_input, pad_rows
from .requests import TokenizedPrompt, TokenizedRequest


@dataclass
class _Chunk:
    """Rows replayed together: either all plain prompts or all prompts in context."""

    owner: list[int]  # index of each row's edit
    is_plain: bool
    lookup: Tensor  # (rows,)
    replay: BlockReplay
    hidden: Tensor  # (rows, tokens, hidden_size), entering the next layer to be written

    def at_lookup(self, states: Tensor) -> Tensor:
        lookup = self.lookup.to(states.device)
        return states[torch.arange(len(lookup), device=states.device), lookup]


class BatchStates:
    """States of a batch's prompts in the edited layers, updated as weights are written.

    Args:
        editable: the model; ``editable.layers`` are written in ascending order.
        requests: the tokenized edits.
        token_budget: padded tokens a forward pass.
        paths: output paths by layer (see ``models.output_path``); by default outputs are added unchanged.
    """

    def __init__(self, editable: EditableModel, requests: Sequence[TokenizedRequest], token_budget: int,
                 paths: Mapping[int, OutputPath] = MappingProxyType({})) -> None:
        self._editable, self._count, self._paths = editable, len(requests), paths
        self._class_of = length_class(editable.config)
        self._contexts = len(requests[0].contexts)
        plain = [(edit, request.plain) for edit, request in enumerate(requests)]
        context = [(edit, prompt) for edit, request in enumerate(requests) for prompt in request.contexts]
        self._chunks = [self._record(rows, is_plain)
                        for rows_of_group, is_plain in ((plain, True), (context, False))
                        for rows in self._batches(rows_of_group, token_budget)]

    def _batches(self, rows: list[tuple[int, TokenizedPrompt]], token_budget: int
                 ) -> Iterator[list[tuple[int, TokenizedPrompt]]]:
        lengths = [self._num_tokens(prompt) for _, prompt in rows]
        for alike in group_by_class(lengths, self._class_of):
            for batch in padded_batches([lengths[index] for index in alike], token_budget):
                yield [rows[alike[number]] for number in batch]

    def _num_tokens(self, prompt: TokenizedPrompt) -> int:
        """Number of tokens to run: up to the lookup, unless the whole prompt belongs to another length class."""
        whole, cut = len(prompt.ids), prompt.lookup + 1
        return cut if self._class_of(cut) == self._class_of(whole) else whole

    def _record(self, rows: list[tuple[int, TokenizedPrompt]], is_plain: bool) -> _Chunk:
        editable = self._editable
        padded = pad_rows([prompt.ids[: self._num_tokens(prompt)] for _, prompt in rows], editable.input_device)
        replay = BlockReplay.record(editable, padded, editable.layers[0], editable.layers[-1] + 1)
        lookup = torch.tensor([prompt.lookup for _, prompt in rows])
        return _Chunk([edit for edit, _ in rows], is_plain, lookup, replay, replay.hidden)

    @torch.no_grad()
    def read(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and path states at ``layer`` and outputs of the last edited block, with the current weights.

        Returns:
            ``keys (edits, d_in)``: mean of the key in the plain prompt and the mean over the contexts;
            ``states (edits, k)``, input of the layer's ``OutputPath.change``, and ``now (edits, hidden_size)``, both
            from the plain prompt. All float32, at the subject's last token.
        """
        keys = _KeyMean(self._count, self._contexts)
        plain: list[tuple[Tensor, Tensor]] = []
        owner: list[int] = []
        last = self._editable.layers[-1]
        path = self._paths.get(layer) or Scaled()
        for chunk in self._chunks:
            def run(chunk: _Chunk = chunk) -> Tensor:
                return chunk.replay.run(chunk.hidden, start=layer, stop=layer + 1)

            with self._recording_inputs(layer) as inputs:
                output, states = path.observe(self._editable, layer, run) if chunk.is_plain else (run(), None)
            keys.add(chunk, self._keys(layer, chunk, chunk.hidden, inputs))
            if states is not None:
                final = chunk.replay.run(output, start=layer + 1, stop=last + 1)
                plain.append((chunk.at_lookup(states).float(), chunk.at_lookup(final).float()))
                owner.extend(chunk.owner)
        states_read, now = (_in_order(owner, parts) for parts in zip(*plain, strict=True))
        return keys.result(), states_read, now

    @contextmanager
    def _recording_inputs(self, layer: int) -> Iterator[list[Tensor]]:
        """Inputs of the layer's down-projection in forward passes within the context."""
        inputs: list[Tensor] = []
        handle = self._editable.down_projection(layer).register_forward_pre_hook(
            lambda _module, args, kwargs: inputs.append(first_input(args, kwargs)), with_kwargs=True)
        try:
            yield inputs
        finally:
            handle.remove()

    def _keys(self, layer: int, chunk: _Chunk, entering: Tensor, inputs: list[Tensor]) -> Tensor:
        """Keys ``(rows, d_in)``, where the block got ``entering (rows, tokens, ...)``."""
        name = self._editable.names.rewrite_module_tmp.format(layer)
        return chunk.at_lookup(as_rows(inputs[0], entering.shape[0], entering.shape[1], name))

    @torch.no_grad()
    def advance(self, layer: int, to: int) -> None:
        """Replace the states entering ``layer``, whose weight is now written, by those entering layer ``to``."""
        for chunk in self._chunks:
            chunk.hidden = chunk.replay.run(chunk.hidden, start=layer, stop=to)

    @torch.no_grad()
    def read_all(self) -> dict[int, Tensor]:
        """Keys ``(edits, d_in)`` float32 at every edited layer in one pass, with the current weights."""
        layers = self._editable.layers
        keys = {layer: _KeyMean(self._count, self._contexts) for layer in layers}
        for chunk in self._chunks:
            hidden = chunk.replay.hidden
            for layer, following in zip(layers, [*layers[1:], layers[-1] + 1], strict=True):
                entering = hidden
                with self._recording_inputs(layer) as inputs:
                    hidden = chunk.replay.run(hidden, start=layer, stop=following)
                keys[layer].add(chunk, self._keys(layer, chunk, entering, inputs))
        return {layer: mean.result() for layer, mean in keys.items()}


class _KeyMean:
    """Accumulates ``(plain + mean over contexts) / 2``, or the plain key alone without contexts."""

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


def _in_order(owner: list[int], parts: Sequence[Tensor]) -> Tensor:
    """Concatenated rows, moved to the positions in ``owner``."""
    rows = torch.cat(list(parts))
    ordered = torch.empty_like(rows)
    ordered[owner] = rows
    return ordered
