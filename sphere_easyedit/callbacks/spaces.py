"""Share of each batch's weight change in the principal space of the weight before it: ``spaces.csv``."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from ..core.projection import PrincipalSpace
from ..core.tensors import widened
from ..editing.callbacks import EditCallback, EditEvent
from ..editing.session import EditSession
from ..runs.schema import SpaceRecord
from ..utils.csv_files import read_csv
from ..utils.files import atomic_write

logger = logging.getLogger(__name__)

_BLOCK_ELEMENTS: Final = 8 * 2**20  # converted to float64 at once


@dataclass(frozen=True)
class SpaceShare:
    """Fraction of a squared norm inside a space; nan if the norm is 0.

    Attributes:
        share: 0 to 1.
        chance: expected share of random directions, the space's rank over d_in.
    """

    share: float
    chance: float


def principal_share(rows: Tensor, space: PrincipalSpace) -> SpaceShare:
    """``||M U||_F^2 / ||M||_F^2`` of the rows of M, against ``r / d_in``.

    Args:
        rows: M ``(n, d_in)``: an update dW, or the transpose of keys ``(d_in, n)``; any floating dtype.
        space: of d_in inputs.

    Raises:
        ValueError: M is not a finite floating ``(n, d_in)`` tensor.
    """
    check_rows(rows, "rows", space.d_in)
    return share_in(rows, space.directions)


def share_in(rows: Tensor, basis: Tensor) -> SpaceShare:
    """As ``principal_share``, in the span of orthonormal columns ``(d_in, r)``."""
    basis = basis.double()
    inside = total = 0.0
    for _, part in double_blocks(rows):
        inside += float((part @ basis).square().sum())
        total += float(part.square().sum())
    return SpaceShare(inside / total if total else math.nan, basis.shape[1] / basis.shape[0])


def double_blocks(matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of a matrix's rows, in float64."""
    rows = max(1, _BLOCK_ELEMENTS // matrix.shape[1])
    for start in range(0, matrix.shape[0], rows):
        block = slice(start, start + rows)
        yield block, matrix[block].detach().double()


def check_rows(matrix: Tensor, name: str, width: int) -> None:
    """Raise a ValueError unless a tensor is floating, finite and ``(n, width)``."""
    if matrix.dim() != 2 or matrix.shape[1] != width or not matrix.numel() or not matrix.is_floating_point():
        raise ValueError(f"{name} must be a floating (n, {width}) tensor, got {matrix.dtype} of shape "
                         f"{tuple(matrix.shape)}: transpose keys (d_in, n), and take the space of the same weight")
    if not all(bool(part.isfinite().all()) for _, part in double_blocks(matrix)):
        raise ValueError(f"{name} holds nan or infinity: the model or the file is damaged")


_COLUMNS = tuple(field.name for field in fields(SpaceRecord))


class SpaceTracker(EditCallback):
    """Records ``||dW U||_F^2 / ||dW||_F^2`` of every batch's applied change dW.

    U spans the principal space of the weight before the batch, or of the unedited weight. Costs per layer: a copy of
    the weight during the batch, the leading eigenvectors of a ``(d_out, d_out)`` Gram matrix, and two products of the
    weight's size by the rank. A layer whose weight or change is not finite is skipped with a warning.

    Args:
        path: CSV file (since, num_edits, layer, share, rank, d_in), rewritten after every batch. A resumed run
            continues the file's records.
        gamma: share of the spectrum in the principal space (Eq. 11).
        pretrained: use the principal space of the unedited weights, which the model's session stores.

    Attributes:
        records: by batch and layer.
    """

    def __init__(self, path: Path, gamma: float, pretrained: bool = False) -> None:
        self.path, self.gamma, self.pretrained = path, gamma, pretrained
        self.records: list[SpaceRecord] = []
        self._since = 0
        self._before: dict[int, Tensor] = {}
        self._spaces: dict[int, PrincipalSpace] = {}
        self._unedited: dict[int, PrincipalSpace] = {}

    def on_batch_start(self, event: EditEvent) -> None:
        """Compute the principal spaces and copy the weights."""
        if not self.records and event.num_edits > 0 and self.path.exists():
            self.records = read_spaces_csv(self.path)
        # Later records are of undone batches or another run; at 0 edits a new run starts.
        self.records = [record for record in self.records if record.num_edits <= event.num_edits]
        self._since = event.num_edits
        self._before = {layer: weight.clone() for layer, weight in event.weights.items()}
        self._spaces = {}
        for layer in event.weights:
            try:
                self._spaces[layer] = self._space(event, layer)
            except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
                logger.warning("layer %d has no principal space after %d edits: %s", layer, event.num_edits, error)

    def on_batch_end(self, event: EditEvent) -> None:
        """Record the batch."""
        for layer, space in self._spaces.items():
            before = self._before.pop(layer)
            try:
                share = principal_share(widened(event.weights[layer]) - widened(before), space).share
            except ValueError as error:
                logger.warning("layer %d: no share of the change from %d to %d edits in the principal space: %s", layer,
                               self._since, event.num_edits, error)
                continue
            # Further digits depend on whether the Gram matrix was updated or computed from the weight.
            self.records.append(SpaceRecord(self._since, event.num_edits, layer, float(f"{share:.4g}"), space.rank,
                                            space.d_in))
        self._before, self._spaces = {}, {}
        write_spaces_csv(self.path, self.records)

    def _space(self, event: EditEvent, layer: int) -> PrincipalSpace:
        if self.pretrained:
            if layer not in self._unedited:
                weight = EditSession.of(event.model).original[layer].to(event.weights[layer].device)
                self._unedited[layer] = _formed(PrincipalSpace.from_weight(weight, self.gamma))
            return self._unedited[layer]
        # From the copy: directions are computed on first use, after the batch has changed the weight.
        gram, weight = event.grams.get(layer), self._before[layer]
        if gram is None:
            return PrincipalSpace.from_weight(weight, self.gamma)
        # A hint from the records, which a resumed run has too: it may change the last digits.
        likely = next((record.rank for record in reversed(self.records) if record.layer == layer), None)
        return PrincipalSpace.from_gram(weight, gram, self.gamma, likely)


def _formed(space: PrincipalSpace) -> PrincipalSpace:
    space.directions  # noqa: B018 - computed now, so that the space no longer refers to the weight
    return space


def write_spaces_csv(path: Path, records: list[SpaceRecord]) -> None:
    """Write all records, replacing the file."""
    with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(_COLUMNS)
        writer.writerows(map(attrgetter(*_COLUMNS), records))  # ``astuple`` copies deeply: 0.1 s for 10,000 records


def read_spaces_csv(path: Path) -> list[SpaceRecord]:
    """Read what ``SpaceTracker`` wrote.

    Raises:
        ValueError: the file has other columns, or an invalid line.
    """
    return read_csv(path, _COLUMNS, _record)


def _record(row: Mapping[str, str]) -> SpaceRecord:
    record = SpaceRecord(int(row["since"]), int(row["num_edits"]), int(row["layer"]), float(row["share"]),
                         int(row["rank"]), int(row["d_in"]))
    if not 0 <= record.since < record.num_edits or not 0 <= record.rank <= record.d_in or record.d_in < 1:
        raise ValueError(f"{record} has impossible numbers")
    return record
