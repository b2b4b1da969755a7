#!/usr/bin/env bash
# kubeflow-trainer-api 2.3.0: neither way to read a TrainJob tells a right manifest from a misspelt one.
#
# Seen with a TrainJob of two nodes with eight GPUs each:
#   from_dict, `numNodes` misspelt as `numNode`: no error, and the object has no number of nodes, so that its runtime's
#       own holds
#   from_dict, `nvidia.com/gpu` under `limit` in place of `limits`: no error, and the object asks for no GPU
#   model_validate, both right: refused, "Input should be a valid dictionary or instance of
#       IoK8sApimachineryPkgApiResourceQuantity", although Kubernetes' quantities are strings
# What reads a manifest by these types and compares nothing else submits another job than the one that was written. The
# keys of what was read have to be compared with those that were written.
#
# Fails (exit code 1) once a misspelt field is refused or kept, or a valid quantity is taken.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet kubeflow-trainer-api==2.3.0
cat >"$folder/look.py" <<'PYTHON'
import copy
import sys

from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob as TrainJob
from pydantic import ValidationError

right = {
    "apiVersion": "trainer.kubeflow.org/v1alpha1",
    "kind": "TrainJob",
    "metadata": {"name": "refit"},
    "spec": {
        "runtimeRef": {"name": "torch"},
        "trainer": {"numNodes": 2, "resourcesPerNode": {"limits": {"nvidia.com/gpu": "8"}}},
    },
}
misspelt = copy.deepcopy(right)
trainer = misspelt["spec"]["trainer"]
trainer["numNode"] = trainer.pop("numNodes")
trainer["resourcesPerNode"]["limit"] = trainer["resourcesPerNode"].pop("limits")

kept = TrainJob.from_dict(copy.deepcopy(right)).to_dict()["spec"]["trainer"]
left = TrainJob.from_dict(misspelt).to_dict()["spec"]["trainer"]
try:
    TrainJob.model_validate(right)
    refused = False
except ValidationError as error:
    refused = "IoK8sApimachineryPkgApiResourceQuantity" in str(error)
print("from_dict, right:", kept)
print("from_dict, misspelt:", left)
print("model_validate refuses the right one:", refused)
sys.exit((kept, left, refused) != (right["spec"]["trainer"], {"resourcesPerNode": {}}, True))
PYTHON
if "$folder/venv/bin/python" "$folder/look.py"; then
    echo "As described: misspelt fields vanish, and the strict check refuses valid quantities."
else
    echo "Not as described: see above." >&2
    exit 1
fi
