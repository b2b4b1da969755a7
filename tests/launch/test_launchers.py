"""Launchers: the command that starts the ranks of a scenario, from what is known of the machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from refit.config.registry import LAUNCHERS, load
from refit.errors import UsageError
from refit.launch.base import ROOT, Job, Launcher

ALLOCATION = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NUM_NODES": "2"}


class TwoNodes:
    """A host whose scontrol knows two nodes."""

    def run(self, words: Sequence[str], log: Path, timeout_s: int) -> int:
        raise AssertionError(words)

    def output(self, words: Sequence[str]) -> tuple[int, str]:
        assert words == ["scontrol", "show", "hostnames", "n[1-2]"]
        return 0, "n1\nn2\n"


def launcher(name: str, **environ: str) -> Launcher:
    made: Launcher = load(LAUNCHERS[name].launcher)(TwoNodes(), environ)
    return made


def job(folder: Path, nodes: int = 1, ranks_per_node: int = 4) -> Job:
    return Job(nodes, ranks_per_node, folder / "out/logs/run_a", ("--model=tiny",))


def test_this_machine_starts_its_ranks_with_refit_run(tmp_path: Path) -> None:
    words = launcher("local", REFIT_NVSHMEM_LIBRARY="/lib/nvshmem/host.so.3", LD_LIBRARY_PATH="/x").command(
        job(tmp_path)
    )
    start = [sys.executable, "-m", "refit", "run", "--start", "spawn", "--nproc-per-node", "4", "--model=tiny"]
    assert list(words[-len(start) :]) == start
    assert {
        "OMP_NUM_THREADS=1",
        f"PET_LOG_DIR={tmp_path}/out/logs/run_a_ranks/node0",
        "LD_PRELOAD=/lib/nvshmem/host.so.3",
        "LD_LIBRARY_PATH=/lib/nvshmem:/x",
    } <= set(words)
    with pytest.raises(UsageError, match="2 nodes needed, this is one machine"):
        launcher("local").command(job(tmp_path, nodes=2))


def test_slurm_starts_a_step_on_the_first_nodes(tmp_path: Path) -> None:
    words = launcher("slurm", **ALLOCATION, REFIT_SRUN_ARGS="--mpi=none -v", REFIT_PYTHON="py").command(job(tmp_path))
    assert words[:3] == ["env", "MASTER_ADDR=n1", "srun"]
    assert {"--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--nodelist=n1", "--cpu-bind=none"} <= set(words)
    ranks = [str(ROOT / "scripts/node.sh"), "node", "py", "1", "4", f"{tmp_path}/out/logs/run_a_ranks", "--model=tiny"]
    assert list(words[-9:]) == ["--mpi=none", "-v", *ranks]


@pytest.mark.parametrize(
    "environ", [{"SLURM_NTASKS_PER_NODE": "8"}, {"SLURM_NTASKS": "16"}, {"REFIT_TASKS": "gpu"}], ids=str
)
def test_slurm_starts_a_task_per_gpu_where_the_allocation_has_them(tmp_path: Path, environ: dict[str, str]) -> None:
    words = launcher("slurm", **ALLOCATION, **environ).command(job(tmp_path, nodes=2))
    assert {"--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--nodelist=n1,n2", "gpu"} <= set(words)
    assert "--cpu-bind=none" not in words
    assert "node" in launcher("slurm", **ALLOCATION, **environ).command(job(tmp_path, ranks_per_node=1))


def test_slurm_runs_ranks_in_the_sites_container(tmp_path: Path) -> None:
    site = {"REFIT_CONTAINER_IMAGE": "refit.sqsh", "REFIT_CONTAINER_MOUNTS": "/data:/data"}
    words = launcher("slurm", **ALLOCATION, **site).command(job(tmp_path))
    mounts = f"--container-mounts=/data:/data,{ROOT}:{ROOT},{tmp_path}/out:{tmp_path}/out"
    assert {"--container-image=refit.sqsh", mounts, f"--container-workdir={ROOT}"} <= set(words)


@pytest.mark.parametrize(
    ("environ", "nodes", "message"),
    [
        (ALLOCATION, 3, "3 nodes needed, the allocation has 2"),
        ({}, 1, "SLURM_JOB_NODELIST is not set"),
        ({**ALLOCATION, "SLURM_NTASKS": "a[0]"}, 2, "SLURM_NTASKS must be a whole number, not 'a\\[0\\]'"),
    ],
)
def test_slurm_says_what_is_missing(tmp_path: Path, environ: dict[str, str], nodes: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        launcher("slurm", **environ).command(job(tmp_path, nodes=nodes))
