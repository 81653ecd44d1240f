"""Optimises target values: hidden states that make the model predict each edit's target, many edits at a time.

Per edit, with z_0 the output of the last edited block at the subject's last token of the plain prompt, ``delta``
minimises (ROME, Eq. 4; MEMIT, Eq. 16)

    mean over contexts of NLL(target | z + delta) / target length
    + kl_factor * KL(drift prompt after || before) + v_weight_decay * ||delta|| / ||z_0||^2,

by Adam, constrained to ``||delta|| <= clamp_norm_factor * ||z_0||``, until the loss falls below 0.05. With
``normalised_steps``, descent along normalised gradients takes Adam's place (see ``normalised_descent``). Each step
computes only what depends on ``delta``: the blocks above the edited one, on the tokens from the subject's last one
onward, with logits at the target's positions. With ``contexts_per_step``, a step takes the mean over the plain prompt
and that many contexts, in turn, as stochastic optimisation does; the loss then is the mean of the last round of steps,
in which every context has occurred. With ``target_dtype``, the blocks above the edited one and the head compute in that
precision; states up to the edited block, ``delta``, its gradient and Adam, losses and z stay in float32.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
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
from ..models.reduced_precision import computing_in
from ..models.replay import pad_rows
from .delta_forward import DeltaForward, rows_of
from .keys import BatchStates
from .normalised_descent import NormalisedDescent
from .requests import TokenizedPrompt, TokenizedRequest
from .row_layout import KnownLayouts

logger = logging.getLogger(__name__)

_LOSS_REACHED = 0.05  # EasyEdit's; below it an edit is finished
TOKENS_PER_STEP = 80  # cost of reading the weights in a step, in tokens
LOGITS_AT_ONCE = 1 << 22
TOKENS_FOR_HEAD = 4
_REPACK_SHARE = 0.75  # rows are packed again once at most this share of the edits is still being optimised


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
    layouts: KnownLayouts | None = None,
) -> TargetValues:
    """Optimise the target value of every request.

    Args:
        editable: the model; its parameters must not require gradients (see ``architecture.frozen``).
        requests: tokenized edits.
        hparams: v_num_grad_steps, v_lr, normalised_steps, step_norm_factor, v_weight_decay, kl_factor,
            clamp_norm_factor, v_loss_layer, contexts_per_step, target_dtype, seed, token_budget.
        progress: called with the number of edits that a micro-batch finished.
        paths: output paths by layer. Where a single layer is edited and its output goes through a norm, ``delta`` is
            limited to what its weight can produce.
        layouts: of earlier batches on this model; extended.

    Raises:
        ValueError: a loss is not finite; names the cases. Or ``target_dtype`` is given and weights are quantised or
            offloaded.
    """
    values = torch.empty(len(requests), editable.hidden_size, dtype=torch.float32)
    losses, steps = [0.0] * len(requests), [0] * len(requests)
    few = requests[0].plain.ids[:TOKENS_FOR_HEAD]  # the logit map is the same for all prompts
    editable.logit_map = find_logit_map(editable, pad_rows([few], editable.input_device).input_ids)
    path, norm_inputs = paths.get(editable.layers[0]), None
    if isinstance(path, Normalised) and len(editable.layers) == 1:
        plain = [replace(request, contexts=()) for request in requests]
        _, norm_inputs, _ = BatchStates(editable, plain, hparams.token_budget, paths).read(editable.layers[0])
    count = len(requests[0].contexts)
    rounds = context_rounds(count, hparams.contexts_per_step, hparams.seed)
    above = [*map(editable.block, range(editable.layers[-1] + 1, editable.num_blocks)), editable.final_norm,
             editable.lm_head]
    with ExitStack() as stack:
        if hparams.target_dtype is not None:
            stack.enter_context(computing_in(above, getattr(torch, hparams.target_dtype)))
        layout = (layouts or KnownLayouts()).choose(editable, requests, hparams.target_dtype)
        packed = layout == "packed"
        batches = packed_micro_batches if packed else padded_micro_batches
        if packed:
            stack.enter_context(attending_packed(editable.model))
        for batch in batches(requests, hparams.token_budget, len(rounds[0])):
            group = [requests[i] for i in batch]
            rows = [row for edit, request in enumerate(group) for row in rows_of(edit, request)]
            block = editable.layers[-1]
            recorded = DeltaForward.record(editable, rows, block, layout)
            forwards = [recorded] if len(rounds) == 1 else [recorded.with_contexts(some, count) for some in rounds]
            del recorded
            project = None
            if isinstance(path, Normalised) and norm_inputs is not None:
                project = partial(path.nearest_output_change, norm_inputs[batch])
            result = _MicroBatch(editable, group, hparams, forwards, project).optimise()
            values[batch] = result.values
            for i, loss, count in zip(batch, result.losses, result.steps, strict=True):
                losses[i], steps[i] = loss, count
            if progress is not None:
                progress(len(batch))
    return TargetValues(values, losses, steps)


def context_rounds(count: int, per_step: int | None, seed: int) -> list[tuple[int, ...]]:
    """The contexts of each step, as indices from 1 to ``count``; steps take them in turn, again and again.

    They follow one another in an order drawn with the seed, ``per_step`` a step, until each step begins as the first.
    """
    if per_step is None or per_step >= count:
        return [tuple(range(1, count + 1))]
    order = (1 + torch.randperm(count, generator=torch.Generator().manual_seed(seed))).tolist()
    steps = count // math.gcd(count, per_step)
    return [tuple(order[(step * per_step + i) % count] for i in range(per_step)) for step in range(steps)]


def packed_micro_batches(requests: Sequence[TokenizedRequest], token_budget: int, contexts: int | None = None
                         ) -> list[list[int]]:
    """Indices in groups of similar length with about equally many tokens, at most ``token_budget`` each.

    Args:
        contexts: number of contexts in a step (all if not given); of the longest ones.
    """
    rows = [rows_of(0, replace(request, contexts=tuple(_longest(request, contexts)))) for request in requests]
    tokens = [sum(len(row.ids) for row in some) for some in rows]
    suffix = [max(len(row.ids) - row.lookup for row in some) for some in rows]
    order = sorted(range(len(requests)), key=lambda i: (suffix[i], tokens[i]))
    share = sum(tokens) / math.ceil(sum(tokens) / token_budget)
    batches: list[list[int]] = [[]]
    remaining = share
    for i in order:
        # Rounds to the nearest number of edits, unless that exceeds the budget.
        if batches[-1] and (remaining < tokens[i] / 2 or share - remaining + tokens[i] > token_budget):
            batches.append([])
            remaining = share
        batches[-1].append(i)
        remaining -= tokens[i]
    return batches


def _longest(request: TokenizedRequest, contexts: int | None) -> list[TokenizedPrompt]:
    """This many of the longest prompts with contexts, or all."""
    return sorted(request.contexts, key=lambda prompt: len(prompt.ids), reverse=True)[:contexts]


def padded_micro_batches(requests: Sequence[TokenizedRequest], token_budget: int, contexts: int | None = None
                         ) -> list[list[int]]:
    """Indices in groups whose padded rows hold at most ``token_budget`` tokens, split to minimise padding.

    Args:
        contexts: number of contexts in a step (all if not given).
    """

    def extent(request: TokenizedRequest) -> tuple[int, int, int]:
        prompts = [request.plain, *_longest(request, contexts)]
        suffix = max(len(p.ids) - p.lookup for p in prompts) + len(request.target_ids) - 1
        return suffix, max(p.lookup for p in prompts), len(prompts)

    extents = [extent(request) for request in requests]
    order = sorted(range(len(requests)), key=lambda i: extents[i])
    # Dynamic programming: best[stop] holds the least cost of the first `stop` requests and the last group's start.
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
    """Optimises edits together, each with its own loss, early stop and norm constraint."""

    def __init__(self, editable: EditableModel, requests: list[TokenizedRequest], hparams: SPHEREHyperParams,
                 forwards: list[DeltaForward], project: Callable[[Tensor], Tensor] | None) -> None:
        self._editable, self._hparams, self._requests = editable, hparams, requests
        self._forwards = forwards  # that steps take in turn; they differ in their contexts
        self._project = project  # to the nearest delta that the edited weight can produce
        self._initial = forwards[0].initial  # (edits, hidden_size)
        with torch.no_grad():
            self._drift_before = F.log_softmax(editable.logits(forwards[0].drift_final), dim=-1)  # (edits, vocabulary)

    def optimise(self) -> TargetValues:
        """Run all steps; edits that reach the target loss are frozen and leave the computation."""
        hparams, initial = self._hparams, self._initial
        delta = torch.zeros_like(initial, requires_grad=True)
        optimiser = self._optimiser(delta)
        radius = hparams.clamp_norm_factor * initial.norm(dim=1, keepdim=True)  # (edits, 1)
        count = len(self._requests)
        active = torch.ones(count, dtype=torch.bool)
        losses, steps = torch.zeros(count, dtype=torch.float32), [0] * count
        forwards, recent = self._forwards, deque[Tensor](maxlen=len(self._forwards))
        for step in range(hparams.gradient_steps):
            last = step == hparams.gradient_steps - 1  # its loss is only reported, as in EasyEdit
            delta.grad = None
            with torch.set_grad_enabled(not last):
                recent.append(self._losses(delta, forwards[step % len(forwards)]).cpu())
            current = torch.stack(list(recent)).mean(dim=0)
            self._check_finite(current, active)
            losses = torch.where(active, current, losses)
            active &= (current >= _LOSS_REACHED) | (len(recent) < len(forwards))
            if last or not active.any():
                break
            before = delta.detach().clone()
            optimiser.step()
            with torch.no_grad():
                delta.mul_((radius / delta.norm(dim=1, keepdim=True)).clamp(max=1.0))
                if self._project is not None:
                    delta.copy_(self._project(delta))
                # Otherwise momentum would move finished edits.
                delta.copy_(torch.where(active.to(delta.device).unsqueeze(1), delta, before))
            steps = [taken + int(flag) for taken, flag in zip(steps, active.tolist(), strict=True)]
            if active.sum() <= _REPACK_SHARE * len(forwards[0].edits):
                still = set(active.nonzero()[:, 0].tolist())
                forwards = [forward.keep(still) for forward in forwards]
        values = (initial + delta.detach()).cpu()
        return TargetValues(values, losses.tolist(), steps)

    def _optimiser(self, delta: Tensor) -> torch.optim.Adam | NormalisedDescent:
        hparams = self._hparams
        if hparams.normalised_steps is None:
            return torch.optim.Adam([delta], lr=hparams.v_lr)
        lengths = hparams.step_norm_factor * self._initial.norm(dim=1, keepdim=True)
        return NormalisedDescent(delta, lengths, hparams.normalised_steps - 1)  # no step follows the last loss

    def _losses(self, delta: Tensor, forward: DeltaForward) -> Tensor:
        """Loss ``(edits,)`` of the edits that ``forward`` holds; for others only the norm penalty, which is not used.

        Where gradients are enabled, this also adds them to ``delta``. Logits are computed and freed in chunks, since
        allocating memory in each step costs more than the arithmetic on it.
        """
        hparams, taking_grad = self._hparams, torch.is_grad_enabled()
        loss_block = max(int(hparams.v_loss_layer), self._editable.layers[-1])
        states, final = forward.run(delta, loss_block)
        states = torch.cat([states.to(final.device), final])
        predictions = forward.predictions
        leaf = states.detach().requires_grad_(taking_grad)
        parts = []
        at_once = max(1, LOGITS_AT_ONCE // self._drift_before.shape[1])
        for start in range(0, len(leaf), at_once):
            stop, count = start + at_once, len(predictions.rows)  # states from `count` on are drift prompts'
            log_probs = F.log_softmax(self._editable.logits(leaf[start: stop]), dim=-1)
            log_probs, after = log_probs.tensor_split([max(0, count - start)])
            chosen = log_probs.gather(1, predictions.tokens[start: stop].to(log_probs.device).unsqueeze(1))[:, 0]
            before = self._drift_before[forward.edits[max(0, start - count): max(0, stop - count)].to(after.device)]
            part = torch.cat([-chosen * predictions.weights[start: stop].to(chosen.device),
                              hparams.kl_factor * (after.exp() * (after - before)).sum(dim=1)])
            if taking_grad:
                part.sum().backward()  # type: ignore[no-untyped-call]
            parts.append(part.detach())
        owners = torch.cat([predictions.edits, forward.edits]).to(final.device)
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
