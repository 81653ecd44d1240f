#!/usr/bin/env bash
# Edits 50 facts into SmolLM2-135M with AlphaEdit + SPHERE, shows what became of them and leaves report.html. Takes all
# it needs from package registries; after installation, two to three minutes on two cores. One context a step takes half
# the time of all five, to the same metrics here (docs/MEASUREMENTS.md). Arguments are handed to `sphere-easyedit edit`.
set -euo pipefail
cd "$(dirname "$0")/.."
source run_scripts/setup_venv.sh
setup_venv demo,report

output="runs/quickstart-$(date +%Y%m%d-%H%M%S)-$$"
echo "Editing 50 facts into SmolLM2-135M with AlphaEdit + SPHERE, which takes two to three minutes on two cores"
.venv/bin/sphere-easyedit edit --hparams AlphaEdit/smollm2-135m --dataset demo --num-edits 50 --batch-size 25 \
  --set contexts_per_step=1 --seed 0 --examples 3 --report --output "$output" "$@"
case=$(sed -n '1s/.*"case_ids": \[\([^],]*\).*/\1/p' "$output/edits.jsonl")  # of the first fact
cat <<END

Open $PWD/$output/report.html in a browser. To try next:

  # ask the unedited and the edited model side by side, and edit more facts
  .venv/bin/sphere-easyedit chat $output
  # what the unedited and the edited model say about one fact
  .venv/bin/sphere-easyedit show $output --case $case
  # the edits as an adapter for PEFT
  .venv/bin/sphere-easyedit export $output --as lora --rank 50 --output $output-adapter
  # a fact of your own
  echo '{"prompt": "{} lives in the city of", "subject": "Ada Lovelace", "target_new": "Toronto"}' > facts.jsonl
  .venv/bin/sphere-easyedit edit --hparams AlphaEdit/smollm2-135m --dataset facts --data facts.jsonl --output runs/mine
END
