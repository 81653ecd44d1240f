#!/usr/bin/env bash
# Lints, type-checks and tests in .venv, which it makes. Arguments are handed to pytest in place of the default ones.
set -euo pipefail
cd "$(dirname "$0")/.."
source run_scripts/setup_venv.sh
setup_venv demo,eval,test

if [ $# -eq 0 ]; then
  .venv/bin/ruff check .
  .venv/bin/mypy sphere_easyedit
  set -- --numprocesses auto --dist loadfile  # a file's tests share what they made
fi
.venv/bin/python -m pytest "$@"
