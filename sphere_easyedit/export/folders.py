"""Output folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_free(folder: Path) -> None:
    """Check that a folder does not exist or is empty.

    Raises:
        ValueError: it is a file, or not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: give a new folder")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: give a new folder, nothing is overwritten")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder that is renamed to ``folder`` if the context ends without an error, else removed.

    Raises:
        ValueError: ``folder`` is a file, or not empty.
    """
    check_free(folder)
    folder = Path(os.path.abspath(folder))  # "." gets a last component; links are not resolved
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp's folders are private
        temporary.rename(folder)  # fails if ``folder`` is not empty by now
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
