"""Finds a decoder's blocks, down-projections, final norm and LM head in its module tree, without a table of models.

Names used throughout: a *block* is one decoder layer; its *mixer* is the module that moves information between tokens
(attention, state-space or convolution); its *down-projection* is its MLP's last linear map, whose weight is edited.

The down-projection of a block is searched among its linear modules, except those inside mixers, inside routed experts
and beside routed experts in one module (routers, projections to the experts' width). It maps the MLP's inner width
``m`` to the hidden size ``h``, and another linear module maps ``h`` to ``m`` or, with gate and value in one weight, to
``2 m``. If several fit (adapters, per-layer inputs, an MLP whose inner width is the hidden size), ``_PREFERENCES``
decides; if several still remain, the block is ambiguous and refused.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from .config_fields import hidden_size, num_blocks, text_config
from .model_class import check_decoder, meta_model

logger = logging.getLogger(__name__)


_HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "num_key_value_heads", "head_dim")
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class ModuleNames:
    """Module names of a decoder's parts, under EasyEdit's hyperparameter names; ``{}`` stands for the layer number."""

    rewrite_module_tmp: str
    layer_module_tmp: str
    mlp_module_tmp: str
    attn_module_tmp: str
    ln_f_module: str
    lm_head_module: str


def module_names(config: PretrainedConfig, layers: Sequence[int] = ()) -> ModuleNames:
    """Module names of a decoder by its config alone, from a model on the meta device.

    Args:
        config: of any causal language model, or of a multimodal wrapper around one, that transformers has a class for.
        layers: layers to be edited, for models whose layers name their MLPs differently.

    Raises:
        ValueError: it is not a decoder, transformers has no class for it, or a part is not found; the six names must
            then be given in the hyperparameters.
    """
    return decoder_parts(meta_model(config)).names(layers)


def model_module_names(model: nn.Module, layers: Sequence[int] = ()) -> ModuleNames:
    """Module names of a loaded model, whose architecture transformers need not know.

    Raises:
        ValueError: a part is not found.
    """
    return decoder_parts(model).names(layers)


@dataclass(frozen=True)
class DecoderParts:
    """The parts of a decoder that were found in its module tree.

    Attributes:
        model: name of the model's class.
        blocks: name of the list of blocks.
        downs: layers by the down-projection's name inside their block.
        attentions: layers by the attention module's name.
        mixers: layers by the name of any other mixer.
        routed: layers whose only MLP is routed experts.
        shared: layers whose down-projection shares its weight with another layer.
        ambiguous: names of the possible down-projections, by layer with more than one.
        final_norm, head: names of the norm before the LM head, and of the LM head.
    """

    model: str
    blocks: str
    num_blocks: int
    downs: Mapping[str, tuple[int, ...]]
    attentions: Mapping[str, tuple[int, ...]]
    mixers: Mapping[str, tuple[int, ...]]
    routed: tuple[int, ...]
    shared: tuple[int, ...]
    ambiguous: Mapping[int, str]
    final_norm: str
    head: str

    def options(self) -> list[str]:
        """Names of down-projections inside blocks: the most frequent first, then the least nested."""
        return sorted(self.downs, key=lambda down: (-len(self.downs[down]), down.count("."), down))

    def names(self, layers: Sequence[int] = ()) -> ModuleNames:
        """Module names with the down-projection that most of these layers have (of all layers, if none are given).

        Raises:
            ValueError: no layer has a down-projection that can be edited.
        """
        if not self.downs:
            raise ValueError(f"{self.model} can't be edited: {self.missing(range(self.num_blocks))}")
        options = self.options()
        best = max(options, key=lambda down: len({*layers} & {*self.downs[down]}))  # the first on a tie
        return self.names_at(best)

    def names_at(self, down: str) -> ModuleNames:
        """Module names with this down-projection, one of ``options()``."""
        block = f"{self.blocks}.{{}}"
        layers = self.downs[down]
        # Blocks of hybrids have attention or another mixer, or neither where a block is an MLP alone.
        mixer = next((place for among in (layers, range(self.num_blocks)) for places in (self.attentions, self.mixers)
                      if (place := _most_frequent(places, among)) is not None), None)
        parent = down.rpartition(".")[0]
        # Without an MLP module the down-projection stands for it: its output is the MLP's.
        return ModuleNames(
            rewrite_module_tmp=f"{block}.{down}", layer_module_tmp=block, mlp_module_tmp=f"{block}.{parent or down}",
            attn_module_tmp=block if mixer is None else f"{block}.{mixer}", ln_f_module=self.final_norm,
            lm_head_module=self.head)

    def missing(self, layers: Sequence[int]) -> str:
        """Why these layers have no editable down-projection, and which layers have one."""
        has = {layer: down for down, having in self.downs.items() for layer in having}
        reasons = [("have routed experts, which can't be edited", [i for i in layers if i in self.routed]),
                   ("share their MLP's weights with other layers", [i for i in layers if i in self.shared])]
        reasons += [(f"have several possible down-projections ({several})",
                     [i for i in layers if self.ambiguous.get(i) == several])
                    for several in dict.fromkeys(self.ambiguous.values())]
        reasons += [(f"have their down-projection at {down}", [i for i in layers if has.get(i) == down])
                    for down in self.options()]
        explained = {i for _, those in reasons for i in those}
        reasons.append(("have no MLP", [i for i in layers if i not in explained]))
        parts = [f"layers {_numbers(those)} {why}" for why, those in reasons if those]
        parts += [f"layers with {down}: {_numbers(self.downs[down], brackets=False)}" for down in self.options()]
        return "; ".join(parts)


def _numbers(layers: Sequence[int], brackets: bool = True) -> str:
    """Layer numbers for a message; as ranges if there are more than seven."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1 and len(layers) > 7:
            runs[-1] = [runs[-1][0], layer]
        else:
            runs.append([layer])
    text = ", ".join("-".join(map(str, run)) for run in runs)
    return f"[{text}]" if brackets else text


def _most_frequent(places: Mapping[str, tuple[int, ...]], layers: Sequence[int]) -> str | None:
    counts = {place: len({*layers} & {*having}) for place, having in places.items()}
    return max(counts, key=counts.__getitem__) if counts and any(counts.values()) else None


def decoder_parts(model: nn.Module) -> DecoderParts:
    """Find the parts of a decoder in its module tree.

    Raises:
        ValueError: the blocks, the final norm or the LM head are not found, or several fit equally well.
    """
    config: Any = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise ValueError(f"{type(model).__name__} has no transformers config: give a causal language model")
    check_decoder(config)
    width = hidden_size(config)
    modules = dict(model.named_modules(remove_duplicate=False))
    inputs = input_embeddings(model)
    name = _block_list(model, modules, num_blocks(config), inputs)
    found = [_block_parts(block, width) for block in _children(modules[name]).values()]
    downs, ambiguous = _down_projections(found, _inner_widths(config))
    shared = _shared_weights(downs)
    head = _head_name(model, modules, name)
    return DecoderParts(
        model=type(model).__name__, blocks=name, num_blocks=len(found),
        downs=_layers_by({i: down[0] for i, down in downs.items() if i not in shared}),
        attentions=_layers_by({i: next(iter(parts.attentions), None) for i, parts in enumerate(found)}),
        mixers=_layers_by({i: next(iter(parts.mixers), None) for i, parts in enumerate(found)}),
        routed=tuple(i for i, parts in enumerate(found) if parts.routed and i not in downs and i not in ambiguous),
        shared=tuple(shared), ambiguous=ambiguous,
        final_norm=_final_norm(model, modules, name, head, width), head=head)


def _layers_by(names: Mapping[int, str | None]) -> dict[str, tuple[int, ...]]:
    layers: dict[str, tuple[int, ...]] = {}
    for layer, name in names.items():
        if name is not None:
            layers[name] = (*layers.get(name, ()), layer)
    return layers


def _children(module: nn.Module) -> dict[str, nn.Module]:
    """Child modules by name; a module registered under several names appears under each."""
    return {name: child for name, child in module._modules.items() if child is not None}


def _linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """Input and output width of a linear module (also ``Conv1D`` and quantised ones); None for any other module."""
    if isinstance(module, Conv1D):
        rows, columns = module.weight.shape
        return int(rows), int(columns)
    widths = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if not all(isinstance(width, int) for width in widths):
        return None
    if any(_linear_widths(child) is not None for child in module.children()):  # an adapter around a linear module
        return None
    return widths  # type: ignore[return-value]


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """A model's token embeddings; None if it has no such getter."""
    return _embeddings(model, "get_input_embeddings")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """A model's LM head, or None."""
    return _embeddings(model, "get_output_embeddings")


def _embeddings(model: nn.Module, getter: str) -> nn.Module | None:
    try:
        found: object = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _block_list(model: nn.Module, modules: Mapping[str, nn.Module], blocks: int, inputs: nn.Module | None) -> str:
    """Name of the list of decoder blocks: the outermost list of that length, nearest to the token embeddings.

    A vision tower may have as many blocks of the same width, but no token embeddings beside it.
    """
    numbers = [str(i) for i in range(blocks)]
    lists = [name for name, module in modules.items()
             if name and list(_children(module)) == numbers and _holds_linear(module)]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    embeddings = [name for name, module in modules.items() if module is inputs]
    near = {name: max((_common_depth(name, other) for other in embeddings), default=0) for name in outermost}
    best = [name for name in outermost if near[name] == max(near.values())]
    if len(best) != 1:
        lengths = {name: len(module) for name, module in modules.items()
                   if isinstance(module, nn.ModuleList) and len(module)}
        others = best or [f"{name} ({length})" for name, length in lengths.items()
                          if not any(name.startswith(f"{other}.") for other in lengths)]
        raise ValueError(f"{type(model).__name__} has {'several lists' if best else 'no list'} of {blocks} decoder "
                         f"blocks ({', '.join(others)}): give its module names in the hyperparameters")
    return best[0]


def _holds_linear(module: nn.Module) -> bool:
    return any(_linear_widths(inner) is not None for inner in module.modules())


def _common_depth(one: str, other: str) -> int:
    depth = 0
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        depth += 1
    return depth


_Linear = tuple[str, nn.Module, int, int]


@dataclass
class _BlockParts:
    """Parts of one block: linear maps ``(name, module, d_in, d_out)`` outside mixers and experts; names of mixers."""

    width: int
    linears: list[_Linear] = field(default_factory=list)
    attentions: list[str] = field(default_factory=list)
    mixers: list[str] = field(default_factory=list)
    routed: bool = False


def _block_parts(block: nn.Module, width: int) -> _BlockParts:
    parts = _BlockParts(width)
    _collect_parts(block, "", parts)
    return parts


def _collect_parts(module: nn.Module, prefix: str, parts: _BlockParts) -> None:
    own: list[_Linear] = []
    routed = False
    for name, child in _children(module).items():
        path, widths = f"{prefix}{name}", _linear_widths(child)
        if widths is not None:
            own.append((path, child, *widths))
        elif _is_mixer(name, child, parts.width):
            (parts.attentions if _is_attention(name, child) else parts.mixers).append(path)
        elif _is_routed(name, child, module, parts.width):
            routed = True
        else:
            _collect_parts(child, f"{path}.", parts)
    if routed:
        parts.routed = True
    else:
        parts.linears.extend(own)


def _is_mixer(name: str, module: nn.Module, width: int) -> bool:
    """Whether a module mixes tokens: by name, a head count, a convolution, or maps such as q, k, v and o."""
    if not _holds_linear(module):  # such as a norm named after attention
        return False
    children = _children(module).values()
    if _is_attention(name, module) or any(isinstance(child, _CONVOLUTIONS) for child in children):
        return True
    if any(isinstance(getattr(module, count, None), int) for count in _HEAD_COUNTS):
        return True
    maps = [widths for child in children if (widths := _linear_widths(child)) is not None]
    return len(maps) > 3 and sum(d_in == width for d_in, _ in maps) >= 3  # an MLP has three: gate, value and output


def _is_attention(name: str, module: nn.Module) -> bool:
    """Whether a mixer is attention, by its name or its class; mixers with convolutions are not."""
    kind = type(module).__name__
    named = _ATTENTION.search(name) or (
        _ATTENTION.search(kind) and not re.search("layer|block", kind, re.IGNORECASE))
    return bool(named) and not any(isinstance(child, _CONVOLUTIONS) for child in _children(module).values())


def _is_routed(name: str, module: nn.Module, parent: nn.Module, width: int) -> bool:
    """Whether a module holds routed experts: by name, or by having as many parts as a router beside it has rows."""
    if "shared" not in name.lower() and "expert" in f"{name} {type(module).__name__}".lower():
        return True
    rows = {parameter.shape[0] for sibling in _children(parent).values() if sibling is not module
            for parameter in sibling.parameters() if parameter.dim() == 2 and parameter.shape[1] == width}
    rows |= {parameter.shape[0] for parameter in parent.parameters(recurse=False)
             if parameter.dim() == 2 and parameter.shape[1] == width}
    rows -= {1}  # a single output gates one expert and routes nothing
    if isinstance(module, nn.ModuleList):
        return len(module) in rows and all(_holds_linear(part) for part in module)
    return any(parameter.dim() == 3 and parameter.shape[0] in rows and width in parameter.shape[1:]
               for parameter in module.parameters(recurse=False))


_Down = tuple[str, nn.Module]
# Tests that choose among several candidates, each given as (name, inner width); one that none passes is skipped.
_PREFERENCES: tuple[tuple[str, Callable[[str, int, Collection[int], int], bool]], ...] = (
    ("has the inner width that the config names", lambda _name, d_in, named, _widest: d_in in named),
    ("is in a module of its own", lambda name, _d_in, _named, _widest: "." in name),
    ("has the widest input", lambda _name, d_in, _named, widest: d_in == widest),
)
_INNER_WIDTH = re.compile(r"intermediate|inner|ffn|feed_?forward|mlp", re.IGNORECASE)


def _inner_widths(config: PretrainedConfig) -> set[int]:
    """All config values that may be the inner width of an MLP."""
    found: set[int] = set()
    for name, value in vars(text_config(config)).items():
        if _INNER_WIDTH.search(name):
            found.update(item for item in (value if isinstance(value, (list, tuple)) else [value])
                         if type(item) is int and item > 1)
    return found


def _down_projections(blocks: Sequence[_BlockParts], named: Collection[int]) -> tuple[dict[int, _Down], dict[int, str]]:
    """The down-projection of each block that has one, and the candidates' names of each block that has several."""
    downs: dict[int, _Down] = {}
    ambiguous: dict[int, str] = {}
    logged: set[str] = set()
    for layer, parts in enumerate(blocks):
        inner = {name: d_in for name, _, d_in, d_out in parts.linears if d_out == parts.width and any(
            other != name and (start, end) in ((parts.width, d_in), (parts.width, 2 * d_in))
            for other, _, start, end in parts.linears)}
        if not inner:
            continue
        left, why = _preferred(inner, named)
        if len(left) > 1:
            ambiguous[layer] = ", ".join(left)
            continue
        downs[layer] = left[0], next(module for name, module, *_ in parts.linears if name == left[0])
        line = f"{left[0]} is edited, since it {why} (candidates: {', '.join(inner)})"
        if why and line not in logged:
            logged.add(line)
            logger.info("%s", line)
    return downs, ambiguous


def _preferred(inner: Mapping[str, int], named: Collection[int]) -> tuple[list[str], str]:
    """The candidates (with their inner widths) that pass the preferences, and the last preference that decided."""
    left, why = list(inner), ""
    for reason, holds in _PREFERENCES:
        widest = max(inner[name] for name in left)
        passing = [name for name in left if holds(name, inner[name], named, widest)]
        if passing and len(passing) < len(left):
            left, why = passing, reason
    if len(left) > 1 and len({name.rpartition(".")[0] for name in left}) == 1:
        left, why = left[-1:], "is registered last"  # in an MLP whose inner width is the hidden size
    return left, why


def _shared_weights(downs: Mapping[int, _Down]) -> list[int]:
    """Layers whose down-projection shares its weight with another layer."""
    layers = defaultdict(list)
    for layer, (_, module) in downs.items():
        weight: Any = getattr(module, "weight", None)
        layers[id(weight) if isinstance(weight, Tensor) else id(module)].append(layer)
    return sorted(layer for several in layers.values() if len(several) > 1 for layer in several)


def _head_name(model: nn.Module, modules: Mapping[str, nn.Module], blocks: str) -> str:
    """Name of the LM head, the model's output embeddings."""
    head = output_embeddings(model)
    found = next((name for name, module in modules.items() if module is head), None)
    if found is None or found.startswith(f"{blocks}."):
        raise ValueError(f"{type(model).__name__} has no LM head (get_output_embeddings): give a causal language model")
    return found


def _final_norm(model: nn.Module, modules: Mapping[str, nn.Module], blocks: str, head: str, width: int) -> str:
    """Name of the norm between the last block and the LM head.

    It is a norm of the hidden size beside the list of blocks, or beside a module that contains that list. The last one
    registered after the blocks is preferred; one registered before them counts only if there is no other.
    """
    parent = blocks.rpartition(".")[0]
    while True:
        siblings = _children(modules[parent])
        names = list(siblings)
        own = blocks[len(parent) + 1 if parent else 0:].split(".")[0]
        norms = [name for name in names if _is_norm(siblings[name], width)]
        after = [name for name in norms if names.index(name) > names.index(own)]
        chosen = after[-1:] or (norms if len(norms) == 1 else [])
        if chosen:
            if len(after) > 1:
                logger.info("of the norms %s after the blocks, %s is taken as the final one: it is registered last",
                            ", ".join(after), chosen[0])
            return f"{parent}.{chosen[0]}" if parent else chosen[0]
        if norms or not parent:
            raise ValueError(f"{type(model).__name__} has no norm between its last block and its LM head"
                             f"{' (candidates: ' + ', '.join(norms) + ')' if norms else ''}: give its module names in "
                             "the hyperparameters")
        parent = parent.rpartition(".")[0]


def _is_norm(module: nn.Module, width: int) -> bool:
    """Whether a module is a norm over vectors of this width."""
    if not re.search("norm", type(module).__name__, re.IGNORECASE) or _children(module):
        return False
    weight: Any = getattr(module, "weight", None)
    return not isinstance(weight, Tensor) or tuple(weight.shape) == (width,)
