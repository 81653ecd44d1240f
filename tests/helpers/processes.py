"""The command line in processes forked from one that has imported torch and the package, or called in this one.

Each fresh interpreter spends five seconds of processor time on imports. What a test shows of a process (its exit
status, its streams, how it takes signals) holds for a forked one as well; that imports themselves go well and say
nothing is for the tests that start ``python -m sphere_easyedit``.
"""

from __future__ import annotations

import io
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from helpers.paths import REPOSITORY

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "PYTHONPATH": str(REPOSITORY)}
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload([
    "sphere_easyedit.cli.app", "sphere_easyedit.cli.diagnosis", "sphere_easyedit.analysis.case_study",
    "sphere_easyedit.runs.sequential", "sphere_easyedit.export", "sphere_easyedit.planning",
    "sphere_easyedit.removal", "transformers.models.auto.modeling_auto",
    "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"])


def forked(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A started process. A daemon: one that hangs is ended with the tests, not waited for."""
    process = _FORKSERVER.Process(target=target, args=arguments, daemon=True)
    # The first one starts the server, where torch and huggingface_hub read this as they are imported.
    with mock.patch.dict(os.environ, ENVIRONMENT):
        process.start()
    return process


class Started:
    """A process of ``sphere-easyedit`` with these arguments, in a folder of its own choosing."""

    def __init__(self, *arguments: object, cwd: Path, environment: Mapping[str, str] | None = None) -> None:
        self._streams = tempfile.TemporaryDirectory(prefix="sphere-process-")
        files = [Path(self._streams.name) / name for name in ("stdout", "stderr")]
        for file in files:
            file.touch()
        self._stdout, self._stderr = files
        self.arguments = tuple(map(str, arguments))
        given = {**os.environ, **ENVIRONMENT} if environment is None else dict(environment)
        self._process = forked(_work, self.arguments, cwd, given, files)

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(encoding="utf-8")

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float = 300) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(list(self.arguments), timeout)
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def run_forked(*arguments: object, cwd: Path, environment: Mapping[str, str] | None = None
               ) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run`` of the command line, its output captured."""
    started = Started(*arguments, cwd=cwd, environment=environment)
    return subprocess.CompletedProcess(started.arguments, started.wait(), started.stdout, started.stderr)


def _work(arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], streams: list[Path]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(streams, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a shell's foreground
    sys.argv = ["sphere-easyedit", *arguments]
    from sphere_easyedit.cli import main

    main()


def call_cli(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process; log messages are not in its standard error."""
    from sphere_easyedit.cli import main

    said, complained = io.StringIO(), io.StringIO()
    ours, level, before = logging.getLogger("sphere_easyedit"), logging.getLogger("sphere_easyedit").level, Path.cwd()
    status: object = 0
    with mock.patch.dict(os.environ, COLUMNS="120", TQDM_DISABLE="1"), mock.patch(
            "huggingface_hub.constants.HF_HUB_OFFLINE", True), mock.patch.object(
            sys, "argv", ["sphere-easyedit", *arguments]), redirect_stdout(said), redirect_stderr(complained):
        os.chdir(cwd)
        try:
            main()
        except SystemExit as ended:
            status = ended.code or 0
        finally:
            os.chdir(before)
            ours.setLevel(level)
    assert isinstance(status, int)
    return subprocess.CompletedProcess(arguments, status, said.getvalue(), complained.getvalue())
