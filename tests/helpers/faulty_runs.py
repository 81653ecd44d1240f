"""A run with checkpoints, and the state that a failure must leave."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import sphere_easyedit as sphere
from helpers.models import tiny_model
from sphere_easyedit.editing.checkpoints import save_checkpoint


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def checkpointed(folder: Path, hparams: sphere.SPHEREHyperParams, *numbers: int) -> nn.Module:
    """A model with checkpoints after the given numbers of edits; a small constant is added for each edit."""
    model = tiny_model("llama")
    editable = hparams.editable(model)
    session = sphere.EditSession.of(model)
    session.bind(editable, hparams)
    for number in numbers:
        for layer in editable.layers:
            editable.set_weight(layer, editable.weight(layer) + 0.01)
        session.commit(editable, number - session.num_edits, {}, {}, {})
        save_checkpoint(editable, session, folder)
    return model

