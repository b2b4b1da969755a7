"""The layouts that `refit search` found, as a table, JSON and CSV."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

from refit import units
from refit.config.clusters import Cluster
from refit.config.quantisation import BLOCK_FORMATS
from refit.predict.findings import Findings, Found, Objective
from refit.report.plans.answer import answer
from refit.report.plans.search_rows import Row, cells_of, columns, is_large, merged, name_of, shown_rows
from refit.report.refits.delta_lines import percent
from refit.report.terminal.console import table_width, wrapped
from refit.report.terminal.grid import comma_separated, fitted
from refit.results.plain import plain


def as_text(findings: Findings, cluster: Cluster, top: int) -> str:
    """What was searched, the answer, and a row for each of the `top` layouts, those of the Pareto set included."""
    every = merged(findings, cells_of(findings))
    shown = shown_rows(findings, every, top)
    sources = {found.source for found in findings.found}
    dtype = quantised(findings)
    crosses = any(found.crossing for found in findings.found)
    rows = []
    for row in shown:
        name = name_of(row, findings, dtype)
        layouts = f"{findings.found[row.members[0]].source} -> {name}" if len(sources) > 1 else name
        rows.append([f"{'*' if row.is_best else ' '} {layouts}", *row.cells])
    layouts = "destination" if len(sources) == 1 else "layouts"
    titles = columns(findings.objective, layouts, is_large(findings.found), crosses)
    table = fitted(titles, rows, table_width())
    more = len(every) - len(shown)
    hint = f"--top {len(every)}" if findings.every else "--all"
    lines = [*heading(findings, cluster, every), "", table, *([f"  {more:,} more: {hint}"] * bool(more))]
    return wrapped("\n".join([*lines, "", *_legend(findings, cluster, crosses)]), table_width())


def heading(findings: Findings, cluster: Cluster, rows: list[Row]) -> list[str]:
    """The answer, where there is one, and what was searched: a line for each. `rows` are all of the search."""
    dtype, first = quantised(findings), findings.found[0]
    best = answer(findings, rows, dtype)
    lines = [best, ""] if best else []
    if len({found.source for found in findings.found}) == 1:
        lines.append(f"Source:  {plain(first.source)} on {first.source_ranks} GPUs")
    if dtype is not None:
        lines.append(f"Dtype:   {dtype} at the destination")
    if first.share is not None:
        lines.append(f"Sent:    what has changed, {percent(first.share)} % of the weights: bounds are those of that")
    return [*lines, *_counts(findings, cluster)]


def quantised(findings: Findings) -> str | None:
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

SERVED_LEGEND = """\
All times are lower bounds, no forecasts: real ones take longer. docs/search.md
has their formulas, --explain LAYOUT each term of them.
decode: one step of the batch. prefill: the prompts of a cycle.
memory: weights, staging and what quantising needs on the fullest GPU. KV: what
is left of it. batch: the most sequences whose BF16 cache fits there.
*: none is as good in both {objective} and memory."""

CROSSING = """\
between, within: bytes between nodes and within them. direct: between nodes
without a relay. least: between nodes in every plan."""


def _legend(findings: Findings, cluster: Cluster, crosses: bool) -> list[str]:
    if findings.objective is not Objective.REFIT:
        return [SERVED_LEGEND.format(objective=findings.objective.value)]
    return [*_without_bound(findings, cluster), LEGEND, *([CROSSING] if crosses else [])]


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
    fit = findings.num_built - findings.num_too_large
    batch = ""
    if findings.num_batch_too_large:
        batch = f", {fit - findings.num_batch_too_large:,} of them with the batch's cache"
    lines = [
        f"Layouts: {findings.num_built:,} can be built, {fit:,} fit{batch}, {len(findings.found):,} were planned",
        f"Cluster: {cluster.name}, {memory}",
        *_served(findings),
    ]
    lines += [
        f"Left out: {count:,} that {reason.partition(' ')[0]} cannot have: {reason.partition(' ')[2]}"
        for reason, count in findings.refused.values()
    ]
    if findings.num_unbounded:
        lines.append(f"Left out: {findings.num_unbounded:,} on several nodes: {cluster.name} has no speed between them")
    if findings.num_beaten:
        lines.append(f"Not planned: {findings.num_beaten:,} that cannot be better in both (--all plans them too)")
    if findings.num_unplanned:
        floor = units.seconds(findings.unplanned_floor_s or 0.0)
        lines.append(f"Not planned: {findings.num_unplanned:,} with bounds from {floor} up (--max-plans)")
    return lines


def _served(findings: Findings) -> list[str]:
    """What is served, in words."""
    found = findings.found[0]
    if found.rollouts is None:
        return []
    work = found.rollouts.workload
    lines = [
        f"Served:  {work.batch:,} sequences at a time of {work.context:,} tokens on average, experts chosen "
        f"{'uniformly' if not work.routing.loads else f'as in {plain(work.routing.name)}'}"
    ]
    if findings.objective is Objective.CYCLE:
        train = "given" if work.train_s is not None else "its operations at full speed"
        lines.append(
            f"Cycle:   {units.count(work.rollout_tokens)} tokens decoded, prompts of {work.prompt:,}, a training step "
            f"of {units.seconds(found.train_s)} ({train}), a refit"
        )
    return lines


def as_json(findings: Findings, cluster: Cluster, top: int) -> str:
    """Every layout found, in bytes and seconds, with the cluster's name and what was left out."""
    counts = {name: getattr(findings, name) for name in COUNTS}
    return json.dumps(
        {
            "cluster": cluster.name,
            "objective": findings.objective.value,
            **counts,
            "unplanned_floor_s": findings.unplanned_floor_s,
            "refused": dict(findings.refused.values()),
            "found": [
                {**row, **({"decode_terms": _terms(one)} if one.rollouts is not None else {})}
                for row, one in zip(_rows(findings), findings.found, strict=True)
            ],
        },
        indent=1,
    )


def as_csv(findings: Findings, cluster: Cluster, top: int) -> str:
    """The same rows as CSV."""
    rows: list[dict[str, object]] = [
        {"cluster": cluster.name, **row, "flags": " ".join(found.flags)}
        for row, found in zip(_rows(findings), findings.found, strict=True)
    ]
    return comma_separated(tuple(rows[0]), [tuple(row.values()) for row in rows])


COUNTS = ("num_built", "num_too_large", "num_batch_too_large", "num_unbounded", "num_beaten", "num_unplanned")
NESTED = ("crossing", "layout", "rollouts", "train_s", "busiest", "bound", "floor")

MOVED = ("between", "within", "direct", "least")
"""The bytes of a `Crossing`."""


def _rows(findings: Findings) -> list[dict[str, object]]:
    return [_row(found, index in findings.pareto) for index, found in enumerate(findings.found)]


def _row(found: Found, on_front: bool) -> dict[str, object]:
    row = {field.name: getattr(found, field.name) for field in fields(found) if field.name not in NESTED}
    row |= {name: asdict(value) if (value := getattr(found, name)) else {} for name in ("busiest", "bound", "floor")}
    busiest, bound, floor = row.pop("busiest"), row.pop("bound") or {}, row.pop("floor") or {}
    flags, crossing = row.pop("flags"), found.crossing
    return {
        **row,
        **{f"busiest_{name}": value for name, value in busiest.items()},
        "lower_bound_s": bound.get("seconds"),
        "limited_by": bound.get("limited_by"),
        "floor_s": floor.get("seconds"),
        "relay": crossing.relay.value if crossing else None,
        **{f"{name}_bytes": getattr(crossing, f"{name}_bytes", None) for name in MOVED},
        **_serving(found),
        "pareto": on_front,
        "flags": flags,
    }


def _serving(found: Found) -> dict[str, object]:
    """The bounds of serving; empty where they were not asked for."""
    rollouts, cycle = found.rollouts, found.cycle
    if rollouts is None or cycle is None:
        return {}
    return {
        "decode_step_s": rollouts.decode.seconds,
        "tokens_per_s": rollouts.tokens_per_s,
        "decode_limited_by": f"{rollouts.decode.largest.name}: {rollouts.decode.largest.limited_by}",
        "cycle_s": None if found.bound is None else cycle.seconds,
        "train_s": cycle.train_s,
        "decode_s": cycle.decode_s,
        "prefill_s": cycle.prefill_s,
    }


def _terms(found: Found) -> list[dict[str, object]]:
    return [asdict(term) for term in found.rollouts.decode.terms] if found.rollouts is not None else []
