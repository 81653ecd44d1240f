"""Stores large tensors on the weight's device up to a memory limit, and the rest in host memory or on disk."""

from __future__ import annotations

import tempfile
import weakref
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from ..utils.memory_map import mapped_copy


class TensorStore:
    """Stores tensors on their device up to a limit; the rest goes to host memory or to memory-mapped files.

    Computations move stored tensors to their device block by block, so the location affects memory and speed, not
    results.

    Args:
        limit: bytes that stored tensors may take on each device; None for no limit.
        folder: for the memory-mapped files, which are unnamed and vanish with the process; None for host memory.

    Raises:
        ValueError: the folder can't be written.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self._limit, self._folder = limit, folder
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
        """Whether there is a limit."""
        return self._limit is not None

    def put(self, tensor: Tensor, device: torch.device | None = None) -> Tensor:
        """Store a tensor on a device (by default its own) if the limit allows it, else a copy elsewhere; returns it.

        Raises:
            ValueError: the disk is full.
        """
        device = tensor.device if device is None else device
        if self._limit is None:
            return tensor.to(device)
        size = tensor.nbytes
        if self._taken[device] + size > self._limit:
            return tensor.cpu() if self._folder is None else _in_file(tensor, self._folder)
        kept = tensor.to(device)
        kept = kept.clone() if kept._is_view() else kept  # a view would keep its whole base tensor
        self._taken[device] += size
        weakref.finalize(kept, self._free, device, size)
        return kept

    def _free(self, device: torch.device, size: int) -> None:
        self._taken[device] -= size


def _in_file(tensor: Tensor, folder: Path) -> Tensor:
    try:
        return mapped_copy(tensor, folder)
    except OSError as error:
        raise ValueError(f"state_folder {folder} can't hold {tensor.nbytes} more bytes ({error}): free disk space, or "
                         "give another folder or more state_memory") from error
