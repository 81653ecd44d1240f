"""Access to a decoder's blocks, its edited weights and its logits, whatever the architecture.

Names used throughout: a *block* is one decoder layer, the *down-projection* is the second linear map of its
feed-forward network, whose weight is edited. Weights are returned as ``(d_out, d_in)`` with neurons as rows, however
the module stores them; GPT-2's ``Conv1D`` stores the transpose.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from ..utils.locks import exclusive
from ..utils.messages import nearest
from .config_fields import hidden_size, num_blocks, text_config
from .logit_map import LogitMap
from .module_discovery import ModuleNames, decoder_parts, input_embeddings
from .offload import execution_device, offloaded_weight, reload_for_backward
from .quantization import check_editable, dequantise

logger = logging.getLogger(__name__)

# Config attributes that hold the longest context, by architecture.
_CONTEXT_LIMITS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length",
                   "max_target_positions", "n_ctx", "context_length")


def max_positions(config: PretrainedConfig) -> int | None:
    """Longest context in tokens according to the config, or None if it has no limit."""
    config = text_config(config)
    for name in _CONTEXT_LIMITS:
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:  # XLNet's -1 means no limit
            return limit
    return None


def input_device(model: nn.Module) -> torch.device:
    """Device that a model expects token ids on: where its embedding layer computes."""
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    device: torch.device = embeddings.weight.device
    return execution_device(model, embeddings) or device


class EditableModel:
    """A decoder whose blocks, norm, head and edited weights are accessible by layer number, in one orientation.

    Weights that accelerate offloaded are read and written where they are stored (see ``offload``). Edited layers that
    bitsandbytes quantised are replaced in the model by unquantised ones (see ``quantised``).

    Args:
        model: a causal language model of transformers.
        names: module names of its parts.
        layers: numbers of the blocks to edit, ascending.

    Raises:
        ValueError: a named module does not exist, a layer is out of range, or a weight can't be edited (quantised by
            another library, or on the meta device without an offloading hook).
    """

    def __init__(self, model: nn.Module, names: ModuleNames, layers: list[int]) -> None:
        self.model = model
        self.names = names
        self.layers = list(layers)
        self.config: PretrainedConfig = model.config  # type: ignore[assignment]
        self.num_blocks = num_blocks(self.config)
        outside = [layer for layer in self.layers if not 0 <= layer < self.num_blocks]
        if outside or not self.layers:
            raise ValueError(
                f"layers {self.layers} do not fit a model of {self.num_blocks} layers: "
                f"give numbers from 0 to {self.num_blocks - 1}"
            )
        if sorted(set(self.layers)) != self.layers:
            raise ValueError(f"layers {self.layers} must ascend without repetition: residuals are spread from "
                             "the first to the last")
        self._modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
        self.final_norm = self._module(names.ln_f_module)
        self.lm_head = self._module(names.lm_head_module)
        self.logit_map = LogitMap()  # replaced by what `logit_map.find_logit_map` finds
        edited = [names.rewrite_module_tmp.format(layer) for layer in self.layers]
        self._check_layers()
        for layer, name in zip(self.layers, edited, strict=True):
            self._check_weight(name)
            self._check_shared(layer)
        self._modules |= dequantise(model, edited)
        self._offloaded = {layer: offloaded for layer in self.layers
                           if (offloaded := offloaded_weight(model, self.parameter_name(layer))) is not None}

    def _check_layers(self) -> None:
        """Refuse layers without an MLP that can be edited, and say why they have none."""
        template = self.names.rewrite_module_tmp
        missing = [layer for layer in self.layers if template.format(layer) not in self._modules]
        if not missing:
            return
        try:
            parts = decoder_parts(self.model)
        except ValueError:  # `_module` then reports the unknown name
            return
        others = any(template.format(layer) in self._modules for layer in range(self.num_blocks))
        if others or not any(set(missing) & set(having) for having in parts.downs.values()):
            raise ValueError(f"{template} is not in layers {missing}: {parts.missing(missing)}")

    def _module(self, name: str) -> nn.Module:
        if name not in self._modules:
            near = nearest(name, self._modules)
            hint = f"; nearest is {near[0]!r}" if near else ""
            raise ValueError(f"{type(self.model).__name__} has no module {name!r}{hint}. "
                             "Correct the module names in the hyperparameters")
        return self._modules[name]

    def _check_weight(self, name: str) -> None:
        weight = getattr(self._module(name), "weight", None)
        check_editable(self.model, name)
        if weight.is_meta and offloaded_weight(self.model, f"{name}.weight") is None:  # type: ignore[union-attr]
            raise ValueError(f"{name}.weight is offloaded (on the meta device) without a hook of accelerate that loads "
                             f"it: load the model so that the edited layers {self.layers} are in memory, or offload "
                             "it with accelerate (device_map, cpu_offload, disk_offload)")

    def _check_shared(self, layer: int) -> None:
        """Refuse a weight that other blocks share: an edit of one block would change them all."""
        weight = self._placeholder(layer)
        others = [other for other in range(self.num_blocks) if other != layer and getattr(
            self._modules.get(self.names.rewrite_module_tmp.format(other)), "weight", None) is weight]
        if others:
            raise ValueError(f"{self.parameter_name(layer)} is shared with blocks {others}, which would change with "
                             "it: edit a layer whose weight is not shared")

    def block(self, layer: int) -> nn.Module:
        """Decoder block number ``layer``."""
        return self._module(self.names.layer_module_tmp.format(layer))

    def down_projection(self, layer: int) -> nn.Module:
        """The module whose weight is edited at ``layer``."""
        return self._module(self.names.rewrite_module_tmp.format(layer))

    def parameter_name(self, layer: int) -> str:
        """EasyEdit's name of the edited weight."""
        return f"{self.names.rewrite_module_tmp.format(layer)}.weight"

    @property
    def offloaded_layers(self) -> list[int]:
        """The edited layers whose weights accelerate keeps outside the model."""
        return list(self._offloaded)

    def parameter(self, layer: int) -> Tensor:
        """The edited weight as the module stores it; writing into it changes the model.

        Raises:
            ValueError: it is offloaded in a way that does not allow changes (see ``OffloadedWeight.writable``).
        """
        offloaded = self._offloaded.get(layer)
        stored: Tensor = self._placeholder(layer) if offloaded is None else offloaded.writable()
        return stored

    def _placeholder(self, layer: int) -> Tensor:
        weight: Tensor = self.down_projection(layer).weight  # type: ignore[assignment]
        return weight

    def is_transposed(self, layer: int) -> bool:
        """Whether the module stores ``(d_in, d_out)``: by its type, since a square weight's shape does not tell."""
        return isinstance(self.down_projection(layer), Conv1D)

    def orient(self, layer: int, stored: Tensor) -> Tensor:
        """View of a stored weight (or its change) as ``(d_out, d_in)``; a second call undoes the first."""
        return stored.T if self.is_transposed(layer) else stored

    def weight(self, layer: int) -> Tensor:
        """The edited weight, detached, as a view of shape ``(d_out, d_in)``: rows are neurons.

        If offloaded, a copy on the device where its module computes, unless it is stored there.
        """
        stored, offloaded = self.parameter(layer).detach(), self._offloaded.get(layer)
        return self.orient(layer, stored if offloaded is None else stored.to(offloaded.device))

    def device(self, layer: int) -> torch.device:
        """Device of ``weight``, found without loading an offloaded one."""
        offloaded = self._offloaded.get(layer)
        return self._placeholder(layer).device if offloaded is None else offloaded.device

    def weights(self) -> dict[int, Tensor]:
        """All edited weights by layer, as returned by ``weight``."""
        return {layer: self.weight(layer) for layer in self.layers}

    @torch.no_grad()
    def set_weight(self, layer: int, value: Tensor) -> None:
        """Overwrite the edited weight in place with ``value`` ``(d_out, d_in)`` of any float dtype."""
        self.parameter(layer).copy_(self.orient(layer, value))

    @contextmanager
    def restoring(self, always: bool = False) -> Iterator[dict[int, Tensor]]:
        """Copies of the edited weights by layer, restored bit for bit if the context ends in an error, or always."""
        before = {layer: weight.clone() for layer, weight in self.weights().items()}
        restored = True
        try:
            yield before
            restored = always
        finally:  # also after an interrupt
            if restored:
                for layer, weight in before.items():
                    self.set_weight(layer, weight)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return hidden_size(self.config)

    def d_in(self, layer: int) -> int:
        """Width of the down-projection's input, the space of keys."""
        return int(self.orient(layer, self._placeholder(layer)).shape[1])  # a placeholder has the shape

    @property
    def input_device(self) -> torch.device:
        """Device that the model expects token ids on."""
        return input_device(self.model)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(n, vocabulary)`` in float32 of last-block outputs ``hidden`` ``(n, hidden_size)``."""
        return self.logit_map.logits(hidden, self.final_norm, self.lm_head)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients inside the context; both restored after it.

    Other threads that use the same model wait until the context ends (see ``exclusive``). Graphs built inside do not
    keep offloaded weights in memory (see ``offload.reload_for_backward``). The result of a call does not depend on
    the lengths of earlier calls (see ``_frequencies_by_call``).

    Raises:
        ValueError: inside the context, if the model gets a token id beyond its embedding.
    """
    with exclusive(model):
        modes = {module: module.training for module in model.modules()}
        # By module and name: each forward pass replaces an offloaded weight's placeholder.
        flags = [(module, name, parameter.requires_grad) for module in modes
                 for name, parameter in module.named_parameters(recurse=False)]
        try:
            model.eval()
            for module, name, _ in flags:
                module.get_parameter(name).requires_grad_(False)
            with reload_for_backward(model), _frequencies_by_call(model), _token_ids_checked(model):
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module, name, flag in flags:
                parameter = getattr(module, name, None)
                if parameter is not None:
                    parameter.requires_grad_(flag)


@contextmanager
def _token_ids_checked(model: nn.Module) -> Iterator[None]:
    """Refuse token ids beyond the model's embedding, which are an IndexError on CPUs and abort the process on GPUs."""
    embeddings = input_embeddings(model)
    if not isinstance(embeddings, nn.Embedding):
        yield
        return
    handle = embeddings.register_forward_pre_hook(_check_input)
    try:
        yield
    finally:
        handle.remove()


def _check_input(embeddings: nn.Module, args: tuple[Any, ...]) -> None:
    if args and not args[0].is_meta and args[0].numel():
        _check_within(embeddings, int(args[0].max()))


def check_token_ids(model: nn.Module, largest: int) -> None:
    """Refuse token ids beyond a model's embedding, given the largest of them (ValueError)."""
    embeddings = input_embeddings(model)
    if isinstance(embeddings, nn.Embedding):
        _check_within(embeddings, largest)


def _check_within(embeddings: Any, largest: int) -> None:
    size = max(embeddings.num_embeddings, len(embeddings.weight))  # the weight may have been replaced, or be packed
    if largest >= size:
        raise ValueError(f"token id {largest} is beyond the model's embedding of {size} tokens: give the tokenizer "
                         "that belongs to this model")


@contextmanager
def _frequencies_by_call(model: nn.Module) -> Iterator[None]:
    """Reset dynamic rotary embeddings before every call.

    Those of the type ``dynamic`` keep the frequencies of the longest call so far, so that results would depend on it.
    """
    dynamic = [module for module in model.modules() if "dynamic" in str(getattr(module, "rope_type", ""))]
    handles = [module.register_forward_pre_hook(_reset_frequencies) for module in dynamic]
    try:
        yield
    finally:
        for handle, module in zip(handles, dynamic, strict=True):
            handle.remove()
            _reset_frequencies(module)


def _reset_frequencies(module: Any, *_: Any) -> None:
    for name in {*vars(module), *dict(module.named_buffers(recurse=False))}:
        if name.endswith("original_inv_freq"):  # prefixed with the layer type if there are several
            start, original = name.removesuffix("original_inv_freq"), getattr(module, name)
            setattr(module, f"{start}inv_freq", original.to(getattr(module, f"{start}inv_freq").device))
            setattr(module, f"{start}max_seq_len_cached", module.original_max_seq_len)


def logits_at(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, columns: Tensor,
              **given: Any) -> Tensor:
    """Next-token logits at chosen positions only, by the model's own head.

    The positions are selected before the LM head, so the ``(batch, tokens, vocabulary)`` tensor is never formed;
    scaling and soft capping of the logits still apply.

    Args:
        input_ids, attention_mask: ``(batch, tokens)``, padded on the right.
        rows, columns: ``(n,)`` indices of the positions.
        given: further arguments of the model.

    Returns:
        ``(n, vocabulary)`` in float32.
    """
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]

    def select(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[rows.to(hidden.device), columns.to(hidden.device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(select)
    try:
        logits: Tensor = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **given).logits
    finally:
        handle.remove()
    return logits[0].float()
