"""Where the state of solves lies between them: on the weight's device while there is room, else where there is more."""

from __future__ import annotations

import tempfile
import weakref
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from ..mapped import mapped_copy


class Shelf:
    """Keeps tensors on their device up to a bound; what is above it goes to the host, or to memory-mapped files.

    Whoever computes with a tensor takes it to the device of its other operand, a block at a time. So where it lies
    decides about memory and speed only, not about bits.

    Args:
        room: bytes of each device that tensors may take; None for no bound.
        folder: where files for what is above it are made, which the system writes and reads by pages; None for the
            host's memory. They have no name and go with the process.

    Raises:
        ValueError: the folder can't be written.
    """

    def __init__(self, room: int | None = None, folder: Path | None = None) -> None:
        self._room, self._folder = room, folder
        self._taken: Counter[torch.device] = Counter()
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
            except OSError as error:
                raise ValueError(f"state_folder {folder} can't be written ({error}): give another, or none for the "
                                 "host's memory") from error

    @property
    def is_bounded(self) -> bool:
        """Whether a device may have no room for all."""
        return self._room is not None

    def put(self, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        """The tensor on a device (its own if not given), or its like where there is room, to be kept.

        Raises:
            ValueError: the folder has no room.
        """
        device = tensor.device if device is None else device
        if self._room is None:
            return tensor.to(device)
        size = tensor.nbytes
        if self._taken[device] + size > self._room:
            return tensor.cpu() if self._folder is None else _in_file(tensor, self._folder)
        kept = tensor.to(device)
        kept = kept.clone() if kept._is_view() else kept  # a view would keep all that it is a view of
        self._taken[device] += size
        weakref.finalize(kept, self._free, device, size)
        return kept

    def _free(self, device: torch.device, size: int) -> None:
        self._taken[device] -= size


def _in_file(tensor: Tensor, folder: Path) -> Tensor:
    try:
        return mapped_copy(tensor, folder)
    except OSError as error:
        raise ValueError(f"state_folder {folder} takes no {tensor.nbytes} bytes more ({error}): make room, or give "
                         "another folder or more state_memory") from error
