"""Runs another method on the first weights and keeps what its change does on the keys of a prompt.

State is kept on the hyperparameters, the other method's of which come from a second file.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from ...util.common import parameter, rows_of


@dataclass(kw_only=True)
class SimIEHyperParams:
    base_method: str
    lamHyper: float
    init_model: bool
    solver: str
    fast: bool
    fp16: bool
    alg_name: str
    model_name: str
    device: int
    model_parallel: bool
    _base_hparams: Any = field(default=None, repr=False, init=False)


class SimIE:
    def __init__(self, lamHyper, init, solver="LU"):
        self.lamHyper, self.init, self.solver = lamHyper, init, solver

    def initialization(self, model_name, init_weights, device, fast=True):
        self.transpose = "gpt2" in model_name
        self.init_weights_copy = {name: weight.clone() for name, weight in init_weights.items()}
        self.weights_copy = {name: weight.clone() for name, weight in init_weights.items()}
        self.matrix_P = {name: self.lamHyper * torch.eye(weight.shape[0 if self.transpose else 1])
                         for name, weight in init_weights.items()}

    @torch.no_grad()
    def reset_parameter(self, model):
        for name, weight in self.init_weights_copy.items():
            parameter(model, name)[...] = weight

    @torch.no_grad()
    def keys(self, model, tok, request):
        found, rows = {}, rows_of(tok, [f"{request['prompt']} {request['target_new']}"], model.device)
        handles = [model.get_submodule(name.removesuffix(".weight")).register_forward_hook(
            lambda _module, args, _out, name=name: found.update({name: args[0][0]})) for name in self.matrix_P]
        model(**rows)
        for handle in handles:
            handle.remove()
        return found

    @torch.no_grad()
    def update(self, model, keys):
        for name, key in keys.items():
            gram, weight, before = key.T @ key, parameter(model, name), self.weights_copy[name]
            self.matrix_P[name] += gram
            change = weight - before
            share = torch.linalg.solve(self.matrix_P[name].T, gram.T).T
            self.weights_copy[name] = before + ((change.T @ share).T if self.transpose else change @ share)
            weight[...] = self.weights_copy[name]


def apply_simie_to_model(model, tok, requests: list[dict], hparams: SimIEHyperParams, copy=False,
                         return_orig_weights=True, keep_original_weight=False, **kwargs):
    from ...util.alg_dict import ALG_DICT

    def edit(request):
        return ALG_DICT[hparams.base_method](model, tok, [request], hparams._base_hparams, copy=False,
                                             return_orig_weights=True, keep_original_weight=False, **kwargs)[1]

    if getattr(hparams, "_simie_instance", None) is None:
        hparams._simie_instance = SimIE(hparams.lamHyper, hparams.init_model, hparams.solver)
        hparams._simie_instance.initialization(hparams.model_name, edit(requests[-1]), hparams.device, hparams.fast)
        hparams._simie_instance.reset_parameter(model)
    simie = hparams._simie_instance
    for request in requests:
        if simie.init:
            simie.reset_parameter(model)
        keys = simie.keys(model, tok, request)
        edit(request)
        simie.update(model, keys)
    return model, simie.init_weights_copy
