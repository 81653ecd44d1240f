"""ReplayFT: fine-tuning of the edited weights with replay of earlier facts (see ``editing.fine_tuning``)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar

from .base import FineTuningMethod


class ReplayFT(FineTuningMethod):
    """Mini-batch fine-tuning over the batch's and earlier facts, with a KL term on ordinary text."""

    name = "ReplayFT"
    starting_values: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {"ft_lr": 0.001, "ft_epochs": 10, "ft_batch_size": 50, "replay_ratio": 1.0, "kl_factor": 10.0})
