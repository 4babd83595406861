#!/usr/bin/env bash
# Everything that must pass before a commit, on a CPU. Options go to pytest, the last one wins:
#     scripts/test.sh -m slow tests/model
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/bootstrap.sh test
unset PYTHONDONTWRITEBYTECODE # hundreds of processes would each compile the package
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

ruff check .
ruff format --check .
pyright
lint-imports --no-logo
python -m pytest -n 2 --dist worksteal -m "not slow and not gpu" "$@"
