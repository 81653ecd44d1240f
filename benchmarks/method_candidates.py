"""Tries ideas that are meant to keep more edits, on MEMIT with earlier keys and on AlphaEdit, one idea a run.

Each idea replaces one step of the native engine here, in this file: none is part of the package. With C the second
moment of a layer's keys, A earlier keys, K and R the batch's keys and residuals, D = W - W0 the change so far, and
``B = weight * C + A A^T + K K^T`` MEMIT's bracket, ``dW = R K^T B^-1``:

    plain            MEMIT with earlier keys
    norm-anchor      target values rescaled to the mean norm of the unedited model's states (NAS, arXiv 2602.02543)
    refreshed-keys   A recomputed after every batch, for the facts so far, with the weights as they are
    change-bracket   B + mu D^T D, with mu so that its trace is ``strength`` times weight * C's
    lyapunov         weight * (1 + q), where q grows while edits change the outputs on ordinary text by more than
                     ``strength`` a batch, relatively (LyapLock, arXiv 2505.15702)
    rotation         W <- W Q with Q orthogonal, nearest to MEMIT's update to first order, so that hyperspherical energy
                     stays (MOSE, arXiv 2601.07873)
    sphere           dW projected by SPHERE after the solve of each layer
    error-cache      the same, and what the projection took is added to the next right-hand side (arXiv 2605.26670)
    alphaedit        ``dW = R K^T P (P (A A^T + K K^T) P + L2 I)^-1``
    alphaedit-covariance   the same with ``strength`` * C in the bracket (BetaEdit, arXiv 2605.09285)

Each runs on the first facts of seed 0, which no arm of the study's comparisons edits afterwards::

    python benchmarks/method_candidates.py --data ../shared/data --stats-dir stats --output candidates.jsonl \
        --arm plain --arm plain:weight=10000 --arm plain:layers=3-12 --arm change-bracket:0.3
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from common import machine
from sphere_easyedit import EditSession, SPHEREHyperParams, apply_sphere_to_model, hyperspherical_energy
from sphere_easyedit.core.projection import PrincipalSpace
from sphere_easyedit.datasets.loaders import load_records
from sphere_easyedit.editing import solve
from sphere_easyedit.editing.requests import TokenizedRequest
from sphere_easyedit.evaluation.metrics import evaluate_records, summarise
from sphere_easyedit.evaluation.perplexity import held_out_texts, perplexity
from sphere_easyedit.methods.covariance import load_moment
from sphere_easyedit.methods.solvers import KeyHistory
from sphere_easyedit.models.architecture import EditableModel
from sphere_easyedit.models.loading import load_model

METRICS = ("efficacy", "generalization", "specificity")


class Candidate:
    """The engine's steps with one idea in them; layers are solved densely in float64."""

    def __init__(self, idea: str, strength: float, editable: EditableModel, session: EditSession) -> None:
        self.idea, self.strength, self.editable, self.session = idea, strength, editable, session
        self.requests: list[TokenizedRequest] = []
        self.norm: float | None = None
        self.queue: dict[int, float] = {}
        self.cache: dict[int, Tensor] = {}
        self._solved_targets = solve.target_values

    def target_values(self, editable: EditableModel, requests: Any, hparams: Any, *rest: Any) -> Any:
        found = self._solved_targets(editable, requests, hparams, *rest)
        self.requests += requests
        if self.idea != "norm-anchor":
            return found
        if self.norm is None:  # the first batch: the weights are still the unedited ones
            with solve.batch_states(editable, requests, hparams.token_budget, self.session.paths) as states:
                self.norm = float(states.read(editable.layers[-1])[2].norm(dim=1).mean())
        return replace(found, values=found.values * (self.norm / found.values.norm(dim=1, keepdim=True)))

    def solve_layer(self, editable: EditableModel, layer: int, keys: Tensor, residuals: Tensor, hparams: Any,
                    session: EditSession) -> Tensor:
        keys, residuals = keys.T.double(), residuals.T.double()
        weight, change = editable.weight(layer).double(), self._change(layer)
        earlier = session.history[layer].keys.double()
        moment = self._moment(layer)
        outer = earlier @ earlier.T + keys @ keys.T
        if self.idea.startswith("alphaedit"):
            space = session.metrics[layer].space
            if self.idea == "alphaedit-covariance":
                outer = outer + self.strength * moment
            system = space.project(outer) + hparams.L2 * torch.eye(len(outer), dtype=torch.float64)
            return (residuals @ torch.linalg.solve(system, space.project(keys)).T).float()
        bracket = hparams.mom2_update_weight * (1.0 + self.queue.get(layer, 0.0)) * moment + outer
        if self.idea == "change-bracket" and bool(change.any()):
            share = hparams.mom2_update_weight * float(moment.trace()) / float(change.square().sum())
            bracket = bracket + self.strength * share * (change.T @ change)
        right = residuals @ keys.T + self.cache.get(layer, 0.0)
        update = torch.linalg.solve(bracket, right.T).T
        if self.idea == "rotation":
            update = weight @ _rotation(weight, residuals, torch.linalg.solve(bracket, keys)) - weight
        if self.idea in ("sphere", "error-cache"):
            projected = PrincipalSpace.from_weight(editable.weight(layer), 0.5).suppress(update.float(), 0.8).double()
            if self.idea == "error-cache":
                self.cache[layer] = (update - projected) @ bracket
            update = projected
        if self.idea == "lyapunov":
            moved = change + update
            rise = (_on_text(moved, moment) - _on_text(change, moment)) / _on_text(weight, moment)
            self.queue[layer] = max(0.0, self.queue.get(layer, 0.0) + rise / self.strength - 1.0)
        return update.float()

    def after_batch(self, hparams: SPHEREHyperParams) -> None:
        if self.idea != "refreshed-keys":
            return
        session, editable = self.session, self.editable
        budget = hparams.token_budget
        with torch.no_grad(), solve.batch_states(editable, self.requests, budget, session.paths) as states:
            for layer, keys in states.read_all().items():
                session.history[layer] = KeyHistory(keys.T, session.metrics[layer], keys.device, session.store)

    def _change(self, layer: int) -> Tensor:
        weight = self.editable.weight(layer)
        return (weight - self.session.original[layer].to(weight)).double()

    def _moment(self, layer: int) -> Tensor:
        return load_moment(self.session.statistics[layer].path, self.editable.d_in(layer)).double()


def _on_text(change: Tensor, moment: Tensor) -> float:
    """Mean square of what a change does to the outputs on the statistics' text."""
    return float(((change @ moment) * change).sum())


def _rotation(weight: Tensor, residuals: Tensor, adjusted: Tensor) -> Tensor:
    """The orthogonal Q (Cayley) with ``W Q = W + R X^T`` to first order, as far as a skew matrix can give it."""
    wanted = torch.linalg.lstsq(weight, residuals).solution @ adjusted.T  # (d_in, d_in): W wanted = R X^T
    skew = (wanted - wanted.T) / 2
    identity = torch.eye(len(skew), dtype=torch.float64)
    return torch.linalg.solve(identity - skew / 2, identity + skew / 2)


def run(arm: str, given: argparse.Namespace) -> dict[str, Any]:
    """Edit and measure one arm: ``IDEA``, ``IDEA:STRENGTH``, ``IDEA:layers=FIRST-LAST`` or ``IDEA:weight=WEIGHT``."""
    idea, _, option = arm.partition(":")
    base = "AlphaEdit" if idea.startswith("alphaedit") else "MEMIT"
    settings: dict[str, Any] = {
        **SPHEREHyperParams.from_hparams(f"{base}/smollm2-135m").to_dict(), "alpha": 0.0, "projection_stage": "update",
        "context_templates": [], "v_num_grad_steps": 10, "v_lr": 1.0, "target_dtype": "bfloat16",
        "stats_dir": given.stats_dir, "mom2_update_weight": 3000, "keep_previous_keys": True,
        "nullspace_threshold": None, "nullspace_share": 0.9, "L2": 10}
    if option.startswith("layers="):
        first, last = map(int, option.removeprefix("layers=").split("-"))
        settings["layers"] = list(range(first, last + 1))
    if option.startswith("weight="):
        settings["mom2_update_weight"] = float(option.removeprefix("weight="))
    hparams = SPHEREHyperParams.from_dict(settings)
    model, tok = load_model(hparams.model_name, "cpu", "float32")
    editable, session = hparams.editable(model), EditSession.of(model)
    strength = float(option) if option and "=" not in option else 0.0
    candidate = Candidate(idea, strength, editable, session)
    records = load_records("counterfact", given.data / "counterfact.json", given.facts, 0)
    energy = sum(float(hyperspherical_energy(weight)) for weight in editable.weights().values())
    seconds = 0.0
    with mock.patch.object(solve, "_solve_layer", candidate.solve_layer), \
            mock.patch.object(solve, "target_values", candidate.target_values):
        for first in range(0, len(records), given.batch_size):
            started = time.process_time()
            batch = [record.request() for record in records[first: first + given.batch_size]]
            apply_sphere_to_model(model, tok, batch, hparams, session=session)
            candidate.after_batch(hparams)
            seconds += time.process_time() - started
    scores = summarise(evaluate_records(model, tok, records[:: max(1, len(records) // given.cases)]))
    after = sum(float(hyperspherical_energy(weight)) for weight in editable.weights().values())
    return {"arm": arm, "edits": len(records), **{name: scores[name]["mean"] for name in METRICS},
            "perplexity": perplexity(model, tok, held_out_texts(given.data / "wikitext_test.txt"), 8192).perplexity,
            "energy_change": after / energy - 1.0, "cpu_seconds_an_edit": seconds / len(records), "machine": machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--stats-dir", required=True)
    parser.add_argument("--output", type=Path, required=True, help="a line for each arm; done ones are kept")
    parser.add_argument("--arm", action="append", required=True)
    parser.add_argument("--facts", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--cases", type=int, default=150)
    given = parser.parse_args()
    lines = given.output.read_text(encoding="utf-8").splitlines() if given.output.exists() else []
    done = {json.loads(line)["arm"] for line in lines}
    for arm in given.arm:
        if arm not in done:
            found = run(arm, given)
            print(found, flush=True)
            with given.output.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
