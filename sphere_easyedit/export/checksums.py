"""SHA-256 fingerprints of a model's parameters and of named tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..models.offload import distinct_names, parameter_values


def base_fingerprint(model: nn.Module) -> str:
    """SHA-256 in hex over all parameters: name, dtype, shape and bytes of each, in the order of their names.

    It does not depend on devices, offloading or sharding, but on the dtype that the model was loaded in. Tied
    parameters count once, under the first of their names.

    Raises:
        ValueError: a parameter has no values.
    """
    digest = hashlib.sha256()
    for name in sorted(distinct_names(model)):  # one at a time: all of them may not fit into memory
        _add(digest, name, parameter_values(model, name))
    return digest.hexdigest()


def tensors_sha256(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 in hex over named tensors, in the order of their names.

    Each adds its name, dtype and shape as one line of UTF-8, then its elements' bytes, row after row.

    Raises:
        ValueError: a tensor is on the meta device.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        _add(digest, name, tensor)
    return digest.hexdigest()


def _add(digest: hashlib._Hash, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name} is on the meta device and has no values: load the whole model into memory")
    digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    digest.update(flat.view(torch.uint8).numpy().data)
