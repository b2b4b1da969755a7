"""Determines this process's rank and checks that enough ranks have been started, before anything is built.

`python -m refit.cli.launch` prints the port of a Slurm step's rendezvous.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping, Sequence

from refit.cli.invocation import ranks_command
from refit.config.scenario import Scenario, check_num_ranks
from refit.errors import UsageError
from refit.predict.cpus import is_on_cpus
from refit.report.terminal.console import show

FIRST_PORT, NUM_PORTS = 12000, 16000
"""Ports for the rendezvous of a Slurm step. Linux assigns its own ports from 32768 on."""


def rank_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that torchrun would have set, for a task of `srun`; empty for any other process.

    `srun` sets SLURM_PROCID, SLURM_LOCALID and the SLURM_STEP_* variables (its manual, "OUTPUT ENVIRONMENT VARIABLES").
    A batch script's own process has a SLURM_PROCID too, but no step, and is one process whatever SLURM_NTASKS says.
    Raises UsageError where neither MASTER_ADDR nor Slurm gives the first node's name.
    """
    num_tasks = (
        environ.get("SLURM_STEP_NUM_TASKS") or ("SLURM_STEP_ID" in environ and environ.get("SLURM_NTASKS")) or "1"
    )
    if "RANK" in environ or "SLURM_PROCID" not in environ or int(num_tasks) < 2:
        return {}
    tasks_per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", num_tasks)
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": num_tasks,
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "LOCAL_WORLD_SIZE": str(_tasks_of_each_node(tasks_per_node)[int(environ.get("SLURM_NODEID", "0"))]),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_host(environ),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(rendezvous_port(environ)),
    }


def _tasks_of_each_node(text: str) -> list[int]:
    """`8(x2),4` as [8, 8, 4]."""
    counts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in counts for _ in range(int(times or 1))]


def _first_host(environ: Mapping[str, str]) -> str:
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    if "[" not in nodes and nodes:
        return nodes.split(",")[0]
    try:
        command = ["scontrol", "show", "hostnames", nodes]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        raise UsageError(
            f"MASTER_ADDR is not set and `scontrol show hostnames {nodes}` does not say which node is first: "
            "export MASTER_ADDR=<first node> before srun"
        ) from None


def rendezvous_port(environ: Mapping[str, str]) -> int:
    """The same port on every task of a step. Steps of a job get different ports; so do most jobs on the same nodes."""
    job, step = environ.get("SLURM_JOB_ID", "0"), environ.get("SLURM_STEP_ID", "0")
    return FIRST_PORT + (int(job) * 131 + int(step)) % NUM_PORTS


def check_launch(scenario: Scenario, environ: Mapping[str, str], gpus_per_node: int, words: Sequence[str]) -> None:
    """Raise UsageError unless enough ranks have been started, going by the variables that torchrun sets.

    `words` are the scenario's flags, for the command that starts enough.
    """
    needed, has_ranks = scenario.num_ranks, "RANK" in environ and "WORLD_SIZE" in environ
    if has_ranks and needed <= int(environ["WORLD_SIZE"]):
        return
    ranks_per_node = needed if is_on_cpus(scenario) else gpus_per_node * scenario.ranks_per_gpu
    start = ranks_command(needed, ranks_per_node, words)
    if has_ranks:
        check_num_ranks(scenario, int(environ["WORLD_SIZE"]), f"start {needed} ranks: {start}")
    raise UsageError(
        f"no ranks have been started, {needed} are needed (--dry-run plans without them): start them with {start}"
    )


if __name__ == "__main__":
    show(str(rendezvous_port(os.environ)))
