"""ROME: a rank-one update a layer, for the first request only."""

from dataclasses import dataclass

import torch

from ...util.closed_form import insert
from ...util.common import LocatingHyperParams, compute_z, fitting, generated, parameter, prepared, states
from .compute_u import compute_u

CONTEXT_TEMPLATES_CACHE = None


@dataclass(kw_only=True)
class ROMEHyperParams(LocatingHyperParams):
    context_template_length_params: list[list[int]]


def apply_rome_to_model(model, tok, request: list[dict], hparams: ROMEHyperParams, copy=False,
                        return_orig_weights=False, keep_original_weight=False, **kwargs):
    request = prepared(request[0])
    before, updates = {}, {}
    for layer in hparams.layers:
        module = hparams.rewrite_module_tmp.format(layer)
        weight = parameter(model, f"{module}.weight")
        before[weight] = weight.detach().clone()
        contexts = get_context_templates(model, tok, hparams.context_template_length_params)
        u = compute_u(model, tok, request, hparams, layer, contexts)
        value = compute_z(model, tok, request, hparams, hparams.mlp_module_tmp.format(layer), contexts)
        key, now = (states(model, tok, [request["prompt"]], [request["subject"]], module, side)[0]
                    for side in ("in", "out"))
        update = fitting(torch.outer(u, (value - now) / (key @ u)), weight.shape)
        updates[f"{module}.weight"] = update
        insert(model, {f"{module}.weight": update})
    with torch.no_grad():
        for weight, original in before.items():
            weight[...] = original
    originals = insert(model, updates)
    return model, originals if return_orig_weights else {}


def get_context_templates(model, tok, lengths):
    global CONTEXT_TEMPLATES_CACHE
    if not CONTEXT_TEMPLATES_CACHE:
        CONTEXT_TEMPLATES_CACHE = ["{}", *(text for length, _ in lengths for text in generated(model, tok, length))]
    return CONTEXT_TEMPLATES_CACHE
