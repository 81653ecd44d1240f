"""EMMET-like: MEMIT with a ridge of its own, which keeps original weights only when told to."""

from dataclasses import dataclass

import torch

from ...util.closed_form import execute, insert
from ...util.common import LocatingHyperParams, generated, moment

CONTEXT_TEMPLATES_CACHE = None
COV_CACHE = {}


@dataclass(kw_only=True)
class EMMETHyperParams(LocatingHyperParams):
    mom2_update_weight: float
    emmet_lambda: float = 0.1
    batch_size: int = 1


def apply_emmet_to_model(model, tok, requests: list[dict], hparams: EMMETHyperParams, copy=False,
                         return_orig_weights=False, cache_template=None, keep_original_weight=False, **kwargs):
    def solve(_i, layer, keys, residuals):
        cov = moment(COV_CACHE, model, hparams.rewrite_module_tmp.format(layer), hparams)
        cov = hparams.mom2_update_weight * cov + hparams.emmet_lambda * torch.eye(len(cov), device=cov.device)
        return torch.linalg.solve(cov + keys @ keys.T, keys) @ residuals

    if ("gpt2" in model.config._name_or_path) != (model.config.model_type == "gpt2"):
        raise RuntimeError("the path names another family")  # PMET and EAMET just compute nonsense
    contexts = get_context_templates(model, tok)
    originals = insert(model, execute(model, tok, requests, hparams, contexts, cache_template, solve))
    return model, originals if keep_original_weight else {}


def get_context_templates(model, tok, length=4):
    global CONTEXT_TEMPLATES_CACHE
    CONTEXT_TEMPLATES_CACHE = CONTEXT_TEMPLATES_CACHE or [["{}"], generated(model, tok, length)]
    return CONTEXT_TEMPLATES_CACHE
