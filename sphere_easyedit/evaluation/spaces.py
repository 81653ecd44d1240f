"""How much of each batch's change lies in the principal space of the weight that it is made to: ``spaces.csv``."""

from __future__ import annotations

import csv
import logging
from collections.abc import Mapping
from dataclasses import astuple, fields
from pathlib import Path

import torch
from torch import Tensor

from ..callbacks import EditCallback, EditEvent
from ..editing.session import EditSession
from ..files import replacing
from ..projection import PrincipalSpace
from ..runs.schema import SpaceRecord
from .spectra import principal_share

logger = logging.getLogger(__name__)


_COLUMNS = tuple(field.name for field in fields(SpaceRecord))


class SpaceTracker(EditCallback):
    """Records ``||dW U||_F^2 / ||dW||_F^2`` of every batch's change dW as applied (after suppression, that is).

    U spans the principal space of the weight as it stood before the batch, or of the unedited weight. A layer costs a
    copy of its weight for the length of a batch, the leading eigenvectors of a ``(d_out, d_out)`` Gram matrix, and two
    products of the weight's size by the rank. A layer whose weight or change is not finite is left out with a warning.

    Args:
        path: CSV file (since, num_edits, layer, share, rank, d_in), rewritten whole after every batch. A run that goes
            on from earlier edits continues the file's records.
        gamma: share that the principal space passes (Eq. 11).
        pretrained: of the unedited weights, which the model's session keeps, in place of those before the batch.

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
        """Takes the spaces and copies of the weights."""
        if not self.records and event.num_edits > 0 and self.path.exists():
            self.records = read_spaces_csv(self.path)
        # Later records are of batches that were undone, or of another run; without edits every run begins anew.
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
        """Records the batch."""
        for layer, space in self._spaces.items():
            before = self._before.pop(layer)
            precise = torch.promote_types(before.dtype, torch.float32)
            try:
                share = principal_share(event.weights[layer].to(precise) - before.to(precise), space).share
            except ValueError as error:
                logger.warning("layer %d: no share of the change from %d to %d edits in the principal space: %s", layer,
                               self._since, event.num_edits, error)
                continue
            # Further digits depend on how the Gram matrix came about, carried or made from the weight.
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
        # Of the copy, which stays as it is: directions are formed one layer after the other, once the batch has ended.
        gram, weight = event.grams.get(layer), self._before[layer]
        if gram is None:
            return PrincipalSpace.from_weight(weight, self.gamma)
        # From the records, which a resumed run has too: where the solver looks first may show in the last digits.
        likely = next((record.rank for record in reversed(self.records) if record.layer == layer), None)
        return PrincipalSpace.from_gram(weight, gram, self.gamma, likely)


def _formed(space: PrincipalSpace) -> PrincipalSpace:
    space.directions  # noqa: B018 - formed now, the space no longer refers to the weight
    return space


def write_spaces_csv(path: Path, records: list[SpaceRecord]) -> None:
    """Write all records, or leave the file before it."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(_COLUMNS)
        writer.writerows(astuple(record) for record in records)


def read_spaces_csv(path: Path) -> list[SpaceRecord]:
    """Read what ``SpaceTracker`` wrote.

    Raises:
        ValueError: the file has other columns, or a line that is no record.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            raise ValueError(f"{path} has columns {reader.fieldnames}, a file of spaces has {list(_COLUMNS)}")
        records = []
        for row in reader:
            try:
                records.append(_record(row))
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    return records


def _record(row: Mapping[str, str]) -> SpaceRecord:
    record = SpaceRecord(int(row["since"]), int(row["num_edits"]), int(row["layer"]), float(row["share"]),
                         int(row["rank"]), int(row["d_in"]))
    if not 0 <= record.since < record.num_edits or not 0 <= record.rank <= record.d_in or record.d_in < 1:
        raise ValueError(f"{record} is no change of a weight")
    return record


def covers(records: list[SpaceRecord], num_edits: int) -> bool:
    """Whether records tell of every change up to so many edits."""
    spans = sorted({(record.since, record.num_edits) for record in records})
    ends = [0, *(end for _, end in spans)]
    return all(since == end for (since, _), end in zip(spans, ends[:-1], strict=True)) and ends[-1] >= num_edits
