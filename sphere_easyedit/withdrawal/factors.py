"""The factors of every batch's weight change, kept in files while editing: what a fact is withdrawn by.

A batch's change of a layer is ``dW = V K~^T``, a column an edit (``LowRankUpdate``). It is filed as it stands in the
weight: after SPHERE's suppression and after whatever a guard left of it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..callbacks import EditCallback, EditEvent
from ..editing.solvers import LowRankUpdate
from ..files import atomic_write, checksum_path, record_checksum, recorded_checksum, sha256_of
from ..hparams import SPHEREHyperParams
from .facts import Fact, read_past, still_true, write_past

logger = logging.getLogger(__name__)

FACTORS: Final = "factors"  # folder in a run directory
_FORMAT: Final = "sphere-easyedit factors 1"
_NAME: Final = re.compile(r"factors-(\d+)\.safetensors")
_PARTS: Final = ("values", "keys", "solved_for")


def factors_path(folder: Path, num_edits: int) -> Path:
    """File of the batch after which the model held so many edits."""
    return folder / f"factors-{num_edits}.safetensors"


def why_not(hparams: SPHEREHyperParams) -> str | None:
    """Why a method's changes have no factors that single facts could be withdrawn by; None where they have."""
    if hparams.executor != "native":
        return f"executor {hparams.executor} hands over dense changes, in which no fact has a part of its own"
    return {"RECT": "RECT zeroes single entries of a batch's change, which leaves no factors of low rank",
            "PRUNE": "PRUNE restrains the singular values of the whole change since the pretrained weight, so no fact "
                     "keeps a part of its own"}.get(hparams.base_alg)


class FactorKeeper(EditCallback):
    """Files the factors of every batch, ``factors-NUM_EDITS.safetensors``, with a checksum beside each.

    A file takes ``4 n (d_out + 2 d_in)`` bytes a layer for n edits. When a run goes on from an earlier point, files of
    later batches are dropped (and with no edits in the model all of them), and withdrawals that it has undone.

    Args:
        folder: made if need be; nothing else may be kept there under such names.
        hparams: of the edits; the base method must be AlphaEdit or MEMIT, solved natively.

    Raises:
        ValueError: the method's changes are not of low rank. An executor handed to ``apply_sphere_to_model`` is seen
            only at the end of its first batch, which is then undone.
    """

    def __init__(self, folder: str | Path, hparams: SPHEREHyperParams) -> None:
        if (reason := why_not(hparams)) is not None:
            raise ValueError(f"{reason}: facts can be withdrawn after AlphaEdit and MEMIT, solved natively. Choose one "
                             "of them, or keep no factors")
        self.folder = Path(folder)
        self._method = hparams.base_alg
        self._end: int | None = None  # edits after the last batch on file; None before the first look
        self._since = 0

    def on_batch_start(self, event: EditEvent) -> None:
        """Drops what is of batches that were undone.

        Raises:
            ValueError: factors of earlier batches are missing, so no error could be stated of any later one.
        """
        if self._end is None or self._end > event.num_edits:
            self._end = self._drop_later(event.num_edits)
        if self._end != event.num_edits:
            raise ValueError(f"the model holds {event.num_edits} edits, but {self.folder} the factors of {self._end}: "
                             "keep factors from the first batch on, or not at all")
        past = read_past(self.folder)
        kept = still_true(past, event.num_edits, event.weights)
        if kept != past:
            logger.info("%d withdrawals in %s were undone since, and are forgotten", len(past) - len(kept), self.folder)
            write_past(self.folder, kept)
        self._since = event.num_edits

    def on_batch_end(self, event: EditEvent) -> None:
        """Files the batch.

        Raises:
            ValueError: a layer's change is not of low rank.
        """
        if set(event.updates) != set(event.weights):
            dense = sorted(set(event.weights) - set(event.updates))
            raise ValueError(f"the change of layers {dense} is not of low rank, so its facts could not be withdrawn: "
                             "edit by AlphaEdit or MEMIT, natively, or keep no factors")
        tensors = {f"{part}.{layer}": tensor.detach().cpu().contiguous()
                   for layer, update in event.updates.items() for part, tensor in _parts(update).items()}
        content = {"since": self._since, "num_edits": event.num_edits, "case_ids": list(event.case_ids),
                   "method": self._method, "layers": sorted(event.updates)}
        path = factors_path(self.folder, event.num_edits)
        checksum_path(path).unlink(missing_ok=True)  # it must not outlive the content that it was taken of
        with atomic_write(path) as temporary:
            # One entry: several would be written in any order, and the same batch in other bytes.
            temporary.write_bytes(save(tensors, {_FORMAT: json.dumps(content)}))
        record_checksum(path, sha256_of(path))
        self._end = event.num_edits

    def _drop_later(self, num_edits: int) -> int:
        """Remove files of more edits than these; returns how many edits the files left reach to without a gap."""
        end = 0
        for number in _numbers(self.folder):
            path = factors_path(self.folder, number)
            if number > num_edits:
                logger.info("dropping %s: the model holds %d edits", path, num_edits)
                path.unlink(missing_ok=True)
                checksum_path(path).unlink(missing_ok=True)
            elif BatchFactors.read(path).since == end:
                end = number
        return end


def _parts(update: LowRankUpdate) -> dict[str, Tensor]:
    assert update.solved_for is not None  # native solves always say
    return {"values": update.values, "keys": update.keys, "solved_for": update.solved_for}


def _numbers(folder: Path) -> list[int]:
    found = (_NAME.fullmatch(path.name) for path in folder.glob("factors-*.safetensors"))
    return sorted(int(match[1]) for match in found if match is not None)


@dataclass(frozen=True)
class BatchFactors:
    """A batch on file; its tensors are read when asked for.

    Attributes:
        path: the file.
        since, num_edits: edits in the model before and after the batch.
        case_ids: a column each.
        layers: whose change it holds.
    """

    path: Path
    since: int
    num_edits: int
    case_ids: tuple[int | str, ...]
    layers: tuple[int, ...]

    @property
    def facts(self) -> list[Fact]:
        """The batch's edits, in the order of columns."""
        return [Fact(case_id, self.num_edits, column) for column, case_id in enumerate(self.case_ids)]

    @classmethod
    def read(cls, path: Path) -> BatchFactors:
        """Read a file's description.

        Raises:
            ValueError: it is damaged or no such file.
        """
        try:
            with safe_open(path, framework="pt") as stored:
                metadata, names = stored.metadata() or {}, set(stored.keys())
            if _FORMAT not in metadata:
                raise ValueError(f"it is of no {_FORMAT!r}")
            found = cls._described(path, json.loads(metadata[_FORMAT]))
            if names != {f"{part}.{layer}" for part in _PARTS for layer in found.layers}:
                raise ValueError(f"it holds {sorted(names)}, but tells of layers {list(found.layers)}")
        except Exception as error:  # a header can be damaged in more ways than safetensors has errors for
            raise _damaged(path, f"{type(error).__name__}: {error}") from error
        return found

    @classmethod
    def _described(cls, path: Path, content: Mapping[str, Any]) -> BatchFactors:
        found = cls(path, content["since"], content["num_edits"], tuple(content["case_ids"]), tuple(content["layers"]))
        if not all(type(number) is int for number in (found.since, *found.layers)):
            raise TypeError("its description has no whole numbers")
        _ = found.facts  # which refuse what is none
        if path.name != factors_path(path.parent, found.num_edits).name:
            raise ValueError(f"it is of the batch after {found.num_edits} edits")
        if not 0 <= found.since < found.num_edits == found.since + len(found.case_ids):
            raise ValueError(f"{len(found.case_ids)} cases from {found.since} to {found.num_edits} edits")
        return found

    def check_whole(self) -> None:
        """Refuse a file that does not meet its checksum; one without is taken with a warning.

        Raises:
            ValueError: it is damaged.
        """
        recorded = recorded_checksum(self.path)
        if recorded is None:
            logger.warning("%s has no checksum beside it, so damage to it would go unnoticed", self.path)
        elif (found := sha256_of(self.path)) != recorded:
            raise _damaged(self.path, f"its sha256 is {found}, but was {recorded} when it was written")

    def update(self, layer: int, shape: tuple[int, ...]) -> LowRankUpdate:
        """The batch's change of a layer.

        Args:
            layer: number of the layer.
            shape: ``(d_out, d_in)`` of its weight.

        Raises:
            ValueError: it is of a weight of another shape, or not finite.
        """
        with safe_open(self.path, framework="pt") as stored:
            parts = {part: stored.get_tensor(f"{part}.{layer}") for part in _PARTS}
        count, (d_out, d_in) = len(self.case_ids), shape
        for part, tensor in parts.items():
            wanted = (d_out if part == "values" else d_in, count)
            if tuple(tensor.shape) != wanted:
                raise ValueError(f"{self.path} holds {part} of {tuple(tensor.shape)} for layer {layer}, this model's "
                                 f"are {wanted}: give the folder that was kept while it was edited")
            if not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
                raise _damaged(self.path, f"{part} of layer {layer} are no finite numbers")
        return LowRankUpdate(**parts)


def read_batches(folder: Path, num_edits: int, layers: list[int]) -> list[BatchFactors]:
    """All batches of the first so many edits, in their order. Files of later ones, which were undone, don't count.

    Raises:
        ValueError: one is missing, damaged, or of other layers.
    """
    found = [BatchFactors.read(factors_path(folder, number)) for number in _numbers(folder) if number <= num_edits]
    end = 0
    for batch in found:
        if batch.since != end:
            break
        end = batch.num_edits
    if end != num_edits or not found:
        raise ValueError(f"{folder} holds the factors of {end} edits, of {num_edits} in the model: facts can be "
                         "withdrawn where all were kept (`edit --keep-factors`, or the callback FactorKeeper, from the "
                         "first batch on)")
    for batch in found:
        batch.check_whole()
        if sorted(batch.layers) != sorted(layers):
            raise ValueError(f"{batch.path} is of layers {sorted(batch.layers)}, edited are {sorted(layers)}: give the "
                             "folder that was kept while this model was edited")
    return found


def _damaged(path: Path, found: str) -> ValueError:
    return ValueError(f"{path} is damaged ({found}): no fact can be withdrawn by it. Edit anew, or roll back")
