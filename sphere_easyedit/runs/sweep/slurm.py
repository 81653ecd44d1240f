"""What a sweep asks a cluster for: ``slurm`` in its file, ``--slurm NAME=VALUE`` on the command line.

Names are those of ``sbatch``'s long options, with underscores, as submitit takes them; they hold for each run:

.. code-block:: yaml

    slurm:
      partition: gpu
      time: "8:00:00"          # minutes, or any of SLURM's forms; 24 hours if not given
      gpus_per_node: 1
      cpus_per_task: 8
      mem: 64GB
      array_parallelism: 4     # jobs of an array at a time
      max_num_timeout: 5       # a run whose time is up is queued again so many times (3), and goes on where it was
      signal_delay_s: 120      # seconds that it is told before that (90)
      setup: [module load cuda]                           # shell commands in front
      additional_parameters: {reservation: mine}          # any other option of sbatch
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from ...utils.yaml import read_yaml
from .checks import as_list, as_mapping, as_text, as_whole, check_keys

TIME: Final = "time"
TIMEOUTS: Final = "max_num_timeout"
FURTHER: Final = "additional_parameters"
MINUTES: Final = 24 * 60  # submitit's own default is 5

_OF_SWEEPS = MappingProxyType({
    "nodes": "a run is one process", "ntasks": "a run is one process", "ntasks_per_node": "a run is one process",
})
_DAYS = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def check_slurm(value: Any, where: str) -> dict[str, Any]:
    """What a cluster is asked for, ``time`` in minutes.

    Raises:
        ValueError: it is no mapping, names what is not known or what a sweep sets itself, or a value can't be.
    """
    found: dict[str, Any] = {}
    for key, item in as_mapping(value, where).items():
        name = as_text(key, where).replace("-", "_")
        if name in _OF_SWEEPS:
            raise ValueError(f"{where} holds {key}: remove it, {_OF_SWEEPS[name]}")
        check_keys({name: item}, _CHECKS, where)
        if name in found:
            raise ValueError(f"{where} holds {name} in two spellings: remove one")
        found[name] = _CHECKS[name](item, f"{where}.{name}")
    return found


def parse_slurm(options: Sequence[str]) -> dict[str, Any]:
    """What ``--slurm NAME=VALUE`` say, values as YAML; the last of a name holds.

    Raises:
        ValueError: as ``check_slurm``; or an option has no ``=``.
    """
    found: dict[str, Any] = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--slurm {option!r} has no '=': write NAME=VALUE")
        name = name.strip().replace("-", "_")
        # YAML reads 4:00:00 as a number to base 60.
        given = value.strip() if name == TIME else read_yaml(value, f"--slurm {option!r}")
        found |= check_slurm({name: given}, "--slurm")
    return found


def _minutes(value: Any, where: str) -> int:
    """Minutes, rounded up, of a number of them or M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    if isinstance(value, str) and not value.isdecimal():
        match = _DAYS.fullmatch(value)
        if match is None or (match[1] is None and match[3] is None):
            raise ValueError(f'{where} is {value!r:.60}: give minutes, or a text such as "8:00:00" or "2-12" '
                             "(days-hours)")
        days, *rest = (None if part is None else int(part) for part in match.groups())
        first, second, third = rest
        assert first is not None
        if days is None and third is None:  # minutes:seconds
            seconds = 60 * first + (second or 0)
        else:
            seconds = 86400 * (days or 0) + 3600 * first + 60 * (second or 0) + (third or 0)
        value = math.ceil(seconds / 60)
    return as_whole(int(value) if isinstance(value, str) else value, where, 1)


def _plain(value: Any, where: str) -> Any:
    if value is None or not isinstance(value, (str, int, float)) or value is False or "\n" in str(value):
        raise ValueError(f"{where} is {value!r:.60}: give a text on one line, a number or true, or leave it out")
    return value


def _commands(value: Any, where: str) -> list[str]:
    return [as_text(one, where) for one in as_list(value)]


def _options(value: Any, where: str) -> dict[str, Any]:
    return {as_text(name, where): _plain(item, f"{where}.{name}") for name, item in as_mapping(value, where).items()}


def _whole(value: Any, where: str, least: int) -> int:
    return as_whole(value, where, least)


_CHECKS: Mapping[str, Callable[[Any, str], Any]] = MappingProxyType({
    TIME: _minutes, TIMEOUTS: partial(_whole, least=0), FURTHER: _options,
    **dict.fromkeys(("cpus_per_task", "cpus_per_gpu", "array_parallelism"), partial(_whole, least=1)),
    **dict.fromkeys(("gpus_per_node", "gpus_per_task", "signal_delay_s"), partial(_whole, least=0)),
    **dict.fromkeys(("setup", "srun_args"), _commands),
    **dict.fromkeys(("partition", "account", "qos", "mem", "mem_per_cpu", "mem_per_gpu", "constraint", "gres",
                     "nodelist", "exclude", "exclusive", "comment", "mail_type", "mail_user", "job_name", "wckey"),
                    _plain),
})
