"""The key of ROME's rank-one update."""

import torch

from ...util.common import moment, states

inv_mom2_cache = {}


def compute_u(model, tok, request, hparams, layer, contexts):
    module = hparams.rewrite_module_tmp.format(layer)
    templates = [context.format(request["prompt"]) for context in contexts]
    u = states(model, tok, templates, [request["subject"]] * len(templates), module, "in").mean(0)
    if hparams.mom2_adjustment:
        key = (model.config._name_or_path.replace("/", "_"), module)
        if key not in inv_mom2_cache:
            inv_mom2_cache[key] = torch.inverse(moment({}, model, module, hparams))
        u = inv_mom2_cache[key] @ u
    return u / u.norm()
