"""Expands groups of runs to single runs, and names them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

from ...hparams import SPHEREHyperParams
from ...speed import with_speed
from .record import Run

MAX_LENGTH: Final = 120  # of a name without seed, in characters; file systems allow 255 bytes

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")


@dataclass(frozen=True)
class Group:
    """Runs of one method that differ only in seed, SPHERE, gamma and alpha.

    Attributes:
        where: location in the file, for errors.
        name: name given in the file, or None to generate one.
        settings: template of the runs, without name, seed and resolved hyperparameters.
        file: hyperparameters of the hyperparameter file.
        gamma, alpha: values; (None,) for those of the file.
    """

    where: str
    name: str | None
    settings: Run
    file: Mapping[str, Any]
    seeds: tuple[int, ...]
    sphere: tuple[bool, ...]
    gamma: tuple[Any, ...]
    alpha: tuple[Any, ...]


def runs_of(groups: Sequence[Group]) -> list[Run]:
    """The groups' runs, seed by seed, with checked hyperparameters and names.

    Raises:
        ValueError: wrong hyperparameters, two equal runs, a duplicate or an invalid name.
    """
    runs = [run for group in groups for run in _runs(group)]
    order = list(dict.fromkeys(run.seed for run in runs))
    runs.sort(key=lambda run: order.index(run.seed))
    _refuse_duplicates(runs)
    return runs


def _runs(group: Group) -> Iterator[Run]:
    """A group's runs, alpha varying slower than the seed and faster than gamma, neither of them without SPHERE."""
    arms: list[tuple[bool, Any, Any]] = []
    for sphere in group.sphere:
        arms += [(True, *point) for point in product(group.gamma, group.alpha)] if sphere else [(False, None, 0)]
    if group.name is not None and len(arms) > 1:
        raise ValueError(f"{group.where} has the name {group.name!r} but describes {len(arms)} runs of each seed: give "
                         "one value each for sphere, gamma and alpha, or omit the name")
    for sphere, gamma, alpha in arms:
        changes = {name: value for name, value in (("gamma", gamma), ("alpha", alpha)) if value is not None}
        given = {**with_speed(group.settings.set), **changes}
        try:
            resolved = SPHEREHyperParams.from_dict({**group.file, **given})
        except ValueError as error:
            raise ValueError(f"{group.where} with {given!r}: {error}") from error
        if sphere and not resolved.projects:
            raise ValueError(f"{group.where}: gamma {resolved.gamma:g} with alpha {resolved.alpha:g} projects nothing, "
                             "which is `sphere: false`: give both above 0")
        kind = f"sphere-gamma{resolved.gamma:g}-alpha{resolved.alpha:g}" if sphere else "plain"
        name = f"{group.settings.method}-{kind}" if group.name is None else group.name
        for seed in group.seeds:
            yield replace(group.settings, name=f"{name}-seed{seed}", arm=name, seed=seed, sphere=sphere, set=given,
                          hyperparameters=resolved.to_dict())


def _refuse_duplicates(runs: Sequence[Run]) -> None:
    arms: dict[str, str] = {}
    contents: dict[str, Run] = {}
    for run in runs:
        content = json.dumps([run.effective_hyperparameters(), run.dataset, run.data, run.num_edits, run.batch_size,
                              run.edit], sort_keys=True, default=repr)
        other = contents.setdefault(f"{run.seed} {content}", run)
        if other is not run:
            raise ValueError(f"the runs {other.name} and {run.name} are the same: give each value once, and "
                             "to an entry of `runs` meant only with SPHERE add `sphere: true`")
        if arms.setdefault(run.arm.casefold(), content) != content:  # file systems may ignore case
            raise ValueError(f"two different runs would be called {run.arm}: list one of them under `runs` with a "
                             "different `name`")
        if not is_name(run.arm):
            raise ValueError(f"{run.arm!r} is not a valid name: list these runs under `runs` with a `name`")


def is_name(text: str) -> bool:
    """Whether this is a valid name of runs. The added seed distinguishes it from other files in the folder."""
    return len(text) <= MAX_LENGTH and _NAME.fullmatch(text) is not None
