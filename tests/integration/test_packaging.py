"""The sdist and the wheel: what they hold, and the wheel in an environment with nothing but its requirements."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import sphere_easyedit
from helpers.models import save_tiny_model
from helpers.paths import REPOSITORY
from sphere_easyedit.models.loading import SMOLLM2, SMOLLM2_FOLDER

PACKAGE = REPOSITORY / "sphere_easyedit"


def files_below(folder: Path) -> set[str]:
    """Paths of the files below a folder, without what Python writes there."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")
            if path.is_file() and "__pycache__" not in path.parts}


def requirements_of(name: str, found: dict[str, metadata.Distribution]) -> dict[str, metadata.Distribution]:
    """Add the installed distributions that one needs, extras apart, to those found, by lower-case name."""
    for text in metadata.requires(name) or []:
        needed = Requirement(text)
        if needed.name.lower() not in found and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
            found[needed.name.lower()] = metadata.distribution(needed.name)
            requirements_of(needed.name, found)
    return found


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both, by ``python -m build`` from a copy of the tree without what earlier builds left in it."""
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"
    shutil.copytree(REPOSITORY, source, ignore=lambda where, names: [
        name for name in names if name.endswith(".egg-info") or name == "__pycache__"
        or (Path(where) == REPOSITORY and (name.startswith(".") or name in ("build", "dist", "runs", "data", "site")))])
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(source)],
                   check=True, capture_output=True, timeout=300)
    shutil.rmtree(source)
    return folder


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel and links to its requirements. Installing those afresh would take minutes."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    [site] = folder.glob("lib/python3*/site-packages")
    for needed in requirements_of("sphere-easyedit", {}).values():
        for name in {file.parts[0] for file in needed.files or []} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(Path(str(needed.locate_file(name))))
    [wheel] = dist.glob("*.whl")
    subprocess.run([sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", str(python),
                    "install", "--no-index", str(wheel)], check=True, timeout=300)
    return python


def run_installed(command: list[str], cwd: Path) -> list[str]:
    """Lines on standard output of a command that sees neither this checkout nor a hub, and has models in ``cwd``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, text=True, capture_output=True, timeout=300, check=False, env={
        **environment, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "SPHERE_CACHE": str(cwd)})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_an_index_would_take_both(dist: Path) -> None:
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *map(str, dist.iterdir())], check=True,
                   capture_output=True, timeout=300)


def test_the_wheel_is_the_package_with_its_hparams(dist: Path) -> None:
    [file] = dist.glob("*.whl")
    assert file.name.startswith(f"sphere_easyedit-{sphere_easyedit.__version__}-")
    with zipfile.ZipFile(file) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {f"sphere_easyedit/{name}" for name in files_below(PACKAGE)} | {
        f"sphere_easyedit/_hparams/{name}" for name in files_below(REPOSITORY / "hparams")}
    assert {"sphere_easyedit/py.typed", "sphere_easyedit/data/demo.json"} <= names


def test_the_sdist_has_what_tests_need(dist: Path) -> None:
    [file] = dist.glob("*.tar.gz")
    with tarfile.open(file) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    for folder in ("benchmarks", "docs", "hparams", "run_scripts", "tests"):
        assert {f"{folder}/{name}" for name in files_below(REPOSITORY / folder)} <= names
    assert {"CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "pyproject.toml"} <= names


def test_an_installed_wheel_runs_the_readmes_first_python(installed: Path, tmp_path: Path) -> None:
    """A tiny model stands in for SmolLM2-135M, and settings that edit it in seconds for those shipped."""
    [settings] = installed.parents[1].rglob(f"_hparams/SPHERE/AlphaEdit/{SMOLLM2}.yaml")
    quick = {"layers": [1, 2], "v_loss_layer": 3, "mom2_n_samples": 8, "v_num_grad_steps": 5}
    settings.write_text(yaml.safe_dump(yaml.safe_load(settings.read_text()) | quick))
    save_tiny_model(tmp_path / SMOLLM2_FOLDER, "llama")
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    example = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    afterwards = ("import sphere_easyedit as s; from sphere_easyedit.hparams_files import available_hparams;"
                  "from sphere_easyedit.datasets.demo import demo_records;"
                  "print(s.__file__, len(available_hparams()), len(demo_records()), s.__version__)")
    said = run_installed([str(installed), "-c", example + afterwards], tmp_path)
    where, files, facts, version = said[-1].split()
    assert Path(where).is_relative_to(installed.parents[1])
    assert int(files) == len(files_below(REPOSITORY / "hparams"))
    assert int(facts) >= 300
    assert version == sphere_easyedit.__version__


def test_an_installed_wheel_brings_the_command(installed: Path, tmp_path: Path) -> None:
    assert "edit" in "".join(run_installed([str(installed.parent / "sphere-easyedit"), "--help"], tmp_path))


def test_the_citation_names_the_paper() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # what its schema requires
    assert citation["license"] == metadata.metadata("sphere-easyedit")["License"]
    assert "2510.01172" in citation["references"][0]["url"]


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
