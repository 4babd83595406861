#!/usr/bin/env bash
# Run the tests of generation, caches, exports, Trainer and pipelines under several versions of
# Transformers, and print one line per version. Needs .venv, as scripts/test.sh makes it.
#     scripts/host_matrix.sh                   # oldest declared, pinned and newest released version
#     scripts/host_matrix.sh 5.19.0 5.22.2     # these
#     scripts/host_matrix.sh --short 5.17.0    # only the laws of tests/host/test_versions.py
#     scripts/host_matrix.sh --raise 5.25.0    # declare this version as supported if it passes
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
exec .venv/bin/python scripts/host_matrix.py "$@"
