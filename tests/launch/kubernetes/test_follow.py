"""Sweeps against a small API server: what a cluster does to jobs and pods, and what each attempt then says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from refit.commands import main
from refit.launch.kubernetes import api
from refit.launch.kubernetes.pod import result_lines
from tests.launch.kubernetes.cluster import Cluster, Object
from tests.launch.kubernetes.needs import needs_client
from tests.launch.kubernetes.site import (
    Site,
    fails,
    flags_of,
    hangs,
    has_no_image,
    has_no_nodes,
    is_evicted,
    is_short_of_memory,
    passes,
    result_text,
    start_pods,
)

pytestmark = needs_client


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
        time.sleep(1.0)
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
