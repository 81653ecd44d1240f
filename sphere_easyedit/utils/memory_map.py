"""Copies tensors to temporary memory-mapped files, which the operating system can evict from memory."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

import torch
from torch import Tensor


def mapped_copy(tensor: Tensor, folder: Path | str | None = None) -> Tensor:
    """A copy on the CPU, mapped to a temporary file that is removed when the process ends.

    Args:
        tensor: of any shape, dtype and device.
        folder: folder of the file; None for the system's temporary folder.

    Raises:
        OSError: the folder can't be written, or the disk is full.
    """
    values = tensor.detach().cpu().contiguous()
    if not values.numel():
        return values.clone()
    with tempfile.TemporaryFile(dir=folder, prefix="sphere-easyedit-") as file:
        # Written before mapping, so that a full disk raises an error here instead of a signal later.
        file.write(values.reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        memory = mmap.mmap(file.fileno(), 0)
    return torch.frombuffer(memory, dtype=values.dtype).view(values.shape)
