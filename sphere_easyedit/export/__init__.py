"""Exports of a run's edited weights: the whole model, deltas to the base model, or a LoRA adapter (docs/EXPORT.md)."""

from .checksums import base_fingerprint
from .deltas import Deltas, apply_deltas, read_deltas
from .edited import EditedWeights, ExportableRun, Provenance, WeightChange
from .exports import export_adapter, export_applied, export_deltas, export_model

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
