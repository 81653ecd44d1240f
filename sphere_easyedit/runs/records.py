"""Reads the records of a run directory, and derives method names, trajectories and scores from them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

from ..callbacks.he_tracker import read_energy_csv
from ..callbacks.neurons import NeuronRecord
from ..callbacks.spaces import read_spaces_csv
from ..editing.callbacks import RunState
from ..hparams import REMOVED, SPHERE_ONLY
from ..methods.registry import METHODS
from . import schema
from .directory import RunDirectory
from .schema import (
    BatchRecord,
    CaseId,
    Estimate,
    Measurement,
    RunDescription,
    Summary,
    When,
    read_record,
)

PAPER: Final = "paper"
SPHERE: Final = "SPHERE"  # the variant that suppresses the principal space
# Hyperparameters that two arms of one experiment may differ in: those of SPHERE, device and paths.
_NOT_COMPARED: Final = frozenset({*SPHERE_ONLY, *REMOVED, "device", "stats_dir", "target_values_dir"})
_E = TypeVar("_E", bound=Estimate)


@dataclass(frozen=True)
class RunRecords(RunState):
    """A run directory's records, of a finished or unfinished run; parts that are not written yet are empty or None."""

    @classmethod
    def read(cls, directory: str | Path) -> RunRecords:
        """Read a run directory. An incomplete last line is left out.

        Raises:
            ValueError: there is no ``config.yaml`` or ``metrics.jsonl``, or a file is damaged; the message names file
                and line.
        """
        files = RunDirectory(Path(directory))
        state = read_state(files)
        if not files.has(schema.METRICS):
            raise ValueError(f"{directory} has no {schema.METRICS}: give the directory of a run that has measured")
        _check_unique(files.path / schema.METRICS, [
            # Tasks may be measured one after the other, by one protocol.
            (point.num_edits, point.when, point.protocol, task) for point in state.measurements
            for task in point.abilities or ("",)])
        _check_unique(files.path / schema.EDITS, [batch.num_edits for batch in state.batches])
        _check_unique(files.path / schema.SPACES, [(space.num_edits, space.layer) for space in state.spaces])
        return cls.of(state)

    @classmethod
    def of(cls, run: RunState) -> RunRecords:
        """A copy of the records so far of a run in this process."""
        return cls(run.directory, run.config, tuple(run.batches), tuple(run.measurements), tuple(run.energy),
                   tuple(run.spaces), run.summary)

    @cached_property
    def points(self) -> tuple[Measurement, ...]:
        """Measurements of facts, in order, without metrics that no case has."""
        return tuple(replace(one, metrics=_nonempty(one.metrics)) for one in self.measurements if not one.abilities)

    @cached_property
    def abilities(self) -> tuple[Measurement, ...]:
        """Measurements of general abilities, in order, without tasks that have no record."""
        return tuple(replace(one, abilities=_nonempty(one.abilities)) for one in self.measurements if one.abilities)

    @property
    def name(self) -> str:
        """The directory's name."""
        return self.directory.resolve().name

    @property
    def algorithm(self) -> str:
        """``base_alg`` of the hyperparameters."""
        return str(self.config["hparams"].get("base_alg") or self.config["hparams"].get("alg_name"))

    @property
    def base(self) -> str:
        """The base method: the algorithm, and whether it uses earlier keys if that is optional."""
        method = METHODS.find(self.algorithm)
        is_choice = method is None or not method.always_keeps_keys
        earlier = self.config["hparams"].get("keep_previous_keys") and is_choice
        return f"{self.algorithm}, earlier keys" if earlier else self.algorithm

    @cached_property
    def variant(self) -> str | None:
        """How the base method's updates were changed: None, ``SPHERE``, or a control such as ``random``.

        Taken from the directory's name if it has a suffix after the base method (``AlphaEdit+random-seed1``: random),
        else from the hyperparameters ``alpha`` and ``suppression``.
        """
        found = re.search(re.escape(self.algorithm) + r"\+([a-z]+(?:\+[a-z]+)*)", self.name, re.IGNORECASE)
        if found is not None:
            return SPHERE if found[1].upper() == SPHERE else found[1]
        hparams = self.config["hparams"]
        suppression = hparams.get("suppression", "principal")
        return None if not hparams.get("alpha") else SPHERE if suppression == "principal" else str(suppression)

    @property
    def method(self) -> str:
        """Base method and variant, as in ``AlphaEdit+SPHERE``, and the principal space if it is not the current one."""
        if self.variant is None:
            return self.base
        pretrained = self.variant == SPHERE and self.config["hparams"].get("principal_space") == "pretrained"
        return f"{self.base}+{self.variant}{', pretrained space' if pretrained else ''}"

    def shares_settings(self, other: RunRecords) -> bool:
        """Whether two runs differ only in SPHERE and its controls, judged by the hyperparameters that both list."""
        ours, theirs = self.config["hparams"], other.config["hparams"]
        return all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys() - _NOT_COMPARED)

    @property
    def model(self) -> str:
        """Last component of the model's name."""
        return str(self.config["hparams"].get("model_name")).rstrip("/").rsplit("/", maxsplit=1)[-1]

    @property
    def dataset(self) -> str:
        """Name of the data set, as given to the run."""
        return str(self.config["run"].get("dataset") or "unnamed")

    @property
    def seed(self) -> int | None:
        """Seed of the draw and order of the facts."""
        seed = self.config["run"].get("seed")
        return None if seed is None else int(seed)

    @property
    def order_seed(self) -> int | None:
        """Seed of a changed order of the same facts, or None."""
        seed = self.config["run"].get("order_seed")
        return None if seed is None else int(seed)

    @property
    def draw(self) -> int | str | None:
        """Identifies the facts and their order: the seed, and that of a changed order."""
        return self.seed if self.order_seed is None else f"{self.seed}, order {self.order_seed}"

    def before(self, protocol: str = PAPER) -> Measurement | None:
        """The measurement of the unedited model."""
        return next((p for p in self.points if p.when == "before" and p.protocol == protocol), None)

    def after(self, protocol: str = PAPER) -> Measurement | None:
        """The measurement after the last edit; None for an unfinished run."""
        return next((p for p in reversed(self.points) if p.when == "after" and p.protocol == protocol), None)

    def trajectory(self, protocol: str = PAPER) -> list[Measurement]:
        """Measurements ``during`` and ``after`` editing, by number of edits.

        For a number of edits with both, the one ``after``, with perplexity and norms from ``during`` if it lacks them.
        """
        by_edits: dict[int, Measurement] = {}
        for when in ("during", "after"):
            for point in self.points:
                if point.when == when and point.protocol == protocol:
                    earlier = by_edits.get(point.num_edits)
                    if earlier is not None:
                        point = replace(
                            point,
                            perplexity=earlier.perplexity if point.perplexity is None else point.perplexity,
                            update_norms=point.update_norms or earlier.update_norms)
                    by_edits[point.num_edits] = point
        return [by_edits[num_edits] for num_edits in sorted(by_edits)]

    @cached_property
    def energy_changes(self) -> Mapping[int, Mapping[int, float]]:
        """Relative change of hyperspherical energy since the unedited model, by number of edits and layer."""
        return {record.num_edits: record.relative_change for record in self.energy}

    @cached_property
    def neurons(self) -> NeuronRecord | None:
        """Cosines between neurons before editing and at the latest measurement, read on access; None if not kept.

        Raises:
            ValueError: ``neurons.safetensors`` is damaged, or leads out of the directory.
        """
        path = RunDirectory(self.directory).path_of(schema.NEURONS)
        return NeuronRecord.read(path) if path.is_file() else None

    def scores(self, when: When, num_edits: int, protocol: str = PAPER) -> dict[CaseId, dict[str, float]]:
        """Scores of one evaluation by case and metric, 0 to 1, without metrics that a case lacks.

        Raises:
            ValueError: there is no such file, it is damaged, or has no scores of this protocol.
        """
        files, name = RunDirectory(self.directory), f"{schema.SCORES}/{when}-{num_edits}.jsonl"
        if not files.has(name):
            raise ValueError(f"{self.directory / name} does not exist: the run kept no scores of this measurement")
        cases: dict[CaseId, dict[str, float]] = {}
        for number, line in enumerate(files.lines(name), start=1):
            if line.get("protocol") != protocol:
                continue
            where, case_id = f"{files.path / name}, line {number}", line.get("case_id")
            if isinstance(case_id, bool) or not isinstance(case_id, CaseId):
                raise ValueError(f"{where}: case_id is {case_id!r}, not a number or a text")
            if case_id in cases:
                raise ValueError(f"{where}: case {case_id} has two lines of protocol {protocol}")
            cases[case_id] = {name: float(value) for name, value in line.items()
                              if name != "case_id" and isinstance(value, (int, float)) and not isinstance(value, bool)}
        if not cases:
            raise ValueError(f"{self.directory / name} has no scores of protocol {protocol}: choose another")
        return cases


def read_state(files: RunDirectory) -> RunState:
    """All records in a run directory; parts that are not written yet are empty.

    Raises:
        ValueError: a file is damaged; the message names file and line.
    """
    return RunState(
        files.path, _config(files), files.records(schema.EDITS, BatchRecord), files.measurements(),
        read_energy_csv(files.path_of(schema.ENERGY)) if files.has(schema.ENERGY) else (),
        read_spaces_csv(files.path_of(schema.SPACES)) if files.has(schema.SPACES) else (),
        read_record(Summary, files.read_json(schema.SUMMARY), str(files.path / schema.SUMMARY))
        if files.has(schema.SUMMARY) else None)


def _nonempty(estimates: Mapping[str, _E]) -> dict[str, _E]:
    """Without metrics that no case has."""
    return {name: one for name, one in estimates.items() if one.n or not math.isnan(one.mean)}


def _config(files: RunDirectory) -> Mapping[str, Any]:
    config = files.read_config()
    for part in ("run", "hparams"):
        if not isinstance(config.get(part), dict):
            raise ValueError(f"{files.path / schema.CONFIG} has no mapping `{part}`: give a run with a complete config")
    read_record(RunDescription, config["run"], f"{files.path / schema.CONFIG}, run")
    return config


def _check_unique(path: Path, keys: Sequence[object]) -> None:
    seen: set[object] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"{path} has two lines of {key}: keep the one that belongs to the run")
        seen.add(key)
