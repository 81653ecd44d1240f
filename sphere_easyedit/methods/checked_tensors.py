"""Safetensors files with metadata and a digest of their tensors, so that damage is noticed when they are read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..utils.files import atomic_write
from ..utils.messages import kind_and_text

_CONTENTS = "contents"


def write_checked(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Write tensors and metadata.

    Raises:
        OSError, SafetensorError: the file can't be written.
    """
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(on_cpu, temporary, metadata={**metadata, _CONTENTS: _digest(on_cpu)})


def read_checked(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file, the latter on the CPU.

    Raises:
        ValueError: the file can't be read, or its tensors are not those that were written.
    """
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = dict(stored.metadata() or {})
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
    except Exception as error:  # a header can be damaged in more ways than safetensors has errors for
        raise ValueError(f"{path} can't be read ({kind_and_text(error)})") from error
    if metadata.pop(_CONTENTS, None) != _digest(tensors):
        raise ValueError(f"{path} is damaged")
    return metadata, tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.numpy().data)
    return digest.hexdigest()
