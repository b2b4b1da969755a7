"""Manifests of one run, rendered from typed values: a ConfigMap with its files, a service where needed, and the job.

Pure: the same run and values give the same objects, and nothing is read or sent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from refit.errors import UsageError
from refit.launch.kubernetes import rules
from refit.launch.kubernetes.kinds import NODES, Kind
from refit.launch.kubernetes.values import FILES_PATH, Mount, Values

Manifest = dict[str, Any]

RUN_LABEL, JOB_LABEL = "refit-benchmark/run", "refit-benchmark/job"
SUBMISSION = "refit-benchmark/submission"
KUEUE_LABEL, KAI_LABEL = "kueue.x-k8s.io/queue-name", "kai.scheduler/queue"
KAI_SCHEDULER = "kai-scheduler"
KAI_MIN_MEMBER = "kai.scheduler/batch-min-member"
"""KAI takes a Job and a JobSet for pods that may start one by one, unless this says how many must start together."""

MANAGER = "refit-benchmark.io/launcher"
"""Whose patches of a runtime these are, in a TrainJob."""

FLAGS_FILE = "flags"
MAX_FILES_BYTES = 1 << 20
"""Most bytes of a ConfigMap."""

GRACE_S = 40
"""How long the ranks of a pod that is ended may take, as `refit.launch.host` gives any command."""


@dataclass(frozen=True, slots=True)
class PodRun:
    """One attempt at a scenario, as its pods run it.

    `name` is that of the job. `flags` are those of benchmark_refit.py, `files` the texts of files that they name, by
    their name in the ConfigMap. The result and the logs of ranks are `<folder>/<result>.*` on the shared volume.
    `submission` tells this attempt's objects from those of another submitter with the same names.
    """

    name: str
    run_id: str
    nodes: int
    ranks_per_node: int
    flags: tuple[str, ...]
    folder: str
    result: str
    submission: str = ""
    files: dict[str, str] = field(default_factory=dict)


def render(kind: Kind, values: Values, run: PodRun) -> list[Manifest]:
    """The objects of a run, in the order in which they are created; the last one is the job.

    Raises UsageError for a name that is too long, for files that are too large, and for what `kind` cannot do.
    """
    rules.check_job_name(run.name, kind.pod_suffix(run.nodes), kind.name)
    rules.check_label_value(run.run_id, "run id")
    config: Manifest = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": _metadata(values, run),
        "data": {FLAGS_FILE: "".join(f"{flag}\n" for flag in run.flags), **run.files},
    }
    if (size := sum(len(text.encode()) for text in config["data"].values())) > MAX_FILES_BYTES:
        raise UsageError(f"the scenario's files have {size:,} bytes, a ConfigMap takes {MAX_FILES_BYTES:,}: cut them")
    before = [config, _service(values, run)] if kind.name == "Job" else [config]
    return [*before, _JOBS[kind.name](kind, values, run)]


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as lines, and what stands twice twice."""

    def ignore_aliases(self, data: object) -> bool:
        return True


def _text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def as_yaml(manifests: list[Manifest]) -> str:
    """Manifests as one YAML stream, for `kubectl create -f -`. Texts that look like numbers are quoted."""
    return str(yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, width=1000, explicit_start=True))


def _metadata(values: Values, run: PodRun) -> Manifest:
    return {
        "name": run.name,
        "namespace": values.namespace,
        "labels": _labels(run),
        "annotations": {SUBMISSION: run.submission},
    }


def _labels(run: PodRun) -> dict[str, str]:
    return {"app.kubernetes.io/name": "refit-benchmark", RUN_LABEL: run.run_id, JOB_LABEL: run.name}


def _job_metadata(values: Values, run: PodRun, *, counts_pods: bool = False) -> Manifest:
    """Metadata of the job itself, which a gang scheduler reads."""
    found = _metadata(values, run)
    if values.kueue_queue:
        found["labels"][KUEUE_LABEL] = values.kueue_queue
    if values.kai_queue:
        found["labels"][KAI_LABEL] = values.kai_queue
        if counts_pods:
            found["annotations"][KAI_MIN_MEMBER] = str(run.nodes)
    return found


def _service(values: Values, run: PodRun) -> Manifest:
    """A headless service, so that pods are found by name, also before they are ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(values, run),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {JOB_LABEL: run.name},
            "ports": [{"name": "rendezvous", "port": values.port}],
        },
    }


def _job(kind: Kind, values: Values, run: PodRun) -> Manifest:
    spec = {**_indexed(run), "template": _template(kind, values, run, subdomain=run.name)}
    metadata = _job_metadata(values, run, counts_pods=True)
    return {"apiVersion": kind.api_version, "kind": kind.name, "metadata": metadata, "spec": spec}


def _indexed(run: PodRun) -> Manifest:
    """An Indexed Job: its controller gives each pod JOB_COMPLETION_INDEX. No pod is tried twice."""
    return {"completionMode": "Indexed", "completions": run.nodes, "parallelism": run.nodes, "backoffLimit": 0}


def _pytorch_job(kind: Kind, values: Values, run: PodRun) -> Manifest:
    replica = {"restartPolicy": "Never", "template": _template(kind, values, run)}
    replicas = {"Master": {"replicas": 1, **replica}}
    if run.nodes > 1:
        replicas["Worker"] = {"replicas": run.nodes - 1, **replica}
    return {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "metadata": _job_metadata(values, run),
        "spec": {
            "nprocPerNode": str(run.ranks_per_node),
            "runPolicy": {"backoffLimit": 0, "cleanPodPolicy": "None"},
            "pytorchReplicaSpecs": replicas,
        },
    }


def _job_set(kind: Kind, values: Values, run: PodRun) -> Manifest:
    job = {**_indexed(run), "template": _template(kind, values, run)}
    return {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "metadata": _job_metadata(values, run, counts_pods=True),
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": 0},
            "replicatedJobs": [{"name": NODES, "replicas": 1, "template": {"spec": job}}],
        },
    }


def _train_job(kind: Kind, values: Values, run: PodRun) -> Manifest:
    """A TrainJob takes its pods from a runtime; what may be patched there is less than a pod has."""
    refused = {"host_network": values.host_network, "kai_queue": values.kai_queue}
    for name, given in refused.items():
        if given:
            raise UsageError(
                f"{name} cannot be set in a TrainJob: set it in the runtime {values.runtime}, or take --kind Job"
            )
    container = _container(kind, values, run)
    patch: Manifest = {"name": NODES, "volumeMounts": container["volumeMounts"]}
    if "securityContext" in container:
        patch["securityContext"] = container["securityContext"]
    pod = {**_placement(values), "containers": [patch], "volumes": _volumes(values, run)}
    template = {"spec": {"template": {"metadata": {"labels": _labels(run)}, "spec": pod}}}
    return {
        "apiVersion": kind.api_version,
        "kind": kind.name,
        "metadata": _job_metadata(values, run),
        "spec": {
            "runtimeRef": {"name": values.runtime},
            "trainer": {
                "image": container["image"],
                "numNodes": run.nodes,
                "numProcPerNode": run.ranks_per_node,
                "command": container["command"],
                "args": container["args"],
                "env": container["env"],
                "resourcesPerNode": container["resources"],
            },
            "runtimePatches": [
                {
                    "manager": MANAGER,
                    "trainingRuntimeSpec": {
                        "template": {"spec": {"replicatedJobs": [{"name": NODES, "template": template}]}}
                    },
                }
            ],
        },
    }


_JOBS = {"Job": _job, "PyTorchJob": _pytorch_job, "TrainJob": _train_job, "JobSet": _job_set}


def _template(kind: Kind, values: Values, run: PodRun, subdomain: str | None = None) -> Manifest:
    labels = _labels(run)
    if values.kai_queue:
        labels[KAI_LABEL] = values.kai_queue
    spec: Manifest = {"restartPolicy": "Never", **_placement(values)}
    if subdomain is not None:
        spec["subdomain"] = subdomain
    if values.host_network:
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}
    if values.kai_queue:
        spec["schedulerName"] = KAI_SCHEDULER
    spec |= {"containers": [_container(kind, values, run)], "volumes": _volumes(values, run)}
    return {"metadata": {"labels": labels}, "spec": spec}


def _placement(values: Values) -> Manifest:
    """Where pods run, and as whom."""
    found: Manifest = {"terminationGracePeriodSeconds": GRACE_S + 20}
    if values.node_selector:
        found["nodeSelector"] = dict(values.node_selector)
    if values.tolerations:
        found["tolerations"] = [
            {"operator": "Exists" if each.value is None else "Equal"}
            | {key: text for key in ("key", "value", "effect") if (text := getattr(each, key)) is not None}
            for each in values.tolerations
        ]
    if values.service_account:
        found["serviceAccountName"] = values.service_account
    if values.image_pull_secrets:
        found["imagePullSecrets"] = [{"name": name} for name in values.image_pull_secrets]
    return found


def _container(kind: Kind, values: Values, run: PodRun) -> Manifest:
    """The one container of each pod. PyTorchJob's operator looks for it under a name of its own."""
    quantities = values.per_node
    found: Manifest = {
        "name": "pytorch" if kind.name == "PyTorchJob" else NODES,
        "image": values.image,
        "imagePullPolicy": values.image_pull_policy,
        "command": [values.python, "-m", "refit.launch.kubernetes.pod"],
        "args": pod_arguments(kind, values, run),
        "env": [
            *({"name": name, "value": value} for name, value in values.env.items()),
            {"name": "REFIT_POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        ],
        "resources": {"requests": dict(quantities), "limits": dict(quantities)},
    }
    if values.capabilities:
        found["securityContext"] = {"capabilities": {"add": list(values.capabilities)}}
    mounts = (values.results, *values.volumes)
    found["volumeMounts"] = [
        {"name": "shm", "mountPath": "/dev/shm"},
        {"name": "files", "mountPath": FILES_PATH, "readOnly": True},
        *(_volume_mount(mount, number) for number, mount in enumerate(mounts)),
    ]
    return found


def pod_arguments(kind: Kind, values: Values, run: PodRun) -> list[str]:
    """The arguments of `refit.launch.kubernetes.pod`; `$(NAME)` is a variable that the operator sets."""
    return [
        f"--nodes={run.nodes}",
        f"--ranks-per-node={run.ranks_per_node}",
        f"--node={kind.node}",
        f"--master={kind.master.format(name=run.name)}",
        f"--port={kind.port or values.port}",
        f"--rendezvous={values.rendezvous}",
        "--address=$(REFIT_POD_IP)",
        f"--id={run.name}",
        f"--folder={run.folder}",
        f"--result={run.result}",
        f"--flags={FILES_PATH}/{FLAGS_FILE}",
    ]


def _volume_mount(mount: Mount, number: int) -> Manifest:
    found: Manifest = {"name": f"volume{number}", "mountPath": mount.mount_path}
    if mount.sub_path is not None:
        found["subPath"] = mount.sub_path
    if mount.read_only:
        found["readOnly"] = True
    return found


def _volumes(values: Values, run: PodRun) -> list[Manifest]:
    mounts = (values.results, *values.volumes)
    return [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": values.shm}},
        {"name": "files", "configMap": {"name": run.name}},
        *(
            {"name": f"volume{number}", "persistentVolumeClaim": {"claimName": mount.claim}}
            for number, mount in enumerate(mounts)
        ),
    ]
