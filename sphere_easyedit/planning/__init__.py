"""What a run will need before it starts: time, memory, disk, downloads. The facts behind ``sphere-easyedit plan``.

Work is counted in FLOPs (a multiplication with its addition is two), from a model's shapes and the token counts of the
facts alone, so that a model can be planned from its config, without weights. A short calibration then runs a little of
every kind of work on this machine and the model itself, and gives the rate of each kind, by the same counts: what a
count leaves out (starting kernels, elementwise work) is in the rate. Rates of one matrix product would predict worse,
since a step of few tokens runs at a half of them.

``batches``: what the optimiser runs together. ``counts``: FLOPs. ``sizes``: bytes. ``shapes``, ``facts``,
``inventory``: what both are counted from. ``calibration``: rates. ``times``, ``memory``, ``files``: the parts of a
plan. ``plan``: all of it.
"""

from .plan import make_plan
from .results import DiskItem, Download, MemoryItem, Plan, PlanSettings, TimePart

__all__ = ["DiskItem", "Download", "MemoryItem", "Plan", "PlanSettings", "TimePart", "make_plan"]
