"""Writes and reads checkpoints of a sequential run: the edited weights and the session, not the whole model.

Each file has its SHA-256 beside it (``weights-200.safetensors.sha256``). The checksum is removed before the file is
written again and stored after it, so it never belongs to other content. A file with a wrong checksum is refused before
any of it is loaded into a model. Checksums detect damage, not tampering.
"""

from __future__ import annotations

import errno
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..models.architecture import EditableModel
from ..utils.files import atomic_write, checksum_path, record_checksum, recorded_checksum, sha256_of
from .key_files import damage_of, names_in, remove_unused

if TYPE_CHECKING:
    from .session import EditSession

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # folder of a run directory
_WEIGHTS = re.compile(r"weights-(\d+)\.safetensors")


def weights_path(folder: Path, num_edits: int) -> Path:
    """File with the edited weights after ``num_edits`` edits, by parameter name."""
    return folder / f"weights-{num_edits}.safetensors"


def session_path(folder: Path, num_edits: int) -> Path:
    """File with the session after ``num_edits`` edits."""
    return folder / f"session-{num_edits}.safetensors"


def save_weights(editable: EditableModel, folder: Path, num_edits: int) -> None:
    """Write the current edited weights.

    Raises:
        OSError: they can't be written, for instance on a full disk.
    """
    weights = {editable.parameter_name(layer): editable.parameter(layer).detach().cpu().contiguous()
               for layer in editable.layers}
    path = weights_path(folder, num_edits)
    with _with_checksum(path), atomic_write(path) as temporary, _disk_errors():
        save_file(weights, temporary)


def save_checkpoint(editable: EditableModel, session: EditSession, folder: Path) -> None:
    """Write the weights, then the session; with both, a run can be resumed.

    Raises:
        OSError: they can't be written; earlier checkpoints stay intact.
    """
    save_weights(editable, folder, session.num_edits)
    path = session_path(folder, session.num_edits)
    with _with_checksum(path), _disk_errors():
        session.save(path, share_keys=True)


@contextmanager
def _with_checksum(path: Path) -> Iterator[None]:
    """Stores a file's checksum beside it after the context has written the file."""
    checksum_path(path).unlink(missing_ok=True)
    yield
    record_checksum(path, sha256_of(path))


@contextmanager
def _disk_errors() -> Iterator[None]:
    """Turns a disk error that safetensors reports into the original OSError."""
    try:
        yield
    except SafetensorError as error:
        code = re.search(r"\(os error (\d+)\)", str(error))
        number = int(code[1]) if code else errno.EIO
        raise OSError(number, os.strerror(number) if code else str(error)) from error


def verify_checksums(folder: Path, num_edits: int, *, session: bool = False) -> None:
    """Refuse a checkpoint whose files have wrong checksums; files of older versions have none, which is logged.

    Args:
        session: also check the session's file, and those of its keys.

    Raises:
        ValueError: a file is damaged; the message says what to remove and where the run can be resumed.
    """
    for path in (weights_path(folder, num_edits), *([session_path(folder, num_edits)] if session else [])):
        recorded = recorded_checksum(path)
        if recorded is None:
            logger.warning("%s has no checksum beside it, so damage to it would go unnoticed", path)
            continue
        try:
            digest = sha256_of(path)
        except OSError as error:
            raise damaged(folder, num_edits, path, str(error)) from error
        if digest != recorded:
            raise damaged(folder, num_edits, path, f"its sha256 is {digest}, but was {recorded} when it was written")
    if session:
        path = session_path(folder, num_edits)
        try:
            reason = damage_of(folder, names_in(path))
        except Exception as error:  # safetensors raises many types for a damaged header
            raise damaged(folder, num_edits, path, f"{type(error).__name__}: {error}") from error
        if reason is not None:
            raise damaged(folder, num_edits, path, reason)


def damaged(folder: Path, num_edits: int, path: Path, reason: str) -> ValueError:
    """Error for a damaged checkpoint file, which says where the run can be resumed."""
    earlier = [number for number in resumable(folder) if number < num_edits]
    before = f"the checkpoint before, after {earlier[-1]} edits" if earlier else "the start: no earlier one was kept"
    return ValueError(f"{path} is damaged ({reason}): remove it, and resume from {before}")


def saved_weights(folder: Path) -> list[int]:
    """Numbers of edits of the checkpoints with weights, ascending."""
    matches = (_WEIGHTS.fullmatch(path.name) for path in folder.glob("weights-*.safetensors"))
    return sorted(int(match.group(1)) for match in matches if match is not None)


def choose_checkpoint(run: Path, at: int | None, consequence: str) -> int:
    """Number of edits of the checkpoint to use: ``at``, or the last one.

    Args:
        run: the run directory.
        consequence: what is impossible without weights, for the error message.

    Raises:
        ValueError: the run kept no weights, or none after ``at`` edits.
    """
    kept = saved_weights(run / CHECKPOINTS)
    if not kept:
        raise ValueError(f"{run} kept no weights, so {consequence}: run `edit` again with the same settings into "
                         "a new directory, and leave its folder checkpoints there")
    if at is not None and at not in kept:
        raise ValueError(f"{run} kept no weights after {at} edits: kept are {', '.join(map(str, kept))}; "
                         "`edit --keep-weights-every` keeps more")
    return kept[-1] if at is None else at


def resumable(folder: Path) -> list[int]:
    """Numbers of edits of the checkpoints that a run can be resumed from, ascending."""
    return [number for number in saved_weights(folder) if session_path(folder, number).exists()]


def load_weights(editable: EditableModel, folder: Path, num_edits: int, *, checked: bool = False) -> None:
    """Load a checkpoint's weights into the model.

    Args:
        checked: the checksum was verified already.

    Raises:
        ValueError: the file is missing or damaged, or belongs to other layers or another model.
    """
    path = weights_path(folder, num_edits)
    if not path.exists():
        kept = ", ".join(map(str, saved_weights(folder))) or "none"
        raise ValueError(f"no weights after {num_edits} edits in {folder}: kept are {kept}")
    if not checked:
        verify_checksums(folder, num_edits)
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors raises many types for a damaged header
        raise damaged(folder, num_edits, path, f"{type(error).__name__}: {error}") from error
    names = {layer: editable.parameter_name(layer) for layer in editable.layers}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    expected = {name: tuple(editable.parameter(layer).shape) for layer, name in names.items()}
    if shapes != expected:
        raise ValueError(f"{path} holds {shapes}, the model's edited weights are {expected}: it is of another model "
                         "or of other layers")
    if odd := {name: weight.dtype for name, weight in weights.items() if not weight.is_floating_point()}:
        raise damaged(folder, num_edits, path, f"weights are numbers of type {odd}")
    with torch.no_grad():
        for layer, name in names.items():
            editable.parameter(layer).copy_(weights[name])


def remove_old_checkpoints(folder: Path, keep: int, permanent: set[int]) -> None:
    """Remove all but the ``keep`` newest checkpoints (0 = keep all); weights of ``permanent`` ones are kept."""
    numbers = resumable(folder)
    for number in numbers[:-keep] if keep else []:
        _remove(session_path(folder, number))
        if number not in permanent:
            _remove(weights_path(folder, number))
    if keep:
        remove_unused(folder, [session_path(folder, number) for number in numbers[-keep:]])


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    checksum_path(path).unlink(missing_ok=True)
