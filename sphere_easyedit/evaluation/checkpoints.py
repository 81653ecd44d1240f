"""Checkpoints of a sequential run: the edited weights and the session, not the whole model."""

from __future__ import annotations

from pathlib import Path

from ..editing.checkpoint_files import (
    check_whole,
    disk_errors,
    put_weights,
    resumable,
    save_weights,
    saved_weights,
    session_path,
    thin_out,
    weights_path,
    with_checksum,
)
from ..editing.session import EditSession
from ..models import EditableModel
from .run_directory import RunDirectory

__all__ = ["check_whole", "choose_kept", "put_weights", "resumable", "resume_from", "save_checkpoint", "save_weights",
           "saved_weights", "session_path", "thin_out", "weights_path"]


def save_checkpoint(editable: EditableModel, session: EditSession, folder: Path) -> None:
    """Write the weights, then the session, whose file makes the checkpoint one to resume from.

    Raises:
        OSError: they can't be written, for instance for want of room; earlier checkpoints are whole.
    """
    save_weights(editable, folder, session.num_edits)
    path = session_path(folder, session.num_edits)
    with with_checksum(path), disk_errors():
        session.save(path)


def choose_kept(run: RunDirectory, at: int | None, consequence: str) -> int:
    """A number of edits whose weights a run kept: ``at``, or the largest.

    Args:
        consequence: what can't be done where none were kept, for the error.

    Raises:
        ValueError: none were kept, or none after ``at`` edits.
    """
    kept = saved_weights(run.checkpoints)
    if not kept:
        raise ValueError(f"{run.path} kept no weights, so {consequence}: run `edit` again with the same settings into "
                         "a new directory, and leave its folder checkpoints there")
    if at is not None and at not in kept:
        raise ValueError(f"{run.path} kept no weights after {at} edits: kept are {', '.join(map(str, kept))}; "
                         "`edit --keep-weights-every` keeps more")
    return kept[-1] if at is None else at


def resume_from(editable: EditableModel, folder: Path, num_edits: int) -> EditSession:
    """Bring a model just loaded to a checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, or was made from another model than this one.
    """
    return EditSession.resume(editable, folder, num_edits)
