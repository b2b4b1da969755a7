"""The launcher: a job of the cluster for each attempt, beside what it is asked for between attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from refit.config.clusters import load_cluster
from refit.errors import UsageError
from refit.launch.base import Job, Launcher
from refit.launch.host import Host
from refit.launch.kubernetes.__main__ import words
from refit.launch.kubernetes.api import Api, find_jobs
from refit.launch.kubernetes.follow import has_own_result
from refit.launch.kubernetes.kinds import DEFAULT_KIND, kind_of
from refit.launch.kubernetes.manifests import Manifest, as_yaml, render
from refit.launch.kubernetes.submit import Submitted, create, pod_run
from refit.launch.kubernetes.validation import check_installed, validate
from refit.launch.kubernetes.values import load_values
from refit.results.sweep import Attempt

VALUES, KIND = "REFIT_KUBERNETES_VALUES", "REFIT_KUBERNETES_KIND"
"""The site's settings; `--values` and `--kind` of `refit sweep` set them."""


class KubernetesLauncher(Launcher):
    """One job for each attempt: its pods are the nodes, and torchrun in each starts the ranks."""

    keeps_time = True
    brings_nodes = True

    def __init__(self, host: Host, environ: Mapping[str, str]) -> None:
        """Raises UsageError for values that are missing or wrong, an unknown kind, or one that nothing here knows."""
        super().__init__(host, environ)
        path = environ.get(VALUES)
        if not path:
            raise UsageError(f"the launcher kubernetes needs a site's settings: give --values FILE, or set {VALUES}")
        self._path = Path(path).absolute()
        self.values = load_values(self._path)
        self.kind = kind_of(environ.get(KIND) or DEFAULT_KIND)

    @property
    def gpus_per_node(self) -> int:
        return self.values.gpus_per_node

    def check(self, cluster: str | None, jobs: Sequence[Job]) -> None:
        """Raise UsageError for what a cluster's file, Kubernetes' rules or the API's types refuse."""
        check_installed(self.kind)
        validate(self._rendered(cluster, jobs))

    def manifests(self, cluster: str | None, jobs: Sequence[Job]) -> tuple[str, str]:
        manifests = self._rendered(cluster, jobs)
        try:
            check_installed(self.kind)
        except UsageError as error:
            return as_yaml(manifests), f"not checked against the types of the API: {error}"
        validate(manifests)
        return as_yaml(manifests), ""

    def _rendered(self, cluster: str | None, jobs: Sequence[Job]) -> list[Manifest]:
        self._check_cluster(cluster)
        names: dict[str, str] = {}
        found: list[Manifest] = []
        for job in jobs:
            run = pod_run(job, self.values, "dry-run")
            if run.name in names:
                raise UsageError(f"{job.stem.name} and {names[run.name]} are both {run.name} in Kubernetes: rename one")
            names[run.name] = job.stem.name
            found += render(self.kind, self.values, run)
        return found

    def _check_cluster(self, cluster: str | None) -> None:
        if cluster is None:
            return
        has = load_cluster(cluster).gpus_per_node
        if self.gpus_per_node > has:
            raise UsageError(
                f"{self._path}: gpus_per_node is {self.gpus_per_node}, a node of {cluster} has {has}: lower it, or "
                "give another --cluster"
            )

    def command(self, job: Job) -> Sequence[str]:
        return words(self.python, self._path, self.kind.name, job)

    def goes_on(self, attempt: Attempt) -> bool:
        """Whether an attempt's job is still in the cluster, running or with what it has left."""
        submitted = Submitted.read(attempt.log)
        if submitted is None or has_own_result(attempt):
            return False
        job = Api(self.values).job(submitted.kind, submitted.name)
        return job is not None and job["metadata"]["uid"] == submitted.uid

    def submit(self, job: Job) -> str:
        submitted = create(Api(self.values), self.kind, self.values, pod_run(job, self.values))
        log = Attempt(job.stem).log
        with log.open("x", encoding="utf-8") as file:
            file.write(f"{submitted}\n")
        return f"{submitted.kind.name} {submitted.name}"

    def cancel(self, run_id: str) -> list[str]:
        api = Api(self.values)
        jobs = find_jobs(api, run_id)
        for kind, job in jobs:
            api.delete_job(kind, job["metadata"]["name"])
        names = {job["metadata"]["name"] for _, job in jobs}
        for name in names | api.names_beside(run_id):
            api.delete_beside(name)
        return [f"{kind.name} {job['metadata']['name']}" for kind, job in jobs]
