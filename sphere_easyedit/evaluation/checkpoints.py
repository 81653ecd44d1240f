"""Checkpoints of a sequential run: the edited weights and the session, not the whole model."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..editing.session import EditSession
from ..files import replacing
from ..models import EditableModel

logger = logging.getLogger(__name__)

_WEIGHTS = re.compile(r"weights-(\d+)\.safetensors")


def weights_path(folder: Path, num_edits: int) -> Path:
    """File of the edited weights after so many edits, by parameter name."""
    return folder / f"weights-{num_edits}.safetensors"


def session_path(folder: Path, num_edits: int) -> Path:
    """File of the session after so many edits."""
    return folder / f"session-{num_edits}.safetensors"


def save_weights(editable: EditableModel, folder: Path, num_edits: int) -> None:
    """Write the edited weights as they stand."""
    weights = {editable.parameter_name(layer): editable.parameter(layer).detach().cpu().contiguous()
               for layer in editable.layers}
    with replacing(weights_path(folder, num_edits)) as temporary:
        save_file(weights, temporary)


def save_checkpoint(editable: EditableModel, session: EditSession, folder: Path) -> None:
    """Write the weights, then the session, whose file makes the checkpoint one to resume from."""
    save_weights(editable, folder, session.num_edits)
    session.save(session_path(folder, session.num_edits))


def saved_weights(folder: Path) -> list[int]:
    """Numbers of edits whose weights are kept, ascending."""
    found = (_WEIGHTS.fullmatch(path.name) for path in folder.glob("weights-*.safetensors"))
    return sorted(int(match.group(1)) for match in found if match is not None)


def resumable(folder: Path) -> list[int]:
    """Numbers of edits that editing can go on from, ascending."""
    return [number for number in saved_weights(folder) if session_path(folder, number).exists()]


@torch.no_grad()
def put_weights(editable: EditableModel, folder: Path, num_edits: int) -> None:
    """Put a checkpoint's weights into the model.

    Raises:
        ValueError: the file is absent or damaged, or is of other layers or another model.
    """
    path = weights_path(folder, num_edits)
    if not path.exists():
        kept = ", ".join(map(str, saved_weights(folder))) or "none"
        raise ValueError(f"no weights after {num_edits} edits in {folder}: kept are {kept}")
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read ({error}): remove it to resume from the checkpoint before") from error
    names = {layer: editable.parameter_name(layer) for layer in editable.layers}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    expected = {name: tuple(editable.parameter(layer).shape) for layer, name in names.items()}
    if shapes != expected:
        raise ValueError(f"{path} holds {shapes}, the model's edited weights are {expected}: it is of another model "
                         "or of other layers")
    for layer, name in names.items():
        editable.parameter(layer).copy_(weights[name])


def resume_from(editable: EditableModel, folder: Path, num_edits: int) -> EditSession:
    """Bring a model just loaded to a checkpoint.

    Raises:
        ValueError: the checkpoint is damaged, or was made from another model than this one.
    """
    session = EditSession.load(session_path(folder, num_edits))
    if not session.is_original(editable):
        raise ValueError(f"the run in {folder.parent} began with other weights than this model's: load the model that "
                         "it edited, before any edit")
    put_weights(editable, folder, num_edits)
    EditSession.attach(editable.model, session)
    return session


def thin_out(folder: Path, keep: int, for_good: set[int]) -> None:
    """Remove old checkpoints: the ``keep`` newest stay (0: all), and the weights of those meant ``for_good``."""
    numbers = resumable(folder)
    for number in numbers[:-keep] if keep else []:
        session_path(folder, number).unlink(missing_ok=True)
        if number not in for_good:
            weights_path(folder, number).unlink(missing_ok=True)


def weight_change_norms(editable: EditableModel, original: dict[int, Tensor]) -> dict[int, float]:
    """``||W - W_0||_F`` by layer."""
    return {layer: float((editable.weight(layer).double() - original[layer].to(editable.weight(layer).device).double()
                          ).norm()) for layer in editable.layers}
