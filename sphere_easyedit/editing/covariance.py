"""Second moments of keys, and the null space they leave.

``C`` is the uncentered second moment ``E[k k^T]`` of the down-projection's input over the tokens of a text sample.
Files have EasyEdit's layout (``{stats_dir}/{model}/{dataset}_stats/{module}_{dtype}_mom2_{samples}.npz``) and are
read and written as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..files import replacing
from ..hparams import SPHEREHyperParams
from ..models import EditableModel, frozen, max_positions
from .corpus import corpus_name, token_sequences
from .replay import BlockReplay, pad_rows

logger = logging.getLogger(__name__)

# EasyEdit's reader asks for the class that wrote the file.
_EASYEDIT_CLASS = "easyeditor.util.runningstats.SecondMoment()"
_TOKENS_AT_ONCE = 8192


def model_folder(editable: EditableModel) -> str:
    """The model's name in paths of statistics: the last component of its own path."""
    return str(editable.config._name_or_path).rstrip("/").rsplit("/", maxsplit=1)[-1] or "model"


def moment_path(editable: EditableModel, hparams: SPHEREHyperParams, layer: int) -> Path:
    """Where the second moment of a layer's keys is kept, as EasyEdit names it."""
    module = editable.names.rewrite_module_tmp.format(layer)
    name = f"{module}_{hparams.mom2_dtype}_mom2_{hparams.mom2_n_samples}.npz"
    return Path(hparams.stats_dir) / model_folder(editable) / f"{corpus_name(hparams)}_stats" / name


def load_moment(path: Path, d_in: int) -> Tensor:
    """Read ``C`` ``(d_in, d_in)`` float32 from an EasyEdit statistics file.

    Raises:
        ValueError: the file is damaged, or its matrix has another shape or non-finite entries.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            total, count = np.asarray(stored["mom2.mom2"], dtype=np.float64), int(stored["mom2.count"].item())
    except (OSError, KeyError, ValueError, TypeError, EOFError, OverflowError, AttributeError, BadZipFile) as error:
        raise ValueError(f"{path} is no statistics file of EasyEdit's layout ({error}); remove it to have it "
                         "collected anew") from error
    if total.shape != (d_in, d_in):
        raise ValueError(f"{path} holds a second moment of shape {total.shape}, the layer's keys need "
                         f"{(d_in, d_in)}: it belongs to another model; set stats_dir or remove the file")
    if count <= 0 or not np.isfinite(total).all():
        raise ValueError(f"{path} holds non-finite entries or no samples; remove it to have it collected anew")
    return (torch.from_numpy(total) / count).float()


def save_moment(path: Path, total: Tensor, count: int, samples: int) -> None:
    """Write a sum of ``k k^T`` over ``count`` tokens so that EasyEdit reads it as its own."""
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **{  # type: ignore[arg-type]
            "mom2.constructor": np.array(_EASYEDIT_CLASS),
            "mom2.count": np.array(count),
            "mom2.mom2": total.cpu().numpy(),
            "sample_size": np.array(samples),
        })


def second_moments(editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams
                   ) -> dict[int, Tensor]:
    """``C`` of every edited layer ``(d_in, d_in)`` float32 on the CPU: read from file, else collected and filed.

    Raises:
        ValueError: a file does not fit, or there is no text to collect from.
    """
    paths = {layer: moment_path(editable, hparams, layer) for layer in editable.layers}
    missing = [layer for layer in editable.layers if not paths[layer].exists()]
    if missing:
        _collect(editable, tok, hparams, {layer: paths[layer] for layer in missing})
    return {layer: load_moment(path, editable.d_in(layer)) for layer, path in paths.items()}


def _collect(editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
             paths: dict[int, Path]) -> None:
    limit = min(hparams.mom2_max_length, max_positions(editable.config) or hparams.mom2_max_length)
    with frozen(editable.model):
        logger.info("second moments of layers %s are missing: collecting them from up to %d texts of %s, at most %.1e "
                    "operations", sorted(paths), hparams.mom2_n_samples, hparams.mom2_dataset,
                    2.0 * hparams.mom2_n_samples * limit * _parameters_below(editable, max(paths)))
        sequences = token_sequences(editable, tok, hparams, limit)
        tokens = sum(len(sequence) for sequence in sequences)
        logger.info("%d texts, %d tokens; kept in %s", len(sequences), tokens, next(iter(paths.values())).parent)
        thin = [layer for layer in paths if tokens < 2 * editable.d_in(layer)]
        if thin:
            logger.warning("%d tokens are few for keys of width %d: take more text (mom2_n_samples)", tokens,
                           editable.d_in(thin[0]))
        totals = _sum_outer_products(editable, sequences, sorted(paths))
    dtype = getattr(torch, hparams.mom2_dtype)
    filed = {layer: total.to(dtype) for layer, total in totals.items()}
    too_large = [layer for layer, total in filed.items() if not bool(torch.isfinite(total).all())]
    if too_large:
        raise ValueError(f"the second moments of layers {too_large} do not fit mom2_dtype {hparams.mom2_dtype} (or the "
                         "model's states are not finite): set mom2_dtype to float32")
    for layer, path in paths.items():
        save_moment(path, filed[layer], tokens, hparams.mom2_n_samples)


def _parameters_below(editable: EditableModel, layer: int) -> int:
    return sum(parameter.numel() for i in range(layer + 1) for parameter in editable.block(i).parameters())


@torch.no_grad()
def _sum_outer_products(editable: EditableModel, sequences: Sequence[Sequence[int]], layers: list[int]
                        ) -> dict[int, Tensor]:
    """Sums of ``k k^T`` over all tokens, float64 ``(d_in, d_in)`` by layer, in one pass for all layers."""
    totals = {layer: torch.zeros(editable.d_in(layer), editable.d_in(layer), dtype=torch.float64,
                                 device=editable.weight(layer).device) for layer in layers}
    mask = torch.zeros(0)

    def add(layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            keys = args[0][mask.to(args[0].device).bool()].float()  # (tokens, d_in)
            totals[layer] += (keys.T @ keys).double()

        return editable.down_projection(layer).register_forward_pre_hook(hook)

    handles = [add(layer) for layer in layers]
    try:
        with tqdm(total=len(sequences), desc="statistics", unit="text", leave=False) as bar:
            for batch in _batches(sequences):
                rows = pad_rows(batch, editable.input_device)
                mask = rows.attention_mask
                BlockReplay.record(editable, rows, layers[-1] + 1, layers[-1] + 1)  # runs up to the last layer
                bar.update(len(batch))
    finally:
        for handle in handles:
            handle.remove()
    return totals


def _batches(sequences: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    batches: list[list[Sequence[int]]] = []
    for sequence in sorted(sequences, key=len):
        if not batches or (len(batches[-1]) + 1) * len(sequence) > _TOKENS_AT_ONCE:
            batches.append([])
        batches[-1].append(sequence)
    return batches


def null_space_basis(moment: Tensor, threshold: float | None = None, share: float | None = None) -> Tensor:
    """Orthonormal basis ``V`` ``(d_in, q)`` of the directions that keys hardly use; ``P0 = V V^T`` (AlphaEdit).

    Args:
        moment: C ``(d_in, d_in)``.
        threshold: keep eigenvectors whose eigenvalue is below it; or
        share: keep this share of the dimensions, those of the smallest eigenvalues.

    Raises:
        ValueError: nothing is left to keep.
    """
    dtype = torch.float64 if moment.shape[0] <= 4096 else torch.float32
    values, vectors = torch.linalg.eigh(moment.to(dtype))  # ascending
    if share is not None:
        kept = max(1, int(share * len(values)))
    else:
        kept = int((values < threshold).sum())
    if kept == 0:
        raise ValueError(f"no eigenvalue of the keys' second moment is below nullspace_threshold {threshold} (the "
                         f"smallest is {float(values[0]):.3g}): raise it, or set nullspace_share")
    basis: Tensor = vectors[:, :kept].contiguous()
    return basis


def load_null_space(path: Path, layers: Sequence[int], d_in: int) -> dict[int, Tensor]:
    """Bases ``V`` ``(d_in, q)`` of the projections in EasyEdit's ``P_loc`` file.

    Raises:
        ValueError: the file is no such tensor, or its matrices are no orthogonal projections.
    """
    stacked = load_projections(path, layers, d_in)
    bases = {}
    for layer, projection in zip(layers, stacked, strict=True):
        dtype = torch.float64 if d_in <= 4096 else torch.float32
        values, vectors = torch.linalg.eigh((projection + projection.T).to(dtype) / 2)
        inside = values > 0.5
        if not bool(((values - inside.to(dtype)).abs() < 1e-2).all()):
            raise ValueError(f"P_loc {path}, layer {layer}: no orthogonal projection (its eigenvalues are not 0 and 1)")
        if not bool(inside.any()):
            raise ValueError(f"P_loc {path}, layer {layer}: the null space is empty")
        bases[layer] = vectors[:, inside].contiguous()
    return bases


def load_projections(path: Path, layers: Sequence[int], d_in: int) -> Tensor:
    """What EasyEdit's ``P_loc`` file holds: null-space projections stacked as ``(layers, d_in, d_in)``.

    Raises:
        ValueError: the file is no such tensor.
    """
    try:
        stacked = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; every one means an unusable or unsafe file
        raise ValueError(f"P_loc {path} can't be read as a plain tensor: {error}") from error
    if not isinstance(stacked, Tensor) or tuple(stacked.shape) != (len(layers), d_in, d_in):
        found = tuple(stacked.shape) if isinstance(stacked, Tensor) else type(stacked).__name__
        raise ValueError(f"P_loc {path} holds {found}; layers {list(layers)} with keys of width {d_in} need "
                         f"{(len(layers), d_in, d_in)}")
    if not stacked.is_floating_point() or not bool(torch.isfinite(stacked).all()):
        raise ValueError(f"P_loc {path} holds {stacked.dtype} or non-finite entries: no projections")
    return stacked
