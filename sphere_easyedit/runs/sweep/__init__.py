"""Sweeps: many runs from one YAML file, one process per run, resumable, collected into one table.

``spec`` reads the file, ``grid`` expands it to runs and names them, ``record`` keeps the runs in the sweep's folder,
``local`` and ``slurm`` run them. ``analysis.sweep_table`` makes tables of the results.
"""

from .local import RunOutcome, SweepResult, run_sweep
from .record import Run, Sweep
from .slurm import Submission, parse_slurm, submit_sweep
from .spec import load_sweep

__all__ = ["Run", "RunOutcome", "Submission", "Sweep", "SweepResult", "load_sweep", "parse_slurm", "run_sweep",
           "submit_sweep"]
