#!/usr/bin/env bash
# The baseline at a low learning rate, at the edge and beyond it, with five seeds each: 15 runs of two
# minutes on a CPU core, two at a time; what is finished is not done again. Then the page.
#     scripts/instability/run.sh [FOLDER]      runs/instability unless given
set -euo pipefail
cd "$(dirname "$0")/../.."
runs=${1:-runs/instability}
scripts/bootstrap.sh test
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
mkdir -p "$runs"
[ -e runs/quickstart-text.jsonl ] || hf-stable sample-text --output runs/quickstart-text.jsonl

train() { # SEED RATE: nothing to do where it has finished
    hf-stable train recipes/demonstrations/instability.yaml --output "$runs/rate-$2-seed-$1" \
        --set "seed=$1" "optimizer.learning_rate=$2" >"$runs/rate-$2-seed-$1.log" 2>&1
    echo "done: $runs/rate-$2-seed-$1"
}
export -f train
export runs
# The first run alone: it makes the tokenizer and the token files that all share.
train 0 1e-1
for seed in 0 1 2 3 4; do
    for rate in 1e-1 2e-1 1e-2; do echo "$seed $rate"; done
done | tail -n +2 | xargs -P 2 -L 1 bash -c 'train "$0" "$1"'
python scripts/instability/report.py --runs "$runs" --output "$runs/report"
