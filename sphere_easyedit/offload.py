"""Weights that accelerate keeps on the host or on disk and lends to a module for the time of its forward pass.

Such a module holds placeholders on the meta device. Its ``AlignDevicesHook`` takes the weights from a mapping
(``weights_map``) before the forward pass, onto the device that computes, and puts placeholders in their place after it.
So whoever reads or changes an offloaded weight must go to that mapping: what is written into a placeholder is lost.

No file of the user's is ever written: the folder may hold the checkpoint itself, or weights that a later run takes for
the model's. A weight that lies on disk is copied, when its values are first wanted, to a file of our own that the
mapping prefers from then on, and that is mapped into memory: reading and changing it takes no memory that the system
could not take back, and the file is gone with the process.
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

from .mapped import mapped_copy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OffloadedWeight:
    """One offloaded parameter.

    Attributes:
        name: in the model.
        weights: the mapping that it is lent from, under ``key``.
        device: where the module computes with it.
    """

    name: str
    weights: Mapping[str, Tensor]
    key: str
    device: torch.device

    def read(self) -> Tensor:
        """As the module stores it, to be read only: a copy where it lies on disk."""
        return self.weights[self.key]

    def opened(self) -> Tensor:
        """As the module stores it, to be changed in place: the next forward pass uses what is written into it.

        Raises:
            ValueError: it lies on disk and no folder takes a copy of it, or it is held in a way that is not known.
        """
        held, key = self.weights, self.key
        while hasattr(held, "dataset") and hasattr(held, "prefix"):  # accelerate's PrefixedDataset
            held, key = held.dataset, f"{held.prefix}{key}"
        if hasattr(held, "state_dict") and hasattr(held, "save_folder"):  # its OffloadedWeightsLoader
            if key not in held.state_dict:
                held.state_dict[key] = _on_disk(self.name, held[key], held.save_folder)
            held = held.state_dict
        if not isinstance(held, dict):
            raise ValueError(f"{self.name} is offloaded into a {type(held).__name__}, which is not known to take "
                             "changes: offload it by accelerate (device_map, cpu_offload, disk_offload), or load it")
        weight: Tensor = held[key].detach()
        return weight


def offloaded_weight(model: nn.Module, name: str) -> OffloadedWeight | None:
    """The parameter called ``name``, if a hook of accelerate's lends it to its module; else None."""
    parts = name.split(".")
    for depth in range(len(parts) - 1, -1, -1):  # a hook further out may lend to all that is within
        module = model.get_submodule(".".join(parts[:depth]))
        for hook in _lending_hooks(module):
            if depth == len(parts) - 1 or hook.place_submodules:
                return OffloadedWeight(name, hook.weights_map, ".".join(parts[depth:]), _execution_device(hook))
    return None


def distinct_names(model: nn.Module) -> list[str]:
    """Names of all parameters, tied ones once, under the first of their names, be they offloaded or not.

    Of offloaded ones each name has a placeholder of its own, so whether they are tied is not told by the parameters.
    """
    names = [name for name, _ in model.named_parameters()]
    tied: Any = getattr(model, "all_tied_weights_keys", None)  # a dict since transformers 5
    if not isinstance(tied, dict):
        tied = dict.fromkeys(getattr(model, "_tied_weights_keys", None) or ()) \
            if getattr(getattr(model, "config", None), "tie_word_embeddings", False) else {}
    return [name for name in names if name not in tied or offloaded_weight(model, name) is None]


def kept_buffers(model: nn.Module) -> list[str]:
    """Names of the buffers that a checkpoint keeps, such as those that hold weights of some quantised layers."""
    return [f"{prefix}.{leaf}".lstrip(".") for prefix, module in model.named_modules()
            for leaf, buffer in module._buffers.items()
            if buffer is not None and leaf not in module._non_persistent_buffers_set]


def offloaded_names(model: nn.Module) -> list[str]:
    """Names of all parameters that are offloaded."""
    return [name for name, _ in model.named_parameters() if offloaded_weight(model, name) is not None]


def live_parameter(model: nn.Module, name: str) -> Tensor:
    """The parameter called ``name``, detached, to be read and changed in place wherever it lies.

    Raises:
        ValueError: see ``OffloadedWeight.opened``; or it has no values at all (on the meta device, and no hook).
    """
    offloaded = offloaded_weight(model, name)
    if offloaded is not None:
        return offloaded.opened()
    parameter = model.get_parameter(name).detach()
    if parameter.is_meta:
        raise ValueError(f"{name} is on the meta device and nothing lends it values: load the model's weights")
    return parameter


def parameter_values(model: nn.Module, name: str) -> Tensor:
    """The parameter or buffer called ``name``, detached, to be read only; an offloaded one as it is lent.

    Raises:
        ValueError: see ``live_parameter``.
    """
    owner, _, leaf = name.rpartition(".")
    buffer = model.get_submodule(owner)._buffers.get(leaf)
    if buffer is not None and not buffer.is_meta:  # hooks may lend a module's parameters and leave its buffers
        return buffer.detach()
    offloaded = offloaded_weight(model, name)
    return live_parameter(model, name) if offloaded is None else offloaded.read().detach()


def execution_device(model: nn.Module, module: nn.Module) -> torch.device | None:
    """Where ``module``, a part of ``model``, computes with its offloaded weight; None where none is offloaded."""
    if not isinstance(weight := getattr(module, "weight", None), Tensor):
        return None
    for hook in _lending_hooks(module):
        return _execution_device(hook)
    if not weight.is_meta:
        return None
    names = [name for name, part in model.named_modules() if part is module]
    offloaded = offloaded_weight(model, f"{names[0]}.weight") if names else None
    return None if offloaded is None else offloaded.device


def _lending_hooks(module: nn.Module) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # several in a SequentialHook
    return [one for one in hooks if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None]


def _execution_device(hook: Any) -> torch.device:
    return torch.device("cpu" if hook.execution_device is None else hook.execution_device)


def _on_disk(name: str, weight: Tensor, folder: Any) -> Tensor:
    """A copy of ``weight`` in a file without a name, mapped into memory; in ``folder``, or where temporary files go."""
    failures = []
    for place in dict.fromkeys((folder, None)):
        try:
            mapped = mapped_copy(weight, place)
        except OSError as error:
            failures.append(f"{place or tempfile.gettempdir()}: {error}")
            continue
        logger.debug("%s is edited in a file of its own in %s", name, place or tempfile.gettempdir())
        return mapped
    raise ValueError(f"{name} is offloaded to disk, and no copy of it can be made to be edited "
                     f"({'; '.join(failures)}): give an offload_folder that can be written and has room")


# --- backward passes ----------------------------------------------------------------------------------------


@contextmanager
def lent_again_for_backward(model: nn.Module) -> Iterator[None]:
    """Inside, a graph does not keep matrices that were lent: the backward pass takes them from where they lie again.

    Otherwise a graph over many blocks would hold the weights of all of them, which is what offloading is to avoid.
    """
    hooks = [(module, hook) for module in model.modules() for hook in _lending_hooks(module)]
    if not hooks:
        yield
        return
    lent = _Lent()
    for module, hook in hooks:
        lent.watch(module, hook)
    try:
        with torch.autograd.graph.saved_tensors_hooks(lent.pack, lent.unpack):
            yield
    finally:
        lent.unwatch()


@dataclass(frozen=True)
class _Reference:
    """What a graph keeps in place of a matrix that was lent: where it is lent from, and how it was looked at."""

    hook: Any
    name: str
    device: torch.device
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Lent:
    """The matrices that modules have at the moment, by where their elements are."""

    def __init__(self) -> None:
        self._matrices: dict[int, tuple[Any, str, weakref.ref[Tensor]]] = {}
        self._hooks: list[tuple[Any, dict[str, Any]]] = []

    def watch(self, module: nn.Module, hook: Any) -> None:
        lend, take_back = hook.pre_forward, hook.post_forward

        def pre_forward(*args: Any, **kwargs: Any) -> Any:
            given = lend(*args, **kwargs)
            for name, parameter in module.named_parameters(recurse=hook.place_submodules):
                if parameter.dim() > 1:  # of vectors there is little to save
                    self._matrices[parameter.data_ptr()] = hook, name, weakref.ref(parameter)
            return given

        def post_forward(*args: Any, **kwargs: Any) -> Any:
            for _, parameter in module.named_parameters(recurse=hook.place_submodules):
                self._matrices.pop(parameter.data_ptr(), None)
            return take_back(*args, **kwargs)

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
        # A forward pass that broke off leaves its entries; and a part of a matrix (of several in one) is kept.
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
