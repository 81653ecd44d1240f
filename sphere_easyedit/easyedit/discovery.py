"""Finds and imports EasyEdit, and looks up its methods."""

from __future__ import annotations

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..hparams import SPHERE
from ..utils.messages import kind_and_text, suggestion
from .method_hparams import hparams_class
from .partial_imports import import_failure, tolerant_imports, unimportable_modules

logger = logging.getLogger(__name__)

HOME = "EASYEDIT_HOME"
_PACKAGE = "easyeditor"
_METHODS = (f"{_PACKAGE}.models", f"{_PACKAGE}.trainer")  # packages of the methods and of their training
_CHOOSES_LAYERS = ("DINM",)  # edits the layer that it finds toxic, not those of its hyperparameters


def load_easyedit() -> ModuleType:
    """EasyEdit's package: the one already imported, else from ``EASYEDIT_HOME``, else as installed.

    If some of its methods can't be imported, all others stay usable; a warning names them and the reason.

    Raises:
        ImportError: there is none, it does not import, or it is a release without ``sequential_edit``.
    """
    loaded = sys.modules.get(_PACKAGE)
    if loaded is not None and hasattr(loaded, "ALG_DICT") and has_sequential_edit(loaded):
        return loaded
    home = os.environ.get(HOME)
    if home:
        sys.path.insert(0, home)
    before = set(sys.modules)
    try:
        with tolerant_imports(_METHODS):
            package = importlib.import_module(_PACKAGE)
    except BaseException as error:
        # The next attempt imports everything anew: modules imported so far may contain stand-ins.
        for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE and name not in before]:
            del sys.modules[name]
        if not isinstance(error, ImportError):
            raise
        where = f"{HOME}={home}" if home else f"this Python, and {HOME} is not set"
        raise ImportError(f"EasyEdit can't be imported from {where} ({error}). Set {HOME} to a checkout of its main "
                          "branch, and install what it imports (this package's extra `easyedit`)") from error
    finally:
        if home:
            sys.path.remove(home)
    failed = unimportable_modules(_PACKAGE)
    if failed:
        logger.warning("EasyEdit works without %s, which can't be imported (%s); `sphere-easyedit doctor` gives the "
                       "remedy", ", ".join(failed), "; ".join(dict.fromkeys(map(kind_and_text, failed.values()))))
    if not has_sequential_edit(package):
        raise ImportError(f"EasyEdit at {package.__file__} has no BaseEditor.edit(..., sequential_edit=): set {HOME} "
                          "to a checkout of its main branch")
    return package


def has_sequential_edit(package: ModuleType) -> bool:
    """Whether this EasyEdit edits sequentially, which its release on PyPI does not."""
    editor = getattr(package, "BaseEditor", None)
    return editor is not None and "sequential_edit" in inspect.signature(editor.edit).parameters


def batch_editor(package: ModuleType) -> Any:
    """EasyEdit's class ``BatchEditor``."""
    return importlib.import_module(f"{package.__name__}.editors.batch_editor").BatchEditor


def check_imported(name: str, function: Any) -> None:
    """Raise ImportError if part of a method (the package that its function is in) can't be imported."""
    for module, error in _unimportable_parts(function).items():
        raise ImportError(f"EasyEdit's {name} can't be used: {import_failure(module, error)}; `sphere-easyedit doctor` "
                          "gives the remedy", name=module) from error


def _unimportable_parts(function: Any) -> dict[str, Exception]:
    module = str(getattr(function, "__module__", ""))
    in_methods = any(module.startswith(f"{package}.") for package in _METHODS)
    return unimportable_modules(".".join(module.split(".")[:3])) if in_methods else {}


def find_method(field: str, name: str) -> tuple[Callable[..., Any], bool]:
    """EasyEdit's function of a method, and whether EasyEdit lists it as editing several requests in one call.

    Args:
        field: the hyperparameter that names the method, for errors.

    Raises:
        ImportError: EasyEdit, or its part for this method, can't be imported.
        ValueError: EasyEdit has no such method.
    """
    package = load_easyedit()
    algorithms = package.ALG_DICT
    if name not in algorithms:
        raise ValueError(f"{field} is {name!r}, which EasyEdit does not have{suggestion(name, sorted(algorithms))}")
    check_imported(name, algorithms[name])
    return algorithms[name], bool(batch_editor(package).is_batchable_method(name))


def wrappable(package: ModuleType) -> list[str]:
    """Methods of EasyEdit that ``executor: easyedit`` supports, sorted."""
    return sorted(name for name, function in package.ALG_DICT.items()
                  if name not in (SPHERE, *_CHOOSES_LAYERS) and hparams_class(function) is not None
                  and not _unimportable_parts(function))
