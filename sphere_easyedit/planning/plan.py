"""Everything that a run will need, put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..configs import planning_config
from ..editing.contexts import generate_contexts
from ..evaluation.datasets import EditRecord
from ..hparams import SPHEREHyperParams
from ..loading import load_model, model_source, resolve_device
from ..models import frozen, max_positions
from .batches import expected_layout
from .calibration import STEPS, Calibration, calibrate
from .facts import CHARACTERS_PER_TOKEN, STAND_IN_CONTEXTS, Facts, facts_in_tokens, sample
from .files import disk_items, downloads
from .inventory import Statistics, find_statistics, find_tokenizer, find_weights
from .memory import memory_items, peak_bytes, resident_bytes
from .results import Plan, PlanSettings
from .shapes import ModelShape, dtype_of, model_shape
from .times import PARTS, run_flops, time_parts, total_seconds


def make_plan(hparams: SPHEREHyperParams, settings: PlanSettings) -> Plan:
    """Everything that a run with these settings will need.

    Raises:
        ValueError: an unusable config or data set, module names that do not fit, or a rate of no kind of work.
    """
    kinds = sorted({kind for kinds in PARTS.values() for kind in kinds})
    if unknown := sorted(set(settings.rates) - set(kinds)):
        raise ValueError(f"there is no work of the kind {', '.join(unknown)}: give rates of {', '.join(kinds)}")
    source = model_source(hparams.model_name)
    config = planning_config(hparams.model_name, source)
    shape = model_shape(config, hparams.module_names(config), hparams.layers, dtype_of(config, settings.dtype))
    here, download = find_weights(source, shape)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if hparams.model_parallel \
        else resolve_device(hparams.device)
    statistics = find_statistics(config, shape, hparams)
    records = sample(settings)
    limit = max_positions(config)
    base = resident_bytes()  # before anything is loaded
    notes = [statistics.note] if statistics.note else []
    if here and settings.calibrate:
        facts, calibration = _measured(hparams, settings, shape, statistics, records, limit)
        layout = calibration.layout
    else:
        calibration, layout = None, expected_layout(shape)
        tok = find_tokenizer(source)
        if tok is None:
            notes.append(f"no tokenizer of {hparams.model_name} here: {CHARACTERS_PER_TOKEN:g} characters are taken "
                         "for a token")
        facts = facts_in_tokens(records, tok, _contexts(hparams), limit)
    rates = ({} if calibration is None else calibration.rates) | {k: 1e9 * rate for k, rate in settings.rates.items()}
    time = time_parts(run_flops(shape, hparams, settings, facts, statistics, layout), rates, settings.gflops)
    memory = memory_items(shape, hparams, settings, facts, device.type, statistics, layout, base)
    return Plan(
        model=hparams.model_name, device=str(device), num_edits=settings.num_edits, batch_size=settings.batch_size,
        method=_method(settings, calibration, here), seconds=total_seconds(time), time=time, memory=memory,
        peak_bytes=peak_bytes(memory, device.type), disk=disk_items(shape, hparams, settings, statistics, source),
        downloads=downloads(hparams, download, statistics),
        notes=[*notes, *_notes(hparams, settings, records, bool(rates) or settings.gflops is not None)])


def _contexts(hparams: SPHEREHyperParams) -> Sequence[str]:
    return STAND_IN_CONTEXTS if hparams.context_templates is None else hparams.context_templates


def _measured(hparams: SPHEREHyperParams, settings: PlanSettings, shape: ModelShape, statistics: Statistics,
              records: Sequence[EditRecord], limit: int | None) -> tuple[Facts, Calibration]:
    """The facts behind the model's own context templates, and the rates at which it runs."""
    model, tok = load_model(hparams.model_name, "auto" if hparams.model_parallel else hparams.device, settings.dtype)
    editable, contexts = hparams.editable(model), _contexts(hparams)
    if hparams.context_templates is None and hparams.executor == "native":
        with frozen(model):
            contexts = generate_contexts(editable, tok, hparams.seed)
    facts = facts_in_tokens(records, tok, contexts, limit)
    return facts, calibrate(editable, tok, shape, hparams, settings, records, facts, bool(statistics.missing))


def _notes(hparams: SPHEREHyperParams, settings: PlanSettings, records: Sequence[EditRecord], timed: bool) -> list[str]:
    notes = []
    if hparams.executor == "easyedit":
        notes.append(f"EasyEdit's own {hparams.base_alg} is not planned: its time, memory and files come on top")
    elif timed:
        notes.append(f"target values: all {hparams.v_num_grad_steps} steps; edits whose loss falls below 0.05 take "
                     "fewer")
    if settings.processes > 1:
        notes.append(f"{settings.processes} processes: time of the busiest, memory of each; what they send each other "
                     "is not counted")
    if settings.num_edits > len(records):
        notes.append(f"token counts are those of the first {len(records)} facts of {settings.dataset}")
    return notes


def _method(settings: PlanSettings, calibration: Calibration | None, here: bool) -> str:
    if calibration is not None:
        return (f"counted FLOPs of every part, over the rates that a calibration of {calibration.seconds:.0f} s on "
                f"this machine measured with this model ({calibration.edits} edits, {STEPS} steps)")
    why = "not asked for" if not settings.calibrate else "the model's weights are not on this machine"
    stated = [*([] if settings.gflops is None else [f"{settings.gflops:g}"]),
              *(f"{kind} at {rate:g}" for kind, rate in settings.rates.items())]
    if not stated:
        return f"counted FLOPs; no calibration ({why}): give --gflops, the rate of the machine, for seconds"
    return f"counted FLOPs at {', '.join(stated)} GFLOP/s as stated; no calibration ({why})"
