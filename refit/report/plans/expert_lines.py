"""The expert placement of a dry run: which expert is on which GPU and node, and what the placement costs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

from refit import units
from refit.predict.dry_run import DryRun
from refit.predict.expert_map import ExpertMap
from refit.report.plans.bound_text import bound_text


def expert_lines(run: DryRun) -> list[str]:
    """The map of each placement, its bytes beside linear's, and the same after a change of placement. May be empty."""
    if not run.expert_maps:
        return []
    lines = ["", f"Experts of {run.scenario.destination.title}: {_per_gpu(run.expert_maps)}"]
    for one in run.expert_maps:
        lines += [
            f"layer{'s' if len(one.layers) > 1 else ''} {_ranges(one.layers)}:",
            *_by_node(one, run.traffic.ranks_per_node, "rank" if run.gpus.is_shared else "GPU"),
        ]
    lines += ["", f"Refit of this placement: {_traffic(run)}"]
    if run.linear is not None:
        lines.append(f"Refit of linear:         {_traffic(run.linear)}")
        lines.append(f"This placement beside linear: {_beside(run, run.linear)}")
    if run.rearranged is not None:
        lines += ["", "After the experts are placed anew:", *expert_lines(run.rearranged)[1:]]
    return lines


def _per_gpu(maps: Sequence[ExpertMap]) -> str:
    counts = {len(experts) for one in maps for experts in one.experts_of.values()}
    slots = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{counts.pop()}"
    share = "" if maps[0].share == 1 else f", 1/{round(1 / maps[0].share)} of each"
    copies = [sum(len(held) for held in one.experts_of.values()) for one in maps]
    return (
        f"{slots} per GPU and layer{share}; {maps[0].num_experts} experts in {_least_to_most(copies)} places of "
        f"{len(maps[0].experts_of)} GPUs"
    )


def _least_to_most(values: Sequence[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)} to {max(values)}"


def _by_node(one: ExpertMap, ranks_per_node: int, place: str) -> Iterator[str]:
    for node, ranks in itertools.groupby(one.experts_of, key=lambda rank: rank // ranks_per_node):
        yield f"  node {node}: " + " | ".join(f"{place} {rank}: {_ranges(one.experts_of[rank])}" for rank in ranks)


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3, 7`."""
    texts = []
    for _, group in itertools.groupby(enumerate(sorted(numbers)), key=lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        texts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return ", ".join(texts)


def _totals(run: DryRun) -> tuple[int, int]:
    return int(run.traffic.sent_within.sum()), int(run.traffic.sent_between.sum())


def _traffic(run: DryRun) -> str:
    within, between = _totals(run)
    cluster = run.options.cluster
    bound = f", lower bound {bound_text(run.bound, cluster)}" if cluster is not None else ""
    return f"{units.gb(within)} within nodes, {units.gb(between)} between nodes{bound}"


def _beside(run: DryRun, linear: DryRun) -> str:
    changes = [
        f"{units.signed_gb(mine - theirs)} {where}"
        for mine, theirs, where in zip(_totals(run), _totals(linear), ("within nodes", "between nodes"), strict=True)
    ]
    busiest = run.cost.busiest.nbytes - linear.cost.busiest.nbytes
    memory = max(run.destination_bytes.values()) - max(linear.destination_bytes.values())
    changes += [f"{units.signed_gb(busiest)} on the busiest GPU", f"{units.signed_gb(memory)} of weights per GPU"]
    if run.bound is not None and linear.bound is not None:
        changes.append(f"{1e3 * (run.bound.seconds - linear.bound.seconds):+.2f} ms of lower bound")
    return ", ".join(changes)
