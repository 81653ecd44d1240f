"""Files that are whole or not there, whoever is killed and whatever breaks: replacing, locking, checksums."""

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
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What file systems answer that know no locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)
_RECORDED = re.compile(r"([0-9a-f]{64})(?:\s|$)")  # as `sha256sum` writes it, and a bare one


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its place when the context ends without an error.

    The file's folder is made if need be. On an error the temporary file is removed and ``path`` stays as it was. The
    content is on the disk before the name is, and the name is when this returns: without that, a power cut could leave
    a file of the right name and length full of zeros. It costs two ``fsync``, some 4 ms each where we measured, against
    batches that take seconds; only what is written many times a second should not go through here.

    The temporary file is locked while it is written, which tells one under way from what a killed process left behind
    (see ``remove_leftovers``).

    Raises:
        OSError: it can't be written; where there is no room, the message says so and names ``path``.
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
        temporary.chmod(0o666 & ~umask)  # mkstemp's files are private, the run's are not meant to be
        _sync(temporary)
        temporary.replace(path)
        with suppress(OSError):  # the file is in place, whole; some file systems can't sync a folder
            _sync(path.parent)
    except OSError as error:
        raise _explained(error, path) from error
    finally:
        os.close(handle)
        with suppress(OSError):  # a folder gone bad: what went wrong first is what should be told
            temporary.unlink(missing_ok=True)


def _explained(error: OSError, path: Path) -> OSError:
    """The same error, of the file that was meant and with the remedy."""
    if error.errno not in _NO_ROOM:
        return error
    return OSError(error.errno, f"{os.strerror(error.errno or errno.ENOSPC)}; nothing was written and what stood there "
                                "is whole: make room, then go on", str(path))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    """Lock a file; False where another process holds it or the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def place_in(folder: Path, name: str, what: str = "the folder") -> Path:
    """The path of a file in a folder that may come from somebody else.

    Args:
        folder: need not be there; may itself be a link.
        name: path from there.
        what: the folder is called so in an error.

    Raises:
        ValueError: it leads out of the folder, by its name or by a symbolic link.
    """
    found, root = folder / name, folder.resolve()
    try:
        resolved = found.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise ValueError(f"{found} can't be followed ({error}): remove the link") from error
    if not resolved.is_relative_to(root) or resolved == root:
        raise ValueError(f"{found} leads out of {what}, to {resolved}: put the file itself there")
    return found


def remove_leftovers(folder: Path, beginning: str = "") -> None:
    """Remove temporary files of ``replacing`` that killed processes left in a folder.

    A file that somebody writes is locked, so it stays; so do those on a file system without locks.

    Args:
        folder: its own files alone are looked at.
        beginning: of the names that the files were to get.
    """
    for path in folder.glob(f".{beginning}*{_PARTIAL}*"):
        with suppress(OSError):  # gone meanwhile, or not ours to remove
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                if _try_lock(handle):
                    path.unlink()
                    logger.info("removed %s, which a process left half written", path)
            finally:
                os.close(handle)


@contextmanager
def locked(path: Path, waiting_for: str) -> Iterator[None]:
    """Hold a lock on a lock file until the context, or the process, ends; wait for whoever holds it, and say so.

    The kernel frees the lock when its holder dies, so no killed process can leave it behind; the empty file that it
    leaves is taken over by the next. Over NFS, Linux turns the lock into one that all machines see, if the server does
    locks; on a file system without them a warning is logged and nothing is held.

    Args:
        path: the lock file; made, with its folder, if need be, and removed at the end.
        waiting_for: what another process does under the lock, for the log.

    Raises:
        OSError: the lock file can't be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _locked_handle(path, waiting_for)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # while it is held: whoever waited sees that it is gone, and makes it anew
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)  # a forked child may hold the file open still
        os.close(handle)


def _locked_handle(path: Path, waiting_for: str) -> int:
    told = False
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    logger.info("another process is %s: waiting for it (its lock: %s)", waiting_for, path)
                told = True
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
        os.close(handle)  # its last holder has removed it meanwhile


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while part := stream.read(_CHUNK):
            digest.update(part)
    return digest.hexdigest()


def checksum_path(path: Path) -> Path:
    """Where a file's checksum is kept, in the format of ``sha256sum``."""
    return path.with_name(f"{path.name}.sha256")


def record_checksum(path: Path, digest: str) -> None:
    """Write a file's SHA-256 beside it."""
    with replacing(checksum_path(path)) as temporary:
        temporary.write_text(f"{digest}  {path.name}\n", encoding="utf-8")


def recorded_checksum(path: Path) -> str | None:
    """The SHA-256 that was written beside a file; None where there is none.

    Raises:
        ValueError: what stands there is no checksum.
    """
    beside = checksum_path(path)
    try:
        found = _RECORDED.match(beside.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{beside} can't be read ({error}): remove it, and the file beside it if that is in doubt"
                         ) from error
    if found is None:
        raise ValueError(f"{beside} holds no sha256: remove it, and the file beside it if that is in doubt")
    return found[1]
