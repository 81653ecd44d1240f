"""Predict the time, memory, disk space and downloads of a run before it starts (``sphere-easyedit plan``).

Time is scaled from a few edits on this machine (``calibration``), memory and files from the sizes of tensors.
"""

from .plan import make_plan
from .results import DiskItem, Download, MemoryItem, Plan, PlanSettings, TimePart

__all__ = ["DiskItem", "Download", "MemoryItem", "Plan", "PlanSettings", "TimePart", "make_plan"]
