"""Deltas: the change that editing made, in one safetensors file that is applied to the base model.

Each edited parameter W is stored in one of two ways:

- ``factors``: ``left @ right``, in the parameter's orientation, of the smallest rank within a tolerance.
  ``W_0 + left @ right`` then approximates W with an error that the file states. It can't equal W bit for bit: the
  rounding of W after each batch is part of the change and has full rank, and a product of matrices rounds differently
  from machine to machine.
- ``weight``: W itself, bit for bit. A dense difference ``W - W_0`` would be as large, and ``W_0`` plus that difference
  need not round to W, so differences are never stored. Used if factors would not be smaller or would miss the
  tolerance, and for all parameters with ``exact``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..models.offload import writable_parameter
from .card import LayerError
from .checksums import base_fingerprint, tensors_sha256
from .edited import EditedWeights, Provenance, WeightChange
from .factors import Spectrum

DELTAS: Final = "deltas.safetensors"
TOLERANCE: Final = 1e-4
_FORMAT: Final = "sphere-easyedit deltas 1"


@dataclass(frozen=True)
class Deltas:
    """The content of ``deltas.safetensors``.

    Attributes:
        origin: where the edited weights come from.
        layers: how each parameter is stored.
        tensors: ``left.NAME`` ``(m, r)`` and ``right.NAME`` ``(r, n)``, or ``weight.NAME`` ``(m, n)``, of a parameter
            stored as ``(m, n)``.
    """

    origin: Provenance
    layers: tuple[LayerError, ...]
    tensors: Mapping[str, Tensor]

    def edited(self, layer: LayerError, before: Tensor) -> Tensor:
        """The edited parameter: W itself, or ``W_0 + left right`` summed in float64 and rounded once to W_0's dtype.

        Args:
            before: W_0 ``(m, n)``, as stored.
        """
        if layer.stored == "weight":
            return self.tensors[f"weight.{layer.name}"]
        left, right = (self.tensors[f"{side}.{layer.name}"].double() for side in ("left", "right"))
        return (before.detach().cpu().double() + left @ right).to(before.dtype)


def compute_deltas(edited: EditedWeights, *, tolerance: float = TOLERANCE, exact: bool = False,
                   dtype: torch.dtype | None = None) -> Deltas:
    """Factorize the change of each edited parameter.

    Args:
        tolerance: maximum relative Frobenius error of a parameter's change, above 0 and below 1.
        exact: store the edited parameters themselves; ``apply_deltas`` then restores them bit for bit.
        dtype: of the factors; None for float32, or the parameter's dtype if that is wider.

    Raises:
        ValueError: arguments exclude each other or are out of range, or a change is not finite.
    """
    if exact and dtype is not None:
        raise ValueError("exact stores the edited parameters themselves: leave dtype out")
    if not 0.0 < tolerance < 1.0:
        raise ValueError(f"tolerance is {tolerance}: give a relative error above 0 and below 1")
    layers: list[LayerError] = []
    tensors: dict[str, Tensor] = {}
    for change in edited.changes:
        layer, stored = _encode(change, tolerance, exact, dtype)
        layers.append(layer)
        tensors |= {f"{side}.{layer.name}": tensor for side, tensor in stored.items()}
    return Deltas(edited.provenance, tuple(layers), tensors)


def _encode(change: WeightChange, tolerance: float, exact: bool, dtype: torch.dtype | None
            ) -> tuple[LayerError, dict[str, Tensor]]:
    before, after = change.before, change.after
    difference = after.double() - before.double()
    norm = float(difference.norm())
    if not math.isfinite(norm):
        raise ValueError(f"{change.name} has values that are not finite: export weights after fewer edits (at)")
    as_weight = (LayerError(change.name, "weight", None, 0.0, norm), {"weight": after})
    if exact:
        return as_weight
    dtype = dtype or torch.promote_types(after.dtype, torch.float32)
    spectrum = Spectrum(difference)
    smallest = spectrum.rank_within(tolerance)
    if smallest * sum(after.shape) * dtype.itemsize >= after.numel() * after.element_size():
        return as_weight
    factors = spectrum.factors(smallest, dtype)
    if factors.relative_error > tolerance:  # by rounding of the factors, which the spectrum does not include
        return as_weight
    return (LayerError(change.name, "factors", factors.rank, factors.relative_error, norm),
            {"left": factors.left, "right": factors.right})


def write_deltas(folder: Path, deltas: Deltas) -> None:
    """Write ``deltas.safetensors`` into an existing folder."""
    content: dict[str, Any] = {"provenance": deltas.origin.to_dict(),
                               "parameters": [asdict(layer) for layer in deltas.layers]}
    content["sha256"] = _checksum(content, deltas.tensors)
    save_file({name: tensor.contiguous() for name, tensor in deltas.tensors.items()}, folder / DELTAS,
              metadata={"format": _FORMAT, "content": json.dumps(content)})


def read_deltas(path: Path) -> Deltas:
    """Read the file that ``write_deltas`` wrote.

    Args:
        path: the file, or its folder.

    Raises:
        ValueError: the file is missing, damaged or in another format.
    """
    file = path / DELTAS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path} contains no {DELTAS}: give the folder that `export --as deltas` wrote")
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{file} contains no deltas (format {metadata.get('format')!r}, not {_FORMAT!r}): give a "
                             "file that `export --as deltas` wrote")
        content: dict[str, Any] = json.loads(metadata["content"])
        layers = tuple(LayerError(**entry) for entry in content["parameters"])
        origin = Provenance.from_dict(content["provenance"])
        expected = {f"{side}.{layer.name}" for layer in layers
                    for side in (("weight",) if layer.stored == "weight" else ("left", "right"))}
        if expected != set(tensors) or len(layers) != len({layer.name for layer in layers}):
            raise ValueError(f"{file} is damaged: it contains {sorted(tensors)} instead of {sorted(expected)}; export "
                             "again")
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} can't be read as deltas ({type(error).__name__}: {error}): export again") from error
    if content.pop("sha256", None) != _checksum(content, tensors):
        raise ValueError(f"{file} is damaged: its content has another SHA-256 than when it was written; export again")
    return Deltas(origin, layers, tensors)


def _checksum(content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    described = json.dumps(content, sort_keys=True)
    return hashlib.sha256(f"{tensors_sha256(tensors.items())} {described}".encode()).hexdigest()


@torch.no_grad()
def apply_deltas(model: nn.Module, deltas: Deltas | Path) -> Deltas:
    """Apply deltas to the base model, in place. On an error nothing is changed.

    Args:
        model: the unedited base model, in the run's dtype (``origin.base_dtype``).
        deltas: deltas, or the path to read them from.

    Returns:
        The deltas.

    Raises:
        ValueError: the file can't be read, or the model's parameters differ from the run's base model in any bit.
    """
    if isinstance(deltas, Path):
        deltas = read_deltas(deltas)
    wanted, found = deltas.origin.base_fingerprint, base_fingerprint(model)
    if found != wanted:
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
        base_dtype = deltas.origin.base_dtype or "several dtypes"
        raise ValueError(f"the base model's fingerprint is {found} (in {', '.join(dtypes)}), but these deltas were "
                         f"made from {wanted} ({deltas.origin.base} in {base_dtype}): load that model, unedited")
    names = {name for name, _ in model.named_parameters()}
    edited: dict[Tensor, Tensor] = {}
    for layer in deltas.layers:
        if layer.name not in names:
            raise ValueError(f"the model has no parameter {layer.name!r}, which the deltas name: the file was changed; "
                             "export again")
        parameter = writable_parameter(model, layer.name)
        shapes = [tuple(tensor.shape) for name, tensor in deltas.tensors.items() if name.endswith(f".{layer.name}")]
        try:
            weight = deltas.edited(layer, parameter)
        except RuntimeError as error:  # the shapes don't match
            raise ValueError(f"{layer.name} is {tuple(parameter.shape)}, the deltas have {shapes}: the file was "
                             "changed; export again") from error
        if weight.shape != parameter.shape or weight.dtype != parameter.dtype or not bool(weight.isfinite().all()):
            raise ValueError(f"{layer.name} is {tuple(parameter.shape)} {parameter.dtype}, with the deltas it would be "
                             f"{tuple(weight.shape)} {weight.dtype} or not finite: the file was changed; export again")
        edited[parameter] = weight
    for parameter, weight in edited.items():
        parameter.copy_(weight)
    return deltas
