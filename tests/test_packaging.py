"""What a wheel holds, found the way an installed user finds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import sphere_easyedit

REPOSITORY = Path(__file__).parents[1]


def test_an_installed_wheel_finds_hparams_and_demo(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(REPOSITORY)],
                   check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=300)
    program = ("import sphere_easyedit as s; from sphere_easyedit.hparams_files import available_hparams;"
               "from sphere_easyedit.evaluation.demo import demo_records;"
               "h = s.SPHEREHyperParams.from_hparams('AlphaEdit/smollm2-135m');"
               "print(s.__file__, h.base_alg, len(available_hparams()), len(demo_records()), s.__version__)")
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, text=True, capture_output=True, check=True,
                          env={**os.environ, "PYTHONPATH": str(site)}, timeout=300)
    where, base_alg, files, facts, version = done.stdout.split()
    assert Path(where).is_relative_to(site)
    assert base_alg == "AlphaEdit"
    assert int(files) == 60
    assert int(facts) >= 300
    assert version == sphere_easyedit.__version__ in wheel.name
