"""Imports a package even if some of its modules fail to import.

Each module that fails is replaced by a stand-in that has an attribute for every name. These attributes can be passed
on, used as base classes and put into tables. Calling one, or reading an attribute of it, raises an ImportError with
the reason.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

from ..utils.messages import kind_and_text


class UnimportableModule(ModuleType):
    """A stand-in for a module that can't be imported.

    Attributes:
        error: the exception that its import raised.
    """

    error: Exception

    def __init__(self, failed: ModuleType, error: Exception, names: Sequence[str], importing: Callable[[], bool]
                 ) -> None:
        super().__init__(failed.__name__)
        # A package keeps its path, so that its other modules can be imported.
        vars(self).update({name: value for name, value in vars(failed).items()
                           if name in ("__spec__", "__loader__", "__package__", "__path__", "__file__")})
        vars(self).update({"__all__": list(names), "error": error, "importing": importing})

    def __getattr__(self, name: str) -> _Unimportable:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return _Unimportable(name, (), {"__module__": self.__name__, "_origin": self})


class _Unimportable(type):
    """Metaclass of a stand-in's attributes, which can be subclassed, and called until the import has ended."""

    _origin: UnimportableModule

    def __call__(cls, *_: Any, **__: Any) -> Any:
        return cls._used()

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):  # looked up by Python and libraries on any object
            raise AttributeError(f"{cls.__name__!r} has no attribute {name!r}")
        return cls._used()

    def _used(cls) -> Any:
        origin = cls._origin
        if origin.importing():  # a table of methods built during the import must not fail
            return cls
        raise ImportError(import_failure(origin.__name__, origin.error), name=origin.__name__) from origin.error


def import_failure(module: str, error: BaseException) -> str:
    """One line that says which module can't be imported, and why."""
    return f"{module} can't be imported ({kind_and_text(error)})"


def unimportable_modules(package: str) -> dict[str, Exception]:
    """The import errors of a package's modules (itself included) that were replaced by stand-ins."""
    return {name: module.error for name, module in list(sys.modules.items())
            if isinstance(module, UnimportableModule) and (name == package or name.startswith(f"{package}."))}


@contextmanager
def tolerant_imports(packages: Sequence[str]) -> Iterator[None]:
    """Inside the context, a module below one of these packages that raises when imported gets a stand-in.

    Python's import system is restored when the context ends; stand-ins stay in ``sys.modules``.
    """
    finder = _Finder(tuple(f"{package}." for package in packages))
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        finder.importing = False


class _Finder(MetaPathFinder):
    def __init__(self, prefixes: tuple[str, ...]) -> None:
        self._prefixes, self.importing = prefixes, True

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
                  ) -> ModuleSpec | None:
        if not fullname.startswith(self._prefixes):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, lambda: self.importing)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, importing: Callable[[], bool]) -> None:
        self._loader, self._importing = loader, importing

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # Sources and resources are looked up through this loader, which must be the module's own.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        try:
            self._loader.exec_module(module)
        except Exception as error:  # unsuitable libraries raise many kinds
            names = _defined_names(self._loader, module.__name__)
            # The import system returns the module found here.
            sys.modules[module.__name__] = UnimportableModule(module, error, names, self._importing)


def _defined_names(loader: Loader, name: str) -> list[str]:
    """Public functions and classes of a module by its source, for ``import *``."""
    try:
        tree = ast.parse(loader.get_source(name) or "")  # type: ignore[attr-defined]
    except (AttributeError, ImportError, SyntaxError, ValueError):
        return []
    return [node.name for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and node.name[0] != "_"]
