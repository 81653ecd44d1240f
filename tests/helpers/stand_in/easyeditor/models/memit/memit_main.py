"""MEMIT: one ridge regression a layer, weighed by what keys are like elsewhere."""

from dataclasses import dataclass

import torch

from ...util.closed_form import execute, insert
from ...util.common import LocatingHyperParams, generated, moment

CONTEXT_TEMPLATES_CACHE = None
COV_CACHE = {}


@dataclass(kw_only=True)
class MEMITHyperParams(LocatingHyperParams):
    mom2_update_weight: float
    batch_size: int = 1


def apply_memit_to_model(model, tok, requests: list[dict], hparams: MEMITHyperParams, copy=False,
                         return_orig_weights=False, cache_template=None, keep_original_weight=False, **kwargs):
    def solve(_i, layer, keys, residuals):
        cov = moment(COV_CACHE, model, hparams.rewrite_module_tmp.format(layer), hparams).double()
        keys = keys.double()
        return torch.linalg.solve(hparams.mom2_update_weight * cov + keys @ keys.T, keys) @ residuals.double()

    contexts = get_context_templates(model, tok)
    originals = insert(model, execute(model, tok, requests, hparams, contexts, cache_template, solve))
    return model, originals if return_orig_weights else {}


def get_context_templates(model, tok, length=6):
    global CONTEXT_TEMPLATES_CACHE
    CONTEXT_TEMPLATES_CACHE = CONTEXT_TEMPLATES_CACHE or [["{}"], generated(model, tok, length)]
    return CONTEXT_TEMPLATES_CACHE
