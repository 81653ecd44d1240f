"""Cosines between the neurons of edited weights, before and after editing: ``neurons.safetensors``.

By layer L, with n sampled neurons, B bins and k = min(d_out, d_in) eigenvalues:

================  =================  ==================================================================================
tensor            shape              content
================  =================  ==================================================================================
``rows.L``        (n,) int64         indices of the sampled rows, ascending
``cosines.L``     (2n, 2n) float32   cosines among the sampled rows before editing, followed by the same rows after it
``histogram.L``   (2, B) int64       pairs i < j of **all** neurons by their cosine, in equal bins over [-1, 1]
``spectrum.L``    (2, k) float32     eigenvalues of ``What What^T`` (What: the weight, rows of length 1), descending
``rank.L``        (2,) int64         rank of the principal space at the run's gamma (Eq. 10, 11)
================  =================  ==================================================================================

A dimension of size 2 is before and after. The file's metadata is a single entry, because the order of several is not
fixed and equal records should give equal files.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from ..core.projection import FLOAT64_SIDE, passing_count
from ..core.tensors import check_norms, row_norms, unit_rows
from ..utils.files import atomic_write

logger = logging.getLogger(__name__)

SAMPLE: Final = 200  # neurons
BINS: Final = 400
_FORMAT: Final = "1"
_BLOCK_ROWS: Final = 512
_METADATA: Final = "neurons"


@dataclass(frozen=True, eq=False)
class LayerNeurons:
    """One layer's neurons, before and after editing.

    Attributes:
        rows, cosines, histogram, spectrum, ranks: see the module's table.
        d_in: width of the weight; ``ranks / d_in`` is the expected share of a random direction in the principal space.
    """

    rows: NDArray[np.int64]
    cosines: NDArray[np.float32]
    histogram: NDArray[np.int64]
    spectrum: NDArray[np.float32]
    ranks: NDArray[np.int64]
    d_in: int

    @property
    def sampled(self) -> int:
        """Number of sampled neurons, n."""
        return len(self.rows)


_TENSORS: Final = (("rows", "rows", np.int64), ("cosines", "cosines", np.float32), ("histogram", "histogram", np.int64),
                   ("spectrum", "spectrum", np.float32), ("rank", "ranks", np.int64))


@dataclass(frozen=True, eq=False)
class NeuronRecord:
    """Content of ``neurons.safetensors``.

    Attributes:
        num_edits: edits in the model after editing.
        seed: seed of the sample.
        gamma: gamma of the principal spaces.
        layers: by layer number.
    """

    num_edits: int
    seed: int
    gamma: float
    layers: Mapping[int, LayerNeurons]

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        tensors = {f"{name}.{layer}": np.ascontiguousarray(getattr(found, field))
                   for layer, found in self.layers.items() for name, field, _ in _TENSORS}
        described = {"format": _FORMAT, "num_edits": self.num_edits, "seed": self.seed, "gamma": self.gamma,
                     "d_in": {str(layer): found.d_in for layer, found in self.layers.items()}}
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={_METADATA: json.dumps(described)})

    @classmethod
    def read(cls, path: Path) -> NeuronRecord:
        """Read what :meth:`write` wrote.

        Raises:
            ValueError: the file is absent, damaged, of another format, or a tensor has another shape.
        """
        try:
            with safe_open(path, framework="np") as stored:
                described = json.loads((stored.metadata() or {})[_METADATA])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}
            if described["format"] != _FORMAT:
                raise ValueError(f"its format is {described['format']!r}, not {_FORMAT!r}")
            layers = {int(layer): _layer(tensors, layer, int(d_in)) for layer, d_in in described["d_in"].items()}
            return cls(int(described["num_edits"]), int(described["seed"]), float(described["gamma"]), layers)
        except (OSError, SafetensorError, LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} can't be read as a record of neurons ({type(error).__name__}: {error}): remove "
                             "it") from error


def _layer(tensors: Mapping[str, NDArray[Any]], layer: str, d_in: int) -> LayerNeurons:
    found = {field: tensors[f"{name}.{layer}"] for name, field, _ in _TENSORS}
    count, width = len(found["rows"]), found["spectrum"].shape[-1]
    shapes = {"rows": (count,), "cosines": (2 * count, 2 * count), "histogram": (2, BINS), "spectrum": (2, width),
              "ranks": (2,)}
    for name, field, dtype in _TENSORS:
        if found[field].shape != shapes[field] or found[field].dtype != dtype:
            raise ValueError(f"{name}.{layer} is {found[field].dtype} of shape {found[field].shape}, not "
                             f"{np.dtype(dtype)} of shape {shapes[field]}")
    return LayerNeurons(**found, d_in=d_in)


@dataclass(frozen=True)
class _Distribution:
    """Cosines of all neurons of one weight: (BINS,) counts, (k,) eigenvalues, rank of the principal space."""

    histogram: NDArray[np.int64]
    spectrum: NDArray[np.float32]
    rank: int


@dataclass(frozen=True)
class _Before:
    """Sampled rows of an unedited weight (indices and unit vectors), and the distribution of all rows."""

    numbers: Tensor
    rows: Tensor
    all_rows: _Distribution


class NeuronTracker:
    """Records how the cosines between neurons changed since editing began.

    Each record costs one Gram matrix ``(d_out, d_out)`` and its eigenvalues per layer. ``SAMPLE`` rows of the unedited
    weight are kept.

    Args:
        weights: of the unedited model by layer, ``(d_out, d_in)``, rows are neurons.
        gamma: share of the spectrum in the principal space (Eq. 11).
        seed: seed of the sample among rows that are not zero.

    Raises:
        ValueError: a weight holds nan or infinity.
    """

    def __init__(self, weights: Mapping[int, Tensor], gamma: float, seed: int = 0) -> None:
        self._gamma, self._seed = gamma, seed
        self._before: dict[int, _Before] = {}
        for layer, weight in weights.items():
            unit, alive = directed_rows(weight)
            drawn = np.random.default_rng([seed, layer]).choice(len(alive), min(SAMPLE, len(alive)), replace=False)
            numbers = alive[torch.from_numpy(np.sort(drawn)).to(alive.device)]
            self._before[layer] = _Before(numbers, _directions(weight[numbers]), _distribution(weight, unit, gamma))

    def record(self, weights: Mapping[int, Tensor], num_edits: int) -> NeuronRecord:
        """Compare the current neurons with those before editing.

        Args:
            weights: of the same layers after ``num_edits``. A sampled row that has become zero has cosine 0 with all.

        Raises:
            ValueError: a weight holds nan or infinity.
        """
        return NeuronRecord(num_edits, self._seed, self._gamma,
                            {layer: self._layer(before, weights[layer]) for layer, before in self._before.items()})

    def write(self, path: Path, weights: Mapping[int, Tensor], num_edits: int) -> None:
        """Write a record; for a model with nan or infinity, log a warning and leave the file unchanged."""
        try:
            self.record(weights, num_edits).write(path)
        except (ValueError, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            logger.warning("no record of neurons after %d edits: %s", num_edits, error)

    def _layer(self, before: _Before, weight: Tensor) -> LayerNeurons:
        unit, _ = directed_rows(weight)
        after = _distribution(weight, unit, self._gamma)
        rows = torch.cat([before.rows, _directions(weight[before.numbers])])
        both = (before.all_rows, after)
        return LayerNeurons(
            rows=before.numbers.cpu().numpy(), cosines=(rows @ rows.T).clamp_(-1.0, 1.0).float().cpu().numpy(),
            histogram=np.stack([one.histogram for one in both]), spectrum=np.stack([one.spectrum for one in both]),
            ranks=np.array([one.rank for one in both], dtype=np.int64), d_in=weight.shape[1])


def directed_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a weight that are not zero, scaled to unit norm, and their indices.

    Args:
        weight: ``(d_out, d_in)``, rows are neurons; any floating dtype, any device.

    Returns:
        ``(n, d_in)`` in float64 for up to 1,024 rows, else float32, and indices ``(n,)``, ascending.

    Raises:
        ValueError: the weight holds nan or infinity.
    """
    norms = row_norms(weight, _BLOCK_ROWS)
    check_norms("weight", norms)
    numbers = (norms > 0).nonzero()[:, 0]
    work = torch.float64 if len(numbers) <= FLOAT64_SIDE else torch.float32
    return unit_rows(weight, norms, numbers, work), numbers


def cosine_blocks(unit: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Cosines of unit rows ``(n, d_in)`` in blocks of rows.

    Yields:
        Slice of a block, its cosines with all rows from the block's first on ``(rows, n - first)``, and those of the
        pairs i < j ``(pairs,)``, clamped to -1 to 1.
    """
    for start in range(0, unit.shape[0], _BLOCK_ROWS):
        block = slice(start, min(start + _BLOCK_ROWS, unit.shape[0]))
        product = unit[block] @ unit[start:].T
        yield block, product, product[torch.ones_like(product, dtype=torch.bool).triu_(1)].clamp_(-1.0, 1.0)


def _directions(rows: Tensor) -> Tensor:
    """Unit rows in float64; zero rows stay zero."""
    return unit_rows(rows, row_norms(rows, _BLOCK_ROWS), slice(None), torch.float64)


def _distribution(weight: Tensor, unit: Tensor, gamma: float) -> _Distribution:
    count, width = unit.shape
    gram = unit.new_empty((count, count))
    histogram = torch.zeros(BINS, dtype=torch.int64, device=unit.device)
    for block, product, upper in cosine_blocks(unit):
        gram[block, block.start:] = product
        gram[block.start:, block] = product.T
        histogram += torch.bincount(((upper + 1.0) * (BINS / 2)).long().clamp_(max=BINS - 1), minlength=BINS)
    values = torch.linalg.eigvalsh(gram).flip(0).double().clamp_(min=0.0)
    spectrum = torch.zeros(min(weight.shape), dtype=torch.float64, device=unit.device)
    found = min(len(values), len(spectrum))  # zero rows are left out; a tall weight has more rows than eigenvalues
    spectrum[:found] = values[:found]
    noise = 8.0 * math.sqrt(max(count, width)) * torch.finfo(gram.dtype).eps
    # As `PrincipalSpace.rank` has it, in half the time because the eigenvalues are known.
    rank = min(passing_count(spectrum, count, gamma), int((spectrum > noise * spectrum[0]).sum())) \
        if gamma > 0.0 and count else 0
    return _Distribution(histogram.cpu().numpy(), spectrum.float().cpu().numpy(), rank)
