"""Seconds of a run's parts, scaled from a few edits on this machine; rough FLOPs where the model is elsewhere."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..core.hyperspherical import hyperspherical_energy
from ..core.projection import PrincipalSpace
from ..datasets.loaders import EditRecord
from ..editing.contexts import generate_contexts
from ..editing.keys import BatchStates
from ..editing.requests import parse_requests, tokenize_request
from ..editing.target_values import optimise_target_values
from ..evaluation.generation import generate_continuations
from ..evaluation.metrics import evaluate_records
from ..hparams import SPHEREHyperParams
from ..methods.corpus import GENERATED, GENERATED_AT_ONCE
from ..models.architecture import EditableModel, frozen, max_positions
from ..models.sampling import generator_on, sample_tokens
from .memory import keeps_keys, null_space_columns
from .results import PlanSettings
from .sizes import ModelShape, Statistics, Tokens, count_tokens

_FEW, _MANY = 3, 6  # gradient steps; the first ones of a call cost more than the others
_NEW_TOKENS: Final = 20  # of the continuations that an evaluation shows, which run together
PARTS: Final = ("statistics", "preparation", "target values", "keys and solve", "projection and energy",
                "evaluation before", "evaluation after")


def run_seconds(editable: EditableModel, tok: PreTrainedTokenizerBase, shape: ModelShape, hparams: SPHEREHyperParams,
                settings: PlanSettings, records: Sequence[EditRecord], statistics: Statistics) -> dict[str, float]:
    """Seconds of a run's parts, by the time of a few edits, one layer and a few tokens; weights are not changed."""
    weight = editable.weight(editable.layers[0])
    device, edits, layers = weight.device, settings.num_edits, len(hparams.layers)
    batches = math.ceil(edits / settings.batch_size)
    energy = _timed(lambda: hyperspherical_energy(weight), device)
    projecting = _timed(lambda: _project(weight, hparams, settings.batch_size), device)
    count, scoring = _several(lambda count: evaluate_records(editable.model, tok, records[:count]), len(records), 5.0,
                              device)
    token = _timed(lambda: generate_continuations(editable.model, tok, [records[0].edit_prompt], 4), device) / 4
    evaluation = edits * scoring / count + _NEW_TOKENS * token
    found = dict.fromkeys(PARTS, 0.0) | dict.fromkeys(PARTS[-2:], evaluation) | {
        "projection and energy": layers * (batches * projecting + (batches + 1) * energy)}
    if hparams.executor == "native":
        reading = scoring / count / count_tokens(records[:count], ()).scored  # a token
        with frozen(editable.model):
            found |= _native_seconds(editable, tok, shape, hparams, settings, records, statistics, reading)
    return found


def _native_seconds(editable: EditableModel, tok: PreTrainedTokenizerBase, shape: ModelShape,
                    hparams: SPHEREHyperParams, settings: PlanSettings, records: Sequence[EditRecord],
                    statistics: Statistics, reading: float) -> dict[str, float]:
    """Seconds of statistics, preparation, target values, keys and solve, where ``reading`` a token is known."""
    device, layers = editable.device(editable.layers[0]), editable.layers
    wide = _noise(shape.d_in, 512, device).double()
    flop = _timed(lambda: wide.T @ wide, device) / (512**2 * shape.d_in)  # solves run at half the speed of products
    started, contexts = time.perf_counter(), hparams.context_templates
    if contexts is None:
        contexts = generate_contexts(editable, tok, hparams.seed)
    preparing = time.perf_counter() - started + flop * metric_flops(shape, hparams, statistics)
    collecting = reading + flop * len(layers) * shape.d_in**2 / 2  # products in float32
    if statistics.missing and hparams.mom2_dataset == GENERATED:
        rows = torch.zeros(GENERATED_AT_ONCE, 1, dtype=torch.long, device=editable.input_device)
        collecting += _timed(lambda: sample_tokens(
            editable.model, rows, torch.ones_like(rows), generator_on(rows.device, 0), top_k=0, min_new_tokens=4,
            max_new_tokens=4, pad_token_id=0), device) / (4 * len(rows))
    requests = [tokenize_request(tok, request, contexts, max_positions(editable.config)) for request in
                parse_requests([record.request() for record in records[: settings.batch_size]])]
    # A loss that is reached early would end the steps early.
    short, long = (SPHEREHyperParams.from_dict({
        **hparams.to_dict(), "v_lr": 1e-6, "step_norm_factor": 1e-6,
        "v_num_grad_steps" if hparams.normalised_steps is None else "normalised_steps": steps})
                   for steps in (_FEW, _MANY))
    # Several edits at once take about half the time of as many single ones.
    count, many = _several(lambda count: optimise_target_values(editable, requests[:count], long), len(requests), 40.0,
                           device)
    few = _timed(lambda: optimise_target_values(editable, requests[:count], short), device)
    step = max(many - few, 0.1 * many) / (_MANY - _FEW)

    def read_keys() -> None:
        states = BatchStates(editable, requests[:count], hparams.token_budget)
        for layer, following in pairwise(layers):
            states.read(layer)
            states.advance(layer, to=following)
        states.read(layers[-1])
        if keeps_keys(hparams):
            states.read_all()

    scale, keys = settings.num_edits / count, _timed(read_keys, device)
    return {"statistics": statistics.tokens * collecting, "preparation": preparing,
            "target values": scale * (few + (hparams.gradient_steps - _FEW) * step),
            "keys and solve": scale * keys + flop * solve_flops(shape, hparams, settings.num_edits)}


def _timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of some work; of the second time where the first was short."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if (seconds := time.perf_counter() - started) > 0.5:
            break
    return seconds


def _several(work: Callable[[int], object], most: int, seconds: float, device: torch.device) -> tuple[int, float]:
    """Run work on as many items as take this long by the time of one; returns their number and the seconds of all."""
    count = min(most, max(1, int(seconds / _timed(lambda: work(1), device))))
    return count, _timed(lambda: work(count), device)


def _noise(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=generator_on(device, 0), device=device)


@torch.no_grad()
def _project(weight: Tensor, hparams: SPHEREHyperParams, columns: int) -> None:
    """Restrain and project a made-up update of one layer."""
    wide = weight.float()
    update = 0.01 * wide.roll(1, 0)
    hparams.method.restrain(update, wide, hparams)
    if hparams.method.restrains_whole_change:
        hparams.method.restrain_whole_change(update, wide, hparams)
    if hparams.projects:
        space = PrincipalSpace.from_weight(weight, hparams.gamma)
        space.suppress_keys(_noise(weight.shape[1], columns, weight.device), hparams.alpha)


def solve_flops(shape: ModelShape, hparams: SPHEREHyperParams, num_edits: int) -> float:
    """FLOPs of all solves, in float64.

    Each key is weighed about twice (``4 d_in q`` by the q columns of a null space, ``2 d_in^2`` by a factor of C) and
    solved with the ``m`` earlier keys that are kept (``2 d_in m + m^2``); d_in of these are absorbed at a time.
    """
    weigh = (4.0 * shape.d_in * null_space_columns(shape, hparams) if hparams.method.uses_null_space
             else 2.0 * shape.d_in**2)
    if not keeps_keys(hparams):
        return len(hparams.layers) * 2 * num_edits * weigh
    most = min(num_edits, shape.d_in)  # so the mean of m is half of it, that of m^2 a third of its square
    absorbing = num_edits // shape.d_in * 7 / 3 * shape.d_in**3
    return len(hparams.layers) * (3 * num_edits * (weigh + shape.d_in * most + most**2 / 3) + absorbing)


def metric_flops(shape: ModelShape, hparams: SPHEREHyperParams, statistics: Statistics) -> float:
    """FLOPs of all layers' null spaces (eigenproblems) or Cholesky factors of C, where these are not on file."""
    each = (10 / 3 if hparams.method.uses_null_space else 1 / 3) * float(shape.d_in) ** 3
    return 0.0 if statistics.metric_is_filed else len(hparams.layers) * each


def part_flops(shape: ModelShape, hparams: SPHEREHyperParams, settings: PlanSettings, tokens: Tokens,
               statistics: Statistics) -> dict[str, float]:
    """Rough FLOPs of a run's parts: 2 a token and matrix entry; products and eigenproblems to leading order."""
    edits, layers, last, blocks = settings.num_edits, len(hparams.layers), hparams.layers[-1], shape.blocks
    small, large = sorted((float(shape.d_out), float(shape.d_in)))
    block, head = 2.0 * shape.block_entries, 2.0 * shape.vocabulary * shape.hidden  # of a token, of a position
    projection = hparams.projects * (2 * small**2 * large + 2 * small**3) + small**2 * large  # and the energy
    found = dict.fromkeys(PARTS, 0.0) | dict.fromkeys(PARTS[-2:], edits * block * blocks * tokens.scored) | {
        "projection and energy": layers * math.ceil(edits / settings.batch_size) * projection}
    if hparams.executor != "native":
        return found
    step = block * (blocks - 1 - last) * tokens.stepped + head * tokens.predicted  # forward; backward costs the same
    return found | {
        "statistics": statistics.tokens * (2 * block * blocks + 2 * layers * shape.d_in**2),
        "preparation": metric_flops(shape, hparams, statistics),
        "target values": edits * (block * blocks * tokens.read + 2 * hparams.gradient_steps * step),
        "keys and solve": edits * 2 * block * (last + 1) * tokens.read + solve_flops(shape, hparams, edits)}
