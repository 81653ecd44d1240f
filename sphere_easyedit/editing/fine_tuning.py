"""Fine-tunes the edited weights on a batch of facts, with replay of earlier facts and a KL term on ordinary text.

With dW the change of each edited weight since the batch began, a step of Adam follows the gradient of

    mean over facts of max(NLL(target) / target length, 0.2) + kl_factor * KL(unedited || edited),

over ``ft_batch_size`` new facts, ``replay_ratio`` times as many earlier ones, and windows of the text that statistics
are collected from. The new facts are passed over ``ft_epochs`` times, which is known to edit better than optimising one
fact after another (LocFT-BF, arXiv 2509.22072). Each fact's prompt is read alone or in one of the context templates, as
chance has it. Later epochs leave out most of the facts that are learned, and have a smaller learning rate.

Adam works in whitened coordinates of the inputs: ``dW = V (C + eps I)^(-1/2)``, with C the second moment of the
weight's inputs, so that a step of a given size changes the outputs on ordinary text by the same amount in every
direction, as MEMIT's closed form does. Plain coordinates change ordinary text about twice as much at equal loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ..core.tensors import widened
from ..hparams import SPHEREHyperParams
from ..methods.covariance import load_moment, statistics_files, statistics_texts
from ..methods.statistics_fingerprint import ensure_unchanged
from ..models.architecture import EditableModel, frozen
from ..models.logit_map import find_logit_map
from ..models.packing import attending_packed
from ..models.reduced_precision import computing_in
from ..models.replay import pad_rows
from ..models.row_logits import TargetRow, packed_logits, padded_logits
from .replay_memory import ReplayMemory, StoredFact
from .requests import TokenizedRequest
from .session import EditSession
from .solve import unedited

_CACHE, _HISTORY = "fine-tuning", "replay."
_LEARNED = 0.2  # loss of a fact below which it has no gradient
_LEFT_OUT = 0.8  # share of the learned facts (below twice that loss) that an epoch leaves out
_CONTEXT_SHARE = 0.5  # of the prompts that are read in a context template
_DAMPING = 0.05  # eps, as a multiple of the mean of C's eigenvalues
_WINDOW, _WINDOWS_A_STEP, _MOST_WINDOWS = 64, 8, 512  # tokens of a window of text, and numbers of windows
_WINDOWS_AT_ONCE = 8  # in a forward pass of the unedited model
_BETAS = (0.9, 0.99)
_PROBED = 4  # tokens of the prompt that finds out how logits are computed


@dataclass(frozen=True)
class FineTuned:
    """Result of fine-tuning.

    Attributes:
        weights: ``(d_out, d_in)`` float32 by layer, after training.
        memory: all facts of the session, this batch's included.
    """

    weights: dict[int, Tensor]
    memory: ReplayMemory


@dataclass(frozen=True)
class Prepared:
    """What fine-tuning derives from the unedited model.

    Attributes:
        whitening: ``(C + eps I)^(-1/2)`` ``(d_in, d_in)`` by layer.
        windows: token ids of windows of text.
        head_inputs: for each window, the unedited model's inputs of the head ``(tokens, d)`` at ``scored_positions``.
    """

    whitening: dict[int, Tensor]
    windows: list[list[int]]
    head_inputs: list[Tensor]


def prepare(editable: EditableModel, tok: PreTrainedTokenizerBase, hparams: SPHEREHyperParams, session: EditSession
            ) -> None:
    """Derive from the unedited model what fine-tuning needs, once a session.

    Raises:
        ValueError: statistics or their text can't be read, or are not of this model.
    """
    if _CACHE in session.engine_caches:
        return
    with unedited(editable, session):
        files = statistics_files(editable, tok, hparams)
        with ensure_unchanged(files.values()):
            whitening = {layer: _whitening(load_moment(file.path, editable.d_in(layer)).to(editable.device(layer)))
                         for layer, file in files.items()}
        with frozen(editable.model):
            texts = statistics_texts(editable, tok, hparams)
            windows = [text[start: start + _WINDOW] for text in texts for start in range(0, len(text), _WINDOW)]
            windows = [window for window in windows if len(window) > 1][:_MOST_WINDOWS]
            if not windows:
                raise ValueError(f"mom2_dataset {hparams.mom2_dataset!r} has no text of two tokens, which fine-tuning "
                                 "compares the edited model on: give another text")
            session.engine_caches[_CACHE] = Prepared(whitening, windows, _head_inputs(editable, windows))


def _whitening(moment: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(moment.double())
    damped = eigenvalues.clamp(min=0) + _DAMPING * eigenvalues.mean()
    root: Tensor = (vectors * damped.rsqrt()) @ vectors.T
    return root.float()


def scored_positions(window: Sequence[int]) -> range:
    """Positions of a window whose predictions the KL term compares: every second one."""
    return range(0, len(window), 2)


@torch.no_grad()
def _head_inputs(editable: EditableModel, windows: Sequence[Sequence[int]]) -> list[Tensor]:
    found: list[Tensor] = []
    handle = editable.lm_head.register_forward_pre_hook(lambda _module, args: found.extend(args[0].cpu()))
    try:
        for start in range(0, len(windows), _WINDOWS_AT_ONCE):
            rows = pad_rows(windows[start: start + _WINDOWS_AT_ONCE], editable.input_device)
            editable.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
    finally:
        handle.remove()
    return [states[torch.tensor(scored_positions(window))] for states, window in zip(found, windows, strict=True)]


def fine_tune(editable: EditableModel, requests: Sequence[TokenizedRequest], hparams: SPHEREHyperParams,
              session: EditSession, progress: Callable[[int], None] | None = None) -> FineTuned:
    """Train the edited weights on a batch; model and session stay unchanged.

    Args:
        editable: the model with the weights that the batch starts from.
        requests: the tokenized edits.
        hparams: ft_lr, ft_epochs, ft_batch_size, replay_ratio, kl_factor, target_dtype, token_budget, seed.
        session: prepared (see ``prepare``).
        progress: called with the number of edits whose training counts as finished, in proportion to the epochs.

    Raises:
        ValueError: a loss is not finite; or ``target_dtype`` is given and weights are quantised or offloaded.
    """
    new = [StoredFact.of(request) for request in requests]
    history = {name.removeprefix(_HISTORY): tensor for name, tensor in session.engine_history.items()
               if name.startswith(_HISTORY)}
    memory = ReplayMemory.from_tensors(history).without_prompts_of(new)
    prepared: Prepared = session.engine_caches[_CACHE]
    modules = [*map(editable.block, range(editable.num_blocks)), editable.final_norm, editable.lm_head]
    with frozen(editable.model), editable.restoring(always=True), ExitStack() as stack:
        few = list(new[0].prompts[0][:_PROBED])
        editable.logit_map = find_logit_map(editable, pad_rows([few], editable.input_device).input_ids)
        layout = session.layouts.choose(editable, requests, hparams.target_dtype)
        weights = {layer: widened(weight).clone() for layer, weight in editable.weights().items()}
        if hparams.target_dtype is not None:
            stack.enter_context(computing_in(modules, getattr(torch, hparams.target_dtype)))
        packs = layout == "packed"
        if packs:
            stack.enter_context(attending_packed(editable.model))
        generator = torch.Generator().manual_seed(hparams.seed + session.num_batches)
        memory = _Trainer(editable, hparams, prepared, weights, packs, generator).train(new, memory, progress)
        for layer, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise ValueError(f"training left values in layer {layer} that are not finite: nothing was changed. "
                                 "Lower ft_lr, or look at the weights")
        return FineTuned(weights, memory)


def history_of(memory: ReplayMemory) -> dict[str, Tensor]:
    """The memory as a session keeps it (``EditSession.engine_history``)."""
    return {_HISTORY + name: tensor for name, tensor in memory.to_tensors().items()}


class _Trainer:
    """Trains on one batch; ``weights`` are updated in place, and put into the model before each step."""

    def __init__(self, editable: EditableModel, hparams: SPHEREHyperParams, prepared: Prepared,
                 weights: dict[int, Tensor], packs: bool, generator: torch.Generator) -> None:
        self._editable, self._hparams, self._prepared, self._weights = editable, hparams, prepared, weights
        self._packs, self._generator = packs, generator
        self._whitening = {layer: prepared.whitening[layer].to(weight.device) for layer, weight in weights.items()}
        self._start = {layer: weight.clone() for layer, weight in weights.items()}
        self._coordinates = {layer: torch.zeros_like(weight) for layer, weight in weights.items()}
        self._adam = torch.optim.Adam(self._coordinates.values(), lr=hparams.ft_lr, betas=_BETAS)

    def train(self, new: Sequence[StoredFact], memory: ReplayMemory, progress: Callable[[int], None] | None
              ) -> ReplayMemory:
        """Train on the new facts and on earlier ones; returns the memory of both, with their last losses."""
        hparams, earlier = self._hparams, len(memory.facts)
        both = ReplayMemory([*memory.facts, *new], [*memory.losses, *[math.inf] * len(new)])
        for epoch in range(hparams.ft_epochs):
            for group in self._adam.param_groups:
                group["lr"] = hparams.ft_lr * math.sqrt(1 - epoch / hparams.ft_epochs)
            order = earlier + torch.randperm(len(new), generator=self._generator)
            left_out = torch.rand(len(new), generator=self._generator) < _LEFT_OUT
            todo = [index for index, skips in zip(order.tolist(), left_out.tolist(), strict=True)
                    if not (skips and both.losses[index] < 2 * _LEARNED)]
            for first in range(0, len(todo), hparams.ft_batch_size):
                chosen = todo[first: first + hparams.ft_batch_size]
                replayed = memory.draw(min(earlier, round(hparams.replay_ratio * len(chosen))), self._generator)
                losses = self._step([both.facts[index] for index in (*chosen, *replayed)])
                for index, loss in zip((*chosen, *replayed), losses, strict=True):
                    both.losses[index] = loss
                memory.losses = both.losses[:earlier]
            if progress is not None:
                done = len(new) * (epoch + 1) // hparams.ft_epochs
                progress(done - len(new) * epoch // hparams.ft_epochs)
        return both

    def _step(self, facts: Sequence[StoredFact]) -> list[float]:
        """One step of Adam; returns each fact's loss before it."""
        editable = self._editable
        parameters = {layer: editable.parameter(layer) for layer in editable.layers}
        for layer, weight in self._weights.items():
            editable.set_weight(layer, weight)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        gradients = {layer: torch.zeros_like(weight) for layer, weight in self._weights.items()}
        losses: list[float] = []
        # Fixed in size, so that the last steps, on the few facts that are left, are no larger than the others.
        count = max(self._hparams.ft_batch_size, len(facts))
        texts = torch.randperm(len(self._prepared.windows), generator=self._generator)[:_WINDOWS_A_STEP].tolist()
        positions = sum(len(scored_positions(self._prepared.windows[text])) for text in texts)
        for part, some in self._parts(facts, texts):
            of_facts, divergence = self._losses(part, some)
            total = of_facts.clamp(min=_LEARNED).sum() / count + self._hparams.kl_factor * divergence / positions
            if not bool(torch.isfinite(total)):
                raise ValueError(f"the loss of fine-tuning is {total.item()}: nothing was changed. Lower ft_lr, or "
                                 "look at the weights")
            found = torch.autograd.grad(total, list(parameters.values()))
            for (layer, gradient), own in zip(gradients.items(), found, strict=True):
                gradient += widened(editable.orient(layer, own))
            losses += of_facts.tolist()
        for layer, parameter in parameters.items():
            parameter.requires_grad_(False)
            self._coordinates[layer].grad = gradients[layer] @ self._whitening[layer]
        self._adam.step()
        for layer, weight in self._weights.items():
            torch.addmm(self._start[layer], self._coordinates[layer], self._whitening[layer], out=weight)
        return losses

    def _parts(self, facts: Sequence[StoredFact], texts: Sequence[int]) -> Iterator[tuple[list[TargetRow], list[int]]]:
        """Rows of facts and windows of text that run together, within ``token_budget``; a longer row runs alone."""
        windows, budget = self._prepared.windows, self._hparams.token_budget
        rows: list[TargetRow] = []
        some: list[int] = []
        tokens = 0
        items: list[TargetRow | int] = [TargetRow(self._wording(fact), fact.target) for fact in facts]
        for item in (*items, *texts):
            size = len(windows[item]) if isinstance(item, int) else len(item.prompt) + len(item.target)
            if tokens and tokens + size > budget:
                yield rows, some
                rows, some, tokens = [], [], 0
            tokens += size
            if isinstance(item, int):
                some.append(item)
            else:
                rows.append(item)
        yield rows, some

    def _losses(self, facts: Sequence[TargetRow], texts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The loss of each fact ``(facts,)``, and the sum of the KL divergences on the windows."""
        windows = self._prepared.windows
        rows = [fact.input_ids for fact in facts] + [windows[text] for text in texts]
        positions = [*(fact.positions for fact in facts), *(scored_positions(windows[text]) for text in texts)]
        model = self._editable.model
        logits = (packed_logits(model, rows, positions, [()] * len(rows)) if self._packs
                  else padded_logits(model, rows, positions))
        count = sum(len(fact.target) for fact in facts)  # positions of facts, before those of texts
        targets = torch.tensor([token for fact in facts for token in fact.target], dtype=torch.long,
                               device=logits.device)
        tokens = F.cross_entropy(logits[:count], targets, reduction="none")
        parts = torch.split(tokens, [len(fact.target) for fact in facts]) if facts else ()
        losses = torch.stack([part.mean() for part in parts]) if parts else tokens
        return losses, self._divergence(logits[count:], texts) if texts else logits.new_zeros(())

    def _divergence(self, logits: Tensor, texts: Sequence[int]) -> Tensor:
        """Sum of ``KL(unedited || edited)`` over the scored positions of some windows."""
        editable = self._editable
        with torch.no_grad():
            inputs = torch.cat([self._prepared.head_inputs[text] for text in texts]).to(logits.device)
            before = F.log_softmax(editable.logit_map.from_head(editable.lm_head(inputs).float()), dim=-1)
        return (before.exp() * (before - logits.log_softmax(dim=-1))).sum()

    def _wording(self, fact: StoredFact) -> tuple[int, ...]:
        """The prompt alone or in one of the context templates."""
        plain, *others = fact.prompts
        share, choice = torch.rand(2, generator=self._generator).tolist()
        return others[int(choice * len(others))] if others and share < _CONTEXT_SHARE else plain
