"""Runs of a sweep, and the file ``sweep.yaml`` in its folder that records them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Final

import yaml

from ...hparams import REMOVED, SPHERE_ONLY
from ...utils.files import atomic_write
from ...utils.yaml import read_yaml

RECORD: Final = "sweep.yaml"
# Options of `edit` that affect only what is kept or logged, and no number.
KEEPING: Final = frozenset({"keep-weights-every", "keep-checkpoints", "examples", "share-before", "verbose"})

_HEADER = "# The runs of this sweep, resolved. Written by `sphere-easyedit sweep`, which refuses to change them.\n"
_MAY_DIFFER = frozenset({"device"})


@dataclass(frozen=True)
class Run:
    """One run of a sweep: one call of ``sphere-easyedit edit``.

    Attributes:
        name: its directory in the sweep's folder: ``arm`` and the seed.
        arm: name shared by runs that differ only in the seed.
        method: the base method's label in the sweep's file.
        sphere: whether SPHERE is applied; without it ``alpha`` is 0.
        seed: seed of the draw and order of the facts.
        hparams: YAML file or short name.
        set: hyperparameters that differ from that file.
        dataset, data, num_edits, batch_size: options of ``edit``; None: not given.
        edit: further options of ``edit`` by name, without leading dashes; true and false for flags.
        hyperparameters: all of them, resolved.
    """

    name: str
    arm: str
    method: str
    sphere: bool
    seed: int
    hparams: str
    set: Mapping[str, Any]
    dataset: str
    data: str | None
    num_edits: int | None
    batch_size: int
    edit: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]

    def arguments(self, output: Path) -> list[str]:
        """Arguments of ``sphere-easyedit edit`` for this run, with ``output`` as its run directory."""
        found = ["--hparams", self.hparams]
        for name, value in self.set.items():
            found += ["--set", f"{name}={_yaml(value)}"]
        found += ["--dataset", self.dataset]
        if self.data is not None:
            found += ["--data", self.data]
        if self.num_edits is not None:
            found += ["--num-edits", str(self.num_edits)]
        found += ["--batch-size", str(self.batch_size), "--seed", str(self.seed), "--output", str(output), "--resume"]
        for name, value in self.edit.items():
            for item in value if isinstance(value, (list, tuple)) else [value]:
                found.append(f"--{name}" if item is True else f"--no-{name}" if item is False else f"--{name}={item}")
        return found

    def value(self, name: str) -> Any:
        """A hyperparameter, also of a wrapped method; None if the run has none of that name."""
        if name in self.hyperparameters:
            return self.hyperparameters[name]
        return (self.hyperparameters.get("executor_hparams") or {}).get(name)

    def effective_hyperparameters(self) -> dict[str, Any]:
        """Hyperparameters that have an effect: without SPHERE, all but its own."""
        return {name: value for name, value in self.hyperparameters.items() if self.sphere or name not in SPHERE_ONLY}

    def change_from(self, hyperparameters: Mapping[str, Any]) -> str | None:
        """Text on the first difference from recorded hyperparameters, or None.

        Hyperparameters missing in the record (of an older version) are ignored, and so are removed ones at the value
        that they had by default.
        """
        for name, was in hyperparameters.items():
            if name in REMOVED and was == REMOVED[name][0]:
                continue
            now = self.hyperparameters.get(name)
            if now != was and name not in _MAY_DIFFER:
                return f"{name} was {was!r} and is {now!r} now"
        return None


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Attributes:
        runs: in the order in which they are started. Names are unique even if case is ignored.
        slurm: job settings on a cluster (see ``slurm``). Not recorded: they may change.
    """

    runs: tuple[Run, ...]
    slurm: Mapping[str, Any] = field(default_factory=dict)


def write_record(sweep: Sweep, output: Path) -> None:
    """Write ``sweep.yaml``."""
    content = {"runs": [asdict(run) for run in sweep.runs]}
    with atomic_write(output / RECORD) as temporary:
        temporary.write_text(_HEADER + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def read_record(output: Path) -> Sweep | None:
    """Read ``sweep.yaml``; None if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    path = output / RECORD
    if not path.exists():
        return None
    try:
        content = read_yaml(path.read_text(encoding="utf-8"), str(path))
        # `follows` is a removed setting of older records.
        return Sweep(tuple(Run(**{name: value for name, value in entry.items() if name != "follows"})
                           for entry in content["runs"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a record of a sweep ({error}): give another folder, or remove the file to "
                         "start a new record") from error


def check_only_added(sweep: Sweep, recorded: Sweep, output: Path) -> None:
    """Check that a sweep has all recorded runs of its folder, with the same settings.

    Raises:
        ValueError: it does not; the message names the run and the setting.
    """
    by_name = {run.name: run for run in sweep.runs}
    remedy = f"runs can only be added to {output}: restore it, or give another folder"
    for was in recorded.runs:
        now = by_name.get(was.name)
        if now is None:
            raise ValueError(f"{output} has a run {was.name}, which is not in this sweep; {remedy}")
        for name in (one.name for one in fields(Run) if one.name not in ("hparams", "hyperparameters")):
            before, after = getattr(was, name), getattr(now, name)
            if before != after:
                raise ValueError(f"run {was.name}: {name} was {before!r} and is {after!r} now; {remedy}")
        if (change := now.change_from(was.hyperparameters)) is not None:
            raise ValueError(f"run {was.name}: {change}; {remedy}")


def _yaml(value: Any) -> str:
    """``value`` as YAML in flow style."""
    # Scalars end with an end-of-document line. Not allow_unicode, which keeps line breaks such as U+0085.
    text: str = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
    return text.removesuffix("\n...\n").removesuffix("\n")
