#!/usr/bin/env bash
# CounterFact through EasyEdit: its BaseEditor edits and evaluates, with SPHERE registered and HE tracked. Runs in the
# Python that EasyEdit runs in (PYTHON, by default the one on the path), where this package is installed too.
#   EASYEDIT_HOME=~/EasyEdit ./run_scripts/edit_with_easyedit.sh --data counterfact.json [more arguments]
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
output="runs/easyedit-$(date +%Y%m%d-%H%M%S)-$$"
exec "${PYTHON:-python3}" "$here/edit_with_easyedit.py" --method AlphaEdit --model smollm2-135m \
  --dataset counterfact --num-edits 100 --batch-size 50 --output "$output" "$@"
