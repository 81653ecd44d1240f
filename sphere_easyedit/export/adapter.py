"""Writes the change that editing made, truncated to a rank, as a LoRA adapter for PEFT."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .card import LayerError
from .edited import EditedWeights
from .factors import Factors, Spectrum

_ADAPTER = "default"  # PEFT's name for a single adapter


def write_adapter(folder: Path, model: nn.Module, edited: EditedWeights, rank: int, dtype: torch.dtype = torch.float32
                  ) -> tuple[LayerError, ...]:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into an existing folder.

    ``B A`` is the best approximation of rank r of the change: A ``(r, d_in)``, B ``(d_out, r)``, whichever way the
    module stores W. lora_alpha is r, so that PEFT scales by 1.

    Args:
        model: the unedited model; stays as it is.
        edited: its edited weights.
        rank: r, for every edited layer.
        dtype: of A and B.

    Returns:
        The approximation error of each parameter.

    Raises:
        ValueError: the rank is out of range, a change is not finite, or PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ValueError(f"LoRA adapters need PEFT, which can't be imported ({error}): pip install peft") from error

    full = min(min(change.before.shape) for change in edited.changes)
    if not 1 <= rank <= full:
        raise ValueError(f"rank is {rank}: give 1 to {full}, the smaller side of the edited weights")
    layers, found = [], {}
    for change in edited.changes:
        difference = change.after.double() - change.before.double()
        if not bool(difference.isfinite().all()):
            raise ValueError(f"{change.name} has values that are not finite: export weights after fewer edits (at)")
        spectrum = Spectrum(difference.T if change.transposed else difference)
        factors = spectrum.factors(rank, dtype)
        found[change.name.removesuffix(".weight")] = factors
        layers.append(LayerError(change.name, "factors", rank, factors.relative_error, spectrum.norm))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(found), lora_dropout=0.0, bias="none",
                        fan_in_fan_out=edited.changes[0].transposed, task_type="CAUSAL_LM")
    flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    with warnings.catch_warnings():  # PEFT reads a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped: Any = get_peft_model(model, config)
    try:
        _set_factors(wrapped, found)
        # Embeddings are not edited; with the default, PEFT would look for the base model on the hub.
        wrapped.save_pretrained(folder, save_embedding_layers=False)
    finally:
        wrapped.unload()
        for name in ("peft_config", "_hf_peft_config_loaded"):
            vars(model).pop(name, None)
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
    return tuple(layers)


def _set_factors(wrapped: Any, found: dict[str, Factors]) -> None:
    modules = dict(wrapped.base_model.model.named_modules())
    for name, factors in found.items():
        modules[name].lora_A[_ADAPTER].weight.data = factors.right
        modules[name].lora_B[_ADAPTER].weight.data = factors.left
