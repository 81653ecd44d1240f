"""Running a sweep: one process a run, so many at a time, each going on where it was interrupted."""

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
OnStatus = Callable[[str, Status, int, int], None]  # (run's name, its new status, runs that have ended, runs in all)


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    Attributes:
        status: ``present``: it was finished already; else ``finished`` or ``failed``.
        returncode: exit status of its process, negative for a signal's number; None if it was not started, or as a job.
        seconds: that the process took; 0 if it was not started. A job's time in the queue counts.
        log: what it said, this time and before.
        tail: of a failed run, the log's last lines.
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
        """Those that failed; ``run_sweep`` tries them again."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == "failed")


def run_sweep(sweep: Sweep, output: str | Path, jobs: int = 1, on_status: OnStatus | None = None,
              program: Sequence[str] = PROGRAM, grace_seconds: float = 10.0) -> SweepResult:
    """Run what of the sweep is not finished; run directories and logs are ``output/NAME`` and ``output/NAME.log``.

    A run is finished when its ``summary.json`` is there. A failed one does not stop the others. Each process gets
    ``OMP_NUM_THREADS``, its share of the cores, unless that is set. On SIGINT, SIGTERM and SIGHUP, and on any error,
    the processes are ended; called again, the sweep goes on.

    Args:
        sweep: of ``load_sweep``. A folder's sweep may only grow.
        output: the sweep's folder.
        jobs: processes at a time.
        on_status: called when a run starts or ends.
        program: what is run, in front of a run's arguments.
        grace_seconds: that processes have between SIGTERM and SIGKILL.

    Raises:
        ValueError: ``jobs`` is below 1, a data file is not there, ``output`` belongs to a sweep with other runs or
            settings, has a finished run made with other settings, or is in use by another sweep. Nothing was started.
        KeyboardInterrupt: after SIGINT.
        SystemExit: after SIGTERM or SIGHUP, with 128 and the signal's number.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}: give 1 or more")
    output = Path(output)
    with opened(sweep, output) as (present, lock):
        waiting = [run for run in sweep.runs if run.name not in present]
        threads = max(1, cores() // max(1, min(jobs, len(waiting))))
        processes = _Processes(output, tuple(program), threads, lock)
        outcomes: dict[str, RunOutcome] = {}

        def tell(name: str, status: Status) -> None:
            if on_status is not None:
                on_status(name, status, len(outcomes), len(sweep.runs))

        for name in (run.name for run in sweep.runs if run.name in present):
            outcomes[name] = RunOutcome(name, "present", None, 0.0, log_of(output, name))
            tell(name, "present")
        with _Ending() as ending:
            try:
                while (waiting or processes.running) and ending.signal is None:
                    while waiting and len(processes.running) < jobs:
                        run = waiting.pop(0)
                        processes.start(run)
                        tell(run.name, "started")
                    for outcome in processes.ended():
                        outcomes[outcome.name] = outcome
                        tell(outcome.name, outcome.status)
                    time.sleep(_POLL_SECONDS)
            finally:
                processes.end(grace_seconds)
    return SweepResult(tuple(outcomes[run.name] for run in sweep.runs))


@contextmanager
def opened(sweep: Sweep, output: Path) -> Iterator[tuple[frozenset[str], int]]:
    """The sweep's folder with its record written, for one process alone.

    Yields:
        names of the runs that are finished; the lock's descriptor.

    Raises:
        ValueError: as ``run_sweep``, before anything was written but the lock.
    """
    for run in sweep.runs:
        if run.data is not None and not Path(run.data).is_file():
            raise ValueError(f"run {run.name}: its data {run.data} is no file (looked for {Path(run.data).absolute()}):"
                             " correct `data`, which is relative to the working directory")
    for name in (LOCK, *(log_of(output, run.name).name for run in sweep.runs)):
        path_within(output, name)  # both are written in place, wherever a link leads
    with _locked(output) as lock:
        recorded = read_record(output)
        if recorded is not None:
            check_only_added(sweep, recorded, output)
        present = frozenset(run.name for run in sweep.runs if _is_finished(run, output / run.name))
        write_record(sweep, output)
        yield present, lock


def log_of(output: Path, name: str) -> Path:
    """Where a run says what it has to say."""
    return output / f"{name}.log"


def outcome_of(output: Path, name: str, returncode: int | None, seconds: float) -> RunOutcome:
    """How a run ended whose process, or job, ended; a job's exit status need not be known."""
    log = log_of(output, name)
    done = returncode in (0, None) and _summary(output / name) is not None
    if returncode == 0 and not done:
        logger.warning("%s ended without an error, but also without summary.json", name)
    return RunOutcome(name, "finished" if done else "failed", returncode, seconds, log, "" if done else tail(log))


@dataclass(frozen=True)
class _Child:
    run: Run
    process: subprocess.Popen[bytes]
    started: float

    def signal(self, number: signal.Signals) -> None:
        """To the process and all that it started."""
        if self.process.returncode is None:  # else its number may be another process's by now
            with suppress(ProcessLookupError, PermissionError):  # it just ended; macOS says the latter of a zombie
                os.killpg(self.process.pid, number)


class _Processes:
    """The processes that run, each with its log."""

    def __init__(self, output: Path, program: tuple[str, ...], threads: int, lock: int) -> None:
        self.running: list[_Child] = []
        self._output, self._program, self._lock = output, program, lock
        self._environment = environment_of(threads)

    def start(self, run: Run) -> None:
        command = [*self._program, *run.arguments(self._output / run.name)]
        # The lock goes along: it holds until the last process that has it ends, were this one killed before its
        # children.
        process = start_process(command, log_of(self._output, run.name), self._environment, (self._lock,))
        self.running.append(_Child(run, process, time.monotonic()))

    def ended(self) -> list[RunOutcome]:
        """Outcomes of those that ended since the last call."""
        ended = [child for child in self.running if child.process.poll() is not None]
        self.running = [child for child in self.running if child not in ended]
        return [outcome_of(self._output, child.run.name, child.process.returncode, time.monotonic() - child.started)
                for child in ended]

    def end(self, grace_seconds: float) -> None:
        """End all, and wait for them."""
        for child in self.running:
            child.signal(signal.SIGTERM)
        deadline = time.monotonic() + grace_seconds
        for child in self.running:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning("%s did not end within %g s and is killed", child.run.name, grace_seconds)
                child.signal(signal.SIGKILL)
                child.process.wait()


class _Ending:
    """Notes the signals that ask this process to end; raises what they mean once the block is left.

    Not in the middle of whatever runs, where a process just started would be forgotten. Signals that were ignored
    (nohup) stay so. Outside the main thread signals can't be caught and are not.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Ending:
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
    """The folder for one sweep alone, as long as the context or any process that was given the descriptor lives."""
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
    """Whether the run is done; refuses one that was done with other settings, by whomever."""
    summary = _summary(folder)
    if summary is None:
        return False
    remedy = f"{folder} holds a finished run of other settings; remove it, or give another folder"
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
