"""What the optimiser of target values runs together: how many rows, how long, behind how much (see ``steering``)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..editing.replay import common_beginnings
from ..editing.requests import TokenizedRequest
from ..editing.steering import Layout, Row, rows_of
from ..editing.target_values import packed_micro_batches, padded_micro_batches
from .shapes import ModelShape


@dataclass(frozen=True)
class Run:
    """``rows`` rows of ``width`` tokens, each with ``front`` others in front that are not run."""

    rows: int
    width: int
    front: int = 0

    @property
    def tokens(self) -> int:
        """That are run."""
        return self.rows * self.width

    @property
    def attended(self) -> int:
        """Pairs of a token and one that it attends to; kernels compute masked and padded places too."""
        return self.tokens * (self.front + self.width)


@dataclass(frozen=True)
class MicroBatch:
    """Edits that are optimised together.

    Attributes:
        edits, positions: how many, and where targets are predicted.
        packed: rows lie end to end.
        recorded: runs through all blocks, once.
        to_loss: runs of a step, from the last edited block to that of the loss.
        to_end: the same, to the last block.
    """

    edits: int
    positions: int
    packed: bool
    recorded: tuple[Run, ...]
    to_loss: tuple[Run, ...]
    to_end: tuple[Run, ...]

    @property
    def stepped(self) -> tuple[Run, ...]:
        """All runs of a step."""
        return self.to_loss + self.to_end


def total_tokens(runs: Iterable[Run]) -> int:
    """Tokens that are run."""
    return sum(run.tokens for run in runs)


def expected_layout(shape: ModelShape) -> Layout:
    """How the optimiser should lay out edits, by the model's class alone."""
    return "packed" if shape.packs else "padded"


def micro_batches(requests: Sequence[TokenizedRequest], token_budget: int, layout: Layout) -> list[MicroBatch]:
    """How the optimiser of target values would group one batch of edits."""
    divide = packed_micro_batches if layout == "packed" else padded_micro_batches
    found = []
    for indices in divide(requests, token_budget):
        rows = [row for edit, i in enumerate(indices) for row in rows_of(edit, requests[i])]
        positions = sum(len(row.targets) for row in rows)
        runs = _packed(rows) if layout == "packed" else _padded(rows, layout == "padded")
        found.append(MicroBatch(len(indices), positions, layout == "packed", *runs))
    return found


_Runs = tuple[tuple[Run, ...], tuple[Run, ...], tuple[Run, ...]]  # recorded, to_loss, to_end


def _packed(rows: Sequence[Row]) -> _Runs:
    """Rows of one width are attended together, with as much in front as the longest has."""
    fronts = common_beginnings([row.ids[: row.lookup] for row in rows], [row.context for row in rows])
    stems = set(fronts) - {()}
    pieces = [(len(stem), 0) for stem in stems]
    pieces += [(len(row.ids) - len(front), len(front)) for row, front in zip(rows, fronts, strict=True)]
    return _grouped(pieces), (), _grouped([(len(row.ids) - row.lookup, row.lookup) for row in rows])


def _grouped(pieces: Iterable[tuple[int, int]]) -> tuple[Run, ...]:
    """Of (tokens, tokens in front)."""
    fronts: dict[int, list[int]] = {}
    for width, front in pieces:
        fronts.setdefault(width, []).append(front)
    return tuple(Run(len(ahead), width, max(ahead)) for width, ahead in sorted(fronts.items()))


def _padded(rows: Sequence[Row], prefix_cache: bool) -> _Runs:
    """Prompts that rewrite go to the loss's block, drift prompts to the last, each kind padded to one length."""
    recorded: list[Run] = []
    steps = []
    for kind in ([row for row in rows if row.targets], [row for row in rows if not row.targets]):
        cuts = [row.lookup if prefix_cache else 0 for row in kind]
        if any(cuts):
            prefixes = [row.ids[:cut] for row, cut in zip(kind, cuts, strict=True)]
            stems = common_beginnings(prefixes, [row.context for row in kind])
            shared = max(len(stem) for stem in stems)
            if shared:
                recorded.append(Run(len(set(stems)), shared))
            rest = max(len(prefix) - len(stem) for prefix, stem in zip(prefixes, stems, strict=True))
            recorded.append(Run(len(kind), max(1, rest), shared))
        steps.append(Run(len(kind), max(len(row.ids) - cut for row, cut in zip(kind, cuts, strict=True)), max(cuts)))
    return (*recorded, *steps), (steps[0],), (steps[1],)
