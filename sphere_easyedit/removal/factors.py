"""Files of fact removal: the factors ``dW = V K~^T`` of every batch's weight change, and the record of removals."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..core.updates import LowRankUpdate
from ..editing.callbacks import EditCallback, EditEvent
from ..export.checksums import tensors_sha256
from ..hparams import SPHEREHyperParams
from ..utils.files import atomic_write, checksum_path, record_checksum, recorded_checksum, sha256_of
from ..utils.messages import one_line

logger = logging.getLogger(__name__)
Content = TypeVar("Content")

FACTORS: Final = "factors"  # folder in a run directory
_FORMAT: Final = "sphere-easyedit factors 1"
_NAME: Final = re.compile(r"factors-(\d+)\.safetensors")
_PARTS: Final = ("values", "keys", "solved_for")
_FLOATING: Final = ("F64", "F32", "F16", "BF16")  # dtypes by their names in safetensors headers


@dataclass(frozen=True)
class Fact:
    """One edit: its case, the number of edits in the model after its batch, and its column in the batch."""

    case_id: int | str
    batch: int
    column: int


@dataclass(frozen=True)
class PastRemoval:
    """One removal: edits made before it, SHA-256 of the edited weights after it, and the facts."""

    num_edits: int
    left: str
    facts: tuple[Fact, ...]


@dataclass(frozen=True)
class _Record:
    """Content of the record; its names are those of the file format."""

    format: Literal["sphere-easyedit withdrawals 1"]
    withdrawals: list[PastRemoval]


@dataclass(frozen=True)
class BatchFactors:
    """A file of factors: edits in the model before and after its batch, the case of each column, and layers."""

    since: int
    num_edits: int
    case_ids: list[int | str]
    method: str
    layers: list[int]

    @property
    def facts(self) -> list[Fact]:
        """The batch's edits, in the order of columns."""
        return [Fact(case_id, self.num_edits, column) for column, case_id in enumerate(self.case_ids)]


def _validated(kind: type[Content], text: str | bytes) -> Content:
    try:
        return TypeAdapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def factors_path(folder: Path, num_edits: int) -> Path:
    """File of the batch after which the model held this many edits."""
    return folder / f"factors-{num_edits}.safetensors"


def record_path(folder: Path) -> Path:
    """Record of removals."""
    return folder / "withdrawn.json"


def weights_digest(weights: Mapping[int, Tensor]) -> str:
    """SHA-256 in hex of the edited weights ``(d_out, d_in)`` by layer."""
    return tensors_sha256((str(layer), weight) for layer, weight in weights.items())


def read_removals(folder: Path) -> list[PastRemoval]:
    """All recorded removals, the earliest first; a ValueError if the record is damaged."""
    path = record_path(folder)
    if not path.exists():
        return []
    try:
        return _validated(_Record, path.read_bytes()).withdrawals
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a record of removals ({one_line(error)}): it was changed by hand or damaged. "
                         "Restore it, or edit anew") from error


def write_removals(folder: Path, past: Sequence[PastRemoval]) -> None:
    """Write the record whole, or leave the one before it."""
    content = TypeAdapter(_Record).dump_json(_Record("sphere-easyedit withdrawals 1", list(past)), indent=1)
    with atomic_write(record_path(folder)) as temporary:
        temporary.write_bytes(content)


def still_valid(past: Sequence[PastRemoval], num_edits: int, weights: Mapping[int, Tensor]) -> list[PastRemoval]:
    """Recorded removals that these weights ``(d_out, d_in)`` include.

    A rollback or a resumed run may have undone the last ones.
    """
    kept = [entry for entry in past if entry.num_edits <= num_edits]
    # Removals after the last batch: the weights may be those before them or after.
    digest = weights_digest(weights) if kept and kept[-1].num_edits == num_edits else ""
    while kept and kept[-1].num_edits == num_edits and kept[-1].left != digest:
        kept.pop()
    return kept


class FactorKeeper(EditCallback):
    """Save the factors of every batch as ``factors-NUM_EDITS.safetensors``, with a checksum beside each.

    A file takes ``4 n (d_out + 2 d_in)`` bytes a layer for n edits. When a run goes on from an earlier point, files of
    later batches and records of later removals are deleted. The base method must be AlphaEdit or MEMIT, solved
    natively; a ValueError if it is not, for a custom executor at the end of its first batch, which is then undone.
    """

    allows_repair: ClassVar[bool] = False  # a fact would have factors in two batches

    def __init__(self, folder: str | Path, hparams: SPHEREHyperParams) -> None:
        source = f"executor {hparams.executor}" if hparams.executor != "native" else hparams.base_alg
        if hparams.executor != "native" or not hparams.method.is_low_rank:
            raise ValueError(f"{source} returns dense changes, so no fact has a part of its own: facts can be removed "
                             "after AlphaEdit and MEMIT, solved natively. Choose one of them, or keep no factors")
        self.folder, self._method, self._since = Path(folder), hparams.base_alg, 0
        self._end: int | None = None  # edits after the last batch on file; None before the files were read

    def on_batch_start(self, event: EditEvent) -> None:
        """Delete files of batches that were undone; a ValueError if factors of earlier batches are missing."""
        self._since = event.num_edits
        later = [number for number in _numbers(self.folder) if number > self._since]
        for path in (factors_path(self.folder, number) for number in later):
            logger.info("deleting %s: the model holds %d edits", path, self._since)
            path.unlink(missing_ok=True)
            checksum_path(path).unlink(missing_ok=True)
        if self._end != self._since:  # at the start of a run, or after an undone batch
            self._end = _end(_contiguous(self.folder, self._since))
        if self._end != self._since:
            raise ValueError(f"the model holds {self._since} edits, but {self.folder} the factors of {self._end}: keep "
                             "factors from the first batch on, or not at all")
        past = read_removals(self.folder)
        if (kept := still_valid(past, self._since, event.weights)) != past:
            write_removals(self.folder, kept)

    def on_batch_end(self, event: EditEvent) -> None:
        """Save the batch; a ValueError if a layer's change is not of low rank."""
        if dense := sorted(set(event.weights) - set(event.updates)):
            raise ValueError(f"the change of layers {dense} is not of low rank, so its facts could not be removed: "
                             "edit by AlphaEdit or MEMIT, natively, or keep no factors")
        tensors = {f"{part}.{layer}": getattr(update, part).detach().cpu().contiguous()
                   for layer, update in event.updates.items() for part in _PARTS}
        batch = BatchFactors(self._since, event.num_edits, list(event.case_ids), self._method, sorted(event.updates))
        path = factors_path(self.folder, event.num_edits)
        checksum_path(path).unlink(missing_ok=True)  # it must not outlive the content that it belongs to
        with atomic_write(path) as temporary:
            # One entry: several would be written in any order, and the same batch in other bytes.
            temporary.write_bytes(save(tensors, {_FORMAT: json.dumps(asdict(batch))}))
        record_checksum(path, sha256_of(path))
        self._end = event.num_edits


def _numbers(folder: Path) -> list[int]:
    return sorted(int(found[1]) for path in folder.glob("factors-*") if (found := _NAME.fullmatch(path.name)))


def _contiguous(folder: Path, num_edits: int) -> list[BatchFactors]:
    """Batches of the first ``num_edits`` edits up to the first gap or overlap; a ValueError if a file is damaged."""
    found: list[BatchFactors] = []
    for number in _numbers(folder):
        if number > num_edits:
            break
        batch = _read(factors_path(folder, number))
        if batch.since != _end(found):
            break
        found.append(batch)
    return found


def _end(batches: Sequence[BatchFactors]) -> int:
    return batches[-1].num_edits if batches else 0


def read_batches(folder: Path, num_edits: int, layers: Sequence[int]) -> list[BatchFactors]:
    """All batches of the first ``num_edits`` edits in order; a ValueError if one is missing or damaged."""
    found = _contiguous(folder, num_edits)
    if (end := _end(found)) != num_edits or not found:
        raise ValueError(f"{folder} holds the factors of {end} edits, of {num_edits} in the model: facts can be "
                         "removed where all were kept from the first batch on (`edit --keep-factors`, or FactorKeeper)")
    for batch in found:
        path = factors_path(folder, batch.num_edits)
        if (recorded := recorded_checksum(path)) is None:
            logger.warning("%s has no checksum beside it, so damage to it would go unnoticed", path)
        elif recorded != sha256_of(path):
            raise _damaged(path, "its sha256 is not the recorded one")
        if sorted(batch.layers) != sorted(layers):
            raise ValueError(f"{path} is of layers {sorted(batch.layers)}, edited are {sorted(layers)}: give the "
                             "folder that was kept while this model was edited")
    return found


def _read(path: Path) -> BatchFactors:
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            held = {name: stored.get_slice(name) for name in stored.keys()}
            kinds = {name: (tensor.get_dtype(), tensor.get_shape()) for name, tensor in held.items()}
        batch = _validated(BatchFactors, metadata[_FORMAT])
    except Exception as error:  # a header can be damaged in more ways than safetensors has errors for
        raise _damaged(path, one_line(error)) from error
    if path.name != factors_path(path.parent, batch.num_edits).name:
        raise _damaged(path, f"it is of the batch after {batch.num_edits} edits")
    count = len(batch.case_ids)
    if not 0 <= batch.since < batch.num_edits == batch.since + count:
        raise _damaged(path, f"{count} cases from {batch.since} to {batch.num_edits} edits")
    if set(kinds) != {f"{part}.{layer}" for part in _PARTS for layer in batch.layers}:
        raise _damaged(path, f"it holds {', '.join(sorted(kinds)) or 'no tensors'}, not {', '.join(_PARTS)} of layers "
                             f"{batch.layers}")
    for name, (dtype, shape) in kinds.items():
        if dtype not in _FLOATING or len(shape) != 2 or shape[1] != count:
            raise _damaged(path, f"{name} is {dtype} of shape {tuple(shape)}, not floating-point of {count} columns, "
                                 "one for each edit")
    return batch


def read_update(path: Path, layer: int, shape: tuple[int, ...]) -> LowRankUpdate:
    """A batch's change of a layer whose weight has this shape ``(d_out, d_in)``; a ValueError if it does not fit."""
    with safe_open(path, framework="pt") as stored:
        parts = {part: stored.get_tensor(f"{part}.{layer}") for part in _PARTS}
    for part, tensor in parts.items():
        if len(tensor) != (wanted := shape[0] if part == "values" else shape[1]):
            raise ValueError(f"{path} holds {part} of {len(tensor)} rows for layer {layer}, this model's have "
                             f"{wanted}: give the folder that was kept while it was edited")
        if not bool(tensor.isfinite().all()):
            raise _damaged(path, f"{part} of layer {layer} are not finite")
    return LowRankUpdate(**parts)


def _damaged(path: Path, found: str) -> ValueError:
    return ValueError(f"{path} is damaged ({found}): no fact can be removed by it. Edit anew, or roll back")
