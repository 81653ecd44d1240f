"""Tiny models with known answers, for tests of metrics."""

from __future__ import annotations

import copy
from typing import Any

import torch

from helpers.models import tiny_model


def built(family: str) -> Any:
    return tiny_model(family, **{"n_positions" if family == "gpt2" else "max_position_embeddings": 256})


def edited(model: Any) -> Any:
    """A copy of the model with perturbed weights."""
    changed = copy.deepcopy(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, weight in changed.named_parameters():
            if "mlp" in name and weight.dim() == 2:
                weight += 0.1 * weight.std() * torch.randn_like(weight)
    return changed

