#!/usr/bin/env bash
# What to run first on a machine with a GPU: makes .venv, checks parity, speed, memory and several processes, and leaves
# gpu-check.md, a table to send back. Arguments are handed to benchmarks/gpu_check.py (`--device cpu` tries the script).
set -euo pipefail
cd "$(dirname "$0")/.."
source run_scripts/setup_venv.sh
setup_venv demo

exec .venv/bin/python benchmarks/gpu_check.py --output gpu-check.md "$@"
