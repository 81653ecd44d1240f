"""Reads and writes weights that accelerate offloaded to the host or to disk.

An offloaded module holds placeholders on the meta device. Its ``AlignDevicesHook`` loads the weights from a mapping
(``weights_map``) before the forward pass and restores the placeholders after it. Offloaded weights must therefore be
read and changed in that mapping; what is written into a placeholder is lost.

Files of the offload folder are never modified, since they may be the checkpoint itself. A weight on disk is copied on
first use to a temporary memory-mapped file, which replaces it in the mapping and is removed when the process ends.
"""

from __future__ import annotations

import logging
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..utils.memory_map import mapped_copy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OffloadedWeight:
    """An offloaded parameter.

    Attributes:
        name: its name in the model.
        weights: the mapping that stores it under ``key``.
        device: device that its module computes on.
    """

    name: str
    weights: Mapping[str, Tensor]
    key: str
    device: torch.device

    def read(self) -> Tensor:
        """The values in the stored orientation, read-only: a copy if they are on disk."""
        return self.weights[self.key]

    def writable(self) -> Tensor:
        """The stored tensor, to be changed in place: the next forward pass uses what is written into it.

        Raises:
            ValueError: it is on disk and can't be copied to any folder, or the mapping's type is unknown.
        """
        held, key = self.weights, self.key
        while hasattr(held, "dataset") and hasattr(held, "prefix"):  # accelerate's PrefixedDataset
            held, key = held.dataset, f"{held.prefix}{key}"
        if hasattr(held, "state_dict") and hasattr(held, "save_folder"):  # its OffloadedWeightsLoader
            if key not in held.state_dict:
                held.state_dict[key] = _disk_copy(self.name, held[key], held.save_folder)
            held = held.state_dict
        if not isinstance(held, dict):
            raise ValueError(f"{self.name} is offloaded into a {type(held).__name__}, which may not accept changes: "
                             "offload it with accelerate (device_map, cpu_offload, disk_offload), or load it")
        weight: Tensor = held[key].detach()
        return weight


def offloaded_weight(model: nn.Module, name: str) -> OffloadedWeight | None:
    """The parameter ``name`` if an accelerate hook loads it for its module, else None."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):  # the hook of an outer module may place its submodules too
        module = model.get_submodule(".".join(parts[:depth]))
        for hook in _offload_hooks(module):
            if depth == len(parts) - 1 or hook.place_submodules:
                return OffloadedWeight(name, hook.weights_map, ".".join(parts[depth:]), _execution_device(hook))
    return None


def distinct_names(model: nn.Module) -> list[str]:
    """Names of all parameters, offloaded or not; tied parameters once, under their first name.

    Offloaded parameters have a placeholder per name, so tying is read from the model's list of tied weights.
    """
    names = [name for name, _ in model.named_parameters()]
    tied: Any = getattr(model, "all_tied_weights_keys", None)  # a dict since transformers 5
    if not isinstance(tied, dict):
        tied = dict.fromkeys(getattr(model, "_tied_weights_keys", None) or ()) \
            if getattr(getattr(model, "config", None), "tie_word_embeddings", False) else {}
    return [name for name in names if name not in tied or offloaded_weight(model, name) is None]


def persistent_buffers(model: nn.Module) -> list[str]:
    """Names of the buffers saved in a checkpoint, such as the weights of some quantised layers."""
    return [f"{prefix}.{leaf}".lstrip(".") for prefix, module in model.named_modules()
            for leaf, buffer in module._buffers.items()
            if buffer is not None and leaf not in module._non_persistent_buffers_set]


def writable_parameter(model: nn.Module, name: str) -> Tensor:
    """The parameter ``name``, detached, to be read and changed in place, offloaded or not.

    Raises:
        ValueError: see ``OffloadedWeight.writable``; or it is on the meta device without a hook.
    """
    offloaded = offloaded_weight(model, name)
    if offloaded is not None:
        return offloaded.writable()
    parameter = model.get_parameter(name).detach()
    if parameter.is_meta:
        raise ValueError(f"{name} is on the meta device without a hook that loads it: load the model's weights")
    return parameter


def parameter_values(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer ``name``, detached, read-only, offloaded or not.

    Raises:
        ValueError: see ``writable_parameter``.
    """
    owner, _, leaf = name.rpartition(".")
    buffer = model.get_submodule(owner)._buffers.get(leaf)
    if buffer is not None and not buffer.is_meta:  # hooks may offload a module's parameters but not its buffers
        return buffer.detach()
    offloaded = offloaded_weight(model, name)
    return writable_parameter(model, name) if offloaded is None else offloaded.read().detach()


def execution_device(model: nn.Module, module: nn.Module) -> torch.device | None:
    """Device that ``module``, a part of ``model``, computes on if its weight is offloaded, else None."""
    if not isinstance(weight := getattr(module, "weight", None), Tensor):
        return None
    for hook in _offload_hooks(module):
        return _execution_device(hook)
    if not weight.is_meta:
        return None
    names = [name for name, part in model.named_modules() if part is module]
    offloaded = offloaded_weight(model, f"{names[0]}.weight") if names else None
    return None if offloaded is None else offloaded.device


def _offload_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # several in a SequentialHook
    return [one for one in hooks if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None]


def _execution_device(hook: Any) -> torch.device:
    return torch.device("cpu" if hook.execution_device is None else hook.execution_device)


def _disk_copy(name: str, weight: Tensor, folder: Any) -> Tensor:
    """A memory-mapped copy of ``weight`` in a temporary file in ``folder``, else in the system's temporary folder."""
    failures = []
    for place in dict.fromkeys((folder, None)):
        try:
            mapped = mapped_copy(weight, place)
        except OSError as error:
            failures.append(f"{place or tempfile.gettempdir()}: {error}")
            continue
        logger.debug("%s is edited in a temporary file in %s", name, place or tempfile.gettempdir())
        return mapped
    raise ValueError(f"{name} is offloaded to disk, and can't be copied for editing ({'; '.join(failures)}): give a "
                     "writable offload_folder with free space")


# --- backward passes ----------------------------------------------------------------------------------------


@contextmanager
def reload_for_backward(model: nn.Module) -> Iterator[None]:
    """Let autograd graphs built inside load offloaded matrices again in the backward pass instead of keeping them.

    Otherwise the graph of a forward pass would hold the weights of all blocks in memory.
    """
    hooks = [(module, hook) for module in model.modules() for hook in _offload_hooks(module)]
    if not hooks:
        yield
        return
    loaded = _LoadedMatrices()
    for module, hook in hooks:
        loaded.watch(module, hook)
    try:
        with torch.autograd.graph.saved_tensors_hooks(loaded.pack, loaded.unpack):
            yield
    finally:
        loaded.unwatch()


@dataclass(frozen=True)
class _Reference:
    """What a graph saves instead of an offloaded matrix: the hook that loads it, and the view that was used."""

    hook: Any
    name: str
    device: torch.device
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _LoadedMatrices:
    """Offloaded matrices that are loaded at the moment, by data pointer."""

    def __init__(self) -> None:
        self._matrices: dict[int, tuple[Any, str, weakref.ref[Tensor]]] = {}
        self._hooks: list[tuple[Any, dict[str, Any]]] = []

    def watch(self, module: nn.Module, hook: Any) -> None:
        load, unload = hook.pre_forward, hook.post_forward

        def pre_forward(*args: Any, **kwargs: Any) -> Any:
            given = load(*args, **kwargs)
            for name, parameter in module.named_parameters(recurse=hook.place_submodules):
                if parameter.dim() > 1:  # vectors take little memory
                    self._matrices[parameter.data_ptr()] = hook, name, weakref.ref(parameter)
            return given

        def post_forward(*args: Any, **kwargs: Any) -> Any:
            for _, parameter in module.named_parameters(recurse=hook.place_submodules):
                self._matrices.pop(parameter.data_ptr(), None)
            return unload(*args, **kwargs)

        own = {name: vars(hook)[name] for name in ("pre_forward", "post_forward") if name in vars(hook)}
        self._hooks.append((hook, own))
        hook.pre_forward, hook.post_forward = pre_forward, post_forward

    def unwatch(self) -> None:
        for hook, own in reversed(self._hooks):
            del hook.pre_forward, hook.post_forward
            vars(hook).update(own)
        self._hooks.clear()
        self._matrices.clear()

    def pack(self, saved: Tensor) -> Tensor | _Reference:
        found = self._matrices.get(saved.data_ptr())
        if found is None:
            return saved
        hook, name, parameter = found
        matrix = parameter()
        # An interrupted forward pass leaves stale entries; a slice of a matrix is saved itself.
        if matrix is None or matrix.numel() != saved.numel() or matrix.dtype != saved.dtype:
            return saved
        return _Reference(hook, name, saved.device, saved.dtype, tuple(saved.shape), saved.stride())

    @staticmethod
    def unpack(kept: Tensor | _Reference) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        matrix = kept.hook.weights_map[kept.name].detach().to(kept.device, kept.dtype)
        view: Tensor = matrix.as_strided(kept.size, kept.stride, matrix.storage_offset())
        return view
