#!/usr/bin/env bash
# From nothing to a trained, evaluated, exported and reloaded StableGPT, on the CPU, in minutes.
# Needs Python 3.11+ and a package index, no Hub. Options are the training's, and RUN is its folder:
#     RUN=runs/short scripts/quickstart.sh --set training.steps=20
# Unless they set training.steps, the run is fitted into about five minutes on a slow machine.
set -euo pipefail
cd "$(dirname "$0")/.."
run=${RUN:-runs/quickstart}
export_folder=exports/$(basename "$run")

scripts/bootstrap.sh quickstart
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1

step() { printf '\n$ %s\n' "$*"; "$@"; }
step hf-stable sample-text --output runs/quickstart-text.jsonl
fitted=()
if [[ "$*" != *training.steps=* ]]; then
    settings=$(python scripts/fit_quickstart.py "$run")
    mapfile -t fitted <<<"$settings"
    fitted=(--set "${fitted[@]}")
fi
step hf-stable train quickstart --output "$run" "${fitted[@]}" "$@"
step hf-stable evaluate "$run"
step hf-stable export "$run" --output "$export_folder"

cat <<EOF

Done. The run's records are in $run, the model to share in $export_folder. What to do next:
  source .venv/bin/activate
  hf-stable generate $export_folder --prompt "And it came to pass"
  hf-stable check base/10m                                    # a larger model: what it would take
  RUN=runs/other scripts/quickstart.sh --set model.preset=baseline     # the same without qk_norm_cap
A second start with the same folder only evaluates and exports; to train afresh: rm -r $run
EOF
