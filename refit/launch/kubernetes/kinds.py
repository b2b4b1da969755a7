"""The kinds of a job: what its operator sets in each pod, how it calls its pods, and how it says that it has ended."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from refit.errors import UsageError

INDEX_LABEL = "batch.kubernetes.io/job-completion-index"
REPLICA_TYPE, REPLICA_INDEX = "training.kubeflow.org/replica-type", "training.kubeflow.org/replica-index"

NODES = "node"
"""The replicated job of a JobSet. In a runtime of Kubeflow's trainer it is the one that trains."""


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of job.

    `node`, `master` and `port` are arguments of the pod's command, which Kubernetes fills in from the variables that
    the operator sets (`$(NAME)`); `master` may hold the job's name as `{name}`. `pod_suffix` is the end of the longest
    pod or service name, for a number of nodes. `pods` selects the pods of a job by label. `needs` is the Python module
    whose types know the kind, `complete` and `failed` are the types of its conditions.
    """

    name: str
    group: str
    version: str
    plural: str
    node: str
    master: str
    port: str | None
    pod_suffix: Callable[[int], str]
    pods: str
    needs: str
    complete: tuple[str, ...]
    failed: str = "Failed"

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}"

    def node_of(self, labels: dict[str, str]) -> int:
        """The node, from 0, that a pod with these labels is."""
        if REPLICA_TYPE in labels:
            return int(labels.get(REPLICA_INDEX, "0")) + (labels[REPLICA_TYPE].lower() == "worker")
        return int(labels.get(INDEX_LABEL, "0"))


def _last(nodes: int) -> int:
    return max(nodes - 1, 0)


_RANDOM = "-00000"
"""What the Job controller puts behind the name of a pod, beside its index."""

KINDS = {
    "Job": Kind(
        "Job",
        "batch",
        "v1",
        "jobs",
        node="$(JOB_COMPLETION_INDEX)",
        master="{name}-0.{name}",
        port=None,
        pod_suffix=lambda nodes: f"-{_last(nodes)}{_RANDOM}",
        pods="batch.kubernetes.io/job-name={name}",
        needs="kubernetes",
        complete=("Complete",),
    ),
    "PyTorchJob": Kind(
        "PyTorchJob",
        "kubeflow.org",
        "v1",
        "pytorchjobs",
        node="$(PET_NODE_RANK)",
        master="$(PET_MASTER_ADDR)",
        port="$(PET_MASTER_PORT)",
        pod_suffix=lambda nodes: f"-worker-{max(nodes - 2, 0)}" if nodes > 1 else "-master-0",
        pods="training.kubeflow.org/job-name={name}",
        needs="kubernetes",
        complete=("Succeeded",),
    ),
    "TrainJob": Kind(
        "TrainJob",
        "trainer.kubeflow.org",
        "v1alpha1",
        "trainjobs",
        node="$(PET_NODE_RANK)",
        master="$(PET_MASTER_ADDR)",
        port="$(PET_MASTER_PORT)",
        pod_suffix=lambda nodes: f"-{NODES}-0-{_last(nodes)}{_RANDOM}",
        pods="jobset.sigs.k8s.io/jobset-name={name}",
        needs="kubeflow_trainer_api",
        complete=("Complete",),
    ),
    "JobSet": Kind(
        "JobSet",
        "jobset.x-k8s.io",
        "v1alpha2",
        "jobsets",
        node="$(JOB_COMPLETION_INDEX)",
        master=f"{{name}}-{NODES}-0-0.{{name}}",
        port=None,
        pod_suffix=lambda nodes: f"-{NODES}-0-{_last(nodes)}{_RANDOM}",
        pods="jobset.sigs.k8s.io/jobset-name={name}",
        needs="kubeflow_trainer_api",
        complete=("Completed",),
    ),
}
DEFAULT_KIND = "Job"


def kind_of(name: str) -> Kind:
    """The kind of that name. Raises UsageError, with all names, for an unknown one."""
    if name not in KINDS:
        raise UsageError(f"unknown kind {name!r}: choose one of {', '.join(KINDS)}")
    return KINDS[name]
