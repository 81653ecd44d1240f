"""A package of which some modules can't be imported: the rest works, and these say why once they are used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from sphere_easyedit.easyedit.partial_imports import tolerant_imports, unimportable_modules

FILES = {
    "__init__.py": "from .methods import *\nfrom .table import TABLE, Derived\n",
    "methods/__init__.py": "from .good import *\nfrom .bad import *\n",
    "methods/good/__init__.py": "from .main import good\n",
    "methods/good/main.py": "def good():\n    return 1\n",
    "methods/bad/__init__.py": "from .main import *\nfrom .settings import Settings\n",
    "methods/bad/main.py": "import os\nFAILURE\n\ndef bad():\n    return 1\n\ndef _private(): ...\n"
                           "\nclass Executor:\n    def apply(self): ...\n",
    "methods/bad/settings.py": "class Settings:\n    lr = 1.0\n",
    "table.py": "from .methods.bad import bad, Executor\nfrom .methods import good\n"
                "from .methods.bad.main import _private\nclass Derived(Executor):\n    name = 'derived'\n"
                "TABLE = {'good': good, 'bad': bad, 'object': Executor().apply, 'private': _private}\n",
}
NAME = "partly_importable"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / NAME
    for name in [name for name in sys.modules if name.partition(".")[0] == NAME]:
        del sys.modules[name]


def write(folder: Path, failure: str, changes: Mapping[str, str] | None = None) -> None:
    for name, source in {**FILES, **(changes or {})}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source.replace("FAILURE", failure))


def import_tolerantly() -> Any:
    with tolerant_imports([f"{NAME}.methods"]):
        return importlib.import_module(NAME)


@pytest.mark.parametrize(("failure", "said"), [
    ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
    ("from os import no_such_name", "ImportError: cannot import name 'no_such_name' from 'os'"),
    ("os.no_such_name", "AttributeError: module 'os' has no attribute 'no_such_name'"),
    ("raise RuntimeError('no\\noperator')", "RuntimeError: no operator"),
])
def test_the_rest_works(folder: Path, failure: str, said: str) -> None:
    write(folder, failure)
    before = list(sys.meta_path)
    package = import_tolerantly()
    assert sys.meta_path == before
    assert package.TABLE["good"]() == package.good() == 1
    assert package.Settings.lr == 1.0
    assert package.Derived.name == "derived"
    assert list(unimportable_modules(NAME)) == [f"{NAME}.methods.bad.main"]
    uses = [*(package.TABLE[name] for name in ("bad", "object", "private")), package.bad, package.Executor,
            package.Derived, lambda: package.Executor.apply]
    for use in uses:
        with pytest.raises(ImportError) as caught:
            use()
        assert str(caught.value).startswith(f"{NAME}.methods.bad.main can't be imported ({said}")
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is unimportable_modules(NAME)[f"{NAME}.methods.bad.main"]


def test_a_package_that_fails_itself_keeps_its_modules(folder: Path) -> None:
    write(folder, "", {"methods/bad/__init__.py": "import no_such_module\n",
                       "table.py": "from .methods.bad.main import bad\nfrom .methods.bad import other\n"
                                   "TABLE, Derived = {'bad': bad, 'other': other}, None\n"})
    package = import_tolerantly()
    assert package.TABLE["bad"]() == 1
    with pytest.raises(ImportError, match=r"methods\.bad can't be imported .*no_such_module"):
        package.TABLE["other"]()


def test_modules_keep_their_own_loaders(folder: Path) -> None:
    write(folder, "import no_such_module")
    import_tolerantly()
    found = sys.modules[f"{NAME}.methods.good.main"]
    assert type(found.__loader__).__name__ == type(found.__spec__.loader).__name__ == "SourceFileLoader"  # type: ignore[union-attr]


@pytest.mark.parametrize(("file", "failure"), [
    ("table.py", ModuleNotFoundError), ("methods/bad/main.py", KeyboardInterrupt), ("__init__.py", RuntimeError)])
def test_other_failures_are_raised(folder: Path, file: str, failure: type[BaseException]) -> None:
    """Outside of the packages that are named, and what is no failure of the module's."""
    before = list(sys.meta_path)
    write(folder, "", {file: f"raise {failure.__name__}('no')\n"})
    with pytest.raises(failure):
        import_tolerantly()
    assert sys.meta_path == before


def test_outside_of_the_context_imports_fail_as_ever(folder: Path) -> None:
    write(folder, "import no_such_module")
    with tolerant_imports([f"{NAME}.methods"]):
        pass
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        importlib.import_module(NAME)


def test_a_module_that_is_no_python(folder: Path) -> None:
    write(folder, "def", {"table.py": "from .methods.bad.main import bad\nTABLE, Derived = {'bad': bad}, None\n"})
    with pytest.raises(ImportError, match=r"bad\.main can't be imported \(SyntaxError"):
        import_tolerantly().TABLE["bad"]()
