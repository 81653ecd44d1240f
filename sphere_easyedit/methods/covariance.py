"""Collects and stores second moments of keys, and derives AlphaEdit's null space and MEMIT's Cholesky factor from them.

``C`` is the uncentered second moment ``E[k k^T]`` of the down-projection's input over the tokens of a text sample.
Files have EasyEdit's layout, ``{stats_dir}/{model}/{dataset}_stats/{module}_{dtype}_mom2_{samples}.npz``, and are
exchangeable with EasyEdit's; those that we write have a fingerprint beside them (see ``statistics_fingerprint``).

Results that are slow to derive from C are stored beside its file: the null space
(``..._null_space_{rule}.safetensors``) and, for wide layers, the Cholesky factor (``..._cholesky.safetensors``). Each
holds the digest of the statistics and of its own tensors, and is derived again if one of them differs.
"""

from __future__ import annotations

import logging
import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.linalg
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..models.architecture import EditableModel, frozen
from ..models.batching import length_class
from ..models.distributed import Replicas, split_balanced
from ..models.replay import BlockReplay, as_rows, first_input, pad_rows
from ..utils.files import atomic_write, locked, remove_partial_files, sha256_of
from ..utils.messages import kind_and_text
from ..utils.remaining_time import RemainingTime
from .checked_tensors import read_checked, write_checked
from .corpus import GENERATED, corpus_name, text_length, token_sequences
from .shipped_texts import shipped_texts
from .solvers import CholeskyFactor, NullSpace
from .statistics_fingerprint import (
    FileCheck,
    StatisticsFile,
    StatisticsFingerprints,
    array_checksums,
    ensure_unchanged,
    write_fingerprint,
)
from .tensor_store import TensorStore

if TYPE_CHECKING:
    from ..hparams import SPHEREHyperParams

logger = logging.getLogger(__name__)

# Name of the class that wrote the file, which EasyEdit's reader checks.
_EASYEDIT_CLASS = "easyeditor.util.runningstats.SecondMoment()"
TOKENS_AT_ONCE = 8192
_LOCK = ".collecting.lock"
_DERIVED_FORMAT = "sphere-easyedit derived statistics 1"
# Narrower factors are computed about as fast as they are read (0.1 s).
MIN_STORED_FACTOR_SIZE = 2048
_TOTALS = "sums of outer products"  # each process keeps its own until they are added up


def model_folder(editable: EditableModel) -> str:
    """Name of the model in statistics paths: the last component of its own path."""
    path = str(editable.config._name_or_path).rstrip("/")
    name = path.rsplit("/", maxsplit=1)[-1]
    if name in (".", ".."):  # as a folder name it would lead out of stats_dir
        name = Path(path).resolve().name
    return name or "model"


def moment_path(editable: EditableModel, hparams: SPHEREHyperParams, layer: int) -> Path:
    """EasyEdit's path of the second moment of a layer's keys."""
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
    except Exception as error:  # zipfile, zlib and NumPy's headers fail in more ways than can be listed
        raise ValueError(f"{path} is not a statistics file of EasyEdit's layout ({kind_and_text(error)}); remove "
                         "it to have it collected again") from error
    if total.shape != (d_in, d_in):
        raise ValueError(f"{path} holds a second moment of shape {total.shape}, the layer's keys need "
                         f"{(d_in, d_in)}: it belongs to another model; set stats_dir or remove the file")
    if count <= 0 or not np.isfinite(total).all():
        raise ValueError(f"{path} holds non-finite entries or no samples; remove it to have it collected again")
    return (torch.from_numpy(total) / count).float()


def save_moment(path: Path, total: Tensor, count: int, samples: int, fingerprint: Mapping[str, Any] | None = None
                ) -> None:
    """Write a sum of ``k k^T`` over ``count`` tokens in EasyEdit's format.

    Args:
        fingerprint: written beside it, if given (see ``StatisticsFingerprints.expected``).
    """
    with atomic_write(path) as temporary:
        with temporary.open("wb") as stream:
            np.savez(stream, **{  # type: ignore[arg-type]
                "mom2.constructor": np.array(_EASYEDIT_CLASS),
                "mom2.count": np.array(count),
                "mom2.mom2": total.cpu().numpy(),
                "sample_size": np.array(samples),
            })
        if fingerprint is not None:
            path.unlink(missing_ok=True)  # so that the old file is never beside the new one's fingerprint
            write_fingerprint(path, array_checksums(temporary), fingerprint)


def second_moments(editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams
                   ) -> dict[int, Tensor]:
    """``C`` of every edited layer ``(d_in, d_in)`` float32 on the CPU, read from file or collected and stored.

    Raises:
        ValueError: a file does not fit, or there is no text to collect from.
    """
    files = statistics_files(editable, tok, hparams)
    with ensure_unchanged(files.values()):
        return {layer: load_moment(file.path, editable.d_in(layer)) for layer, file in files.items()}


def statistics_files(editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams
                     ) -> dict[int, StatisticsFile]:
    """Files with the second moments of every edited layer; missing or outdated ones are collected.

    The edited weights must be the unedited ones. A file is outdated if its fingerprint does not match the model, the
    text or the settings; files without a fingerprint are used as they are.

    If several processes need the same files, the first collects them while the others wait (see ``files.locked``, also
    about NFS). If all files fit, nothing is locked or written, so their folder may be read-only.

    Raises:
        ValueError: there is no text to collect from, a layer's keys can't be assigned to tokens, or files can't be
            written to ``stats_dir``.
    """
    paths = {layer: moment_path(editable, hparams, layer) for layer in editable.layers}
    fingerprints = StatisticsFingerprints(editable, hparams, tok)
    folder = paths[editable.layers[0]].parent
    checks = {layer: fingerprints.check(path, layer) for layer, path in paths.items()}
    if not all(check.fits and check.consistent for check in checks.values()):
        try:
            with locked(folder / _LOCK, f"collecting statistics in {folder}"):
                remove_partial_files(folder)  # of a process killed while it wrote
                checks = {layer: fingerprints.check(path, layer) for layer, path in paths.items()}
                outdated = {layer: path for layer, path in paths.items() if not checks[layer].fits}
                _warn_of_replacement(folder, checks)
                if outdated:
                    _collect(editable, tok, hparams, outdated, fingerprints)
                    checks |= {layer: fingerprints.check(path, layer) for layer, path in outdated.items()}
        except OSError as error:
            raise ValueError(f"statistics of the model's keys are missing, or of another model or text, and can't be "
                             f"written to {folder} ({error}): set stats_dir to a writable folder, or free disk space"
                             ) from error
    for reason in dict.fromkeys(reason for check in checks.values() for reason in check.unknown):
        layers = [layer for layer, check in checks.items() if reason in check.unknown]
        logger.info("the statistics of layers %s in %s are used without a check: the file %s", layers, folder, reason)
    files = {layer: check.file for layer, check in checks.items() if check.file is not None}
    if len(files) < len(paths):
        raise ValueError(f"statistics in {folder} were removed by another process right after they were written: give "
                         "each model and each text a stats_dir of its own")
    return files


def _warn_of_replacement(folder: Path, checks: Mapping[int, FileCheck]) -> None:
    for differences in dict.fromkeys(check.differences for check in checks.values() if check.differences):
        layers = [layer for layer, check in checks.items() if check.differences == differences]
        logger.warning("the statistics of layers %s in %s were collected from %s: they are collected again and "
                       "replaced. To keep both, give each a stats_dir of its own", layers, folder,
                       " and ".join(differences))


def _collect(editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
             paths: dict[int, Path], fingerprints: StatisticsFingerprints) -> None:
    with frozen(editable.model):
        logger.info("statistics of layers %s are missing (how their inputs vary over ordinary text): collecting them, "
                    "once for all later runs with stats_dir %s", sorted(paths), hparams.stats_dir)
        sequences = _texts(editable, tok, hparams, fingerprints)
        tokens = sum(len(sequence) for sequence in sequences)
        logger.info("reading %d texts, %d tokens", len(sequences), tokens)
        thin = [layer for layer in paths if tokens < 2 * editable.d_in(layer)]
        if thin:
            logger.warning("%d tokens are few for keys of width %d: take more text (mom2_n_samples)", tokens,
                           editable.d_in(thin[0]))
        totals = _sum_outer_products(editable, sequences, sorted(paths))
    dtype = getattr(torch, hparams.mom2_dtype)
    totals = {layer: total.to(dtype) for layer, total in totals.items()}
    too_large = [layer for layer, total in totals.items() if not bool(torch.isfinite(total).all())]
    if too_large:
        raise ValueError(f"the second moments of layers {too_large} do not fit mom2_dtype {hparams.mom2_dtype} (or the "
                         "model's states are not finite): set mom2_dtype to float32")
    for layer, path in paths.items():
        save_moment(path, totals[layer], tokens, hparams.mom2_n_samples, fingerprints.expected(layer))
    logger.info("statistics of layers %s are stored in %s", sorted(paths), next(iter(paths.values())).parent)


def statistics_texts(editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams
                     ) -> list[list[int]]:
    """Token ids of the texts that statistics are collected from; generated ones are written anew, unless they ship.

    The edited weights must be the unedited ones, and the model frozen.

    Raises:
        ValueError: there is no text.
    """
    return _texts(editable, tok, hparams, StatisticsFingerprints(editable, hparams, tok))


def _texts(editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams,
           fingerprints: StatisticsFingerprints) -> list[list[int]]:
    shipped = shipped_texts(fingerprints.text_origin()) if hparams.mom2_dataset == GENERATED else None
    return token_sequences(editable, tok, hparams, text_length(editable, hparams)) if shipped is None else shipped


@torch.no_grad()
def _sum_outer_products(editable: EditableModel, sequences: Sequence[Sequence[int]], layers: list[int]
                        ) -> dict[int, Tensor]:
    """Sums of ``k k^T`` over all tokens, float64 ``(d_in, d_in)`` by layer, in one pass for all layers."""
    replicas = Replicas.of(editable.model)
    if replicas is None:
        return _sum_locally(editable, sequences, layers)
    parts = split_balanced([len(sequence) for sequence in sequences], replicas.world_size)
    replicas.run(_sum_share, [([sequences[i] for i in part], layers) for part in parts])
    # A separate job, since the reduction would wait forever for a process whose sums failed.
    replicas.run(_add_up, [()] * replicas.world_size)
    totals: dict[int, Tensor] = replicas.store.pop(_TOTALS)
    return totals


def _sum_share(replica: Replicas, sequences: Sequence[Sequence[int]], layers: list[int]) -> None:
    replica.store[_TOTALS] = _sum_locally(replica.editable, sequences, layers)


def _add_up(replica: Replicas) -> None:
    """Add the sums of all processes up on the leader; the other processes drop theirs."""
    for total in replica.store[_TOTALS].values():
        replica.sum_to_leader(total)
    if replica.process.rank:
        del replica.store[_TOTALS]


def _sum_locally(editable: EditableModel, sequences: Sequence[Sequence[int]], layers: list[int]) -> dict[int, Tensor]:
    totals = {layer: torch.zeros(editable.d_in(layer), editable.d_in(layer), dtype=torch.float64,
                                 device=editable.device(layer)) for layer in layers}
    mask = torch.zeros(0, 0, dtype=torch.long)
    runs: Counter[int] = Counter()

    def add(layer: int) -> Any:
        name = editable.names.rewrite_module_tmp.format(layer)

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            by_token = as_rows(first_input(args, kwargs), len(mask), mask.shape[1], name)
            keys = by_token[mask.to(by_token.device).bool()].float()  # (tokens, d_in)
            totals[layer] += (keys.T @ keys).double()
            runs[layer] += 1

        return editable.down_projection(layer).register_forward_pre_hook(hook, with_kwargs=True)

    handles = [add(layer) for layer in layers]
    batches = _batches(sequences, length_class(editable.config))
    sizes = [len(batch) * max(map(len, batch)) for batch in batches]  # tokens, padding included
    try:
        with RemainingTime("statistics", sum(sizes), "token") as remaining:
            for count, (batch, size) in enumerate(zip(batches, sizes, strict=True), start=1):
                rows = pad_rows(batch, editable.input_device)
                mask = rows.attention_mask
                BlockReplay.record(editable, rows, layers[-1] + 1, layers[-1] + 1)  # runs up to the last layer
                for layer in layers:
                    if runs[layer] != count:
                        raise ValueError(f"{editable.names.rewrite_module_tmp.format(layer)} ran "
                                         f"{runs[layer] - count + 1} times in a forward pass, not once: its keys can't "
                                         "be assigned to tokens. Edit a layer whose feed-forward network calls it once")
                totals[layers[-1]][0, 0].item()  # waits for the device, so that the time estimate is right
                remaining.update(size)
    finally:
        for handle in handles:
            handle.remove()
    return totals


def _batches(sequences: Sequence[Sequence[int]], class_of: Callable[[int], int]) -> list[list[Sequence[int]]]:
    batches: list[list[Sequence[int]]] = []
    for sequence in sorted(sequences, key=len):
        if (not batches or (len(batches[-1]) + 1) * len(sequence) > TOKENS_AT_ONCE
                or class_of(len(batches[-1][0])) != class_of(len(sequence))):
            batches.append([])
        batches[-1].append(sequence)
    return batches


def null_space(moment: Tensor, threshold: float | None = None, share: float | None = None) -> NullSpace:
    """AlphaEdit's null space of C: the directions with small eigenvalues, float32.

    Args:
        moment: C ``(d_in, d_in)``.
        threshold: the eigenvectors with smaller eigenvalues span it; or
        share: this share of the dimensions, those of the smallest eigenvalues, spans it.

    Raises:
        ValueError: the null space is empty.
    """
    width, kept = len(moment), _dimensions_kept(moment, threshold, share)
    complement = kept > width // 2
    first, last = (kept, width) if complement else (0, kept)
    return NullSpace(_eigenvectors(moment, first, last).float(), complement)


def null_space_basis(moment: Tensor, threshold: float | None = None, share: float | None = None) -> Tensor:
    """Orthonormal basis ``V`` ``(d_in, q)`` of the null space: ``P0 = V V^T`` (arguments as for ``null_space``).

    Raises:
        ValueError: the null space is empty.
    """
    return _eigenvectors(moment, 0, _dimensions_kept(moment, threshold, share))


def working_dtype(width: int) -> torch.dtype:
    return torch.float64 if width <= 4096 else torch.float32


def _dimensions_kept(moment: Tensor, threshold: float | None, share: float | None) -> int:
    width = len(moment)
    if share is not None:
        return max(1, int(share * width))
    assert threshold is not None  # hyperparameters give one of the two
    shifted = moment.to(working_dtype(width), copy=True)
    shifted.diagonal().sub_(threshold)
    kept = _negative_eigenvalues(shifted)
    if kept == 0:
        smallest = float(torch.linalg.eigvalsh(moment.double())[0])
        raise ValueError(f"no eigenvalue of the keys' second moment is below nullspace_threshold {threshold} (the "
                         f"smallest is {smallest:.3g}): raise it, or set nullspace_share")
    return kept


def _negative_eigenvalues(matrix: Tensor) -> int:
    """Number of negative eigenvalues, by Sylvester's law of inertia: much cheaper than the eigenvalues."""
    if matrix.is_cuda:
        return int((torch.linalg.eigvalsh(matrix) < 0).sum())
    _, blocks, _ = scipy.linalg.ldl(matrix.numpy())
    coupled = np.diagonal(blocks, -1) != 0  # a 2 x 2 pivot block has one eigenvalue of each sign
    single = np.ones(len(blocks), dtype=bool)
    single[1:] &= ~coupled
    single[:-1] &= ~coupled
    return int((np.diagonal(blocks)[single] < 0).sum() + coupled.sum())


def _eigenvectors(moment: Tensor, first: int, last: int) -> Tensor:
    """Eigenvectors ``(d_in, last - first)`` of the eigenvalues ``first`` to ``last - 1`` in ascending order."""
    matrix = moment.to(working_dtype(len(moment)))
    if first == last:
        return matrix[:, :0].clone()
    if matrix.is_cuda:
        vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors[:, first:last]
    else:
        vectors = torch.from_numpy(scipy.linalg.eigh(matrix.numpy(), subset_by_index=(first, last - 1))[1])
    return vectors.contiguous()


def stored_null_space(statistics: Path, d_in: int, threshold: float | None, share: float | None,
                     device: torch.device, store: TensorStore | None = None) -> NullSpace:
    """``null_space`` of a statistics file, stored beside it; computed on the CPU if the store has a memory limit.

    Raises:
        ValueError: the statistics do not fit, or the null space is empty.
    """
    rule = f"below_{threshold!r}" if share is None else f"share_{share!r}"
    path, metadata = _derived_path(statistics, f"null_space_{rule}"), _derived_metadata(statistics, rule)
    stored = _read_derived(path, metadata)
    for name, complement in (("kept", False), ("left_out", True)):
        if name in stored:
            return NullSpace(stored[name], complement).on(device, store)
    moment = load_moment(statistics, d_in)
    space = null_space(moment if store is not None and store.is_bounded else moment.to(device), threshold, share)
    _write_derived(path, metadata, {"left_out" if space.complement else "kept": space.columns})
    return space.on(device, store)


def stored_factor(statistics: Path, d_in: int, device: torch.device, store: TensorStore | None = None
                  ) -> CholeskyFactor:
    """Cholesky factor of a statistics file's second moment, float64; if d_in >= 2048 it is stored beside the file.

    At d_in 4096, reading it takes a fifth of the time of computing it.

    Raises:
        ValueError: the statistics do not fit.
        torch.linalg.LinAlgError: the second moment is not positive definite.
    """
    if d_in < MIN_STORED_FACTOR_SIZE:
        return CholeskyFactor.of(load_moment(statistics, d_in), device, store)
    path, metadata = _derived_path(statistics, "cholesky"), _derived_metadata(statistics, "cholesky")
    stored = _read_derived(path, metadata)
    if stored:
        return CholeskyFactor([stored[f"rows.{i}"] for i in range(len(stored))]).on(device, store)
    factor = CholeskyFactor.of(load_moment(statistics, d_in), device, store)
    _write_derived(path, metadata, {f"rows.{i}": row for i, row in enumerate(factor.rows)})
    return factor


def _derived_path(statistics: Path, name: str) -> Path:
    return statistics.with_name(f"{statistics.stem}_{name}.safetensors")


def _derived_metadata(statistics: Path, rule: str) -> dict[str, str]:
    """Metadata of a derived file: the digest of the statistics, and what was derived from them."""
    return {"format": _DERIVED_FORMAT, "statistics": sha256_of(statistics), "rule": rule}


def _read_derived(path: Path, expected: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of a derived file; empty if it is missing, outdated or damaged."""
    if not path.exists():
        return {}
    try:
        metadata, tensors = read_checked(path)
    except ValueError as error:
        logger.warning("%s: it is derived again", error)
        return {}
    if metadata != expected:
        logger.warning("%s was made from other statistics: it is derived again", path)
        return {}
    return tensors


def _write_derived(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    try:
        write_checked(path, metadata, tensors)
    except (OSError, SafetensorError) as error:  # a shared folder may be read-only
        logger.warning("%s can't be written (%s): it will be derived again in the next session", path, error)


def load_null_space(path: Path, layers: Sequence[int], d_in: int) -> dict[int, NullSpace]:
    """The null spaces in EasyEdit's ``P_loc`` file, float32.

    Raises:
        ValueError: the file has another content, or a matrix is not an orthogonal projection.
    """
    spaces = {}
    for layer, projection in zip(layers, load_projections(path, layers, d_in), strict=True):
        space = _null_space_of(projection.to(working_dtype(d_in)))
        if space is None:
            raise ValueError(f"P_loc {path}, layer {layer}: not an orthogonal projection (its eigenvalues are not 0 "
                             "and 1)")
        if space.dimensions == 0:
            raise ValueError(f"P_loc {path}, layer {layer}: the null space is empty")
        spaces[layer] = space
    return spaces


def _null_space_of(projection: Tensor) -> NullSpace | None:
    """The null space that a projection ``(d_in, d_in)`` projects on; None if it is not orthogonal, to 1e-2.

    Random vectors are projected to span the range, so no eigenproblem has to be solved.
    """
    width = len(projection)
    symmetric = (projection + projection.T) / 2
    kept = round(float(symmetric.trace()))
    if not 0 <= kept <= width:
        return None
    complement = kept > width // 2
    generator = torch.Generator().manual_seed(0)

    def random_columns(count: int) -> Tensor:
        return torch.randn(width, count, generator=generator, dtype=symmetric.dtype)

    columns = random_columns(width - kept if complement else kept)
    for _ in range(2):  # the second pass removes rounding errors
        columns = symmetric @ columns if not complement else columns - symmetric @ columns
        columns = torch.linalg.qr(columns).Q
    # Power iteration for the largest eigenvalue of the remainder.
    probe, size = random_columns(8), 0.0
    for _ in range(10):
        inside = columns @ (columns.T @ probe)
        probe = symmetric @ probe - (probe - inside if complement else inside)
        size = float(torch.linalg.matrix_norm(probe, 2))
        if not size > 0:
            break
        probe = torch.linalg.qr(probe).Q
    return NullSpace(columns.float(), complement) if size < 1e-2 else None


def load_projections(path: Path, layers: Sequence[int], d_in: int) -> Tensor:
    """Null-space projections from EasyEdit's ``P_loc`` file, stacked as ``(layers, d_in, d_in)``.

    Raises:
        ValueError: the file has another content.
    """
    try:
        stacked = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its own text advises to execute the file
        raise ValueError(f"P_loc {path} can't be read as a plain tensor: it is damaged, or a pickle that holds more "
                         "than tensors, which is not run") from error
    except Exception as error:  # torch raises many types, all for unusable or unsafe files
        raise ValueError(f"P_loc {path} can't be read as a plain tensor: {error}") from error
    if not isinstance(stacked, Tensor) or tuple(stacked.shape) != (len(layers), d_in, d_in):
        found = tuple(stacked.shape) if isinstance(stacked, Tensor) else type(stacked).__name__
        raise ValueError(f"P_loc {path} holds {found}; layers {list(layers)} with keys of width {d_in} need "
                         f"{(len(layers), d_in, d_in)}")
    if not stacked.is_floating_point() or not bool(torch.isfinite(stacked).all()):
        raise ValueError(f"P_loc {path} holds {stacked.dtype} or non-finite entries: no projections")
    return stacked
