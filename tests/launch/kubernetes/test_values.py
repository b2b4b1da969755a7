"""A site's settings: what is read, and that what Kubernetes would refuse is refused with its rule, in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from refit.errors import UsageError
from refit.launch.kubernetes.values import Gate, Mount, Toleration, load_values

LEAST = "image: registry/refit:1\nresults: {claim: fsx, mount_path: /results}\n"


def load(tmp_path: Path, text: str) -> object:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    return load_values(path)


def test_values_are_typed(tmp_path: Path) -> None:
    values = load(
        tmp_path,
        LEAST
        + "gpus_per_node: 4\nresources: {vpc.amazonaws.com/efa: 16, cpu: 1.5}\nenv: {FI_PROVIDER: efa, N: 1}\n"
        + "tolerations: [{key: nvidia.com/gpu, effect: NoSchedule}]\ngpu_resource: null\n"
        + "gates: [{name: efa, pattern: 'provider is efa'}]\n"
        + "volumes: [{claim: models, mount_path: /m, read_only: true}]\n",
    )
    assert values.gpus_per_node == 4  # type: ignore[attr-defined]
    assert values.per_node == {"vpc.amazonaws.com/efa": "16", "cpu": "1.5"}  # type: ignore[attr-defined]
    assert values.env == {"FI_PROVIDER": "efa", "N": "1"}  # type: ignore[attr-defined]
    assert values.tolerations == (Toleration("nvidia.com/gpu", None, "NoSchedule"),)  # type: ignore[attr-defined]
    assert values.gates == (Gate("efa", "provider is efa"),)  # type: ignore[attr-defined]
    assert values.volumes == (Mount("models", "/m", read_only=True),)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("results: {claim: fsx, mount_path: /results}\n", "image is missing: give the image that has the suite"),
        ("image: a:1\n", "results is missing: give the volume that all pods share"),
        ("image: a:1\nresults: {mount_path: /results}\n", "results: claim is missing"),
        (LEAST + "imagge: b\n", "unknown key imagge: image, results"),
        (LEAST + "volumes: [{claim: a, mount_path: /a, readonly: true}]\n", r"volumes\[0\]: unknown key readonly"),
        ("image: a:latest\nresults: {claim: fsx, mount_path: /results}\n", "means another one tomorrow"),
        (LEAST + "gpus_per_node: '8'\n", "gpus_per_node must be a whole number, not '8'"),
        (LEAST + "gpus_per_node: 0\n", "gpus_per_node must be from 1 to"),
        (LEAST + "gpus_per_node: true\n", "gpus_per_node must be a whole number"),
        (LEAST + "host_network: 1\n", "host_network must be true or false, not 1"),
        (LEAST + "namespace: Bench\n", "namespace 'Bench' is no DNS label: use at most 63 small letters"),
        (LEAST + "shm: 64 GB\n", "shm '64 GB' is no quantity"),
        (LEAST + "resources: {cpu: many}\n", "resources: cpu 'many' is no quantity"),
        (LEAST + "resources: {nvidia.com/gpu: 8}\n", "nvidia.com/gpu is counted by gpus_per_node"),
        (LEAST + "resources: {Not_A_Domain!/gpu: 8}\n", "is no key: use NAME or DOMAIN/NAME"),
        (LEAST + "env: {PET_NNODES: 2}\n", "PET_NNODES cannot be set"),
        (LEAST + "env: {RANK: 0}\n", "RANK cannot be set"),
        (LEAST + "env: {a b: c}\n", "'a b' is no variable"),
        (LEAST + "env: {DEBUG: on}\n", "DEBUG must be text, not True: put it in quotes"),
        (LEAST + "node_selector: {zone: 'a b'}\n", "'a b' is no value of a label"),
        (LEAST + "tolerations: [{value: a}]\n", "has a value and no key"),
        (
            LEAST + "tolerations: [{key: a, effect: Never}]\n",
            "effect must be NoSchedule or PreferNoSchedule or NoExecute",
        ),
        (LEAST + "kueue_queue: a\nkai_queue: b\n", "are two schedulers for one gang"),
        (LEAST + "volumes: [{claim: a, mount_path: /results}]\n", "/results is taken by results"),
        (LEAST + "volumes: [{claim: a, mount_path: /dev/shm}]\n", "/dev/shm is taken by shm"),
        (LEAST + "volumes: [{claim: a, mount_path: data}]\n", "'data' is no place for a volume"),
        ("image: a:1\nresults: {claim: a, mount_path: /a, read_only: true}\n", "takes the results"),
        ("image: a:1\nresults: {claim: a, mount_path: /a, sub_path: ../b}\n", "leads out of the volume"),
        (LEAST + "gates: [{name: a, pattern: '('}]\n", "is no regular expression"),
        (LEAST + "rendezvous: etcd\n", "rendezvous must be static or c10d, not 'etcd'"),
        (LEAST + "port: 70000\n", "port must be from 1 to 65535"),
        (LEAST + "pending_timeout_s: -1\n", "pending_timeout_s cannot be negative"),
        (LEAST + "capabilities: [ipc-lock]\n", "write it as IPC_LOCK"),
        ("- a\n", "must hold `key: value` lines"),
    ],
)
def test_what_kubernetes_would_refuse(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(tmp_path, text)
    assert "\n" not in str(caught.value)
