"""MEMIT and AlphaEdit written out plainly: the reference that benchmarks measure against.

From the same mathematics as the package, with nothing shared between edits or steps: one edit at a time, the whole
model on all tokens in every step, logits everywhere, and dense solves. ``plain_batch`` is an executor in EasyEdit's
protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sphere_easyedit import SPHEREHyperParams
from sphere_easyedit.editing.requests import TokenizedRequest, parse_requests, tokenize_request
from sphere_easyedit.methods.covariance import load_moment, moment_path, null_space_basis
from sphere_easyedit.models.architecture import EditableModel, frozen
from sphere_easyedit.models.replay import first_output, pad_rows


def plain_target_value(editable: EditableModel, request: TokenizedRequest, hparams: SPHEREHyperParams) -> Tensor:
    """z of one edit, ``(hidden_size,)``, by running the whole model in every step."""
    prompts = [request.plain, *request.contexts]
    rows = pad_rows([*(p.ids + request.target_ids[:-1] for p in prompts), request.drift.ids], editable.input_device)
    lookups = torch.tensor([p.lookup for p in (*prompts, request.drift)])
    every = torch.arange(len(lookups))
    delta = torch.zeros(editable.hidden_size, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=hparams.v_lr)
    initial: list[Tensor] = []
    drift_before: list[Tensor] = []

    def add_delta(_module: Any, _args: Any, output: Any) -> Any:
        hidden = first_output(output)
        if not initial:
            initial.append(hidden[0, lookups[0]].detach().clone())
        hidden = hidden.index_put((every, lookups), delta.expand(len(every), -1), accumulate=True)
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    handle = editable.block(editable.layers[-1]).register_forward_hook(add_delta)
    try:
        for step in range(hparams.v_num_grad_steps):
            out = editable.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
            log_probs = F.log_softmax(out.logits, dim=-1)
            nll = torch.stack([
                -log_probs[i, len(p.ids) - 1 + torch.arange(len(request.target_ids)), list(request.target_ids)].mean()
                for i, p in enumerate(prompts)]).mean()
            drift = log_probs[-1, request.drift.lookup]
            if not drift_before:
                drift_before.append(drift.detach().clone())
            drifted = F.kl_div(drift_before[0], drift, log_target=True, reduction="sum")
            loss = nll + hparams.kl_factor * drifted + hparams.v_weight_decay * delta.norm() / initial[0].norm() ** 2
            if loss.item() < 0.05 or step == hparams.v_num_grad_steps - 1:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            limit = hparams.clamp_norm_factor * initial[0].norm()
            with torch.no_grad():
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())
    finally:
        handle.remove()
    return initial[0] + delta.detach()


@torch.no_grad()
def plain_states(editable: EditableModel, requests: Sequence[TokenizedRequest], layer: int) -> tuple[Tensor, Tensor]:
    """Keys at a layer ``(edits, d_in)`` and outputs of the last edited block ``(edits, hidden_size)``: one run of the
    model for each edit."""
    keys, now = [], []
    for request in requests:
        prompts = [request.plain, *request.contexts]
        rows = pad_rows([prompt.ids for prompt in prompts], editable.input_device)
        lookups = torch.tensor([prompt.lookup for prompt in prompts])
        seen: list[Tensor] = []
        handles = [
            editable.down_projection(layer).register_forward_pre_hook(lambda _m, args, seen=seen: seen.append(args[0])),
            editable.block(editable.layers[-1]).register_forward_hook(
                lambda _m, _a, output, seen=seen: seen.append(first_output(output)))]
        try:
            editable.model(input_ids=rows.input_ids, attention_mask=rows.attention_mask, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        each = seen[0][torch.arange(len(lookups)), lookups]
        keys.append((each[0] + each[1:].mean(dim=0)) / 2 if len(each) > 1 else each[0])
        now.append(seen[1][0, lookups[0]])
    return torch.stack(keys), torch.stack(now)


def plain_metrics(editable: EditableModel, hparams: SPHEREHyperParams) -> dict[int, Tensor]:
    """By layer ``lambda C`` (MEMIT) or P0 (AlphaEdit), ``(d_in, d_in)`` float64: made once a run."""
    found = {}
    for layer in editable.layers:
        moment = load_moment(moment_path(editable, hparams, layer), editable.d_in(layer))
        if hparams.base_alg == "MEMIT":
            found[layer] = hparams.mom2_update_weight * moment.double()
        else:
            share = hparams.nullspace_share
            basis = null_space_basis(moment, None if share is not None else hparams.nullspace_threshold, share).double()
            found[layer] = basis @ basis.T
    return found


def plain_adjusted_keys(metric: Tensor, keys: Tensor, hparams: SPHEREHyperParams) -> Tensor:
    """``(lambda C + K K^T)^-1 K`` or ``(P0 K K^T + L2 I)^-1 P0 K``, by a dense solve in float64; K is ``(d_in, n)``."""
    keys = keys.double()
    if hparams.base_alg == "MEMIT":
        solved: Tensor = torch.linalg.solve(metric + keys @ keys.T, keys)
        return solved
    projected = metric @ keys
    solved = torch.linalg.solve(projected @ keys.T + hparams.L2 * torch.eye(len(keys), dtype=torch.float64), projected)
    return solved


def plain_batch(model: nn.Module, tok: Any, requests: list[dict[str, Any]], hparams: SPHEREHyperParams, *,
                metrics: dict[int, Tensor], **_: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A batch of MEMIT or AlphaEdit without earlier keys; ``context_templates`` must be given."""
    assert hparams.context_templates is not None
    editable = hparams.editable(model)
    originals = {editable.parameter_name(layer): editable.parameter(layer).detach().clone()
                 for layer in editable.layers}
    with frozen(model):
        tokenized = [tokenize_request(tok, request, hparams.context_templates, None)
                     for request in parse_requests(requests)]
        targets = torch.stack([plain_target_value(editable, request, hparams) for request in tokenized])
        for position, layer in enumerate(editable.layers):
            keys, now = plain_states(editable, tokenized, layer)
            residuals = (targets - now) / (len(editable.layers) - position)  # (n, d_out)
            adjusted = plain_adjusted_keys(metrics[layer], keys.T, hparams)  # (d_in, n)
            editable.set_weight(layer, editable.weight(layer) + (residuals.T.double() @ adjusted.T).float())
    return model, originals
