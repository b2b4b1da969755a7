"""Whether ranks on the CPUs of a machine need more than it has: cores, memory, time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from refit import units
from refit.config.registry import AUTO, METHODS
from refit.config.scenario import Scenario
from refit.errors import UsageError
from refit.predict.dry_run import DryRun, DryRunOptions, dry_run

RANKS_PER_CORE = 8
"""On CPUs: at most so many ranks a core, or `Start.few_ranks` where the cores are few."""


@dataclass(frozen=True, slots=True)
class Start:
    """What a way of starting ranks needs: memory of Python, torch and Megatron-Core, and seconds of a core.

    `shared_bytes` and `shared_s` count once for all ranks, `rank_bytes` and `rank_s` for each, without its weights.
    """

    few_ranks: int
    shared_bytes: int
    rank_bytes: int
    shared_s: float
    rank_s: float


# Eight ranks of the tiny model, weights included: 2.30 GB spawned, 0.65 GB forked (`python -m benchmarks.start`).
SPAWNED = Start(few_ranks=64, shared_bytes=0, rank_bytes=300_000_000, shared_s=0.0, rank_s=8.0)
FORKED = Start(few_ranks=128, shared_bytes=350_000_000, rank_bytes=25_000_000, shared_s=8.0, rank_s=1.0)

ENGINE_WORKER_BYTES = 1_700_000_000
"""Of each worker of a running vLLM 0.32.0 on CPUs, with 1 GiB for its cache."""

REMEDY = "plan it with --dry-run, or run --model tiny on few ranks"

CPU_BYTES_PER_S = 100e6
MAX_CPU_RUN_S = 3600.0
"""A rough time for ranks on CPUs: that of `Start` to start and build them, then CPU_BYTES_PER_S of payload a
core and refit, verification included. Measured on 2 cores of an AMD EPYC: `benchmark_refit_sbatch.sh --model tiny
--hidden-size 1024 --num-layers 8 --vocab-size 32000 --refit-method gloo` took 17 CPU seconds for 2 ranks and 5 refits
of 295 MB."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The cores this process may use and the memory that is free; `memory_bytes` None where that is not known."""

    cores: int
    memory_bytes: int | None


def this_machine() -> Machine:
    """The machine this runs on, within the limits of its control group (a container)."""
    free = re.search(r"^MemAvailable:\s+(\d+) kB$", _text("/proc/meminfo"), re.MULTILINE)
    memory = [int(free[1]) * 1024] if free else []
    limit, used = (_text(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if limit.isdecimal() and used.isdecimal():
        memory.append(max(0, int(limit) - int(used)))
    return Machine(len(os.sched_getaffinity(0)), min(memory, default=None))


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""


def is_on_cpus(scenario: Scenario) -> bool:
    """Whether the ranks would run on this machine's CPUs: as asked, as the method needs, or as AUTO would choose."""
    if scenario.device is not None:
        return scenario.device == "cpu"
    return not has_gpu() if scenario.method == AUTO else METHODS[scenario.method].device == "cpu"


def has_gpu() -> bool:
    """Whether torch finds a GPU here, as the ranks will ask. Another process asks, since this one needs no torch."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def most_cpu_ranks(machine: Machine, start: Start = SPAWNED) -> int:
    """The most ranks that its cores may run."""
    return max(start.few_ranks, RANKS_PER_CORE * machine.cores)


def check_cpus(scenario: Scenario, run: DryRun | None, machine: Machine, start: Start = SPAWNED) -> None:
    """Raise UsageError, with both figures, where `machine` has too few cores, memory or speed for ranks on CPUs.

    `run` None: the model's size is not known, only its ranks count.
    """
    num_ranks, most_ranks = scenario.num_ranks, most_cpu_ranks(machine, start)
    memory_bytes, run_s = _cpu_memory_bytes(scenario, run, start), _cpu_run_s(scenario, run, machine.cores, start)
    problems = []
    if num_ranks > most_ranks:
        problems.append(f"{num_ranks} ranks > {most_ranks} for {machine.cores} cores")
    if machine.memory_bytes is not None and memory_bytes > machine.memory_bytes:
        problems.append(f"{units.gb(memory_bytes)} of memory > {units.gb(machine.memory_bytes)} free")
    if run_s > MAX_CPU_RUN_S:
        problems.append(f"about {run_s / 3600:,.1f} hours > {MAX_CPU_RUN_S / 3600:g}")
    if problems:
        raise UsageError(f"ranks on the CPUs of this machine need too much: {', '.join(problems)}: {REMEDY}")


def check_running(scenario: Scenario, machine: Machine) -> None:
    """Raise UsageError, with both figures, where ranks that have been started, all on `machine`, are about to hold more
    than the memory that is free. Their processes have theirs already."""
    if scenario.model is None or machine.memory_bytes is None:
        return
    needed = _weights_bytes(scenario, dry_run(scenario, DryRunOptions()))
    if needed > machine.memory_bytes:
        raise UsageError(
            f"the weights of {scenario.num_ranks} ranks on the CPUs of this machine need {units.gb(needed)} of memory "
            f"> {units.gb(machine.memory_bytes)} free: {REMEDY}"
        )


def _cpu_memory_bytes(scenario: Scenario, run: DryRun | None, start: Start) -> int:
    """Memory of all ranks: processes, weights and staging, and of a running engine."""
    processes = start.shared_bytes + scenario.num_ranks * start.rank_bytes
    if scenario.destination.running_engine is not None:
        processes += scenario.destination.world_size * ENGINE_WORKER_BYTES
    return processes + (_weights_bytes(scenario, run) if run is not None else 0)


def _weights_bytes(scenario: Scenario, run: DryRun) -> int:
    """Both sides' weights, what encodings need, and staging, of which a rank uses no more than it moves."""
    moved = run.matrix.sum(axis=0) + run.matrix.sum(axis=1) - 2 * run.matrix.diagonal()
    staging = sum(min(scenario.staging_bytes, int(nbytes)) for nbytes in moved)
    held = (run.source_bytes, run.destination_bytes, run.encoding_bytes)
    return sum(sum(each.values()) for each in held) + staging


def _cpu_run_s(scenario: Scenario, run: DryRun | None, cores: int, start: Start) -> float:
    """Rough seconds of a whole run on that many cores."""
    payload_bytes = run.cost.payload_bytes if run else 0
    num_refits = scenario.num_warmup + scenario.most_iterations
    start_s = start.shared_s + scenario.num_ranks * start.rank_s
    return (start_s + num_refits * payload_bytes / CPU_BYTES_PER_S) / cores
