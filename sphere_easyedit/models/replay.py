"""Runs a range of decoder blocks repeatedly on the same tokens.

transformers' models prepare masks and positions once and pass them to every block. Here one run of the model is
recorded (the arguments of each block besides its hidden states), and the blocks are then called directly. Earlier
blocks, earlier tokens and the head are not run again. The only requirement on an architecture is that a block takes
hidden states first and returns them first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from .architecture import EditableModel
from .tolerances import relative_difference, tolerance

KeyValues = dict[int, tuple[Tensor, Tensor]]

_MIN_SHARED = 3  # tokens: running a shorter shared prefix separately costs more than it saves


class _Stop(Exception):
    """Stops a forward pass after the last block needed."""


class PackedInput:
    """Base of our own arguments of blocks that depend on the rows that are run."""


class PrefixCache(DynamicCache, PackedInput):
    """Keys and values of prefix tokens, which calls read and never extend.

    ``key_values[block]`` is a pair ``(rows, heads, prefix tokens, head width)``.
    """

    def __init__(self, key_values: KeyValues) -> None:
        super().__init__()
        self.key_values = key_values

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
               ) -> tuple[Tensor, Tensor]:
        keys, values = self.key_values[layer_idx]
        return torch.cat([keys, key_states], dim=-2), torch.cat([values, value_states], dim=-2)


@dataclass(frozen=True)
class Rows:
    """Token rows for one forward pass.

    Attributes:
        input_ids: ``(rows, tokens)``, padded on the right.
        attention_mask: ``(rows, prefix + tokens)``; a prefix, if any, is padded on the left.
        position_ids: ``(rows, tokens)``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor


def pad_rows(sequences: Sequence[Sequence[int]], device: torch.device, starts: Sequence[int] | None = None,
             prefix_width: int = 0) -> Rows:
    """Pad token sequences on the right; row ``i`` starts at position ``starts[i]`` after a prefix of that length."""
    width = max(len(sequence) for sequence in sequences)
    starts = [0] * len(sequences) if starts is None else starts
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), prefix_width + width, dtype=torch.long)
    for row, (sequence, start) in enumerate(zip(sequences, starts, strict=True)):
        input_ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, prefix_width - start: prefix_width + len(sequence)] = 1
    # Padding repeats the last position, so that none is past the model's table of positions.
    last = torch.tensor([[len(sequence) - 1] for sequence in sequences])
    positions = torch.tensor(starts).unsqueeze(1) + torch.minimum(torch.arange(width), last)
    return Rows(input_ids.to(device), mask.to(device), positions.to(device))


def first_output(output: Any) -> Tensor:
    """A block's hidden states, whether it returns them alone or first in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A module's hidden states: its first argument, positional or named; None without arguments."""
    return args[0] if args else next(iter(kwargs.values()), None)


def as_rows(states: Tensor, rows: int, tokens: int, what: str) -> Tensor:
    """View a module's input or output as ``(rows, tokens, width)``.

    Some feed-forward networks flatten rows and tokens before they compute (OPT's, shared experts of several
    mixture-of-experts models).

    Args:
        states: ``(rows, tokens, width)``, ``(rows * tokens, width)`` or ``(1, rows * tokens, width)``, row after row.
        rows, tokens: of the batch that the model was called with.
        what: the module's name, for the error.

    Raises:
        ValueError: the tensor does not have one vector per token of the batch.
    """
    if tuple(states.shape[:-1]) in ((rows, tokens), (rows * tokens,), (1, rows * tokens)):
        return states.reshape(rows, tokens, states.shape[-1])
    raise ValueError(f"{what} saw states of shape {tuple(states.shape)} in a batch of {rows} rows of {tokens} tokens, "
                     "not one vector per token (as routed experts do): edit a layer whose feed-forward network is "
                     "dense, or its shared expert")


class BlockReplay:
    """Blocks ``start .. stop - 1`` of a decoder with the arguments of one recorded run.

    Attributes:
        start, stop: the blocks; none if both are equal.
        hidden: ``(rows, tokens, hidden_size)``, the input of block ``start``.
        final: ``(rows, tokens, hidden_size)``, the output of block ``stop - 1``.
    """

    def __init__(self, blocks: list[nn.Module], start: int, calls: list[tuple[tuple[Any, ...], dict[str, Any]]],
                 hidden: Tensor, final: Tensor) -> None:
        self._blocks, self._calls = blocks, calls
        self.start, self.stop = start, start + len(blocks)
        self.hidden, self.final = hidden, final

    @classmethod
    @torch.no_grad()
    def record(cls, editable: EditableModel, rows: Rows, start: int, stop: int,
               prefix: KeyValues | None = None, **arguments: Any) -> BlockReplay:
        """Run the model on ``rows`` up to block ``stop - 1`` and record the calls of blocks from ``start`` on.

        Args:
            prefix: keys and values that every row attends to.
            arguments: further arguments of the model.
        """
        blocks = [editable.block(layer) for layer in range(start, stop)]
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hidden: list[Tensor] = []
        final: list[Tensor] = []
        frozen_cache = None if prefix is None else PrefixCache(prefix)

        def note_call(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            states = args[0] if args else kwargs.pop("hidden_states")
            hidden.append(states)
            del hidden[1:]  # only the first block's is needed
            replace = [frozen_cache if isinstance(value, Cache) else value for value in args[1:]]
            named = {name: frozen_cache if isinstance(value, Cache) else value for name, value in kwargs.items()}
            calls.append((tuple(replace), named))

        def stop_here(_module: nn.Module, _args: Any, output: Any) -> None:
            final.append(first_output(output))
            raise _Stop

        handles = [block.register_forward_pre_hook(note_call, prepend=True, with_kwargs=True) for block in blocks]
        handles.append(editable.block(stop - 1).register_forward_hook(stop_here))
        try:
            _run_until_stop(editable, rows, prefix, **arguments)
        finally:
            for handle in handles:
                handle.remove()
        return cls(blocks, start, calls, (hidden or final)[0], final[0])

    def run(self, hidden: Tensor, start: int | None = None, stop: int | None = None) -> Tensor:
        """Output of block ``stop - 1`` for ``hidden`` entering block ``start``; gradients flow where enabled."""
        first = 0 if start is None else start - self.start
        last = len(self._blocks) if stop is None else stop - self.start
        for block, (args, kwargs) in zip(self._blocks[first:last], self._calls[first:last], strict=True):
            hidden = first_output(block(hidden, *args, **kwargs))
        return hidden

    def select(self, rows: Tensor) -> BlockReplay:
        """The replay of some of the rows, given by index."""
        size = self.hidden.shape[0]

        def cut(value: Any) -> Any:
            if isinstance(value, PrefixCache):
                return PrefixCache({layer: (keys[rows.to(keys.device)], values[rows.to(values.device)])
                                    for layer, (keys, values) in value.key_values.items()})
            # Vectors (cache positions), and matrices of floats (rotary tables), may be per token; tensors that all
            # rows share have a first dimension of 1.
            min_dim = 3 if value.is_floating_point() else 2
            return value[rows.to(value.device)] if value.dim() >= min_dim and value.shape[0] == size else value

        return self.mapped(cut)

    def mapped(self, change: Callable[[Any], Any]) -> BlockReplay:
        """The replay with every tensor and ``PackedInput`` among the blocks' arguments changed by a function."""
        done: dict[int, Any] = {}  # blocks share masks and caches: change each once

        def mapped(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(mapped(item) for item in value)
            if not isinstance(value, Tensor | PackedInput):
                return value
            if id(value) not in done:
                done[id(value)] = change(value)
            return done[id(value)]

        calls = [(mapped(args), {name: mapped(value) for name, value in kwargs.items()})
                 for args, kwargs in self._calls]
        return BlockReplay(self._blocks, self.start, calls, mapped(self.hidden), mapped(self.final))


@torch.no_grad()
def check_replay(editable: EditableModel, ids: Sequence[int]) -> None:
    """Refuse a model whose blocks, run one after another, do not reproduce a plain forward pass.

    Target values rely on it: they change the output of one block and run those above it. A model may scale or mix
    states between its blocks, pass on more than hidden states, run a block several times, or count positions from
    another number than 0.

    Args:
        editable: the model, frozen.
        ids: tokens of any text, three or more.

    Raises:
        ValueError: the last block's output differs, with the first edited block's output as it is or changed.
    """
    first, last = editable.layers[0], editable.num_blocks - 1
    name, model = editable.names.layer_module_tmp.format(first), type(editable.model).__name__
    rows = pad_rows([ids], editable.input_device)
    replay = BlockReplay.record(editable, rows, first, last + 1)
    at = len(ids) // 2
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, replay.hidden.shape[-1:], generator=generator) * 2 - 1).to(replay.hidden)
    step = torch.zeros_like(replay.hidden)
    step[:, at] = replay.hidden[:, at].float().square().mean().sqrt().to(signs) * signs
    output, expected = _with_step(editable, rows, step)
    if not bool(torch.isfinite(expected).all()):
        return  # a broken model shows in its losses later
    changed = replay.run(replay.hidden, stop=first + 1)
    difference = relative_difference(changed, output)
    if not difference < tolerance(changed):
        raise ValueError(f"the output of {name} of {model} differs by {difference:.1%} between position_ids that count "
                         "from 0 and none: positions of this architecture are not supported")
    difference = relative_difference(replay.run(changed + step.to(changed.device), start=first + 1), expected)
    if not difference < tolerance(changed):
        raise ValueError(f"blocks above {name} of {model}, run one after another, differ from its forward pass by "
                         f"{difference:.1%}: it does more between its blocks than pass hidden states on, which is not "
                         "supported")


def _with_step(editable: EditableModel, rows: Rows, step: Tensor) -> tuple[Tensor, Tensor]:
    """The first edited block's output in a plain forward pass, and the last block's with ``step`` added to that."""
    layers = range(editable.layers[0], editable.num_blocks)
    outputs: list[tuple[int, Tensor]] = []

    def note(layer: int) -> Callable[[nn.Module, Any, Any], Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            states = first_output(output)
            outputs.append((layer, states))
            if layer != layers[0]:
                return None
            moved = states + step.to(states.device)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return hook

    handles = [editable.block(layer).register_forward_hook(note(layer)) for layer in layers]
    try:
        editable.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    order = [layer for layer, _ in outputs]
    if order != [*layers]:
        raise ValueError(f"{editable.names.layer_module_tmp} run in the order {order} in a forward pass of "
                         f"{type(editable.model).__name__}, not once each from {layers[0]} on: correct "
                         "layer_module_tmp; if it is right, this architecture is not supported")
    if len(layers) == 1:
        return outputs[0][1], outputs[0][1] + step.to(outputs[0][1].device)
    return outputs[0][1], outputs[-1][1]


def _run_until_stop(editable: EditableModel, rows: Rows, prefix: KeyValues | None, **arguments: Any) -> None:
    cache = None if prefix is None else _filled_cache(prefix)
    try:
        editable.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, position_ids=rows.position_ids,
                       past_key_values=cache, use_cache=cache is not None, **arguments)
    except _Stop:
        return
    raise RuntimeError("the model's forward pass did not reach its decoder blocks: check layer_module_tmp "
                       f"{editable.names.layer_module_tmp!r}")


@torch.no_grad()
def prefix_key_values(editable: EditableModel, prefixes: Sequence[Sequence[int]], stop: int,
                      groups: Sequence[int] | None = None) -> KeyValues:
    """Keys and values of token prefixes in blocks ``0 .. stop - 1``, aligned at the prefixes' ends.

    The prefixes run padded on the right, where every row begins with a real token, and are shifted afterwards: rows
    padded on the left would start with positions that attend to nothing, for which some attention kernels give NaN.

    Args:
        editable: the model.
        prefixes: token ids of each row.
        stop: the block in front of which to stop.
        groups: a number per row; the common prefix of rows with the same number (of one context template, for
            example) runs only once.

    Returns:
        Per block a pair of ``(rows, heads, longest prefix, head width)``; shorter prefixes are padded with zeros.
    """
    stems = [()] * len(prefixes) if groups is None else shared_prefixes(prefixes, groups)
    distinct = sorted(set(stems))
    stem_states: KeyValues | None = None
    if any(distinct):
        owner = torch.tensor([distinct.index(stem) for stem in stems])
        stem_states = {layer: (keys[owner.to(keys.device)], values[owner.to(values.device)]) for layer, (keys, values)
                       in prefix_key_values(editable, distinct, stop).items()}
    stem_lengths = torch.tensor([len(stem) for stem in stems])
    stem_width = int(stem_lengths.max())
    rest = [list(prefix[len(stem):]) for prefix, stem in zip(prefixes, stems, strict=True)]
    # A row with nothing left still needs a token to run on; its states are not gathered below.
    rows = pad_rows([ids or [0] for ids in rest], editable.input_device, stem_lengths.tolist(), stem_width)
    cache = _filled_cache(stem_states)

    def stop_here(_module: nn.Module, _args: Any, _output: Any) -> None:
        raise _Stop

    handle = editable.block(stop - 1).register_forward_hook(stop_here)
    try:
        editable.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, position_ids=rows.position_ids,
                       past_key_values=cache, use_cache=True)
    except _Stop:
        pass
    finally:
        handle.remove()
    width = max(len(prefix) for prefix in prefixes)
    ends = stem_width + torch.tensor([len(ids) for ids in rest]).unsqueeze(1)  # (rows, 1): column after each prefix
    source = torch.arange(width) - width + ends  # (rows, width): where each aligned token was
    empty = source < (stem_width - stem_lengths).unsqueeze(1)

    def align(states: Tensor) -> Tensor:
        index, outside = (part.to(states.device)[:, None, :, None] for part in (source, empty))
        moved = torch.take_along_dim(states, index.clamp(min=0), dim=2)
        return moved.masked_fill(outside, 0.0)

    return {layer: (align(keys), align(values)) for layer, (keys, values) in enumerate(_cache_states(cache))}


def shared_prefixes(sequences: Sequence[Sequence[int]], groups: Sequence[int]) -> list[tuple[int, ...]]:
    """For each sequence the prefix that all of its group share; () if running it separately would not pay."""
    shared: dict[int, tuple[int, ...]] = {}
    for sequence, group in zip(sequences, groups, strict=True):
        prefix = shared.setdefault(group, tuple(sequence))
        shared[group] = tuple(token for token, _ in takewhile(lambda pair: pair[0] == pair[1],
                                                              zip(prefix, sequence, strict=False)))
    pays = {group for group, count in Counter(groups).items() if count > 1 and len(shared[group]) >= _MIN_SHARED}
    return [shared[group] if group in pays else () for group in groups]


def _filled_cache(states: KeyValues | None) -> DynamicCache:
    cache = DynamicCache()
    for layer in sorted(states or {}):
        cache.update(*states[layer], layer)  # type: ignore[index]
    return cache


def _cache_states(cache: Any) -> list[tuple[Tensor, Tensor]]:
    """Pairs of keys and values by block, from the caches of transformers 4.45 up to 5.x."""
    if hasattr(cache, "layers"):
        return [(layer.keys, layer.values) for layer in cache.layers]
    return list(zip(cache.key_cache, cache.value_cache, strict=True))
