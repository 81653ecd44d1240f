"""Runs a sweep as jobs of a SLURM cluster, through submitit (the extra ``cluster``).

Each job runs the same command as a local sweep (see ``runs.process``). submitit passes jobs through pickles, in a new
folder for each submission that only its owner can access, so a job never loads a pickle of somebody else's sweep.

Job settings are ``slurm`` in the sweep file and ``--slurm NAME=VALUE`` on the command line, with the names of
``sbatch``'s long options, underscores for hyphens; they apply to each run:

.. code-block:: yaml

    slurm:
      partition: gpu
      time: 480                # minutes; default: 24 hours
      gpus_per_node: 1
      cpus_per_task: 8
      mem: 64GB
      array_parallelism: 4     # jobs of an array at a time
      max_num_timeout: 5       # times that a run is queued again and resumed after its time limit (default 3)
      signal_delay_s: 120      # seconds of warning before the time limit (default 90)
      setup: [module load cuda]                           # shell commands before the run
      additional_parameters: {reservation: mine}          # any other option of sbatch
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from ...utils.files import atomic_write
from ...utils.yaml import read_yaml
from ..process import RunJob
from ..schema import SUMMARY
from .checks import as_list, as_mapping, as_text, as_whole
from .local import PROGRAM, log_of, open_sweep
from .record import Run, Sweep

if TYPE_CHECKING:
    import submitit

logger = logging.getLogger(__name__)

FOLDER: Final = "submitit"
JOBS: Final = "jobs.json"
_INSTALL: Final = "pip install 'sphere-easyedit[cluster]'"
# A sweep's folder may come from anybody, so jobs.json is checked.
_FOLDER_NAME: Final = re.compile(r"[0-9]{8}-[0-9]{6}-\w+")
_JOB_ID: Final = re.compile(r"[0-9]+(_[0-9]+)?")

TIME: Final = "time"
TIMEOUTS: Final = "max_num_timeout"
MINUTES: Final = 24 * 60  # submitit's own default is 5

_OF_SWEEPS: Final = ("nodes", "ntasks", "ntasks_per_node")
_LISTS: Final = ("setup", "srun_args")


def check_slurm(value: Any, where: str) -> dict[str, Any]:
    """Job settings under the names that submitit knows, and refuses others when jobs are submitted.

    Raises:
        ValueError: not a mapping, a name that a sweep sets itself, or ``time`` is not a number of minutes.
    """
    found: dict[str, Any] = {}
    for key, item in as_mapping(value, where).items():
        name = as_text(key, where).replace("-", "_")
        if name in _OF_SWEEPS:
            raise ValueError(f"{where} holds {key}: remove it, a run is one process")
        if name == TIME:
            minutes = int(item) if isinstance(item, str) and item.isdecimal() else item
            item = as_whole(minutes, f"{where}.{TIME}, in minutes,", 1)
        elif name == TIMEOUTS:
            item = as_whole(item, f"{where}.{TIMEOUTS}", 0)
        found[name] = as_list(item) if name in _LISTS else item
    return found


def parse_slurm(options: Sequence[str]) -> dict[str, Any]:
    """Job settings of the options ``--slurm NAME=VALUE``, values as YAML; the last of a name counts.

    Raises:
        ValueError: as ``check_slurm``; or an option has no ``=``.
    """
    found: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--slurm {option!r} has no '=': write NAME=VALUE")
        name = name.strip().replace("-", "_")
        # YAML reads 4:00:00 as a number to base 60.
        given = value.strip() if name == TIME else read_yaml(value, f"--slurm {option!r}")
        found |= check_slurm({name: given}, "--slurm")
    return found


@dataclass(frozen=True)
class Submission:
    """State of one run after ``submit_sweep``.

    Attributes:
        status: ``present``: already finished; ``submitted``: by this call; ``under way``: submitted before, and still
            queued or running.
        job: SLURM's job id, ``NUMBER`` or ``ARRAY_NUMBER``; None for a finished run.
    """

    name: str
    status: Literal["present", "submitted", "under way"]
    job: str | None


def submit_sweep(sweep: Sweep, output: str | Path, settings: Mapping[str, Any] | None = None,
                 program: Sequence[str] = PROGRAM) -> tuple[Submission, ...]:
    """Submit the runs that are neither finished nor under way as one job array, and return.

    Called again, it submits runs that have failed since. ``collect`` makes the table at any time.

    Args:
        sweep: from ``load_sweep``. Runs can only be added to a folder's sweep.
        output: the sweep's folder, on a file system shared by all nodes.
        settings: job settings from ``check_slurm``; None: the sweep's own.
        program: command that the run's arguments are appended to.

    Returns:
        One for each run, in the sweep's order.

    Raises:
        ValueError: as ``run_sweep``; submitit is not installed, this machine has no SLURM, or SLURM refuses the jobs.
    """
    library, output = _submitit(), Path(output)
    for command in ("sbatch", "srun"):
        if shutil.which(command) is None:
            raise ValueError(f"{command} is not on PATH: --launcher slurm must run where jobs can be submitted, such "
                             "as a login node")
    with open_sweep(sweep, output) as (present, _):
        jobs = _read_jobs(output)
        known_jobs = _jobs(library, output, {name: job for name, job in jobs.items() if name not in present})
        under_way = {name for name, job in known_jobs.items() if not job.done()}
        for name in sorted(under_way):
            if known_jobs[name].state == "UNKNOWN":
                logger.warning("sacct does not list job %s of %s, so it counts as under way: if it is not, remove %s",
                               jobs[name].job_id, name, output / JOBS)
        if waiting := [run for run in sweep.runs if run.name not in present | under_way]:
            jobs |= _submit(library, output, sweep.slurm if settings is None else settings, waiting, program)
            with atomic_write(output / JOBS) as temporary:
                temporary.write_text(json.dumps({name: asdict(job) for name, job in jobs.items()}, indent=1),
                                     encoding="utf-8")
    return tuple(Submission(run.name, "present", None) if run.name in present else
                 Submission(run.name, "under way" if run.name in under_way else "submitted", jobs[run.name].job_id)
                 for run in sweep.runs)


@dataclass(frozen=True)
class _SubmittedJob:
    """A job: its submission's folder in ``output/submitit``, and its id."""

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
    try:
        executor.update_parameters(**parameters)
    except ValueError as error:  # its further lines list all names with their defaults
        raise ValueError(f"slurm: {str(error).splitlines()[0]}: give names of sbatch's options that submitit knows, "
                         "and others under additional_parameters") from error
    whole = output.absolute()
    calls = [RunJob([*program, *run.arguments(output / run.name)], log_of(whole, run.name), whole / run.name / SUMMARY,
                    Path.cwd()) for run in runs]
    try:
        jobs = executor.submit_array(calls)
    except RuntimeError as error:  # its text holds the error of sbatch
        raise ValueError(f"SLURM refused {runs[0].name}{' and others' if len(runs) > 1 else ''}: {error}") from error
    return {run.name: _SubmittedJob(folder.name, job.job_id) for run, job in zip(runs, jobs, strict=True)}


def _jobs(library: Any, output: Path, submitted: Mapping[str, _SubmittedJob]) -> dict[str, submitit.Job[None]]:
    """submitit's jobs by run name; make all before querying one, since the first query fetches the states of all."""
    return {name: library.SlurmJob(output / FOLDER / job.folder, job.job_id) for name, job in submitted.items()}


def _read_jobs(output: Path) -> dict[str, _SubmittedJob]:
    """Jobs that were submitted, by their runs' names.

    Raises:
        ValueError: the file is damaged, or not from a sweep.
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
    raise ValueError(f"{path} is not a list of submitted jobs: remove it, once squeue shows none of this sweep"
                     ) from error


def _submitit() -> Any:
    try:
        return importlib.import_module("submitit")
    except ImportError as error:
        raise ValueError(f"--launcher slurm needs submitit: {_INSTALL}") from error
