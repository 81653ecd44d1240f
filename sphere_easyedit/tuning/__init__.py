"""Search for hyperparameters of a base method on facts that are held out from the final measurement (docs/howto/tune.md)."""

from .search import Tuner, TuneSettings

__all__ = ["TuneSettings", "Tuner"]
