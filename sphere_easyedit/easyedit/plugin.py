"""Registers SPHERE, PRUNE and RECT with EasyEdit.

It changes EasyEdit's ``ALG_DICT`` (in place) and ``BatchEditor.is_batchable_method``, and nothing else.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from ..editing.pipeline import apply_sphere_to_model
from ..hparams import SPHERE, SPHEREHyperParams
from ..methods.registry import METHODS
from .discovery import batch_editor, load_easyedit

logger = logging.getLogger(__name__)


class RegisteredExecutor:
    """An entry of ``ALG_DICT`` under one of our names; ``replaced`` is the entry that it replaced, or None."""

    def __init__(self, replaced: Any = None) -> None:
        self.replaced = replaced

    def __call__(self, model: nn.Module, tok: PreTrainedTokenizerBase, requests: Sequence[Mapping[str, Any]],
                 hparams: Any, copy: bool = False, return_orig_weights: bool = False, **kwargs: Any
                 ) -> tuple[nn.Module, dict[str, Tensor]]:
        """``apply_sphere_to_model``, for EasyEdit's own hyperparameter objects too."""
        if dataclasses.is_dataclass(hparams) and not isinstance(hparams, type | SPHEREHyperParams):
            hparams = SPHEREHyperParams.from_dict(dataclasses.asdict(hparams))
        return apply_sphere_to_model(model, tok, requests, hparams, copy, return_orig_weights, **kwargs)


def register() -> None:
    """Make EasyEdit know SPHERE, PRUNE and RECT. Safe to call twice; ``unregister`` undoes it.

    EasyEdit's own SPHERE (AlphaEdit only, one edit at a time) is replaced.

    Raises:
        ImportError: there is no EasyEdit, or an old one.
        ValueError: one of the names is taken by something else; nothing was registered.
    """
    package = load_easyedit()
    algorithms = package.ALG_DICT
    names = [name for name in (SPHERE, *METHODS.offered_to_easyedit)
             if not isinstance(algorithms.get(name), RegisteredExecutor)]
    for name in names:
        entry = algorithms.get(name)
        is_easyedits = str(getattr(entry, "__module__", "")).startswith(f"{package.__name__}.models.")
        if name in algorithms and not (name == SPHERE and is_easyedits):
            raise ValueError(f"EasyEdit's ALG_DICT already has {name!r}, from {getattr(entry, '__module__', entry)}: "
                             "remove it, or unregister what put it there")
    for name in names:
        if name in algorithms:
            logger.warning("EasyEdit's own %s is replaced by sphere_easyedit's; unregister() restores it", name)
        algorithms[name] = RegisteredExecutor(algorithms.get(name))
    editor = batch_editor(package)
    installed = vars(editor)["is_batchable_method"]
    if not isinstance(installed, _Batchable):
        editor.is_batchable_method = _Batchable(installed)


def unregister() -> None:
    """Undo ``register``. Without effect if nothing is registered."""
    package = sys.modules.get("easyeditor")
    if package is None or not isinstance(getattr(package, "ALG_DICT", {}).get(SPHERE), RegisteredExecutor):
        return
    algorithms = package.ALG_DICT
    for name, entry in list(algorithms.items()):
        if isinstance(entry, RegisteredExecutor):
            if entry.replaced is None:
                del algorithms[name]
            else:
                algorithms[name] = entry.replaced
    editor = batch_editor(package)
    installed = vars(editor)["is_batchable_method"]
    if isinstance(installed, _Batchable):
        editor.is_batchable_method = installed.replaced


class _Batchable(staticmethod):  # type: ignore[type-arg]
    """``BatchEditor.is_batchable_method``, with our names added."""

    def __init__(self, replaced: staticmethod) -> None:  # type: ignore[type-arg]
        def is_batchable_method(alg_name: str) -> bool:
            return alg_name in (SPHERE, *METHODS.offered_to_easyedit) or bool(replaced.__func__(alg_name))

        super().__init__(is_batchable_method)
        self.replaced = replaced
