"""Remove single facts from edited weights, by the factors of every batch kept while editing (docs/EXPORT.md)."""

from .factors import Fact, FactorKeeper
from .removing import LayerReport, Removal, remove_facts

__all__ = ["Fact", "FactorKeeper", "LayerReport", "Removal", "remove_facts"]
