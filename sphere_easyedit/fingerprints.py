"""Telling whether weights are what they were, bit for bit, without keeping a copy."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .models import EditableModel
from .offload import parameter_values
from .quantised import dequantised

_AT_ONCE = 1 << 22  # elements: torch widens them all to 8 bytes before it adds them up


class Fingerprint:
    """Exact sums of a weight's bit patterns by row and by column: any change that is no conspiracy shows."""

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        self.rows, self.columns = rows, columns  # (d_out,), (d_in,) int64, on the CPU

    @classmethod
    def of(cls, weight: Tensor) -> Fingerprint:
        """Of a weight ``(d_out, d_in)``, floating or quantised."""
        integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
        bits = weight.detach().view(integer)
        rows, columns = [], torch.zeros(bits.shape[1], dtype=torch.int64, device=bits.device)
        for block in torch.split(bits, max(1, _AT_ONCE // max(1, bits.shape[1]))):
            rows.append(block.sum(dim=1, dtype=torch.int64))
            columns += block.sum(dim=0, dtype=torch.int64)
        return cls(torch.cat(rows).cpu(), columns.cpu())

    def __eq__(self, other: object) -> bool:
        return (isinstance(other, Fingerprint) and torch.equal(self.rows, other.rows)
                and torch.equal(self.columns, other.columns))

    __hash__ = None  # type: ignore[assignment]


def model_fingerprint(model: nn.Module) -> str:
    """Digest of all parameters' values: any change that is no conspiracy shows."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        for part in _marks(name, parameter_values(model, name), parameter.dtype):  # offloaded ones, too
            digest.update(part)
    return digest.hexdigest()


def tensor_digests(editable: EditableModel, names: Iterable[str]) -> dict[str, str]:
    """Digest of the values of each parameter or buffer: any change that is no conspiracy shows.

    A digest depends neither on where a tensor lies nor on which layers are edited: a down-projection that bitsandbytes
    quantised counts as what it is dequantised to when its layer is edited.
    """
    down_projections = {editable.names.rewrite_module_tmp.format(layer) for layer in range(editable.num_blocks)}
    digests = {}
    for name in names:
        module = name.rpartition(".")[0]
        plain = dequantised(editable.model, module) if module in down_projections else {}
        values = plain[name] if name in plain else parameter_values(editable.model, name)
        digest = hashlib.sha256()
        for part in _marks(name, values, values.dtype):
            digest.update(part)
        digests[name] = digest.hexdigest()
    return digests


def _marks(name: str, values: Tensor, dtype: torch.dtype) -> Iterator[bytes]:
    """What a tensor is told by, for a digest."""
    prints = Fingerprint.of(values.flatten(1) if values.dim() > 1 else values.reshape(1, -1))
    yield f"{name} {tuple(values.shape)} {dtype}".encode()
    for sums in (prints.rows, prints.columns):
        yield sums.numpy().tobytes()


def weights_checksum(editable: EditableModel) -> str:
    """SHA-256 of the edited weights' bytes, in the layers' order."""
    digest = hashlib.sha256()
    for layer in editable.layers:
        stored = editable.parameter(layer).detach().cpu().contiguous()
        digest.update(stored.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
