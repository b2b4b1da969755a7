"""The suite started with torchrun, or with ranks that are forked: output, exit codes, faults that end the whole job."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from refit.cli.forked import command as forking
from tests.ranks.waiting import pid_of_rank, read_until

Launch = Callable[..., subprocess.Popen[str]]

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--model", "tiny", "--num-layers", "1", "--moe-layer-freq", "1", "--vocab-size", "512"]
SMALL += ["--refit-method", "gloo"]
ONE_TO_TWO = ["--rl-inference-expert-model-parallel-size", "2"]  # TP1 EP1 -> TP1 EP2: three ranks


def torchrun(num_ranks: int, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_ranks), "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(ROOT / "benchmark_refit.py"), *flags]
    return _started(command)


def forked(num_ranks: int, *flags: str) -> subprocess.Popen[str]:
    """What `refit run` starts in torchrun's place."""
    return _started(forking(os.getpid(), num_ranks, flags))


LAUNCHERS = pytest.mark.parametrize("launch", [torchrun, forked])


def refit_run(*flags: str) -> subprocess.Popen[str]:
    return _started([sys.executable, "-m", "refit", "run", *flags])


def _started(command: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def finish(process: subprocess.Popen[str], timeout_s: float = 150) -> str:
    output, _ = process.communicate(timeout=timeout_s)
    return output


def result_in(directory: Path) -> dict[str, Any]:
    (path,) = directory.glob("*.json")
    content: dict[str, Any] = json.loads(path.read_text())
    return content


@pytest.mark.megatron
@LAUNCHERS
def test_a_verified_refit_with_an_idle_rank(tmp_path: Path, launch: Launch) -> None:
    process = launch(4, *SMALL, *ONE_TO_TWO, "--output-dir", str(tmp_path))
    output = finish(process)
    assert process.returncode == 0, output
    said = {
        "World size: 4 (using 3 GPUs)",
        "Source ranks: 0 (TP=1, PP=1, EP=1)",
        "Destination ranks: 1-2 (TP=1, PP=1, EP=2)",
        "Idle ranks: 3 (not participating)",
    }
    assert said <= set(output.splitlines())
    for pattern in (
        r"^Mean refit time: \d+\.\d\d ms$",
        r"^Min refit time:  \d+\.\d\d ms$",
        r"^Max refit time:  \d+\.\d\d ms$",
        r"^PASSED \(refit\): [\d,]+ elements compared over 7 refits, 0 wrong$",
        r"^Result: .+\.json$",
    ):
        assert re.search(pattern, output, re.MULTILINE), f"{pattern} not in\n{output}"
    assert result_in(tmp_path)["status"] == "ok"


@pytest.mark.slow
@LAUNCHERS
def test_too_few_ranks_is_one_line_before_anything_is_built(tmp_path: Path, launch: Launch) -> None:
    process = launch(2, *SMALL, *ONE_TO_TWO, "--output-dir", str(tmp_path))
    output = finish(process)
    assert process.returncode != 0
    errors = [line for line in output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "1 + 2 = 3 GPUs needed > 2 available" in errors[0]
    assert not list(tmp_path.iterdir())
    assert "exitcode  : 2" in output


@pytest.mark.slow
@LAUNCHERS
@pytest.mark.parametrize("send", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_rank_that_is_gone_ends_the_job_and_keeps_what_was_measured(
    tmp_path: Path, launch: Launch, send: signal.Signals
) -> None:
    flags = [*SMALL, *ONE_TO_TWO, "--num-benchmark-iterations", "100000"]
    flags += ["--output-dir", str(tmp_path)]
    process = launch(3, *flags)
    assert process.stdout is not None
    output = read_until(process.stdout.readline, "/100000:")
    (timed,) = re.findall(r"(\d+)/100000:", output)
    os.kill(pid_of_rank(2, tmp_path), send)
    output += finish(process)
    assert process.returncode != 0
    # The launcher gives a rank 30 s to handle SIGTERM, which a stopped one never does: its peers have killed it.
    assert "forcefully exiting" not in output
    verdicts = [line for line in output.splitlines() if line.startswith("FAILED:")]
    assert len(verdicts) == 1, output
    assert re.search(r"rank 2 failed in phase 'refit iteration \d+: \w+': died or was killed", verdicts[0])
    content = result_in(tmp_path)
    assert (content["status"], content["exit_code"]) == ("failed", 4)
    assert content["failure"]["rank"] == 2
    assert len(content["measurements"]["refit"]["engines"]["refit"]["samples"]) >= 2 + int(timed)  # 2 warm up


@pytest.mark.slow
@LAUNCHERS
def test_without_its_launcher_a_job_reports_one_failure(tmp_path: Path, launch: Launch) -> None:
    """The launcher hosts the store, through which ranks otherwise agree on who reports."""
    process = launch(3, *SMALL, *ONE_TO_TWO, "--num-benchmark-iterations", "100000", "--output-dir", str(tmp_path))
    assert process.stdout is not None
    read_until(process.stdout.readline, "/100000:")
    process.kill()
    output = finish(process)  # ends when the last rank has closed its end of the pipe
    verdicts = [line for line in output.splitlines() if line.startswith("FAILED:")]
    assert len(verdicts) == 1, output
    assert output.count("\nResult: ") == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    assert result_in(tmp_path)["status"] == "failed"


FAILING_BUILD = """
import os
from examples.custom_model import build as build_model

def build(layout, groups, device):
    if os.environ["RANK"] == os.environ["FAILING_RANK"]:
        raise OSError("the disk is gone")
    return build_model(layout, groups, device)
"""


@pytest.mark.parametrize(
    ("launcher", "rank"),
    [
        ("fork", "1"),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("fork", "0"), ("spawn", "1"), ("torchrun", "0"))),
    ],
)
def test_a_rank_that_fails_while_it_builds_is_the_only_one_that_is_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rank: str, launcher: str
) -> None:
    """The others wait for it in a collective, whose connection is closed when it ends."""
    (tmp_path / "failing.py").write_text(FAILING_BUILD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    monkeypatch.setenv("FAILING_RANK", rank)
    flags = ["--model-provider", "failing:build", "--refit-method", "gloo", "--output-dir", str(tmp_path / "results")]
    flags += ["--source-world-size", "2"]
    process = torchrun(3, *flags) if launcher == "torchrun" else refit_run("--start", launcher, *flags)
    output = finish(process)
    assert process.returncode != 0
    assert re.findall(r"^FAILED: .*", output, re.MULTILINE) == [
        f"FAILED: rank {rank} failed in phase 'build source model': OSError: the disk is gone"
    ]
    assert re.findall(r"^unexpected error on rank (\d+)", output, re.MULTILINE) == [rank]
    assert "Connection closed" not in output
    assert result_in(tmp_path / "results")["failure"]["rank"] == int(rank)
