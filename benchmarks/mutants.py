"""Mutation testing of the mathematics: mutmut on four modules, in a copy of HEAD, by the tests that concern them.

    pip install -e .[audit,test]
    OMP_NUM_THREADS=1 python benchmarks/mutants.py --work /tmp/mutants           # all: an hour or two
    OMP_NUM_THREADS=1 python benchmarks/mutants.py --work /tmp/mutants --again   # survivors only, by HEAD's tests

Prints a table, and writes the survivors' diffs to ``survivors.txt`` in the work folder, which is kept: started
again, mutmut tests what was left untested. Fast tests run first, so that only survivors meet the slow ones; hypothesis
tries 5 examples, always the same, and does not shrink what fails.

mutmut leaves out module constants, class attributes, properties and docstrings.
"""

from __future__ import annotations

import argparse
import configparser
import io
import json
import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("core/projection", "core/hyperspherical", "core/tensors", "methods/solvers", "methods/rect", "methods/prune")
TESTS = ("projection", "hyperspherical", "solvers", "restraints")
# Left out: what measures memory in a process of its own, where no mutant is active, and what takes seconds.
LEFT_OUT = ("large_float32", "through_a_model", "dense_solve", "test_singular")
SURVIVED = {0, 33}  # passed, met no test
KILLED = {1, 3, 36, 24, -24, 152, 255}  # failed, internal error, time limits
CONFTEST = '''
import json
from pathlib import Path
from hypothesis import Phase, settings

settings.register_profile("mutants", phases=[Phase.explicit, Phase.generate], database=None)
settings.load_profile("mutants")


def pytest_collection_modifyitems(items):
    stats = Path("mutmut-stats.json")
    seconds = json.loads(stats.read_text())["duration_by_test"] if stats.exists() else {}
    items.sort(key=lambda item: seconds.get(item.nodeid, 0.0))
'''


def export(work: Path, commit: str) -> None:
    """A commit's tree, with mutmut's settings and fewer examples."""
    work.mkdir(parents=True, exist_ok=True)
    tests = [work / f"tests/unit/test_{name}.py" for name in TESTS]
    before = [path.read_text() if path.exists() else "" for path in tests]
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar.getmembers():
            path, content = work / member.name, tar.extractfile(member) if member.isfile() else None
            # What is the same keeps its time, by which mutmut tells whether to mutate it again.
            if content is None or not path.exists() or path.read_bytes() != content.read():
                tar.extract(member, work, filter="data")
    for path in tests:
        path.write_text(path.read_text().replace("max_examples=40", "max_examples=5"))
    if before != [path.read_text() for path in tests]:
        # Which tests meet a mutant is not looked at again by mutmut where a test has changed, only where one is new.
        (work / "mutants/mutmut-stats.json").unlink(missing_ok=True)
    (work / "conftest.py").write_text(CONFTEST)
    settings: dict[str, list[str]] = {
        "source_paths": ["sphere_easyedit"],
        "only_mutate": [f"sphere_easyedit/{name}.py" for name in MODULES],
        "also_copy": ["conftest.py", "hparams", "pyproject.toml"],
        "pytest_add_cli_args_test_selection": [f"tests/unit/test_{name}.py" for name in TESTS],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "-k", " and ".join(f"not {name}" for name in LEFT_OUT)],
        # The first limit met is of wall time: on a busy machine 3 s more than usual stopped tests that were only slow.
        "timeout_multiplier": ["1.5"],
        "timeout_constant": ["20.0"],
        "use_git_change_detection": ["false"],
    }
    config = configparser.ConfigParser()
    config["mutmut"] = {key: "\n".join(values if len(values) == 1 else ["", *values])
                        for key, values in settings.items()}
    with (work / "setup.cfg").open("w") as file:
        config.write(file)


def verdicts(work: Path) -> dict[str, bool | None]:
    """Whether each mutant was killed, by its name; None for what was not tested.

    What was killed stays so: mutmut forgets everything where its settings change.
    """
    path = work / "verdicts.json"
    known: dict[str, bool | None] = json.loads(path.read_text()) if path.exists() else {}
    for name in MODULES:
        meta = work / f"mutants/sphere_easyedit/{name}.py.meta"
        for mutant, code in json.loads(meta.read_text())["exit_code_by_key"].items() if meta.exists() else ():
            if code is not None and code not in KILLED | SURVIVED:
                raise SystemExit(f"{mutant} ended with {code}: look into it")
            if code is not None or mutant not in known:
                known[mutant] = known.get(mutant) or (None if code is None else code in KILLED)
    path.write_text(json.dumps(known, indent=1))
    return known


def sample(work: Path, count: int) -> list[str]:
    """Names of ``count`` mutants of each module; a larger sample holds the smaller ones."""
    os.chdir(work)  # where mutmut looks for its settings
    from mutmut.mutation.file_mutation import mutate_file_contents

    chosen = []
    for name in MODULES:
        path = f"sphere_easyedit/{name}.py"
        prefix = path.removesuffix(".py").replace("/", ".")
        names = [f"{prefix}.{mutant}" for mutant in mutate_file_contents(path, Path(path).read_text()).mutant_names]
        random.Random(0).shuffle(names)
        chosen += names[:count]
    return chosen


def mutmut(work: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONHASHSEED": "0"}
    # The console script and not ``-m``, which mutmut warns of.
    command = [str(Path(sys.executable).parent / "mutmut"), *arguments]
    piped = subprocess.PIPE if arguments[0] == "show" else None
    return subprocess.run(command, cwd=work, env=environment, check=True, stdout=piped, text=True).stdout or ""


def report(work: Path, chosen: set[str]) -> None:
    print("| module | mutants | tested | killed | survived |\n| --- | ---: | ---: | ---: | ---: |")
    known, diffs = verdicts(work), []
    for name in MODULES:
        prefix = f"sphere_easyedit.{name.replace('/', '.')}."
        every = [mutant for mutant in known if mutant.startswith(prefix)]
        tested = [mutant for mutant in every if known[mutant] is not None and (mutant in chosen or not chosen)]
        survived = [mutant for mutant in tested if not known[mutant]]
        print(f"| `{name}.py` | {len(every)} | {len(tested)} | {len(tested) - len(survived)} | {len(survived)} |")
        diffs += [mutmut(work, "show", mutant) for mutant in survived]
    (work / "survivors.txt").write_text("\n".join(diffs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=lambda given: Path(given).resolve(), required=True, help="folder of the copy")
    parser.add_argument("--commit", default="HEAD", help="what to test; one whose modules differ needs another folder")
    parser.add_argument("--again", action="store_true", help="test the survivors of a finished run again")
    parser.add_argument("--sample", type=int, metavar="N", help="only N mutants of each module, drawn with seed 0")
    parser.add_argument("--report", action="store_true", help="only print what is known")
    parser.add_argument("mutants", nargs="*", help="names, as survivors.txt has them; all by default")
    options = parser.parse_args()
    work, chosen = options.work, options.mutants
    if not options.report:
        export(work, options.commit)
    known = verdicts(work)
    if options.sample:
        chosen = sample(work, options.sample)
    again = [mutant for mutant in chosen or known if known.get(mutant) is False]
    rest = [mutant for mutant in chosen if known.get(mutant) is None]
    if not options.report and (again if options.again else rest or not chosen):
        mutmut(work, "run", "--max-children", "1", *(again if options.again else rest))
    report(work, set(chosen))


if __name__ == "__main__":
    main()
