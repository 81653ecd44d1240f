"""A sweep's runs as jobs of submitit (the extra ``cluster``): on a SLURM cluster, or on this machine to try that out.

Each job runs the very command that a sweep of this machine runs, see ``cluster_job``. Pickles are written for the jobs
and read by them alone; each submission has a new, empty folder of its owner alone for them, so that a job can't find
one that came with somebody's sweep.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from ...files import atomic_write
from ..cluster_job import RunJob
from ..run_directory import SUMMARY
from .record import Run, Sweep
from .runs import PROGRAM, Pool, Progress, RunOutcome, SweepResult, log_of, opened, outcome_of
from .slurm import FURTHER, MINUTES, TIME, TIMEOUTS

if TYPE_CHECKING:
    import submitit

logger = logging.getLogger(__name__)

FOLDER: Final = "submitit"
JOBS: Final = "jobs.json"
_INSTALL: Final = "pip install 'sphere-easyedit[cluster]'"
_POLL_SECONDS: Final = 2.0
# What is in a sweep's folder may be anybody's.
_FOLDER_NAME: Final = re.compile(r"[0-9]{8}-[0-9]{6}-\w+")
_JOB_ID: Final = re.compile(r"[0-9]+(_[0-9]+)?")


@dataclass(frozen=True)
class Submission:
    """What became of a run that a cluster is to run.

    Attributes:
        status: ``present``: it is finished; ``submitted`` now; ``under way``: before, and still queued or running.
        job: SLURM's id, ``NUMBER`` or ``ARRAY_NUMBER``; None if it is finished.
    """

    name: str
    status: Literal["present", "submitted", "under way"]
    job: str | None


def local_jobs(settings: Mapping[str, Any]) -> Callable[[Path, tuple[str, ...], int, int], Pool]:
    """The ``pool`` of ``run_sweep`` in which submitit's local executor starts the runs.

    Of ``settings`` (see ``slurm``) time, gpus_per_node, signal_delay_s and max_num_timeout count. As on a cluster, a
    run sees as many GPUs as it asks for, none if it does not.

    Raises:
        ValueError: submitit is not installed.
    """
    _submitit()
    return partial(_LocalJobs, settings)


def submit_sweep(sweep: Sweep, output: str | Path, settings: Mapping[str, Any] | None = None,
                 program: Sequence[str] = PROGRAM) -> tuple[Submission, ...]:
    """Submit to SLURM what of the sweep is neither finished nor under way, and return.

    Runs go out as one job array; those that follow a run which is not finished as an array of their own that waits for
    it, and is cancelled if it fails. Called again, it submits what has failed since. ``collect`` makes the table at any
    time, ``wait_for_jobs`` waits.

    Args:
        sweep: of ``load_sweep``. A folder's sweep may only grow.
        output: the sweep's folder, which all nodes see.
        settings: what each job asks for, of ``check_slurm``; the sweep's own if None.
        program: what is run, in front of a run's arguments.

    Returns:
        In the sweep's order.

    Raises:
        ValueError: as ``run_sweep``; submitit is not installed, this machine has no SLURM, or SLURM refuses the jobs.
    """
    library, output = _submitit(), Path(output)
    for command in ("sbatch", "srun"):
        if shutil.which(command) is None:
            raise ValueError(f"{command} is not on PATH: --launcher slurm works where jobs are submitted, on a login "
                             "node, say")
    settings = sweep.slurm if settings is None else settings
    with opened(sweep, output) as (present, _):
        jobs = _read_jobs(output)
        asked = _jobs(library, output, {name: place for name, place in jobs.items() if name not in present})
        under_way = {name for name, job in asked.items() if not job.done()}
        for name in sorted(under_way):
            if asked[name].state == "UNKNOWN":
                logger.warning("sacct knows nothing of job %s of %s, which is taken as under way: if it is not, remove "
                               "%s", jobs[name].job_id, name, output / JOBS)
        groups: dict[str | None, list[Run]] = {None: []}  # by the run that they wait for; those that edit come first
        for run in sweep.runs:
            if run.name not in present | under_way:
                groups.setdefault(None if run.follows in present else run.follows, []).append(run)
        for leader, runs in groups.items():
            if runs:
                jobs |= _submit(library, output, settings, None if leader is None else jobs[leader], runs, program)
                _write_jobs(output, jobs)  # at once: the next group may be refused
    return tuple(Submission(run.name, "present", None) if run.name in present else
                 Submission(run.name, "under way" if run.name in under_way else "submitted", jobs[run.name].job_id)
                 for run in sweep.runs)


def wait_for_jobs(sweep: Sweep, output: str | Path, progress: Progress | None = None,
                  poll_seconds: float = _POLL_SECONDS) -> SweepResult:
    """Wait until the jobs of ``submit_sweep`` have ended. They go on if this is interrupted.

    Raises:
        ValueError: submitit is not installed.
    """
    library, output = _submitit(), Path(output)
    started = time.monotonic()
    outcomes: dict[str, RunOutcome] = {}
    waiting = _jobs(library, output, _read_jobs(output))
    while True:
        waiting = {name: job for name, job in waiting.items() if not job.done()}
        for run in sweep.runs:
            if run.name not in outcomes and run.name not in waiting:
                outcome = outcome_of(output, run.name, None, time.monotonic() - started)
                if outcome.status == "failed" and not outcome.tail:
                    outcome = replace(outcome, tail="its job ended before it said anything: `sacct` says why")
                outcomes[run.name] = outcome
                if progress is not None:
                    progress(run.name, outcome.status, len(outcomes), len(sweep.runs))
        if not waiting:
            return SweepResult(tuple(outcomes[run.name] for run in sweep.runs))
        time.sleep(poll_seconds)


class _LocalJobs:
    """A ``Pool`` of submitit's local jobs, in the form of ``run_sweep``."""

    def __init__(self, settings: Mapping[str, Any], output: Path, program: tuple[str, ...], threads: int, lock: int
                 ) -> None:
        self.running: list[tuple[Run, submitit.Job[None], float]] = []
        self._settings, self._output, self._program, self._threads = settings, output, program, threads

    @cached_property
    def _executor(self) -> submitit.LocalExecutor:
        made: submitit.LocalExecutor = _submitit().LocalExecutor(_new_folder(self._output),
                                                                 max_num_timeout=self._settings.get(TIMEOUTS, 3))
        own = {name: self._settings[name] for name in ("gpus_per_node", "signal_delay_s") if name in self._settings}
        made.update_parameters(timeout_min=self._settings.get(TIME, MINUTES), stderr_to_stdout=True, **own)
        return made

    def start(self, run: Run) -> None:
        with _interruptible():
            job = self._executor.submit(_job(run, self._output, self._program, self._threads))
        self.running.append((run, job, time.monotonic()))

    def ended(self) -> list[RunOutcome]:
        ended = [one for one in self.running if one[1].done()]
        self.running = [one for one in self.running if one not in ended]
        return [outcome_of(self._output, run.name, None, time.monotonic() - started) for run, _, started in ended]

    def end(self, grace_seconds: float) -> None:
        for _, job, _ in self.running:
            job.cancel()
        deadline = time.monotonic() + grace_seconds
        while self.running and time.monotonic() < deadline:
            self.ended()
            time.sleep(0.1)
        for run, job, _ in self.running:
            logger.warning("%s did not end within %g s: job %s", run.name, grace_seconds, job.job_id)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Processes that are started heed SIGINT, which is how submitit cancels: a shell's background jobs ignore it."""
    ours = threading.current_thread() is threading.main_thread()  # others can't set it
    ignored = ours and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _submit(library: Any, output: Path, settings: Mapping[str, Any], after: _Place | None, runs: Sequence[Run],
            program: Sequence[str]) -> dict[str, _Place]:
    """Submit runs as one array, which starts once a job came to a good end; say where they are by name."""
    folder = _new_folder(output)
    parameters = {"job_name": f"sphere-{output.absolute().name}", "time": MINUTES, "stderr_to_stdout": True, **settings}
    timeouts = parameters.pop(TIMEOUTS, 3)
    if after is not None:
        parameters["dependency"] = f"afterok:{after.job_id}"
        # Else it would wait for ever for a job that failed.
        parameters[FURTHER] = {"kill-on-invalid-dep": "yes", **parameters.get(FURTHER, {})}
    executor = library.SlurmExecutor(folder, max_num_timeout=timeouts)
    executor.update_parameters(**parameters)
    try:
        jobs = executor.submit_array([_job(run, output, program) for run in runs])
    except RuntimeError as error:  # what sbatch complains of is in its text
        raise ValueError(f"SLURM refused {runs[0].name}{' and others' if len(runs) > 1 else ''}: {error}") from error
    return {run.name: _Place(folder.name, job.job_id) for run, job in zip(runs, jobs, strict=True)}


def _job(run: Run, output: Path, program: Sequence[str], threads: int | None = None) -> RunJob:
    place = output.absolute()
    return RunJob([*program, *run.arguments(output / run.name)], log_of(place, run.name), place / run.name / SUMMARY,
                  Path.cwd(), threads)


@dataclass(frozen=True)
class _Place:
    """Where a job is to be found: its submission's folder in ``output/submitit``, and its id."""

    folder: str
    job_id: str


def _jobs(library: Any, output: Path, places: Mapping[str, _Place]) -> dict[str, submitit.Job[None]]:
    """Jobs of submitit by their runs' names; to be made before the first is asked for, which asks for all at once."""
    return {name: library.SlurmJob(output / FOLDER / place.folder, place.job_id) for name, place in places.items()}


def _new_folder(output: Path) -> Path:
    """An empty folder for a submission, of its owner alone."""
    parent = output / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=parent)).absolute()


def _read_jobs(output: Path) -> dict[str, _Place]:
    """Jobs that were submitted, by their runs' names.

    Raises:
        ValueError: the file is there and is none of ours.
    """
    path = output / JOBS
    if not path.exists():
        return {}
    try:
        found = {name: _Place(**place) for name, place in json.loads(path.read_text(encoding="utf-8")).items()}
        if all(_FOLDER_NAME.fullmatch(place.folder) and _JOB_ID.fullmatch(place.job_id) for place in found.values()):
            return found
        error: Exception | None = None
    except (ValueError, TypeError, AttributeError) as caught:
        error = caught
    raise ValueError(f"{path} does not say which jobs run: remove it, once squeue shows none of this sweep") from error


def _write_jobs(output: Path, jobs: Mapping[str, _Place]) -> None:
    with atomic_write(output / JOBS) as temporary:
        temporary.write_text(json.dumps({name: asdict(place) for name, place in jobs.items()}, indent=1),
                             encoding="utf-8")


def _submitit() -> Any:
    try:
        return importlib.import_module("submitit")
    except ImportError as error:
        raise ValueError(f"--launcher needs submitit: {_INSTALL}") from error
