"""A run's numbers in TensorBoard, Weights & Biases and the like, through accelerate's trackers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from .measuring import METRIC_NAMES
from .run_directory import RunDirectory
from .tail import RunTail

if TYPE_CHECKING:
    from accelerate import Accelerator  # type: ignore[import-untyped]
    from accelerate.tracking import GeneralTracker  # type: ignore[import-untyped]

logger = logging.getLogger(__name__)

FOLDER: Final = "trackers"
PROJECT: Final = "sphere-easyedit"
# What a run is told apart by beside its hyperparameters, of config.yaml's "run".
_OF_RUN: Final = ("dataset", "num_edits", "batch_size", "seed")
_PACKAGES: Final = {"comet_ml": "comet-ml"}  # where the name to install is another one

Row = tuple[int, dict[str, float]]


class RunTrackers:
    """Hands what a run writes into its directory to experiment trackers; a step is a number of edits.

    ======================================  ============================================================================
    ``batch/seconds_per_edit``              wall time
    ``batch/mean_loss``                     mean of the target values' last losses, in nats
    ``batch/efficacy``                      percent, where the run measured it
    ``update_norm/layer_4``                 Frobenius norm of the layer's change by the batch
    ``energy_change/layer_4``, ``/mean``    relative change of hyperspherical energy since the unedited model
    ``paper/during/efficacy`` ...           mean of a metric by protocol and when, percent
    ``perplexity/during``                   on held-out text
    ``abilities/during/rte`` ...            percent
    ======================================  ============================================================================

    Numbers that are not finite are left out, since not every tracker takes them. Each process hands over the run from
    its beginning, so a run that is resumed is whole there; TensorBoard is told to forget what it was told before.

    A tracker that fails is left out from then on, with one warning; the run goes on. Use it as a context, and hand
    ``update`` to the run: the trackers begin when the run first calls it, for only then the directory is the run's own.

    Args:
        path: the run directory; TensorBoard writes into its folder ``trackers``.
        trackers: names that accelerate knows (tensorboard, wandb ...), or trackers of one's own.
        quiet: Weights & Biases prints nothing.

    Raises:
        ValueError: a name is not known, or its package is not installed.
    """

    def __init__(self, path: Path, trackers: Sequence[str | GeneralTracker], quiet: bool = False) -> None:
        for tracker in trackers:
            if isinstance(tracker, str):
                check_tracker(tracker)
        self._run, self._tail, self._quiet = RunDirectory(path), RunTail(path), quiet
        self._wanted = list(dict.fromkeys(trackers))
        self._active: dict[str, Accelerator] = {}  # by the tracker's name
        self._begun = False

    def __enter__(self) -> RunTrackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
                 ) -> None:
        self._hand_over()
        self._each("end_training")
        self._active = {}

    def update(self, phase: str, done: int, total: int) -> None:
        """Take a run's progress call, and hand over what the run has written since the last one."""
        if not self._begun:
            self._begun = True
            for tracker in self._wanted:
                self._begin(tracker)
        self._hand_over()

    def _begin(self, tracker: str | GeneralTracker) -> None:
        from accelerate import Accelerator

        name = tracker if isinstance(tracker, str) else tracker.name
        folder = self._run.path / FOLDER
        options = {"tensorboard": {"purge_step": 0},  # what an earlier process told from there on is hidden
                   "wandb": {"name": self._run.path.resolve().name, "dir": str(folder),
                             "settings": {"console": "off", "silent": self._quiet}}}
        try:
            for path in (folder, *folder.rglob("*")):  # trackers write wherever links lead
                self._run.place(str(path.relative_to(self._run.path)))
            folder.mkdir(exist_ok=True)
            # One each, so that one that fails takes no other with it.
            accelerator = Accelerator(log_with=tracker, project_dir=str(folder))
            accelerator.init_trackers(PROJECT, flat_config(self._run.read_config()), options)
            self._active[name] = accelerator
        except Exception as error:  # of whatever library
            _warn(name, error)

    def _hand_over(self) -> None:
        if not self._active:
            return
        try:
            news = self._tail.poll()
            rows = [row for line in news.batches for row in self._batch_rows(line)]
            rows += [(int(line["num_edits"]), point_numbers(line)) for line in news.points]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._each("end_training")
            self._active = {}
            logger.warning("nothing is handed to trackers any more, the run goes on: %s: %s", type(error).__name__,
                           error)
            return
        for step, numbers in sorted(rows, key=lambda row: row[0]):  # some trackers take no step back
            finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
            if finite:
                self._each("log", finite, step=step)

    def _batch_rows(self, line: Mapping[str, Any]) -> Iterator[Row]:
        record = self._tail.energy.get(line["num_edits"])
        yield int(line["num_edits"]), batch_numbers(line, {} if record is None else record.relative_change)

    def _each(self, method: str, *values: Any, **named: Any) -> None:
        """Call a method of every accelerator that has not failed yet."""
        for name, accelerator in list(self._active.items()):
            try:
                getattr(accelerator, method)(*values, **named)
            except Exception as error:  # of whatever library
                del self._active[name]
                _warn(name, error)


def check_tracker(name: str) -> None:
    """Refuse a tracker that can't be had.

    Raises:
        ValueError: accelerate does not know it, or its package is not installed.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType  # type: ignore[import-untyped]

    known = sorted(str(one) for one in LoggerType.list() if str(one) != "all")
    if name not in known:
        raise ValueError(f"tracker {name!r} is not known: choose one of {', '.join(known)}")
    if name not in {str(one) for one in get_available_trackers()}:
        raise ValueError(f"tracker {name!r} is not installed: pip install {_PACKAGES.get(name, name)}")


def batch_numbers(line: Mapping[str, Any], energy_change: Mapping[int, float]) -> dict[str, float]:
    """Numbers of a line of ``edits.jsonl``, with the relative change of energy by layer after that batch."""
    numbers = {"batch/seconds_per_edit": line["wall_seconds"] / len(line["case_ids"])}
    if losses := line.get("losses"):
        numbers["batch/mean_loss"] = sum(losses) / len(losses)
    if line.get("efficacy") is not None:
        numbers["batch/efficacy"] = line["efficacy"]
    numbers |= {f"update_norm/layer_{layer}": norm for layer, norm in line.get("update_norms", {}).items()}
    if energy_change:
        numbers |= {f"energy_change/layer_{layer}": change for layer, change in energy_change.items()}
        numbers["energy_change/mean"] = sum(energy_change.values()) / len(energy_change)
    return numbers


def point_numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a line of ``metrics.jsonl``; what was not measured is left out."""
    when = line["when"]
    if "abilities" in line:
        found = {f"abilities/{when}/{task}": score["mean"] for task, score in line["abilities"].items()}
    else:
        found = {f"{line['protocol']}/{when}/{name}": line[name]["mean"] for name in METRIC_NAMES if name in line}
        found[f"perplexity/{when}"] = (line.get("watched") or {}).get("perplexity")
    return {name: value for name, value in found.items() if value is not None}


def flat_config(config: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Hyperparameters of ``config.yaml`` by name, and what the run edits as ``run.<name>``, as trackers take them.

    Nested names are joined by dots, lists become their JSON, and what is null is left out.
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
    logger.warning("tracker %s failed and is left out from here on, the run goes on: %s: %s", name,
                   type(error).__name__, error)
