#!/usr/bin/env bash
# Find Python 3.11 or newer and let scripts/bootstrap.py make .venv; $1: quickstart or test.
# PYTHON=/path/to/python3 chooses one.
set -euo pipefail
cd "$(dirname "$0")/.."

candidates=(python3 python3.14 python3.13 python3.12 python3.11)
if [ -n "${PYTHON:-}" ]; then candidates=("$PYTHON"); fi
found=
for python in "${candidates[@]}"; do
    # Being there is not enough: a version manager's shim may refuse to start.
    if "$python" -c '' 2>/dev/null; then
        found=${found:-$python}
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            exec "$python" scripts/bootstrap.py "$1"
        fi
    fi
done
if [ -z "$found" ]; then
    echo "error: ${candidates[0]} does not start; hf_stable needs Python 3.11 or newer" >&2
    exit 1
fi
exec "$found" scripts/bootstrap.py "$1" # says what is wrong with it
