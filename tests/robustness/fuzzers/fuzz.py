"""Runs a property of ``tests/robustness/test_fuzz.py`` as a coverage-guided fuzzer, with atheris (libFuzzer).

    python tests/robustness/fuzzers/fuzz.py run_directories -max_total_time=300
    python tests/robustness/fuzzers/fuzz.py data_sets -runs=500 -artifact_prefix=/tmp/

The first argument names the property, the others are libFuzzer's, which gets a corpus of random seeds. A failure ends
it with a traceback and hypothesis's shrunk example; the input is kept as ``crash-*`` (or ``timeout-*``), which can be
given as an argument to run it again.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import tempfile
from pathlib import Path

import atheris  # type: ignore[import-untyped]

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # test_fuzz
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # helpers
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import torch  # noqa: F401 - imported before, so that only the package is instrumented
import transformers  # noqa: F401

with atheris.instrument_imports(include=["sphere_easyedit"]):
    import test_fuzz


def main() -> None:
    name = sys.argv.pop(1) if len(sys.argv) > 1 else ""
    found = getattr(test_fuzz, f"test_{name}", None)
    if not hasattr(found, "hypothesis"):
        known = [one.removeprefix("test_") for one in dir(test_fuzz)
                 if one.startswith("test_") and hasattr(getattr(test_fuzz, one), "hypothesis")]
        sys.exit(f"{name!r} is not a property: choose one of {', '.join(known)}")
    logging.disable(logging.CRITICAL)
    fuzz_one_input = found.hypothesis.fuzz_one_input

    def one_input(data: bytes) -> None:
        fuzz_one_input(data)

    with tempfile.TemporaryDirectory() as corpus:
        # Hypothesis turns bytes into choices: large examples need long inputs.
        drawn = random.Random(0)
        for number in range(64):
            (Path(corpus) / f"seed-{number}").write_bytes(drawn.randbytes(64 << number % 6))
        atheris.Setup([*sys.argv, "-len_control=0", "-max_len=4096", corpus], one_input)
        atheris.Fuzz()


main()
