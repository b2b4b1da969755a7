"""Submitting to a small API server: what is sent, what is refused before, and submitters that meet."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from refit.commands import main
from tests.launch.kubernetes.cluster import Object
from tests.launch.kubernetes.needs import needs_client
from tests.launch.kubernetes.site import ROOT, VALUES, hangs, passes

pytestmark = needs_client


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
