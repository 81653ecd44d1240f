"""Atomic writes, lock files, checksums, and paths that stay inside a folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

_CHUNK = 1 << 22  # bytes
_PARTIAL = ".partial"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_RECORDED = re.compile(r"([0-9a-f]{64})(?:\s|$)")  # as `sha256sum` writes it, or the digest alone


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically: a temporary path that is renamed to ``path`` if the context ends without an error.

    The folder is created if missing. On an error the temporary file is removed and ``path`` stays unchanged. Content
    and name are synced to disk (two ``fsync``, about 4 ms each), since a power cut could otherwise leave a file full of
    zeros. Not meant for files written many times a second.

    The temporary file is locked while it is written, so that ``remove_partial_files`` can tell it from what a killed
    process left.

    Raises:
        OSError: it can't be written; if the disk is full, the message says so and names ``path``.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PARTIAL + path.suffix, dir=path.parent)
    except OSError as error:
        raise _explained(error, path) from error
    temporary = Path(name)
    try:
        _try_lock(handle)
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp creates private files
        _sync(temporary)
        temporary.replace(path)
        with suppress(OSError):  # the file is complete; some file systems can't sync a folder
            _sync(path.parent)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        os.close(handle)
        with suppress(OSError):  # the first error is the one to report
            temporary.unlink(missing_ok=True)


def _explained(error: OSError, path: Path) -> OSError:
    """A full disk's error with ``path`` and the remedy; any other error unchanged."""
    if error.errno not in _DISK_FULL:
        return error
    return OSError(error.errno, f"{os.strerror(error.errno or errno.ENOSPC)}; nothing was written, and the previous "
                                "content is intact: free disk space, then go on", str(path))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    """Lock a file; False if another process holds the lock or the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def path_within(folder: Path, name: str, what: str = "the folder") -> Path:
    """The path of a file in an untrusted folder.

    Args:
        folder: may be missing, or a symbolic link itself.
        name: path relative to the folder.
        what: the folder's name in errors.

    Raises:
        ValueError: the path leaves the folder, by its name or by a symbolic link.
    """
    found, root = folder / name, folder.resolve()
    try:
        resolved = found.resolve()
    except (OSError, RuntimeError) as error:  # a loop of links
        raise ValueError(f"{found} can't be resolved ({error}): remove the link") from error
    if not resolved.is_relative_to(root) or resolved == root:
        raise ValueError(f"{found} leads out of {what}, to {resolved}: put the file itself there")
    return found


def remove_partial_files(folder: Path, beginning: str = "") -> None:
    """Remove temporary files of ``atomic_write`` that killed processes left in a folder.

    Files being written are locked and stay; so do all files on a file system without locks.

    Args:
        folder: searched without its subfolders.
        beginning: prefix of the final file names.
    """
    for path in folder.glob(f".{beginning}*{_PARTIAL}*"):
        with suppress(OSError):  # removed meanwhile, or no permission
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if _try_lock(handle):
                    path.unlink()
                    logger.info("removed %s, left incomplete by an interrupted process", path)
            finally:
                os.close(handle)


@contextmanager
def locked(path: Path, waiting_for: str) -> Iterator[None]:
    """Hold a lock file until the context or the process ends; while another process holds it, wait and log that.

    The kernel frees the lock when its holder dies, so a killed process never blocks others; the empty file that it
    leaves is reused. On NFS, Linux locks across machines if the server supports it. On a file system without locks a
    warning is logged and nothing is locked.

    Args:
        path: the lock file; created, with its folder, and removed at the end.
        waiting_for: what another process does under the lock, for the log.

    Raises:
        OSError: the lock file can't be created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked_handle(path, waiting_for)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # while locked: a waiting process notices and creates a new one
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a forked child may still hold the file open
        os.close(handle)


def _locked_handle(path: Path, waiting_for: str) -> int:
    logged = False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not logged:
                    logger.info("another process is %s: waiting for it (its lock: %s)", waiting_for, path)
                logged = True
                fcntl.flock(handle, fcntl.LOCK_EX)
        except BaseException as error:
            if not isinstance(error, OSError) or error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            logger.warning("%s can't be locked (%s): another process may do the same work at the same time", path,
                           error)
            return handle
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        os.close(handle)  # its last holder has removed the file meanwhile


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()


def checksum_path(path: Path) -> Path:
    """Path of a file's checksum, in the format of ``sha256sum``."""
    return path.with_name(f"{path.name}.sha256")


def record_checksum(path: Path, digest: str) -> None:
    """Write a file's SHA-256 to ``checksum_path``."""
    with atomic_write(checksum_path(path)) as temporary:
        temporary.write_text(f"{digest}  {path.name}\n", encoding="utf-8")


def recorded_checksum(path: Path) -> str | None:
    """The recorded SHA-256 of a file, or None.

    Raises:
        ValueError: the checksum file can't be read, or holds no checksum.
    """
    beside = checksum_path(path)
    try:
        found = _RECORDED.match(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{beside} can't be read ({error}): remove it, and its file too if that may be damaged"
                         ) from error
    if found is None:
        raise ValueError(f"{beside} holds no sha256: remove it, and its file too if that may be damaged")
    return found[1]
