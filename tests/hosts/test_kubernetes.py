"""The manifests' command in pods that are network namespaces, each with exactly the variables that its operator sets.

A sweep is submitted to a small API server, whose pods run: the container's command and arguments, filled in as
Kubernetes does, with the ConfigMap's files, the volume, and the names that the cluster's DNS would have.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from refit.launch.kubernetes.kinds import NODES
from refit.launch.kubernetes.values import FILES_PATH
from refit.results.result import read_result
from tests.hosts.network import INTERFACE, Network
from tests.launch.kubernetes.cluster import Cluster, Object
from tests.launch.kubernetes.needs import needs_client

pytestmark = [needs_client, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
FLAGS = {"model": "tiny_qwen3_moe", "refit-method": "gloo", "num-benchmark-iterations": 1, "num-benchmark-warmup": 0}
FLAGS |= {"rl-inference-format": "vllm", "rl-inference-tensor-model-parallel-size": 1}
FLAGS |= {"plugin": "tests.seams.plain", "source-format": "plain"}
"""Of plain tensors: what is tried here is how ranks start, each of which would import a training library."""
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"


def pod_template(job: Object) -> Object:
    """The pods of a job, as its operator makes them. A TrainJob's come from its runtime."""
    spec, kind = job["spec"], job["kind"]
    if kind == "Job":
        return dict(spec["template"])
    if kind == "PyTorchJob":
        return dict(spec["pytorchReplicaSpecs"]["Master"]["template"])
    if kind == "JobSet":
        return dict(spec["replicatedJobs"][0]["template"]["spec"]["template"])
    trainer = spec["trainer"]
    container = {"name": NODES, **{key: trainer[key] for key in ("command", "args", "env")}}
    return {"spec": {"containers": [container]}}


def num_pods(job: Object) -> int:
    spec, kind = job["spec"], job["kind"]
    if kind == "Job":
        return int(spec["completions"])
    if kind == "PyTorchJob":
        return sum(replica["replicas"] for replica in spec["pytorchReplicaSpecs"].values())
    if kind == "JobSet":
        return int(spec["replicatedJobs"][0]["template"]["spec"]["completions"])
    return int(spec["trainer"]["numNodes"])


def set_by_operator(job: Object, node: int) -> dict[str, str]:
    """What the operator of its kind sets in pod `node`, and nothing else."""
    spec, name, nodes = job["spec"], job["metadata"]["name"], num_pods(job)
    if job["kind"] in ("Job", "JobSet"):
        return {"JOB_COMPLETION_INDEX": str(node)}
    if job["kind"] == "PyTorchJob":
        master, port, per_node = f"{name}-master-0", "23456", spec["nprocPerNode"]
        return {
            "PYTHONUNBUFFERED": "1",
            "PET_NNODES": str(nodes),
            "MASTER_ADDR": master,
            "MASTER_PORT": port,
            "PET_MASTER_ADDR": master,
            "PET_MASTER_PORT": port,
            "PET_NPROC_PER_NODE": per_node,
            "PET_NODE_RANK": str(node),
            "RANK": str(node),
            "WORLD_SIZE": str(nodes * int(per_node)),
        }
    return {
        "PET_NNODES": str(nodes),
        "PET_NPROC_PER_NODE": str(spec["trainer"]["numProcPerNode"]),
        "PET_NODE_RANK": str(node),
        "PET_MASTER_ADDR": f"{name}-{NODES}-0-0.{name}",
        "PET_MASTER_PORT": "29500",
    }


def first_pods_name(job: Object) -> str:
    """The name that DNS has for the first pod: by the headless service of a Job, of the operator, or of a JobSet."""
    name = job["metadata"]["name"]
    names = {"Job": f"{name}-0.{name}", "PyTorchJob": f"{name}-master-0"}
    return names.get(job["kind"], f"{name}-{NODES}-0-0.{name}")


def filled_in(text: str, environ: dict[str, str]) -> str:
    """`$(NAME)` as Kubernetes expands it: it leaves alone what is not set."""
    return re.sub(r"\$\((\w+)\)", lambda found: environ.get(found[1], found[0]), text)


class Pods:
    """Runs the pods of jobs in the hosts of a network."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder = network, folder
        self.environs: list[dict[str, str]] = []

    def __call__(self, cluster: Cluster, job: Object) -> None:
        files = self.folder / "files"
        files.mkdir()
        for name, text in cluster.objects["configmaps", job["metadata"]["name"]]["data"].items():
            (files / name).write_text(text)
        nodes = num_pods(job)
        codes = [1] * nodes
        threads = [threading.Thread(target=self._run, args=(cluster, job, node, files, codes)) for node in range(nodes)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done = {"PyTorchJob": "Succeeded", "JobSet": "Completed"}.get(job["kind"], "Complete")
        cluster.set_job(job, "Failed" if any(codes) else done)

    def _run(self, cluster: Cluster, job: Object, node: int, files: Path, codes: list[int]) -> None:
        labels = {"batch.kubernetes.io/job-completion-index": str(node)}
        pod, host = cluster.add_pod(job, node, labels), self.network.hosts[node]
        (container,) = pod_template(job)["spec"]["containers"]
        environ = set_by_operator(job, node)
        for each in container["env"]:
            given = each.get("value", self.network.address(node))  # the other one is status.podIP
            environ[each["name"]] = given
        self.environs.append(environ)
        words = [filled_in(word, environ) for word in [*container["command"], *container["args"]]]
        hosts = Path(f"/etc/netns/{host}")
        hosts.mkdir(parents=True)
        lines = ["127.0.0.1 localhost", f"{self.network.address(0)} {first_pods_name(job)}"]
        (hosts / "hosts").write_text("\n".join(lines) + "\n")
        place = FILES_PATH.rpartition("/")[0]
        enter = f'mount -t tmpfs none {place} && cp -r "$0" {FILES_PATH} && exec "$@"'
        command = ["ip", "netns", "exec", host, "env", "-i", f"PATH={PATH}"]
        command += [f"{name}={value}" for name, value in environ.items()]
        cluster.run_pod(pod)
        try:
            process = subprocess.Popen(
                [*command, "sh", "-c", enter, str(files), *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd="/",
            )
            assert process.stdout is not None
            for line in process.stdout:
                cluster.say(pod, line.rstrip("\n"))
            codes[node] = process.wait()
        finally:
            shutil.rmtree(hosts)
            cluster.end_pod(pod, codes[node])


@pytest.fixture
def network(request: pytest.FixtureRequest) -> Iterator[Network]:
    with Network(request.param, None) as made:
        yield made


@pytest.mark.parametrize(
    ("kind", "network", "ranks_per_node", "rendezvous"),
    [("Job", 2, 2, "static"), ("PyTorchJob", 4, 1, "static"), ("TrainJob", 2, 1, "static"), ("JobSet", 2, 1, "c10d")],
    indirect=["network"],
)
def test_a_sweep_runs_in_the_pods_of_each_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: Network, kind: str, ranks_per_node: int, rendezvous: str
) -> None:
    nodes = len(network.hosts)
    num_ranks = nodes * ranks_per_node
    pods = Pods(network, tmp_path)
    cluster = Cluster(pods)
    monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path / "kubeconfig")))
    site = {
        "image": "registry/refit:1",
        "results": {"claim": "shared", "mount_path": str(tmp_path / "volume")},
        "gpus_per_node": ranks_per_node,
        "gpu_resource": None,
        "python": sys.executable,
        "rendezvous": rendezvous,
        "env": {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": "1"},
    }
    (tmp_path / "site.yaml").write_text(json.dumps(site))
    listed: dict[str, Any] = {"title": "Own", "defaults": FLAGS}
    half = num_ranks // 2
    listed["scenarios"] = [{"name": "small", "source-world-size": half, "rl-inference-data-parallel-size": half}]
    (tmp_path / "list.yaml").write_text(json.dumps(listed))
    words = [sys.executable, "-m", "refit", "sweep", "run", "--launcher", "kubernetes", "--kind", kind]
    words += ["--values", str(tmp_path / "site.yaml")]
    words += ["--scenarios", str(tmp_path / "list.yaml"), "--run-id", "run", "--output-dir", str(tmp_path / "out")]
    try:  # a process of its own, where the plugin may register its format
        code = subprocess.run(words, cwd=ROOT, timeout=300).returncode
    finally:
        cluster.close()
    log = (tmp_path / "out/logs/run_small.log").read_text()
    assert code == 0, log
    result = read_result(tmp_path / "out/logs/run_small.json")
    refit = result.measurements["refit"]
    assert (result.status, result.world_size) == ("ok", num_ranks)
    assert (refit.engines["refit"].num_wrong, refit.engines["refit"].num_compared > 0) == (0, True)
    assert sorted(refit.hosts.num_ranks.values()) == [ranks_per_node] * nodes
    assert len(pods.environs) == nodes
    assert "[rank0]:" in log
    on_volume = tmp_path / "volume/run"
    assert (on_volume / "run_small.json").exists()
    assert len(list(on_volume.glob("run_small_ranks/node*"))) == nodes
    assert not os.path.exists(f"/etc/netns/{network.hosts[0]}")
