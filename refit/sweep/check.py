"""Checks scenarios before a run, without a GPU: what each needs and moves, and whether it can run."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from refit.cli.parsing import parse, read_flags, read_sides
from refit.config.registry import METHODS
from refit.config.scenario import Scenario, check_num_ranks, num_nodes
from refit.config.side import SideSpec
from refit.errors import UsageError
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


def place(num_ranks: int, gpus_per_node: int) -> Placement:
    """The fewest nodes that suffice, with a rank on every GPU, so that ranks planned for one node share it."""
    return Placement(num_ranks, num_nodes(num_ranks, gpus_per_node), gpus_per_node)


def checked(flags: Sequence[str], options: DryRunOptions) -> tuple[Scenario, DryRun | None]:
    """A scenario and its dry run. The dry run is None for a model provider, whose model has no known shape.

    Raises UsageError, with the remedy, for a scenario that `options.num_gpus` GPUs of that cluster cannot run.
    """
    scenario = parse(flags).scenario
    if scenario.model is None:
        check_num_ranks(scenario, options.num_gpus or scenario.num_ranks)
        return scenario, None
    run = dry_run(scenario, replace(options, cluster=options.cluster or scenario.cluster))
    check_memory(run)
    return scenario, run


def check(candidate: Candidate, options: DryRunOptions) -> Planned:
    """Check one scenario of a sweep. A UsageError becomes its `reason` and is not raised."""
    planned = _outline(candidate, options.gpus_per_node)
    try:
        scenario, run = checked(candidate.flags, options)
    except UsageError as error:
        return replace(planned, status=Status.SKIPPED if candidate.is_cell else Status.REFUSED, reason=str(error))
    planned = replace(planned, notes=scenario.notes)
    if run is None:
        return planned
    return replace(
        planned,
        cost=run.cost,
        bound=run.bound,
        memory_bytes=run.memory_bytes,
    )


def recheck(planned: Planned, options: DryRunOptions) -> Planned:
    """Check a scenario of an earlier sweep again, for other GPUs. A skipped one still counts as a cell of an axis."""
    return check(Candidate(planned.name, planned.flags, is_cell=planned.status is Status.SKIPPED), options)


def _outline(candidate: Candidate, gpus_per_node: int) -> Planned:
    """The part of Planned that needs no check, so that a refused scenario is also shown with its layout."""
    args = read_flags(candidate.flags)
    sides: tuple[SideSpec | None, SideSpec | None] = (None, None)
    placement = Placement(0, 0, 0)
    with contextlib.suppress(UsageError):
        source, destination = sides = read_sides(args)
        placement = place(max(source.ranks.stop, destination.ranks.stop), gpus_per_node)
    return Planned(
        name=candidate.name,
        flags=tuple(candidate.flags),
        source=sides[0],
        destination=sides[1],
        mode=args.refit_mode,
        method=args.refit_method or "",
        num_ranks=placement.num_ranks,
        nodes=placement.nodes,
        ranks_per_node=placement.ranks_per_node,
        status=Status.READY,
    )


def on_cpus(flags: Sequence[str]) -> tuple[list[str], str]:
    """`flags` with the CPU stand-in of a GPU method, and a note about it; "" where none is needed."""
    method = read_flags(flags).refit_method
    stand_in = METHODS[method].cpu_stand_in if method else None
    if stand_in is None:
        return list(flags), ""
    # The last --refit-method counts.
    note = f"There is no GPU here: ranks run on CPUs and --refit-method {stand_in} stands in for {method}."
    return [*flags, f"--refit-method={stand_in}"], note
