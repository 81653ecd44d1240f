"""Sweeps: many runs from one YAML file, one process a run, resumable, collected into one table.

``spec``: the file; ``grid`` and ``names``: its runs. ``record``: what a sweep's folder keeps of them. ``runs``: the
processes. ``results``: what a run directory says. ``pairs``: differences between runs that share all but one thing.
``table``: all of it as CSV and Markdown.
"""

from .record import Run, Sweep
from .runs import RunOutcome, SweepResult, run_sweep
from .spec import load_sweep
from .table import SweepTable, collect, compare

__all__ = ["Run", "RunOutcome", "Sweep", "SweepResult", "SweepTable", "collect", "compare", "load_sweep", "run_sweep"]
