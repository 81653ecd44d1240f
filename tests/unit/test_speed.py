"""``speed``: what it sets, what wins over it, and where it can be given."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

import sphere_easyedit as sphere
from sphere_easyedit.cli.options import MethodOptions
from sphere_easyedit.hparams_files import find_hparams
from sphere_easyedit.speed import SPEED_FIELDS, SPEEDS, SpeedName, with_speed

SHIPPED = "MEMIT/llama3-8b"  # a file that says nothing of speed


def _chosen(hparams: sphere.SPHEREHyperParams) -> dict[str, object]:
    return {name: getattr(hparams, name) for name in SPEED_FIELDS}


@pytest.mark.parametrize("speed", SPEEDS)
def test_a_speed_sets_all_its_fields(speed: str) -> None:
    plain = sphere.SPHEREHyperParams.from_hparams(SHIPPED).to_dict()
    assert _chosen(sphere.SPHEREHyperParams.from_dict(plain)) == dict(SPEEDS["exact"])
    mapping = {name: value for name, value in plain.items() if name not in SPEED_FIELDS}
    assert _chosen(sphere.SPHEREHyperParams.from_dict({**mapping, "speed": speed})) == dict(SPEEDS[speed])


def test_all_speeds_set_the_same_fields() -> None:
    assert tuple(SPEEDS) == get_args(SpeedName)
    assert {tuple(values) for values in SPEEDS.values()} == {SPEED_FIELDS}


def test_given_values_win() -> None:
    assert with_speed({"speed": "fast", "contexts_per_step": None, "target_dtype": None, "v_lr": 1}) == {
        **SPEEDS["fast"], "contexts_per_step": None, "target_dtype": None, "v_lr": 1}
    assert with_speed({"v_lr": 1}) == {"v_lr": 1}


@pytest.mark.parametrize("speed", ["quick", 3, True, ["fast"]])
def test_unknown_speeds_are_refused(speed: object) -> None:
    with pytest.raises(ValueError, match=r"^speed is .* but must be exact, balanced, fast"):
        with_speed({"speed": speed})


@pytest.mark.parametrize(("speed", "override", "found"), [
    ("fast", [], SPEEDS["fast"]), ("exact", [], SPEEDS["exact"]), (None, ["speed=fast"], SPEEDS["fast"]),
    ("fast", ["normalised_steps=7"], {**SPEEDS["fast"], "normalised_steps": 7}),
    ("exact", ["speed=fast"], SPEEDS["fast"]), (None, [], SPEEDS["balanced"])])
def test_the_command_line_wins_over_the_file(speed: SpeedName | None, override: list[str], found: dict[str, object],
                                             tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("speed: balanced\n" + find_hparams(SHIPPED).read_text())
    assert _chosen(MethodOptions(hparams=str(file), override=override, speed=speed).load()) == dict(found)
