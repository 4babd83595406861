#!/usr/bin/env bash
# The first fifteen minutes on a GPU (never run on one yet): tests, MFU, tiles, goals, in a bare
# environment, saved case by case; may be ended at any moment and started again.
#     scripts/gpu_first.sh [FOLDER]     --help says the rest
# PYTHON chooses an interpreter. WHEELS is a folder of wheels to use what is missing from, as
# `scripts/wheels.py download` fills it; they are unpacked beside it, not installed.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$here/.venv/bin/python}
if ! command -v "$python" >/dev/null; then python=python3; fi
if [ -n "${WHEELS:-}" ]; then
    WHEELS=$(realpath "$WHEELS")
    "$python" "$here/scripts/wheels.py" install "$WHEELS" "$WHEELS.site"
    export PYTHONPATH="$WHEELS.site${PYTHONPATH:+:$PYTHONPATH}"
fi
exec "$python" "$here/scripts/bench/first.py" "$@"
