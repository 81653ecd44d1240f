"""Stores a session's earlier keys in files that later checkpoints share, so a checkpoint does not grow with the run.

A file has 512 keys of every layer and never changes; a session's file has the keys after the last full 512, and names
the files with those before. Names hold a digest of the content, so runs that went on differently from one checkpoint
don't overwrite each other's keys.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..methods.solvers import KeyHistory
from ..utils.files import atomic_write, checksum_path, record_checksum, recorded_checksum, sha256_of

KEYS_A_FILE = 512
_NAME = re.compile(r"keys-(\d+)-[0-9a-f]{16}\.safetensors")


def save_keys(folder: Path, history: Mapping[int, KeyHistory], known: Sequence[str]) -> tuple[str, ...]:
    """Write each full 512 keys that has no file yet; returns the names of all files, in the order of the keys.

    Args:
        history: earlier keys by layer.
        known: files with the first keys of this very history, returned by the call before. They are written again if
            the folder lacks one.
    """
    names = list(known) if all((folder / name).exists() for name in known) else []
    full = min((one.num_keys for one in history.values()), default=0) // KEYS_A_FILE
    for number in range(len(names), full):
        start = number * KEYS_A_FILE
        tensors = {str(layer): one.columns(start, start + KEYS_A_FILE).cpu() for layer, one in history.items()}
        digest = hashlib.sha256()
        for tensor in tensors.values():
            digest.update(tensor.numpy().tobytes())
        path = folder / f"keys-{start + KEYS_A_FILE}-{digest.hexdigest()[:16]}.safetensors"
        checksum_path(path).unlink(missing_ok=True)
        with atomic_write(path) as temporary:
            save_file(tensors, temporary)
        record_checksum(path, sha256_of(path))
        names.append(path.name)
    return tuple(names)


def load_keys(folder: Path, names: Sequence[str]) -> dict[int, Tensor]:
    """The keys of these files by layer, ``(d_in, m)``.

    Raises:
        ValueError: a name is not one of such a file.
        OSError, SafetensorError, RuntimeError: a file is missing or damaged.
    """
    parts = [load_file(_path(folder, name)) for name in names]
    return {int(layer): torch.cat([part[layer] for part in parts], dim=1) for layer in (parts[0] if parts else ())}


def damage_of(folder: Path, names: Sequence[str]) -> str | None:
    """What is wrong with files of keys: missing, or another content than was written; None if nothing is."""
    for name in names:
        path = _path(folder, name)
        try:
            recorded = recorded_checksum(path)
            if recorded is not None and sha256_of(path) == recorded:
                continue
        except OSError as error:
            return f"{name}, which has its earlier keys, can't be read: {error}"
        return f"{name}, which has its earlier keys, has no checksum or another one"
    return None


def remove_unused(folder: Path, sessions: Iterable[Path]) -> None:
    """Remove files of keys that none of these sessions' files names; none if one of them can't be read."""
    try:
        used = {name for path in sessions for name in names_in(path)}
    except (OSError, ValueError, TypeError, AttributeError, SafetensorError):
        return
    for path in folder.glob("keys-*.safetensors"):
        if _NAME.fullmatch(path.name) and path.name not in used:
            path.unlink(missing_ok=True)
            checksum_path(path).unlink(missing_ok=True)


def names_in(session: Path) -> list[str]:
    """Names of the files of keys that a session's file refers to.

    Raises:
        ValueError, OSError, SafetensorError: it is damaged.
    """
    with safe_open(session, framework="pt") as stored:
        state = json.loads((stored.metadata() or {}).get("state", "{}"))
    return list(state.get("key_files", ()))


def _path(folder: Path, name: str) -> Path:
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise ValueError(f"{name!r} is not the name of a file of keys: the session's file was damaged or made up")
    return folder / name
