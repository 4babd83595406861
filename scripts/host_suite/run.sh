#!/usr/bin/env bash
# Transformers' own model tests, of the version that is installed, on StableGPT. They come with its
# source package, so that this needs the package registry; CI has tests/host/ instead.
#     scripts/host_suite/run.sh [baseline,qkv_norm,...] [pytest options]
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd) root=$(cd "$(dirname "$0")/../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
export PRESETS=${1:-baseline,qk_norm_cap,qkv_norm,qk_fc_norm,sigma_reparam,soft_clip}
shift || true
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

version=$("$python" -c 'import transformers; print(transformers.__version__)')
"$python" -m pip download -q --no-deps --no-build-isolation --no-binary :all: -d "$scratch" \
    "transformers==$version"
"$python" -m pip install -q --no-deps --target "$scratch/extra" parameterized
tar xzf "$scratch"/transformers-*.tar.gz -C "$scratch" --strip-components=1 --wildcards '*/tests/*'

# The package leaves these out. The mixins of generation and export are replaced by tests/host/.
cd "$scratch/tests"
mkdir exporters generation utils
touch __init__.py {exporters,generation,utils}/__init__.py
echo 'class ExportTesterMixin: ...' >exporters/test_export.py
echo 'class GenerationTesterMixin: ...' >generation/test_utils.py
echo 'config_common_kwargs = {}' >utils/test_configuration_utils.py
cp "$here"/{distributed_testing_utils,test_stable_gpt}.py .

cd "$scratch"
export PYTHONPATH=$root:$scratch/extra HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1
"$python" -m pytest -q -n0 -p no:cacheprovider -W ignore tests/test_stable_gpt.py "$@"
