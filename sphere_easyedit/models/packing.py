"""Runs token rows of different lengths packed end to end as one row, without padding.

Linear maps, norms and activations treat tokens independently of their row; attention does not. Through transformers'
``AttentionInterface`` the model calls ``packed_attention``, in which each row attends causally to itself and to its
prefix: other packed rows, which several rows may share, or keys and values of an earlier run. Rows of equal length are
attended together, so only prefixes are padded.

Shape legend: R rows of w tokens in a group; P prefix tokens; H heads, of which G share each of the Hkv heads of keys;
T tokens in all.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.messages import kind_and_text
from .replay import BlockReplay, KeyValues, PackedInput, Rows, pad_rows
from .tolerances import relative_difference, tolerance

logger = logging.getLogger(__name__)

_NAME = "sphere_packed"  # of our function among transformers' attention implementations


@dataclass(frozen=True)
class _Group:
    """Rows of one length.

    Attributes:
        start: index of the first row's first token.
        width: w.
        prefix_lengths: ``(R,)``; prefixes are aligned at their ends.
        prefix_tokens: ``(R, P)``, indices of packed tokens; None if keys and values are given.
        prefix_states: by block, keys and values of the prefixes ``(R * Hkv, P, head width)``, if given.
        masks: additive attention masks by window, device and dtype; None if nothing is masked.
    """

    start: int
    width: int
    prefix_lengths: Tensor
    prefix_tokens: Tensor | None
    prefix_states: KeyValues
    masks: dict[tuple[int | None, torch.device, torch.dtype], Tensor | None] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        """Index one past the last row's last token."""
        return self.start + len(self.prefix_lengths) * self.width

    def mask(self, window: int | None, scores: Tensor) -> Tensor | None:
        """``(R, 1, 1, w, P + w)`` of zeros and minus infinity for scores of P + w columns."""
        key = window, scores.device, scores.dtype
        if key not in self.masks:
            position = torch.arange(scores.shape[-1]) - (scores.shape[-1] - self.width)  # of keys; rows begin at 0
            query = torch.arange(self.width)[:, None]
            visible = (position <= query) & (position >= -self.prefix_lengths[:, None, None])  # (R, w, P + w)
            if window is not None:
                visible &= query - position < window
            mask = torch.zeros(visible.shape, dtype=scores.dtype).masked_fill(~visible, -torch.inf)[:, None, None]
            self.masks[key] = None if bool(visible.all()) else mask.to(scores.device)
        return self.masks[key]

    def prefix(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """Prefix keys and values ``(R * Hkv, P, head width)``, from those of all tokens ``(Hkv, T, head width)``."""
        if self.prefix_tokens is None:
            return self.prefix_states.get(block)
        return _gather(key, self.prefix_tokens), _gather(value, self.prefix_tokens)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, block: int, window: int | None, softcap: float | None
               ) -> Tensor:
        """Attention of this group's rows ``(R * w, H, head width)`` from ``(heads, T, head width)``; queries scaled."""
        rows, width, shared = len(self.prefix_lengths), self.width, len(query) // len(key)

        def own(states: Tensor, heads: int) -> Tensor:
            cut = states[:, self.start: self.stop].reshape(len(key), heads, rows, width, -1)
            return cut.permute(2, 0, 1, 3, 4).reshape(rows * len(key), heads * width, -1)

        queries, keys, values = own(query, shared), own(key, 1), own(value, 1)
        prefix = self.prefix(block, key, value)
        scores = queries @ keys.transpose(1, 2)  # (R * Hkv, G * w, w)
        if prefix is not None:
            scores = torch.cat([queries @ prefix[0].transpose(1, 2), scores], dim=-1)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        mask = self.mask(window, scores)
        if mask is not None:
            wide = scores.view(rows, len(key), shared, width, -1)
            scores = (wide + mask).view(scores.shape)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        out = weights[..., -width:] @ values
        if prefix is not None:
            out = out + weights[..., :-width] @ prefix[1]
        out = out.view(rows, len(key), shared, width, -1).permute(0, 3, 1, 2, 4)
        return out.reshape(rows * width, len(query), -1)

    def select(self, rows: Tensor, start: int) -> _Group:
        """A group of some rows, given by index; the prefixes' keys and values must be given."""
        picked = {block: (self._of_rows(keys, rows), self._of_rows(values, rows))
                  for block, (keys, values) in self.prefix_states.items()}
        return _Group(start, self.width, self.prefix_lengths[rows], None, picked)

    def _of_rows(self, states: Tensor, rows: Tensor) -> Tensor:
        return states.view(len(self.prefix_lengths), -1, *states.shape[1:])[rows.to(states.device)].flatten(0, 1)


def _gather(states: Tensor, index: Tensor) -> Tensor:
    """``(R * Hkv, P, head width)`` from ``(Hkv, tokens, head width)``."""
    return states[:, index.to(states.device)].transpose(0, 1).flatten(0, 1)


class PackedRows(PackedInput):
    """Positions of the rows in the packed row, and the prefix of each.

    Args:
        widths: tokens of each row, ascending.
        prefixes: for each row, indices of its prefix tokens, the nearest last: in the packed row, or in ``table``.
        table: by block, keys and values ``(Hkv, tokens, head width)`` of prefix tokens from an earlier run.
        recording: keep keys and values of every run.

    Attributes:
        recorded: by block, keys and values of all T tokens ``(Hkv, T, head width)``, if ``recording``.
    """

    def __init__(self, widths: Sequence[int], prefixes: Sequence[Sequence[int]] = (), table: KeyValues | None = None,
                 recording: bool = False) -> None:
        if list(widths) != sorted(widths):
            raise ValueError("rows are packed in ascending order of their lengths")
        self.recording, self.recorded = recording, KeyValues()
        self.groups: list[_Group] = []
        row, token = 0, 0
        for width, members in groupby(widths):
            count = len(list(members))
            of_group = prefixes[row: row + count] if prefixes else [()] * count
            self.groups.append(_group(token, width, of_group, table))
            row, token = row + count, token + count * width

    @property
    def starts(self) -> Tensor:
        """Index of each row's first token ``(rows,)``."""
        return torch.cat([torch.arange(group.start, group.stop, group.width) for group in self.groups])

    def select(self, rows: Tensor) -> tuple[PackedRows, Tensor]:
        """The layout of some rows, given by ascending index, and the indices of their tokens."""
        chosen, tokens, first, start = PackedRows(()), [], 0, 0
        for group in self.groups:
            count = len(group.prefix_lengths)
            inside = rows[(rows >= first) & (rows < first + count)] - first
            first += count
            if len(inside):
                chosen.groups.append(group.select(inside, start))
                tokens.append((group.start + inside[:, None] * group.width + torch.arange(group.width)).flatten())
                start = chosen.groups[-1].stop
        return chosen, torch.cat(tokens)


def _group(start: int, width: int, prefixes: Sequence[Sequence[int]], table: KeyValues | None) -> _Group:
    lengths = torch.tensor([len(tokens) for tokens in prefixes])
    longest = int(lengths.max())
    if not longest:
        return _Group(start, width, lengths, None, {})
    index = torch.tensor([[0] * (longest - len(tokens)) + list(tokens) for tokens in prefixes])  # (R, P)
    if table is None:
        return _Group(start, width, lengths, index, {})
    return _Group(start, width, lengths, None, {block: (_gather(keys, index), _gather(values, index))
                                               for block, (keys, values) in table.items()})


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _attention_mask: Tensor | None, *,
                     packed_rows: PackedRows, scaling: float | None = None, sliding_window: int | None = None,
                     softcap: float | None = None, s_aux: Tensor | None = None, **_others: Any) -> tuple[Tensor, None]:
    """Attention over packed rows, ``(1, T, H, head width)``, with the signature of transformers' attention functions.

    Args:
        module: the block's attention, whose ``layer_idx`` is its number.
        query, key, value: ``(1, heads, T, head width)``.

    Raises:
        NotImplementedError: the model uses attention sinks.
    """
    if s_aux is not None:
        raise NotImplementedError("attention sinks")
    block = int(module.layer_idx)  # type: ignore[arg-type]
    if packed_rows.recording:
        packed_rows.recorded[block] = key[0], value[0]
    scaled = query[0] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    outputs = [group.attend(scaled, key[0], value[0], block, sliding_window, softcap) for group in packed_rows.groups]
    return torch.cat(outputs).unsqueeze(0), None


@contextmanager
def attending_packed(model: nn.Module) -> Iterator[None]:
    """Make the model use ``packed_attention`` inside the context.

    The model's modules get copies of their configs meanwhile, since other models, in other threads, may share them.

    Raises:
        ImportError: this release of transformers has no exchangeable attention functions.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # from 4.48 on

    ALL_ATTENTION_FUNCTIONS.register(_NAME, packed_attention)
    before: list[tuple[Any, Any]] = [(module, vars(module)["config"]) for module in model.modules()
                                     if hasattr(vars(module).get("config"), "_attn_implementation")]
    copied: dict[int, Any] = {}  # shared, so that a config inside another one stays inside its copy
    try:
        for module, config in before:
            module.config = copy.deepcopy(config, copied)
            module.config._attn_implementation = _NAME
        yield
    finally:
        for module, config in before:
            module.config = config


def packs_exactly(model: nn.Module, expected: Tensor, run: Callable[[], Tensor]) -> bool:
    """Whether the model accepts packed rows, and returns for them what it returns for separate rows.

    Args:
        expected: states of separate rows.
        run: computes the same states from packed rows.
    """
    try:
        with attending_packed(model):
            found = run()
    except (ImportError, TypeError, KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        logger.info("%s does not accept packed rows (%s): rows are padded", type(model).__name__, kind_and_text(error))
        return False
    return same_states(model, "packed rows", found, expected)


def same_states(model: nn.Module, shortcut: str, found: Tensor, expected: Tensor) -> bool:
    """Whether a shortcut gives the expected states up to rounding; logs a warning if not."""
    difference = relative_difference(found, expected)
    if not difference < tolerance(expected):
        logger.warning("%s gives other states with %s (relative difference %.1e): it runs without",
                       type(model).__name__, shortcut, difference)
        return False
    return True


def packed_tokens(rows: Sequence[Sequence[int]], positions: Sequence[int], device: torch.device) -> Rows:
    """Rows end to end as a single one, given the position of each row's first token."""
    position_ids = [position + i for row, position in zip(rows, positions, strict=True) for i in range(len(row))]
    packed = pad_rows([[token for row in rows for token in row]], device)
    return replace(packed, position_ids=torch.tensor([position_ids], device=device))


@dataclass(frozen=True)
class PackedWithPrefixes:
    """Packed rows whose shared prefixes run once, as separate rows.

    Attributes:
        tokens: all rows end to end.
        layout: the positions of the rows and of their prefixes.
        prefixes: for each row, the indices of its prefix's tokens.
        starts: for each row, the index of the first token after its prefix.
    """

    tokens: Rows
    layout: PackedRows
    prefixes: list[range]
    starts: list[int]


def pack_with_prefixes(rows: Sequence[Sequence[int]], prefixes: Sequence[tuple[int, ...]], device: torch.device,
                       recording: bool = False) -> PackedWithPrefixes:
    """Pack rows of token ids, given the shared prefix of each; () for none."""
    distinct = [prefix for prefix in dict.fromkeys(prefixes) if prefix]
    pieces = [*distinct, *(row[len(prefix):] for row, prefix in zip(rows, prefixes, strict=True))]
    order = sorted(range(len(pieces)), key=lambda piece: len(pieces[piece]))
    widths = [len(pieces[piece]) for piece in order]
    starts = dict(zip(order, accumulate(widths, initial=0), strict=False))
    indices = {prefix: range(starts[piece], starts[piece] + len(prefix)) for piece, prefix in enumerate(distinct)}
    of_rows = [indices.get(prefix, range(0)) for prefix in prefixes]
    of_pieces = [range(0)] * len(distinct) + of_rows
    tokens = packed_tokens([pieces[piece] for piece in order], [len(of_pieces[piece]) for piece in order], device)
    layout = PackedRows(widths, [of_pieces[piece] for piece in order], recording=recording)
    return PackedWithPrefixes(tokens, layout, of_rows, [starts[len(distinct) + row] for row in range(len(rows))])


def select_packed(replay: BlockReplay, layout: PackedRows, tokens: Tensor) -> BlockReplay:
    """The replay of some of the packed tokens, given by index and described by ``layout``."""
    size = replay.hidden.shape[1]

    def cut(value: Any) -> Any:
        if isinstance(value, PackedRows):
            return layout
        dimension = 1 if value.dim() > 1 else 0  # of vectors: positions in a cache
        has_tokens = value.dim() > 0 and value.shape[dimension] == size
        return value.index_select(dimension, tokens.to(value.device)) if has_tokens else value

    return replay.mapped(cut)
