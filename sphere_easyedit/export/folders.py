"""A whole folder that is there complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_free(folder: Path) -> None:
    """Refuse a folder that something is in.

    Raises:
        ValueError: it is no folder, or not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give a new folder, nothing is overwritten")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside ``folder`` that takes its place when the context ends without an error.

    On an error nothing is left.

    Raises:
        ValueError: ``folder`` is no folder, or not empty.
    """
    check_free(folder)
    folder = Path(os.path.abspath(folder))  # of "." the last component is wanted; links stay links
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp's folders are private
        temporary.rename(folder)  # refused by the system if something has come into it meanwhile
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
