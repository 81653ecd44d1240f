"""Expands groups of runs along their axes to single runs, and names them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

from ...hparams import SPHERE_ONLY, SPHEREHyperParams
from .checks import as_list, as_whole, check_keys
from .record import Run

MAX_LENGTH: Final = 120  # of a name without seed, in characters; file systems allow 255 bytes
_MAX_VALUE_LENGTH: Final = 32

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")


@dataclass(frozen=True)
class Group:
    """Runs of one method that differ only in seeds and axes.

    Attributes:
        where: location in the file, for errors.
        name: name given in the file, or None to generate one.
        settings: template of the runs, without name, seed and hyperparameters.
        file: hyperparameters of the hyperparameter file.
        defaults: hyperparameters of the file with ``set`` and the method's changes; a generated name omits them.
        named: further settings in a generated name, because they differ from the top of the file.
        gamma, alpha: values; (None,) for those of ``defaults``.
        axes: values of further hyperparameters.
    """

    where: str
    name: str | None
    settings: Run
    file: Mapping[str, Any]
    defaults: SPHEREHyperParams
    named: Mapping[str, Any]
    seeds: tuple[int, ...]
    sphere: tuple[bool, ...]
    gamma: tuple[Any, ...]
    alpha: tuple[Any, ...]
    axes: Mapping[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Arm:
    """The runs of a group that differ only in the seed.

    Attributes:
        changes: hyperparameters on top of the group's.
        point: method, sphere, and those of gamma, alpha and axes that apply; ``exclude`` matches these.
    """

    group: Group
    sphere: bool
    changes: Mapping[str, Any]
    point: Mapping[str, Any]
    seeds: tuple[int, ...]


def arms_of(group: Group) -> Iterator[Arm]:
    """Arms in the order of the axes, the last varying fastest. Axes of SPHERE alone don't apply without it."""
    general = {name: values for name, values in group.axes.items() if name not in SPHERE_ONLY}
    special = {name: values for name, values in group.axes.items() if name in SPHERE_ONLY}
    special = {"gamma": group.gamma, "alpha": group.alpha, **special}
    for values in product(*general.values()):
        common = dict(zip(general, values, strict=True))
        for sphere in group.sphere:
            for of_sphere in product(*special.values()) if sphere else [()]:
                changes = {**common, **(dict(zip(special, of_sphere, strict=True)) if sphere else {"alpha": 0})}
                inherited = {name: getattr(group.defaults, name) for name in ("gamma", "alpha")
                             if changes.get(name, 0) is None}
                point = {"method": group.settings.method, "sphere": sphere, **changes, **inherited}
                changes = {name: value for name, value in changes.items() if name not in inherited}
                yield Arm(group, sphere, changes, point, group.seeds)


def excluding(arms: list[Arm], exclude: Any, axes: Iterable[str]) -> list[Arm]:
    """``arms`` without the runs that match an entry of ``exclude``: a value or a list of values for each name.

    Raises:
        ValueError: ``exclude`` is not a list of mappings, has an unknown name, or an entry matches no run.
    """
    if not isinstance(exclude, list) or not all(isinstance(entry, Mapping) and entry for entry in exclude):
        raise ValueError("exclude must be a list of mappings such as {method: MEMIT, gamma: 0.3}, not "
                         f"{exclude!r:.60}")
    for index, entry in enumerate(exclude):
        check_keys(entry, ("method", "sphere", "seed", "gamma", "alpha", *axes), f"exclude[{index}]")
        conditions = {name: as_list(value) for name, value in entry.items() if name != "seed"}
        seeds = [as_whole(seed, f"exclude[{index}].seed", 0) for seed in as_list(entry.get("seed", []))]
        kept, matched = [], False
        for arm in arms:
            left = arm.seeds
            if all(name in arm.point and arm.point[name] in values for name, values in conditions.items()):
                left = tuple(seed for seed in arm.seeds if "seed" in entry and seed not in seeds)
            matched |= left != arm.seeds
            kept += [replace(arm, seeds=left)] if left else []
        if not matched:
            raise ValueError(f"exclude[{index}] {dict(entry)!r} matches no run of the grid: correct or remove it")
        arms = kept
    return arms


def runs_of(arms: Sequence[Arm], seeds_outermost: bool) -> list[Run]:
    """The arms' runs, with checked hyperparameters and names.

    Raises:
        ValueError: wrong hyperparameters, two equal runs, a duplicate or an invalid name.
    """
    runs = [run for arm in arms for run in _runs(arm)]
    if seeds_outermost:
        order = list(dict.fromkeys(run.seed for run in runs))
        runs.sort(key=lambda run: order.index(run.seed))
    _refuse_duplicates(runs)
    return runs


def resolve(file: Mapping[str, Any], changes: Mapping[str, Any], where: str) -> SPHEREHyperParams:
    """Hyperparameters of a file with changes, as with ``edit --hparams`` and ``--set``."""
    try:
        return SPHEREHyperParams.from_dict({**file, **changes})
    except ValueError as error:
        raise ValueError(f"{where} with {dict(changes)!r}: {error}") from error


def _runs(arm: Arm) -> Iterator[Run]:
    group = arm.group
    given = {**group.settings.set, **arm.changes}
    resolved = resolve(group.file, given, group.where)
    if arm.sphere and not resolved.projects:
        raise ValueError(f"{group.where}: gamma {resolved.gamma:g} with alpha {resolved.alpha:g} projects nothing, "
                         "which is `sphere: false`: give both above 0")
    run = replace(group.settings, sphere=arm.sphere, set=given, hyperparameters=resolved.to_dict())
    name = _generated_name(run, group, resolved) if group.name is None else group.name
    for seed in arm.seeds:
        yield replace(run, name=f"{name}-seed{seed}", arm=name, seed=seed)


def _generated_name(run: Run, group: Group, resolved: SPHEREHyperParams) -> str:
    head = [run.method, "plain"]
    if run.sphere:
        head[1:] = ["sphere", f"gamma{resolved.gamma:g}", f"alpha{resolved.alpha:g}"]
    others = [name for name in run.set if name not in (("gamma", "alpha") if run.sphere else SPHERE_ONLY)]
    changed = {name: run.value(name) for name in others if run.value(name) != getattr(group.defaults, name, None)}
    return compose(head, {**group.named, **changed})


def _refuse_duplicates(runs: Sequence[Run]) -> None:
    arms: dict[str, str] = {}
    contents: dict[str, Run] = {}
    for run in runs:
        content = json.dumps([run.effective_hyperparameters(), run.dataset, run.data, run.num_edits, run.batch_size,
                              run.edit], sort_keys=True, default=repr)
        other = contents.setdefault(f"{run.seed} {content}", run)
        if other is not run:
            raise ValueError(f"the runs {other.name} and {run.name} are the same: give each value of an axis once, and "
                             "to an entry of `runs` meant only with SPHERE add `sphere: true`")
        if arms.setdefault(run.arm.casefold(), content) != content:  # file systems may ignore case
            raise ValueError(f"two different runs would be called {run.arm}: list one of them under `runs` with a "
                             "different `name`")
        if not is_name(run.arm):
            raise ValueError(f"{run.arm!r} is not a valid name: list these runs under `runs` with a `name`")


def is_name(text: str) -> bool:
    """Whether this is a valid name of runs. The added seed distinguishes it from other files in the folder."""
    return len(text) <= MAX_LENGTH and _NAME.fullmatch(text) is not None


def compose(parts: Iterable[str], settings: Mapping[str, Any]) -> str:
    """``parts`` and NAME=VALUE of each setting, sorted, joined by hyphens and cut to ``MAX_LENGTH``."""
    words = [_clean(part) for part in parts]
    words += [f"{_clean(name)}={_value(settings[name])}" for name in sorted(settings)]
    name = "-".join(words)
    return name if len(name) <= MAX_LENGTH else f"{name[:MAX_LENGTH - 9]}-{_digest(name)}"


def _value(value: Any) -> str:
    text = _plain(value)
    return _clean(text) if len(text) <= _MAX_VALUE_LENGTH else _digest(text)


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(_plain(item) for item in value) or "empty"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _clean(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+-]+", "_", text).strip("._-") or "_"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
