"""What a run directory says, read into types: points, energies, batches, summary, and scores case by case."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, get_args

from ..energy_metrics import EnergyRecord
from ..he_tracker import read_energy_csv
from ..hparams import REMOVED, SPHERE_ONLY
from ..methods.registry import METHODS
from .neurons import NeuronRecord
from .run_directory import CONFIG, EDITS, ENERGY, METRICS, NEURONS, SPACES, SUMMARY, RunDirectory, When
from .spaces import SpaceRecord, read_spaces_csv

CaseId = int | str
PAPER: Final = "paper"
SPHERE: Final = "SPHERE"  # the variant that projects onto the principal space's complement
_NORMAL_95: Final = 1.96  # standard errors
# Entries of a line in metrics.jsonl that are objects and no metrics.
_NO_METRICS: Final = ("watched", "abilities")
# Hyperparameters that two arms of one experiment may differ in: SPHERE's, and where things lie.
_NOT_COMPARED: Final = frozenset({*SPHERE_ONLY, *REMOVED, "device", "stats_dir", "target_values_dir"})


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` cases with its 95% interval, None where it was not given; percent for the metrics of a run."""

    mean: float
    ci95: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class Point:
    """One evaluation of a run: a line of ``metrics.jsonl``.

    Attributes:
        num_edits: edits in the model.
        when: on what it was measured: ``before`` editing; ``during``, on the edits so far or a seeded sample of them;
            on the ``last_batch`` alone; ``after``, on all of them.
        protocol: by which the numbers were computed; numbers of two protocols don't compare.
        metrics: by name, those that were measured.
        perplexity: on held-out text; infinite or nan for a broken model, None where not measured.
        update_norms: Frobenius norm of the update by layer, as the run watched it.
    """

    num_edits: int
    when: When
    protocol: str
    metrics: Mapping[str, Estimate]
    perplexity: float | None
    update_norms: Mapping[int, float]


@dataclass(frozen=True)
class AbilityPoint:
    """General abilities at one point of a run, by task: in percent, intervals by the normal approximation."""

    num_edits: int
    when: When
    protocol: str
    abilities: Mapping[str, Estimate]


@dataclass(frozen=True)
class BatchRecord:
    """A batch: a line of ``edits.jsonl``.

    Attributes:
        num_edits: edits in the model once the batch has ended.
        case_ids: of its edits.
        seconds: wall time by part.
        losses: last loss of each target value (nats).
        update_norms: Frobenius norm of each layer's change by this batch.
        energy: hyperspherical energy after it, by layer.
        efficacy: percent of its facts that the model says right after it, by the run's first protocol; None where it
            was not measured.
    """

    num_edits: int
    case_ids: Sequence[CaseId]
    seconds: Mapping[str, float]
    losses: Sequence[float]
    update_norms: Mapping[int, float]
    energy: Mapping[int, float]
    efficacy: float | None = None


@dataclass(frozen=True)
class RunRecords:
    """A run directory's records. A file that a run writes late or not at all leaves its part empty, or None.

    Attributes:
        directory: where they were read.
        config: ``config.yaml`` as it stands, with the mappings ``run`` and ``hparams``.
        points, abilities: lines of ``metrics.jsonl``, in order.
        energy: records of ``energy.csv``, one before the first batch and one a batch.
        batches: lines of ``edits.jsonl``.
        summary: ``summary.json`` as it stands; None while the run has not ended.
        spaces: lines of ``spaces.csv``.
    """

    directory: Path
    config: Mapping[str, Any]
    points: tuple[Point, ...]
    abilities: tuple[AbilityPoint, ...]
    energy: tuple[EnergyRecord, ...]
    batches: tuple[BatchRecord, ...]
    summary: Mapping[str, Any] | None
    spaces: tuple[SpaceRecord, ...] = ()

    @classmethod
    def read(cls, directory: str | Path) -> RunRecords:
        """Read a run directory, of a run that ended or of one under way.

        A last line that was torn while it was being written is left out.

        Raises:
            ValueError: there is no ``config.yaml`` or ``metrics.jsonl``, or a file does not have its form; the message
                names file and line.
        """
        files = RunDirectory(Path(directory))
        for name in (CONFIG, METRICS):
            if not files.has(name):
                raise ValueError(f"{directory} has no {name}: give the directory of a run, as `edit --output` makes it")
        points: list[Point] = []
        abilities: list[AbilityPoint] = []
        for where, line in _lines(files, METRICS):
            if "abilities" in line:
                abilities.append(_ability_point(line, where))
            else:
                points.append(_point(line, where))
        _check_unique(files.path / METRICS, [
            *((point.num_edits, point.when, point.protocol) for point in points),
            # Tasks may be measured one after the other, by one protocol.
            *((point.num_edits, point.when, point.protocol, task) for point in abilities for task in point.abilities)])
        batches = [_batch(line, where) for where, line in _lines(files, EDITS)]
        _check_unique(files.path / EDITS, [batch.num_edits for batch in batches])
        energy = read_energy_csv(files.place(ENERGY)) if files.has(ENERGY) else []
        spaces = read_spaces_csv(files.place(SPACES)) if files.has(SPACES) else []
        _check_unique(files.path / SPACES, [(space.num_edits, space.layer) for space in spaces])
        return cls(files.path, _config(files), tuple(points), tuple(abilities), tuple(energy), tuple(batches),
                   _summary(files), tuple(spaces))

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
        """The base method: the algorithm, and whether it has earlier keys in its bracket where that is a choice."""
        method = METHODS.find(self.algorithm)
        is_choice = method is None or not method.always_keeps_keys
        earlier = self.config["hparams"].get("keep_previous_keys") and is_choice
        return f"{self.algorithm}, earlier keys" if earlier else self.algorithm

    @cached_property
    def variant(self) -> str | None:
        """What was done to the base method's updates: None, ``SPHERE``, or a control such as ``random``.

        It is what stands after ``+`` behind the base method in the directory's name (``AlphaEdit+random-seed1`` gives
        random). Where nothing does, it follows from ``alpha`` and ``suppression`` of the hyperparameters.
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
        """Whether two runs differ by nothing but SPHERE and its controls, as far as both configurations tell."""
        ours, theirs = self.config["hparams"], other.config["hparams"]
        return all(ours[name] == theirs[name] for name in ours.keys() & theirs.keys() - _NOT_COMPARED)

    @property
    def model(self) -> str:
        """Last component of the model's name."""
        return str(self.config["hparams"].get("model_name")).rstrip("/").rsplit("/", maxsplit=1)[-1]

    @property
    def dataset(self) -> str:
        """The data set's name as the run was told it."""
        return str(self.config["run"].get("dataset") or "unnamed")

    @property
    def seed(self) -> int | None:
        """Seed of the draw and order of the facts."""
        seed = self.config["run"].get("seed")
        return None if seed is None else int(seed)

    @property
    def order_seed(self) -> int | None:
        """Seed of another order of the same facts, where there is one."""
        seed = self.config["run"].get("order_seed")
        return None if seed is None else int(seed)

    @property
    def draw(self) -> int | str | None:
        """Which facts came in which order: the seed, and that of another order where there is one."""
        return self.seed if self.order_seed is None else f"{self.seed}, order {self.order_seed}"

    def before(self, protocol: str = PAPER) -> Point | None:
        """The unedited model's point."""
        return next((p for p in self.points if p.when == "before" and p.protocol == protocol), None)

    def after(self, protocol: str = PAPER) -> Point | None:
        """The point at the end, on all edits; None while the run has not ended."""
        return next((p for p in reversed(self.points) if p.when == "after" and p.protocol == protocol), None)

    def trajectory(self, protocol: str = PAPER) -> list[Point]:
        """Points measured on all facts so far, or a sample of them, by rising edits: ``during`` and ``after``.

        Where both were measured at the same number of edits, it is ``after``, completed with what was watched
        ``during``.
        """
        by_edits: dict[int, Point] = {}
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
        """How the neurons lie before editing and at the latest measurement, read when asked for; None where not kept.

        Raises:
            ValueError: ``neurons.safetensors`` is damaged, or leads out of the directory.
        """
        path = RunDirectory(self.directory).place(NEURONS)
        return NeuronRecord.read(path) if path.is_file() else None

    def scores(self, when: When, num_edits: int, protocol: str = PAPER) -> dict[CaseId, dict[str, float]]:
        """Scores of one evaluation by case and metric, 0 to 1; a metric that a case lacks is left out.

        Raises:
            ValueError: there is no such file, it is not of its form, or has none of this protocol.
        """
        files, name = RunDirectory(self.directory), f"scores/{when}-{num_edits}.jsonl"
        if not files.has(name):
            raise ValueError(f"{self.directory / name} is not there: the run kept no scores of this point")
        cases: dict[CaseId, dict[str, float]] = {}
        for where, line in _lines(files, name):
            if line.get("protocol") != protocol:
                continue
            case_id = line.get("case_id")
            if isinstance(case_id, bool) or not isinstance(case_id, CaseId):
                raise ValueError(f"{where}: case_id is {case_id!r}, not a number or a text")
            if case_id in cases:
                raise ValueError(f"{where}: case {case_id} comes a second time by the protocol {protocol}")
            cases[case_id] = {name: float(value) for name, value in line.items()
                              if name != "case_id" and isinstance(value, (int, float)) and not isinstance(value, bool)}
        if not cases:
            raise ValueError(f"{self.directory / name} has no scores by the protocol {protocol}: choose another")
        return cases


def find_runs(folder: str | Path) -> list[RunRecords]:
    """All runs in or under a folder, by path: directories with a ``config.yaml`` and a ``metrics.jsonl``.

    Raises:
        ValueError: there are none, or one can't be read.
    """
    found = [path.parent for path in sorted(Path(folder).rglob(METRICS)) if (path.parent / CONFIG).is_file()]
    if not found:
        raise ValueError(f"{folder} holds no run (a directory with {CONFIG} and {METRICS}): give a folder of "
                         "runs")
    return [RunRecords.read(path) for path in found]


def _config(files: RunDirectory) -> Mapping[str, Any]:
    config = files.read_config()
    for part in ("run", "hparams"):
        if not isinstance(config.get(part), dict):
            raise ValueError(f"{files.path / CONFIG} has no mapping `{part}`: give a run whose config is whole")
    run, where = config["run"], f"{files.path / CONFIG}, run"
    protocols = _mapping(run.get("measure", {}), "measure", where).get("protocols") or []
    if not isinstance(protocols, list) or not all(isinstance(name, str) for name in protocols):
        raise ValueError(f"{where}: measure.protocols is {protocols!r}, not a list of names")
    for name in ("seed", "order_seed", "num_edits"):
        if run.get(name) is not None:
            _count(run[name], name, where)
    return config


def _summary(files: RunDirectory) -> Mapping[str, Any] | None:
    if not files.has(SUMMARY):
        return None
    where = str(files.path / SUMMARY)
    summary = _mapping(files.read_json(SUMMARY), "the whole", where)
    for name, value in summary.items():
        if name.endswith(("_seconds", "_bytes")) and not math.isfinite(_number(value, name, where)):
            raise ValueError(f"{where}: {name} is {value!r}, not a finite number")
    return summary


def _lines(files: RunDirectory, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a file of JSON lines, each with what to call it in an error."""
    for number, line in enumerate(files.lines(name), start=1):
        yield f"{files.path / name}, line {number}", line


def _check_unique(path: Path, keys: Sequence[object]) -> None:
    seen: set[object] = set()
    for key in keys:
        if key in seen:
            raise ValueError(f"{path} has two lines of {key}: keep the one that belongs to the run")
        seen.add(key)


def _point(line: Mapping[str, Any], where: str) -> Point:
    watched = _mapping(line.get("watched") or {}, "watched", where)
    perplexity = watched.get("perplexity")
    metrics = {name: _estimate(value, name, where) for name, value in line.items()
               if name not in _NO_METRICS and isinstance(value, dict)}
    return Point(*_key(line, where), {name: estimate for name, estimate in metrics.items() if estimate is not None},
                 None if perplexity is None else _number(perplexity, "perplexity", where),
                 _by_layer(watched.get("update_norms") or {}, "update_norms", where))


def _ability_point(line: Mapping[str, Any], where: str) -> AbilityPoint:
    given = _mapping(line["abilities"], "abilities", where)
    abilities = {name: _estimate(value, name, where) for name, value in given.items()}
    return AbilityPoint(*_key(line, where), {name: value for name, value in abilities.items() if value is not None})


def _batch(line: Mapping[str, Any], where: str) -> BatchRecord:
    for name in ("case_ids", "losses"):
        if not isinstance(line.get(name, []), list):
            raise ValueError(f"{where}: {name} is {line[name]!r}, not a list")
    odd = [case for case in line.get("case_ids", ()) if isinstance(case, bool) or not isinstance(case, CaseId)]
    if odd:
        raise ValueError(f"{where}: case_ids has {odd[0]!r}, not a number or a text")
    seconds, efficacy = _mapping(line.get("seconds", {}), "seconds", where), line.get("efficacy")
    return BatchRecord(_count(line.get("num_edits"), "num_edits", where), tuple(line.get("case_ids", ())),
                       {part: _number(value, "seconds", where) for part, value in seconds.items()},
                       tuple(_number(value, "losses", where) for value in line.get("losses", ())),
                       _by_layer(line.get("update_norms", {}), "update_norms", where),
                       _by_layer(line.get("energy", {}), "energy", where),
                       None if efficacy is None else _number(efficacy, "efficacy", where))


def _key(line: Mapping[str, Any], where: str) -> tuple[int, When, str]:
    times: tuple[When, ...] = get_args(When)
    protocol = line.get("protocol")
    if line.get("when") not in times:
        raise ValueError(f"{where}: when is {line.get('when')!r}, not one of {', '.join(times)}")
    if not isinstance(protocol, str):
        raise ValueError(f"{where}: protocol is {protocol!r}, not a name")
    return _count(line.get("num_edits"), "num_edits", where), times[times.index(line["when"])], protocol


def _estimate(value: object, name: str, where: str) -> Estimate | None:
    """None for a metric that no case has."""
    given = _mapping(value, name, where)
    if given.get("mean") is None:
        return None
    mean, n = _number(given["mean"], name, where), _count(given.get("n"), f"n of {name}", where)
    ends, error = given.get("ci95"), given.get("stderr")
    if ends is None and error is not None:  # of general abilities the harness tells no interval
        half = _NORMAL_95 * _number(error, f"stderr of {name}", where)
        return Estimate(mean, (mean - half, mean + half), n)
    if ends is not None and not (isinstance(ends, list) and len(ends) == 2):
        raise ValueError(f"{where}: ci95 of {name} is {ends!r}, not [low, high]")
    return Estimate(mean, None if ends is None else (_number(ends[0], name, where), _number(ends[1], name, where)), n)


def _by_layer(value: object, name: str, where: str) -> dict[int, float]:
    by_layer = {}
    for layer, number in _mapping(value, name, where).items():
        if not str(layer).isdecimal():
            raise ValueError(f"{where}: {name} has the key {layer!r}, not a layer's number")
        by_layer[int(layer)] = _number(number, name, where)
    return by_layer


def _mapping(value: object, name: str, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}: {name} is {value!r}, not an object")
    return value


def _number(value: object, name: str, where: str) -> float:
    """A float, or nan for null, which is how some write what JSON has no sign for."""
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: {name} holds {value!r}, not a number")
    return float(value)


def _count(value: object, name: str, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{where}: {name} is {value!r}, not a count")
    return value
