"""benchmark_refit_kimi_k2.sh: what it asks of Slurm, and what is left when scenarios fail, hang or are cancelled."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
from pathlib import Path

import pytest

from tests.ranks.ports import job_with_a_free_port
from tests.ranks.waiting import wait_until
from tests.shell.conftest import ROOT, Shell

KIMI = "benchmark_refit_kimi_k2.sh"
SMALL = {"model": "tiny", "num-layers": 1, "moe-layer-freq": 1, "vocab-size": 512, "num-benchmark-iterations": 2}


def scenarios(folder: Path, *lines: str) -> list[str]:
    """Arguments that choose these CONFIGS lines, with a model of one layer."""
    path = folder / "own scenarios.yaml"
    path.write_text(json.dumps({"title": "Own", "defaults": SMALL, "scenarios": lines}))
    return ["--scenarios", str(path)]


def line(name: str, sizes: str = "2:1:1:2", mode: str = "collocated") -> str:
    return f"{sizes}:{mode}:gloo:{name}"


@pytest.mark.slow
def test_scenarios_run_in_turn_and_the_rest_outlive_what_fails(job: Shell) -> None:
    lines = [
        line("good"),
        line("crash"),
        line("wrong"),
        line("wide", "1:2:2:1", "non-collocated"),
        line("large", "8:1:4:1"),
    ]
    code, output = job.run(KIMI, *scenarios(job.cwd, *lines))
    assert code == 1, output  # wrong data outweighs failures
    summary = job.only("*_77_summary.txt").read_text()
    verdicts = dict(
        re.findall(r"^Config: (\w+)\n(?:.*\n)*?(?=.*?(PASSED|FAILED|REFUSED|WRONG))", summary, re.MULTILINE)
    )
    assert verdicts == {"good": "PASSED", "crash": "FAILED", "wrong": "WRONG", "wide": "PASSED", "large": "REFUSED"}
    assert "ended with exit code 1: boom" in summary
    assert "8 GPUs needed > 4 available" in summary
    assert job.only("*_crash_ranks/node0/rank0.err").read_text() == "boom\n"
    assert len(job.calls("srun")) == 4, "a refused scenario takes no GPU"
    assert summary.strip() in output


@pytest.mark.slow
def test_a_scenario_takes_the_first_nodes_it_needs(job: Shell) -> None:
    code, output = job.run(KIMI, *scenarios(job.cwd, line("one"), line("two", "1:2:2:1", "non-collocated")))
    assert code == 0, output
    one, two = job.calls("srun")
    assert {"--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--nodelist=localhost", "--kill-on-bad-exit=1"} <= set(
        one
    )
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=localhost,127.0.0.1"} <= set(two)
    assert "stub node node 1 of" in job.only("*_two.log").read_text()


@pytest.mark.parametrize(
    ("environ", "form", "ntasks"),
    [
        ({"SLURM_NTASKS_PER_NODE": "8"}, "gpu", 4),
        ({"SLURM_NTASKS_PER_NODE": "8", "REFIT_TASKS": "node"}, "node", 2),
        pytest.param({"REFIT_TASKS": "gpu"}, "gpu", 4, marks=pytest.mark.slow),
    ],
)
def test_a_task_per_node_or_per_gpu(job: Shell, environ: dict[str, str], form: str, ntasks: int) -> None:
    code, output = job.run(KIMI, *scenarios(job.cwd, line("two", "1:2:2:1", "non-collocated")), **environ)
    assert code == 0, output
    (call,) = job.calls("srun")
    assert f"--ntasks={ntasks}" in call
    assert call[call.index(str(ROOT / "scripts/node.sh")) + 1] == form


def test_a_container_holds_the_steps_and_the_decisions(job: Shell) -> None:
    code, output = job.run(
        KIMI,
        *scenarios(job.cwd, line("one")),
        REFIT_CONTAINER_IMAGE="refit.sqsh",
        REFIT_CONTAINER_MOUNTS="/data:/data",
        REFIT_SRUN_ARGS="--mpi=none",
    )
    assert code == 0, output
    calls = job.calls("srun")
    results = job.cwd / "benchmark_results" / "kimi_k2"
    for call in calls:
        assert "--container-image=refit.sqsh" in call
        assert f"--container-mounts=/data:/data,{ROOT}:{ROOT},{results}:{results}" in call
    decisions = [call for call in calls if "--overlap" in call]
    assert len(decisions) == len(calls) - 1
    assert all("--mpi=none" not in call for call in decisions)
    assert "--mpi=none" in next(call for call in calls if "--overlap" not in call)


@pytest.mark.slow
def test_a_loop_in_a_container_is_cancelled_and_gone_on_with(job: Shell) -> None:
    """The loop runs in a step there, which Slurm may end at any time; this script starts the ranks and ends them."""
    environ = {"REFIT_CONTAINER_IMAGE": "refit.sqsh"}
    process = job.start(KIMI, *scenarios(job.cwd, line("good"), line("hang"), line("last")), **environ)
    wait_until(lambda: any("stub" in path.read_text() for path in job.logs.glob("*_hang.log")))
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 143, output
    assert "Cancelled during hang" in output
    assert "it was not started" in job.only("*_summary.txt").read_text()
    (job.cwd / "repaired").touch()
    run_id = job.only("*_sweep.json").name.removesuffix("_sweep.json")
    code, output = job.run(KIMI, "--resume", run_id, **environ)
    assert code == 0, output
    assert re.findall(r"^\[\d/2\] (\w+):", output, re.MULTILINE) == ["hang", "last"]
    assert not [path.name for path in job.logs.iterdir() if path.name.startswith(".") or path.suffix == ".lock"]


@pytest.mark.slow
def test_a_scenario_that_takes_too_long_is_ended(job: Shell) -> None:
    """What comes after it crashes, which is quick on any machine: the limit is for it too."""
    code, output = job.run(KIMI, *scenarios(job.cwd, line("hang"), line("crash")), "--timeout", "5")
    assert code == 4, output
    assert re.search(r"^hang: .*: FAILED: phase 'refit iteration 1: wire': timed out after 5 s$", output, re.MULTILINE)
    assert re.search(r"^crash: .*: FAILED: .*boom$", output, re.MULTILINE)


@pytest.mark.parametrize("send", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_cancelled_half_way_and_gone_on_with(job: Shell, send: signal.Signals) -> None:
    arguments = scenarios(job.cwd, line("good"), line("hang"), line("last"))
    process = job.start(KIMI, *arguments)
    wait_until(lambda: any("stub" in path.read_text() for path in job.logs.glob("*_hang.log")))
    process.send_signal(send)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 143, output
    summary = job.only("*_summary.txt").read_text()
    assert "FAILED: phase 'refit iteration 1: wire': cancelled" in summary
    assert "it was not started" in summary
    run_id = job.only("*_sweep.json").name.removesuffix("_sweep.json")
    hint = re.search(r"^Go on with: (.*)$", output, re.MULTILINE)
    assert hint is not None, output
    program, *words = shlex.split(hint[1])
    assert (Path(program).name, words[-2:]) == (Path(KIMI).name, ["--resume", run_id])
    (job.cwd / "repaired").touch()
    code, output = job.run(KIMI, *words, SLURM_JOB_ID="78")
    assert code == 0, output
    names = sorted(path.name.removeprefix(f"{run_id}_") for path in job.logs.glob("*.log"))
    assert names == ["good.log", "hang.2.log", "hang.log", "last.log"], "what had a result is not run again"
    assert json.loads(job.only("*_sweep.json").read_text())["jobs"] == ["77", "78"]


@pytest.mark.slow
def test_only_what_failed_is_run_again_beside_the_first_attempt(job: Shell) -> None:
    code, _ = job.run(KIMI, *scenarios(job.cwd, line("good"), line("crash")))
    assert code == 4
    run_id = job.only("*_sweep.json").name.removesuffix("_sweep.json")
    (job.cwd / "repaired").touch()
    code, output = job.run(KIMI, "--resume", run_id, "--only", "failed")
    assert code == 0, output
    assert sorted(path.name for path in job.logs.glob("*.log")) == [
        f"{run_id}_{name}.log" for name in ("crash.2", "crash", "good")
    ]


@pytest.mark.slow
def test_runs_are_repeated_in_turn(job: Shell) -> None:
    code, output = job.run(KIMI, *scenarios(job.cwd, line("a"), line("b")), "--num-runs", "2")
    assert code == 0, output
    assert re.findall(r"^\[\d/4\] (\w+):", output, re.MULTILINE) == ["a_run1", "b_run1", "a_run2", "b_run2"]
    summary = job.only("*_summary.txt").read_text()
    assert re.search(
        r"^a over [a-z]+: 2\.00 ms, median of 2 runs \(2\.00, 2\.00\), spread 0\.0 %", summary, re.MULTILINE
    )
    code, output = job.run(KIMI, *scenarios(job.cwd, line("a")), "--num-runs", "x[$(touch y)]")
    assert (code, "--num-runs must be a whole number from 1 to 500" in output) == (2, True), output


def test_an_array_runs_what_is_ready_and_sums_up_after_all(shell: Shell) -> None:
    environ = {
        "REFIT_ACCOUNT": "science",
        "REFIT_PARTITION": "gpus",
        "SLURM_JOB_NODELIST": "localhost,127.0.0.1",
        "SLURM_GPUS_ON_NODE": "8",
        "STANDIN_NODE": str(ROOT / "tests/shell/bin/stub_node"),
    }
    lines = [line("large", "64:1:64:1"), line("good"), line("crash")]
    arguments = [
        *scenarios(shell.cwd, *lines),
        "--submit",
        "--array",
        "--throttle",
        "1",
        "--nodes",
        "2",
        "--timeout",
        "50",
    ]
    code, output = shell.run(KIMI, *arguments, **environ)
    assert code == 0, output
    array, summary = shell.calls("sbatch")
    assert {"--account=science", "--partition=gpus", "--array=0-1%1", "--nodes=2"} <= set(array)
    assert array[-2:] == ["good", "crash"], "what was refused takes no job"
    assert {"--account=science", "--dependency=afterany:101", "--nodes=1"} <= set(summary)
    assert (shell.cwd / "job_101_0.out").read_text().endswith("exit code 0\n")
    assert (shell.cwd / "job_101_1.out").read_text().endswith("exit code 1\n")
    assert (shell.cwd / "job_102_0.out").read_text().endswith("exit code 4\n")
    text = shell.only("*_summary.txt").read_text()
    assert "Job ID: 101" in text
    assert "3 scenarios: 1 ok, 1 failed, 1 refused" in text


@pytest.mark.slow
def test_submit_passes_everything_on_to_a_job_that_finds_the_checkout(shell: Shell) -> None:
    environ = {"SLURM_JOB_NODELIST": "localhost,127.0.0.1", "SLURM_GPUS_ON_NODE": "2"}
    environ |= {"STANDIN_NODE": str(ROOT / "tests/shell/bin/stub_node"), "REFIT_PARTITION": "gpus"}
    arguments = [*scenarios(shell.cwd, line("good")), "--output-dir", "elsewhere", "--nodes", "2"]
    code, output = shell.run(KIMI, "--submit", *arguments, "--", "--num-benchmark-warmup", "1", **environ)
    assert (code, output) == (0, "Submitted batch job 101\n")
    (call,) = shell.calls("sbatch")
    assert call[:3] == ["--partition=gpus", "--nodes=2", str(ROOT / KIMI)]
    assert call[-3:] == ["--", "--num-benchmark-warmup", "1"]
    printed = (shell.cwd / "job_101_0.out").read_text()
    assert printed.endswith("exit code 0\n"), printed
    assert list((shell.cwd / "elsewhere" / "logs").glob("*_101_summary.txt"))


@pytest.mark.slow
def test_the_plan_needs_no_slurm_and_writes_nothing(shell: Shell) -> None:
    code, output = shell.run(KIMI, "--dry-run", REFIT_ACCOUNT="science", REFIT_CLUSTER="h100_ib400", SEQ_LENGTH="2048")
    assert code == 0, output
    assert "7 ready" in output
    assert "64 + 32 = 96" in output
    assert "--account=science" in output.splitlines()[-1]
    assert [path.name for path in shell.cwd.iterdir()] == ["site.env"]


def test_a_layout_without_room_is_refused_in_the_plan(shell: Shell) -> None:
    code, output = shell.run(
        KIMI, "--dry-run", *scenarios(shell.cwd, line("good"), line("large", "32:1:1:1")), "--nodes", "1"
    )
    assert code == 2
    assert "1 ready, 1 refused" in output


def test_nothing_is_offered_for_submission_where_nothing_fits(shell: Shell) -> None:
    code, output = shell.run(KIMI, "--dry-run", *scenarios(shell.cwd, line("large", "8:2:8:1")), "--nodes", "1")
    assert code == 2
    assert re.search(r"ask for \d+ nodes of 8 \(--nodes \d+;", output.replace("\n", " ")), output
    assert output.splitlines()[-1] == "Nothing to submit: no scenario is ready, for the reasons above"


def test_a_job_that_may_end_too_early_is_told(shell: Shell) -> None:
    three = scenarios(shell.cwd, *(line(name, "4:2:2:4") for name in "abc"))
    code, output = shell.run(KIMI, "--dry-run", *three, "--timeout", "1800", "--num-runs", "2")
    assert code == 0
    note = "3 scenarios, 2 times each, of at most 1800 s may take 10800 s; the job ends after 7200 s"
    assert output.splitlines()[-1] == f"Note: {note}: give sbatch --time=181, or --timeout 1200"
    code, output = shell.run(KIMI, "--dry-run", *three, "--timeout", "1200", "--num-runs", "2")
    assert "the job ends" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no Slurm allocation here: sbatch benchmark_refit_kimi_k2.sh, or --submit"),
        (("--dry-rum",), "unknown option --dry-rum"),
        (("--timeout",), "--timeout needs a value"),
        (("--dry-run", "--timeout", "soon"), "--timeout must be a whole number from 1 to 31536000, not soon"),
        (("--dry-run", "--only", "failed"), "goes with --resume RUN_ID"),
        (("--throttle", "2", "--submit"), "--throttle goes with --array"),
        (("--submit", "--", "--dry-run"), "--dry-run goes before --"),
        (("--submit", "--resume", "x", "--model", "tiny"), "leave all others out"),
        (("--dry-run", "--", "--num-gpus", "4"), "--num-gpus cannot be given to a sweep's scenarios"),
        (("--dry-run", "--scenarios", "timy"), "did you mean tiny?"),
    ],
)
def test_what_cannot_be_honoured_is_one_line(shell: Shell, arguments: tuple[str, ...], message: str) -> None:
    code, output = shell.run(KIMI, *arguments)
    assert code == 2, output
    assert output.startswith("error: ")
    assert message in output
    assert len(output.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [("--dry-run", "--submit"), ("--submit", "--dry-run", "--array"), ("--dry-run", "--local")]
)
def test_a_dry_run_always_wins(shell: Shell, arguments: tuple[str, ...]) -> None:
    code, output = shell.run(KIMI, *arguments, "--scenarios", "tiny")
    assert code == 0, output
    action = next(word for word in arguments if word in ("--submit", "--local"))
    assert output.splitlines()[0] == f"Dry run: {action} is left out, nothing is started or submitted."
    assert "7 ready" in output
    assert not shell.calls("sbatch")
    assert [path.name for path in shell.cwd.iterdir()] == ["site.env"]


@pytest.mark.parametrize("array", [(), ("--array",)])
def test_submit_without_slurm_is_refused_before_anything_is_written(shell: Shell, array: tuple[str, ...]) -> None:
    programs = shell.cwd.parent / "bin"  # this machine may have a Slurm of its own in /usr/bin
    programs.mkdir()
    for name in ("bash", "env", "dirname", "readlink", "realpath", "mkdir", "sed"):
        (programs / name).symlink_to(str(shutil.which(name)))
    code, output = shell.run(KIMI, "--submit", *array, "--scenarios", "tiny", PATH=str(programs))
    assert (code, len(output.splitlines())) == (2, 1), output
    assert output.startswith("error: --submit needs sbatch, which is not on PATH: call it on a login node")
    assert "--local" in output
    assert [path.name for path in shell.cwd.iterdir()] == ["site.env"]


def test_a_refused_submission_leaves_no_sweep(shell: Shell) -> None:
    programs = shell.cwd / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2\nexit 1\n")
    (programs / "sbatch").chmod(0o755)
    arguments = scenarios(shell.cwd, line("good"))
    code, output = shell.run(KIMI, "--submit", "--array", *arguments, PATH=f"{programs}:{shell.environ['PATH']}")
    assert code == 2, output
    assert "sbatch: error: invalid account\nerror: sbatch refused the job array" in output
    assert not list(shell.logs.iterdir())


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine has GPUs")
def test_a_list_too_large_for_the_cpus_starts_no_rank(shell: Shell) -> None:
    arguments = scenarios(shell.cwd, line("large", "2:2:2:1", "non-collocated"))
    code, output = shell.run(KIMI, "--local", *arguments, "--model", "kimi_k2", "--", "--num-layers=61")
    assert code == 4, output
    assert "large refused: ranks on the CPUs of this machine need too much: " in output
    assert not list(shell.logs.glob("*.log"))


def test_help_needs_nothing(shell: Shell) -> None:
    for script in (KIMI, "benchmark_refit_sbatch.sh", "test_nvshmem_refit.sh"):
        code, output = shell.run(script, "--help", REFIT_PYTHON="/nowhere/python")
        assert code == 0
        assert output.startswith("usage: ")


@pytest.mark.slow
def test_a_real_sweep_over_two_nodes(job: Shell) -> None:
    """One torchrun on each of two nodes, with one rank each."""
    del job.environ["STANDIN_NODE"]
    slurm = {"SLURM_JOB_ID": job_with_a_free_port(step=0), "SLURM_GPUS_ON_NODE": "1"}
    code, output = job.run(KIMI, *scenarios(job.cwd, line("two")), **slurm)
    assert code == 0, output
    assert "Verification: PASSED" in job.only("*_summary.txt").read_text()
    assert "World size: 2 (using 2 GPUs)" in job.only("*_two.log").read_text()
    assert not list(job.logs.glob("*_ranks")), "ranks' logs are kept only where they explain a failure"
