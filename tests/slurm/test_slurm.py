"""The scripts under a real Slurm, with two nodes and pretended GPUs on this machine: `make slurm-test`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ONE_MACHINE = ROOT / "tests/slurm/one_machine.sh"
KIMI, SINGLE = ROOT / "benchmark_refit_kimi_k2.sh", ROOT / "benchmark_refit_sbatch.sh"
SCENARIOS = ["--scenarios", str(ROOT / "tests/slurm/scenarios.yaml")]

pytestmark = [
    pytest.mark.skipif("REFIT_SLURM_TEST" not in os.environ, reason="needs a Slurm of its own: make slurm-test"),
    pytest.mark.timeout(600),  # a busy machine starts ranks slowly
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which Slurm's commands reach it; a node counts as two GPUs, so that two cores will do."""
    folder = Path("/tmp") / f"refit-slurm-{os.getpid()}"  # a short path: sockets lie in it
    subprocess.run([ONE_MACHINE, "start", folder], check=True, timeout=120)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH", "REFIT_"))}
    site = folder / "site.env"
    site.write_text("REFIT_PARTITION=batch\n")
    yield kept | {
        "SLURM_CONF": str(folder / "slurm.conf"),
        "REFIT_PYTHON": sys.executable,
        "REFIT_SITE_FILE": str(site),
        "REFIT_GPUS_PER_NODE": "2",
        "GLOO_SOCKET_IFNAME": "eth0",  # of each node's namespace: the machine's name has no address there
    }
    subprocess.run([ONE_MACHINE, "stop", folder], check=True, timeout=120)
    shutil.rmtree(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "a folder"
    path.mkdir()
    return path


def run(cluster: dict[str, str], folder: Path, *command: str | Path) -> tuple[int, str]:
    done = subprocess.run(command, cwd=folder, env=cluster, capture_output=True, text=True, timeout=400)
    return done.returncode, done.stdout + done.stderr


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 300) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not come about"
        time.sleep(0.2)


def job_is_over(cluster: dict[str, str], folder: Path, job: str) -> bool:
    _, output = run(cluster, folder, "squeue", "--noheader", f"--jobs={job}")
    return job not in output


def status_of(path: Path) -> str:
    try:
        return str(json.loads(path.read_text())["status"])
    except (OSError, ValueError):
        return "nothing"


def hosts_of(path: Path) -> Any:
    """What crossed between hosts, of a result; None on one host."""
    return json.loads(path.read_text())["measurements"]["refit"]["hosts"]


def verdicts(summary: str) -> dict[str, str]:
    """The verdict of every scenario, by name."""
    blocks = re.split(r"^Config: ", summary, flags=re.MULTILINE)[1:]
    found = [(block.split("\n")[0], re.findall(r"PASSED|FAILED|REFUSED|MISSING|WRONG", block)) for block in blocks]
    return {name: words[0] for name, words in found}


def test_a_suite_that_is_cancelled_half_way_and_gone_on_with(cluster: dict[str, str], folder: Path) -> None:
    """sbatch; one scenario passes, scancel in the next, --resume runs the rest, of which one fails and one is
    refused."""
    suite = ["sbatch", "--parsable", "--nodes=2", str(KIMI), "--output-dir", "out"]
    code, job = run(cluster, folder, *suite, *SCENARIOS)
    assert code == 0, job
    job, logs = job.strip(), folder / "out" / "logs"
    wait_until(lambda: bool(list(logs.glob("*_two_nodes.log"))), "the second scenario")
    run(cluster, folder, "scancel", job)
    wait_until(lambda: job_is_over(cluster, folder, job), "the end of the cancelled job")
    (sweep,) = logs.glob("*_sweep.json")
    run_id = sweep.name.removesuffix("_sweep.json")
    assert status_of(logs / f"{run_id}_one_node.json") == "ok"
    summary = (logs / f"{run_id}_summary.txt").read_text()
    assert re.search(r"FAILED: .*cancelled", summary)
    assert "it was not started" in summary
    assert f"--resume {run_id}" in (folder / f"refit_kimi_k2_{job}.out").read_text()

    code, output = run(cluster, folder, "sbatch", "--wait", *suite[2:], "--resume", run_id)
    assert code == 4, output
    summary = (logs / f"{run_id}_summary.txt").read_text()
    expected = {"one_node": "PASSED", "two_nodes": "PASSED", "broken": "FAILED", "too_large": "REFUSED"}
    assert verdicts(summary) == expected, summary
    assert "4 + 2 = 6 GPUs needed > 4 available" in summary
    assert "World size: 4 (using 4 GPUs)" in (logs / f"{run_id}_two_nodes.2.log").read_text()
    assert not (logs / f"{run_id}_one_node.2.log").exists()
    # Each node is a network namespace, and so a host of its own.
    hosts = {name: hosts_of(logs / f"{run_id}_{name}.json") for name in ("one_node", "two_nodes.2")}
    assert hosts["one_node"] is None
    assert sorted(hosts["two_nodes.2"]["num_ranks"].values()) == [2, 2]
    assert hosts["two_nodes.2"]["between_bytes"] > 0
    errors = [path.read_text() for path in (logs / f"{run_id}_broken_ranks" / "node0").glob("rank[01].err")]
    assert "Traceback" in "".join(errors), "ranks' own logs are kept where they failed"


def test_salloc_with_a_task_per_gpu(cluster: dict[str, str], folder: Path) -> None:
    flags = ["--model=tiny", "--num-layers=1", "--moe-layer-freq=1", "--vocab-size=512", "--num-benchmark-iterations=2"]
    flags += [
        "--refit-method=gloo",
        "--rl-inference-expert-model-parallel-size=2",
        "--output-dir=out",
        "--run-name=one",
    ]
    allocation = ["salloc", "--nodes=1", "--ntasks-per-node=8", "--gpus-per-node=8"]
    slurms_own = {name: value for name, value in cluster.items() if name != "REFIT_GPUS_PER_NODE"}
    code, output = run(slurms_own, folder, *allocation, SINGLE, *flags)
    assert code == 0, output
    assert "World size: 8 (using 3 GPUs)" in output
    assert "Idle ranks: 3-7 (not participating)" in output
    variables = json.loads((folder / "out" / "one.json").read_text())["environment"]["variables"]
    assert variables["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7", "every rank sees all GPUs of its node"
    code, output = run(slurms_own, folder, *allocation, SINGLE, *flags, "--tensor-model-parallel-size=8")
    assert code == 2
    assert "8 + 16 = 24 GPUs needed > 8 available" in output


def test_an_array_and_its_summary_job(cluster: dict[str, str], folder: Path) -> None:
    arguments = ["--submit", "--array", "--nodes", "2", "--throttle", "1", "--output-dir", "out", *SCENARIOS]
    code, output = run(cluster, folder, KIMI, *arguments)
    assert code == 0, output
    (array,) = re.findall(r"Submitted job array (\d+): 3 scenarios", output)
    logs = folder / "out" / "logs"
    wait_until(lambda: bool(list(logs.glob("*_summary.txt"))), "the summary")
    (summary,) = logs.glob("*_summary.txt")
    text = summary.read_text()
    assert f"Job ID: {array}" in text
    expected = {"one_node": "PASSED", "two_nodes": "PASSED", "broken": "FAILED", "too_large": "REFUSED"}
    assert verdicts(text) == expected, text
    assert len(list(folder.glob(f"refit_kimi_k2_{array}_*.out"))) == 3
