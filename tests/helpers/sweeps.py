"""Sweeps whose runs are stand-ins."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sphere_easyedit.runs.sweep import Run, Sweep

# Each call is a line of calls.jsonl; --stub says what happens.
PROGRAM = '''
import json, os, signal, subprocess, sys, time
from pathlib import Path
arguments = sys.argv[1:]
folder = Path(arguments[arguments.index("--output") + 1])
stub = ([one.partition("=")[2] for one in arguments if one.startswith("--stub=")] or ["finish"])[0]
calls = folder.parent / "calls.jsonl"
def note(what):
    with calls.open("a") as stream:
        stream.write(json.dumps({"name": folder.name, "what": what, "at": time.monotonic(), "pid": os.getpid(),
                                 "threads": os.environ["OMP_NUM_THREADS"], "arguments": arguments}) + "\\n")
folder.mkdir(exist_ok=True)
signal.signal(signal.SIGINT, signal.default_int_handler)  # as the real one, whatever it inherited
if stub == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
note("started")
print("hello from", folder.name, flush=True)
if stub in ("hang", "stubborn") or (stub == "hang-once" and not (folder / "hung").exists()):
    (folder / "hung").touch()
    time.sleep(60)
if stub == "with-child":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    (folder / "child").write_text(str(child.pid))
    time.sleep(60)
if stub == "work":
    time.sleep(0.1)
while stub == "meet" and calls.read_text().count("started") < 2:
    time.sleep(0.02)
if stub == "fail" or (stub == "fail-once" and not (folder / "failed").exists()):
    (folder / "failed").touch()
    print("line\\n" * 100 + "the reason", file=sys.stderr)
    sys.exit(3)
if stub != "silent":
    (folder / "summary.json").write_text(json.dumps({"num_edits": 4}))
note("ended")
'''

def run_named(name: str, stub: str = "finish", **changes: Any) -> Run:
    run = Run(f"{name}-seed0", name, "MEMIT", False, 0, "MEMIT/x", {"alpha": 0}, "demo", None, 4, 2, {"stub": stub},
              {"alpha": 0.0, "v_lr": 0.5, "device": None})
    return replace(run, **changes)


def sweep_of(*runs: Run) -> Sweep:
    return Sweep(tuple(runs))


def calls(output: Path, what: str = "started") -> list[dict[str, Any]]:
    file = output / "calls.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if line["what"] == what]


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Whether a process is there, and no zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False

