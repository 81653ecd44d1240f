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
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..hparams import SPHEREHyperParams
from ..models import EditableModel, logits_at
from .replay import BlockReplay, KeyValues, pad_rows, prefix_key_values
from .requests import TokenizedPrompt, TokenizedRequest

logger = logging.getLogger(__name__)

_LOSS_REACHED = 0.05  # EasyEdit's: below it an edit is done
_TOKENS_PER_STEP = 80  # reading the weights in a step costs about as much as so many tokens
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


@dataclass(frozen=True)
class _Row:
    """One token row; ``edit`` indexes the micro-batch, ``lookup`` the subject's last token among ``suffix``. Rows of
    one ``context`` begin alike.

    ``prefix`` holds the tokens that run once only, ``targets`` what shall be predicted from token ``first`` of
    ``suffix`` onward.
    """

    edit: int
    context: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    lookup: int
    first: int = 0
    targets: tuple[int, ...] = ()


class _Packed:
    """Rows recorded together: what depends on ``delta`` can be run again."""

    def __init__(self, rows: list[_Row], replay: BlockReplay) -> None:
        self.rows, self.replay = rows, replay
        device = replay.hidden.device
        self.owner = torch.tensor([row.edit for row in rows], device=device)  # (rows,)
        self._lookup = torch.tensor([row.lookup for row in rows], device=device)  # (rows,)
        contexts = Counter(row.edit for row in rows)
        positions = [(i, row.first + j, token, row.edit, 1.0 / (len(row.targets) * contexts[row.edit]))
                     for i, row in enumerate(rows) for j, token in enumerate(row.targets)]
        # Where targets are predicted: row, column, token, edit, and weight in the edit's mean.
        self.predictions = [torch.tensor(column) for column in zip(*positions, strict=True)]  # each (predictions,)

    def keep(self, edits: set[int]) -> _Packed:
        """The rows of some edits only."""
        index = [i for i, row in enumerate(self.rows) if row.edit in edits]
        return _Packed([self.rows[i] for i in index], self.replay.select(torch.tensor(index)))

    def at_lookup(self, hidden: Tensor) -> Tensor:
        """States ``(rows, hidden_size)`` at each row's subject's last token."""
        rows = torch.arange(len(self.rows), device=hidden.device)
        return hidden[rows, self._lookup.to(hidden.device)]

    def run(self, delta: Tensor, stop: int) -> Tensor:
        """Output of block ``stop - 1`` when each edit's ``delta`` is added at the subject's last token."""
        hidden = self.replay.hidden
        rows = torch.arange(len(self.rows), device=hidden.device)
        steered = hidden.index_put((rows, self._lookup), delta[self.owner].to(hidden.dtype), accumulate=True)
        return self.replay.run(steered, stop=stop)


def optimise_target_values(
    editable: EditableModel,
    requests: Sequence[TokenizedRequest],
    hparams: SPHEREHyperParams,
    progress: Callable[[int], None] | None = None,
) -> TargetValues:
    """Optimise the target value of every request.

    Args:
        editable: the model; its parameters must not require gradients (see ``models.frozen``).
        requests: tokenised edits.
        hparams: v_num_grad_steps, v_lr, v_weight_decay, kl_factor, clamp_norm_factor, v_loss_layer, token_budget.
        progress: called with the number of edits finished each time some are.

    Raises:
        ValueError: a loss is not finite; names the cases.
    """
    values = torch.empty(len(requests), editable.hidden_size)
    losses, steps = [0.0] * len(requests), [0] * len(requests)
    longest = max((prompt for request in requests for prompt in _rewriting_prompts(request)), key=lambda p: p.lookup)
    _check_head(editable, longest)
    use_prefix = _prefix_is_exact(editable, longest)
    for batch in _micro_batches(requests, hparams.token_budget):
        group = [requests[i] for i in batch]
        result = _MicroBatch(editable, group, hparams, use_prefix).optimise()
        values[batch] = result.values
        for i, loss, count in zip(batch, result.losses, result.steps, strict=True):
            losses[i], steps[i] = loss, count
        if progress is not None:
            progress(len(batch))
    return TargetValues(values, losses, steps)


def _rewriting_prompts(request: TokenizedRequest) -> list[TokenizedPrompt]:
    return [request.plain, *request.contexts]


def _micro_batches(requests: Sequence[TokenizedRequest], token_budget: int) -> list[list[int]]:
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
            candidates.append((best[start][0] + rows * suffix + _TOKENS_PER_STEP, start))
        best.append(min(candidates))
    batches: list[list[int]] = []
    stop = len(order)
    while stop:
        start = best[stop][1]
        batches.append(order[start:stop])
        stop = start
    return batches[::-1]


@torch.no_grad()
def _check_head(editable: EditableModel, prompt: TokenizedPrompt) -> None:
    """Refuse a model whose logits are more than its LM head on its last norm: z would serve another distribution."""
    rows = pad_rows([prompt.ids], editable.input_device)
    last = torch.tensor([len(prompt.ids) - 1])
    own = logits_at(editable.model, rows.input_ids, rows.attention_mask, torch.tensor([0]), last)
    final = BlockReplay.record(editable, rows, editable.num_blocks, editable.num_blocks).final
    rebuilt = editable.logits(final[0, last]).to(own.device)
    difference = float((own - rebuilt).norm() / own.norm())
    if math.isfinite(difference) and difference > 0.05:
        raise ValueError(f"the logits of {type(editable.model).__name__} are not what {editable.names.ln_f_module!r} "
                         f"and {editable.names.lm_head_module!r} make of its last block ({difference:.1%} apart): "
                         "correct these module names; if they are right, this architecture is not supported")


@torch.no_grad()
def _prefix_is_exact(editable: EditableModel, prompt: TokenizedPrompt) -> bool:
    """Whether running the tokens in front through a cache gives what running all of them gives, on this model."""
    ids, cut, stop = prompt.ids, prompt.lookup, editable.num_blocks
    if cut == 0:
        return True
    device = editable.input_device
    whole = BlockReplay.record(editable, pad_rows([ids], device), stop - 1, stop).final[:, cut:]
    try:
        cached = prefix_key_values(editable, [ids[:cut]], stop)
        rows = pad_rows([ids[cut:]], device, starts=[cut], prefix_width=cut)
        split = BlockReplay.record(editable, rows, stop - 1, stop, prefix=cached).final
    except (TypeError, KeyError, IndexError, AttributeError, ValueError, RuntimeError) as error:
        logger.warning("%s does not take a prefix cache (%s): every step runs all tokens",
                       type(editable.model).__name__, error)
        return False
    tolerance = 1e-3 if whole.dtype == torch.float32 else 5e-2
    difference = float((whole - split).float().norm() / whole.float().norm())
    if not difference < tolerance:
        logger.warning("%s gives other states with a prefix cache (%.1e apart): every step runs all tokens",
                       type(editable.model).__name__, difference)
        return False
    return True


class _MicroBatch:
    """Edits that are optimised together, each as if it were alone."""

    def __init__(self, editable: EditableModel, requests: list[TokenizedRequest], hparams: SPHEREHyperParams,
                 use_prefix: bool) -> None:
        self._editable, self._hparams, self._requests = editable, hparams, requests
        self._layer = editable.layers[-1]
        rewriting = [_row(edit, context, prompt, request.target_ids, use_prefix)
                     for edit, request in enumerate(requests)
                     for context, prompt in enumerate(_rewriting_prompts(request))]
        self._rewriting = self._record(rewriting)
        self._drift = self._record([_row(edit, 0, request.drift, (), use_prefix)
                                    for edit, request in enumerate(requests)])
        plain = [next(i for i, row in enumerate(rewriting) if row.edit == edit) for edit in range(len(requests))]
        self._initial = self._rewriting.at_lookup(self._rewriting.replay.hidden)[plain].float()  # (edits, hidden)
        with torch.no_grad():
            final = self._drift.at_lookup(self._drift.replay.final)
            self._drift_before = F.log_softmax(editable.logits(final), dim=-1)  # (edits, vocabulary)

    def _record(self, rows: list[_Row]) -> _Packed:
        stop = self._editable.num_blocks
        width = max(len(row.prefix) for row in rows)
        prefix: KeyValues | None = None
        if width:
            with torch.no_grad():
                prefix = prefix_key_values(self._editable, [row.prefix for row in rows], stop,
                                           [row.context for row in rows])
        padded = pad_rows([row.suffix for row in rows], self._editable.input_device,
                          [len(row.prefix) for row in rows], width)
        return _Packed(rows, BlockReplay.record(self._editable, padded, self._layer + 1, stop, prefix))

    def optimise(self) -> TargetValues:
        """Run all steps; edits that reach the loss stand still from then on and leave the computation."""
        hparams, initial = self._hparams, self._initial
        delta = torch.zeros_like(initial, requires_grad=True)
        adam = torch.optim.Adam([delta], lr=hparams.v_lr)
        radius = hparams.clamp_norm_factor * initial.norm(dim=1, keepdim=True)  # (edits, 1)
        count = len(self._requests)
        active = torch.ones(count, dtype=torch.bool)
        losses, steps = torch.zeros(count), [0] * count
        rewriting, drift = self._rewriting, self._drift
        for step in range(hparams.v_num_grad_steps):
            last = step == hparams.v_num_grad_steps - 1  # its loss is only reported, as in EasyEdit
            with torch.set_grad_enabled(not last):
                loss = self._losses(delta, rewriting, drift)
            current = loss.detach().cpu()
            self._check_finite(current, active)
            losses = torch.where(active, current, losses)
            active &= current >= _LOSS_REACHED
            if last or not active.any():
                break
            adam.zero_grad()
            loss[active.to(loss.device)].sum().backward()  # type: ignore[no-untyped-call]
            before = delta.detach().clone()
            adam.step()
            with torch.no_grad():
                delta.mul_((radius / delta.norm(dim=1, keepdim=True)).clamp(max=1.0))
                # Adam's momentum would move edits that are done.
                delta.copy_(torch.where(active.to(delta.device).unsqueeze(1), delta, before))
            steps = [taken + int(flag) for taken, flag in zip(steps, active.tolist(), strict=True)]
            if active.sum() <= _REPACK_SHARE * len(drift.rows):
                edits = set(active.nonzero()[:, 0].tolist())
                rewriting, drift = rewriting.keep(edits), drift.keep(edits)
        values = (initial + delta.detach()).cpu()
        return TargetValues(values, losses.tolist(), steps)

    def _losses(self, delta: Tensor, rewriting: _Packed, drift: _Packed) -> Tensor:
        """Loss ``(edits,)`` of every edit still packed; of the others only the norm penalty, which is not used."""
        editable, hparams = self._editable, self._hparams
        hidden = rewriting.run(delta, stop=max(int(hparams.v_loss_layer), self._layer) + 1)
        final = drift.at_lookup(drift.run(delta, stop=editable.num_blocks))
        rows, columns, tokens, owners, weights = rewriting.predictions
        # One call of the head for both: on few rows it costs what reading its weight costs.
        states = torch.cat([hidden[rows, columns].to(final.device), final])
        log_probs, after = F.log_softmax(editable.logits(states), dim=-1).tensor_split([len(rows)])
        device = log_probs.device
        chosen = log_probs.gather(1, tokens.to(device).unsqueeze(1))[:, 0]
        loss = torch.zeros(len(delta), device=device).index_add(0, owners.to(device), -chosen * weights.to(device))
        drifted = (after.exp() * (after - self._drift_before[drift.owner.to(device)])).sum(dim=1)
        loss = loss.index_add(0, drift.owner.to(device), hparams.kl_factor * drifted)
        penalty = hparams.v_weight_decay * delta.norm(dim=1) / self._initial.norm(dim=1) ** 2
        total: Tensor = loss + penalty.to(device)
        return total

    def _check_finite(self, losses: Tensor, active: Tensor) -> None:
        bad = [request.request.case_id for request, loss, running in
               zip(self._requests, losses.tolist(), active.tolist(), strict=True)
               if running and not math.isfinite(loss)]
        if bad:
            raise ValueError(f"the loss of the target value is not finite for case_id {bad}: the model's weights or "
                             "the learning rate v_lr are at fault")


def _row(edit: int, context: int, prompt: TokenizedPrompt, targets: tuple[int, ...], use_prefix: bool) -> _Row:
    cut = prompt.lookup if use_prefix else 0
    return _Row(edit, context, prompt.ids[:cut], prompt.ids[cut:] + targets[:-1], prompt.lookup - cut,
                len(prompt.ids) - 1 - cut, targets)
