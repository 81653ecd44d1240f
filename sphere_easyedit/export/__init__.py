"""What leaves the house: the whole edited model, its change as deltas, and a LoRA adapter, each in a folder of its own.

A lower room's weights in formats that others read; see docs/EXPORT.md.
"""

from .deltas import Deltas, apply_deltas, read_deltas
from .edited import EditedWeights, ExportableRun, Provenance, WeightChange
from .exports import export_adapter, export_applied, export_deltas, export_model
from .fingerprint import base_fingerprint

__all__ = [
    "Deltas",
    "EditedWeights",
    "ExportableRun",
    "Provenance",
    "WeightChange",
    "apply_deltas",
    "base_fingerprint",
    "export_adapter",
    "export_applied",
    "export_deltas",
    "export_model",
    "read_deltas",
]
