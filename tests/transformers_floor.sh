#!/usr/bin/env bash
# The tests of sides with a transformers model, with release 5.17, which GPU machines have: its DeepSeek-V3 has routers
# in bfloat16, that of 5.24 in float32. It lies in front of the environment's own: `transformers_floor.sh [PYTHON]`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
# With what it needs in other versions than newer releases do; the environment has the rest.
"$python" -m pip install --quiet --target "$folder" --no-deps transformers==5.17.0 huggingface-hub==1.33.0 \
    httpx==0.28.1 httpcore==1.0.9 anyio==4.16.0 h11==0.16.0 certifi==2026.10.19.post1 idna==3.20
export PYTHONPATH="$folder:$PWD" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
"$python" -c "import transformers; print('transformers', transformers.__version__)" | grep -x 'transformers 5.17.0'
"$python" -m pytest --numprocesses 2 --dist loadgroup tests/predict/families tests/models/huggingface \
    tests/models/fsdp2 tests/models/autotp
