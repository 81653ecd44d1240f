"""Fine-tuning: a few steps of Adam on whatever parameter's name holds the template."""

from __future__ import annotations  # so that annotations are texts, as they may be in anyone's file

from dataclasses import dataclass

import torch

from ...util.closed_form import insert
from ...util.common import HyperParams, rows_of, torch_device


@dataclass(kw_only=True)
class FTHyperParams(HyperParams):
    num_steps: int
    lr: float
    batch_size: int = 64


def apply_ft_to_model(model, tok, requests: list[dict], hparams: FTHyperParams, copy=False, return_orig_weights=False,
                      keep_original_weight=False, **kwargs):
    weights = {name: weight for name, weight in model.named_parameters()
               if any(hparams.rewrite_module_tmp.format(layer) in name for layer in hparams.layers)}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    adam = torch.optim.Adam(weights.values(), lr=hparams.lr)
    for name, weight in model.named_parameters():
        weight.requires_grad = name in weights  # and so they stay
    texts = [f"{request['prompt']} {request['target_new']}" for request in requests]
    for _ in range(hparams.num_steps):
        rows = rows_of(tok, texts, torch_device(hparams))
        logits, losses = model(**rows).logits.log_softmax(-1), []
        for i, request in enumerate(requests):  # the target stands last: right only where padding is on the left
            length = len(tok.encode(texts[i])) - len(tok.encode(request["prompt"]))
            losses.append(-logits[i, -length - 1:-1].gather(1, rows["input_ids"][i, -length:, None]).mean())
        adam.zero_grad()
        torch.stack(losses).mean().backward()
        adam.step()
    updates = {name: (weight - before[name]).detach() for name, weight in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight[...] = before[name]
    originals = insert(model, updates)
    return model, originals if return_orig_weights else {}
