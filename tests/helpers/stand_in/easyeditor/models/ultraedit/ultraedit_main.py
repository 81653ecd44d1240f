"""A gradient step a call, computed in portions: an object keeps the last model, and names of weights are a list."""

from dataclasses import dataclass

import torch

from ...util.common import parameter, rows_of


@dataclass(kw_only=True)
class UltraEditHyperParams:
    alg_name: str
    model_name: str
    model_class: str
    device: int
    inner_params: list[str]
    batch_size: int
    batch_size_once: int
    editor_batch_size: int
    lr: float
    half: bool = False
    model_parallel: bool = False


class UltraEditRewriteExecutor:
    def __init__(self):
        self.is_init = False

    def apply_to_model(self, model, tok, requests: list[dict], hparams: UltraEditHyperParams, copy=False,
                       return_orig_weights=False, keep_original_weight=False, **kwargs):
        self.model, self.tokenizer = model, tok
        if hparams.half:
            model.half()
        assert len(requests) >= hparams.batch_size
        weights = [parameter(model, f"{name.removesuffix('.weight')}.weight") for name in hparams.inner_params]
        model.requires_grad_(False)  # and so it stays, but for the weights
        for weight in weights:
            weight.requires_grad_(True)
        size, updates = hparams.batch_size_once, [torch.zeros_like(weight) for weight in weights]
        for portion in range(hparams.batch_size // size):  # what is left over is dropped
            group = requests[portion * size:(portion + 1) * size]
            rows = rows_of(tok, [f"{request['prompt']} {request['target_new']}" for request in group], model.device)
            says = model(**rows).logits.log_softmax(-1)
            losses = []
            for i, request in enumerate(group):  # the target stands last: right only where padding is on the left
                length = len(tok.encode(f" {request['target_new']}"))
                losses.append(-says[i, -length - 1:-1].gather(1, rows["input_ids"][i, -length:, None]).mean())
            for update, gradient in zip(updates, torch.autograd.grad(sum(losses), weights), strict=True):
                update -= hparams.lr * gradient / (gradient.norm() + 1e-6)
        with torch.no_grad():
            for weight, update in zip(weights, updates, strict=True):
                weight += update
        return self.model, {}  # none is returned, whatever is asked
