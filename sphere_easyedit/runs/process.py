"""A run as a process of its own: started with its log, by a local sweep or within a job of submitit.

Imports nothing heavy, since a cluster's job starts with it. submitit hands a job to its process as a pickle. That does
not go against this package's rule that nothing read runs code: the pickle goes from us to ourselves through a folder
that was made for this one submission, empty and for its owner alone (see ``sweep.cluster``); whoever could change it
could change the batch script beside it. How a job ended is read from the run directory, not from the pickle that
submitit leaves.
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


class RunJob:
    """Runs a command to its end; asked to make room (preemption, the end of its time), ends it and is queued again.

    Args:
        command: program and arguments; started again, it goes on where it was (``edit --resume``).
        log: what it says is added here.
        summary: file that is there once the command has done its work.
        directory: working directory.
        grace_seconds: that the command has to end when room is to be made.
    """

    def __init__(self, command: Sequence[str], log: Path, summary: Path, directory: Path,
                 grace_seconds: float = 30.0) -> None:
        self._settings = tuple(command), log, summary, directory, grace_seconds
        # The process, and a pipe that it closes when it ends.
        self._running: tuple[subprocess.Popen[bytes], int] | None = None

    def __call__(self) -> None:
        """Run the command.

        Raises:
            RuntimeError: it failed, or its work is not done. For SLURM the job has failed then, and jobs that depend on
                it are not started.
        """
        command, log, summary, directory, _ = self._settings
        environment = environment_of(int(os.environ.get("SLURM_CPUS_PER_TASK", 0)) or cores())
        ours, theirs = os.pipe()
        try:
            try:
                with _for_this_process_alone():
                    process = start_process(command, log, environment, (theirs,), directory)
                    self._running = process, ours
            finally:
                os.close(theirs)
            # Not Popen.wait, which holds a lock that `checkpoint`, called by a signal in between, could not have.
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
        """What submitit calls when room is to be made, and queues: the same job again."""
        from submitit.helpers import DelayedSubmission

        self._end()
        return DelayedSubmission(RunJob(*self._settings))

    def _end(self) -> None:
        """End the command, if it runs: first so that it undoes a batch under way."""
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
def _for_this_process_alone() -> Iterator[None]:
    """A process that is started in this context does not get the signals that ask a job to make room.

    SLURM sends them to all processes of a job. The run would end on its own, and the job be taken as failed before it
    is queued again.
    """
    from submitit import JobEnvironment

    asking = {signal.SIGTERM, getattr(signal, f"SIG{JobEnvironment.USR_SIG}")}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, asking)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
