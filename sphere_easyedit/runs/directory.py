"""Reads and writes the files of a run directory, so that a run killed at any time can be resumed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any, TypeVar

from ..editing.checkpoints import CHECKPOINTS
from ..utils.files import atomic_write, path_within, remove_partial_files
from ..utils.yaml import read_yaml
from .schema import CONFIG, FILES, METRICS, Count, Measurement, read_record

_R = TypeVar("_R")
_OF_CHECKPOINTS = ("weights-", "session-", "keys-")  # names in the folder of checkpoints begin so
_CHUNK = 1 << 16  # bytes


class RunDirectory:
    """The files of one run (names: see ``runs.schema``).

    A run directory may come from somebody else, so symbolic links out of it are refused. Only the folder of checkpoints
    may be a link, to a larger disk; there, only checkpoint files are touched.

    Args:
        path: the directory; created on the first write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Folder of checkpoints."""
        return self.path / CHECKPOINTS

    def has(self, name: str) -> bool:
        """Whether a file exists."""
        return (self.path / name).is_file()

    def path_of(self, name: str) -> Path:
        """The path of a file in the directory.

        Raises:
            ValueError: the path leaves the directory, by its name or by a symbolic link.
        """
        return path_within(self.path, name, "the run directory")

    def check_paths(self) -> None:
        """Check that no file of the directory is a link out of it; call this before anything else.

        Raises:
            ValueError: one is.
        """
        for name in FILES:
            self.path_of(name)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the directory until the context or the process ends, and remove incomplete files of killed processes.

        Raises:
            ValueError: another process holds the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process is at work in {self.path}: wait for it, or give another directory"
                                 ) from error
            self._remove_leftovers()
            yield
        finally:
            os.close(handle)  # and the lock with it

    def _remove_leftovers(self) -> None:
        linked = self.checkpoints.is_symlink()
        for folder in (self.path, *(path for path in self.path.iterdir() if path.is_dir() and not path.is_symlink())):
            remove_partial_files(folder)
        for beginning in _OF_CHECKPOINTS if linked else ():  # the disk may hold other programs' files
            remove_partial_files(self.checkpoints, beginning)

    def write_text(self, name: str, text: str) -> None:
        """Write a file atomically."""
        with atomic_write(self.path_of(name)) as temporary:
            temporary.write_text(text, encoding="utf-8")

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a JSON file atomically."""
        self.write_text(name, json.dumps(content, indent=1))

    def write_lines(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        """Write a JSONL file atomically."""
        self.write_text(name, "".join(json.dumps(line) + "\n" for line in lines))

    def read_json(self, name: str) -> Any:
        """Read a JSON file.

        Raises:
            ValueError: it is not JSON.
        """
        target = self.path_of(name)
        try:
            return json.loads(target.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # no JSON, or no UTF-8
            raise ValueError(f"{target} is not JSON ({error}): it was changed by hand or damaged") from error

    def read_config(self) -> dict[str, Any]:
        """``config.yaml``'s content.

        Raises:
            ValueError: it is not a YAML mapping.
        """
        target = self.path_of(CONFIG)
        try:
            text = target.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(f"{self.path} has no {CONFIG}: give the directory of a run, {self._near_run()}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{target} is not YAML: {error}") from error
        config = read_yaml(text, str(target))
        if not isinstance(config, dict):
            raise ValueError(f"{self.path / CONFIG} holds {type(config).__name__}, not a mapping")
        return config

    def _near_run(self) -> str:
        """Text of an error that names a run in the directory, if there is one."""
        inside = sorted(path.parent for path in self.path.glob(f"*/{CONFIG}"))
        return f"such as {inside[-1]}" if inside else "as `edit --output` makes it"

    def append(self, name: str, line: Mapping[str, Any]) -> None:
        """Append a line to a JSONL file, and sync it to disk."""
        self.append_text(name, json.dumps(line) + "\n")

    def append_text(self, name: str, text: str) -> None:
        """Append complete lines to a file, and sync them to disk: all of them, or none if the disk is full.

        An incomplete last line of a killed process is dropped first.
        """
        target = self.path_of(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("ab+", buffering=0) as stream:
            size = _whole_lines(stream)
            stream.truncate(size)
            try:
                rest = memoryview(text.encode("utf-8"))
                while rest:
                    rest = rest[stream.write(rest):]
                os.fsync(stream.fileno())
            except BaseException:
                stream.truncate(size)
                raise

    def lines(self, name: str) -> list[dict[str, Any]]:
        """All complete lines of a JSONL file; empty if it is missing. An incomplete last line is left out.

        Raises:
            ValueError: a line is not a JSON object.
        """
        target = self.path_of(name)
        if not target.exists():
            return []
        raw = target.read_bytes().split(b"\n")[:-1]  # after the last line break: nothing, or an incomplete line
        return [_parsed(target, number, text) for number, text in enumerate(raw, start=1)]

    def records(self, name: str, kind: type[_R]) -> list[_R]:
        """All complete lines of a JSONL file as records of ``runs.schema``; empty if it is missing.

        Raises:
            ValueError: a line is not such a record.
        """
        return [read_record(kind, line, f"{self.path / name}, line {number}")
                for number, line in enumerate(self.lines(name), start=1)]

    def measurements(self) -> list[Measurement]:
        """All complete lines of ``metrics.jsonl``.

        Raises:
            ValueError: a line is not a measurement.
        """
        return [Measurement.from_dict(line, f"{self.path / METRICS}, line {number}")
                for number, line in enumerate(self.lines(METRICS), start=1)]

    def keep_whole_lines(self, name: str) -> None:
        """Drop an incomplete last line of a JSONL file."""
        if self.has(name) and not self.path_of(name).read_bytes().endswith(b"\n"):
            self.write_lines(name, self.lines(name))

    def keep_until(self, name: str, num_edits: int) -> None:
        """Drop the lines of a JSONL file with more than ``num_edits``, if it exists."""
        if not self.has(name):
            return
        edits = [read_record(Count, line.get("num_edits"), f"{self.path / name}, line {number}: num_edits")
                 for number, line in enumerate(self.lines(name), start=1)]
        self.write_lines(name, [line for line, found in zip(self.lines(name), edits, strict=True)
                                if found <= num_edits])


def _whole_lines(stream: FileIO) -> int:
    """Bytes of a file up to its last line break."""
    size = stream.seek(0, os.SEEK_END)
    while size:
        start = max(0, size - _CHUNK)
        stream.seek(start)
        found = bytes(stream.read(size - start)).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        size = start
    return 0


def _parsed(path: Path, number: int, text: bytes) -> dict[str, Any]:
    """A line of a JSONL file.

    Raises:
        ValueError: it is not a JSON object; the message names file and line.
    """
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}): it was damaged") from error
    if not isinstance(line, dict):
        raise ValueError(f"{path}, line {number} holds {type(line).__name__}, not an object")
    return line
