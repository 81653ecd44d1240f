"""Defaults that the command line shares with the classes it fills. Imports nothing, so that commands start quickly."""

from typing import Final

BATCH_SIZE: Final = 100  # edits
CHECKPOINT_EVERY: Final = 10  # edits
KEEP_CHECKPOINTS: Final = 1
TEXT_TOKENS: Final = 8192  # of the held-out text for perplexity
FLUENCY_TOKENS: Final = 100  # new tokens per generated text

# Of a search for hyperparameters (see ``tuning.search.TuneSettings``).
TUNE_BATCH_SIZE: Final = 10  # edits
TUNE_TEXT_TOKENS: Final = 2048
TUNE_RISE: Final = 5.0  # of perplexity against the unedited model, in percent
TUNE_LOSS: Final = 3.0  # of specificity against the unedited model, in points

# Of a repair (see ``runs.repair.RepairSettings``).
REPAIR_ROUNDS: Final = 2
REPAIR_NORM: Final = 1.2  # of the norm before it

# Of the guard (see ``callbacks.drift_guard.DriftGuard``).
GUARD_ENERGY: Final = 2.0
GUARD_NORM: Final = 1.25
GUARD_EARLY: Final = 0.5
GUARD_FACTS: Final = 20
GUARD_WARMUP: Final = 5
