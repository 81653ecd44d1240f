"""Everything that a run will need."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

import torch

from ..datasets.loaders import load_records
from ..hparams import SPHEREHyperParams
from ..models.loading import load_model, model_source, resolve_device
from ..models.shipped_configs import planning_config
from ..runs.sequential import peak_memory_bytes
from .files import bytes_to_download, disk_items, downloads, find_statistics
from .memory import memory_items, peak_bytes
from .results import Plan, PlanSettings, TimePart
from .sizes import CHARACTERS_PER_TOKEN, count_tokens, dtype_of, model_shape
from .times import part_flops, run_seconds

_SAMPLE: Final = 300  # facts; the others are taken to be like them


def make_plan(hparams: SPHEREHyperParams, settings: PlanSettings) -> Plan:
    """Predict what a run needs; a ValueError for an unusable config or data set, or module names that do not fit."""
    if hparams.method.fine_tunes:
        raise ValueError(f"base_alg is {hparams.base_alg}, whose time and memory can't be planned yet: edit a batch "
                         "with `edit --num-edits`, and see the seconds an edit and the memory that it prints")
    source = model_source(hparams.model_name)
    config = planning_config(hparams.model_name, source)
    shape = model_shape(config, hparams.module_names(config), hparams.layers, dtype_of(config, settings.dtype))
    download = bytes_to_download(source, shape)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if hparams.model_parallel \
        else resolve_device(hparams.device)
    statistics = find_statistics(config, hparams)
    count = None if settings.dataset == "demo" else settings.num_edits  # of demonstration facts there are few
    records = load_records(settings.dataset, settings.data, count, settings.seed)[: min(settings.num_edits, _SAMPLE)]
    base = peak_memory_bytes(torch.nn.Module())  # of Python and its libraries, before a model is loaded
    tokens = count_tokens(records, hparams.context_templates, hparams.contexts_per_step)
    if download is None and settings.calibrate:
        started = time.perf_counter()
        placement = "auto" if hparams.model_parallel else hparams.device
        model, tok = load_model(hparams.model_name, placement, settings.dtype)
        editable = hparams.editable(model)
        seconds: Mapping[str, float | None] = run_seconds(editable, tok, shape, hparams, settings, records, statistics)
        method = f"scaled from a calibration of {time.perf_counter() - started:.0f} s with this model on this machine"
    else:
        flops = part_flops(shape, hparams, settings, tokens, statistics)
        speed = settings.gflops
        seconds = {name: None if speed is None else part / (1e9 * speed) for name, part in flops.items()}
        why = "the model's weights are not on this machine" if settings.calibrate else "not asked for"
        method = f"no calibration ({why}); " + (
            "give --gflops, the speed of the machine, for a rough time" if speed is None else
            f"rough FLOPs at {speed:g} GFLOP/s as stated, {CHARACTERS_PER_TOKEN:g} characters to a token")
    notes = [f"EasyEdit's own {hparams.base_alg} is not planned: its time, memory and files come on top"
             ] if hparams.executor == "easyedit" else []
    known = [each for each in seconds.values() if each is not None]
    memory = memory_items(shape, hparams, settings, tokens, device.type, statistics, base)
    return Plan(
        model=hparams.model_name, device=str(device), num_edits=settings.num_edits, batch_size=settings.batch_size,
        method=method, seconds=sum(known) if len(known) == len(seconds) else None,
        time=[TimePart(name, each, None if each is None or not sum(known) else each / sum(known))
              for name, each in seconds.items()],
        memory=memory, peak_bytes=peak_bytes(memory, device.type),
        disk=disk_items(shape, hparams, settings.num_edits, statistics),
        downloads=downloads(hparams, download, statistics), notes=notes)
