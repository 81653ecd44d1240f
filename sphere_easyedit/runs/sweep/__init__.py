"""Sweeps: many runs from one YAML file, one process a run, resumable, collected into one table.

``spec``: the file; ``grid``: its runs and their names. ``record``: what a sweep's folder keeps of them. ``runs``: the
processes. ``slurm`` and ``cluster``: runs as jobs of SLURM. Tables of their results are made by
``analysis.sweep_table``.
"""

from .cluster import Submission, submit_sweep, wait_for_jobs
from .record import Run, Sweep
from .runs import RunOutcome, SweepResult, run_sweep
from .slurm import parse_slurm
from .spec import load_sweep

__all__ = ["Run", "RunOutcome", "Submission", "Sweep", "SweepResult", "load_sweep", "parse_slurm", "run_sweep",
           "submit_sweep", "wait_for_jobs"]
