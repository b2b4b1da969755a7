"""Checks scenarios before a run, without a GPU: what each needs and moves, and whether it can run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from refit.cli.parsing import parse, read_flags
from refit.cli.side_flags import read_mode, read_sides
from refit.config.registry import METHODS
from refit.config.scenario import Scenario, num_nodes
from refit.config.side import SideSpec
from refit.errors import UsageError
from refit.predict.cpus import SPAWNED, Machine, Start, check_cpus
from refit.predict.dry_run import DryRun, DryRunOptions, dry_run
from refit.predict.memory import check_memory
from refit.results.status import Status
from refit.results.sweep import Planned
from refit.sweep.selection import Candidate


@dataclass(frozen=True, slots=True)
class Placement:
    """Ranks to start: `ranks_per_node` on each of `nodes`. Those beyond `num_ranks`, on the last node, stay idle."""

    num_ranks: int
    nodes: int
    ranks_per_node: int


def place(num_ranks: int, gpus_per_node: int | None, ranks_per_gpu: int = 1) -> Placement:
    """The fewest nodes that suffice, with a rank on every GPU, so that ranks planned for one node share it.

    `gpus_per_node` None: ranks on CPUs, where an idle one would only take a core from the others. On one node where
    ranks share GPUs, idle ones would spread the others over more GPUs: none is started.
    """
    ranks_per_node = gpus_per_node * ranks_per_gpu if gpus_per_node else max(num_ranks, 1)
    if ranks_per_gpu > 1:
        ranks_per_node = min(ranks_per_node, max(num_ranks, 1))
    return Placement(num_ranks, num_nodes(num_ranks, ranks_per_node), ranks_per_node)


def checked(
    flags: Sequence[str], options: DryRunOptions, machine: Machine | None = None, start: Start = SPAWNED
) -> tuple[Scenario, DryRun | None]:
    """A scenario and its dry run. The dry run is None for a model provider, whose model has no known shape.

    Raises UsageError, with the remedy, for a scenario that `options.num_gpus` GPUs of that cluster cannot run, or that
    the CPUs of `machine` cannot, where ranks are started as `start` says. `machine` None: the ranks are not on CPUs.
    """
    scenario = parse(flags).scenario
    if scenario.model is None:
        options.check_num_gpus(scenario)
        run = None
    else:
        run = dry_run(scenario, replace(options, cluster=options.cluster or scenario.cluster))
        check_memory(run)
    if machine is not None:
        check_cpus(scenario, run, machine, start)
    return scenario, run


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
        placement = place(max(source.ranks.stop, destination.ranks.stop), gpus_per_node, args.ranks_per_gpu)
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
    """`flags` with the CPU stand-in of a GPU method, and a note about it; "" where none is needed. No GPU is shared."""
    args = read_flags(flags)
    method = args.refit_method
    # The last --ranks-per-gpu and the last --refit-method count.
    flags = [*flags, "--ranks-per-gpu=1"] if args.ranks_per_gpu > 1 else list(flags)
    stand_in = METHODS[method].cpu_stand_in if method in METHODS else None
    if stand_in is None:
        return flags, ""
    note = f"There is no GPU here: ranks run on CPUs and --refit-method {stand_in} stands in for {method}."
    return [*flags, f"--refit-method={stand_in}"], note
