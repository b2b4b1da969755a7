"""The summary of a sweep: a few lines per scenario that people read, and that scripts may search."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from refit import units
from refit.results.outcomes import EngineFigures, Figures, Outcome
from refit.results.sweep import Side, Sweep

STATUS_TEXTS = {
    "ok": "ok",
    "wrong_data": "wrong data",
    "failed": "failed",
    "waived": "waived",
    "refused": "refused",
    "skipped": "skipped",
    "missing": "missing",
}
"""Every status of an outcome, in the order they are counted."""


def summary_text(sweep: Sweep, outcomes: Sequence[Outcome]) -> str:
    """The summary file's content, without a newline at its end."""
    title = f"{sweep.title} Refit Benchmark Summary".strip()
    lines = [
        title,
        "=" * len(title),
        f"Date: {sweep.date}",
        f"Job ID: {', '.join(sweep.jobs) or 'none'}",
        f"Nodes: {sweep.nodes}",
        f"Total GPUs: {sweep.num_gpus}",
        "",
        "Results:",
        "--------",
        "",
    ]
    for outcome in outcomes:
        lines += [*_scenario(outcome), ""]
    measured = [outcome.figures for outcome in outcomes if outcome.figures.median_s]
    if measured and not any(figures.lower_bound_s for figures in measured):
        lines += ["No lower bounds: no cluster's link speeds were given (--cluster NAME, see configs/clusters)", ""]
    return "\n".join([*lines, counts_line(outcomes)])


def counts_line(outcomes: Sequence[Outcome]) -> str:
    """`7 scenarios: 5 ok, 1 failed, 1 refused`."""
    counts = Counter(outcome.status for outcome in outcomes)
    parts = ", ".join(f"{counts[status]} {text}" for status, text in STATUS_TEXTS.items() if counts[status])
    return f"{len(outcomes)} scenario{'' if len(outcomes) == 1 else 's'}: {parts or 'none'}"


def side_text(side: Side | None) -> str:
    """`TP=8, EP=4 (32 GPUs)`; ETP where it is not TP, PP where it is not 1."""
    if side is None:
        return "not a valid layout"
    parts = [f"TP={side.tp}", f"EP={side.ep}"]
    parts += [f"ETP={side.etp}"] if side.etp != side.tp else []
    parts += [f"PP={side.pp}"] if side.pp > 1 else []
    return f"{', '.join(parts)} ({side.world_size} GPU{'' if side.world_size == 1 else 's'})"


def _scenario(outcome: Outcome) -> list[str]:
    planned, figures = outcome.planned, outcome.figures
    lines = [
        f"Config: {planned.name}",
        f"  Source: {side_text(planned.source)}",
        f"  Target: {side_text(planned.destination)}",
        f"  Mode: {planned.mode}, Method: {planned.method}",
    ]
    if outcome.status != "ok":
        lines.append(f"{STATUS_TEXTS[outcome.status].upper()}: {outcome.reason}")
        lines += [f"Log: {outcome.log}"] if outcome.log else []
    if figures.engine is not None and figures.median_s is not None:
        lines += [*_times(figures.engine), *_plan(figures), *_verification(figures, figures.engine), *_peer(figures)]
    return lines


def _times(engine: EngineFigures) -> list[str]:
    named = (
        ("Mean refit time:", engine.mean_s),
        ("Min refit time: ", engine.min_s),
        ("Max refit time: ", engine.max_s),
        ("Median refit time:", engine.median_s),
    )
    return [f"{name} {1e3 * seconds:.2f} ms" for name, seconds in named if seconds is not None]


def _plan(figures: Figures) -> list[str]:
    lines, moved, engine = [], figures.moved, figures.engine
    if moved is not None:
        lines.append(
            f"Payload: {units.gb(moved.payload)} ({units.gb(moved.wire)} between GPUs, {units.gb(moved.local)} within)"
        )
        if moved.busiest_rank is not None:
            lines.append(f"Busiest rank: {moved.busiest_rank} {moved.busiest_direction} {units.gb(moved.busiest)}")
    if engine is not None and engine.gb_per_s is not None:
        lines.append(f"Bottleneck bandwidth: {engine.gb_per_s:.3f} GB/s")
    if figures.lower_bound_s is not None and figures.share is not None:
        cause = f" ({figures.limited_by})" if figures.limited_by else ""
        lines.append(f"Lower bound: {units.seconds(figures.lower_bound_s)}{cause}")
        lines.append(f"Share of lower bound: {100 * figures.share:.1f} %")
    return lines


def _verification(figures: Figures, engine: EngineFigures) -> list[str]:
    if not engine.num_compared:
        return ["Verification: none, no element was compared"]
    how = " (every 16th row)" if figures.verify == "sample" else ""
    verdict = "FAILED" if engine.num_wrong else "PASSED"
    return [f"Verification: {verdict}, {engine.num_compared:,} elements compared{how}, {engine.num_wrong:,} wrong"]


def _peer(figures: Figures) -> list[str]:
    peer = figures.peer
    if peer is None:
        return []
    if peer.median_s is None or figures.peer_ratio is None:
        return [f"Megatron-Core: {peer.status}: {peer.reason or 'no reason was recorded'}"]
    wrong = f", {peer.num_wrong:,} of its elements WRONG" if peer.num_wrong else ""
    return [f"Megatron-Core: {1e3 * peer.median_s:.2f} ms median, refit is {figures.peer_ratio:.2f} x as fast{wrong}"]
