"""Tensors in files without a name, mapped into memory: the system keeps in memory what it has room for."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def mapped_copy(tensor: Tensor, folder: Path | str | None = None) -> Tensor:
    """A copy on the CPU whose elements lie in a file that goes with the process.

    Args:
        tensor: of any shape, dtype and device.
        folder: of the file; None for where temporary files go.

    Raises:
        OSError: the folder can't be written, or has no room.
    """
    values = tensor.detach().cpu().contiguous()
    if not values.numel():
        return values.clone()
    with tempfile.TemporaryFile(dir=folder, prefix="sphere-easyedit-") as file:
        # Written, not only mapped: a disk without room then says so here, and not by a signal later.
        file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        memory = mmap.mmap(file.fileno(), 0)
    return torch.frombuffer(memory, dtype=values.dtype).view(values.shape)
