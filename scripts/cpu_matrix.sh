#!/usr/bin/env bash
# Run tests as other CPUs would: with other instruction sets, and with MKL's own choice of the order
# of sums. One line per setting. Needs .venv, as scripts/test.sh makes it. Options go to pytest.
#     scripts/cpu_matrix.sh                   # all tests under each setting: hours
#     scripts/cpu_matrix.sh tests/model       # these tests
#     scripts/cpu_matrix.sh --short           # the laws on bits, which CI runs
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

settings=(
    "MKL_CBWR=" # set and empty is off, also for the tests' own default
    "ATEN_CPU_CAPABILITY=default"
    "ATEN_CPU_CAPABILITY=avx2"
    "MKL_ENABLE_INSTRUCTIONS=AVX2 MKL_CBWR="
    "ONEDNN_MAX_CPU_ISA=AVX2"
)
tests=("$@")
if [ "${1:-}" = --short ]; then
    tests=(tests/model/test_alignment.py tests/optim/test_qk_clip.py "${@:2}")
fi
logs=$(mktemp -d)
failed=0
for setting in "${settings[@]}"; do
    log=$logs/${setting// /+}.log
    verdict=ok
    env $setting python -m pytest -n 2 -m "not slow and not gpu" "${tests[@]}" >"$log" 2>&1 ||
        { verdict="FAILED (see $log)" failed=1; }
    printf '%-40s %s: %s\n' "$setting" "$verdict" "$(tail -n 1 "$log")"
done
[ $failed = 0 ] && rm -rf "$logs"
exit $failed
