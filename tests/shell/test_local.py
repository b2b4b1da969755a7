"""benchmark_refit_kimi_k2.sh without Slurm: a whole campaign of token dispatchers on this machine's CPUs."""

from __future__ import annotations

import csv
import re

import pytest

from refit.models.megatron.dispatchers import CLASSES
from refit.report.steps.dispatchers import pairings
from refit.results.runs import find_run
from refit.results.status import Status
from tests.shell.conftest import ROOT, Shell

KIMI = "benchmark_refit_kimi_k2.sh"


@pytest.mark.slow
@pytest.mark.timeout(600)  # a busy machine starts ranks slowly
def test_the_tiny_campaign_of_dispatchers_runs_whole(shell: Shell) -> None:
    """dispatcher_tiny with fewer steps and one micro-batch: all is there, and both arms of the pair did equal work."""
    text = (ROOT / "configs/scenarios/dispatcher_tiny.yaml").read_text()
    few = shell.cwd / "few steps.yaml"
    text = text.replace("micro-batch-size: [1, 2]", "micro-batch-size: 2\n  num-layers: 2")
    few.write_text(re.sub(r"num-train-(steps|warmup): \d+", r"num-train-\1: 1", text))
    process = shell.start(KIMI, "--local", "--scenarios", str(few), "--output-dir", str(shell.cwd))
    output, _ = process.communicate(timeout=540)
    assert process.returncode == 0, output
    outcomes = find_run(shell.cwd).outcomes
    assert [each.status for each in outcomes] == [Status.OK] * 3
    (pair,) = pairings(outcomes)
    assert (pair.work.problems, pair.first.steps.micro_batch_size) == ((), 2)
    (index,) = (shell.cwd / "logs").glob("*_index.csv")
    rows = list(csv.DictReader(index.read_text().splitlines()))
    assert {row["dispatcher"] for row in rows} == {CLASSES["alltoall"], CLASSES["allgather"]}
    assert {row["num_steps"] for row in rows} == {"1"}
    curves = [path.read_text().splitlines() for path in (shell.cwd / "logs").glob("*_loss_curve.csv")]
    assert [len(curve) for curve in curves] == [3] * 3
    cycle = outcomes[-1].tested
    assert cycle is not None
    assert cycle.num_wrong == 0 < cycle.num_compared
    assert cycle.trained is not None
    assert cycle.trained.passed
