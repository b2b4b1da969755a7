"""PyTorchJobs beside kubeflow-training's own types; tests/kubeflow_training.sh runs it with the client that these need.

These types say by `attribute_map` which key each attribute has in a manifest, and by `openapi_types` its type.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
from kubeflow.training import models as training
from kubernetes.client import models as core

from refit.launch.kubernetes.validation import POD_TEMPLATE, PYTORCH_JOB
from tests.launch.kubernetes.test_manifests import CASES, at, places, rendered

PLAIN = {"str", "int", "bool", "float", "object", "datetime"}


def unknown(content: Any, kind: str, place: str) -> list[str]:
    """The places of `content` whose keys its type does not have, or whose value is of another type."""
    if listed := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(content, list):
            return [place]
        return [each for n, item in enumerate(content) for each in unknown(item, listed[1], f"{place}[{n}]")]
    if mapping := re.fullmatch(r"dict\(str, (.*)\)|dict\[str, (.*)\]", kind):
        inner = mapping[1] or mapping[2]
        return [each for key, item in content.items() for each in unknown(item, inner, f"{place}.{key}")]
    if kind in PLAIN:
        wanted = {"str": str, "int": int, "bool": bool}.get(kind, object)
        return [] if isinstance(content, wanted) else [place]
    model = getattr(training, kind, None) or getattr(core, kind)
    if not isinstance(content, dict):
        return [place]
    types = {model.attribute_map[name]: type_ for name, type_ in model.openapi_types.items()}
    found = [f"{place}.{key}" for key in content if key not in types]
    return found + [
        each for key, item in content.items() if key in types for each in unknown(item, types[key], f"{place}.{key}")
    ]


def problems(manifest: dict[str, Any]) -> list[str]:
    return unknown(manifest, "KubeflowOrgV1PyTorchJob", "PyTorchJob")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("nodes", [1, 2, 32])
def test_every_field_is_one_of_the_types(case: str, nodes: int) -> None:
    assert problems(rendered("PyTorchJob", case, nodes)[-1]) == []


@pytest.mark.parametrize("case", ["full", "kai"])
def test_a_typo_at_any_depth_is_found(case: str) -> None:
    manifest = rendered("PyTorchJob", case)[-1]
    for path in places(manifest):
        if path and path[-1] == "pytorchReplicaSpecs":  # names of replicas, which the types have as any text
            continue
        for key in list(at(manifest, path)):
            planted = copy.deepcopy(manifest)
            mapping = at(planted, path)
            mapping[f"{key}s"] = mapping.pop(key)
            assert problems(planted), (path, key)


def test_what_this_suite_knows_of_a_pytorch_job_are_its_fields() -> None:
    """The table that stands in for these types where they cannot be installed."""

    def compare(known: dict[str, Any], kind: Any) -> None:
        types = {kind.attribute_map[name]: type_ for name, type_ in kind.openapi_types.items()}
        for key, inner in known.items():
            assert key in types, (kind, key)
            if key == "pytorchReplicaSpecs":
                assert set(inner) == {"Master", "Worker"}
                for replica in inner.values():
                    compare(replica, training.KubeflowOrgV1ReplicaSpec)
            elif isinstance(inner, dict):
                compare(inner, getattr(training, types[key]))
            elif isinstance(inner, tuple):
                assert inner[1].removeprefix("V1") in types[key]
            else:
                assert types[key] == {str: "str", int: "int"}[inner]

    compare(PYTORCH_JOB, training.KubeflowOrgV1PyTorchJob)
    assert POD_TEMPLATE[1] == "V1PodTemplateSpec"
