#!/usr/bin/env bash
# Everything that is measured on one GPU, by one command, built to end within ten minutes (never run
# on a GPU yet):
#     scripts/bench/gpu.sh [FOLDER]          results, in scripts/bench/results by default
#     MINUTES=30 scripts/bench/gpu.sh        with time for every row of the training step
#     scripts/bench/gpu.sh --dry [FOLDER]    a rehearsal on tiny shapes, without a GPU too
# Correctness comes first: the kernels' tests on the GPU, and errors in bf16 against float64. Then
# attention, head and loss, and the training step, each of them on disk before the next begins. What
# fails does not stop the rest; the exit code says so. PYTHON chooses an interpreter; it needs torch,
# triton, transformers and rich, and has its use for pytest and matplotlib.
set -euo pipefail

dry=()
patience=1 # what time limits are multiplied by
if [ "${1:-}" = --dry ]; then
    dry=(--dry)
    patience=4 # a rehearsal measures nothing, and its machine may be slow or busy
    shift
fi
folder=
if [ $# -gt 0 ]; then folder=$(realpath -m "$1"); fi
cd "$(dirname "$0")/../.."
if [ -z "$folder" ]; then
    folder=$PWD/scripts/bench/results
    # A rehearsal's numbers have no place among results.
    if [ ${#dry[@]} -gt 0 ]; then folder=$(mktemp -d); fi
fi
mkdir -p "$folder/errors"
python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then python=python3; fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export COLUMNS=${COLUMNS:-150}
limit=$((patience * (60 * ${MINUTES:-10} - 75)))
failed=()

# begin NAME SECONDS COMMAND...: in the background, stopped after SECONDS, output kept.
declare -A process
begin() {
    timeout --kill-after=5 $(($2 * patience)) "${@:3}" >"$folder/$1.log" 2>&1 &
    process[$1]=$!
}

# end NAME: wait for it, show its output, remember whether it failed.
end() {
    local code=0
    wait "${process[$1]}" || code=$?
    printf '\n== %s (%s s of %s)\n' "$1" "$SECONDS" "$limit"
    cat "$folder/$1.log"
    if [ $code -ne 0 ]; then
        failed+=("$1")
        printf '== %s failed: exit code %s (124: out of time)\n' "$1" "$code"
    fi
}

# bench NAME SECONDS: the last half minute is for finishing what was begun.
bench() {
    begin "$1" "$2" "$python" "scripts/bench/$1.py" "${dry[@]}" \
        --output "$folder" --seconds $(($2 * patience - 30))
    end "$1"
}

printf 'results go to %s\n' "$folder"
nvidia-smi 2>/dev/null || echo 'no nvidia-smi here'

# Errors need no quiet machine, so all at once; this fills the compilers' caches too.
checks=()
if "$python" -c 'import pytest' 2>/dev/null; then
    tests=(-m pytest -m 'not slow' tests/kernels) # on the GPU where there is one
    if [ ${#dry[@]} -gt 0 ]; then
        tests+=(--collect-only)
    elif "$python" -c 'import xdist' 2>/dev/null; then
        tests+=(-n 10)
    fi
    begin tests 150 "$python" "${tests[@]}"
    checks+=(tests)
else
    echo 'pytest is not installed: the kernels are only checked by the benchmarks themselves'
fi
for name in attention linear_cross_entropy train_step; do
    begin "errors/$name" 150 "$python" "scripts/bench/$name.py" --check "${dry[@]}" \
        --output "$folder/errors"
    checks+=("errors/$name")
done
for name in "${checks[@]}"; do end "$name"; done

bench attention 170
bench linear_cross_entropy 120
left=$(((limit - SECONDS) / patience))
bench train_step $((left > 90 ? left : 90))
begin goals 60 "$python" scripts/bench/report.py "$folder"
end goals

printf '\n%s s; results in %s\n' "$SECONDS" "$folder"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'failed: %s\n' "${failed[*]}"
    exit 1
fi
