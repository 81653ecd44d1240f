"""A sweep's runs as jobs of a SLURM cluster, by submitit (the extra ``cluster``).

Each job runs the command that a local sweep runs, see ``run_process``. Pickles are written for the jobs and read by
them alone; each submission has a new, empty folder of its owner alone for them, so that a job can't find one that came
with somebody else's sweep.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from ...utils.files import atomic_write
from ..process import RunJob
from ..schema import SUMMARY
from .record import Run, Sweep
from .runs import PROGRAM, OnStatus, RunOutcome, SweepResult, log_of, opened, outcome_of
from .slurm import MINUTES, TIMEOUTS

if TYPE_CHECKING:
    import submitit

logger = logging.getLogger(__name__)

FOLDER: Final = "submitit"
JOBS: Final = "jobs.json"
_INSTALL: Final = "pip install 'sphere-easyedit[cluster]'"
_POLL_SECONDS: Final = 2.0
# A sweep's folder may come from anybody.
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


def submit_sweep(sweep: Sweep, output: str | Path, settings: Mapping[str, Any] | None = None,
                 program: Sequence[str] = PROGRAM) -> tuple[Submission, ...]:
    """Submit to SLURM, as one job array, the runs that are neither finished nor under way, and return.

    Called again, it submits what has failed since. ``collect`` makes the table at any time, ``wait_for_jobs`` waits.

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
    with opened(sweep, output) as (present, _):
        jobs = _read_jobs(output)
        asked = _jobs(library, output, {name: job for name, job in jobs.items() if name not in present})
        under_way = {name for name, job in asked.items() if not job.done()}
        for name in sorted(under_way):
            if asked[name].state == "UNKNOWN":
                logger.warning("sacct knows nothing of job %s of %s, which is taken as under way: if it is not, remove "
                               "%s", jobs[name].job_id, name, output / JOBS)
        if waiting := [run for run in sweep.runs if run.name not in present | under_way]:
            jobs |= _submit(library, output, sweep.slurm if settings is None else settings, waiting, program)
            with atomic_write(output / JOBS) as temporary:
                temporary.write_text(json.dumps({name: asdict(job) for name, job in jobs.items()}, indent=1),
                                     encoding="utf-8")
    return tuple(Submission(run.name, "present", None) if run.name in present else
                 Submission(run.name, "under way" if run.name in under_way else "submitted", jobs[run.name].job_id)
                 for run in sweep.runs)


def wait_for_jobs(sweep: Sweep, output: str | Path, on_status: OnStatus | None = None,
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
                if on_status is not None:
                    on_status(run.name, outcome.status, len(outcomes), len(sweep.runs))
        if not waiting:
            return SweepResult(tuple(outcomes[run.name] for run in sweep.runs))
        time.sleep(poll_seconds)


@dataclass(frozen=True)
class _SubmittedJob:
    """Where a job is found: its submission's folder in ``output/submitit``, and its id."""

    folder: str
    job_id: str


def _submit(library: Any, output: Path, settings: Mapping[str, Any], runs: Sequence[Run], program: Sequence[str]
            ) -> dict[str, _SubmittedJob]:
    """Submit runs as one array; returns their jobs by the runs' names."""
    parent = output / FOLDER
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=time.strftime("%Y%m%d-%H%M%S-"), dir=parent)).absolute()
    parameters = {"job_name": f"sphere-{output.absolute().name}", "time": MINUTES, "stderr_to_stdout": True, **settings}
    executor = library.SlurmExecutor(folder, max_num_timeout=parameters.pop(TIMEOUTS, 3))
    executor.update_parameters(**parameters)
    whole = output.absolute()
    calls = [RunJob([*program, *run.arguments(output / run.name)], log_of(whole, run.name), whole / run.name / SUMMARY,
                    Path.cwd()) for run in runs]
    try:
        jobs = executor.submit_array(calls)
    except RuntimeError as error:  # what sbatch complains of is in its text
        raise ValueError(f"SLURM refused {runs[0].name}{' and others' if len(runs) > 1 else ''}: {error}") from error
    return {run.name: _SubmittedJob(folder.name, job.job_id) for run, job in zip(runs, jobs, strict=True)}


def _jobs(library: Any, output: Path, submitted: Mapping[str, _SubmittedJob]) -> dict[str, submitit.Job[None]]:
    """Jobs of submitit by their runs' names; to be made before the first is asked for, which asks for all at once."""
    return {name: library.SlurmJob(output / FOLDER / job.folder, job.job_id) for name, job in submitted.items()}


def _read_jobs(output: Path) -> dict[str, _SubmittedJob]:
    """Jobs that were submitted, by their runs' names.

    Raises:
        ValueError: the file is there and is none of ours.
    """
    path = output / JOBS
    if not path.exists():
        return {}
    try:
        found = {name: _SubmittedJob(**job) for name, job in json.loads(path.read_text(encoding="utf-8")).items()}
        if all(_FOLDER_NAME.fullmatch(job.folder) and _JOB_ID.fullmatch(job.job_id) for job in found.values()):
            return found
        error: Exception | None = None
    except (ValueError, TypeError, AttributeError) as caught:
        error = caught
    raise ValueError(f"{path} does not say which jobs run: remove it, once squeue shows none of this sweep") from error


def _submitit() -> Any:
    try:
        return importlib.import_module("submitit")
    except ImportError as error:
        raise ValueError(f"--launcher slurm needs submitit: {_INSTALL}") from error
