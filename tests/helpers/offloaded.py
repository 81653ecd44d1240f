"""Models whose weights lie on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import sphere_easyedit as sphere
from helpers.models import tiny_hparams, tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny model by its family, and beside it one for statistics."""
    root = tmp_path_factory.mktemp("saved")

    def of(family: str) -> Path:
        folder = root / family
        if not folder.exists():
            tiny_model(family).save_pretrained(folder)
        return folder

    return of


def hparams_for(folder: Path, **changes: Any) -> sphere.SPHEREHyperParams:
    return tiny_hparams(folder.parent / f"of-{folder.name}", **{"v_num_grad_steps": 4, "mom2_n_samples": 4, **changes})


def load(folder: Path, **options: Any) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def split(folder: Path, disk: tuple[int, ...] = (1, 2, 3), rest: str = "cpu", **options: Any) -> nn.Module:
    """The model with some blocks on disk; ``rest`` is where all else is (tied weights together)."""
    plain = tiny_model(folder.name)
    inner = getattr(plain, plain.base_model_prefix)
    blocks = "h" if hasattr(inner, "h") else "layers"
    devices = {f"{plain.base_model_prefix}.{name}": rest for name, _ in inner.named_children() if name != blocks}
    devices |= {f"{plain.base_model_prefix}.{blocks}.{i}": "disk" if i in disk else "cpu" for i in range(4)}
    return load(folder, device_map={**devices, "lm_head": rest}, **options)


def stored(model: nn.Module, hparams: sphere.SPHEREHyperParams) -> dict[int, Tensor]:
    """The weights that the next forward pass computes with, taken from inside of it."""
    found: dict[int, Tensor] = {}
    names = hparams.module_names(model.config)
    handles = []
    for layer in hparams.layers:
        module = model.get_submodule(names.rewrite_module_tmp.format(layer))
        inside = vars(module).get("_old_forward", module.forward)

        def forward(*args: Any, layer: int = layer, module: Any = module, inside: Any = inside) -> Any:
            found[layer] = module.weight.detach().clone()
            return inside(*args)

        handles.append((module, "_old_forward" if "_old_forward" in vars(module) else "forward", inside))
        setattr(module, handles[-1][1], forward)
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]))
    for module, name, inside in handles:
        setattr(module, name, inside)
    return found

