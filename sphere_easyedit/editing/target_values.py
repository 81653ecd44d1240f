"""Target values: the hidden states that make the model say each edit's target, optimised many at a time.

Per edit, with z_0 the output of the last edited block at the subject's last token of the plain prompt, ``delta``
minimises (ROME, Eq. 4; MEMIT, Eq. 16)

    mean over contexts of NLL(target | z + delta) / target length
    + kl_factor * KL(drift prompt after || before) + v_weight_decay * ||delta|| / ||z_0||^2,

by Adam, held in the ball ``||delta|| <= clamp_norm_factor * ||z_0||``, until the loss falls below 0.05. Only what
depends on ``delta`` is computed in each step: the blocks above the edited one, on the tokens from the subject's last
one onward, with logits at the target's positions.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hparams import SPHEREHyperParams
from ..models.architecture import EditableModel
from ..models.logit_map import find_logit_map
from ..models.output_path import Normalised, OutputPath
from ..models.packing import attending_packed
from ..models.replay import pad_rows
from .keys import BatchStates
from .requests import TokenizedPrompt, TokenizedRequest
from .target_optimizer import Steering, layout_of, rows_of

logger = logging.getLogger(__name__)

_LOSS_REACHED = 0.05  # EasyEdit's: below it an edit is done
TOKENS_PER_STEP = 80  # reading the weights in a step costs about as much as so many tokens
LOGITS_AT_ONCE = 1 << 22
TOKENS_FOR_HEAD = 4
_REPACK_SHARE = 0.75  # rows are packed anew once at most this share of them is still being optimised


@dataclass(frozen=True)
class TargetValues:
    """Result of the optimisation.

    Attributes:
        values: ``(edits, hidden_size)`` float32, the target values z.
        losses: last loss of each edit (nats).
        steps: gradient steps taken for each edit.
    """

    values: Tensor
    losses: list[float]
    steps: list[int]


def optimise_target_values(
    editable: EditableModel,
    requests: Sequence[TokenizedRequest],
    hparams: SPHEREHyperParams,
    progress: Callable[[int], None] | None = None,
    paths: Mapping[int, OutputPath] = MappingProxyType({}),
) -> TargetValues:
    """Optimise the target value of every request.

    Args:
        editable: the model; its parameters must not require gradients (see ``models.frozen``).
        requests: tokenised edits.
        hparams: v_num_grad_steps, v_lr, v_weight_decay, kl_factor, clamp_norm_factor, v_loss_layer, token_budget.
        progress: called with the number of edits finished each time some are.
        paths: output paths by layer. Through a norm, and where one layer is edited, only values that its weight can
            reach are tried. Several layers reach further than can be told beforehand.

    Raises:
        ValueError: a loss is not finite; names the cases.
    """
    values = torch.empty(len(requests), editable.hidden_size, dtype=torch.float32)
    losses, steps = [0.0] * len(requests), [0] * len(requests)
    few = requests[0].plain.ids[:TOKENS_FOR_HEAD]  # what is done to the logits does not depend on the prompt
    editable.logit_map = find_logit_map(editable, pad_rows([few], editable.input_device).input_ids)
    path, norm_inputs = paths.get(editable.layers[0]), None
    if isinstance(path, Normalised) and len(editable.layers) == 1:
        plain = [replace(request, contexts=()) for request in requests]
        _, norm_inputs, _ = BatchStates(editable, plain, hparams.token_budget, paths).read(editable.layers[0])
    layout = layout_of(editable, requests)
    packed = layout == "packed"
    batches = packed_micro_batches if packed else padded_micro_batches
    with attending_packed(editable.model) if packed else nullcontext():
        for batch in batches(requests, hparams.token_budget):
            group = [requests[i] for i in batch]
            rows = [row for edit, request in enumerate(group) for row in rows_of(edit, request)]
            block = editable.layers[-1]
            steering = Steering.record(editable, rows, block, layout)
            reach = None
            if isinstance(path, Normalised) and norm_inputs is not None:
                reach = partial(path.nearest_output_change, norm_inputs[batch])
            result = _MicroBatch(editable, group, hparams, steering, reach).optimise()
            values[batch] = result.values
            for i, loss, count in zip(batch, result.losses, result.steps, strict=True):
                losses[i], steps[i] = loss, count
            if progress is not None:
                progress(len(batch))
    return TargetValues(values, losses, steps)


def _rewriting_prompts(request: TokenizedRequest) -> list[TokenizedPrompt]:
    return [request.plain, *request.contexts]


def packed_micro_batches(requests: Sequence[TokenizedRequest], token_budget: int) -> list[list[int]]:
    """Indices in groups of like length and about as many tokens each, of which there are at most ``token_budget``."""
    tokens = [sum(len(row.ids) for row in rows_of(0, request)) for request in requests]
    behind = [max(len(row.ids) - row.lookup for row in rows_of(0, request)) for request in requests]
    order = sorted(range(len(requests)), key=lambda i: (behind[i], tokens[i]))
    share = sum(tokens) / math.ceil(sum(tokens) / token_budget)
    batches: list[list[int]] = [[]]
    room = share
    for i in order:
        # Half an edit over is as good as half an edit under, but for the budget.
        if batches[-1] and (room < tokens[i] / 2 or share - room + tokens[i] > token_budget):
            batches.append([])
            room = share
        batches[-1].append(i)
        room -= tokens[i]
    return batches


def padded_micro_batches(requests: Sequence[TokenizedRequest], token_budget: int) -> list[list[int]]:
    """Indices in groups whose padded rows hold at most ``token_budget`` tokens, cut so that padding costs least."""

    def extent(request: TokenizedRequest) -> tuple[int, int, int]:
        prompts = _rewriting_prompts(request)
        suffix = max(len(p.ids) - p.lookup for p in prompts) + len(request.target_ids) - 1
        return suffix, max(p.lookup for p in prompts), len(prompts)

    extents = [extent(request) for request in requests]
    order = sorted(range(len(requests)), key=lambda i: extents[i])
    # Shortest path over where to cut: best[stop] is the least cost of the first `stop` requests in order.
    best: list[tuple[float, int]] = [(0.0, 0)]
    for stop in range(1, len(order) + 1):
        rows = prefix = 0
        suffix = extents[order[stop - 1]][0]  # ascending, so the last is the widest
        candidates: list[tuple[float, int]] = []
        for start in range(stop - 1, -1, -1):
            rows, prefix = rows + extents[order[start]][2], max(prefix, extents[order[start]][1])
            if candidates and rows * (suffix + prefix) > token_budget:
                break
            candidates.append((best[start][0] + rows * suffix + TOKENS_PER_STEP, start))
        best.append(min(candidates))
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        start = best[stop][1]
        batches.append(order[start:stop])
        stop = start
    return batches[::-1]


class _MicroBatch:
    """Edits that are optimised together, each as if it were alone."""

    def __init__(self, editable: EditableModel, requests: list[TokenizedRequest], hparams: SPHEREHyperParams,
                 steering: Steering, reach: Callable[[Tensor], Tensor] | None) -> None:
        self._editable, self._hparams, self._requests, self._steering = editable, hparams, requests, steering
        self._reach = reach  # of a delta, the nearest that the edited weights can make
        self._initial = steering.initial  # (edits, hidden_size)
        with torch.no_grad():
            self._drift_before = F.log_softmax(editable.logits(steering.drift_final), dim=-1)  # (edits, vocabulary)

    def optimise(self) -> TargetValues:
        """Run all steps; edits that reach the loss stand still from then on and leave the computation."""
        hparams, initial = self._hparams, self._initial
        delta = torch.zeros_like(initial, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=hparams.v_lr)
        radius = hparams.clamp_norm_factor * initial.norm(dim=1, keepdim=True)  # (edits, 1)
        count = len(self._requests)
        active = torch.ones(count, dtype=torch.bool)
        losses, steps = torch.zeros(count, dtype=torch.float32), [0] * count
        steering = self._steering
        for step in range(hparams.v_num_grad_steps):
            last = step == hparams.v_num_grad_steps - 1  # its loss is only reported, as in EasyEdit
            delta.grad = None
            with torch.set_grad_enabled(not last):
                current = self._losses(delta, steering).cpu()
            self._check_finite(current, active)
            losses = torch.where(active, current, losses)
            active &= current >= _LOSS_REACHED
            if last or not active.any():
                break
            before = delta.detach().clone()
            adam.step()
            with torch.no_grad():
                delta.mul_((radius / delta.norm(dim=1, keepdim=True)).clamp(max=1.0))
                if self._reach is not None:
                    delta.copy_(self._reach(delta))
                # Adam's momentum would move edits that are done.
                delta.copy_(torch.where(active.to(delta.device).unsqueeze(1), delta, before))
            steps = [taken + int(flag) for taken, flag in zip(steps, active.tolist(), strict=True)]
            if active.sum() <= _REPACK_SHARE * len(steering.edits):
                steering = steering.keep(set(active.nonzero()[:, 0].tolist()))
        values = (initial + delta.detach()).cpu()
        return TargetValues(values, losses.tolist(), steps)

    def _losses(self, delta: Tensor, steering: Steering) -> Tensor:
        """Loss ``(edits,)`` of every edit still steered; of the others only the norm penalty, which is not used.

        Where gradients are enabled, ``delta`` gets them too. Logits are made for a few states at a time, and gone
        before the next ones: memory that is new in each step costs more than arithmetic on it.
        """
        hparams, taking_grad = self._hparams, torch.is_grad_enabled()
        loss_block = max(int(hparams.v_loss_layer), self._editable.layers[-1])
        states, final = steering.run(delta, loss_block)
        states = torch.cat([states.to(final.device), final])
        found = steering.predictions
        leaf = states.detach().requires_grad_(taking_grad)
        parts = []
        at_once = max(1, LOGITS_AT_ONCE // self._drift_before.shape[1])
        for start in range(0, len(leaf), at_once):
            stop, count = start + at_once, len(found.rows)  # the states behind `count` are drift prompts'
            log_probs = F.log_softmax(self._editable.logits(leaf[start: stop]), dim=-1)
            log_probs, after = log_probs.tensor_split([max(0, count - start)])
            chosen = log_probs.gather(1, found.tokens[start: stop].to(log_probs.device).unsqueeze(1))[:, 0]
            before = self._drift_before[steering.edits[max(0, start - count): max(0, stop - count)].to(after.device)]
            part = torch.cat([-chosen * found.weights[start: stop].to(chosen.device),
                              hparams.kl_factor * (after.exp() * (after - before)).sum(dim=1)])
            if taking_grad:
                part.sum().backward()  # type: ignore[no-untyped-call]
            parts.append(part.detach())
        owners = torch.cat([found.edits, steering.edits]).to(final.device)
        loss = torch.zeros(len(delta), dtype=torch.float32, device=final.device).index_add(0, owners, torch.cat(parts))
        penalty = hparams.v_weight_decay * delta.norm(dim=1) / self._initial.norm(dim=1) ** 2
        if taking_grad:
            states.backward(leaf.grad)  # type: ignore[no-untyped-call]
            penalty.sum().backward()
        total: Tensor = loss + penalty.detach().to(loss.device)
        return total

    def _check_finite(self, losses: Tensor, active: Tensor) -> None:
        bad = [request.request.case_id for request, loss, running in
               zip(self._requests, losses.tolist(), active.tolist(), strict=True)
               if running and not math.isfinite(loss)]
        if bad:
            raise ValueError(f"the loss of the target value is not finite for case_id {bad}: the model's weights or "
                             "the learning rate v_lr are at fault")
