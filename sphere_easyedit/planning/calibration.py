"""Rates measured on this machine, in FLOP/s by the counts of this package."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from transformers import PreTrainedTokenizerBase

from ..editing.contexts import generator_on, sample_tokens
from ..editing.corpus import GENERATED, GENERATED_AT_ONCE
from ..editing.covariance import null_space
from ..editing.executors import is_alphaedit
from ..editing.keys import BatchStates
from ..editing.requests import TokenizedRequest
from ..editing.steering import Layout, layout_of
from ..editing.target_values import TOKENS_PER_STEP, optimise_target_values
from ..evaluation.datasets import EditRecord
from ..evaluation.generation import generate_continuations
from ..evaluation.metrics import evaluate_records
from ..hparams import SPHEREHyperParams
from ..hyperspherical import hyperspherical_energy
from ..methods.prune import prune
from ..methods.rect import rect
from ..models import EditableModel, frozen
from ..projection import PrincipalSpace
from .batches import expected_layout, micro_batches, total_tokens
from .counts import (
    energy_flops,
    evaluation_flops,
    generation_flops,
    keeps_keys,
    key_flops,
    metric_flops,
    projection_flops,
    target_value_flops,
)
from .facts import Facts
from .results import PlanSettings
from .shapes import ModelShape

logger = logging.getLogger(__name__)

STEPS: Final = 3  # gradient steps
_SECONDS: Final = 5.0  # that each part may take by a first, rough estimate
_METRIC_SIDE: Final = 768


@dataclass(frozen=True)
class Calibration:
    """What was measured.

    Attributes:
        rates: FLOP/s by kind of work (see ``times.PARTS``).
        seconds: that it took.
        edits: whose target values were optimised for it.
        layout: of the optimiser's rows, on this model.
    """

    rates: dict[str, float]
    seconds: float
    edits: int
    layout: Layout


def calibrate(editable: EditableModel, tok: PreTrainedTokenizerBase, shape: ModelShape, hparams: SPHEREHyperParams,
              settings: PlanSettings, records: Sequence[EditRecord], facts: Facts, collects: bool) -> Calibration:
    """Run a little of every kind of work and measure its rate. The model's weights stay as they are.

    Args:
        collects: statistics are still to be collected.
    """
    started = time.perf_counter()
    weight = editable.weight(editable.layers[0])
    device = weight.device
    states = _noise(512, shape.d_in, device).to(weight.dtype)
    rough = 2.0 * 512 * weight.numel() / min(_timed(lambda: states @ weight.T, device) for _ in range(5))
    rates = _algebra_rates(weight, shape, hparams, min(settings.batch_size, settings.num_edits))
    edits, layout = 0, expected_layout(shape)
    if hparams.executor == "native":
        with frozen(editable.model):
            layout = layout_of(editable, facts.requests[: settings.batch_size])
            edits = _affordable_edits(shape, hparams, settings, facts, layout, rough)
            rates |= _editing_rates(editable, shape, hparams, settings, facts, layout, edits)
    rates |= _evaluation_rates(editable, tok, shape, records, facts, rough)
    rates["contexts"] = rates["continuations"]
    if collects and hparams.mom2_dataset == GENERATED:
        rows = min(GENERATED_AT_ONCE, hparams.mom2_n_samples)
        rates["text"] = generation_flops(shape, 4 * rows) / _timed(lambda: _generate(editable, rows, 4), device)
    return Calibration(rates, time.perf_counter() - started, edits, layout)


def _noise(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, columns, generator=generator_on(device, 0), dtype=torch.float32, device=device)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


def _best(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a short piece of work without what the first call costs; of a long one as it comes."""
    first = _timed(work, device)
    return first if first > 2.0 else min(_timed(work, device) for _ in range(2))


def _affordable(costs: Sequence[float], rate: float) -> int:
    """How many of the first items can be run within the calibration's seconds; at least one."""
    spent, count = 0.0, 0
    for cost in costs:
        spent += cost
        if count and spent > rate * _SECONDS:
            break
        count += 1
    return count


# --- algebra ------------------------------------------------------------------------------------------------

@torch.no_grad()
def _algebra_rates(weight: torch.Tensor, shape: ModelShape, hparams: SPHEREHyperParams, columns: int
                   ) -> dict[str, float]:
    """Rates of what is done with weights and keys, on made-up keys."""
    device = weight.device
    wide = _noise(shape.d_in, 512, device).double()
    seconds = min(_timed(lambda: wide.T @ wide, device) for _ in range(3))
    rates = {"solve": 2.0 * 512**2 * shape.d_in / seconds / 2,  # triangular solves run at about a half of it
             "energy": energy_flops(shape) / _best(lambda: hyperspherical_energy(weight), device)}
    keys = _noise(shape.d_in, columns, device)
    shaping = projection_flops(shape, hparams, columns)
    if shaping:
        rates["projection"] = shaping / _best(lambda: _shape(weight, keys, hparams), device)
    if hparams.executor == "native":
        side = min(shape.d_in, _METRIC_SIDE)
        sample = _noise(side, 2 * side, device)
        moment = sample @ sample.T / (2 * side)
        seconds = _timed(lambda: null_space(moment, None, 0.6) if is_alphaedit(hparams)
                         else torch.linalg.cholesky(moment.double()), device)
        rates["metrics"] = metric_flops(side, hparams) / seconds
    return rates


def _shape(weight: torch.Tensor, keys: torch.Tensor, hparams: SPHEREHyperParams) -> None:
    """What becomes of one layer's update (see ``wrapper.Shaping``), on made-up keys."""
    wide = weight.float()
    if hparams.base_alg == "RECT":
        rect(0.01 * wide.roll(1, 0), wide, hparams.rect_keep)
    if hparams.base_alg == "PRUNE":
        prune(0.01 * wide.roll(1, 0), wide, hparams.prune_log_base)
    if hparams.projects:
        space = PrincipalSpace.from_weight(weight, hparams.gamma)
        if hparams.base_alg in ("AlphaEdit", "MEMIT") and hparams.executor == "native":
            space.suppress_keys(keys, hparams.alpha)
        else:
            space.suppress(wide, hparams.alpha)


# --- editing ------------------------------------------------------------------------------------------------

def _affordable_edits(shape: ModelShape, hparams: SPHEREHyperParams, settings: PlanSettings, facts: Facts,
                      layout: Layout, rate: float) -> int:
    """How many of the first batch's edits can be run with 1 and with 3 steps."""
    batch = facts.requests[: settings.batch_size]
    once, step = target_value_flops(shape, batch, hparams, layout)
    each = (2 * once + 2 * STEPS * step) / len(batch)
    count = _affordable([each] * len(batch), rate)
    logger.info("calibrating with the target values of %d edits, which takes some %.0f s", count,
                each * count / rate * 2)
    return count


def _editing_rates(editable: EditableModel, shape: ModelShape, hparams: SPHEREHyperParams, settings: PlanSettings,
                   facts: Facts, layout: Layout, edits: int) -> dict[str, float]:
    """Rates of target values and of keys, by the first edits.

    Few edits make small micro-batches, in which it weighs more that a step reads all weights, whatever its tokens: that
    price shows where a single edit takes more than its share of the time of several.
    """
    device = editable.device(editable.layers[0])
    batch = facts.requests[:edits]
    alone = _steps(shape, [batch[:1]], hparams, layout)
    several = _steps(shape, [batch], hparams, layout)
    run = _steps(shape, facts.batches(settings.batch_size), hparams, layout)
    _time_steps(editable, batch[:1], hparams, device)  # the first call of a kind costs more
    _, one_step = min((_time_steps(editable, batch[:1], hparams, device) for _ in range(2)), key=lambda pair: pair[1])
    recording, step = _time_steps(editable, batch, hparams, device)
    price = step_price(alone, one_step, several, step)
    run_step = run.groups * price + run.flops / several.flops * (step - several.groups * price)
    return {"once": several.once / recording, "steps": 2 * run.flops / run_step,
            "keys": key_flops(shape, batch, hparams) / _timed(lambda: _read_keys(editable, batch, hparams), device)}


@dataclass(frozen=True)
class Steps:
    """Counts of target values: FLOPs in a step's forward pass, and once besides (with one such pass); tokens in a step;
    micro-batches."""

    flops: float
    once: float
    tokens: int
    groups: int


def _steps(shape: ModelShape, batches: Sequence[Sequence[TokenizedRequest]], hparams: SPHEREHyperParams,
           layout: Layout) -> Steps:
    groups = [group for batch in batches for group in micro_batches(batch, hparams.token_budget, layout)]
    counts = [target_value_flops(shape, batch, hparams, layout) for batch in batches]
    return Steps(sum(step for _, step in counts), sum(once + step for once, step in counts),
                 sum(total_tokens(group.stepped) for group in groups), len(groups))


def _time_steps(editable: EditableModel, batch: Sequence[TokenizedRequest], hparams: SPHEREHyperParams,
                device: torch.device) -> tuple[float, float]:
    """Seconds of all that is run once and a forward pass; and of a step, forward and backward, by 1 and by 3 steps."""
    short = SPHEREHyperParams.from_dict({**hparams.to_dict(), "v_num_grad_steps": 1})
    # A loss that is reached early would end the steps early.
    longer = SPHEREHyperParams.from_dict({**hparams.to_dict(), "v_num_grad_steps": STEPS, "v_lr": 1e-6})
    few = _timed(lambda: optimise_target_values(editable, batch, short), device)
    many = _timed(lambda: optimise_target_values(editable, batch, longer), device)
    return few, max(many - few, 0.1 * many) / (STEPS - 1)


def step_price(alone: Steps, one_step: float, several: Steps, step: float) -> float:
    """Seconds that a micro-batch's step takes besides those in proportion to its work.

    Args:
        alone, one_step: of one edit, and the seconds of a step.
        several, step: the same of more edits; where there are no more, the optimiser's estimate in tokens tells.
    """
    ratio = several.flops / alone.flops
    if ratio < 1.5 * several.groups:  # too little apart to tell
        return step / several.groups * TOKENS_PER_STEP / (TOKENS_PER_STEP + several.tokens / several.groups)
    found = (one_step * ratio - step) / (ratio - several.groups)
    return max(0.0, min(found, 0.9 * one_step, 0.9 * step / several.groups))


def _read_keys(editable: EditableModel, batch: Sequence[TokenizedRequest], hparams: SPHEREHyperParams) -> None:
    states = BatchStates(editable, batch, hparams.token_budget)
    for position, layer in enumerate(editable.layers):
        states.read(layer)
        if layer != editable.layers[-1]:
            states.advance(layer, to=editable.layers[position + 1])
    if keeps_keys(hparams):
        states.read_all()


# --- what the model says ------------------------------------------------------------------------------------

def _evaluation_rates(editable: EditableModel, tok: PreTrainedTokenizerBase, shape: ModelShape,
                      records: Sequence[EditRecord], facts: Facts, rate: float) -> dict[str, float]:
    device = editable.device(editable.layers[0])
    costs = [evaluation_flops(shape, pairs) for pairs in facts.scored]
    count = _affordable(costs, rate)
    evaluate_records(editable.model, tok, records[:1])
    scoring = _timed(lambda: evaluate_records(editable.model, tok, records[:count]), device)
    continuing = _timed(lambda: generate_continuations(editable.model, tok, [records[0].edit_prompt], 4), device)
    return {"scores": sum(costs[:count]) / scoring, "continuations": generation_flops(shape, 4) / continuing}


@torch.no_grad()
def _generate(editable: EditableModel, rows: int, tokens: int) -> None:
    prompt = torch.zeros(rows, 1, dtype=torch.long, device=editable.input_device)
    sample_tokens(editable.model, prompt, torch.ones_like(prompt), generator_on(prompt.device, 0), top_k=0,
                  min_new_tokens=tokens, max_new_tokens=tokens, pad_token_id=0)
