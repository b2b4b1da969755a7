"""One layout's bounds of serving term by term: `refit search --explain LAYOUT`."""

from __future__ import annotations

from refit import units
from refit.config.clusters import Cluster
from refit.predict.findings import Found
from refit.predict.serving.roofline import PassBound, Term
from refit.report.plans.answer import limit
from refit.report.terminal.console import table_width, wrapped
from refit.report.terminal.grid import Column, fitted
from refit.results.plain import plain

COLUMNS = (
    Column("  term", is_text=True),
    Column("memory", "(GB)"),
    Column("TFLOP"),
    Column("in node", "(MB)"),
    Column("between", "(MB)"),
    Column("time", "(ms)"),
    Column("share", "(%)"),
    Column("limited by", is_text=True),
)


def explained(found: Found, cluster: Cluster) -> str:
    """The terms of a decode step and of a cycle's prefill, which add up, and the parts of the cycle."""
    rollouts, cycle = found.rollouts, found.cycle
    assert rollouts is not None
    assert cycle is not None
    work = rollouts.workload
    lines = [
        f"{plain(found.source)} -> {plain(found.destination)} on {found.destination_ranks} GPUs of {cluster.name}",
        f"Speeds of a GPU: {_speeds(cluster)}",
        "",
        f"Decode step: {work.batch:,} sequences of {work.context:,} tokens on {rollouts.replicas} attention replicas, "
        f"{rollouts.sequences:,} on each",
        _table(rollouts.decode),
        f"{1e3 * rollouts.decode.seconds:,.4g} ms together, {rollouts.tokens_per_s:,.0f} tokens/s on all engines: "
        f"{limit(rollouts.decode)}.",
        "",
        f"Prefill: {work.num_sequences:,.4g} prompts of {work.prompt:,} tokens, a cycle's, in one pass",
        _table(rollouts.prefill),
        f"{units.seconds(rollouts.prefill.seconds)} together: {limit(rollouts.prefill)}.",
        "",
        f"Decoding: {work.rollout_tokens:,} tokens / {work.batch:,} x {units.seconds(rollouts.decode.seconds)} = "
        f"{units.seconds(rollouts.decode_s)}",
        f"Refit: {f'{units.seconds(found.bound.seconds)}, {found.bound.limited_by}' if found.bound else 'no bound'}",
        f"Training: {units.seconds(cycle.train_s)}"
        + ("" if work.train_s is not None else f", its operations at full speed of {found.source_ranks} GPUs"),
    ]
    if found.bound is not None:
        lines.append(f"Cycle: {' + '.join(map(units.seconds, cycle.parts.values()))} = {units.seconds(cycle.seconds)}")
    lines.append(f"Memory: {units.gib(found.memory_bytes)} of weights and staging on the fullest GPU{_batch(found)}")
    return wrapped("\n".join(lines), table_width())


def _batch(found: Found) -> str:
    return "" if found.largest_batch is None else f"; the largest batch is {found.largest_batch:,}"


def _speeds(cluster: Cluster) -> str:
    speeds = [f"memory {(cluster.memory_bytes_per_s or 0) / 1e9:,g} GB/s"]
    speeds += [
        f"{name} {flops / 1e12:,g} TFLOP/s"
        for name, flops in (("BF16", cluster.bf16_flops_per_s), ("FP8", cluster.fp8_flops_per_s))
        if flops is not None
    ]
    speeds.append(f"{cluster.intra_bytes_per_s / 1e9:g} GB/s in a node of {cluster.gpus_per_node}")
    if cluster.inter_bytes_per_s is not None:
        speeds.append(f"{cluster.inter_bytes_per_s / 1e9:g} GB/s between nodes")
    return ", ".join(speeds)


def _table(bound: PassBound) -> str:
    rows = [_row(term, bound.seconds) for term in bound.terms]
    stage = f"  stage {bound.stage}, the slowest" + (f", {bound.passes} times" if bound.passes > 1 else "")
    table = fitted(COLUMNS, rows, table_width())
    return f"{table}\n{stage}" if bound.passes > 1 else table


def _row(term: Term, total_s: float) -> list[str]:
    flops = term.fp8_flops + term.other_flops
    figures = (term.nbytes / 1e9, flops / 1e12, term.moved.within / 1e6, term.moved.between / 1e6)
    return [
        f"  {term.name}",
        *("-" if not figure else f"{figure:,.3g}" for figure in figures),
        f"{1e3 * term.seconds:,.4g}",
        f"{100 * term.seconds / total_s:.1f}",
        term.limited_by,
    ]
