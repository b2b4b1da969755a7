"""benchmark_refit_sbatch.sh and test_nvshmem_refit.sh: one scenario, with Slurm and without."""

from __future__ import annotations

import json
import re
import shutil
import signal

import pytest

from refit.cli.parsing import parse
from tests.ranks.ports import job_with_a_free_port
from tests.ranks.waiting import read_until
from tests.shell.conftest import ROOT, Shell

SINGLE, SMOKE = "benchmark_refit_sbatch.sh", "test_nvshmem_refit.sh"
SMALL = ["--model", "tiny", "--num-layers=1", "--moe-layer-freq=1", "--vocab-size=512", "--num-benchmark-iterations=2"]
ONE_TO_TWO = ["--refit-method", "gloo", "--rl-inference-expert-model-parallel-size", "2"]  # 1 + 2 ranks


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has GPUs")
def test_without_slurm_and_gpus_ranks_run_on_cpus_and_it_says_so(shell: Shell) -> None:
    flags = [*SMALL, "--refit-method", "nvshmem", "--refit-mode", "collocated", "--tensor-model-parallel-size", "2"]
    code, output = shell.run(SINGLE, *flags, "--rl-inference-tensor-model-parallel-size", "1", "--run-name", "mine")
    assert code == 0, output
    assert "There is no GPU here" in output.splitlines()[0]
    assert "World size: 2 (using 2 GPUs)" in output
    assert (shell.cwd / "benchmark_results" / "mine.log").read_text() in output
    code, output = shell.run(SINGLE, *flags, "--run-name", "mine")
    assert (code, "choose another --run-name" in output) == (2, True), "results are never written over"


@pytest.mark.slow
def test_on_one_node_a_failure_is_told_in_our_words(shell: Shell) -> None:
    flags = ["--model-provider=math:sqrt", "--refit-method=gloo", "--output-dir=out", "--run-name=broken"]
    code, output = shell.run(SINGLE, *flags)
    assert code == 4, output
    assert output.splitlines()[-1].startswith("broken: ")
    failed = re.search(r"FAILED: rank ([01])\b", output.splitlines()[-1])
    assert failed, output
    assert "TypeError" in output, "what failed in the user's own code"
    assert not re.search("ChildFailedError|torch/distributed/(run|elastic)", output)
    logs = shell.cwd / "out" / "broken_ranks" / "node0"
    # The other rank may have been ended before it wrote anything: what is empty is not kept.
    assert {path.name for path in logs.iterdir()} <= {"rank0.err", "rank1.err"}
    assert "TypeError" in (logs / f"rank{failed[1]}.err").read_text()


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has GPUs")
def test_a_model_too_large_for_the_cpus_starts_no_rank(shell: Shell) -> None:
    """The README's line, on a machine without GPUs."""
    sizes = ["--tensor-model-parallel-size", "8", "--expert-model-parallel-size", "8"]
    sizes += ["--rl-inference-tensor-model-parallel-size", "8", "--rl-inference-expert-model-parallel-size", "4"]
    code, output = shell.run(SINGLE, "--model", "kimi_k2", *sizes, "--refit-method", "nvshmem")
    assert (code, len(output.splitlines())) == (2, 1), output
    assert output.startswith("error: ranks on the CPUs of this machine need too much: ")
    assert re.search(r"[\d,.]+ GB of memory > [\d,.]+ GB free, about [\d,.]+ hours > 1", output)
    assert "--dry-run, or run --model tiny" in output
    assert [path.name for path in shell.cwd.iterdir()] == ["site.env"]


@pytest.mark.slow
def test_in_an_allocation_with_a_task_per_gpu_slurm_numbers_the_ranks(job: Shell) -> None:
    del job.environ["STANDIN_NODE"]
    flags = ["--refit-method=gloo", "--refit-mode=collocated", "--rl-inference-expert-model-parallel-size=2"]
    slurm = {"SLURM_JOB_ID": job_with_a_free_port(step=0), "SLURM_GPUS_ON_NODE": "1"}
    code, output = job.run(SINGLE, *SMALL, *flags, **slurm, REFIT_TASKS="gpu")
    assert code == 0, output
    (call,) = job.calls("srun")
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(call)
    assert "World size: 2 (using 2 GPUs)" in output
    assert output.splitlines()[-1].endswith("elements wrong")


def test_what_does_not_fit_costs_no_step(job: Shell) -> None:
    code, output = job.run(SINGLE, *SMALL, *ONE_TO_TWO, "--tensor-model-parallel-size", "4")
    assert code == 2
    assert output.startswith("error: 4 + 8 = 12 GPUs needed > 4 available")
    assert not job.calls("srun")


@pytest.mark.parametrize(("name", "expected"), [("good", 0), ("wrong", 1), ("crash", 4)])
def test_the_exit_code_is_that_of_the_result(job: Shell, name: str, expected: int) -> None:
    code, output = job.run(SINGLE, *SMALL, *ONE_TO_TWO, "--run-name", name, "--output-dir=the results")
    assert code == expected, output
    content = json.loads((job.cwd / "the results" / f"{name}.json").read_text())
    assert content["exit_code"] == expected
    assert (job.cwd / "the results" / f"{name}_ranks").exists() == (name == "crash")


@pytest.mark.slow
def test_too_long_and_cancelled_runs_are_recorded(job: Shell) -> None:
    flags = [*SMALL, *ONE_TO_TWO, "--run-name"]
    code, output = job.run(SINGLE, *flags, "hang1", REFIT_SCENARIO_TIMEOUT="5")
    assert (code, output.splitlines()[-1].rpartition(": ")[2]) == (4, "timed out after 5 s")
    process = job.start(SINGLE, *flags, "hang2")
    assert process.stdout is not None
    read_until(process.stdout.readline, "stub node node 0 of")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert (process.returncode, output.splitlines()[-1].rpartition(": ")[2]) == (143, "cancelled")


def test_a_dry_run_starts_nothing(job: Shell) -> None:
    code, output = job.run(SINGLE, *SMALL, *ONE_TO_TWO, "--dry-run")
    assert code == 0, output
    assert not job.calls("srun")
    assert not (job.cwd / "benchmark_results").exists()


@pytest.mark.parametrize(
    ("name", "expected", "word"), [("good", 0, "PASS"), ("wrong", 1, "FAIL"), ("crash", 1, "FAIL")]
)
def test_the_smoke_test_ends_in_a_line_that_says_it(job: Shell, name: str, expected: int, word: str) -> None:
    code, output = job.run(SMOKE, "--run-name", name, SLURM_GPUS_ON_NODE="8")
    assert code == expected, output
    assert output.splitlines()[-1].startswith(f"{word}: Config 1, {name}: ")
    (call,) = job.calls("srun")
    assert call[call.index("--refit-method") + 1] == "nvshmem"


def test_the_smoke_test_shares_one_gpu_where_it_is_told_to(job: Shell) -> None:
    code, output = job.run(SMOKE, "--one-gpu", "--run-name", "good", SLURM_GPUS_ON_NODE="1")
    assert code == 0, output
    assert output.splitlines()[-1].startswith("PASS: One GPU, good: ")
    (call,) = job.calls("srun")
    scenario = parse(call[call.index("--tensor-model-parallel-size") :]).scenario
    assert (scenario.method, scenario.ranks_per_gpu, scenario.num_ranks) == ("cuda-ipc", 2, 2)
    node = call.index("node")
    assert call[node + 2 : node + 4] == ["1", "2"]


@pytest.mark.parametrize(
    ("arguments", "gpus_of_a_node", "expected"),
    [
        ((), "1", "needs 6 GPUs, 2 are here"),
        (("--minimal",), "1", "needs 3 GPUs, 2 are here"),
        (("--one-gpu",), "0", "needs a GPU, 0 are here"),
    ],
)
def test_the_smoke_test_is_waived_without_gpus_and_never_runs_on_cpus(
    job: Shell, arguments: tuple[str, ...], gpus_of_a_node: str, expected: str
) -> None:
    code, output = job.run(SMOKE, *arguments, SLURM_GPUS_ON_NODE=gpus_of_a_node)
    assert code == 3, output
    assert output.startswith("WAIVED: ")
    assert expected in output
    assert not job.calls("srun")


def test_a_job_finds_the_checkout_from_its_spool_folder(job: Shell) -> None:
    spool = job.cwd / "slurm_script"
    shutil.copy(ROOT / SINGLE, spool)
    command = f"{ROOT / SINGLE} --output-dir /some where/else"
    code, output = job.run(spool, "--dry-run", *SMALL, *ONE_TO_TWO, STANDIN_COMMAND=command)
    assert code == 0, output
    code, output = job.run(spool, "--dry-run", *SMALL, *ONE_TO_TWO, SLURM_SUBMIT_DIR=str(ROOT))
    assert code == 0, output
    code, output = job.run(spool, "--dry-run", *SMALL, *ONE_TO_TWO)
    assert code == 2
    assert "set REFIT_ROOT" in output
