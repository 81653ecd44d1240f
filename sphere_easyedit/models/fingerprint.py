"""Fingerprints and checksums of weights, to detect changes without keeping a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .architecture import EditableModel
from .offload import parameter_values
from .quantization import dequantised

_BLOCK_ELEMENTS = 1 << 22  # summed at a time, since torch widens them to 8 bytes


class Fingerprint:
    """Sums of a weight's bit patterns, as integers, by row and by column, which practically every change alters."""

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = rows, columns  # (d_out,), (d_in,) int64, on the CPU

    @classmethod
    def of(cls, weight: Tensor) -> Fingerprint:
        """Fingerprint of a weight ``(d_out, d_in)``, floating or quantised."""
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
        bits = weight.detach().view(integer)
        rows, columns = [], torch.zeros(bits.shape[1], dtype=torch.int64, device=bits.device)
        for block in torch.split(bits, max(1, _BLOCK_ELEMENTS // max(1, bits.shape[1]))):
            rows.append(block.sum(dim=1, dtype=torch.int64))
            columns += block.sum(dim=0, dtype=torch.int64)
        return cls(torch.cat(rows).cpu(), columns.cpu())

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, Fingerprint) and torch.equal(self.rows, other.rows)
                and torch.equal(self.columns, other.columns))

    __hash__ = None  # type: ignore[assignment]


def model_fingerprint(model: nn.Module) -> str:
    """Digest of the fingerprints of all parameters, offloaded or not."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(_described(name, parameter_values(model, name), parameter.dtype))
    return digest.hexdigest()


def tensor_digests(editable: EditableModel, names: Iterable[str]) -> dict[str, str]:
    """Digest of the fingerprint of each parameter or buffer.

    A digest depends neither on a tensor's device nor on which layers are edited: a down-projection that bitsandbytes
    quantised is dequantised first, as if its layer were edited.
    """
    down_projections = {editable.names.rewrite_module_tmp.format(layer) for layer in range(editable.num_blocks)}
    digests = {}
    for name in names:
        module = name.rpartition(".")[0]
        plain = dequantised(editable.model, module) if module in down_projections else {}
        values = plain[name] if name in plain else parameter_values(editable.model, name)
        digests[name] = hashlib.sha256(_described(name, values, values.dtype)).hexdigest()
    return digests


def _described(name: str, values: Tensor, dtype: torch.dtype) -> bytes:
    """Name, shape, dtype and fingerprint of a tensor."""
    sums = Fingerprint.of(values.flatten(1) if values.dim() > 1 else values.reshape(1, -1))
    head = f"{name} {tuple(values.shape)} {dtype}".encode()
    return head + sums.rows.numpy().tobytes() + sums.columns.numpy().tobytes()


def weights_checksum(editable: EditableModel) -> str:
    """SHA-256 of the edited weights' bytes, in ascending order of layers."""
    digest = hashlib.sha256()
    for layer in editable.layers:
        stored = editable.parameter(layer).detach().cpu().contiguous()
        digest.update(stored.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
