"""Bytes, memory and lower bounds of scenarios, as a Markdown table, or as one for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from refit import units
from refit.config.clusters import Cluster
from refit.plan.cost import lower_bound
from refit.predict.dry_run import DryRun
from refit.report.terminal.escaped import markdown_text
from refit.report.terminal.grid import Column, fitted


def bounds_table(runs: Mapping[str, DryRun], clusters: Sequence[Cluster], width: int | None = None) -> str:
    """One row per scenario, by name, and one column of lower bounds per cluster, with the floor of all plans where that
    is lower.

    `-` where the cluster has no speed for a link. Markdown, but for a terminal of `width` characters.
    """
    titles = ["scenario", "GPUs", "payload", "wire", "busiest rank", "memory per GPU", "busiest / mean sender"]
    rows = [_row(name, run, clusters) for name, run in runs.items()]
    if width is not None:
        columns = [*map(Column, titles), *(Column("bound", cluster.name) for cluster in clusters)]
        columns[0] = Column(titles[0], is_text=True)
        return fitted(columns, rows, width)
    titles += [f"bound, {markdown_text(cluster.name)}" for cluster in clusters]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows))


def _row(name: str, run: DryRun, clusters: Sequence[Cluster]) -> list[str]:
    cost, busiest = run.cost, run.cost.busiest
    return [
        name,
        run.scenario.num_ranks_text,
        units.gb(cost.payload_bytes),
        units.gb(cost.wire_bytes),
        f"{busiest.rank} {busiest.direction} {units.gb(busiest.nbytes)}",
        units.gib(run.memory_bytes),
        f"{cost.sender_imbalance:.2f}",
        *(_bound(run, cluster) for cluster in clusters),
    ]


def _bound(run: DryRun, cluster: Cluster) -> str:
    """`1.737 s, floor 1.338 s`; without the floor where the bound reaches it."""
    bound, floor = lower_bound(run.matrix, cluster, run.gpus, run.work_bytes), run.floors[cluster]
    if bound is None:
        return "-"
    seconds, least = units.seconds(bound.seconds), units.seconds(floor.seconds) if floor else ""
    return f"{seconds}, floor {least}" if floor and floor.seconds < bound.seconds and least != seconds else seconds
