"""Search for hyperparameters of a base method, measured on facts that no trial edited (docs/howto/tune.md)."""

from .search import Tuner, TuneSettings

__all__ = ["TuneSettings", "Tuner"]
