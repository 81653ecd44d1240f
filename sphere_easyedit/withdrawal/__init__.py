"""Single facts taken back out of edited weights: the factors of every batch, kept while editing, and the algebra.

See docs/EXPORT.md for what it does and what it does not claim.
"""

from .algebra import LayerStatement
from .factors import FactorKeeper
from .facts import Fact
from .withdrawing import Withdrawal, withdraw

__all__ = ["Fact", "FactorKeeper", "LayerStatement", "Withdrawal", "withdraw"]
