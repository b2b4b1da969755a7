#!/usr/bin/env bash
# The manifests of a PyTorchJob beside the types of kubeflow-training, which needs an older client of Kubernetes than the
# environment has: both lie in a folder in front of it. `kubeflow_training.sh [PYTHON]`.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$python" -m pip install --quiet --target "$folder" --no-deps --requirement requirements/kubeflow_training.txt
PYTHONPATH="$folder:$PWD" "$python" -m pytest -p no:cacheprovider tests/launch/kubernetes/kubeflow_training.py
