"""Runs a sweep in local processes: one per run, several at a time, each resumed if it was interrupted."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final, Literal

from ...utils.files import path_within
from ...utils.yaml import read_yaml
from ..process import cores, environment_of, start_process, tail
from .record import Run, Sweep, check_only_added, read_record, write_record

logger = logging.getLogger(__name__)

LOCK: Final = "sweep.lock"
PROGRAM: Final = (sys.executable, "-m", "sphere_easyedit", "edit")
_POLL_SECONDS: Final = 0.1

Status = Literal["present", "started", "finished", "failed"]
OnStatus = Callable[[str, Status, int, int], None]  # (name of the run, its new status, runs ended, runs in total)


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    Attributes:
        status: ``present`` (already finished before), ``finished`` or ``failed``.
        returncode: exit status of its process, negative for a signal; None if it was not started.
        seconds: wall time of the process; 0 if it was not started.
        log: file with its output, of all attempts.
        tail: the log's last lines, of a failed run.
    """

    name: str
    status: Status
    returncode: int | None
    seconds: float
    log: Path
    tail: str = ""


@dataclass(frozen=True)
class SweepResult:
    """Outcomes in the sweep's order."""

    outcomes: tuple[RunOutcome, ...]

    @property
    def failed(self) -> tuple[RunOutcome, ...]:
        """Failed runs; ``run_sweep`` tries them again."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")


def run_sweep(sweep: Sweep, output: str | Path, jobs: int = 1, on_status: OnStatus | None = None,
              program: Sequence[str] = PROGRAM, grace_seconds: float = 10.0) -> SweepResult:
    """Run the unfinished runs of a sweep, with run directories ``output/NAME`` and logs ``output/NAME.log``.

    A run with a ``summary.json`` is finished. A failed run does not stop the others. ``OMP_NUM_THREADS`` of each
    process is its share of the cores, unless it is set already. SIGINT, SIGTERM, SIGHUP and any error end the
    processes; calling this again resumes the sweep.

    Args:
        sweep: from ``load_sweep``. Runs can only be added to a folder's sweep.
        output: the sweep's folder.
        jobs: number of processes at a time.
        on_status: called when a run starts or ends.
        program: command that the run's arguments are appended to.
        grace_seconds: time between SIGTERM and SIGKILL.

    Raises:
        ValueError: ``jobs`` is below 1, a data file is missing, or ``output`` belongs to a sweep with other runs or
            settings, has a finished run with other settings, or is in use by another sweep. Nothing was started.
        KeyboardInterrupt: after SIGINT.
        SystemExit: after SIGTERM or SIGHUP, with 128 and the signal's number.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}: give 1 or more")
    output = Path(output)
    with open_sweep(sweep, output) as (present, lock):
        waiting = [run for run in sweep.runs if run.name not in present]
        threads = max(1, cores() // max(1, min(jobs, len(waiting))))
        outcomes: dict[str, RunOutcome] = {}
        running: list[_Process] = []

        def report(name: str, status: Status) -> None:
            if on_status is not None:
                on_status(name, status, len(outcomes), len(sweep.runs))

        for name in (run.name for run in sweep.runs if run.name in present):
            outcomes[name] = RunOutcome(name, "present", None, 0.0, log_of(output, name))
            report(name, "present")
        with _DeferredSignals() as deferred:
            try:
                while (waiting or running) and deferred.signal is None:
                    while waiting and len(running) < jobs:
                        run = waiting.pop(0)
                        # Processes inherit the lock's descriptor, so it is held until the last of them ends, even if
                        # this one is killed first.
                        child = start_process([*program, *run.arguments(output / run.name)], log_of(output, run.name),
                                              environment_of(threads), (lock,))
                        running.append(_Process(run.name, child, time.monotonic()))
                        report(run.name, "started")
                    for one in [one for one in running if one.popen.poll() is not None]:
                        running.remove(one)
                        outcomes[one.name] = _outcome(output, one)
                        report(one.name, outcomes[one.name].status)
                    time.sleep(_POLL_SECONDS)
            finally:
                _end(running, grace_seconds)
    return SweepResult(tuple(outcomes[run.name] for run in sweep.runs))


@contextmanager
def open_sweep(sweep: Sweep, output: Path) -> Iterator[tuple[frozenset[str], int]]:
    """Lock the sweep's folder, check it, and write its record.

    Yields:
        Names of the finished runs, and the lock's descriptor.

    Raises:
        ValueError: as ``run_sweep``; only the lock file was written.
    """
    for run in sweep.runs:
        if run.data is not None and not Path(run.data).is_file():
            raise ValueError(f"run {run.name}: data file {run.data} does not exist (looked for "
                             f"{Path(run.data).absolute()}): correct `data`, relative to the working directory")
    for name in (LOCK, *(log_of(output, run.name).name for run in sweep.runs)):
        path_within(output, name)  # they are written in place, so a link must not lead elsewhere
    with _locked(output) as lock:
        recorded = read_record(output)
        if recorded is not None:
            check_only_added(sweep, recorded, output)
        present = frozenset(run.name for run in sweep.runs if _is_finished(run, output / run.name))
        write_record(sweep, output)
        yield present, lock


def log_of(output: Path, name: str) -> Path:
    """Log file of a run."""
    return output / f"{name}.log"


@dataclass(frozen=True)
class _Process:
    """A running process of a run."""

    name: str
    popen: subprocess.Popen[bytes]
    started: float

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process and all that it started."""
        if self.popen.returncode is None:  # else its number may belong to another process by now
            with suppress(ProcessLookupError, PermissionError):  # just ended; macOS raises the latter for a zombie
                os.killpg(self.popen.pid, number)


def _outcome(output: Path, process: _Process) -> RunOutcome:
    """Outcome of a run whose process has ended."""
    name, returncode = process.name, process.popen.returncode
    log = log_of(output, name)
    done = returncode == 0 and _summary(output / name) is not None
    if returncode == 0 and not done:
        logger.warning("%s ended without an error, but also without summary.json", name)
    return RunOutcome(name, "finished" if done else "failed", returncode, time.monotonic() - process.started, log,
                      "" if done else tail(log))


def _end(processes: Sequence[_Process], grace_seconds: float) -> None:
    """End processes, and wait for them."""
    for one in processes:
        one.signal(signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds
    for one in processes:
        try:
            one.popen.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.warning("%s did not end within %g s and is killed", one.name, grace_seconds)
            one.signal(signal.SIGKILL)
            one.popen.wait()


class _DeferredSignals:
    """Notes SIGINT, SIGTERM and SIGHUP inside the block, and raises the exception they stand for at its end.

    Raised at once, they could come between starting a process and noting it. Ignored signals (nohup) stay ignored.
    Outside the main thread, signals can't be caught and are left alone.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _DeferredSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal is not None:
            raise SystemExit(128 + self.signal)


@contextmanager
def _locked(output: Path) -> Iterator[int]:
    """Lock the folder until the context and every process that inherited the descriptor have ended."""
    output.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(output / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 32).decode(errors="replace").strip()
            raise ValueError(f"{output} is in use by the sweep of process {owner}, or by runs that it left behind when "
                             "it was killed: wait for them or end them") from None
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield descriptor
    finally:
        os.close(descriptor)


def _is_finished(run: Run, folder: Path) -> bool:
    """Whether the run is finished; a ValueError if it was made with other settings."""
    summary = _summary(folder)
    if summary is None:
        return False
    remedy = f"{folder} holds a finished run with other settings; remove it, or give another folder"
    done = summary.get("num_facts", summary.get("num_edits"))  # older runs left no fact out
    if None not in (run.num_edits, done) and done != run.num_edits:
        raise ValueError(f"run {run.name}: num_edits was {done} and is {run.num_edits} now: {remedy}")
    config = folder / "config.yaml"
    written = read_yaml(config.read_text(encoding="utf-8"), str(config)) if config.exists() else None
    described = written if isinstance(written, dict) else {}
    for name, was in (described.get("run") or {}).items():
        if name in ("dataset", "data", "seed", "batch_size") and was != getattr(run, name):
            raise ValueError(f"run {run.name}: {name} was {was!r} and is {getattr(run, name)!r} now: {remedy}")
    if (change := run.change_from(described.get("hparams") or {})) is not None:
        raise ValueError(f"run {run.name}: {change}: {remedy}")
    return True


def _summary(folder: Path) -> dict[str, Any] | None:
    path = folder / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return summary if isinstance(summary, dict) else None
