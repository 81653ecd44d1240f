"""Starts a run as a separate process with a log, for a local sweep or within a submitit job.

Imports nothing heavy, since a cluster job starts with it. submitit passes a job to its process as a pickle, which is
safe: its folder is created for this submission and only its owner can access it (see ``sweep.slurm``), and whoever
could change it could also change the batch script. A job's outcome is read from the run directory, not from a pickle.
"""

from __future__ import annotations

import os
import select
import shlex
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

_TAIL_LINES: Final = 20
_TAIL_BYTES: Final = 8192


def start_process(command: Sequence[str], log: Path, environment: Mapping[str, str], pass_fds: Sequence[int] = (),
                  cwd: Path | None = None) -> subprocess.Popen[bytes]:
    """Start ``command`` in a new session, so that signals reach it and all its children, but only from us.

    Args:
        command: program and arguments.
        log: its output is appended here, below a line with the time and the command.
        environment: all environment variables.
        pass_fds: descriptors that it inherits.
        cwd: its working directory; None: that of this process.
    """
    with log.open("ab") as stream:
        stream.write(f"# {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z} {shlex.join(command)}\n".encode())
        stream.flush()
        return subprocess.Popen(command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=stream,
                                stderr=stream, start_new_session=True, pass_fds=pass_fds)


def environment_of(threads: int) -> dict[str, str]:
    """This process's environment with ``OMP_NUM_THREADS`` set to ``threads``, unless it is set already."""
    return {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", **os.environ}


def tail(log: Path) -> str:
    """The log's last lines; empty if there is no log."""
    if not log.exists():
        return ""
    with log.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - _TAIL_BYTES))
        text = stream.read().decode(errors="replace")
    return "\n".join(text.splitlines()[-_TAIL_LINES:])


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class RunJob:
    """A submitit job that runs a command; on preemption or at its time limit it ends the command and is queued again.

    Args:
        command: program and arguments; must resume its work when started again (``edit --resume``).
        log: its output is appended here.
        summary: file that exists once the command has finished its work.
        directory: working directory.
        grace_seconds: time between SIGINT and SIGKILL.
    """

    def __init__(self, command: Sequence[str], log: Path, summary: Path, directory: Path,
                 grace_seconds: float = 30.0) -> None:
        self._settings = tuple(command), log, summary, directory, grace_seconds
        # The process, and a pipe that it closes when it ends.
        self._running: tuple[subprocess.Popen[bytes], int] | None = None

    def __call__(self) -> None:
        """Run the command.

        Raises:
            RuntimeError: it failed, or its work is not finished. SLURM then counts the job as failed, and does not
                start jobs that depend on it.
        """
        command, log, summary, directory, _ = self._settings
        environment = environment_of(int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or cores())
        ours, theirs = os.pipe()
        try:
            try:
                with _job_signals_blocked():
                    process = start_process(command, log, environment, (theirs,), directory)
                    self._running = process, ours
            finally:
                os.close(theirs)
            # Not Popen.wait: it holds a lock, and `checkpoint`, called from a signal handler, would deadlock.
            while process.poll() is None:
                select.select([ours], [], [], 1.0)
        finally:
            self._end()
            self._running = None
            os.close(ours)
        if process.returncode != 0 or not summary.exists():
            raise RuntimeError(f"exit status {process.returncode}, {summary.name} is "
                               f"{'there' if summary.exists() else 'missing'}: {log} says why")

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit on preemption or time limit: end the command, and return the same job to queue again."""
        from submitit.helpers import DelayedSubmission

        self._end()
        return DelayedSubmission(RunJob(*self._settings))

    def _end(self) -> None:
        """End the command if it is running: first by SIGINT, so that it undoes the current batch."""
        if self._running is None:
            return
        process, pipe = self._running
        for number, seconds in ((signal.SIGINT, self._settings[-1]), (signal.SIGKILL, 5.0)):
            if process.returncode is not None or select.select([pipe], [], [], 0)[0]:
                return
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
            select.select([pipe], [], [], seconds)


@contextmanager
def _job_signals_blocked() -> Iterator[None]:
    """Processes started in this context don't receive the signals of preemption and time limit.

    SLURM sends them to all processes of a job; the run would end by itself, and the job would count as failed before it
    is queued again.
    """
    from submitit import JobEnvironment

    asking = {signal.SIGTERM, getattr(signal, f"SIG{JobEnvironment.USR_SIG}")}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, asking)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
