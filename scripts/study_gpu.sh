#!/usr/bin/env bash
# Table 3 on one CUDA GPU, in pieces of ten minutes: start it again until nothing is left. Whatever is
# finished stays, and every piece ends with a report of all there is. Never run on a GPU yet.
#     scripts/study_gpu.sh                     WORKERS=4 runs at once, MINUTES=10 a piece
#     TEXT='[my/text.jsonl]' scripts/study_gpu.sh
#     WHEELS=FOLDER scripts/study_gpu.sh       takes packages that are missing from wheels in FOLDER
#     scripts/study_gpu.sh --dry               a rehearsal of all of it on tiny runs, without a GPU
# What is missing is named before anything starts; scripts/wheels.py fetches it elsewhere.
set -euo pipefail
if [ -n "${WHEELS:-}" ]; then WHEELS=$(realpath "$WHEELS"); fi
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then python=python3; fi
"$python" scripts/wheels.py check study ${WHEELS:+"$WHEELS"}
if [ -n "${WHEELS:-}" ]; then
    "$python" scripts/wheels.py install "$WHEELS" "$WHEELS.site"
    PYTHONPATH="$WHEELS.site${PYTHONPATH:+:$PYTHONPATH}"
fi
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
end=$((SECONDS + 60 * ${MINUTES:-10} - 45)) # the rest is for the report
output=${OUTPUT:-runs/sweeps}
settings=("data.train=${TEXT:-[runs/quickstart-text.jsonl]}")
if [ "${1:-}" = --dry ]; then
    output=$output/dry
    settings+=(model.hidden_size=64 model.num_attention_heads=2 model.num_hidden_layers=1
        data.sequence_length=32 tokenizer.vocab_size=512 training.steps=3 training.global_batch_size=4
        training.micro_batch_size=4 training.evaluate_blocks=4 training.precision=fp32)
fi
[ -n "${TEXT:-}" ] || [ -e runs/quickstart-text.jsonl ] ||
    "$python" -m hf_stable sample-text --output runs/quickstart-text.jsonl

studies=()
for plan in table3_gpu_10m table3_gpu_1024; do
    studies+=("$output/$plan")
    left=$((end - SECONDS))
    # INT, so that the workers are ended too; what they were at is begun anew the next time.
    if [ $left -gt 0 ]; then
        timeout --signal=INT --kill-after=20 "$left" "$python" -m hf_stable sweep \
            "recipes/sweeps/$plan.yaml" --workers "${WORKERS:-4}" --output "$output/$plan" \
            --set "${settings[@]}" || echo "$plan: not finished; start this again to go on"
    fi
done
begun=()
for study in "${studies[@]}"; do
    if [ -e "$study/plan.json" ]; then begun+=("$study"); fi
done
"$python" -m hf_stable report "${begun[@]}" --output "$output/report"
