"""The frame of MEMIT, AlphaEdit and EMMET: target values, then one solve a layer."""

from pathlib import Path

import numpy as np
import torch

from .common import compute_z, fitting, parameter, prepared, states


def keys_of(model, tok, requests, hparams, layer, contexts):
    """``(n, d_in)``: mean over the kinds of contexts of each kind's mean."""
    flat = [context for kind in contexts for context in kind]
    templates = [context.format(request["prompt"]) for request in requests for context in flat]
    subjects = [request["subject"] for request in requests for _ in flat]
    found = states(model, tok, templates, subjects, hparams.rewrite_module_tmp.format(layer), "in")
    kinds = found.view(len(requests), len(flat), -1).split([len(kind) for kind in contexts], dim=1)
    return torch.stack([kind.mean(1) for kind in kinds]).mean(0)


def _target_value(model, tok, request, hparams, contexts, cache_template):
    layer = hparams.layers[-1]
    path = Path(str(cache_template).format(layer, hparams.clamp_norm_factor, request.get("case_id")))
    if cache_template is not None and path.exists():
        return torch.from_numpy(np.load(path)["v_star"]).to(next(model.parameters()).device)
    flat = [context for kind in contexts for context in kind]
    value = compute_z(model, tok, request, hparams, hparams.layer_module_tmp.format(layer), flat)
    if cache_template is not None:
        np.savez(path, v_star=value.cpu().numpy())
    return value


@torch.no_grad()
def execute(model, tok, requests, hparams, contexts, cache_template, solve, remember=None):
    """Updates by parameter name; the weights are put back, unless something fails on the way.

    ``remember`` is told each layer's keys of the edited model.
    """
    requests, count = [prepared(request) for request in requests], len(hparams.layers)
    prompts, subjects = zip(*((request["prompt"], request["subject"]) for request in requests), strict=True)
    with torch.enable_grad():
        values = torch.stack([_target_value(model, tok, request, hparams, contexts, cache_template)
                              for request in requests])
    names = [f"{hparams.rewrite_module_tmp.format(layer)}.weight" for layer in hparams.layers]
    before, updates = {name: parameter(model, name).clone() for name in names}, {}
    module = hparams.layer_module_tmp.format(hparams.layers[-1])
    for i, (layer, name) in enumerate(zip(hparams.layers, names, strict=True)):
        keys = keys_of(model, tok, requests, hparams, layer, contexts)
        now = states(model, tok, prompts, subjects, module, "out")
        update = solve(i, layer, keys.T, (values - now) / (count - i))
        updates[name] = fitting(update, before[name].shape).float()
        parameter(model, name)[...] += updates[name]
    for i, layer in enumerate(hparams.layers if remember else []):
        remember(i, keys_of(model, tok, requests, hparams, layer, contexts).T)
    for name, weight in before.items():
        parameter(model, name)[...] = weight
    return updates


@torch.no_grad()
def insert(model, updates):
    """Add the updates; the original weights by name."""
    originals = {name: parameter(model, name).clone() for name in updates}
    for name, update in updates.items():
        parameter(model, name)[...] += update
    return originals
