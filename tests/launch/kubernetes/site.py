"""A folder with a site's settings for a small API server, and what a cluster may do to a job and its pods."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refit.cli.parsing import parse
from refit.launch.kubernetes.pod import result_lines
from refit.results.result import encoded, read_result
from tests.launch.kubernetes.cluster import Cluster, Object

ROOT = Path(__file__).resolve().parents[3]
SMALL = {"model": "tiny", "num-layers": 1, "moe-layer-freq": 1, "vocab-size": 512, "num-benchmark-iterations": 2}
VALUES = "image: registry/refit:1\nresults: {claim: fsx, mount_path: /results}\ngpus_per_node: 2\n"


def flags_of(cluster: Cluster, job: Object) -> list[str]:
    return str(cluster.objects["configmaps", job["metadata"]["name"]]["data"]["flags"]).split()


def result_text(flags: list[str]) -> bytes:
    """The result of a run of these flags that has passed."""
    (name,) = (flag.partition("=")[2] for flag in flags if flag.startswith("--run-name="))
    sample = {"iteration": 1, "warmup": False, "seconds_per_rank": [0.002], "slowest_rank": 0, "phases_s": {}}
    sample |= {"unattributed_s": 0.002, "num_compared": 10, "num_wrong": 0}
    summary = dict.fromkeys(("mean_s", "min_s", "max_s", "median_s", "p95_s", "cv", "drift"), 0.002)
    engine = {"status": "ok", "samples": [sample], "summary": summary, "bottleneck_gb_per_s": 1.0}
    result = {"schema_version": 3, "run_id": name, "status": "ok", "exit_code": 0}
    result["scenario"] = json.loads(encoded(parse(flags).scenario))
    result["measurements"] = {"refit": {"engines": {"refit": engine}}}
    return json.dumps(result).encode()


def start_pods(cluster: Cluster, job: Object) -> list[str]:
    nodes = job["spec"]["completions"]
    index = "batch.kubernetes.io/job-completion-index"
    pods = [cluster.add_pod(job, node, {index: str(node)}) for node in range(nodes)]
    for pod in pods:
        cluster.run_pod(pod)
    return pods


def passes(cluster: Cluster, job: Object) -> None:
    pods = start_pods(cluster, job)
    for node, pod in enumerate(pods):
        for rank in (0, 1):
            cluster.say(pod, f"[rank{2 * node + rank}]:NCCL INFO Selected provider is efa, fabric is efa-direct")
    for line in result_lines(result_text(flags_of(cluster, job))):
        cluster.say(pods[0], line)
    for pod in pods:
        cluster.end_pod(pod, 0)
    cluster.set_job(job, "Complete")


def fails(cluster: Cluster, job: Object) -> None:
    """The second pod's ranks fail; the controller ends the first one."""
    pods = start_pods(cluster, job)
    cluster.say(pods[1], "[rank3]:error: no such plan")
    cluster.end_pod(pods[1], 1)
    cluster.set_job(job, "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
    cluster.delete_pod(pods[0])


def is_evicted(cluster: Cluster, job: Object) -> None:
    pods = start_pods(cluster, job)
    condition = {
        "type": "DisruptionTarget",
        "status": "True",
        "reason": "DeletionByTaintManager",
        "message": "node gone",
    }
    cluster.end_pod(pods[1], 137, conditions=[condition])
    cluster.set_job(job, "Failed", "BackoffLimitExceeded")


def is_short_of_memory(cluster: Cluster, job: Object) -> None:
    pods = start_pods(cluster, job)
    cluster.end_pod(pods[0], 137, "OOMKilled")
    cluster.set_job(job, "Failed", "BackoffLimitExceeded")


def has_no_image(cluster: Cluster, job: Object) -> None:
    pod = cluster.add_pod(job, 0)
    cluster.set_pod(pod, "Pending", {"waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}})


def has_no_nodes(cluster: Cluster, job: Object) -> None:
    pod = cluster.add_pod(job, 0)
    reason = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": "0/0 nodes are available",
    }
    cluster.set_pod(pod, "Pending", conditions=[reason])


def hangs(cluster: Cluster, job: Object) -> None:
    start_pods(cluster, job)


class Site:
    """A folder with values and a kubeconfig for a cluster."""

    def __init__(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch, behave: Callable[[Cluster, Object], None]
    ) -> None:
        self.folder, self.cluster = folder, Cluster(behave)
        monkeypatch.setenv("KUBECONFIG", str(self.cluster.kubeconfig(folder / "kubeconfig")))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        self.values("")

    def values(self, more: str) -> None:
        (self.folder / "site.yaml").write_text(VALUES + more)

    @property
    def launcher(self) -> list[str]:
        return ["--launcher", "kubernetes", "--values", str(self.folder / "site.yaml")]

    def chosen(self, *names: str) -> list[str]:
        """Scenarios of four ranks: two nodes of two."""
        lines = [f"2:1:2:1:non-collocated:gloo:{name}" for name in names]
        path = self.folder / "list.yaml"
        path.write_text(json.dumps({"title": "Own", "defaults": SMALL, "scenarios": lines}))
        return ["--scenarios", str(path)]

    def words(self, step: str, *names: str, run_id: str = "run") -> list[str]:
        output = ["--output-dir", str(self.folder / "out")]
        chosen = [*self.chosen(*names), "--run-id", run_id] if names else ["--resume", run_id]
        return ["sweep", step, *self.launcher, *chosen, *output]

    def log(self, stem: str) -> str:
        return (self.folder / f"out/logs/{stem}.log").read_text()

    def result(self, stem: str) -> Any:
        return read_result(self.folder / f"out/logs/{stem}.json")

    @property
    def left(self) -> list[str]:
        return [name for _, name in self.cluster.objects]
