"""Sweeps against a small API server: what a cluster does to jobs and pods, and what each attempt then says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from refit.cli.parsing import parse
from refit.commands import main
from refit.launch.kubernetes import api
from refit.launch.kubernetes.pod import result_lines
from refit.results.result import encoded, read_result
from tests.launch.kubernetes.cluster import Cluster, Object
from tests.launch.kubernetes.needs import needs_client

pytestmark = needs_client

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


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Any], Site]]:
    made: list[Site] = []

    def make(behave: Any) -> Site:
        made.append(Site(tmp_path, monkeypatch, behave))
        return made[-1]

    yield make
    for each in made:
        each.cluster.close()


def test_scenarios_run_in_turn_and_their_results_are_collected(site: Any, capfd: pytest.CaptureFixture[str]) -> None:
    behaviours = {"run-good": passes, "run-bad": fails, "run-big": is_short_of_memory}
    here = site(lambda cluster, job: behaviours[job["metadata"]["name"]](cluster, job))
    here.values("gates: [{name: efa, pattern: 'provider is efa, fabric is efa-direct'}]\n")
    assert main(here.words("run", "good", "bad", "big")) == 4
    output = capfd.readouterr().out
    assert re.findall(r"^\[(\d/3)\] (\w+): 2 x 2 ranks", output, re.MULTILINE) == [
        ("1/3", "good"),
        ("2/3", "bad"),
        ("3/3", "big"),
    ]
    assert here.result("run_good").status == "ok"
    log = here.log("run_good")
    assert "[rank3]:NCCL INFO" in log
    assert "# gate efa: passed on all 4 ranks" in log
    assert "#refit-result" not in log
    assert here.result("run_bad").failure.message == "ended with exit code 1: no such plan"
    assert re.search(r"pod run-big-0-\S+ ended with exit code 137: OOMKilled", here.result("run_big").failure.message)
    assert here.left == [], "jobs, services and ConfigMaps are gone"
    assert not here.cluster.pods
    assert main(here.words("run")) == 4
    assert "[1/" not in capfd.readouterr().out, "all have results"


def test_a_gate_that_a_rank_does_not_pass_fails_the_run(site: Any) -> None:
    here = site(passes)
    here.values("gates: [{name: efa, pattern: 'rank[012].*provider is efa'}]\n")
    assert main(here.words("run", "good")) == 4
    result = here.result("run_good")
    message = "gate efa: 1 of 4 ranks, rank 3 first, have printed no line with 'rank[012].*provider is efa'"
    assert (result.status, result.failure.message, result.failure.rank) == ("failed", message, 3)
    assert result.measurements["refit"].engines["refit"].summary is not None


def test_an_eviction_is_no_failure_of_the_scenario(site: Any) -> None:
    first = [is_evicted]
    here = site(lambda cluster, job: (first.pop() if first else passes)(cluster, job))
    assert main(here.words("run", "a", "b")) == 4
    assert re.search(
        r"^error: pod run-a-1-\S+ was taken away: DeletionByTaintManager: node gone", here.log("run_a"), re.M
    )
    assert here.result("run_a").failure.message == "cancelled"
    assert here.result("run_b").status == "ok", "the next scenario has its turn"
    assert main(here.words("run")) == 0
    assert here.result("run_a.2").status == "ok"


def test_a_campaign_cut_short_reports_what_it_has_and_goes_on(site: Any, capfd: pytest.CaptureFixture[str]) -> None:
    ended = [False]
    here = site(
        lambda cluster, job: (has_no_nodes if ended[0] and "b" in job["metadata"]["name"] else passes)(cluster, job)
    )
    here.values("pending_timeout_s: 1\n")
    ended[0] = True
    assert main(here.words("run", "a", "b", "c")) == 143
    output, aside = capfd.readouterr()
    assert "error: 0 of 2 pods have started within 1 s: Unschedulable: 0/0 nodes are available" in here.log("run_b")
    assert re.search(r"^Go on with: .* sweep run --resume run .*--launcher kubernetes --values", aside, re.MULTILINE)
    assert "Summary: " in output
    assert here.left == []
    ended[0] = False
    assert main(here.words("run")) == 0
    assert [here.result(stem).status for stem in ("run_a", "run_b.2", "run_c")] == ["ok"] * 3


def test_a_job_that_is_deleted_from_outside_ends_the_sweep_in_order(site: Any) -> None:
    here = site(hangs)

    def cancel() -> None:
        here.cluster.wait(lambda: len(here.cluster.pods) == 2)
        assert main(["sweep", "cancel", "run", *here.launcher]) == 0

    thread = threading.Thread(target=cancel)
    thread.start()
    assert main(here.words("run", "a", "b")) == 143
    thread.join()
    assert "error: the job was deleted from outside" in here.log("run_a")
    assert here.result("run_a").failure.message == "cancelled"
    assert not here.cluster.pods
    assert here.left == []


def test_an_image_that_is_not_there_and_a_time_limit(site: Any) -> None:
    here = site(has_no_image)
    assert main(here.words("run", "a")) == 4
    assert "cannot start: ImagePullBackOff: no such tag" in here.result("run_a").failure.message
    here.cluster.behave = hangs
    assert main([*here.words("run", "b", run_id="late"), "--timeout", "1"]) == 4
    assert here.result("late_b").failure.message == "timed out after 1 s"
    assert here.left == []


def test_the_api_may_be_away_for_a_while(site: Any) -> None:
    def behave(cluster: Cluster, job: Object) -> None:
        pods = start_pods(cluster, job)
        cluster.say(pods[0], "[rank0]:before")
        time.sleep(0.3)
        cluster.is_away = True
        time.sleep(2.0)
        cluster.forgets = 1000
        cluster.is_away = False
        cluster.say(pods[0], "[rank0]:after", *result_lines(result_text(flags_of(cluster, job))))
        time.sleep(0.3)
        cluster.forgets = 0
        for pod in pods:
            cluster.end_pod(pod, 0)
        cluster.set_job(job, "Complete")

    here = site(behave)
    assert main(here.words("run", "a")) == 0
    log = here.log("run_a")
    assert re.search(r"^# the cluster's API does not answer \(the server is currently unable", log, re.MULTILINE)
    assert (log.count("[rank0]:before"), log.count("[rank0]:after")) == (1, 1)


def test_an_api_that_stays_away_leaves_the_jobs_for_a_resume(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `__main__` ends it; the process itself would wait for ten minutes."""
    here = site(hangs)
    assert main(here.words("submit", "a")) == 0
    monkeypatch.setattr(api, "FIRST_PAUSE_S", 0.01)
    here.cluster.is_away = True
    with pytest.raises(api.Away, match=r"has not answered for .* s: .*: its jobs still run, go on with --resume"):
        api.Api(values_of(here), patience_s=0.1).job(api.KINDS["Job"], "run-a")


def values_of(here: Site) -> Any:
    from refit.launch.kubernetes.values import load_values

    return load_values(here.folder / "site.yaml")


def test_jobs_are_submitted_at_once_and_waited_for_later(site: Any, capfd: pytest.CaptureFixture[str]) -> None:
    here = site(passes)
    assert main(here.words("submit", "a", "b")) == 0
    output = capfd.readouterr().out
    assert re.search(
        r"^a: Job run-a\nb: Job run-b\nWait for them with: .* sweep run --resume run ", output, re.MULTILINE
    )
    assert here.cluster.names("jobs") == ["run-a", "run-b"]
    assert main(here.words("submit")) == 0
    assert capfd.readouterr().out.startswith("a: submitted already\nb: submitted already\n")
    assert main(here.words("run")) == 0
    assert [here.result(stem).status for stem in ("run_a", "run_b")] == ["ok", "ok"]
    assert "# going on with Job run-a" in here.log("run_a")
    assert here.left == []
    assert main(["sweep", "cancel", "run", *here.launcher]) == 2
    assert "run 'run' has no jobs" in capfd.readouterr().err


def test_of_two_submitters_the_second_is_refused(site: Any, capfd: pytest.CaptureFixture[str]) -> None:
    here = site(hangs)
    assert main(here.words("submit", "a")) == 0
    other = here.words("submit", "a")
    other[other.index("--output-dir") + 1] = str(here.folder / "elsewhere")
    assert main(other) == 2
    assert "run-a is there already, from another submitter: `refit sweep cancel run" in capfd.readouterr().err
    assert sorted(here.left) == ["run-a"] * 3, "the first one's are untouched"
    assert main(["sweep", "cancel", "run", *here.launcher]) == 0
    assert "deleted Job run-a" in capfd.readouterr().out
    assert here.left == []
    assert not here.cluster.pods


def test_two_submitters_at_once(site: Any) -> None:
    """Both find nothing there; one creates, the other is told so."""
    here = site(hangs)
    words = [here.words("submit", "a") for _ in range(2)]
    words[1][words[1].index("--output-dir") + 1] = str(here.folder / "elsewhere")
    run = [
        subprocess.Popen([sys.executable, "-m", "refit", *each], stderr=subprocess.PIPE, text=True) for each in words
    ]
    errors = [process.communicate(timeout=60)[1] for process in run]
    assert sorted(process.returncode for process in run) == [0, 2], errors
    assert sum("from another submitter" in error for error in errors) == 1
    assert sorted(here.left) == ["run-a"] * 3


def test_a_signal_ends_the_pods(site: Any) -> None:
    here = site(hangs)
    words = [sys.executable, "-m", "refit", *here.words("run", "a")]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    here.cluster.wait(lambda: len(here.cluster.pods) == 2)
    os.kill(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    assert here.left == []
    assert not here.cluster.pods
    assert here.result("run_a").failure.message == "cancelled"


@pytest.mark.parametrize(
    ("arguments", "values", "message"),
    [
        ([], "image: ''\n", "image is missing"),
        (["--kind", "Deployment"], "", "unknown kind 'Deployment': choose one of Job, PyTorchJob, TrainJob, JobSet"),
        (["--cluster", "h100_efa"], "gpus_per_node: 16\n", "gpus_per_node is 16, a node of h100_efa has 8: lower it"),
        (["--gpus-per-node", "4"], "", "--gpus-per-node is 4, the values say 2"),
        (["--cpu-fallback"], "", "--cpu-fallback plans for the CPUs of this machine, not for pods"),
        (["--run-id", "a" * 60], "", "has 62 characters, 55 are the most for a Job"),
        (["--kind", "TrainJob"], "host_network: true\n", "host_network cannot be set in a TrainJob"),
    ],
)
@pytest.mark.parametrize("step", ["run", "submit"])
def test_bad_input_is_refused_before_anything_is_sent(
    site: Any, capfd: pytest.CaptureFixture[str], step: str, arguments: list[str], values: str, message: str
) -> None:
    here = site(hangs)
    lines = [line for line in VALUES.splitlines() if line.partition(":")[0] not in values or not values]
    (here.folder / "site.yaml").write_text("\n".join(lines) + f"\n{values}")
    words = here.words(step, "a")
    if "--run-id" in arguments:
        del words[words.index("--run-id") : words.index("--run-id") + 2]
    assert main([*words, *arguments]) == 2
    error = capfd.readouterr().err
    assert message in error
    assert len([line for line in error.splitlines() if line.startswith("error")]) == 1
    assert here.cluster.requests == []
    assert not list((here.folder / "out").rglob("*.json"))


def test_a_kind_that_the_cluster_lacks_and_flags_of_another_launcher(
    site: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    here = site(hangs)
    here.cluster.kinds = ("jobs",)
    assert main([*here.words("submit", "a"), "--kind", "JobSet"]) == 2
    assert (
        "the cluster has no jobsets.jobset.x-k8s.io: install the operator, or take --kind Job" in capfd.readouterr().err
    )
    assert here.left == []
    words = ["sweep", "run", "--launcher", "local", "--kind", "Job", *here.chosen("a"), "--num-gpus", "4"]
    assert main([*words, "--output-dir", str(here.folder / "out2")]) == 2
    assert "--kind goes with --launcher kubernetes, not with local" in capfd.readouterr().err
    assert main(["sweep", "cancel", "run", "--launcher", "slurm"]) == 2
    assert "jobs of Slurm with scancel" in capfd.readouterr().err


def test_a_dry_run_prints_manifests_and_sends_nothing(site: Any, capfd: pytest.CaptureFixture[str]) -> None:
    here = site(hangs)
    assert main(["sweep", "submit", *here.launcher, *here.chosen("a"), "--dry-run"]) == 0
    assert capfd.readouterr().out.count("\nkind: Job\n") == 1
    assert here.cluster.requests == []


def test_files_of_this_machine_travel_with_the_scenario(site: Any) -> None:
    here = site(passes)
    model = here.folder / "mine.yaml"
    model.write_text((ROOT / "configs/models/tiny.yaml").read_text())
    seen: list[Object] = []
    here.cluster.behave = lambda cluster, job: seen.append(
        dict(cluster.objects["configmaps", job["metadata"]["name"]]["data"])
    )
    words = ["sweep", "submit", *here.launcher, *here.chosen("a"), "--run-id", "run"]
    path = here.folder / "list.yaml"
    path.write_text(path.read_text().replace('"tiny"', f'"{model}"'))
    assert main([*words, "--output-dir", str(here.folder / "out")]) == 0
    here.cluster.wait(lambda: bool(seen))
    assert seen[0]["mine.yaml"] == model.read_text()
    assert "--model=/mnt/refit/mine.yaml" in seen[0]["flags"].splitlines()
    assert "--output-dir=/results/run" in seen[0]["flags"].splitlines()
