"""A run as a process of its own, with what it says in a log. Imports nothing heavy: a cluster's job starts with it."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final

_TAIL_LINES: Final = 20
_TAIL_BYTES: Final = 8192


def start_process(command: Sequence[str], log: Path, environment: Mapping[str, str], pass_fds: Sequence[int] = (),
                  cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """Start ``command`` in a session of its own, so that it is ended with all that it started, and by us alone.

    Args:
        command: program and arguments.
        log: what it says is added here, below a line with the time and the command.
        environment: all of it.
        pass_fds: descriptors that it inherits.
        cwd: its working directory; this process's own if None.
    """
    with log.open("ab") as stream:
        stream.write(f"# {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z} {shlex.join(command)}\n".encode())
        stream.flush()
        return subprocess.Popen(command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stream,
                                stderr=stream, start_new_session=True, pass_fds=pass_fds)


def environment_of(threads: int) -> dict[str, str]:
    """This process's environment for a run with so many threads, unless ``OMP_NUM_THREADS`` says another number."""
    return {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", **os.environ}


def tail(log: Path) -> str:
    """The log's last lines; empty where there is none."""
    if not log.exists():
        return ""
    with log.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - _TAIL_BYTES))
        text = stream.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-_TAIL_LINES:])


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
