"""What a site gives for its cluster: `--values FILE`, read into typed values and checked by Kubernetes' rules."""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from refit.config import yaml_files
from refit.config.limits import MAX_COUNT
from refit.errors import UsageError
from refit.launch.kubernetes import rules

T = TypeVar("T")

FILES_PATH = "/mnt/refit"
"""Where a scenario's files are in a pod."""


@dataclass(frozen=True, slots=True)
class Mount:
    """A volume of a PersistentVolumeClaim, and where it is in every pod."""

    claim: str
    mount_path: str
    sub_path: str | None = None
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class Toleration:
    """A taint that pods bear; without `value` any value of `key`."""

    key: str | None = None
    value: str | None = None
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """A run counts only where each rank has printed a line that `pattern`, a regular expression, finds."""

    name: str
    pattern: str


@dataclass(frozen=True, slots=True)
class Values:
    """A site's settings; docs/kubernetes.md has a table of them.

    A pod takes a whole node: `gpus_per_node` of `gpu_resource` (None: none, ranks are on CPUs) and `resources`,
    requested and limited alike. `results` is a volume that all pods share. `pending_timeout_s` is how long the pods of
    a scenario may wait for nodes before the run is cut short; 0: for ever.
    """

    image: str
    results: Mount
    gpus_per_node: int = 8
    gpu_resource: str | None = "nvidia.com/gpu"
    namespace: str = "default"
    context: str | None = None
    python: str = "python3"
    volumes: tuple[Mount, ...] = ()
    shm: str = "64Gi"
    resources: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    host_network: bool = False
    capabilities: tuple[str, ...] = ()
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: tuple[Toleration, ...] = ()
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: tuple[str, ...] = ()
    service_account: str | None = None
    kueue_queue: str | None = None
    kai_queue: str | None = None
    rendezvous: Literal["static", "c10d"] = "static"
    port: int = 29500
    runtime: str = "torch-distributed"
    gates: tuple[Gate, ...] = ()
    pending_timeout_s: int = 3600

    @property
    def per_node(self) -> dict[str, str]:
        """Everything that a pod asks of its node, as quantities."""
        gpus = {self.gpu_resource: str(self.gpus_per_node)} if self.gpu_resource else {}
        return {**gpus, **self.resources}


REQUIRED = {
    "image": "the image that has the suite, as registry/refit:1",
    "results": "the volume that all pods share, as {claim: NAME, mount_path: /results}",
}


def load_values(path: Path) -> Values:
    """The values in a YAML file.

    Raises UsageError, naming the file and the key, for an unknown key, one that is missing, a value of another type, or
    one that Kubernetes would refuse.
    """
    content = yaml_files.read_mapping(path)
    for key, what in REQUIRED.items():
        if content.get(key) in (None, ""):
            raise UsageError(f"{path}: {key} is missing: give {what}")
    try:
        values = _typed(content, Values, "")
        check(values)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    return values


def check(values: Values) -> None:
    """Raise UsageError for a value that Kubernetes would refuse, with its rule."""
    if not re.fullmatch(r"[A-Za-z0-9._:/@-]{1,512}", values.image):
        raise UsageError(f"image {values.image[:80]!r} is no reference of an image: give REGISTRY/NAME:TAG")
    if values.image.endswith(":latest"):
        raise UsageError(f"image {values.image!r} means another one tomorrow: give a tag of its own, or a digest")
    rules.check_label(values.namespace, "namespace")
    for name, number, most in (("gpus_per_node", values.gpus_per_node, MAX_COUNT), ("port", values.port, 65535)):
        if not 1 <= number <= most:
            raise UsageError(f"{name} must be from 1 to {most}, not {number}")
    if values.pending_timeout_s < 0:
        raise UsageError(f"pending_timeout_s cannot be negative, it is {values.pending_timeout_s}")
    rules.check_quantity(values.shm, "shm")
    if values.gpu_resource is not None:
        rules.check_key(values.gpu_resource, "gpu_resource")
    for key, quantity in values.resources.items():
        rules.check_key(key, "resources:")
        rules.check_quantity(quantity, f"resources: {key}")
        if key == values.gpu_resource:
            raise UsageError(f"resources: {key} is counted by gpus_per_node: leave it out")
    for key, value in values.env.items():
        rules.check_variable(key, value, "env:")
    for key, value in values.node_selector.items():
        rules.check_key(key, "node_selector:")
        rules.check_label_value(value, f"node_selector: {key}")
    for number, toleration in enumerate(values.tolerations):
        if toleration.key is not None:
            rules.check_key(toleration.key, f"tolerations[{number}]: key")
        elif toleration.value is not None:
            raise UsageError(f"tolerations[{number}] has a value and no key: give both, or neither for every taint")
    named: dict[str, str | None] = {"service_account": values.service_account, "runtime": values.runtime}
    named |= {f"image_pull_secrets[{number}]": name for number, name in enumerate(values.image_pull_secrets)}
    for where, given in named.items():
        if given is not None:
            rules.check_subdomain(given, where)
    for where, queue in (("kueue_queue", values.kueue_queue), ("kai_queue", values.kai_queue)):
        if queue is not None:
            rules.check_label_value(queue, where)
    if values.kueue_queue and values.kai_queue:
        raise UsageError("kueue_queue and kai_queue are two schedulers for one gang: give one of them")
    for capability in values.capabilities:
        if not re.fullmatch("[A-Z_]+", capability):
            raise UsageError(f"capabilities: {capability[:80]!r} is none: write it as IPC_LOCK")
    _check_mounts(values)
    _check_gates(values)


def _check_mounts(values: Values) -> None:
    taken = {"/dev/shm": "shm", FILES_PATH: "the scenario's files"}
    mounts = {"results": values.results, **{f"volumes[{n}]": mount for n, mount in enumerate(values.volumes)}}
    for where, mount in mounts.items():
        rules.check_subdomain(mount.claim, f"{where}: claim")
        rules.check_path(mount.mount_path, f"{where}: mount_path")
        if mount.mount_path in taken:
            raise UsageError(f"{where}: {mount.mount_path} is taken by {taken[mount.mount_path]}: mount it elsewhere")
        taken[mount.mount_path] = where
        if mount.sub_path is not None and (mount.sub_path.startswith("/") or ".." in mount.sub_path.split("/")):
            raise UsageError(f"{where}: sub_path {mount.sub_path!r} leads out of the volume: give a relative path")
    if values.results.read_only:
        raise UsageError("results: the volume takes the results: leave read_only out")


def _check_gates(values: Values) -> None:
    for number, gate in enumerate(values.gates):
        try:
            re.compile(gate.pattern)
        except re.error as error:
            raise UsageError(f"gates[{number}]: pattern {gate.pattern!r} is no regular expression: {error}") from None


def _typed(content: Any, kind: type[T], where: str) -> T:
    """`content` as a dataclass. Raises UsageError for an unknown key, a missing one and another type."""
    if not isinstance(content, dict):
        raise UsageError(f"{where or 'the file'} must hold `key: value` lines, not {yaml_files.shortened(content)}")
    at = f"{where}: " if where else ""
    fields = {each.name: each for each in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(content.keys() - fields.keys()):
        raise UsageError(f"{at}unknown key {yaml_files.shortened(unknown[0])[1:-1]}: {', '.join(fields)} are known")
    hints = typing.get_type_hints(kind)
    found = {key: _value(value, hints[key], f"{at}{key}") for key, value in content.items()}
    for name, each in fields.items():
        no_default = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if no_default and found.get(name) in (None, ""):
            raise UsageError(f"{at}{name} is missing: {', '.join(fields)} are known")
    return kind(**found)


def _value(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        (hint,) = (each for each in arguments if each is not type(None))
        return _value(value, hint, where)
    if origin is Literal:
        if value not in arguments:
            raise UsageError(f"{where} must be {' or '.join(arguments)}, not {yaml_files.shortened(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where} must be a list, not {yaml_files.shortened(value)}")
        return tuple(_value(each, arguments[0], f"{where}[{number}]") for number, each in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{where} must hold `key: value` lines, not {yaml_files.shortened(value)}")
        return {key: _text(each, f"{where}: {key}") for key, each in value.items()}
    if dataclasses.is_dataclass(hint):
        return _typed(value, hint, where)  # type: ignore[arg-type]
    if hint is str:
        return _text(value, where)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        kinds = {int: "a whole number", bool: "true or false"}
        raise UsageError(f"{where} must be {kinds[hint]}, not {yaml_files.shortened(value)}")
    return value


def _text(value: Any, where: str) -> str:
    """Text; a number as it is written. `true` is refused, since YAML also reads it from `on` and `yes`."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{where} must be text, not {yaml_files.shortened(value)}: put it in quotes")
    return str(value)
