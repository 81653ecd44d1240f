"""Chooses how rows are laid out in the target-value optimisation: the cheapest layout that is exact on a model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..models.architecture import EditableModel
from ..models.batching import group_by_class, length_class
from ..models.packing import packs_exactly, same_states
from ..models.replay import BlockReplay, pad_rows, prefix_key_values
from ..utils.messages import kind_and_text
from .delta_forward import DeltaForward, Layout, PromptRow
from .requests import TokenizedPrompt, TokenizedRequest

logger = logging.getLogger(__name__)


class KnownLayouts:
    """Layouts that were found exact on a model, so that it is tried once and not in every batch.

    A batch is tried again if a prompt is longer than all before, or in a length class (see ``models.batching``) that
    did not occur, or the first to begin with its subject.
    """

    def __init__(self) -> None:
        self._known: dict[object, tuple[int, Layout]] = {}

    def choose(self, editable: EditableModel, requests: Sequence[TokenizedRequest], dtype: str | None) -> Layout:
        """``choose_layout``, or what it returned before.

        Args:
            dtype: precision of the blocks above the edited one, if it is not the model's own.
        """
        prompts = [prompt for request in requests for prompt in (request.plain, *request.contexts)]
        class_of = length_class(editable.config)
        kind = (dtype, editable.layers[-1], frozenset(class_of(len(prompt.ids)) for prompt in prompts),
                any(prompt.lookup == 0 for prompt in prompts))
        longest = max(len(prompt.ids) for prompt in prompts)
        if kind not in self._known or longest > self._known[kind][0]:
            self._known[kind] = longest, choose_layout(editable, requests)
        return self._known[kind][1]


def choose_layout(editable: EditableModel, requests: Sequence[TokenizedRequest]) -> Layout:
    """The cheapest layout of these edits' rows that gives exact results on this model, which must be frozen."""
    prompts = [prompt for request in requests for prompt in (request.plain, *request.contexts)]
    class_of = length_class(editable.config)
    alike = group_by_class([len(prompt.ids) for prompt in prompts], class_of)

    def chosen(choose: Callable[..., int], among: list[int]) -> TokenizedPrompt:
        return prompts[choose(among, key=lambda i: prompts[i].lookup)]

    most = max(alike, key=len)
    longest = max((prompts[i] for i in most), key=lambda prompt: len(prompt.ids))
    if packing_is_exact(editable, list(dict.fromkeys([chosen(max, most), chosen(min, most), longest]))):
        return "packed"
    least = [index for index in alike if class_of(len(prompts[index[0]].ids)) == class_of(1)]
    return "padded" if least and prefix_is_exact(editable, chosen(max, least[0])) else "whole"


@torch.no_grad()
def packing_is_exact(editable: EditableModel, prompts: Sequence[TokenizedPrompt]) -> bool:
    """Whether prompts packed after cached keys and values give the same states as each prompt run alone."""
    stop = editable.num_blocks
    rows = [PromptRow(i, 0, prompt.ids, prompt.lookup, len(prompt.ids) - 1, (0,)) for i, prompt in enumerate(prompts)]
    rows += [PromptRow(i, -1, prompt.ids[: prompt.lookup + 1], prompt.lookup) for i, prompt in enumerate(prompts)]
    whole = [BlockReplay.record(editable, pad_rows([prompt.ids], editable.input_device), stop - 1, stop).final[0]
             for prompt in prompts]
    expected = torch.stack([states[at] for states, prompt in zip(whole, prompts, strict=True)
                            for at in (len(prompt.ids) - 1, prompt.lookup)])

    def run() -> Tensor:
        # All blocks that the optimisation runs: their attention may differ from block to block.
        forward = DeltaForward.record_packed(editable, rows, min(editable.layers[-1], stop - 2))
        last, lookup = forward.run(torch.zeros_like(forward.initial), stop - 1)
        return torch.stack([last[forward.predictions.edits.argsort()], lookup], dim=1).flatten(0, 1)

    return packs_exactly(editable.model, expected, run)


@torch.no_grad()
def prefix_is_exact(editable: EditableModel, prompt: TokenizedPrompt) -> bool:
    """Whether caching the tokens before the lookup gives the same states as running all tokens, on this model."""
    ids, cut, stop = prompt.ids, prompt.lookup, editable.num_blocks
    if cut == 0:
        return True
    device = editable.input_device
    whole = BlockReplay.record(editable, pad_rows([ids], device), stop - 1, stop).final[:, cut:]
    try:
        cached = prefix_key_values(editable, [ids[:cut]], stop)
        rows = pad_rows([ids[cut:]], device, starts=[cut], prefix_width=cut)
        # As in the optimisation: blocks called again, with a cache that the model itself no longer updates.
        replay = BlockReplay.record(editable, rows, min(editable.layers[-1] + 1, stop - 1), stop, prefix=cached)
        split = replay.run(replay.hidden)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        logger.warning("%s does not take a prefix cache (%s): every step runs all tokens",
                       type(editable.model).__name__, kind_and_text(error))
        return False
    return same_states(editable.model, "a prefix cache", split, whole)
