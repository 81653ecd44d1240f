"""Logs a run's metrics to TensorBoard, Weights & Biases and other trackers, through accelerate."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from ..editing.callbacks import EditCallback, MeasureEvent, RunState
from ..runs.schema import BatchRecord, Measurement
from ..utils.files import path_within

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.tracking import GeneralTracker  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

FOLDER: Final = "trackers"
PROJECT: Final = "sphere-easyedit"
# Entries of config.yaml's "run" that are logged with the hyperparameters.
_OF_RUN: Final = ("dataset", "num_edits", "batch_size", "seed")


class RunTrackers(EditCallback):
    """Logs what a run measures to experiment trackers; the step is the number of edits.

    ======================================  ============================================================================
    ``batch/seconds_per_edit``              wall time
    ``batch/mean_loss``                     mean final loss of the target values, in nats
    ``batch/efficacy``                      percent, if measured
    ``update_norm/layer_4``                 Frobenius norm of the layer's change by the batch
    ``energy_change/layer_4``, ``/mean``    relative change of hyperspherical energy since the unedited model
    ``paper/during/efficacy`` ...           mean of a metric by protocol and when, percent
    ``perplexity/during``                   on held-out text
    ``abilities/during/rte`` ...            percent
    ======================================  ============================================================================

    Numbers that are not finite are left out, since not every tracker accepts them. Each process logs the run from its
    beginning, so a resumed run is complete; TensorBoard hides what earlier processes logged.

    A tracker that fails is dropped with one warning, and the run goes on. Use it as a context and pass it to the run as
    a callback. Trackers write into the run directory's folder ``trackers``, from the first event on.

    Args:
        trackers: names that accelerate knows (tensorboard, wandb ...), or tracker objects.
        quiet: silence Weights & Biases.

    Raises:
        ValueError: a name is unknown, or its package is not installed.
    """

    def __init__(self, trackers: Sequence[str | GeneralTracker], quiet: bool = False) -> None:
        for tracker in trackers:
            if isinstance(tracker, str):
                check_tracker(tracker)
        self._quiet = quiet
        self._trackers = list(dict.fromkeys(trackers))
        self._active: dict[str, Accelerator] = {}  # by the tracker's name
        self._begun = False

    def __enter__(self) -> RunTrackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._each("end_training")
        self._active = {}

    def on_measured(self, event: MeasureEvent) -> None:
        if self._begun:
            batches = [] if event.batch is None else [event.batch]
            points = [] if event.measurement is None else [event.measurement]
        else:  # the first event of this process: log the run from its beginning
            self._begun = True
            for tracker in self._trackers:
                self._begin(tracker, event.run)
            batches, points = list(event.run.batches), list(event.run.measurements)
        changes = {record.num_edits: record.relative_change for record in event.run.energy} if batches else {}
        rows = [(batch.num_edits, batch_numbers(batch, changes.get(batch.num_edits, {}))) for batch in batches]
        rows += [(point.num_edits, point_numbers(point)) for point in points]
        for step, numbers in sorted(rows, key=lambda row: row[0]):  # some trackers refuse decreasing steps
            finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
            if finite:
                self._each("log", finite, step=step)

    def _begin(self, tracker: str | GeneralTracker, run: RunState) -> None:
        from accelerate import Accelerator

        name = tracker if isinstance(tracker, str) else tracker.name
        folder = run.directory / FOLDER
        options = {"tensorboard": {"purge_step": 0},  # hides what earlier processes logged
                   "wandb": {"name": run.directory.resolve().name, "dir": str(folder),
                             "settings": {"console": "off", "silent": self._quiet}}}
        try:
            for path in (folder, *folder.rglob("*")):  # trackers follow links
                path_within(run.directory, str(path.relative_to(run.directory)), "the run directory")
            folder.mkdir(exist_ok=True)
            # One accelerator each, so that a failure affects one tracker only.
            accelerator = Accelerator(log_with=tracker, project_dir=str(folder))
            accelerator.init_trackers(PROJECT, flat_config(run.config), options)
            self._active[name] = accelerator
        except Exception as error:  # of any library
            _warn(name, error)

    def _each(self, method: str, *values: Any, **named: Any) -> None:
        """Call a method of every accelerator that has not failed yet."""
        for name, accelerator in list(self._active.items()):
            try:
                getattr(accelerator, method)(*values, **named)
            except Exception as error:  # of any library
                del self._active[name]
                _warn(name, error)


def check_tracker(name: str) -> None:
    """Check that a tracker is available.

    Raises:
        ValueError: accelerate does not know it, or its package is not installed.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType  # type: ignore[import-untyped]

    known = sorted(str(one) for one in LoggerType.list() if str(one) != "all")
    if name not in known:
        raise ValueError(f"tracker {name!r} is not known: choose one of {', '.join(known)}")
    if name not in {str(one) for one in get_available_trackers()}:
        raise ValueError(f"tracker {name!r} is not installed: pip install {name}")


def batch_numbers(batch: BatchRecord, energy_change: Mapping[int, float]) -> dict[str, float]:
    """Metrics of a batch; ``energy_change``: relative change of energy by layer after it."""
    numbers = {}
    if batch.case_ids:
        numbers["batch/seconds_per_edit"] = batch.wall_seconds / len(batch.case_ids)
    if batch.losses:
        numbers["batch/mean_loss"] = sum(batch.losses) / len(batch.losses)
    if batch.efficacy is not None:
        numbers["batch/efficacy"] = batch.efficacy
    numbers |= {f"update_norm/layer_{layer}": norm for layer, norm in batch.update_norms.items()}
    if energy_change:
        numbers |= {f"energy_change/layer_{layer}": change for layer, change in energy_change.items()}
        numbers["energy_change/mean"] = sum(energy_change.values()) / len(energy_change)
    return numbers


def point_numbers(point: Measurement) -> dict[str, float]:
    """Metrics of a measurement, without those that were not measured."""
    if point.abilities:
        return {f"abilities/{point.when}/{task}": found.mean for task, found in point.abilities.items() if found.n}
    found = {f"{point.protocol}/{point.when}/{name}": metric.mean for name, metric in point.main_metrics().items()
             if metric.n}
    return found if point.perplexity is None else found | {f"perplexity/{point.when}": point.perplexity}


def flat_config(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Hyperparameters of ``config.yaml`` by name and run settings as ``run.<name>``, flattened for trackers.

    Nested names are joined by dots, lists become JSON, and nulls are left out.
    """
    flat: dict[str, bool | int | float | str] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}.{key}" if name else str(key), inner)
        elif isinstance(value, bool | int | float | str):
            flat[name] = value
        elif value is not None:
            flat[name] = json.dumps(value, default=str)

    add("", config["hparams"])
    add("run", {name: config["run"].get(name) for name in _OF_RUN})
    return flat


def _warn(name: str, error: Exception) -> None:
    logger.warning("tracker %s failed and is dropped, the run goes on: %s: %s", name,
                   type(error).__name__, error)
