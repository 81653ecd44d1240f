"""Telling whether weights are what they were, bit for bit, without keeping a copy."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from .models import EditableModel
from .offload import parameter_values


class Fingerprint:
    """Exact sums of a weight's bit patterns by row and by column: any change that is no conspiracy shows."""

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = rows, columns  # (d_out,), (d_in,) int64, on the CPU

    @classmethod
    def of(cls, weight: Tensor) -> Fingerprint:
        """Of a weight ``(d_out, d_in)``, floating or quantised."""
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
        bits = weight.detach().view(integer)
        return cls(bits.sum(dim=1, dtype=torch.int64).cpu(), bits.sum(dim=0, dtype=torch.int64).cpu())

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, Fingerprint) and torch.equal(self.rows, other.rows)
                and torch.equal(self.columns, other.columns))

    __hash__ = None  # type: ignore[assignment]


def model_fingerprint(model: nn.Module) -> str:
    """Digest of all parameters' values: any change that is no conspiracy shows."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter_values(model, name)  # offloaded ones, too
        flat = values.reshape(len(values) if values.dim() > 1 else 1, -1)
        prints = Fingerprint.of(flat)
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        for sums in (prints.rows, prints.columns):
            digest.update(sums.numpy().tobytes())
    return digest.hexdigest()


def weights_checksum(editable: EditableModel) -> str:
    """SHA-256 of the edited weights' bytes, in the layers' order."""
    digest = hashlib.sha256()
    for layer in editable.layers:
        stored = editable.parameter(layer).detach().cpu().contiguous()
        digest.update(stored.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
