"""Token rows of different lengths run end to end as one row, without padding.

Linear maps, norms and activations do not care which row a token is of. Attention does: transformers lets a model call
an attention function of ours (``AttentionInterface``), in which each row sees itself, causally, and the tokens that it
has in front: rows run beside it, which many may begin with, or keys and values of an earlier run. Rows of equal length
are attended together, so nothing is padded there either, but what they have in front.

Shape legend: R rows of w tokens in a group; P keys in front of them; H heads, of which G share each of the Hkv heads of
keys; T tokens in all.
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
from .replay import BlockReplay, KeyValues, Replaced, Rows, pad_rows
from .tolerances import relative_difference, tolerance

logger = logging.getLogger(__name__)

_NAME = "sphere_packed"  # of our function among transformers' attention implementations


@dataclass(frozen=True)
class _Group:
    """Rows of one length.

    Attributes:
        start: where the first one's tokens begin.
        width: w.
        counts: ``(R,)``, how many of the P tokens in front each row has; they are aligned at their ends.
        in_front: ``(R, P)``, which of the packed tokens these are; None where their keys and values are given.
        past: by block, keys and values in front ``(R * Hkv, P, head width)``.
        masks: what is added to scores, by window, device and dtype; None where nothing is hidden.
    """

    start: int
    width: int
    counts: Tensor
    in_front: Tensor | None
    past: KeyValues
    masks: dict[tuple[int | None, torch.device, torch.dtype], Tensor | None] = field(default_factory=dict)

    @property
    def stop(self) -> int:
        """Where the last one's tokens end."""
        return self.start + len(self.counts) * self.width

    def mask(self, window: int | None, scores: Tensor) -> Tensor | None:
        """``(R, 1, 1, w, P + w)`` of zeros and minus infinity for scores of P + w columns."""
        key = window, scores.device, scores.dtype
        if key not in self.masks:
            place = torch.arange(scores.shape[-1]) - (scores.shape[-1] - self.width)  # of keys; rows begin at 0
            query = torch.arange(self.width)[:, None]
            seen = (place <= query) & (place >= -self.counts[:, None, None])  # (R, w, P + w)
            if window is not None:
                seen &= query - place < window
            hidden = torch.zeros(seen.shape, dtype=scores.dtype).masked_fill(~seen, -torch.inf)[:, None, None]
            self.masks[key] = None if bool(seen.all()) else hidden.to(scores.device)
        return self.masks[key]

    def front(self, block: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values in front ``(R * Hkv, P, head width)``, given those of all tokens ``(Hkv, T, head width)``."""
        if self.in_front is None:
            return self.past.get(block)
        return _chosen(key, self.in_front), _chosen(value, self.in_front)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, block: int, window: int | None, softcap: float | None
               ) -> Tensor:
        """Attention of this group's rows ``(R * w, H, head width)`` from ``(heads, T, head width)``; queries scaled."""
        rows, width, shared = len(self.counts), self.width, len(query) // len(key)

        def own(states: Tensor, heads: int) -> Tensor:
            cut = states[:, self.start: self.stop].reshape(len(key), heads, rows, width, -1)
            return cut.permute(2, 0, 1, 3, 4).reshape(rows * len(key), heads * width, -1)

        queries, keys, values = own(query, shared), own(key, 1), own(value, 1)
        front = self.front(block, key, value)
        scores = queries @ keys.transpose(1, 2)  # (R * Hkv, G * w, w)
        if front is not None:
            scores = torch.cat([queries @ front[0].transpose(1, 2), scores], dim=-1)
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        mask = self.mask(window, scores)
        if mask is not None:
            wide = scores.view(rows, len(key), shared, width, -1)
            scores = (wide + mask).view(scores.shape)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        out = weights[..., -width:] @ values
        if front is not None:
            out = out + weights[..., :-width] @ front[1]
        out = out.view(rows, len(key), shared, width, -1).permute(0, 3, 1, 2, 4)
        return out.reshape(rows * width, len(query), -1)

    def select(self, rows: Tensor, start: int) -> _Group:
        """Some of its rows, given by index; of a group whose keys and values in front are given."""
        picked = {block: (self._of_rows(keys, rows), self._of_rows(values, rows))
                  for block, (keys, values) in self.past.items()}
        return _Group(start, self.width, self.counts[rows], None, picked)

    def _of_rows(self, states: Tensor, rows: Tensor) -> Tensor:
        return states.view(len(self.counts), -1, *states.shape[1:])[rows.to(states.device)].flatten(0, 1)


def _chosen(states: Tensor, index: Tensor) -> Tensor:
    """``(R * Hkv, P, head width)`` from ``(Hkv, tokens, head width)``."""
    return states[:, index.to(states.device)].transpose(0, 1).flatten(0, 1)


class PackedRows(Replaced):
    """Where rows lie in the packed one, and what each has in front.

    Args:
        widths: tokens of each row, ascending.
        in_front: for each row, which of the packed tokens it has in front, the nearest last; or with ``table``
        table: by block, keys and values ``(Hkv, tokens, head width)``, which tokens of the table.
        recording: keep keys and values of every run.

    Attributes:
        recorded: by block, keys and values of all T tokens ``(Hkv, T, head width)``, where ``recording``.
    """

    def __init__(self, widths: Sequence[int], in_front: Sequence[Sequence[int]] = (), table: KeyValues | None = None,
                 recording: bool = False) -> None:
        if list(widths) != sorted(widths):
            raise ValueError("rows are packed in ascending order of their lengths")
        self.recording, self.recorded = recording, KeyValues()
        self.groups: list[_Group] = []
        row, token = 0, 0
        for width, members in groupby(widths):
            count = len(list(members))
            ahead = in_front[row: row + count] if in_front else [()] * count
            self.groups.append(_group(token, width, ahead, table))
            row, token = row + count, token + count * width

    @property
    def starts(self) -> Tensor:
        """Where each row's tokens begin ``(rows,)``."""
        return torch.cat([torch.arange(group.start, group.stop, group.width) for group in self.groups])

    def select(self, rows: Tensor) -> tuple[PackedRows, Tensor]:
        """Some rows, given by ascending index, and the index of their tokens; keys and values in front are kept."""
        chosen, tokens, first, start = PackedRows(()), [], 0, 0
        for group in self.groups:
            count = len(group.counts)
            inside = rows[(rows >= first) & (rows < first + count)] - first
            first += count
            if len(inside):
                chosen.groups.append(group.select(inside, start))
                tokens.append((group.start + inside[:, None] * group.width + torch.arange(group.width)).flatten())
                start = chosen.groups[-1].stop
        return chosen, torch.cat(tokens)


def _group(start: int, width: int, in_front: Sequence[Sequence[int]], table: KeyValues | None) -> _Group:
    counts = torch.tensor([len(tokens) for tokens in in_front])
    longest = int(counts.max())
    if not longest:
        return _Group(start, width, counts, None, {})
    index = torch.tensor([[0] * (longest - len(tokens)) + list(tokens) for tokens in in_front])  # (R, P)
    if table is None:
        return _Group(start, width, counts, index, {})
    return _Group(start, width, counts, None, {block: (_chosen(keys, index), _chosen(values, index))
                                               for block, (keys, values) in table.items()})


def packed_attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _attention_mask: Tensor | None, *,
                     packed_rows: PackedRows, scaling: float | None = None, sliding_window: int | None = None,
                     softcap: float | None = None, s_aux: Tensor | None = None, **_others: Any) -> tuple[Tensor, None]:
    """Attention as transformers asks for it, over packed rows: ``(1, T, H, head width)``.

    Args:
        module: tells the block's number.
        query, key, value: ``(1, heads, T, head width)``.

    Raises:
        NotImplementedError: the model wants attention sinks.
    """
    if s_aux is not None:
        raise NotImplementedError("attention sinks")
    block = int(module.layer_idx)  # type: ignore[arg-type]
    if packed_rows.recording:
        packed_rows.recorded[block] = key[0], value[0]
    scaled = query[0] * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    found = [group.attend(scaled, key[0], value[0], block, sliding_window, softcap) for group in packed_rows.groups]
    return torch.cat(found).unsqueeze(0), None


@contextmanager
def attending_packed(model: nn.Module) -> Iterator[None]:
    """Let the model attend by ``packed_attention`` inside the context.

    The model's modules get copies of their configs for that time. The configs themselves stay as they are, since other
    models, which other threads may be running, can hold the same ones.

    Raises:
        ImportError: this release of transformers has no attention functions to choose from.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # from 4.48 on

    ALL_ATTENTION_FUNCTIONS.register(_NAME, packed_attention)
    before: list[tuple[Any, Any]] = [(module, vars(module)["config"]) for module in model.modules()
                                     if hasattr(vars(module).get("config"), "_attn_implementation")]
    copied: dict[int, Any] = {}  # of all of them, so that a config that lies in another one does so afterwards, too
    try:
        for module, config in before:
            module.config = copy.deepcopy(config, copied)
            module.config._attn_implementation = _NAME
        yield
    finally:
        for module, config in before:
            module.config = config


def packs_exactly(model: nn.Module, expected: Tensor, run: Callable[[], Tensor]) -> bool:
    """Whether the model takes packed rows, and gives what it gives for rows by themselves.

    Args:
        expected: of rows by themselves.
        run: gives the same of packed rows.
    """
    try:
        with attending_packed(model):
            found = run()
    except (ImportError, TypeError, KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        logger.info("%s does not take packed rows (%s): rows are padded", type(model).__name__, kind_and_text(error))
        return False
    return same_states(model, "packed rows", found, expected)


def same_states(model: nn.Module, means: str, found: Tensor, expected: Tensor) -> bool:
    """Whether a shortcut gives the expected states up to rounding; logs a warning if not."""
    difference = relative_difference(found, expected)
    if not difference < tolerance(expected):
        logger.warning("%s gives other states with %s (relative difference %.1e): it runs without", type(model).__name__,
                       means, difference)
        return False
    return True


def packed_tokens(rows: Sequence[Sequence[int]], positions: Sequence[int], device: torch.device) -> Rows:
    """Rows end to end as a single one; ``positions`` are those of their first tokens."""
    places = [position + i for row, position in zip(rows, positions, strict=True) for i in range(len(row))]
    packed = pad_rows([[token for row in rows for token in row]], device)
    return replace(packed, position_ids=torch.tensor([places], device=device))


@dataclass(frozen=True)
class PackedBehind:
    """Rows behind beginnings that several of them share, which are run once, as rows by themselves.

    Attributes:
        tokens: all of them end to end.
        layout: where they lie.
        fronts: for each row, which of the packed tokens its beginning is.
        starts: for each row, where what follows its beginning begins.
    """

    tokens: Rows
    layout: PackedRows
    fronts: list[range]
    starts: list[int]


def pack_behind(rows: Sequence[Sequence[int]], fronts: Sequence[tuple[int, ...]], device: torch.device,
                recording: bool = False) -> PackedBehind:
    """Pack rows of token ids, each with the beginning that is run once; () where there is none."""
    stems = [stem for stem in dict.fromkeys(fronts) if stem]
    pieces = [*stems, *(row[len(front):] for row, front in zip(rows, fronts, strict=True))]
    order = sorted(range(len(pieces)), key=lambda piece: len(pieces[piece]))
    widths = [len(pieces[piece]) for piece in order]
    starts = dict(zip(order, accumulate(widths, initial=0), strict=False))
    places = {stem: range(starts[piece], starts[piece] + len(stem)) for piece, stem in enumerate(stems)}
    of_rows = [places.get(front, range(0)) for front in fronts]
    of_pieces = [range(0)] * len(stems) + of_rows
    tokens = packed_tokens([pieces[piece] for piece in order], [len(of_pieces[piece]) for piece in order], device)
    layout = PackedRows(widths, [of_pieces[piece] for piece in order], recording=recording)
    return PackedBehind(tokens, layout, of_rows, [starts[len(stems) + row] for row in range(len(rows))])


def select_packed(replay: BlockReplay, layout: PackedRows, tokens: Tensor) -> BlockReplay:
    """The same for some of the packed tokens, given by index, which ``layout`` describes."""
    size = replay.hidden.shape[1]

    def cut(value: Any) -> Any:
        if isinstance(value, PackedRows):
            return layout
        dimension = 1 if value.dim() > 1 else 0  # of vectors: positions in a cache
        has_tokens = value.dim() > 0 and value.shape[dimension] == size
        return value.index_select(dimension, tokens.to(value.device)) if has_tokens else value

    return replay.mapped(cut)
