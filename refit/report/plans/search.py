"""The layouts that `refit search` found, as a table, JSON and CSV."""

from __future__ import annotations

import json
from dataclasses import asdict

from refit import units
from refit.config.clusters import Cluster
from refit.config.quantisation import BLOCK_FORMATS
from refit.predict.findings import Crossing, Findings, Found
from refit.report.refits.delta_lines import percent
from refit.report.terminal.console import table_width
from refit.report.terminal.grid import Column, comma_separated, fitted
from refit.results.plain import plain


def as_text(findings: Findings, cluster: Cluster, top: int) -> str:
    """What was searched, the `top` layouts with the lowest bounds and those of the Pareto set, and what limits."""
    shown = sorted({*range(min(top, len(findings.found))), *findings.pareto})
    sources = {found.source for found in findings.found}
    dtype = _quantised(findings)
    large = max(found.busiest.nbytes for found in findings.found) >= 1e9
    crosses = any(found.crossing for found in findings.found)
    rows = []
    for index in shown:
        found = findings.found[index]
        destination = found.destination.removesuffix(f" {dtype}")
        layouts = f"{found.source} -> {destination}" if len(sources) > 1 else destination
        rows.append([f"{'*' if index in findings.pareto else ' '} {layouts}", *_figures(found, large, crosses)])
    table = fitted(_columns("destination" if len(sources) == 1 else "layouts", large, crosses), rows, table_width())
    more = len(findings.found) - len(shown)
    lines = [*_counts(findings, cluster), "", table, *([f"  {more:,} more: --top {len(findings.found)}"] * bool(more))]
    lines += [*_without_bound(findings, cluster), "", LEGEND, *([CROSSING] if crosses else [])]
    share = findings.found[0].share
    if share is not None:
        lines.insert(0, f"Sent:    what has changed, {percent(share)} % of the weights: bounds are those of that")
    if dtype is not None:
        lines.insert(0, f"Dtype:   {dtype} at the destination")
    if len(sources) == 1:
        lines.insert(0, f"Source:  {plain(sources.pop())} on {findings.found[0].source_ranks} GPUs")
    best = findings.found[0].bound
    return "\n".join([*lines, f"First row: {best.limited_by}."] if best else lines)


def _quantised(findings: Findings) -> str | None:
    """The FP8 dtype that all destinations name in their titles; None where they are not FP8."""
    destinations = [found.destination for found in findings.found]
    return next((name for name in BLOCK_FORMATS if all(each.endswith(f" {name}") for each in destinations)), None)


LEGEND = """\
bound: lower bound of the refit, no forecast: real ones take longer.
floor: the bound of the best plan there could be.
busiest: most bytes a rank sends or gets.
memory: weights, staging and what quantising needs on the fullest GPU. KV: what
is left of it, and the tokens whose BF16 cache fits there on one replica.
*: none is as good in both bound and memory."""

CROSSING = """\
between, within: bytes between nodes and within them. direct: between nodes
without a relay. least: between nodes in every plan."""


def _without_bound(findings: Findings, cluster: Cluster) -> list[str]:
    """Why some layouts have no bound."""
    unbounded = [found for found in findings.found if found.bound is None]
    if not unbounded:
        return []
    ranks = max(found.source_ranks + found.destination_ranks for found in unbounded)
    return [
        f"-: no bound. {cluster.name} has no speed between nodes of {cluster.gpus_per_node} GPUs, and",
        f"{ranks} GPUs are on several: give --refit-mode collocated, or fewer GPUs.",
    ]


def _counts(findings: Findings, cluster: Cluster) -> list[str]:
    memory = f"{units.gb(cluster.gpu_memory_bytes)} per GPU" if cluster.gpu_memory_bytes else "memory not known"
    lines = [
        f"Layouts: {findings.num_built:,} can be built, {findings.num_built - findings.num_too_large:,} fit, "
        f"{len(findings.found):,} were planned",
        f"Cluster: {cluster.name}, {memory}",
    ]
    if findings.num_unplanned:
        floor = units.seconds(findings.unplanned_floor_s or 0.0)
        lines.append(f"Not planned: {findings.num_unplanned:,} with bounds from {floor} up (--max-plans)")
    return lines


def _columns(layouts: str, large: bool, crosses: bool) -> list[Column]:
    moved = "(GB)" if large else "(MB)"
    crossing = [*(Column(name, moved) for name in ("between", "within", "direct", "least")), Column("relay")]
    return [
        Column(f"  {layouts}", is_text=True),
        Column("bound", "(ms)"),
        Column("floor", "(ms)"),
        Column("busiest", moved),
        Column("memory", "(GiB)"),
        Column("KV", "(GiB)"),
        Column("KV", "(tokens)"),
        *(crossing if crosses else [Column("wire", moved)]),
    ]


def _figures(found: Found, large: bool, crosses: bool) -> tuple[str, ...]:
    scale = 1e9 if large else 1e6
    return (
        *(
            f"{1e3 * bound.seconds:,.{1 if large else 3}f}" if bound else "-"
            for bound in (found.bound, None if found.share is not None else found.floor)
        ),
        f"{found.busiest.nbytes / scale:,.2f}",
        f"{found.memory_bytes / 2**30:,.2f}",
        "-" if found.kv_room_bytes is None else f"{found.kv_room_bytes / 2**30:,.2f}",
        "-" if found.kv_tokens is None else units.count(found.kv_tokens),
        *(_crossing(found.crossing, scale) if crosses else (f"{found.wire_bytes / scale:,.1f}",)),
    )


def _crossing(crossing: Crossing | None, scale: float) -> tuple[str, ...]:
    if crossing is None:
        return ("-",) * 5
    moved = (crossing.between_bytes, crossing.within_bytes, crossing.direct_bytes, crossing.least_bytes)
    return (*(f"{nbytes / scale:,.1f}" for nbytes in moved), crossing.relay.value)


def as_json(findings: Findings, cluster: Cluster, top: int) -> str:
    """Every layout found, in bytes and seconds, with the cluster's name and what was left out."""
    counts = {name: getattr(findings, name) for name in ("num_built", "num_too_large", "num_unplanned")}
    return json.dumps(
        {"cluster": cluster.name, **counts, "unplanned_floor_s": findings.unplanned_floor_s, "found": _rows(findings)},
        indent=1,
    )


def as_csv(findings: Findings, cluster: Cluster, top: int) -> str:
    """The same rows as CSV."""
    rows: list[dict[str, object]] = [
        {"cluster": cluster.name, **row, "flags": " ".join(found.flags)}
        for row, found in zip(_rows(findings), findings.found, strict=True)
    ]
    return comma_separated(tuple(rows[0]), [tuple(row.values()) for row in rows])


MOVED = ("between", "within", "direct", "least")
"""The bytes of a `Crossing`."""


def _rows(findings: Findings) -> list[dict[str, object]]:
    return [_row(found, index in findings.pareto) for index, found in enumerate(findings.found)]


def _row(found: Found, on_front: bool) -> dict[str, object]:
    row = asdict(found)
    busiest, bound, floor = row.pop("busiest"), row.pop("bound") or {}, row.pop("floor") or {}
    flags, crossing = row.pop("flags"), found.crossing
    del row["crossing"]
    return {
        **row,
        **{f"busiest_{name}": value for name, value in busiest.items()},
        "lower_bound_s": bound.get("seconds"),
        "limited_by": bound.get("limited_by"),
        "floor_s": floor.get("seconds"),
        "relay": crossing.relay.value if crossing else None,
        **{f"{name}_bytes": getattr(crossing, f"{name}_bytes", None) for name in MOVED},
        "pareto": on_front,
        "flags": flags,
    }
