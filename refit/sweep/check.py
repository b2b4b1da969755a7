"""The check before a run: what each scenario needs and moves, and whether it can be honoured, without a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from refit.cli.launch import check_num_ranks
from refit.cli.parsing import layouts, parse, read_flags
from refit.config.layout import Layout
from refit.config.scenario import Method, Scenario
from refit.errors import UsageError
from refit.plan.cost import Cost
from refit.predict.dry_run import DryRun, DryRunOptions, dry_run
from refit.predict.memory import check_memory
from refit.results.sweep import Planned, PlannedBytes, Side, Status
from refit.sweep.selection import Candidate

CPU_METHODS = {Method.NVSHMEM.value: Method.SHM.value, Method.NCCL.value: Method.GLOO.value}
"""What stands in for a GPU method on CPU ranks: the same executor over another substrate."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Ranks to start: `ranks_per_node` on each of `nodes`. Those beyond `num_ranks`, on the last node, stay idle."""

    num_ranks: int
    nodes: int
    ranks_per_node: int


def place(num_ranks: int, gpus_per_node: int) -> Placement:
    """As few nodes as will do, a rank on every GPU of each, so that the ranks planned for a node share it."""
    return Placement(num_ranks, math.ceil(num_ranks / gpus_per_node), gpus_per_node)


def checked(flags: Sequence[str], options: DryRunOptions) -> tuple[Scenario, DryRun | None]:
    """A scenario and its dry run, None where a model provider hides the model's shape.

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
    """What becomes of one scenario of a sweep; an error of its own is its reason and not raised."""
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
        bytes=_bytes(run.cost),
        lower_bound_s=run.bound.seconds if run.bound else None,
        limited_by=run.bound.limited_by if run.bound else None,
        memory_bytes=run.memory_bytes,
    )


def recheck(planned: Planned, options: DryRunOptions) -> Planned:
    """Check a scenario of an earlier sweep again, against other GPUs. A skipped one stays a cell of its axis."""
    return check(Candidate(planned.name, planned.flags, is_cell=planned.status is Status.SKIPPED), options)


def _outline(candidate: Candidate, gpus_per_node: int) -> Planned:
    """What the flags say by themselves, so that a refused scenario too is shown with its layout."""
    args = read_flags(candidate.flags)
    try:
        source, destination = layouts(args)
        placement = place(max(source.ranks.stop, destination.ranks.stop), gpus_per_node)
        sides: tuple[Side | None, Side | None] = (_side(source), _side(destination))
    except UsageError:
        placement, sides = Placement(0, 0, 0), (None, None)
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


def _side(layout: Layout) -> Side:
    return Side(layout.tp, layout.ep, layout.etp, layout.pp, layout.world_size)


def _bytes(cost: Cost) -> PlannedBytes:
    sender, receiver = cost.busiest_sender, cost.busiest_receiver
    busiest, direction = (receiver, "receives") if receiver.nbytes >= sender.nbytes else (sender, "sends")
    return PlannedBytes(cost.payload_bytes, cost.wire_bytes, cost.local_bytes, busiest.nbytes, busiest.rank, direction)


def on_cpus(flags: Sequence[str]) -> tuple[list[str], str]:
    """`flags` with the GPU method replaced by its stand-in on CPUs, and a sentence that says so; "" where none is
    needed."""
    words = list(flags)
    for index, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag == "--refit-method" and value in CPU_METHODS:
            words[index] = f"--refit-method={CPU_METHODS[value]}"
        elif word in CPU_METHODS and index and words[index - 1] == "--refit-method":
            words[index] = CPU_METHODS[word]
    before, after = (read_flags(line).refit_method for line in (flags, words))
    if before == after:
        return words, ""
    return words, f"There is no GPU here: ranks run on CPUs and --refit-method {after} stands in for {before}."
