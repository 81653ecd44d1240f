"""How few steps a target value needs: optimisers by loss over all contexts against rows that they ran, an edit.

Every arm starts from zero on the same edits, whose rows are recorded once, and stops an edit as the package does. After
some of its steps the loss is computed over all contexts, without gradient and not counted.

    python benchmarks/optimiser_steps.py --data ../shared/data/counterfact.json --edits 40 --seed 0
"""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from common import machine
from sphere_easyedit import SPHEREHyperParams
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing.contexts import generate_contexts
from sphere_easyedit.editing.delta_forward import DeltaForward, rows_of
from sphere_easyedit.editing.normalised_descent import NormalisedDescent
from sphere_easyedit.editing.requests import parse_requests, tokenize_request
from sphere_easyedit.editing.target_values import _MicroBatch, context_rounds
from sphere_easyedit.models.architecture import frozen
from sphere_easyedit.models.loading import load_model
from sphere_easyedit.models.logit_map import find_logit_map
from sphere_easyedit.models.packing import attending_packed
from sphere_easyedit.models.replay import pad_rows

# From delta, norms of states (edits, 1) and planned steps: what takes the losses and changes delta in place.
Rule = Callable[[Tensor, Tensor, int], Callable[[Tensor], object]]


def adam(lr: float, betas: tuple[float, float] = (0.9, 0.999), decays: bool = False) -> Rule:
    def start(delta: Tensor, norms: Tensor, steps: int) -> Callable[[Tensor], object]:
        optimiser = torch.optim.Adam([delta], lr=lr, betas=betas)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps if decays else 10**9, eta_min=lr / 10)
        return lambda losses: (optimiser.step(), cosine.step())
    return start


def normalised(factor: float) -> Rule:
    def start(delta: Tensor, norms: Tensor, steps: int) -> Callable[[Tensor], object]:
        optimiser = NormalisedDescent(delta, factor * norms, steps)
        return lambda _: optimiser.step()
    return start


def polyak(longest: float) -> Rule:  # steps to where the tangent is 0
    def step(delta: Tensor, norms: Tensor, losses: Tensor) -> None:
        size = delta.grad.norm(dim=1, keepdim=True) + 1e-12
        delta.data -= (losses[:, None] / size).minimum(longest * norms) * delta.grad / size
    return lambda delta, norms, steps: partial(step, delta, norms)


def barzilai_borwein(first: float, longest: float) -> Rule:
    def start(delta: Tensor, norms: Tensor, steps: int) -> Callable[[Tensor], object]:
        earlier: list[Tensor] = []  # delta and its gradient before the last step

        def step(losses: Tensor) -> None:
            at, gradient = delta.detach().clone(), delta.grad.clone()
            size = gradient.norm(dim=1, keepdim=True) + 1e-12
            rate = first * norms / size
            if earlier:
                moved, change = at - earlier[0], gradient - earlier[1]
                product = (moved * change).sum(dim=1, keepdim=True)
                most = longest * norms / size
                rate = torch.where(product > 0, moved.square().sum(dim=1, keepdim=True) / product, most).minimum(most)
            earlier[:] = at, gradient
            delta.data -= rate * gradient
        return step
    return start


ARMS: dict[str, tuple[str, int, Rule]] = {  # contexts of a step, steps
    "Adam 0.5, all contexts": ("all", 24, adam(0.5)),
    "Adam 0.5": ("one", 24, adam(0.5)),
    "Adam 1.0": ("one", 16, adam(1.0)),
    "Adam 1.0, cosine": ("one", 12, adam(1.0, decays=True)),
    "Adam 2.0, cosine": ("one", 10, adam(2.0, decays=True)),
    "Adam 2.0, cosine, betas 0.8, 0.95": ("one", 10, adam(2.0, (0.8, 0.95), decays=True)),
    "Polyak, at most 1.0": ("one", 12, polyak(1.0)),
    "Barzilai-Borwein 0.2, all contexts": ("all", 10, barzilai_borwein(0.2, 0.6)),
    "Adam 0.5, one prompt": ("prompt", 24, adam(0.5)),
    "normalised 0.4, one prompt": ("prompt", 12, normalised(0.4)),
    "normalised 0.28": ("one", 10, normalised(0.28)),
    "normalised 0.28, 8 steps": ("one", 8, normalised(0.28)),
    "normalised 0.4": ("one", 10, normalised(0.4)),
    "normalised 0.4, 7 steps": ("one", 7, normalised(0.4)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CounterFact file")
    parser.add_argument("--edits", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of context templates and their order")
    args = parser.parse_args()
    hparams = SPHEREHyperParams.from_hparams("MEMIT/smollm2-135m")
    model, tok = load_model(hparams.model_name, "cpu", "float32")
    editable = hparams.editable(model)
    requests = [record.request() for record in load_records("counterfact", args.data, args.edits, seed=0)]
    with frozen(model):
        contexts = generate_contexts(editable, tok, args.seed)
        edits = [tokenize_request(tok, request, contexts, None) for request in parse_requests(requests)]
        few = pad_rows([edits[0].plain.ids[:4]], editable.input_device)
        editable.logit_map = find_logit_map(editable, few.input_ids)
    rows, count = [row for i, edit in enumerate(edits) for row in rows_of(i, edit)], len(contexts)
    with frozen(model), attending_packed(model):
        full = DeltaForward.record(editable, rows, editable.layers[-1], "packed")
        one = context_rounds(count, 1, args.seed)
        rounds = {"all": [full], "one": [full.with_contexts(some, count) for some in one],
                  "prompt": [full._select(lambda row, i=i: row.context in (-1, i), 1 + count)
                             for i in (0, *(i for some in one for i in some))]}
        batch = _MicroBatch(editable, edits, hparams, [full], None)
        print(machine())
        for name, (kind, steps, rule) in ARMS.items():
            print(f"{name:36}", *run(batch, full, rounds[kind], steps, rule, hparams.clamp_norm_factor), flush=True)


def run(batch: _MicroBatch, full: DeltaForward, forwards: list[DeltaForward], steps: int, rule: Rule, clamp: float
        ) -> list[str]:
    norms = full.initial.norm(dim=1, keepdim=True)
    delta = torch.zeros_like(full.initial, requires_grad=True)
    step, recent, rows = rule(delta, norms, steps), deque[Tensor](maxlen=len(forwards)), 0
    active, found = torch.ones(len(norms), dtype=torch.bool), []
    for taken in range(1, steps + 1):
        delta.grad = None
        forward = forwards[(taken - 1) % len(forwards)]
        recent.append(batch._losses(delta, forward))
        mean = torch.stack(list(recent)).mean(dim=0)
        active &= (mean >= 0.05) | (len(recent) < len(forwards))
        rows += sum(bool(active[row.edit]) for part in forward._parts for row in part.rows)
        before = delta.detach().clone()
        step(recent[-1])
        with torch.no_grad():
            delta.mul_((clamp * norms / delta.norm(dim=1, keepdim=True)).clamp(max=1.0))
            delta.copy_(torch.where(active[:, None], delta, before))
            if taken in (4, 6, 8, 10, 12, 16, 20) or taken == steps:
                loss = float(batch._losses(delta, full).mean())
                found.append(f"{taken}: {loss:.3f} ({rows / len(norms):.0f})")
    return [*found, f"|delta| {float((delta.norm(dim=1, keepdim=True) / norms).mean().detach()):.2f} |z_0|"]


if __name__ == "__main__":
    main()
