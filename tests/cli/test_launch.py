"""What a task that Slurm started knows of its place, as torchrun would have told it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore

from refit.bench.session import device_for, launched
from refit.cli.launch import check_launch, rank_variables
from refit.cli.main import main
from refit.cli.parsing import parse
from refit.config.scenario import Scenario, check_num_ranks
from refit.errors import UnavailableError, UsageError
from refit.predict import cpus
from refit.transport.ranks import Ranks
from tests.cli.lines import SMALL, TWO_HEADS, scenario, sizes
from tests.ranks.ports import job_with_a_free_port

ROOT = Path(__file__).resolve().parents[2]
ALONE = Ranks(0, 1, HashStore(), ("here",))

TASK = {
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "3",
    "SLURM_NTASKS": "12",
    "SLURM_STEP_NUM_TASKS": "12",
    "SLURM_STEP_TASKS_PER_NODE": "8,4",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[01-08]",
}


def fake_scontrol(directory: Path, monkeypatch: pytest.MonkeyPatch, answer: str = "gpu07\\ngpu08") -> Path:
    """A `scontrol` on PATH that prints `answer` and leaves its arguments in a file."""
    directory.mkdir(exist_ok=True)
    seen, program = directory / "arguments", directory / "scontrol"
    program.write_text(f"#!/bin/sh\necho \"$@\" > '{seen}'\nprintf '{answer}\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{directory}{os.pathsep}{os.environ['PATH']}")
    return seen


def test_a_task_learns_its_rank_and_where_to_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = fake_scontrol(tmp_path, monkeypatch)
    found = rank_variables(TASK)
    port = found.pop("MASTER_PORT")
    assert found == {
        "RANK": "9",
        "WORLD_SIZE": "12",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
    }
    assert 1024 < int(port) < 32768
    assert seen.read_text().split() == ["show", "hostnames", "gpu[07-08]"]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**TASK, "RANK": "0", "WORLD_SIZE": "8"},
        {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
        # A batch script's own process: no step, whatever the job's tasks.
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_LOCALID": "0", "SLURM_JOB_NODELIST": "gpu[01-02]"},
    ],
)
def test_other_processes_are_left_as_they_are(environ: dict[str, str]) -> None:
    assert rank_variables(environ) == {}


@pytest.mark.parametrize(
    ("tasks_per_node", "node", "expected"),
    [("8(x12)", 11, "8"), ("8(x2),4", 1, "8"), ("8(x2),4", 2, "4"), ("3,5(x2),1", 2, "5"), ("6", 0, "6")],
)
def test_tasks_of_each_node(tasks_per_node: str, node: int, expected: str) -> None:
    environ = {**TASK, "SLURM_STEP_TASKS_PER_NODE": tasks_per_node, "SLURM_NODEID": str(node), "MASTER_ADDR": "gpu07"}
    assert rank_variables(environ)["LOCAL_WORLD_SIZE"] == expected


def test_what_is_set_already_stays() -> None:
    found = rank_variables({**TASK, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "4711"})
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("10.0.0.7", "4711")


def test_one_node_needs_no_scontrol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert rank_variables({**TASK, "SLURM_STEP_NODELIST": "gpu07"})["MASTER_ADDR"] == "gpu07"
    job_only = {key: value for key, value in TASK.items() if key != "SLURM_STEP_NODELIST"}
    assert rank_variables({**job_only, "SLURM_JOB_NODELIST": "gpu3,gpu9"})["MASTER_ADDR"] == "gpu3"


def test_without_scontrol_the_variable_to_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "")
        with pytest.raises(UsageError, match=r"MASTER_ADDR is not set and `scontrol show hostnames gpu\[07-08\]`"):
            rank_variables(TASK)
    fake_scontrol(tmp_path, monkeypatch, answer="")
    with pytest.raises(UsageError, match="export MASTER_ADDR"):
        rank_variables(TASK)


def test_ports_of_neighbouring_steps_and_jobs_differ() -> None:
    ports = {
        rank_variables({**TASK, "MASTER_ADDR": "a", "SLURM_JOB_ID": job, "SLURM_STEP_ID": str(step)})["MASTER_PORT"]
        for job in range(4200, 4230)
        for step in range(20)
    }
    assert len(ports) == 30 * 20


@pytest.mark.slow
def test_tasks_of_a_step_run_a_refit(tmp_path: Path) -> None:
    """Three processes that know nothing but Slurm's variables. The port follows from the job's number."""
    layout = ["--tensor-model-parallel-size=2", "--rl-inference-tensor-model-parallel-size=1", "--refit-method=gloo"]
    model = ["--model=tiny", "--num-layers=2", "--moe-layer-freq=1"]
    flags = [*model, *layout, "--num-benchmark-warmup=0", "--num-benchmark-iterations=1", "--timeout=100"]
    job = job_with_a_free_port(int(TASK["SLURM_STEP_ID"]))
    tasks = [
        subprocess.Popen(
            [sys.executable, ROOT / "benchmark_refit.py", *flags, f"--output-dir={tmp_path}", "--run-name=steps.2"],
            env={
                **{
                    name: value
                    for name, value in os.environ.items()
                    if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
                },
                **TASK,
                "SLURM_JOB_ID": job,
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_NODEID": "0",
                "SLURM_STEP_NUM_TASKS": "3",
                "SLURM_STEP_TASKS_PER_NODE": "3",
                "SLURM_STEP_NODELIST": "localhost",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(3)
    ]
    outputs = [task.communicate(timeout=150)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0, 0], outputs
    assert outputs[0].splitlines()[-1] == f"Result: {tmp_path / 'steps.2.json'}"
    assert "PASSED" in outputs[0]


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("SLURM_LOCALID", raising=False)
    return monkeypatch


def moved_by(*flags: str) -> Scenario:
    return parse(["--model", "tiny", "--refit-method", *flags]).scenario


def test_a_profile_of_cpus_is_refused_before_ranks_meet() -> None:
    line = "--model tiny --refit-method gloo --profile-refit"
    with (
        pytest.raises(UsageError, match="records what GPUs do, and this run is on CPUs"),
        launched(parse(line.split()).scenario, ALONE),
    ):
        pass


def test_gloo_takes_gpus_only_where_it_is_told_to(one_gpu: pytest.MonkeyPatch) -> None:
    one_gpu.setenv("SLURM_LOCALID", "3")
    assert device_for(moved_by("gloo")) == torch.device("cpu")
    assert device_for(moved_by("gloo", "--device", "cuda")) == torch.device("cuda", 0)


def test_a_task_that_sees_one_gpu_takes_it(one_gpu: pytest.MonkeyPatch) -> None:
    one_gpu.setenv("SLURM_LOCALID", "3")
    assert device_for(moved_by("nccl")) == torch.device("cuda", 0)


def test_ranks_of_torchrun_do_not_share_one_gpu(one_gpu: pytest.MonkeyPatch) -> None:
    one_gpu.setenv("SLURM_LOCALID", "0")
    with pytest.raises(UnavailableError) as refused:
        device_for(moved_by("nccl"))
    assert str(refused.value) == (
        "--refit-method nccl on GPUs needs one per rank, this machine has 1 for 4 ranks: give --ranks-per-gpu 4 with "
        "cuda-ipc, start fewer, or use --refit-method gloo or shm on CPUs"
    )


@pytest.mark.parametrize(("num_gpus", "ranks_per_gpu", "device"), [(1, 4, 0), (2, 2, 1), (2, 3, 1), (4, 2, 1)])
def test_ranks_share_gpus_where_they_are_told_to(
    one_gpu: pytest.MonkeyPatch, num_gpus: int, ranks_per_gpu: int, device: int
) -> None:
    """Local rank 3 of 4, on the fewest GPUs that suffice."""
    one_gpu.setattr(torch.cuda, "device_count", lambda: num_gpus)
    shared = moved_by("cuda-ipc", "--ranks-per-gpu", str(ranks_per_gpu))
    assert device_for(shared) == torch.device("cuda", device)


def test_ranks_that_do_not_fit_the_gpus_are_refused_with_both_numbers(one_gpu: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UnavailableError, match=r"one for each 3 ranks, this machine has 1 for 4 ranks: give --ranks-per-gpu 4"
    ):
        device_for(moved_by("cuda-ipc", "--ranks-per-gpu", "3"))


def test_ranks_on_cpus_share_no_gpu() -> None:
    on_cpus = replace(moved_by("auto", "--ranks-per-gpu", "2"), method="shm", device="cpu")
    with pytest.raises(UnavailableError, match="--ranks-per-gpu 2 places ranks on GPUs, this machine has none"):
        device_for(on_cpus)


@pytest.mark.parametrize(("ranks_per_gpu", "backend"), [(1, "cpu:gloo,cuda:nccl"), (2, "cpu:gloo,cuda:gloo")])
def test_ranks_that_share_a_gpu_get_no_nccl_group(
    one_gpu: pytest.MonkeyPatch, ranks_per_gpu: int, backend: str
) -> None:
    """NCCL is bound to a device at once, and refuses the second rank there."""
    asked: list[tuple[str, object]] = []

    def initialise(backend: str, device_id: object = None, **group: object) -> None:
        asked.append((backend, device_id))
        assert (group["rank"], group["world_size"], group["timeout"]) == (0, 1, timedelta(seconds=run.timeout_s))
        raise UsageError("far enough")

    one_gpu.setattr(torch.cuda, "device_count", lambda: 4)
    one_gpu.setattr(torch.cuda, "set_device", lambda device: None)
    one_gpu.setattr(dist, "init_process_group", initialise)
    run = moved_by("cuda-ipc", "--ranks-per-gpu", str(ranks_per_gpu))
    with pytest.raises(UsageError, match="far enough"), launched(run, ALONE):
        pass
    device = torch.device("cuda", 3) if ranks_per_gpu == 1 else None
    assert asked == [(backend, device)]


@pytest.mark.parametrize(
    ("line", "available", "message"),
    [
        (
            sizes(8, 1, 4, 1, "non-collocated", "nccl"),
            8,
            "8 + 4 = 12 GPUs needed > 8 available: lower --tensor-model-parallel-size or "
            "--rl-inference-tensor-model-parallel-size, or start 12 ranks",
        ),
        (
            sizes(4, 2, 4, 1, "collocated", "nccl"),
            4,
            "max(8, 4) = 8 GPUs needed > 4 available: lower --tensor-model-parallel-size or "
            "--expert-model-parallel-size, or start 8 ranks",
        ),
        (
            sizes(1, 1, 1, 1, "non-collocated", "nccl") + " --source-world-size 4",
            4,
            "4 + 1 = 5 GPUs needed > 4 available: lower --source-world-size, or start 5 ranks",
        ),
    ],
)
def test_too_few_ranks(line: str, available: int, message: str) -> None:
    run = scenario(f"{line} {SMALL} --moe-ffn-hidden-size 512")
    with pytest.raises(UsageError) as error:
        check_num_ranks(run, available)
    assert str(error.value) == message
    check_num_ranks(run, run.num_ranks)


@pytest.mark.parametrize("ranks_per_gpu", [1, 2])
def test_a_refused_launch_names_the_command_that_starts_enough(
    monkeypatch: pytest.MonkeyPatch, ranks_per_gpu: int
) -> None:
    """It holds every word of the line, and is taken where it is pasted."""
    monkeypatch.setattr(cpus, "has_gpu", lambda: True)
    words = f"{sizes(4, 1, 2, 1, 'non-collocated', 'cuda-ipc')} {SMALL}".split()
    words += ["--ranks-per-gpu", str(ranks_per_gpu), "--output-dir", "a folder"]
    run = parse(words).scenario
    check_launch(run, {"RANK": "0", "WORLD_SIZE": "8"}, 8, words)
    for environ in ({"RANK": "0", "WORLD_SIZE": "4"}, {}):
        for gpus_per_node, start in ((8, [sys.executable, "-m", "refit", "run"]), (4 // ranks_per_gpu, SBATCH)):
            with pytest.raises(UsageError) as error:
                check_launch(run, environ, gpus_per_node, words)
            told = shlex.split(re.split(r"start 6 ranks: |start them with ", str(error.value))[1])
            assert told[1:] == [*start[1:], *words]
            assert parse(told[len(start) :]).scenario == run


SBATCH = ["sbatch", "--nodes=2", "benchmark_refit_sbatch.sh"]


def test_ranks_that_share_gpus_are_counted_as_ranks() -> None:
    run = scenario(f"{sizes(4, 1, 2, 1, 'non-collocated', 'cuda-ipc')} {SMALL} --ranks-per-gpu 2")
    with pytest.raises(
        UsageError, match=r"4 \+ 2 = 6 ranks \(2 per GPU\) needed > 4 available: .* raise --ranks-per-gpu, or"
    ):
        check_launch(run, {"RANK": "0", "WORLD_SIZE": "4"}, 8, [])


def test_too_few_ranks_end_main_before_anything_is_built(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "refit.bench.runner", None)
    assert main(f"{TWO_HEADS} --tensor-model-parallel-size 2".split()) == 2
    assert "2 + 2 = 4 GPUs needed > 2 available" in capsys.readouterr().err
