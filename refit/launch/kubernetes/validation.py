"""Holds a manifest against the types of Kubernetes' API, as their Python packages have them.

The packages' own ways of reading a manifest drop fields that they do not know, or refuse a quantity that is valid. So
this walks a manifest beside the types: every key has to be a field of its type, at any depth.
"""

from __future__ import annotations

import datetime
import importlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from refit.errors import UsageError
from refit.launch.kubernetes.kinds import KINDS, Kind
from refit.launch.kubernetes.rules import check_quantity

INSTALL = "pip install 'refit-benchmark[kubernetes]'"

CORE = "kubernetes.client.models"
TYPES = {
    "ConfigMap": (CORE, "V1ConfigMap"),
    "Service": (CORE, "V1Service"),
    "Job": (CORE, "V1Job"),
    "TrainJob": ("kubeflow_trainer_api.models", "TrainerV1alpha1TrainJob"),
    "JobSet": ("kubeflow_trainer_api.models", "JobsetV1alpha2JobSet"),
}
"""Where the type of each kind is."""

POD_TEMPLATE = (CORE, "V1PodTemplateSpec")
REPLICA = {"replicas": int, "restartPolicy": str, "template": POD_TEMPLATE}
PYTORCH_JOB: dict[str, Any] = {
    "apiVersion": str,
    "kind": str,
    "metadata": (CORE, "V1ObjectMeta"),
    "spec": {
        "nprocPerNode": str,
        "runPolicy": {"backoffLimit": int, "cleanPodPolicy": str},
        "pytorchReplicaSpecs": {"Master": REPLICA, "Worker": REPLICA},
    },
}
"""What this suite writes of a PyTorchJob. Its package needs another client: tests/kubeflow_training.sh compares."""

ONE_OF = {
    "restartPolicy": ("Never", "OnFailure", "Always"),
    "imagePullPolicy": ("Always", "IfNotPresent", "Never"),
    "completionMode": ("Indexed", "NonIndexed"),
    "cleanPodPolicy": ("None", "Running", "All"),
    "dnsPolicy": ("ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"),
    "medium": ("", "Memory"),
    "effect": ("NoSchedule", "PreferNoSchedule", "NoExecute"),
    "operator": ("Exists", "Equal"),
}
"""Fields that the types have as any text, and their values."""


def check_installed(kind: Kind) -> None:
    """Raise UsageError where the client, or the package with the types of `kind`, is not installed."""
    for module in dict.fromkeys(["kubernetes", kind.needs]):
        try:
            importlib.import_module(module)
        except ImportError:
            raise UsageError(f"kind {kind.name} needs the package {module}, which is missing: {INSTALL}") from None
    if kind.name in TYPES:
        _type(*TYPES[kind.name])


def validate(manifests: list[dict[str, Any]]) -> None:
    """Raise UsageError, with the place, for a key that its type does not have, one that is missing or a wrong value."""
    for manifest in manifests:
        name = str(manifest.get("kind"))
        if name == "PyTorchJob":
            _walk(manifest, PYTORCH_JOB, name)
        elif name in TYPES:
            _walk(manifest, _type(*TYPES[name]), name)
        else:
            raise UsageError(f"kind {name!r} is not known: {', '.join((*TYPES, 'PyTorchJob'))} are")
        wanted = KINDS[name].api_version if name in KINDS else "v1"
        if manifest.get("apiVersion") != wanted:
            raise UsageError(f"{name}.apiVersion must be {wanted}, not {manifest.get('apiVersion')!r}")


def _type(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        raise UsageError(f"the installed {module.partition('.')[0]} has no {name}: {INSTALL}") from None


def _walk(content: Any, kind: Any, place: str) -> None:
    """Check `content` against a type: a model, a generic of Python, or what stands in PYTORCH_JOB."""
    if isinstance(kind, tuple):
        kind = _type(*kind)
    if isinstance(kind, Mapping):
        _keys(content, kind, (), place)
        return
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        _walk(content, arguments[0], place)
    elif origin in (typing.Union, types.UnionType):
        kinds = [each for each in arguments if each is not type(None)]
        if content is None:
            raise UsageError(f"{place} is null: give a value, or leave it out")
        _any_of(content, kinds, place)
    elif origin is list:
        if not isinstance(content, list):
            raise UsageError(f"{place} must be a list, not {content!r}")
        if not content and place.endswith(".containers"):
            raise UsageError(f"{place} is empty: a pod has at least one")
        for number, each in enumerate(content):
            _walk(each, arguments[0], f"{place}[{number}]")
    elif origin is dict:
        _mapping(content, place)
        for key, each in content.items():
            _walk(each, arguments[1], f"{place}[{key}]")
    elif hasattr(kind, "model_fields"):
        _model(content, kind, place)
    else:
        _plain(content, kind, place)


def _any_of(content: Any, kinds: list[Any], place: str) -> None:
    errors = []
    for kind in kinds:
        try:
            return _walk(content, kind, place)
        except UsageError as error:
            errors.append(error)
    raise errors[0]


def _model(content: Any, kind: Any, place: str) -> None:
    if kind.__name__.endswith("Quantity"):
        if not isinstance(content, str):
            raise UsageError(f"{place} must be a quantity in quotes, not {content!r}")
        return check_quantity(content, place)
    if set(kind.model_fields) >= {"actual_instance", "one_of_schemas"}:  # a number or a name, such as a port
        return _plain(content, str if isinstance(content, str) else int, place)
    fields = {}
    required = []
    for name, field in kind.model_fields.items():
        key = field.alias or field.serialization_alias or name
        fields[key] = field.annotation
        if field.is_required():
            required.append(key)
    return _keys(content, fields, required, place)


def _keys(content: Any, fields: Mapping[str, Any], required: typing.Iterable[str], place: str) -> None:
    _mapping(content, place)
    for key, each in content.items():
        if key not in fields:
            raise UsageError(f"{place} has no field {key!r}: {', '.join(sorted(fields))} are known")
        if key in ONE_OF and isinstance(each, str) and each not in ONE_OF[key]:
            raise UsageError(f"{place}.{key} must be {' or '.join(ONE_OF[key])}, not {each!r}")
        _walk(each, fields[key], f"{place}.{key}")
    for key in required:
        if key not in content:
            raise UsageError(f"{place}.{key} is missing")


def _mapping(content: Any, place: str) -> None:
    if not isinstance(content, dict):
        raise UsageError(f"{place} must hold keys and values, not {content!r}")
    for key in content:
        if not isinstance(key, str):
            raise UsageError(f"{place}: key {key!r} is no text")


def _plain(content: Any, kind: Any, place: str) -> None:
    if kind in (Any, object):
        return
    wanted: Any = {datetime.datetime: str, float: (int, float)}.get(kind, kind)
    if not isinstance(content, wanted) or (isinstance(content, bool) and wanted is not bool):
        raise UsageError(f"{place} must be {getattr(kind, '__name__', kind)}, not {content!r}")
    if ".resources" in place and isinstance(content, str) and place.endswith("]"):
        check_quantity(content, place)
