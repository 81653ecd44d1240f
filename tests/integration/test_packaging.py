"""What a wheel holds, found the way an installed user finds it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import sphere_easyedit
from helpers.paths import REPOSITORY


def test_an_installed_wheel_finds_hparams_and_demo(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(REPOSITORY)],
                   check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=300)
    program = ("import sphere_easyedit as s; from sphere_easyedit.hparams_files import available_hparams;"
               "from sphere_easyedit.datasets.demo import demo_records;"
               "h = s.SPHEREHyperParams.from_hparams('AlphaEdit/smollm2-135m');"
               "print(s.__file__, h.base_alg, len(available_hparams()), len(demo_records()), s.__version__)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True, capture_output=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(site)}, timeout=300)
    where, base_alg, files, facts, version = done.stdout.split()
    assert Path(where).is_relative_to(site)
    assert base_alg == "AlphaEdit"
    assert int(files) == len(list((REPOSITORY / "hparams").rglob("*.yaml")))
    assert int(facts) >= 300
    assert version == sphere_easyedit.__version__ in wheel.name


def test_all_that_is_asked_for_is_in_the_table_of_licences() -> None:
    (call,) = [node for node in ast.walk(ast.parse((REPOSITORY / "setup.py").read_text()))
               if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"]
    said = {word.arg: word.value for word in call.keywords}
    extras = ast.literal_eval(said["extras_require"])
    del extras["easyedit"]  # what EasyEdit asks for is listed by EasyEdit
    asked = {name for packages in (ast.literal_eval(said["install_requires"]), *extras.values())
             for name in (re.split("[>=<]", package)[0].lower() for package in packages)}
    needed = {re.split("[>=<]", package)[0] for package in ast.literal_eval(said["install_requires"])}
    table = (REPOSITORY / "docs" / "SECURITY.md").read_text().split("## Licences of direct dependencies")[1]
    rows = re.findall(r"^\| ([a-z][^|]+) \|[^|]*\|[^|]+\|([^|]*)\|$", table, re.MULTILINE)
    listed = {name.strip(): what.strip() for names, what in rows for name in names.split(",")}
    del listed["package"]  # the heading
    assert set(listed) == asked
    assert {name for name, what in listed.items() if not what} == needed
