"""Code blocks of the documentation, and what the shell makes of them.

A block is run by bash itself, with a stub in place of each program, which records the words that it was called with: so
variables, loops, comments and continued lines are bash's own business.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from helpers.paths import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
PROGRAMS = ("sphere-easyedit", "python", "pip", "git", "accelerate", "torchrun", "tensorboard", "pytest", "mkdocs",
            "pip-audit", "pip-licenses")
_STUB = '#!/bin/sh\nprintf "%s\\0" $(($# + 1)) "${0##*/}" "$@" >> "$DOC_COMMANDS"\n'
# What a block leaves to the shell may fail where nothing was really run: `grep` in results, `cd` into a clone.
_PRELUDE = """failed() { case $BASH_COMMAND in grep*|cd*) ;; *) echo "$BASH_COMMAND" >> "$DOC_FAILURES";; esac; }
trap failed ERR
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: language, file to write it to (``title="..."``), and text."""

    page: Path
    line: int
    language: str
    title: str | None
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page with a language, from the first."""
    found = []
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.info:
            language, _, rest = token.info.partition(" ")
            title = re.search('title="([^"]+)"', rest)
            found.append(Block(page, (token.map or [0])[0] + 1, language, title[1] if title else None, token.content))
    return found


class Shell:
    """Bash in a folder with the repository's files, in which programs record how they are called."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self._log, self._failures = folder / ".commands", folder / ".failures"
        stubs = folder / ".stubs"
        stubs.mkdir(parents=True)
        (folder / "run_scripts").mkdir()
        scripts = [folder / "run_scripts" / script.name for script in (REPOSITORY / "run_scripts").glob("*.sh")]
        for program in (*(stubs / name for name in PROGRAMS), *scripts):
            program.write_text(_STUB)
            program.chmod(0o755)
        for name in ("benchmarks", "docs", "hparams", "tests"):
            (folder / name).symlink_to(REPOSITORY / name)
        self._environment = {**environment, "PATH": f"{stubs}:{os.environ['PATH']}", "HOME": str(folder),
                             "DOC_COMMANDS": str(self._log), "DOC_FAILURES": str(self._failures)}

    def commands(self, block: Block) -> list[list[str]]:
        """The words of each command of a bash block; AssertionError for what bash refuses."""
        for file in (self._log, self._failures):
            file.write_bytes(b"")
        bash = shutil.which("bash")
        assert bash is not None
        done = subprocess.run([bash, "-c", _PRELUDE + block.text], cwd=self.folder, env=self._environment, text=True,
                              capture_output=True, timeout=60, check=False)
        assert not (failed := self._failures.read_text()), f"{block.where}: {failed}{done.stderr}"
        words = self._log.read_text(encoding="utf-8").split("\0")[:-1]
        found = []
        while words:
            number = int(words[0])
            found.append(words[1:number + 1])
            words = words[number + 1:]
        return found
