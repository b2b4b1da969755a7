"""Checks scenarios before a run, without a GPU: what each needs and moves, and whether it can run."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from refit import units
from refit.cli.parsing import parse, read_flags
from refit.cli.side_flags import read_mode, read_sides
from refit.config.registry import METHODS
from refit.config.scenario import Scenario, check_num_ranks, num_nodes
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.predict.dry_run import DryRun, DryRunOptions, dry_run
from refit.predict.memory import check_memory
from refit.results.status import Status
from refit.results.sweep import Planned
from refit.sweep.selection import Candidate

RANKS_PER_CORE = 8
FEW_RANKS = 64
"""On CPUs: at most RANKS_PER_CORE ranks a core, or FEW_RANKS where the cores are few."""

RANK_PROCESS_BYTES = 350_000_000
"""Memory of a rank's process without its weights: Python, torch and Megatron-Core."""

RANK_START_S = 8.0
CPU_BYTES_PER_S = 100e6
MAX_CPU_RUN_S = 3600.0
"""A rough time for ranks on CPUs: RANK_START_S of a core to start and build a rank, then CPU_BYTES_PER_S of payload a
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


@dataclass(frozen=True, slots=True)
class Placement:
    """Ranks to start: `ranks_per_node` on each of `nodes`. Those beyond `num_ranks`, on the last node, stay idle."""

    num_ranks: int
    nodes: int
    ranks_per_node: int


def place(num_ranks: int, gpus_per_node: int | None) -> Placement:
    """The fewest nodes that suffice, with a rank on every GPU, so that ranks planned for one node share it.

    `gpus_per_node` None: ranks on CPUs, where an idle one would only take a core from the others.
    """
    gpus_per_node = gpus_per_node or max(num_ranks, 1)
    return Placement(num_ranks, num_nodes(num_ranks, gpus_per_node), gpus_per_node)


def checked(
    flags: Sequence[str], options: DryRunOptions, machine: Machine | None = None
) -> tuple[Scenario, DryRun | None]:
    """A scenario and its dry run. The dry run is None for a model provider, whose model has no known shape.

    Raises UsageError, with the remedy, for a scenario that `options.num_gpus` GPUs of that cluster cannot run, or that
    the CPUs of `machine` cannot. `machine` None: the ranks are not on CPUs.
    """
    scenario = parse(flags).scenario
    if scenario.model is None:
        check_num_ranks(scenario, options.num_gpus or scenario.num_ranks)
        run = None
    else:
        run = dry_run(scenario, replace(options, cluster=options.cluster or scenario.cluster))
        check_memory(run)
    if machine is not None:
        check_cpus(scenario, run, machine)
    return scenario, run


def most_cpu_ranks(machine: Machine) -> int:
    """The most ranks that its cores may run."""
    return max(FEW_RANKS, RANKS_PER_CORE * machine.cores)


def check_cpus(scenario: Scenario, run: DryRun | None, machine: Machine) -> None:
    """Raise UsageError, with both figures, where `machine` has too few cores, memory or speed for ranks on CPUs.

    `run` None: the model's size is not known, only its ranks count.
    """
    num_ranks, most_ranks = scenario.num_ranks, most_cpu_ranks(machine)
    memory_bytes, run_s = _cpu_memory_bytes(scenario, run), _cpu_run_s(scenario, run, machine.cores)
    problems = []
    if num_ranks > most_ranks:
        problems.append(f"{num_ranks} ranks > {most_ranks} for {machine.cores} cores")
    if machine.memory_bytes is not None and memory_bytes > machine.memory_bytes:
        problems.append(f"{units.gb(memory_bytes)} of memory > {units.gb(machine.memory_bytes)} free")
    if run_s > MAX_CPU_RUN_S:
        problems.append(f"about {run_s / 3600:,.1f} hours > {MAX_CPU_RUN_S / 3600:g}")
    if problems:
        raise UsageError(
            f"there is no GPU here, and ranks on its CPUs need too much: {', '.join(problems)}: plan it with "
            "--dry-run, or run --model tiny on few ranks"
        )


def _cpu_memory_bytes(scenario: Scenario, run: DryRun | None) -> int:
    """Memory of all ranks: processes, both sides' weights, and staging, of which a rank uses no more than it moves."""
    processes = scenario.num_ranks * RANK_PROCESS_BYTES
    if run is None:
        return processes
    moved = run.matrix.sum(axis=0) + run.matrix.sum(axis=1) - 2 * run.matrix.diagonal()
    staging = sum(min(scenario.staging_bytes, int(nbytes)) for nbytes in moved)
    return processes + sum(run.source_bytes.values()) + sum(run.destination_bytes.values()) + staging


def _cpu_run_s(scenario: Scenario, run: DryRun | None, cores: int) -> float:
    """Rough seconds of a whole run on that many cores."""
    payload_bytes = run.cost.payload_bytes if run else 0
    num_refits = scenario.num_warmup + scenario.most_iterations
    return (scenario.num_ranks * RANK_START_S + num_refits * payload_bytes / CPU_BYTES_PER_S) / cores


def check(candidate: Candidate, options: DryRunOptions, machine: Machine | None = None) -> Planned:
    """Check one scenario of a sweep, as `checked` does. A UsageError becomes its `reason` and is not raised."""
    planned = outline(candidate, None if machine else options.gpus_per_node)
    try:
        scenario, run = checked(candidate.flags, options, machine)
    except UsageError as error:
        return replace(planned, status=Status.SKIPPED if candidate.is_cell else Status.REFUSED, reason=str(error))
    planned = replace(planned, notes=scenario.notes, scenario=scenario)
    if run is None:
        return planned
    return replace(
        planned,
        # Without a refit there are no bytes to move.
        cost=run.cost if "refit" in scenario.measurements else None,
        bound=run.bound if "refit" in scenario.measurements else None,
        memory_bytes=run.memory_bytes,
    )


def outline(candidate: Candidate, gpus_per_node: int | None) -> Planned:
    """The part of Planned that needs no check, so that a refused scenario is also shown with its layout."""
    args = read_flags(candidate.flags)
    sides: tuple[SideSpec | None, SideSpec | None] = (None, None)
    placement, mode = Placement(0, 0, 0), args.refit_mode
    with contextlib.suppress(UsageError):
        source, destination = sides = read_sides(args)
        mode = read_mode(args, sides).value
        placement = place(max(source.ranks.stop, destination.ranks.stop), gpus_per_node)
    return Planned(
        name=candidate.name,
        flags=tuple(candidate.flags),
        source=sides[0],
        destination=sides[1],
        mode=mode,
        method=args.refit_method or "",
        num_ranks=placement.num_ranks,
        nodes=placement.nodes,
        ranks_per_node=placement.ranks_per_node,
        status=Status.READY,
    )


def on_cpus(flags: Sequence[str]) -> tuple[list[str], str]:
    """`flags` with the CPU stand-in of a GPU method, and a note about it; "" where none is needed."""
    method = read_flags(flags).refit_method
    stand_in = METHODS[method].cpu_stand_in if method in METHODS else None
    if stand_in is None:
        return list(flags), ""
    # The last --refit-method counts.
    note = f"There is no GPU here: ranks run on CPUs and --refit-method {stand_in} stands in for {method}."
    return [*flags, f"--refit-method={stand_in}"], note
