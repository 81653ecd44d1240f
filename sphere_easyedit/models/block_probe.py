"""Runs a decoder block with changes added to the output of its edited linear map.

Shape legend: B rows of T tokens; d the width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .architecture import EditableModel
from .replay import as_rows, first_input


@dataclass(frozen=True)
class ProbeRun:
    """One run of a block.

    Attributes:
        output: ``(B, T, d)``.
        y: ``(B, T, d)``, the edited map's output before anything was added to it.
        traced: input and output ``(B, T, ...)`` of the modules that ran after the edited map, by name within the block.
    """

    output: Tensor
    y: Tensor
    traced: dict[str, tuple[Tensor, Tensor]]


class BlockProbe:
    """Runs one block with a change added to the output of its edited map.

    Args:
        run: runs the block and returns its output.
    """

    def __init__(self, editable: EditableModel, layer: int, run: Callable[[], Tensor]) -> None:
        self.block, self._module = editable.block(layer), editable.down_projection(layer)
        self.name = editable.names.rewrite_module_tmp.format(layer)
        self.block_name = editable.names.layer_module_tmp.format(layer)
        self._width, self._run = editable.hidden_size, run

    def run(self, added: Tensor | None = None, trace: bool = False) -> ProbeRun:
        """Run the block, with ``added`` ``(B, T, d)`` on top of the map's output.

        Raises:
            ValueError: the map does not run once for each token, or its width is not that of the residual stream.
        """
        map_outputs: list[Tensor] = []
        traced: dict[str, tuple[Tensor, Tensor]] = {}

        def at_map(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            map_outputs.append(output)
            return None if added is None else output + added.to(output).reshape(output.shape)

        def tracer(name: str) -> Any:
            after_map: list[bool] = []

            def before(_module: nn.Module, _args: Any) -> None:
                after_map.append(bool(map_outputs))

            def after(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                entered = first_input(args, kwargs)
                if after_map.pop() and isinstance(entered, Tensor) and isinstance(output, Tensor):
                    traced[name] = entered, output

            return before, after

        handles = [self._module.register_forward_hook(at_map)]
        for name, module in self.block.named_modules() if trace else ():
            if module is not self._module:
                before, after = tracer(name)
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after, with_kwargs=True))
        try:
            output = self._run()
        finally:
            for handle in handles:
                handle.remove()
        self._check(output, map_outputs)
        rows, tokens = output.shape[:2]
        by_token = {name: (as_rows(u, rows, tokens, name), as_rows(n, rows, tokens, name))
                    for name, (u, n) in traced.items()
                    if u.shape[:-1].numel() == n.shape[:-1].numel() == rows * tokens}
        return ProbeRun(output, as_rows(map_outputs[0], rows, tokens, self.name), by_token)

    def _check(self, output: Any, map_outputs: list[Tensor]) -> None:
        if not isinstance(output, Tensor) or output.dim() != 3 or output.shape[-1] != self._width:
            raise ValueError(f"{self.block_name} returns hidden states of shape {tuple(output.shape)} where "
                             f"(rows, tokens, {self._width}) is expected: this architecture is not supported")
        if len(map_outputs) != 1:
            raise ValueError(f"{self.name} runs {len(map_outputs)} times in {self.block_name}, not once: correct "
                             "rewrite_module_tmp")
        if map_outputs[0].shape[-1] != self._width:
            raise ValueError(f"{self.name} returns {map_outputs[0].shape[-1]} numbers per token, but the residual "
                             f"stream has {self._width}: give the linear map that ends the feed-forward network as "
                             "rewrite_module_tmp")


def probe_step(run: ProbeRun, seed: int) -> Tensor:
    """Random signs ``(B, T, d)``, scaled at each token to the size of the states there, so well above rounding."""
    size = torch.maximum(run.output.float().square().mean(dim=-1, keepdim=True),
                         run.y.float().square().mean(dim=-1, keepdim=True)).sqrt()
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, run.output.shape, generator=generator, dtype=torch.int8) * 2 - 1
    return (size * signs.to(size)).to(run.output.dtype)
